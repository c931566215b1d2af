"""The TPU figures of the README: every program of a recipe, compiled for TPUs that are not here.

    python -m pip install --no-deps "libtpu==0.0.42.*"      what jax[tpu] 0.10.2 names; 700 MB
    python -m benchmarks.plan                               all, hours on 2 cores
    python -m benchmarks.plan dpo-fast paper-v5e-64         some; --list names them
    python -m benchmarks.plan dpo-fast --tunix PYTHON       and tunix's DPO step (benchmarks/plan_tunix.py) in its Python

Each is one `python -m rto_jax.plan`, printed before it runs, and writes benchmarks/results/plan-NAME.json.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from rto_jax.plan import WITHOUT_TPU

HERE = Path(__file__).parent
RESULTS = HERE / "results"

# 64 pairs of 512 + 512 tokens, a pair to a chip, as one row of 1536.
DPO = "--preset paper --topology v5e:8x8 --stages dpo --prompt 512 --response 512 --batch-size 64 --micro-batches 1"
HALF = "--param-dtype bfloat16 --frozen-dtype bfloat16 --moments bfloat16 --gradients bfloat16"
PAPER = "--preset paper --no-parts"  # two sequences to a chip in rto's updates

PLANS = {
    "dpo-fast": f"{DPO} --remat none --gradients bfloat16 --frozen-dtype bfloat16",
    "dpo-dots": f"{DPO} --remat dots",
    "dpo-dots-xla": f"{DPO} --remat dots --attention xla",
    "dpo-lean": f"{DPO} --remat full --gradients bfloat16",
    "dpo-lean-bfloat16": f"{DPO} --remat full {HALF}",
    "paper-v5e-64": f"{PAPER} --topology v5e:8x8",
    "paper-v5p-64": f"{PAPER} --topology v5p:4x4x4",
    "paper-v6e-64": f"{PAPER} --topology v6e:8x8",
    "paper-rto-v5e-256": f"{PAPER} --topology v5e:16x16 --scale 4 --stages rto --mesh.fsdp 256",
    "paper-rto-v5e-1024": f"{PAPER} --topology v5e:16x16 --slices 4 --scale 16 --stages rto --mesh.fsdp 256",
    "dpo-search": f"{DPO} --search",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of plans; none: all of them")
    parser.add_argument("--tunix", metavar="PYTHON", help="an interpreter that has google-tunix and libtpu")
    parser.add_argument("--list", action="store_true", help="print the plans and stop")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in PLANS]:
        parser.error(f"{unknown[0]} is not one of {', '.join(PLANS)}")
    status = 0
    for name in args.names or PLANS:
        words = PLANS[name].split() + ["--out", str(RESULTS / f"plan-{name}.json")]
        print(f"{name}: python -m rto_jax.plan {PLANS[name]}", flush=True)
        if not args.list:
            status = max(status, subprocess.run([sys.executable, "-m", "rto_jax.plan", *words], check=False).returncode)
    if args.tunix and not args.list:
        print("tunix: the same step by its model, loss and train step", flush=True)
        paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = WITHOUT_TPU | {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": paths}
        own = [args.tunix, str(HERE / "plan_tunix.py"), str(RESULTS / "plan-tunix.json")]
        status = max(status, subprocess.run(own, env=environment, check=False).returncode)
    return status


if __name__ == "__main__":
    sys.exit(main())
