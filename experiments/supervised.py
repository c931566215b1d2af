"""The body of the three supervised stages: SFT, reward model and DPO."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import Model, Run, Stage, open_run
from experiments.dry_run import abstract_mesh, first_rows, kept_activations, report_shapes
from experiments.preemption import PREEMPTION
from rto_jax import loops, programs
from rto_jax.data import packing
from rto_jax.optim import OptimConfig
from rto_jax.sharding import check_batch
from rto_jax.steps import PairsWithReference
from rto_jax.train_state import over
from rto_jax.types import PackedPairs, Pairs, Params, Sequences


@dataclass(frozen=True, kw_only=True)
class SupervisedStage(Stage):
    """The flags that the supervised stages have."""

    pack: int = 0
    """slots of a row that holds several examples; --batch-size counts such rows; 0: one example a row"""
    buckets: int = 1
    """shapes of batches, chosen from the data; the largest is that of --lengths; each is compiled once"""

    def __post_init__(self):
        super().__post_init__()
        packing.check(self.pack, self.buckets)


def abstract_rows(rows: int, prompt: int, response: int) -> Sequences:
    """The shapes of a batch of rows, without its numbers."""
    shape = lambda *size, dtype: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    total = prompt + response
    return Sequences(
        shape(rows, total, dtype=jnp.int32), shape(rows, total, dtype=bool), shape(rows, response, dtype=bool)
    )


def abstract_batch(stage: SupervisedStage, kind: str, reads: tuple[str, ...] = ()) -> Any:
    """The shapes of what the stage's step takes; a packed row is cut as if all examples had the lengths of --lengths."""
    size, parts = stage.batch_size, 1 if kind == "sft" else 2
    prompt, response = stage.lengths.prompt, stage.lengths.response
    if stage.pack:
        response = stage.pack * response // (prompt + parts * response)
        rows = abstract_rows(size, stage.pack - parts * response, parts * response)
        rows = rows._replace(valid=rows.tokens)
        places = stage.pack // stage.lengths.response + 1
        batch = rows if kind == "sft" else PackedPairs(rows, jax.ShapeDtypeStruct((size, places), jnp.int32))
    else:
        rows, places = abstract_rows(size, prompt, response), None
        batch = rows if kind == "sft" else Pairs(rows, rows)
    sums = jax.ShapeDtypeStruct((size, places) if places else (size,), jnp.float32)
    return PairsWithReference(batch, sums, sums) if "reference" in reads else batch


def dry_run(stage: SupervisedStage, kind: str, size, head: str, optim: OptimConfig, steps: int, options=()) -> None:
    """Every shape and sharding of the stage's step, abstractly, for the mesh that the flags ask for."""
    mesh = abstract_mesh(stage.mesh)
    check_batch(stage.batch_size, mesh, "--batch-size", stage.micro_batches)
    reads = programs.reads(kind, options)
    batch = abstract_batch(stage, kind, reads)
    state = programs.abstract_state(size, head, optim, steps, mesh)
    step = programs.pure_step(kind, size, head, optim, steps, stage.micro_batches, options, mesh)
    whole = programs.abstract_params(dataclasses.replace(size, param_dtype="float32"), head, mesh, stage.frozen_dtype)
    held = {"base": whole} if stage.lora.rank else {"reference": whole} if {"reference", "kl"} & set(reads) else {}
    base = held.get("base", held if "kl" in reads else None)
    _, metrics = jax.eval_shape(step, state, batch, base)
    trees = {"trained": state} | held
    objective = programs.objective(kind, size, head, options, mesh)
    part = first_rows(batch, stage.batch_size // stage.micro_batches)
    kept = kept_activations(objective, over(base, state.params), part, mesh)
    report_shapes(kind, mesh, trees, metrics, {"trained": optim.gradients}, kept)


def run_supervised(
    stage: SupervisedStage,
    kind: str,
    model: Model,
    head: str,
    optim: OptimConfig,
    steps: int,
    batches: Any,
    place: Callable[[Any], Any],
    initial: Callable[[Any], Params],
    mesh,
    options: programs.Options = (),
    base: Params | None = None,
) -> tuple[Run, Params]:
    """Train, resume where asked, save; returns the run and the model at its end.

    base: the step's: what adapters lie over, or what the loss reads besides.
    """
    check_batch(stage.batch_size, mesh, "--batch-size", stage.micro_batches)
    config = model.config
    step = programs.supervised_step(kind, config, head, optim, steps, stage.micro_batches, mesh, options)
    abstract = programs.abstract_state(config, head, optim, steps, mesh)
    fresh = lambda: programs.start(config, head, optim, steps, mesh)(initial(mesh))  # noqa: E731
    with open_run(stage, kind, abstract, fresh, batches) as run:
        state = loops.train(
            lambda state, batch, number: step(state, batch, base),
            run.state,
            loops.python_iterator(batches, place),
            start=run.start, steps=steps, name=kind, log=run.log, checkpointer=run.checkpointer,
            save_every=stage.save_every, stop=PREEMPTION.asked, programs=(step,), shapes=batches.shapes,
        )  # fmt: skip
    return run, over(base if stage.lora.rank else None, state.params)


def accuracy(hits) -> dict[str, float]:
    """Share of True, its standard error, and how many were counted."""
    n, p = len(hits), float(hits.mean())
    return {"accuracy": p, "se": (p * (1 - p) / n) ** 0.5, "n": n}
