"""Does it fit, and how fast could it be? Compiles every program of a recipe for devices that are not here.

    python -m rto_jax.plan --preset paper --topology v5e:8x8
    python -m rto_jax.plan --preset paper --topology v5e:16x16 --slices 2 --scale 8 --stages dpo rto
    python -m rto_jax.plan --preset paper --topology v5e:8x8 --stages dpo --search

For TPUs with the real compiler (the package libtpu; no TPU is needed), for CPUs with this machine's, for GPUs only where
they are; elsewhere their shapes and sizes. Exit status: 0 it fits, 1 it does not, 2 the question makes no sense.

What the figures are. Bytes are per device: `held` is what lies there beside the program, such as the other models and
Adam's moments of an RL run. FLOPs are the compiled products', and XLA's estimated cycles their time on the device alone,
with loops multiplied out; neither counts the work of hand-written kernels (--attention xla has none) nor waiting for
other devices. Model FLOPs are what the mathematics needs: every product once forward and twice backward, shared prompts
once, attention where it is causal. `wire` is what each device sends. `peak` is XLA's simulation of one run; what has to
fit is a little more: arguments, temporaries and code, each with a place of its own, and what is held.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from rto_jax import hlo, programs
from rto_jax.errors import UserError
from rto_jax.metrics import git_commit
from rto_jax.models import SIZES, LlamaConfig, LoraConfig
from rto_jax.models.attention import row_layout, visible
from rto_jax.models.llama import REMAT
from rto_jax.optim import OptimConfig
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import AXES, MeshConfig, batch_sharding, check_batch, make_mesh, per_device_bytes, replicated
from rto_jax.steps import ActorCritic, PairsWithReference, PpoConfig
from rto_jax.train_state import over
from rto_jax.types import Experience, Pairs, Prompts, Sequences

GIB = 2**30
STAGES = ("sft", "reward_model", "dpo", "rto")
DTYPES = ("float32", "bfloat16")
STEPS = 1000  # of a schedule: its length is a number in the program and changes nothing else


@dataclass(frozen=True)
class Device:
    memory: float  # GiB of one device, as its compiler counts them
    clock: float = 0.0  # Hz that estimated_cycles are of; 0: not known
    links: float = 0.0  # bytes per second that one device can send, all links together


# Public data sheets. What the runtime keeps for itself is left out: v5e's compiler takes 15.75 of 16 GiB.
DEVICES = {
    "v4": Device(32 - 1.25, 1.05e9, 150e9),
    "v5e": Device(16 - 0.25, 1.5e9, 200e9),
    "v5p": Device(95.0, 1.75e9, 600e9),
    "v6e": Device(32 - 0.75, 1.75e9, 448e9),
    "tpu7x": Device(96 - 1.25, 0.0, 600e9),  # half a chip
}


@dataclass(frozen=True)
class Batch:
    """Rows per step (pairs, for pair losses; rollouts per iteration, for rto), and parts that a gradient is summed over."""

    size: int
    micro: int = 1


@dataclass(frozen=True)
class Recipe:
    """What decides the programs of a run: sizes and shapes of all stages."""

    policy: str
    reward: str
    prompt: int
    response: int
    sft: Batch
    reward_model: Batch
    dpo: Batch
    rto: Batch
    minibatches: int = 4
    epochs: int = 1
    reward_head: str = "last"
    dtype: str = "float32"
    remat: str = "none"
    mesh: MeshConfig = field(default_factory=MeshConfig)
    param_dtype: str = "float32"
    frozen_dtype: str = "float32"
    moments: str = "float32"
    gradients: str = "float32"
    offload: bool = False
    attention: str = "auto"
    lora: LoraConfig = field(default_factory=LoraConfig)
    layers: int = 0  # 0: as many as the models have

    def config(self, size: str) -> LlamaConfig:
        config = SIZES[size]
        layers = self.layers or config.layers
        return dataclasses.replace(
            config, dtype=self.dtype, param_dtype=self.param_dtype, remat=self.remat, attention=self.attention,
            lora=self.lora, layers=layers, unroll=math.gcd(config.unroll, layers),
        )  # fmt: skip

    @property
    def optim(self) -> OptimConfig:
        return OptimConfig(moments=self.moments, gradients=self.gradients, offload=self.offload)

    def with_stage(self, stage: str, **changes) -> "Recipe":
        return dataclasses.replace(self, **{stage: dataclasses.replace(getattr(self, stage), **changes)})


# The programs of the presets of experiments/; tests/test_plan.py keeps the two together.
PRESETS = {
    "gold": Recipe(
        policy="gold", reward="gold", prompt=4, response=24, sft=Batch(128), reward_model=Batch(64), dpo=Batch(64),
        rto=Batch(256), reward_head="token",
    ),
    "smollm2": Recipe(
        policy="smollm2-135m", reward="smollm2-135m", prompt=96, response=64, sft=Batch(8, 2), reward_model=Batch(8, 2),
        dpo=Batch(8, 2), rto=Batch(16),
    ),
    "paper": Recipe(
        policy="llama3-8b", reward="llama3.2-1b", prompt=1024, response=1024, sft=Batch(256, 4), reward_model=Batch(128),
        dpo=Batch(256, 4), rto=Batch(1024), minibatches=8, dtype="bfloat16", remat="full", mesh=MeshConfig(fsdp=64),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ devices


@dataclass(frozen=True)
class Target:
    """The devices to compile for; none where there is no compiler for them."""

    name: str
    count: int
    device: Device | None
    devices: tuple | None

    def mesh(self, config: MeshConfig) -> Mesh | AbstractMesh:
        if self.devices is None:
            return AbstractMesh(config.shape(self.count), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        try:
            return make_mesh(config, list(self.devices))
        except (NotImplementedError, AssertionError) as error:
            shape = " x ".join(str(n) for n in config.shape(self.count))
            raise UserError(f"a mesh of {shape} cannot be laid over --topology {self.name}: {error}") from None


def open_target(topology: str, slices: int = 1, memory: float | None = None) -> Target:
    """The devices of a topology such as v5e:8x8, cpu:8 or gpu:8. Raises UserError for one that cannot be."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not found or found[1] not in (*DEVICES, "cpu", "gpu"):
        kinds = ", ".join(DEVICES)
        raise UserError(f"--topology must be one of {kinds} with a shape (v5e:8x8), or cpu:8, gpu:8; not {topology!r}.")
    kind, count = found[1], math.prod(int(n) for n in found[2].split("x")) * slices
    if count < 1 or slices < 1:
        raise UserError(f"--topology {topology} x --slices {slices} is no device.")
    device = DEVICES.get(kind)
    if memory is not None:
        device = dataclasses.replace(device or Device(0.0), memory=memory)
    name = topology + (f" x {slices} slices" if slices > 1 else "")
    if kind in DEVICES:
        devices = _tpu_devices(topology, slices)
        return Target(name, len(devices), device, devices)  # two to a chip of the kind tpu7x
    if slices > 1:
        raise UserError(f"--slices {slices}: only TPUs come in slices.")
    return Target(name, count, device, _local_devices(kind, count))


