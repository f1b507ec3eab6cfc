#!/usr/bin/env bash
# Train an online-normalized LSTM language model on Python's own documentation, evaluate it exactly, sample from it.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
run=${1:-runs/quickstart}
python -m lm train --preset default --run "$run"
echo
python -m lm eval "$run" --split test
echo
python -m lm sample "$run" --prompt "return the" --length 60 --temperature 0.8 --seed 1
echo
echo "Curves: .venv/bin/tensorboard --logdir $run/tensorboard"
