"""The contract that every function of rto_jax.losses keeps, checked function by function.

Each case names a function, its arrays, its numbers and an oracle: plain loops over float64 NumPy arrays, written
from the formulas. `test_losses_values.py` has the hand-worked values and the identities between functions.
"""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from jax.test_util import check_grads

from rto_jax import losses

B, T, V = 8, 7, 5
JUNK = (np.nan, np.inf, -np.inf, 1e30, -1e30)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logps(seed: int, *shape: int) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(size=shape).astype(np.float32)


MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)


# ---- oracles ---------------------------------------------------------------------------------------------------------


def rows(function):
    """The oracle of a batch from the oracle of a row."""
    return lambda *arrays, **numbers: np.stack([function(*row, **numbers) for row in zip(*arrays, strict=True)])


def oracle_token_logps(logits, tokens, temperature):
    out = np.zeros(tokens.shape)
    for t, token in enumerate(tokens):
        weights = [np.exp(z / temperature) for z in logits[t]]
        out[t] = np.log(weights[token] / sum(weights))
    return out


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def oracle_dpo(chosen, rejected, ref_chosen, ref_rejected, beta, label_smoothing):
    # TRL's order of operations: the policy's log-ratio minus the reference's.
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    return -log_sigmoid(beta * logits) * (1 - label_smoothing) - log_sigmoid(-beta * logits) * label_smoothing


def oracle_rto(dpo, ref, policy, terminal, mask, beta1, beta2, beta3=1.0, dpo_clip=None):
    out = np.zeros(mask.shape)
    for t in np.flatnonzero(mask):
        dense = beta1 * (dpo[t] - ref[t])
        if dpo_clip is not None:
            dense = min(max(dense, -dpo_clip), dpo_clip)
        out[t] = dense - beta2 * (policy[t] - ref[t])
        if not mask[t + 1 :].any():
            out[t] += beta3 * terminal
    return out


def oracle_gae(rewards, values, mask, gamma, lam):
    """The double sum Σ_l (γλ)^l δ_{t+l} over the row without its masked positions."""
    real = np.flatnonzero(mask)
    reward, value = rewards[real], np.append(values[real], 0)
    delta = [reward[i] + gamma * value[i + 1] - value[i] for i in range(len(real))]
    out = np.zeros((2, len(mask)))
    for i, t in enumerate(real):
        out[0, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(real) - i))
        out[1, t] = out[0, t] + values[t]
    return out


def oracle_policy_loss(logps, old_logps, advantages, clip):
    ratio = np.exp(logps - old_logps)
    return -np.minimum(ratio * advantages, np.minimum(np.maximum(ratio, 1 - clip), 1 + clip) * advantages)


def oracle_value_loss(values, old_values, returns, clip):
    clipped = np.minimum(np.maximum(values, old_values - clip), old_values + clip)
    return np.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def oracle_whiten(x, mask, shift_mean):
    out, real = np.zeros(x.shape), x[mask]
    if real.size:
        out[mask] = (real - real.mean()) / np.sqrt(real.var() + 1e-8) + (0 if shift_mean else real.mean())
    return out


def compact(function):
    return lambda x, mask: function(x[mask]) if mask.any() else 0.0


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """`function` takes a batch of rows and `row` one row: the same function, but where it reduces over its batch."""

    function: Callable
    arrays: dict[str, np.ndarray]
    numbers: dict[str, float]
    oracle: Callable
    row: Callable | None = None

    def __call__(self, *arrays):
        return self.jitted(*(arrays or self.arrays.values()))

    @cached_property
    def jitted(self) -> Callable:
        return jax.jit(partial(self.function, **self.numbers))

    @cached_property
    def gradients(self) -> Callable:
        """Of a weighted sum of the outputs, so that every output has a say, in every float input."""
        return jax.jit(jax.grad(lambda *arrays: weighted(self.jitted(*arrays)), self.floats))

    @property
    def floats(self) -> tuple[int, ...]:
        return tuple(i for i, x in enumerate(self.arrays.values()) if x.dtype == np.float32)

    def replace(self, **arrays) -> list[np.ndarray]:
        return list((self.arrays | arrays).values())