# Else libtpu asks a metadata server about the TPU that it takes for granted, and lets one process at a time in.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


def _tpu_devices(topology: str, slices: int) -> tuple:
    if importlib.util.find_spec("libtpu") is None:
        wanted = next((x.split(";")[0].strip() for x in importlib.metadata.requires("jax") if x.startswith("libtpu")), "libtpu")
        raise UserError(f"--topology {topology} needs the TPU's compiler: pip install --no-deps '{wanted}' (no TPU needed).")
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        more = {"num_slices": slices} if slices > 1 else {}
        more |= {"chip_config_name": "megacore"} if topology.startswith("v4") else {}  # one device per chip
        return tuple(topologies.get_topology_desc(topology, platform="tpu", **more).devices)
    except Exception as error:  # a C++ exception of one of many types
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"--topology {topology} (slices: {slices}) is unknown to the TPU's compiler: {reason}") from None


def _local_devices(kind: str, count: int) -> tuple | None:
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        devices = []
    if kind == "gpu":
        return tuple(devices[:count]) if len(devices) >= count else None
    if len(devices) < count:
        raise UserError(f"--topology cpu:{count}: this process has {len(devices)} CPU device(s).")
    return tuple(devices[:count])


# ------------------------------------------------------------------------------------------------ phases


@dataclass(frozen=True)
class Phase:
    """One program of a stage."""

    name: str
    stage: str
    program: Callable
    arguments: tuple
    held: Any  # what else lies on the devices meanwhile
    model_flops: float  # of the whole mesh
    trains: bool = True  # whether it has a backward pass, which remat and micro-batches change
    part: bool = False  # whether another phase contains it, so that it counts for nothing in a sum
    runs: int = 1  # per run of the phase that contains it


