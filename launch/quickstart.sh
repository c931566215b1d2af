#!/usr/bin/env bash
# Install into .venv, then run the main job on the embedded world and write its report.
#   launch/quickstart.sh [flags of python -m experiments.quickstart]
# shellcheck source=launch/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
install train
cd -- "$ROOT"
exec "$VENV/bin/python" -m experiments.quickstart "$@"