def weighted(out: jax.Array) -> jax.Array:
    return jnp.sum(out * normal(99, *out.shape))


def reduced(loss: Callable) -> Callable:
    """A loss without a mask, as it is used: reduced by a mean over one."""
    return lambda *args, **numbers: losses.masked_mean(loss(*args[:-1], **numbers), args[-1], axis=-1)


def pairs() -> dict[str, np.ndarray]:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return {name: 10 * logps(i, B) for i, name in enumerate(names)}


REWARDS = {
    "dpo_logps": logps(1, B, T),
    "ref_logps": logps(2, B, T),
    "policy_logps": logps(3, B, T),
    "terminal_rewards": normal(4, B),
    "mask": MASK,
}
SURROGATE = {"logps": logps(5, B, T), "old_logps": logps(6, B, T), "advantages": normal(7, B, T)}
VALUES = {"values": normal(8, B, T), "old_values": normal(9, B, T), "returns": normal(10, B, T)}
MASKED_X = {"x": 2 + 3 * normal(11, B, T), "mask": MASK}
CASES = {
    "token_logps": Case(
        losses.token_logps,
        {"logits": 2 * normal(0, B, T, V), "tokens": np.random.default_rng(0).integers(0, V, (B, T))},
        {"temperature": 0.7},
        rows(oracle_token_logps),
    ),
    "bradley_terry_loss": Case(
        losses.bradley_terry_loss,
        {"chosen_rewards": 2 * normal(1, B), "rejected_rewards": 2 * normal(2, B)},
        {"margin": 0.3},
        lambda chosen, rejected, margin: -log_sigmoid(chosen - rejected - margin),
    ),
    "dpo_loss": Case(losses.dpo_loss, pairs(), {"beta": 0.1, "label_smoothing": 0.2}, oracle_dpo),
    "implicit_token_rewards": Case(
        losses.implicit_token_rewards,
        {"policy_logps": logps(1, B, T), "ref_logps": logps(2, B, T), "mask": MASK},
        {"beta": 0.1},
        lambda policy, ref, mask, beta: np.where(mask, beta * (policy - ref), 0),
    ),
    "rto_token_rewards": Case(
        losses.rto_token_rewards, REWARDS, {"beta1": 0.5, "beta2": 0.1, "beta3": 0.7}, rows(oracle_rto)
    ),
    "rto_token_rewards clipped": Case(
        losses.rto_token_rewards, REWARDS, {"beta1": 0.5, "beta2": 0.1, "dpo_clip": 0.2}, rows(oracle_rto)
    ),
    "gae": Case(
        lambda *args, **numbers: jnp.stack(losses.gae(*args, **numbers), axis=-2),
        {"rewards": normal(5, B, T), "values": normal(6, B, T), "mask": MASK},
        {"gamma": 0.9, "lam": 0.8},
        rows(oracle_gae),
    ),
    "ppo_policy_loss": Case(losses.ppo_policy_loss, SURROGATE, {"clip": 0.2}, oracle_policy_loss),
    "ppo_value_loss": Case(losses.ppo_value_loss, VALUES, {"clip": 0.2}, oracle_value_loss),
    "ppo_policy_loss reduced": Case(
        reduced(losses.ppo_policy_loss),
        SURROGATE | {"mask": MASK},
        {"clip": 0.2},
        lambda *args, clip: rows(compact(np.mean))(oracle_policy_loss(*args[:-1], clip), args[-1]),
    ),
    "ppo_value_loss reduced": Case(
        reduced(losses.ppo_value_loss),
        VALUES | {"mask": MASK},
        {"clip": 0.2},
        lambda *args, clip: rows(compact(np.mean))(oracle_value_loss(*args[:-1], clip), args[-1]),
    ),
    "masked_sum": Case(partial(losses.masked_sum, axis=-1), MASKED_X, {}, rows(compact(np.sum))),
    "masked_mean": Case(partial(losses.masked_mean, axis=-1), MASKED_X, {}, rows(compact(np.mean))),
    "masked_var": Case(partial(losses.masked_var, axis=-1), MASKED_X, {}, rows(compact(np.var))),
    "whiten": Case(
        jax.vmap(losses.whiten), MASKED_X, {}, rows(partial(oracle_whiten, shift_mean=True)), row=losses.whiten
    ),
    "whiten, mean kept": Case(
        jax.vmap(partial(losses.whiten, shift_mean=False)),
        MASKED_X,
        {},
        rows(partial(oracle_whiten, shift_mean=False)),
        row=partial(losses.whiten, shift_mean=False),
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MASKED = {name: case for name, case in CASES.items() if "mask" in case.arrays}
every_masked_case = pytest.mark.parametrize("case", MASKED.values(), ids=MASKED)


def close(actual, desired, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=rtol, atol=atol)


# ---- values ----------------------------------------------------------------------------------------------------------


@every_case
def test_equals_the_loops_in_numpy(case):
    exact = [x.astype(np.float64) if x.dtype == np.float32 else x for x in case.arrays.values()]
    expected = case.oracle(*exact, **case.numbers)
    out = case()
    chex.assert_shape(out, expected.shape)
    assert np.abs(expected).max() > 0.1  # an oracle that is 0 everywhere would prove nothing
    close(out, expected)


@every_case
def test_gradients_are_those_of_finite_differences(case):
    def f(*floats):
        arrays = list(case.arrays.values())
        for i, x in zip(case.floats, floats, strict=True):
            arrays[i] = x
        return case.jitted(*arrays)

    floats = [jnp.asarray(x) for x in case.arrays.values() if x.dtype == np.float32]
    check_grads(f, floats, order=1, modes=("fwd", "rev"), eps=2e-3, atol=5e-3, rtol=5e-3)


@every_case
def test_float32_out_whatever_comes_in(case):
    names = list(case.arrays)
    half = [jnp.asarray(x, jnp.bfloat16) if i in case.floats else x for i, x in enumerate(case.arrays.values())]
    rounded = [x.astype(jnp.float32) if i in case.floats else x for i, x in enumerate(half)]
    out = case(*half)
    assert out.dtype == jnp.float32
    close(out, case(*rounded), 1e-6, 1e-6)  # all arithmetic is float32: bfloat16 costs the rounding of the input only
    scale = np.abs(case()).max()
    if names[0] not in ("logps", "values"):  # their clips jump
        close(out, case(), 0.05, 0.05 * scale)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        exact = [x.astype(np.float64) if i in case.floats else x for i, x in enumerate(case.arrays.values())]
        double = jax.jit(partial(case.function, **{k: np.float64(x) for k, x in case.numbers.items()}))(*exact)
        assert double.dtype == jnp.float32
    close(double, case())


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.int64, partial(jnp.asarray, dtype="float64"), jnp.bfloat16]
)
def test_float32_out_whatever_kind_of_number_comes_in(kind):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        out = losses.implicit_token_rewards(-np.ones(2), -3 * np.ones(2), np.array([True, False]), beta=kind(2))
    assert out.dtype == jnp.float32 and out.tolist() == [4, 0]