def forward_flops(config: LlamaConfig, rows: int, prompt: int, answer: int, branches: int = 1, scored: int = 0) -> float:
    """Model FLOPs of a forward pass over rows [prompt | answer ...] that unembeds `scored` positions of each."""
    length = prompt + branches * answer
    heads, kernels = config.heads * config.head_dim, 3 * config.width * config.mlp_width
    kernels += config.width * (2 * heads + 2 * config.kv_heads * config.head_dim)
    pairs = float(visible(row_layout(length, prompt, branches), length).sum())
    layers = config.layers * (2 * kernels * length + 4 * heads * pairs)
    return rows * (layers + 2 * scored * config.width * (config.output_size or config.vocab_size))


def phases(recipe: Recipe, mesh, stages=STAGES, parts: bool = True) -> Iterator[Phase]:
    """Every program of the stages, as experiments/ runs them, over abstract arguments. Raises UserError as they would."""
    policy, reward = recipe.config(recipe.policy), recipe.config(recipe.reward)
    optim, lora, prompt, answer = recipe.optim, recipe.lora.rank > 0, recipe.prompt, recipe.response
    rows_on = batch_sharding(mesh)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows_on)

    def rows(count):
        return Sequences(
            array(count, prompt + answer, dtype=jnp.int32), array(count, prompt + answer, dtype=bool),
            array(count, answer, dtype=bool),
        )  # fmt: skip

    def whole(config, head):
        """A model that is not trained."""
        return programs.abstract_params(dataclasses.replace(config, param_dtype="float32"), head, mesh, recipe.frozen_dtype)

    def state(config, head):
        return programs.abstract_state(config, head, optim, STEPS, mesh)

    def supervised(stage, kind, config, head, make, flops, options=(), held=None):
        batch = getattr(recipe, stage)
        check_batch(batch.size, mesh, f"{stage}: --batch-size", batch.micro)
        base = whole(config, head) if lora else None
        step = programs.supervised_step(kind, config, head, optim, STEPS, batch.micro, mesh, options)
        held = None if lora else held  # the base is the reference then
        return Phase(
            stage.replace("_", " "), stage, step, (state(config, head), make(batch.size), base), held, flops(batch.size)
        )

    def of_pairs(config, scored):
        return lambda size: 3 * forward_flops(config, size, prompt, answer, 2, scored)

    if "sft" in stages:
        yield supervised("sft", "sft", policy, "lm", rows, lambda n: 3 * forward_flops(policy, n, prompt, answer, 1, answer))
    if "reward_model" in stages:
        head, pairs = recipe.reward_head, lambda n: Pairs(rows(n), rows(n))
        yield supervised("reward_model", "reward", reward, head, pairs, of_pairs(reward, 0))
    if "dpo" in stages:
        pairs = lambda n: Pairs(rows(n), rows(n))  # noqa: E731
        scored = lambda n: PairsWithReference(pairs(n), array(n), array(n))  # noqa: E731
        reference = whole(policy, "lm")
        check_batch(recipe.dpo.size, mesh, "dpo: --batch-size", recipe.dpo.micro)
        yield Phase(
            "dpo reference", "dpo", programs.pair_logps(policy, mesh), (reference, pairs(recipe.dpo.size)), state(policy, "lm"),
            forward_flops(policy, recipe.dpo.size, prompt, answer, 2, 2 * answer), trains=False,
        )  # fmt: skip
        options = (("beta", 0.1), ("label_smoothing", 0.0))
        yield supervised("dpo", "dpo", policy, "lm", scored, of_pairs(policy, 2 * answer), options, reference)
    if "rto" in stages:
        yield from _rto(recipe, mesh, policy, reward, rows, array, whole, state, parts)


