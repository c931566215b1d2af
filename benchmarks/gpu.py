"""Every step on the accelerator against float32 on the CPU, then the real run; writes benchmarks/results/DEVICE.json.

    python -m benchmarks.gpu --data DIR [--preset smollm2-long] [--skip-run]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import jax
import numpy as np

from rto_jax import programs
from rto_jax.metrics import git_commit
from rto_jax.models import LlamaConfig
from rto_jax.optim import OptimConfig
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_params
from rto_jax.steps import ActorCritic, PairsWithReference, PpoConfig
from rto_jax.types import Pairs, Prompts, Sequences

# Small enough for a CPU, with every part that a large one has: grouped heads, several layers, tied embeddings.
CONFIG = LlamaConfig(vocab_size=4096, width=256, layers=4, heads=8, kv_heads=2, head_dim=32, mlp_width=704)
OPTIM = OptimConfig(learning_rate=1e-3, warmup=0.0)
ROWS, P, T, STEPS = 16, 48, 80, 3
TOLERANCE = 2e-3  # of a loss or a reward, relative: TF32 is off, so what is left is the order of the sums


def rows(seed: int) -> Sequences:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG.vocab_size, (ROWS, P + T)).astype(np.int32)
    left, right = rng.integers(0, P - 1, ROWS), rng.integers(1, T + 1, ROWS)
    index = np.arange(P + T)
    valid = (index >= left[:, None]) & (index < P + right[:, None])
    return Sequences(tokens, valid, valid[:, P:])


def host_params(head: str, seed: int):
    """The same parameters for both devices."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(programs.init_fn(CONFIG, head)(jax.random.key(seed)))


def timed(function, *args):
    """(result, seconds of the call until the device is done)."""
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - started


def supervised(kind: str, mesh) -> tuple[dict, list[float]]:
    head = "last" if kind == "reward" else "lm"
    options = (("beta", 0.3),) if kind == "dpo" else ()
    params = host_params(head, 0)
    state = programs.start(CONFIG, head, OPTIM, 10, mesh)(put_params(params, mesh))
    step = programs.supervised_step(kind, CONFIG, head, OPTIM, 10, 2, mesh, options)
    reference, found, seconds = put_params(params, mesh), {}, []
    for number in range(STEPS):
        batch = rows(number) if kind == "sft" else Pairs(rows(2 * number), rows(2 * number + 1))
        batch = put_batch(batch, mesh)
        if kind == "dpo":
            batch = PairsWithReference(batch, *programs.pair_logps(CONFIG, mesh)(reference, batch))
        (state, metrics), took = timed(step, state, batch)
        seconds.append(took)
        found |= {f"{name} {number}": float(metrics[name]) for name in ("loss", "grad_norm")}
    return found, seconds[1:]


def reinforcement(mesh) -> tuple[dict, list[float]]:
    """Greedy rollouts, so that both devices see the same tokens; rewards, then all PPO updates."""
    policy, other, scalar = host_params("lm", 0), host_params("lm", 1), host_params("last", 2)
    put = lambda tree: put_params(tree, mesh)  # noqa: E731
    state = ActorCritic(
        programs.start(CONFIG, "lm", OPTIM, 10, mesh)(put(policy)),
        programs.start(CONFIG, "last", OPTIM, 10, mesh)(put(scalar)),
    )
    sampling = SamplingConfig(T, top_k=1)
    rollout = programs.rollout(CONFIG, CONFIG, CONFIG, "last", sampling, 0, 1, None, None, mesh)
    update = programs.ppo_update(CONFIG, CONFIG, OPTIM, OPTIM, 10, PpoConfig(minibatches=2), 1.0, 2, mesh)
    frozen = RolloutParams(None, None, put(policy), put(scalar), put(other))
    scales = RewardScales(*(np.float32(x) for x in (0.05, 0.01, 1.0, 1.0, 0.95)))
    found, seconds = {}, []
    for number in range(STEPS):
        prompts = put_batch(Prompts(*(x[:, :P] for x in rows(number)[:2])), mesh)
        models = frozen._replace(policy=state.policy.params, critic=state.critic.params)
        (experience, metrics, detail), first = timed(rollout, models, prompts, jax.random.key(number), scales)
        (state, updated), second = timed(update, state, experience, jax.random.key(10 + number))
        seconds.append(first + second)
        if number == 0:  # later rollouts are of policies that already differ in their last bits
            found = {f"rollout {k}": float(v) for k, v in metrics.items() if k not in ("sampler_gap", "kl")}
            found |= {"tokens": int(np.asarray(experience.sequences.tokens, np.int64).sum())}
            found |= {f"update {k}": float(updated[k]) for k in ("policy_grad_norm", "value_loss", "value_grad_norm")}
            found["sum of |token rewards|"] = float(np.abs(np.asarray(detail.rewards)).sum())
    return found, seconds[1:]


def compare(device) -> dict:
    """{step: largest relative difference, seconds on both}; raises SystemExit where one is above the tolerance."""
    jax.config.update("jax_default_matmul_precision", "highest")
    meshes = [make_mesh(MeshConfig(1), [d]) for d in (jax.devices("cpu")[0], device)]
    table, bad = {}, []
    parts = {kind: lambda mesh, kind=kind: supervised(kind, mesh) for kind in ("sft", "reward", "dpo")}
    for name, part in (parts | {"rto": reinforcement}).items():
        (want, slow), (have, fast) = (part(mesh) for mesh in meshes)
        gaps = {key: abs(have[key] - want[key]) / max(abs(want[key]), 1e-3) for key in want}
        worst = max(gaps, key=gaps.get)
        table[name] = {
            "largest_relative_difference": gaps[worst], "of": worst,
            "cpu_seconds": statistics.median(slow), "device_seconds": statistics.median(fast),
        }  # fmt: skip
        print(f"{name:<8} {gaps[worst]:.1e} ({worst}); CPU {table[name]['cpu_seconds']:.3f} s, "
              f"device {table[name]['device_seconds']:.4f} s", flush=True)  # fmt: skip
        bad += [name] if not gaps[worst] <= TOLERANCE else []
    if bad:
        raise SystemExit(f"not equal to the CPU within {TOLERANCE}: {', '.join(bad)}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of preferences for the real run")
    parser.add_argument("--preset", default="smollm2-long", help="preset of experiments.quickstart")
    parser.add_argument("--out", default="", help="JSON file; default: benchmarks/results/DEVICE.json")
    parser.add_argument("--skip-run", action="store_true", help="the comparison alone")
    args, flags = parser.parse_known_args()
    device = jax.devices()[0]
    name = device.device_kind.lower().replace(" ", "-")
    out = Path(args.out or f"benchmarks/results/{name}.json")
    found = {
        "command": " ".join(["benchmarks/gpu.sh", *sys.argv[1:]]),
        "git": git_commit(),
        "device": device.device_kind,
        "host": platform.platform(),
        "jax": jax.__version__,
        "tolerance": TOLERANCE,
        "against_cpu_float32": compare(device),
    }
    if not args.skip_run:
        study = Path(f"runs/{args.preset}-{name}-{int(time.time())}")
        command = [sys.executable, "-m", "experiments.quickstart", "--preset", args.preset, "--data", args.data]
        subprocess.run([*command, "--out", str(study), *flags], check=True)
        found["run"] = json.loads((study / "results.json").read_text())
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
