"""The one error that a user, not a programmer, is meant to read."""


class UserError(Exception):
    """A fault of the input: what must hold; what came; what to do. The command line
    prints it and exits with 2."""
