#!/usr/bin/env bash
# Every check, for people and for CI: format, lint, types, tests. Arguments go to pytest.
# RNNORM_RECORDED=FOLDER adds the tests against recorded cases.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
ruff format --check .
ruff check .
mypy
# The C++ operators must compile without warnings.
export RNNORM_CXXFLAGS=${RNNORM_CXXFLAGS--Werror}
# Once, before the workers would each build; if it fails, the tests that need it report it.
python -m rnnorm.ops.build || true
# One worker per core, with one thread each: tests are many and small.
python -m pytest --numprocesses "$(nproc)" --dist worksteal "$@"
