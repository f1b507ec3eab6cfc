#!/usr/bin/env bash
# The C++ kernels' tests under the address and undefined-behaviour sanitizers. Arguments replace the tests that are run.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh dev
export RNNORM_CACHE=${RNNORM_SANITIZED_CACHE:-$PWD/build/sanitized}
export RNNORM_CXXFLAGS="-Werror -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
python -m rnnorm.ops.build
# Python itself is not built with the sanitizer: the runtime must be preloaded, and Python's own leaks ignored.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0
# No tests of memory use: the sanitizer keeps freed memory.
[ $# -gt 0 ] || set -- tests/rnnorm/test_{native,functional,online_norm}.py -k "not memory"
python -m pytest -q -p no:cacheprovider "$@"
