"""GAE and the PPO loss beside their peers, alternating in one run; writes benchmarks/results/losses-DEVICE.json.

    python -m benchmarks.losses [--out FILE] [--repetitions N] [--topology v5e:2x2]

Times are of one call, dispatch included. rlax is compared with where it can be imported. --topology also counts the
passes of the PPO loss in programs compiled for a TPU, without one; it needs libtpu and JAX_PLATFORMS=cpu.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from rto_jax.losses import gae, gae_associative, ppo_policy_loss, ppo_value_loss, token_mean
from rto_jax.metrics import git_commit

try:
    import rlax
except Exception as error:  # not only ImportError: TensorFlow Probability, which it needs, breaks on new jax
    rlax = None
    print(f"no rows of rlax: {error}")

B, T = 64, 1024
LENGTHS = (128, 512, 2048, 8192)
LAMBDA, CLIP = 0.95, 0.2  # γ = 1


def arrays(rows: int, length: int, count: int) -> tuple[list[jax.Array], jax.Array]:
    """`count` float32 arrays of the shape, and a mask of responses of length/2 to length tokens."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))
    return [jnp.asarray(rng.normal(size=(rows, length)), jnp.float32) for _ in range(count)], jnp.asarray(mask)


def alternating(programs: dict, inputs: tuple, repetitions: int) -> dict[str, dict[str, float]]:
    """{name: median and quartiles of the microseconds of a call}: each in turn, beginning with another one each time."""
    names, seconds = list(programs), {name: [] for name in programs}
    for function in programs.values():
        for _ in range(3):
            jax.block_until_ready(function(*inputs))
    for repetition in range(repetitions):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            jax.block_until_ready(programs[name](*inputs))
            seconds[name].append(time.perf_counter() - started)
    out = {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([1e6 * x for x in times], n=4)
        out[name] = {"median_us": round(middle, 1), "quartiles_us": [round(low, 1), round(high, 1)]}
    return out


# ---- advantages ------------------------------------------------------------------------------------------------------


def floor(rewards, values, mask):
    """What it costs to read these three arrays and to write two, with no recurrence."""
    advantages = jnp.where(mask, rewards - values, 0)
    return advantages, advantages + values


def rlax_gae(rewards, values, mask):
    """The same from rlax, which takes discounts, the value behind the last step, and no mask."""
    rewards, values = jnp.where(mask, rewards, 0), jnp.where(mask, values, 0)
    one_row = lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, LAMBDA, v)  # noqa: E731
    behind = jnp.pad(values, ((0, 0), (0, 1)))
    advantages = jax.vmap(one_row)(rewards, mask.astype(jnp.float32), behind)
    return advantages, advantages + values


def advantages(rows: int, length: int, repetitions: int) -> dict:
    (rewards, values), mask = arrays(rows, length, 2)
    programs = {"elementwise floor": floor, "gae": gae, "gae_associative": gae_associative}
    if rlax:
        programs["rlax"] = rlax_gae
    programs = {name: jax.jit(function) for name, function in programs.items()}
    expected = gae(rewards, values, mask, lam=LAMBDA)
    for name in set(programs) - {"elementwise floor"}:
        for have, want in zip(programs[name](rewards, values, mask), expected, strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-3)
    return alternating(programs, (rewards, values, mask), repetitions)


# ---- the PPO loss ----------------------------------------------------------------------------------------------------


def ours(new, old_logps, advantages, old_values, returns, mask):
    """(sum, count), as the train steps have it: the gradient is of the sum, and is divided by the count at the end."""
    policy, tokens = token_mean(ppo_policy_loss(new["logps"], old_logps, advantages, clip=CLIP), mask)
    value, _ = token_mean(ppo_value_loss(new["values"], old_values, returns, clip=CLIP), mask)
    return policy + 0.5 * value, tokens


def ours_policy(new, old_logps, advantages, old_values, returns, mask):
    return token_mean(ppo_policy_loss(new["logps"], old_logps, advantages, clip=CLIP), mask)


def masked_means(new, old_logps, advantages, old_values, returns, mask):
    """As it is written in PyTorch trainers: products with a float mask. A NaN on the padding is a NaN in the loss."""
    mask = mask.astype(jnp.float32)
    mean = lambda x: (x * mask).sum() / mask.sum()  # noqa: E731
    ratio = jnp.exp(new["logps"] - old_logps)
    policy = mean(jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - CLIP, 1 + CLIP)))
    clipped = jnp.clip(new["values"], old_values - CLIP, old_values + CLIP)
    value = mean(jnp.maximum((new["values"] - returns) ** 2, (clipped - returns) ** 2)) / 2
    return policy + 0.5 * value, 1.0


def rlax_policy(new, old_logps, advantages, old_values, returns, mask):
    """Its mean goes over all positions, so the mask goes into the advantages and the count onto the result."""
    ratio, weights = jnp.exp(new["logps"] - old_logps), advantages * mask
    return rlax.clipped_surrogate_pg_loss(ratio.ravel(), weights.ravel(), CLIP) * mask.size / mask.sum(), 1.0


INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")
NO_PASS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy"}


