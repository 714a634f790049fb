# Sourced by the other scripts: makes .venv with everything that EXTRA names, once.
# uv, because it resolves torch in seconds and takes the same torch build for torchvision.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"

has_uv() { # .venv with uv in it
    "$PYTHON" - <<'PY' || { echo "d2m_hpc needs Python 3.11 or newer; set PYTHON=/path/to/it" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
    [ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check uv
    rm -rf build # setuptools would pack modules that are gone by now
}

install() { # install [EXTRA]: as a user does
    has_uv
    .venv/bin/uv pip install --quiet --python .venv/bin/python ".${1:+[$1]}"
}

develop() { # develop EXTRA: the checkout itself, so that tests in this process and commands see one program
    has_uv
    .venv/bin/uv pip install --quiet --python .venv/bin/python --editable ".[$1]"
}