# ---- transformations -------------------------------------------------------------------------------------------------


@every_case
def test_jit_vmap_and_shard_map_agree_with_single_rows(case):
    row = partial(case.row or case.function, **case.numbers)
    batch = partial(case.function, **case.numbers)
    arrays = [jnp.asarray(x) for x in case.arrays.values()]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    functions = {
        "jit": batch,
        "vmap": jax.vmap(row),
        "shard_map": jax.shard_map(batch, mesh=mesh, in_specs=spec, out_specs=spec),
    }

    @jax.jit
    def everything(*arrays):
        def both(f):
            out, pullback = jax.vjp(f, *arrays)
            gradients = pullback(jnp.asarray(normal(99, *out.shape)))
            return out, [gradients[i] for i in case.floats]

        return {name: both(f) for name, f in functions.items()}

    one_row = jax.jit(row)
    expected = np.stack([one_row(*(x[i] for x in arrays)) for i in range(B)])
    close(batch(*arrays), expected, 1e-6, 1e-6)  # op by op
    results = everything(*arrays)
    for name, (out, gradients) in results.items():
        close(out, expected, 1e-6, 1e-6)
        chex.assert_trees_all_close(gradients, results["jit"][1], rtol=1e-5, atol=1e-5, custom_message=name)


@every_case
def test_more_leading_dimensions(case):
    arrays = [jnp.asarray(x).reshape(2, 4, *x.shape[1:]) for x in case.arrays.values()]
    if case.row is None:
        close(case(*arrays), case().reshape(2, 4, *case().shape[1:]), 1e-6, 1e-6)
    else:  # reduces over everything
        close(case.row(*arrays), case.oracle(*(x.reshape(1, B, T) for x in case.arrays.values())).reshape(2, 4, T))


@pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.numbers], ids=[n for n, c in CASES.items() if c.numbers]
)
def test_numbers_may_be_traced(case):
    """And mapped over: each number in turn at two values, all in one compiled program."""
    settings = [case.numbers | {name: x} for name in case.numbers for x in (0.05, 0.45)]
    arrays = case.arrays.values()
    stacked = {name: jnp.array([setting[name] for setting in settings]) for name in case.numbers}
    out = jax.jit(jax.vmap(lambda numbers: case.function(*arrays, **numbers)))(stacked)
    close(out, np.stack([case.function(*arrays, **setting) for setting in settings]))


# ---- masks -----------------------------------------------------------------------------------------------------------


def with_junk(case: Case, junk: float) -> list[np.ndarray]:
    """The arrays, with junk wherever the mask is False, and in what belongs to rows without any token."""
    mask = case.arrays["mask"]
    arrays = {
        name: np.where(mask if x.shape == mask.shape else mask.any(-1), x, np.float32(junk))
        for name, x in case.arrays.items()
        if name != "mask"
    }
    return case.replace(**arrays)


@pytest.mark.parametrize("junk", JUNK)
@every_masked_case
def test_what_stands_at_masked_positions_changes_nothing(case, junk):
    arrays = with_junk(case, junk)
    np.testing.assert_array_equal(case(*arrays), case())
    for dirty, clean in zip(case.gradients(*arrays), case.gradients(*case.arrays.values()), strict=True):
        np.testing.assert_array_equal(dirty, clean)
        assert dirty.shape != MASK.shape or not np.asarray(dirty)[~MASK].any()


@every_masked_case
def test_masked_positions_get_zero(case):
    out = np.asarray(case())
    if out.shape[-1] == T:
        mask = np.broadcast_to(MASK[:, None] if out.ndim == 3 else MASK, out.shape)
        assert not out[~mask].any() and out[mask].any()
    assert not out[1].any()  # the row without any token


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4)])
@every_masked_case
def test_padding_on_either_side_changes_nothing(case, left, right):
    def pad(x):
        if x.shape != MASK.shape:
            return x
        return np.pad(x, ((0, 0), (left, right)), constant_values=False if x.dtype == bool else np.nan)

    out, expected = np.asarray(case(*map(pad, case.arrays.values()))), np.asarray(case())
    if expected.shape[-1] == T:
        padding = np.delete(out, np.arange(left, left + T), axis=-1)
        assert padding.shape[-1] == left + right and not padding.any()
        out = out[..., left : left + T]
    close(out, expected, 1e-6, 1e-6)


