# Sourced by the other scripts: creates .venv if necessary, installs the pinned packages and activates it.
# usage: source scripts/environment.sh [EXTRA]   the packages of an extra (default: lm, the toolkit's)
extras=[${1:-lm}]
python=${PYTHON:-python3}
if [ ! -x .venv/bin/python ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python must be 3.11 or newer; got $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
        exit 2
    }
    "$python" -m venv .venv
fi
# The stamp records which pins and extras are installed, so that later starts are immediate.
stamp=.venv/installed-$(cat scripts/constraints.txt pyproject.toml | sha256sum | cut -c1-16)$extras
if [ ! -e "$stamp" ]; then
    echo "Installing the pinned packages into .venv (once; PyTorch is the large one) ..." >&2
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    # torch first and alone: otherwise pip may install a newer build with gigabytes of CUDA packages.
    .venv/bin/python -m pip install -q "$(grep '^torch==' scripts/constraints.txt)" -c scripts/constraints.txt
    .venv/bin/python -m pip install -q -e ".$extras" -c scripts/constraints.txt
    rm -f .venv/installed-*
    touch "$stamp"
fi
source .venv/bin/activate
