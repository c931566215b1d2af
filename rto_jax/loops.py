"""The outer loop of every stage: batches in, steps, metrics one step late, checkpoints, exact resume."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from rto_jax.checkpoint import Checkpointer
from rto_jax.metrics import MetricsLog, progress
from rto_jax.steps import ActorCritic
from rto_jax.train_state import TrainState


class Stopped(Exception):
    """The run was asked to stop; its text says after which step, which is saved."""


class Saved(NamedTuple):
    """A train state cut for a checkpoint: parameters by name (restorable alone), and the rest."""

    params: dict[str, Any]
    train: Any


def cut(state: TrainState | ActorCritic) -> Saved:
    """The policy of an ActorCritic is stored under the name that a supervised model has: "params"."""
    if isinstance(state, ActorCritic):
        (step, params, opt), (critic_step, critic, critic_opt) = state
        return Saved(
            {"params": params, "critic": critic},
            {"step": step, "opt_state": opt, "critic_step": critic_step, "critic_opt_state": critic_opt},
        )
    return Saved({"params": state.params}, {"step": state.step, "opt_state": state.opt_state})


def join(saved: Saved) -> TrainState | ActorCritic:
    """Inverse of `cut`."""
    params, train = saved
    state = TrainState(train["step"], params["params"], train["opt_state"])
    if "critic" not in params:
        return state
    return ActorCritic(state, TrainState(train["critic_step"], params["critic"], train["critic_opt_state"]))


def restore(checkpointer: Checkpointer, abstract) -> tuple[int, Any, dict]:
    """(step, state, extra) of the last good checkpoint, onto the shardings of the abstract state."""
    want = cut(abstract)
    found = checkpointer.restore(None, want.params, want.train)
    return found.step, join(Saved(found.params_by_name, found.train)), found.extra


class Batches(NamedTuple):
    """A resumable source: `next()` gives what the step takes, `state()` is saved with every checkpoint."""

    next: Callable[[], Any]
    state: Callable[[], dict]


def train(
    step: Callable[[Any, Any, int], tuple[Any, dict[str, jax.Array]]],
    state: Any,
    batches: Batches,
    *,
    start: int,
    steps: int,
    name: str,
    log: MetricsLog,
    checkpointer: Checkpointer,
    save_every: int,
    stop: Callable[[int], bool] = lambda number: False,
    programs: Sequence[Any] = (),
    shapes: int = 1,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int = 0,
) -> Any:
    """Run steps start+1 … steps of `state, metrics = step(state, batch, number)`; returns the last state.

    Metrics are read one step late, so the device never waits for the host; before a checkpoint is written they
    are read to the end, so a state that produced a NaN is never saved. `programs` are the jitted functions inside
    `step`: one that compiles again, but for the first batch of each of `shapes` shapes, raises RuntimeError. `evaluate`
    sees the state before the first step, every `evaluate_every` steps, and after the last. `stop` is asked after every
    step; where it says yes, the state is saved and Stopped raised.
    """
    met: set[tuple] = set()
    compiled: list[int] = []

    def assessed(number: int) -> dict[str, float]:
        due = evaluate and evaluate_every and (number % evaluate_every == 0 or number == steps)
        return {f"eval_{key}": value for key, value in evaluate(state).items()} if due else {}

    if start == 0 and (figures := assessed(0)):
        log.push(0, figures)
    with progress(steps, name, initial=start) as bar:
        for number in range(start + 1, steps + 1):
            batch = batches.next()
            state, metrics = step(state, batch, number)
            if (shape := _shapes(batch)) not in met and len(met) < shapes:
                met.add(shape)
                compiled = [program._cache_size() for program in programs]
            for index, program in enumerate(programs):
                if program._cache_size() > compiled[index]:
                    raise RuntimeError(f"{name}: program {index} compiled again at step {number}; shapes must be static")
            log.push(number, metrics | assessed(number))
            bar.update()
            stopping = stop(number)
            if stopping or number == steps or (save_every and number % save_every == 0):
                log.flush()
                checkpointer.save(number, *cut(state), extra={"batches": batches.state()})
            if stopping:
                checkpointer.wait()
                raise Stopped(f"after step {number} of {name}")
    log.flush()
    checkpointer.wait()
    return state


def _shapes(batch: Any) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(batch))


def python_iterator(iterator: Iterator, place: Callable[[Any], Any]) -> Batches:
    """Batches from a data iterator that has `state()`, each placed on the mesh."""
    return Batches(lambda: place(next(iterator)), iterator.state)