def _rto(recipe, mesh, policy, reward, rows, array, whole, state, parts) -> Iterator[Phase]:
    optim, lora, prompt, answer = recipe.optim, recipe.lora.rank > 0, recipe.prompt, recipe.response
    size, micro = recipe.rto.size, recipe.rto.micro
    if size % recipe.minibatches:
        raise UserError(f"rto: --batch-size {size} is not divisible by {recipe.minibatches} mini-batches.")
    few = size // recipe.minibatches
    check_batch(size, mesh, "rto: --batch-size")
    check_batch(few, mesh, "rto: the PPO mini-batch of", micro)
    actor = ActorCritic(state(policy, "lm"), state(reward, "last"))
    # With adapters, as if DPO model and (of the policy's size) reward model were adapters over the policy's base.
    base, rm = whole(policy, "lm"), whole(reward, "last")
    dpo = programs.abstract_trained(policy, "lm", mesh) if lora else base
    if lora and recipe.reward == recipe.policy:
        rm = programs.abstract_trained(reward, "last", mesh)
    fixed = dict(reference={} if lora else base, reward=rm, dpo=dpo, base=base if lora else None)
    models = RolloutParams(policy=actor.policy.params, critic=actor.critic.params, **fixed)
    prompts = Prompts(array(size, prompt, dtype=jnp.int32), array(size, prompt, dtype=bool))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    numbers = RewardScales(*(jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh)) for _ in range(5)))
    sampling = SamplingConfig(answer)
    lm = forward_flops(policy, size, prompt, answer, 1, answer)
    scalar = forward_flops(reward, size, prompt, answer)
    drawn = forward_flops(policy, size, prompt, answer, 1, 0) + forward_flops(policy, size, 1, 1, 1, answer)
    moments = (actor.policy.opt_state, actor.critic.opt_state)
    if parts:
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
        keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(mesh))
        weights = over(base if lora else None, actor.policy.params)
        sampler = programs.sampler(policy, sampling, 1, 0, mesh)
        yield Phase("sampling", "rto", sampler, (weights, prompts, keys), None, drawn, trains=False, part=True)
    rollout = programs.rollout(policy, reward, reward, "last", sampling, 1, 0, None, None, mesh)
    flops = drawn + 3 * lm + 2 * scalar
    yield Phase("rollout", "rto", rollout, (models, prompts, key, numbers), moments, flops, trains=False)

    ppo = PpoConfig(gamma=1.0, lam=1.0, epochs=recipe.epochs, minibatches=recipe.minibatches)
    runs = recipe.epochs * recipe.minibatches

    def experience(count):
        return Experience(rows(count), *(array(count, answer) for _ in range(4)))

    if parts:
        clip, value_clip = (("clip", ppo.clip), ("temperature", 1.0)), (("clip", ppo.value_clip),)
        for name, kind, config, head, options, flops, trained, under in (
            ("policy update", "policy", policy, "lm", clip, lm, actor.policy, base),
            ("critic update", "value", reward, "last", value_clip, scalar, actor.critic, over(base, rm) if lora else rm),
        ):
            step = programs.supervised_step(kind, config, head, optim, STEPS, micro, mesh, options)
            arguments = (trained, experience(few), under if lora else None)
            yield Phase(name, "rto", step, arguments, None, 3 * flops / recipe.minibatches, part=True, runs=runs)
    update = programs.ppo_update(policy, reward, optim, optim, STEPS, ppo, 1.0, micro, mesh)
    held = (dpo, rm if not lora else {}, {} if lora else base)
    arguments = (actor, experience(size), key, *((base, rm) if lora else ()))
    yield Phase("update", "rto", update, arguments, held, 3 * (lm + scalar) * recipe.epochs)


# ------------------------------------------------------------------------------------------------ measuring


