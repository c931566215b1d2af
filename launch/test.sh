#!/usr/bin/env bash
# Install into .venv, then run the tests: without arguments all but the `slow` and `parity` ones.
#   launch/test.sh [pytest arguments: -m slow, tests/test_gold.py, -k gae, ...]
#   RTO_JOBS    test processes (default 2; 0: in this process)
#   RTO_EXTRAS  extras to install (default test; test,parity for `-m parity`)
# shellcheck source=launch/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
install "${RTO_EXTRAS:-test}"
cd -- "$ROOT"
# Of a flag given twice pytest takes the last, so the caller's win.
# A file stays in one process, so that its fixtures are set up once; in the order of names, as the long ones are not last.
exec "$VENV/bin/python" -m pytest -n "${RTO_JOBS:-2}" --dist loadfile --no-loadscope-reorder -m "not slow and not parity" "$@"
