#!/usr/bin/env bash
# Sets up, lints, checks the layout, and runs the tests.
#
#   bash launch/test.sh             # what is not marked slow
#   bash launch/test.sh --slow      # the others
#   bash launch/test.sh [pytest arguments, e.g. tests/test_otreg.py -k padding -n 0]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh requirements-dev.txt

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.cache/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

.venv/bin/ruff check
.venv/bin/ruff format --check --quiet
pytest=(.venv/bin/python -m pytest -n 2)
if [[ ${1:-} == --slow ]]; then
  exec "${pytest[@]}" -m slow "${@:2}"
elif [[ $# -gt 0 ]]; then
  exec "${pytest[@]}" "$@"
fi
"${pytest[@]}" -m "not slow and not shipped"
OTREG_TEST_SHIPPED=1 "${pytest[@]}" -m "shipped and not slow"