@dataclass
class Row:
    """What the compiler says of one program; GiB and bytes are one device's."""

    phase: str
    stage: str
    part: bool
    runs: int
    arguments_gib: float
    held_gib: float
    model_flops: float
    """one device's share"""
    temporaries_gib: float | None = None
    peak_gib: float | None = None
    """of the program, by XLA's simulation; its memory must hold this and what is held"""
    reserved_gib: float | None = None
    """arguments, temporaries, results and code, each with a place of its own"""
    over_gib: float = 0.0
    """by how much the device's memory is too small"""
    flops: float | None = None
    cycles: float | None = None
    """None where the compiler does not say"""
    seconds: float | None = None
    """the larger of cycles at the device's clock and bytes at the speed of its links"""
    wire_gib: float | None = None
    collectives: dict[str, dict[str, float]] = field(default_factory=dict)
    """by kind: how often they run, and GiB sent"""
    kernels: int = 0
    """runs of hand-written kernels, which flops and cycles leave out"""
    loop: dict[str, float] = field(default_factory=dict)
    """flops, cycles and wire_gib of a loop that may end early (decoding), at its full length; they are in the above"""
    compile_seconds: float | None = None


def device_bytes(tree) -> int:
    """What one device holds of it; what lies in the host's memory does not count."""
    return sum(count for where, count in per_device_bytes(tree).items() if not where.endswith("on the host"))


def measure(phase: Phase, target: Target, options: dict[str, str] | None = None, dump: Path | None = None) -> Row:
    row = Row(
        phase.name, phase.stage, phase.part, phase.runs, device_bytes(phase.arguments) / GIB, device_bytes(phase.held) / GIB,
        phase.model_flops / target.count,
    )  # fmt: skip
    memory = target.device.memory if target.device else math.inf
    if target.devices is None:
        row.over_gib = max(0.0, row.arguments_gib + row.held_gib - memory)
        return row
    lowered = phase.program.lower(*phase.arguments)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings():  # that some donated buffer is of no use
            warnings.simplefilter("ignore")
            compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        row.compile_seconds = time.perf_counter() - begin
        row.peak_gib = _needed(str(error))
        if row.peak_gib is None:
            raise
        row.over_gib = max(row.peak_gib + row.held_gib - memory, 2**-20)
        return row
    row.compile_seconds = time.perf_counter() - begin
    sizes, text = compiled.memory_analysis(), compiled.as_text()
    if dump:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{phase.stage}-{phase.name.replace(' ', '-')}.txt").write_text(text)
    row.arguments_gib = sizes.argument_size_in_bytes / GIB
    row.temporaries_gib = sizes.temp_size_in_bytes / GIB
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    row.reserved_gib = row.arguments_gib + row.temporaries_gib + (results + sizes.generated_code_size_in_bytes) / GIB
    row.peak_gib = sizes.peak_memory_in_bytes / GIB
    row.over_gib = max(0.0, row.reserved_gib + row.held_gib - memory)
    cost = hlo.program_cost(text)
    row.flops, row.kernels, row.wire_gib = cost.flops, cost.kernels, cost.wire_bytes / GIB
    row.cycles = cost.cycles or None
    row.collectives = {
        kind: {"count": x.count, "gib": x.wire_bytes / GIB} for kind, x in sorted(cost.collectives.items())
    }
    if cost.early:
        row.loop = {"flops": cost.early.flops, "cycles": cost.early.cycles, "wire_gib": cost.early.wire_bytes / GIB}
    if cost.cycles and target.device and target.device.clock:
        row.seconds = max(cost.cycles / target.device.clock, cost.wire_bytes / target.device.links)
    return row


def _needed(message: str) -> float | None:
    """GiB that a program needs which the compiler refused for want of memory."""
    found = re.search(r"required for HLO temporaries \(([\d.]+)([KMG]?)\)|Used ([\d.]+)([KMG]?) of", message)
    if not found:
        return None
    size, unit = found[1] or found[3], found[2] or found[4]
    return float(size) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}[unit] / GIB


# ------------------------------------------------------------------------------------------------ search