def parts(shape: str) -> list[tuple[int, int]]:
    """(elements, bytes) of each array in the text of a shape: f32[64,1024]{1,0}, or a tuple of such."""
    found = []
    for kind, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape):
        elements = math.prod(int(n) for n in dimensions.split(",") if n)
        found.append((elements, elements * int(re.sub(r"\D", "", kind) or 8) // 8))
    return found


def passes(text: str, elements: int) -> tuple[int, int]:
    """(instructions that read or write an array of `elements` elements or more, bytes that those instructions move).

    Of an optimised program's entry computation and of what it calls (a GPU's command buffers), where an instruction is
    one kernel, as a rule. Instructions that compute nothing (NO_PASS) don't count. Operands and results move once.
    """
    computations = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "ENTRY" if line.startswith("ENTRY") else line.split()[0].lstrip("%")
            lines = computations[name] = []
        elif found := INSTRUCTION.match(line):
            lines.append(found.groups())

    def of(computation):
        shapes, count, moved = {}, 0, 0
        for name, shape, operation, rest in computations[computation]:
            shapes[name] = parts(shape)
            operands, _, attributes = rest.partition("), ")
            touched = shapes[name] + [x for y in set(re.findall(r"%([\w.-]+)", operands)) for x in shapes.get(y, [])]
            if operation == "call":
                more = of(re.search(r"to_apply=%?([\w.-]+)", attributes)[1])
                count, moved = count + more[0], moved + more[1]
            elif operation not in NO_PASS and any(n >= elements for n, _ in touched):
                count, moved = count + 1, moved + sum(size for _, size in touched)
        return count, moved

    return of("ENTRY")


GROUPS = {"policy and value": {"ours": ours, "masked means": masked_means}, "policy": {"ours": ours_policy}}
if rlax:
    GROUPS["policy"]["rlax"] = rlax_policy


def trained(group: str, new: dict) -> dict:
    return {name: x for name, x in new.items() if name != "values" or "value" in group}


def compiled(function, *inputs):
    """(program: inputs -> ((loss, count), gradients), its passes over [B, T], the megabytes that they move)."""
    program = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(*inputs).compile()
    count, moved = passes(program.as_text(), B * T)
    return program, {"passes": count, "mbytes": round(moved / 1e6, 2)}


def ppo_loss(repetitions: int) -> dict:
    (logps, old_logps, advantages, values, old_values, returns), mask = arrays(B, T, 6)
    new = {"logps": old_logps + 0.2 * logps, "values": old_values + 0.2 * values}
    table = {}
    for group, functions in GROUPS.items():
        inputs, programs, found = (trained(group, new), old_logps, advantages, old_values, returns, mask), {}, {}
        means = []
        for name, function in functions.items():
            programs[name], found[name] = compiled(function, *inputs)
            (total, count), gradients = programs[name](*inputs)
            means.append(jax.tree.map(lambda x, count=count: x / count, (total, gradients)))
            for have, want in zip(*map(jax.tree.leaves, (means[-1], means[0])), strict=True):
                np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-6)
        for name, times in alternating(programs, inputs, repetitions).items():
            table[f"{group}: {name}"] = found[name] | times
    return table


def ppo_loss_on_tpu(topology: str) -> dict:
    """Passes only: compiled for a TPU that is not here, by the real compiler (libtpu)."""
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    chip = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    shape = lambda dtype: jax.ShapeDtypeStruct((B, T), dtype, sharding=SingleDeviceSharding(chip))  # noqa: E731
    x, mask = shape(jnp.float32), shape(jnp.bool_)
    return {
        f"{group}: {name}": compiled(function, trained(group, {"logps": x, "values": x}), x, x, x, x, mask)[1]
        for group, functions in GROUPS.items()
        for name, function in functions.items()
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def show(title: str, table: dict[str, dict]) -> None:
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n" + " " * 30 + "  ".join(f"{name:>16}" for name in columns))
    for name, row in table.items():
        print(f"{name:<30}" + "  ".join(f"{str(row[column]).strip('[]'):>16}" for column in columns), flush=True)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="", help="JSON file; default: benchmarks/results/losses-DEVICE.json")
    parser.add_argument("--topology", default="", help="a TPU to compile the PPO loss for, such as v5e:2x2")
    parser.add_argument("--repetitions", type=int, default=200, help="calls of each program")
    args = parser.parse_args()
    device = jax.devices()[0]
    out = Path(args.out or f"benchmarks/results/losses-{device.device_kind.lower().replace(' ', '-')}.json")
    found = {
        "command": " ".join(["python -m benchmarks.losses", *sys.argv[1:]]),
        "git": git_commit(),
        "device": device.device_kind,
        "cpu": {"model": processor(), "cores": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {x: version(x) for x in ("jax", "jaxlib", "numpy", "rlax")},
        "repetitions": args.repetitions,
        "dtype": "float32",
        "mask": "lengths uniform in T/2 to T",
    }
    print(f"{device.device_kind}, {found['cpu']['cores']} cores of {found['cpu']['model']}; microseconds of a call")

    table = found[f"gae, B={B}, T={T}"] = advantages(B, T, args.repetitions)
    show(f"GAE, B={B}, T={T}", table)
    for title, rows in (("B=65536/T", lambda length: B * T // length), (f"B={B}", lambda length: B)):
        tables = {length: advantages(rows(length), length, args.repetitions) for length in LENGTHS}
        found[f"gae over T, {title}"] = tables
        medians = {
            name: {f"T={n}": table[name]["median_us"] for n, table in tables.items()} for name in tables[LENGTHS[0]]
        }
        show(f"GAE over T, {title}, medians", medians)

    table = found[f"ppo loss, forward and backward, B={B}, T={T}"] = ppo_loss(args.repetitions)
    once = 4 * B * T  # bytes of one float32 array
    found["mbytes_of_one_pass"] = round((8 * once + B * T) / 1e6, 2)
    show(f"PPO loss, forward and backward, B={B}, T={T}", table)
    if args.topology:
        table = found[f"ppo loss, forward and backward, B={B}, T={T}, {args.topology}"] = ppo_loss_on_tpu(args.topology)
        show(f"PPO loss, forward and backward, B={B}, T={T}, compiled for {args.topology}", table)
    print(f"one pass over its 6 arrays, the mask and 2 gradients: {found['mbytes_of_one_pass']} MB")

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
