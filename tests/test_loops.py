"""The outer loop, the optimiser's schedule and the random streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax import loops
from rto_jax.checkpoint import Checkpointer
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.rng import stream
from rto_jax.train_state import TrainState, apply_gradients, new_state


def run_loop(tmp_path, sizes: list[int]) -> list[int]:
    """Train one number on batches of these sizes; returns the steps whose state was saved."""
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, warmup=0.0), len(sizes))

    @jax.jit
    def program(state: TrainState, batch):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((p["norm"]["scale"][:1] - batch) ** 2))(state.params)
        return apply_gradients(state, grads, optimizer), {"loss": loss}

    source = iter(sizes)
    batches = loops.Batches(lambda: jnp.ones(next(source)), lambda: {"left": 0})
    state = new_state({"norm": {"scale": jnp.zeros(2)}}, optimizer)
    with MetricsLog(tmp_path, "toy") as log, Checkpointer(tmp_path / "checkpoints", keep=9) as checkpointer:
        loops.train(
            lambda state, batch, number: program(state, batch), state, batches,
            start=0, steps=len(sizes), name="toy", log=log, checkpointer=checkpointer, save_every=2, programs=(program,),
        )  # fmt: skip
        return checkpointer.steps()


def test_saves_every_so_often_and_at_the_end(tmp_path):
    assert run_loop(tmp_path, [4] * 5) == [2, 4, 5]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_program_that_compiles_again_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="toy: program 0 compiled again at step 3"):
        run_loop(tmp_path, [4, 4, 5])


def test_schedule_warms_up_and_ends_at_its_share():
    """100 steps, 10 % warm-up, cosine to 10 %. Adam moves by the learning rate when all gradients are alike."""
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, warmup=0.1, final=0.1, eps=1e-12), 100)
    state, moves = new_state({"w": jnp.zeros(())}, optimizer), []
    step = jax.jit(lambda s: apply_gradients(s, {"w": jnp.ones(())}, optimizer))
    for _ in range(101):
        after = step(state)
        moves.append(float(state.params["w"] - after.params["w"]))
        state = after
    cosine = lambda t: 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * (t - 10) / 90))  # noqa: E731
    for t, expected in ((0, 0.0), (5, 0.5), (10, 1.0), (55, cosine(55)), (100, 0.1)):
        np.testing.assert_allclose(moves[t], expected, atol=1e-4)
    assert int(state.step) == 101


def test_gradients_are_clipped_to_the_norm():
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, max_grad_norm=0.5), 10)
    state = optimizer.init({"w": jnp.zeros(2)})
    _, after = optimizer.update({"w": jnp.array([3.0, 4.0])}, state, {"w": jnp.zeros(2)})
    first_moment = next(x.mu for x in jax.tree.leaves(after, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu"))
    np.testing.assert_allclose(first_moment["w"], 0.1 * np.array([0.3, 0.4]), rtol=1e-5)


@pytest.mark.parametrize("flag", ["learning_rate", "max_grad_norm"])
def test_optimiser_refuses_what_cannot_be(flag):
    with pytest.raises(UserError, match=flag.replace("_", "-")):
        OptimConfig(**{flag: 0.0})


def test_streams_depend_on_seed_purpose_and_step_alone():
    data = [tuple(np.asarray(jax.random.key_data(stream(*a)))) for a in ((0, "a"), (0, "a", 1), (0, "b"), (1, "a"))]
    assert len(set(data)) == 4
    np.testing.assert_array_equal(jax.random.key_data(jax.jit(lambda t: stream(0, "a", t))(1)), data[1])