def candidates(recipe: Recipe, target: Target) -> Iterator[MeshConfig]:
    """Meshes: parameters split over all devices or fewer (then several copies), with and without `tensor`."""
    slices = len({getattr(d, "slice_index", 0) for d in target.devices})
    own = target.count // slices
    heads = math.gcd(*(SIZES[x].kv_heads for x in (recipe.policy, recipe.reward)))
    for tensor in (1, 2, 4):
        for copies in (1, 2):
            fsdp = own // tensor // copies
            if fsdp and fsdp * tensor * copies == own and heads % tensor == 0:
                yield MeshConfig(fsdp=fsdp, tensor=tensor)


def search(recipe: Recipe, target: Target, stage: str, say: Callable[[str], None], **how) -> tuple[Recipe, list[Row]] | None:
    """The fastest plan of a stage that fits: over meshes, policies of remat and micro-batches.

    For every mesh and policy the fewest micro-batches that fit: more would only send the weights around more often.
    """
    best, best_time = None, math.inf
    for mesh in candidates(recipe, target):
        least, same = 1, {}

        def once(phase, same=same):  # what remat and micro-batches don't change is compiled once per mesh
            if phase.trains:
                return measure(phase, target, **how)
            if phase.name not in same:
                same[phase.name] = measure(phase, target, **how)
            return same[phase.name]

        for remat in ("full", "attention", "dots", "none"):  # from least memory to most
            micro = least
            while True:
                plan = dataclasses.replace(recipe.with_stage(stage, micro=micro), mesh=mesh, remat=remat)
                try:
                    rows = [once(phase) for phase in phases(plan, target.mesh(mesh), (stage,), parts=False)]
                except UserError as error:  # the batch does not divide further, say
                    say(f"  {flags(plan, stage)}: {error}")
                    rows = None
                    break
                over, spent = max(r.over_gib for r in rows), _time(rows)
                verdict = f"short by {over:.2f} GiB" if over else f"{max(r.peak_gib for r in rows):.2f} GiB"
                say(f"  {flags(plan, stage)}: {verdict}" + ("" if over else f", {_figure(spent)}"))
                if not over:
                    break
                if any(r.over_gib for r in same.values()):  # no smaller part helps
                    rows = None
                    break
                micro *= 2
            if rows is None:
                break  # what needs more memory won't fit either
            least = micro
            if spent < best_time:
                best, best_time = (plan, rows), spent
    return best


def _time(rows: list[Row]) -> float:
    """Seconds; cycles, or else FLOPs, where the clock is not known."""
    for name in ("seconds", "cycles", "flops"):
        values = [getattr(r, name) for r in rows if not r.part]
        if all(x is not None for x in values):
            return sum(values)
    return math.inf


def _figure(x: float) -> str:
    return f"{x:.3g} s" if x < 1e4 else f"{x:.3g} cycles"


def flags(recipe: Recipe, stage: str) -> str:
    """The plan as the flags of `python -m experiments.STAGE`."""
    batch, mesh = getattr(recipe, stage), recipe.mesh
    out = f"--mesh.fsdp {mesh.fsdp} --mesh.tensor {mesh.tensor}" + (f" --mesh.data {mesh.data}" if mesh.data > 0 else "")
    out += f" --batch-size {batch.size} --micro-batches {batch.micro} --remat {recipe.remat}"
    optimisers = ("policy-optim", "critic-optim") if stage == "rto" else ("optim",)
    for name in ("moments", "gradients"):
        if getattr(recipe, name) != "float32":
            out += "".join(f" --{optimiser}.{name} {getattr(recipe, name)}" for optimiser in optimisers)
    if recipe.offload:
        out += "".join(f" --{optimiser}.offload" for optimiser in optimisers)
    if recipe.param_dtype != "float32":
        out += f" --param-dtype {recipe.param_dtype}"
    if recipe.frozen_dtype != "float32" and (stage in ("dpo", "rto") or recipe.lora.rank):
        out += f" --frozen-dtype {recipe.frozen_dtype}"
    return out + (f" --lora.rank {recipe.lora.rank}" if recipe.lora.rank else "")


# ------------------------------------------------------------------------------------------------ command line