@every_masked_case
def test_holes_are_passed_over(case):
    """Masked columns in the middle (a user's turn) are as if they were cut out."""
    keep = np.array([0, 1, 2, 5, 6])
    mask = MASK.copy()
    mask[:, 3:5] = False
    full = np.asarray(case(*case.replace(mask=mask)))
    cut = np.asarray(case(*(x[:, keep] if x.shape == mask.shape else x for x in case.replace(mask=mask))))
    close(full[..., keep] if full.shape[-1] == T else full, cut, 1e-6, 1e-6)


@every_masked_case
def test_nothing_to_see_gives_zeros_and_zero_gradients(case):
    arrays = case.replace(mask=np.zeros_like(MASK))
    assert not np.asarray(case(*arrays)).any()
    for gradient in case.gradients(*arrays):
        assert not np.asarray(gradient).any()


# ---- extremes --------------------------------------------------------------------------------------------------------


@every_case
def test_gradients_stay_finite_at_log_probabilities_of_minus_ten_thousand(case):
    for i in case.floats:
        for size in (1e4, -1e4):
            name, x = list(case.arrays.items())[i]
            x = x.copy()
            x[..., 0] = x[..., -1] = size
            arrays = case.replace(**{name: x})
            assert np.isfinite(case(*arrays)).all(), name
            assert all(np.isfinite(g).all() for g in case.gradients(*arrays)), name


def test_no_tokens_at_all():
    x, mask, nothing = np.zeros((3, 0)), np.zeros((3, 0), bool), np.zeros((3, 0))
    chex.assert_shape(losses.gae(x, x, mask), (3, 0))
    chex.assert_shape(losses.rto_token_rewards(x, x, x, np.ones(3), mask, beta1=1, beta2=1), (3, 0))
    assert losses.masked_mean(x, mask) == 0 and losses.masked_var(x, mask) == 0 and losses.masked_sum(x, mask) == 0
    chex.assert_equal_shape([losses.whiten(x, mask), nothing])


# ---- the contract ----------------------------------------------------------------------------------------------------

SIGNATURES = {
    "token_logps": "(logits, tokens, *, temperature=1.0)",
    "bradley_terry_loss": "(chosen_rewards, rejected_rewards, *, margin=0.0)",
    "dpo_loss": "(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, label_smoothing=0.0)",
    "implicit_token_rewards": "(policy_logps, ref_logps, mask, *, beta)",
    "rto_token_rewards": (
        "(dpo_logps, ref_logps, policy_logps, terminal_rewards, mask, *, beta1, beta2, beta3=1.0, dpo_clip=None)"
    ),
    "gae": "(rewards, values, mask, *, gamma=1.0, lam=0.95)",
    "ppo_policy_loss": "(logps, old_logps, advantages, *, clip=0.2)",
    "ppo_value_loss": "(values, old_values, returns, *, clip=0.2)",
    "masked_sum": "(x, mask, *, axis=None)",
    "masked_mean": "(x, mask, *, axis=None)",
    "masked_var": "(x, mask, *, axis=None)",
    "whiten": "(x, mask, *, shift_mean=True)",
}


