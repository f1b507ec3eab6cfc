#!/usr/bin/env bash
# Every check, for people and for CI: format, lint, types, tests. Arguments go to pytest.
# RNNORM_RECORDED=FOLDER adds the tests against recorded cases.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
ruff format --check .
ruff check .
mypy
python -m pytest "$@"