def table(rows: list[Row], memory: float) -> str:
    def number(x, scale=1.0, digits=2):
        return "-" if x is None else f"{x / scale:.3g}" if 0 < x / scale < 1 else f"{x / scale:.{digits}f}"

    head = [
        "phase", "arguments", "temporaries", "peak", "held", "TFLOP", "model TFLOP", "Mcycles", "wire GiB", "kernels",
        "compile s",
    ]  # fmt: skip
    lines = [head]
    for r in rows:
        lines.append((
            ("  " if r.part else "") + r.phase + (f" x{r.runs}" if r.runs > 1 else ""), number(r.arguments_gib),
            number(r.temporaries_gib), number(r.peak_gib), number(r.held_gib), number(r.flops, 1e12), number(r.model_flops, 1e12),
            number(r.cycles, 1e6, 1), number(r.wire_gib), str(r.kernels), number(r.compile_seconds, 1, 0),
        ))  # fmt: skip
        if r.loop:
            lines.append((
                "    of which decoding", "", "", "", "", number(r.loop["flops"], 1e12), "",
                number(r.loop["cycles"] or None, 1e6, 1), number(r.loop["wire_gib"]), "", "",
            ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = [
        " ".join(x.rjust(w) if i else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))) for line in lines
    ]
    out += [
        f"  {r.phase}: " + ", ".join(f"{x['count']:g} {kind} {x['gib']:.2f} GiB" for kind, x in r.collectives.items())
        for r in rows
        if r.collectives
    ]
    whole = "" if memory == math.inf else f" (of {memory:g} GiB per device)"
    return f"GiB, FLOPs and cycles per device{whole}\n" + "\n".join(line.rstrip() for line in out)


