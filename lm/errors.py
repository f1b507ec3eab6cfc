"""The one error that a user, not a programmer, is meant to read."""


class UserError(Exception):
    """Bad input: what was expected, what was got, how to fix it. The command line prints it and exits with 2."""


def missing_package(fault: ModuleNotFoundError) -> str:
    """Returns how to install what the toolkit needs and did not find; raises the fault again where it is our own."""
    package = str(fault.name).partition(".")[0]
    if package in ("lm", "rnnorm"):
        raise fault
    return f"the toolkit needs the package {package}, which is not installed; install it with: pip install 'rnnorm[lm]'"
