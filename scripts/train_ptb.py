"""Train the paper's models on Penn Treebank: one layer of 200, tied, by cell and normalization.

Settings are those of the preset paper-CELL-NORM; other arguments are passed to `python -m lm train`, such as
`--seed 3`, `--run FOLDER` or `--set train.epochs=3`.

    python scripts/train_ptb.py --cell lstm --norm online --data FOLDER
"""

import argparse
import sys

from lm.cli import main


def arguments(given: list[str] | None = None) -> list[str]:
    """Returns the equivalent arguments of `python -m lm`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", choices=("lstm", "rnn"), default="lstm", help="recurrent cell (default: lstm)")
    parser.add_argument(
        "--norm", choices=("online", "layer", "none"), default="online", help="normalization (default: online)"
    )
    parser.add_argument("--data", default="ptb", help="folder of ptb.train.txt and so on (default: ptb, by name)")
    known, rest = parser.parse_known_args(given)
    return ["train", "--preset", f"paper-{known.cell}-{known.norm}", "--data", known.data, *rest]


if __name__ == "__main__":
    sys.exit(main(arguments()))