def verdict(rows: list[Row], target: Target) -> str:
    over = [r for r in rows if r.over_gib and not r.part]
    if over:
        return "Does not fit: " + ", ".join(f"short by {r.over_gib:.2g} GiB in {r.stage}: {r.phase}" for r in over) + "."
    if target.device is None:
        return "Give --memory, the GiB of a device, to hear whether it fits."
    return f"Fits {target.device.memory:g} GiB per device."


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message[0].upper()}{message[1:]}.")

    parser = Parser(
        prog="python -m rto_jax.plan", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", default="gold", choices=PRESETS)
    add("--topology", required=True, help="v4, v5e, v5p, v6e or tpu7x and a shape (v5e:8x8), or cpu:8, gpu:8")
    add("--slices", type=int, default=1, help="of that topology; the batch is split between them (--mesh.data)")
    add("--memory", type=float, help="GiB per device, instead of the device's own")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--search", action="store_true", help="try meshes, micro-batches and remat for each stage; name the fastest that fits")
    add("--no-parts", action="store_true", help="leave out the programs that only show what a larger one is made of")
    add("--out", type=Path, help="write the figures as JSON")
    add("--dump", type=Path, help="folder for the compiled programs' text")
    add("--xla", nargs="+", default=[], metavar="NAME=VALUE", help="options of the compiler")
    for name, about in (
        ("layers", "of every model, for a quick look"), ("prompt", "tokens"), ("response", "tokens"),
        ("batch-size", "of every stage"), ("micro-batches", "of every stage"), ("minibatches", "updates per rollout buffer"),
        ("scale", "times the batch sizes"), ("mesh.data", ""), ("mesh.fsdp", ""), ("mesh.tensor", ""), ("lora.rank", ""),
    ):  # fmt: skip
        add(f"--{name}", type=int, help=about)
    for name, choices in (
        ("policy-size", SIZES), ("reward-size", SIZES), ("dtype", DTYPES), ("param-dtype", DTYPES),
        ("frozen-dtype", (*DTYPES, "int8")), ("moments", DTYPES), ("gradients", DTYPES), ("remat", REMAT),
        ("attention", ("auto", "xla", "splash")),
    ):  # fmt: skip
        add(f"--{name}", choices=choices)
    add("--offload", action="store_true", help="Adam's moments in the host's memory")
    args = parser.parse_args(argv)
    recipe, given = PRESETS[args.preset], {k: v for k, v in vars(args).items() if v is not None}
    for name in ("layers", "prompt", "response", "batch_size", "micro_batches", "minibatches", "scale"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {given[name]}.")
    if not given.get("memory", 1) > 0:
        raise UserError(f"--memory must be positive, not {args.memory}.")
    for stage in STAGES:
        batch = getattr(recipe, stage)
        size, micro = given.get("batch_size", batch.size) * given.get("scale", 1), given.get("micro_batches", batch.micro)
        recipe = recipe.with_stage(stage, size=size, micro=micro)
    mesh = {name: given[f"mesh.{name}"] for name in AXES if f"mesh.{name}" in given}
    same = ("layers", "prompt", "response", "minibatches", "dtype", "param_dtype", "frozen_dtype", "moments")
    same += ("gradients", "remat", "attention")
    changes = {name: given[name] for name in same if name in given}
    changes |= {name: given[f"{name}_size"] for name in ("policy", "reward") if f"{name}_size" in given}
    changes |= {"mesh": dataclasses.replace(recipe.mesh, **mesh), "offload": args.offload}
    changes |= {"lora": LoraConfig(rank=given.get("lora.rank", 0))}
    if args.layers:
        for size in (changes.get("policy", recipe.policy), changes.get("reward", recipe.reward)):
            if args.layers > SIZES[size].layers:
                raise UserError(f"--layers {args.layers}: {size} has {SIZES[size].layers}.")
    return args, dataclasses.replace(recipe, **changes)


def run(argv: list[str] | None = None) -> int:
    """The command; returns its exit status. Raises UserError."""
    args, recipe = parse(argv)
    if bad := [x for x in args.xla if "=" not in x]:
        raise UserError(f"--xla takes NAME=VALUE, not {bad[0]}.")
    target = open_target(args.topology, args.slices, args.memory)
    how = {"options": dict(x.split("=", 1) for x in args.xla) or None, "dump": args.dump}
    say = lambda text: print(text, flush=True)  # noqa: E731
    memory = target.device.memory if target.device else math.inf
    layers = f", {recipe.layers} layers" if recipe.layers else ""
    say(f"{args.preset} on {target.name}, {target.count} devices{layers}")
    if target.devices is None:
        say("There is no GPU here, and so no compiler for it: these are the sizes of what is passed and held only.")
        if args.search:
            raise UserError(f"--search needs a compiler for --topology {args.topology}.")
    plans, rows = {}, []
    for stage in args.stages:
        if not args.search:
            mesh = target.mesh(recipe.mesh)
            for phase in phases(recipe, mesh, (stage,), parts=not args.no_parts):
                rows.append(measure(phase, target, **how))
                say(f"  {stage}: {phase.name}" + (f", {rows[-1].compile_seconds:.0f} s" if rows[-1].compile_seconds else ""))
            plans[stage] = flags(recipe, stage)
            continue
        say(f"{stage}:")
        found = search(recipe, target, stage, say, **how)
        if found is None:
            say(f"Does not fit: no plan for {stage} fits {memory:g} GiB per device.")
            return 1
        plans[stage] = flags(found[0], stage)
        rows += found[1]
        say(f"the fastest that fits: python -m experiments.{stage} --preset {args.preset} {plans[stage]}")
    say(table(rows, memory))
    say(verdict(rows, target))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        words = list(sys.argv[1:] if argv is None else argv)
        command = re.sub(r" --out[ =]\S+", "", " ".join(["python -m rto_jax.plan", *words]))
        found = {
            "command": command, "commit": git_commit(), "topology": target.name,
            "devices": target.count, "memory_gib": None if target.device is None else memory,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu") if importlib.util.find_spec(name)},
            "recipe": dataclasses.asdict(recipe), "flags": plans, "verdict": verdict(rows, target),
            "phases": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(r.over_gib and not r.part for r in rows))


def main(argv: list[str] | None = None) -> None:
    words = " ".join(sys.argv[1:] if argv is None else argv)
    if not re.search("--topology[ =]gpu", words):  # compiling takes no device: it must not wait for a TPU in use
        jax.config.update("jax_platforms", "cpu")
    if (found := re.search(r"--topology[ =]cpu:(\d+)", words)) and int(found[1]):
        jax.config.update("jax_num_cpu_devices", int(found[1]))
    try:
        status = run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    main()
