"""Print the perplexity of trained runs under both protocols, a line for each.

python scripts/evaluate.py RUN... --split test
"""

import argparse
import sys
from pathlib import Path

import lm
from lm.corpora import SPLITS
from lm.errors import UserError


def main() -> int:
    """Evaluates each run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders to evaluate")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split to evaluate (default: test)")
    parser.add_argument("--data", help="corpus to evaluate on, by name or folder (default: the run's)")
    known = parser.parse_args()
    print(f"{'exact':>12} {'chunk-mean':>12} {'unigram':>12}  run ({known.split})")
    try:
        for folder in known.runs:
            trained = lm.load(folder)
            exact, mean = (
                trained.score_split(known.split, protocol=protocol, data=known.data)
                for protocol in ("exact", "chunk-mean")
            )
            print(f"{exact.ppl:12,.2f} {mean.ppl:12,.2f} {exact.unigram_ppl:12,.2f}  {folder}")
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