def test_public_names_and_signatures():
    assert sorted(losses.__all__) == sorted(SIGNATURES)
    for name, expected in SIGNATURES.items():
        signature = inspect.signature(getattr(losses, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected, name
        assert len(getattr(losses, name).__doc__.splitlines()) >= 4, name


@pytest.mark.parametrize("case", [case for name, case in CASES.items() if "reduced" not in name])
def test_a_wrong_shape_raises_when_traced(case):
    """Every argument in turn, one column (or row) short, is named."""
    for name, x in case.arrays.items():
        short = case.replace(**{name: x[:, :-1] if x.ndim > 1 else x[:-1]})
        with pytest.raises(ValueError, match=r"has shape \(") as error:
            jax.eval_shape(lambda *arrays, case=case: case(*arrays), *short)
        assert name in str(error.value)
        assert str(short[list(case.arrays).index(name)].shape[-1]) in str(error.value)


@every_masked_case
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_that_is_not_boolean_raises_when_traced(case, dtype):
    with pytest.raises(ValueError, match="mask must be boolean"):
        jax.eval_shape(case, *case.replace(mask=MASK.astype(dtype)))


ONE = np.ones(3)
REAL = np.ones(3, bool)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("temperature", lambda: losses.token_logps(np.ones((3, 2)), np.zeros(3, int), temperature=0)),
        ("temperature", lambda: losses.token_logps(np.ones((3, 2)), np.zeros(3, int), temperature=float("nan"))),
        ("tokens", lambda: losses.token_logps(np.ones((3, 2)), np.zeros(3))),
        ("logits", lambda: losses.token_logps(np.float32(1), np.zeros((), int))),
        ("margin", lambda: losses.bradley_terry_loss(ONE, ONE, margin=np.ones(2))),
        ("margin", lambda: losses.bradley_terry_loss(ONE, ONE, margin=float("nan"))),
        ("beta", lambda: losses.dpo_loss(ONE, ONE, ONE, ONE, beta=0)),
        ("beta", lambda: losses.dpo_loss(ONE, ONE, ONE, ONE, beta=-0.1)),
        ("beta", lambda: losses.dpo_loss(ONE, ONE, ONE, ONE, beta=ONE)),
        ("label_smoothing", lambda: losses.dpo_loss(ONE, ONE, ONE, ONE, beta=1, label_smoothing=0.6)),
        ("beta", lambda: losses.implicit_token_rewards(ONE, ONE, REAL, beta=-1)),
        ("beta1", lambda: losses.rto_token_rewards(ONE, ONE, ONE, 1.0, REAL, beta1=-1, beta2=1)),
        ("beta2", lambda: losses.rto_token_rewards(ONE, ONE, ONE, 1.0, REAL, beta1=1, beta2=-1)),
        ("beta3", lambda: losses.rto_token_rewards(ONE, ONE, ONE, 1.0, REAL, beta1=1, beta2=1, beta3=-1)),
        ("dpo_clip", lambda: losses.rto_token_rewards(ONE, ONE, ONE, 1.0, REAL, beta1=1, beta2=1, dpo_clip=0)),
        ("terminal_rewards", lambda: losses.rto_token_rewards(ONE, ONE, ONE, ONE, REAL, beta1=1, beta2=1)),
        ("terminal_rewards", lambda: losses.rto_token_rewards(1.0, 1.0, 1.0, 1.0, np.bool_(True), beta1=1, beta2=1)),
        ("gamma", lambda: losses.gae(ONE, ONE, REAL, gamma=1.1)),
        ("lam", lambda: losses.gae(ONE, ONE, REAL, lam=-0.1)),
        ("rewards", lambda: losses.gae(1.0, 1.0, np.bool_(True))),
        ("clip", lambda: losses.ppo_policy_loss(ONE, ONE, ONE, clip=0)),
        ("clip", lambda: losses.ppo_value_loss(ONE, ONE, ONE, clip=-1)),
    ],
)
def test_a_number_out_of_range_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name} (must|has)"):
        call()


def modules_after(statement: str) -> set[str]:
    """The top-level modules, outside of the standard library, that a fresh interpreter holds after the statement."""
    code = f"import sys\n{statement}\nprint(*{{n.split('.')[0] for n in sys.modules}} - sys.stdlib_module_names)"
    root = Path(__file__).parents[1]
    return set(
        subprocess.run(
            [sys.executable, "-c", code], cwd=root, check=True, text=True, capture_output=True
        ).stdout.split()
    )


def test_importing_the_losses_loads_jax_and_numpy_only():
    allowed = modules_after("import jax, numpy")
    assert modules_after("import rto_jax.losses") - allowed == {"rto_jax"}
    assert "optax" in modules_after("import rto_jax.losses, optax") - allowed  # the probe can see one
