#!/usr/bin/env bash
# The C++ kernels' tests under the address and undefined-behaviour sanitizers. Arguments replace the tests that are run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
export RNNORM_CACHE=${RNNORM_SANITIZED_CACHE:-$PWD/build/sanitized}
export RNNORM_CXXFLAGS="-Werror -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
python -m rnnorm.ops.build
# Python itself is not built with the sanitizer: its run time must come first, and its own leaks are not ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0
# Memory is not measured here: the sanitizer keeps what was freed.
[ $# -gt 0 ] || set -- tests/rnnorm/test_native.py tests/rnnorm/test_functional.py -k "not memory"
python -m pytest -q -p no:cacheprovider "$@"
