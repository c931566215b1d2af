"""The body of the three supervised stages: SFT, reward model and DPO."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import Model, Run, Stage, open_run
from experiments.dry_run import abstract_mesh, report_shapes
from rto_jax import loops, programs
from rto_jax.optim import OptimConfig
from rto_jax.sharding import check_batch
from rto_jax.steps import PairsWithReference
from rto_jax.types import Pairs, Params, Sequences


def abstract_rows(rows: int, prompt: int, response: int) -> Sequences:
    """The shapes of a batch of rows, without its numbers."""
    shape = lambda *size, dtype: jax.ShapeDtypeStruct(size, dtype)  # noqa: E731
    total = prompt + response
    return Sequences(
        shape(rows, total, dtype=jnp.int32), shape(rows, total, dtype=bool), shape(rows, response, dtype=bool)
    )


def dry_run(stage: Stage, kind: str, size, head: str, optim: OptimConfig, steps: int, options=()) -> None:
    """Every shape and sharding of the stage's step, abstractly, for the mesh that the flags ask for."""
    mesh = abstract_mesh(stage.mesh)
    check_batch(stage.batch_size, mesh, "--batch-size", stage.micro_batches)
    rows = abstract_rows(stage.batch_size, stage.lengths.prompt, stage.lengths.response)
    batch: Any = rows
    if kind != "sft":
        batch = Pairs(rows, rows)
    if kind == "dpo":
        sums = jax.ShapeDtypeStruct((stage.batch_size,), jnp.float32)
        batch = PairsWithReference(batch, sums, sums)
    state = programs.abstract_state(size, head, optim, steps, mesh)
    step = programs.pure_step(kind, size, head, optim, steps, stage.micro_batches, options)
    _, metrics = jax.eval_shape(step, state, batch)
    report_shapes(kind, mesh, {"state": state}, metrics)


def run_supervised(
    stage: Stage,
    kind: str,
    model: Model,
    head: str,
    optim: OptimConfig,
    steps: int,
    batches: Any,
    place: Callable[[Any], Any],
    initial: Callable[[Any], Params],
    mesh,
    options: tuple[tuple[str, float], ...] = (),
) -> tuple[Run, Params]:
    """Train, resume where asked, save; returns the run and its last parameters."""
    check_batch(stage.batch_size, mesh, "--batch-size", stage.micro_batches)
    config = model.config
    step = programs.supervised_step(kind, config, head, optim, steps, stage.micro_batches, mesh, options)
    abstract = programs.abstract_state(config, head, optim, steps, mesh)
    fresh = lambda: programs.start(config, head, optim, steps, mesh)(initial(mesh))  # noqa: E731
    with open_run(stage, kind, abstract, fresh, batches) as run:
        state = loops.train(
            lambda state, batch, number: step(state, batch),
            run.state,
            loops.python_iterator(batches, place),
            start=run.start, steps=steps, name=kind, log=run.log, checkpointer=run.checkpointer,
            save_every=stage.save_every, programs=(step,),
        )  # fmt: skip
    return run, state.params


def accuracy(hits) -> dict[str, float]:
    """Share of True, its standard error, and how many were counted."""
    n, p = len(hits), float(hits.mean())
    return {"accuracy": p, "se": (p * (1 - p) / n) ** 0.5, "n": n}
