"""The contract that every function of rto_jax.losses keeps, checked function by function.

`losses_cases.py` has the functions, their arrays and their oracles. `test_losses_values.py` has the hand-worked values
and the identities between functions, `test_losses_properties.py` what holds of any input.
"""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_vjp

from rto_jax import losses
from tests.losses_cases import (
    ANSWERS,
    BAD,
    BOTH_LOGITS,
    CASES,
    DENSE,
    MASK,
    MASKED_X,
    B,
    Case,
    T,
    normal,
    value_and_gradients,
)

# What stands at masked positions: (in floats, in integers); booleans are turned round.
JUNK = [(np.nan, -100), (np.inf, 2**31 - 1), (-np.inf, -(2**31)), (1e30, 3), (-1e30, 1)]
CHECKS = {"masks", "holes", "no tokens", "junk in scores", "forward mode", "bfloat16 is near"}  # and those below


def every_case(check: str, applies: Callable[[Case], bool] = lambda case: True):
    """The cases that are not exempt from the check."""
    CHECKS.add(check)
    chosen = {name: case for name, case in CASES.items() if check not in case.exempt and applies(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen)


def every_masked_case(check: str):
    return every_case(check, lambda case: "masks" not in case.exempt)


def close(actual, desired, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=rtol, atol=atol)


def exact(case: Case) -> list[np.ndarray]:
    return [x.astype(np.float64) if i in case.floats else x for i, x in enumerate(case.arrays.values())]


# ---- values ----------------------------------------------------------------------------------------------------------


@every_case("oracle")
def test_equals_the_loops_in_numpy(case):
    expected = case.oracle(*exact(case), **case.numbers)
    out = case()
    chex.assert_shape(out, expected.shape)
    assert np.abs(expected).max() > 0.1  # an oracle that is 0 everywhere would prove nothing
    close(out, expected)


@every_case("gradients")
def test_gradients_are_those_of_finite_differences(case):
    """JAX's `check_grads`, of the compiled gradient that the other checks use; forward mode is traced only."""
    names = list(case.arrays)
    flowing = [i for i in case.floats if names[i] not in case.stopped]

    def arrays(floats):
        return case.replace(**{names[i]: x for i, x in zip(flowing, floats, strict=True)})

    def weighted(*floats):
        out = np.asarray(case(*arrays(floats)), np.float64)
        return np.sum(out * normal(99, *out.shape))

    def vjp(*floats):
        gradients = dict(zip(case.floats, case.gradients(*arrays(floats)), strict=True))
        return weighted(*floats), lambda cotangent: tuple(cotangent * np.asarray(gradients[i]) for i in flowing)

    floats = tuple(case.arrays[names[i]] for i in flowing)
    check_vjp(weighted, vjp, floats, eps=2e-3, atol=5e-3, rtol=5e-3)
    if "forward mode" not in case.exempt:
        jax.eval_shape(lambda *x: jax.jvp(lambda *x: case.value(*arrays(x)), x, x), *floats)


@every_case("stopped", lambda case: case.stopped)
def test_no_gradient_flows_where_it_is_stopped(case):
    for i, gradient in zip(case.floats, case.gradients(*case.arrays.values()), strict=True):
        assert np.any(gradient) == (list(case.arrays)[i] not in case.stopped)


KTO_SUMS = [x + shift for x, shift in zip(normal(3, 4, B), np.float32([2, 1, 0, 0]), strict=True)]  # z above 0


def test_the_means_of_kto_are_constants():
    """Its gradients are those of `kto_loss` with the reference points as numbers."""
    chosen, rejected, ref_chosen, ref_rejected = KTO_SUMS
    good = np.ones(B, bool)
    z_chosen, z_rejected = losses.kto_kl(chosen, ref_chosen), losses.kto_kl(rejected, ref_rejected)
    assert z_chosen > 1 and z_rejected > 0.5

    def halves(chosen, rejected, ref_chosen, ref_rejected):
        one = losses.kto_loss(chosen, ref_chosen, good, z_rejected, beta=0.3)
        return jnp.sum(one + losses.kto_loss(rejected, ref_rejected, ~good, z_chosen, beta=0.3)) / 2

    ours = jax.jit(jax.grad(lambda *args: jnp.sum(losses.kto_pair_loss(*args, beta=0.3)), range(4)))(*KTO_SUMS)
    for gradient, expected in zip(ours, jax.jit(jax.grad(halves, range(4)))(*KTO_SUMS), strict=True):
        close(gradient, expected, 1e-5, 1e-6)


@every_case("float32")
def test_float32_out_whatever_comes_in(case):
    """With 64-bit types on, and no promotion of types: from bfloat16, and from float64 with NumPy's numbers."""
    half = [jnp.asarray(x, jnp.bfloat16) if i in case.floats else x for i, x in enumerate(case.arrays.values())]
    rounded = [np.asarray(x, np.float32) if i in case.floats else x for i, x in enumerate(half)]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        strict = jax.jit(partial(case.function, **{name: np.float64(x) for name, x in case.numbers.items()}))
        out = strict(*half)
        assert out.dtype == case.dtype
        double = jax.eval_shape(strict, *exact(case))
        assert (double.shape, double.dtype) == (out.shape, case.dtype)
    close(out, case(*rounded), 1e-6, 1e-6)  # all arithmetic is float32: bfloat16 costs the rounding of the input only
    if "bfloat16 is near" not in case.exempt:
        close(out, case(), 0.05, 0.05 * np.abs(case()).max())


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.int64, partial(jnp.asarray, dtype="float64"), jnp.bfloat16]
)
def test_float32_out_whatever_kind_of_number_comes_in(kind):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        out = losses.implicit_token_rewards(-np.ones(2), -3 * np.ones(2), np.array([True, False]), beta=kind(2))
    assert out.dtype == jnp.float32 and out.tolist() == [4, 0]


# ---- transformations -------------------------------------------------------------------------------------------------

DATA = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@every_case("rows")
def test_jit_vmap_and_shard_map_agree(case):
    """Each of 8 devices maps over its rows, one here: values and gradients are those of the batch under jit."""
    row = partial(case.row or case.function, **case.numbers)
    sharded = jax.shard_map(jax.vmap(row), mesh=DATA, in_specs=P("data"), out_specs=P("data"))
    arrays = list(case.arrays.values())
    out, gradients = jax.jit(partial(value_and_gradients, case, sharded))(*arrays)
    close(out, case(), 1e-6, 1e-6)
    chex.assert_trees_all_close(gradients, case.gradients(*arrays), rtol=1e-5, atol=1e-5)


@every_case("leading dimensions", lambda case: case.row is None)
def test_more_leading_dimensions(case):
    out = case.value(*(x.reshape(2, 4, *x.shape[1:]) for x in case.arrays.values()))
    close(out.reshape(B, *out.shape[2:]), case(), 1e-6, 1e-6)


@every_case("leading dimensions", lambda case: case.whole)
def test_a_batch_in_any_leading_dimensions_is_one_batch(case):
    out = jax.jit(partial(case.row, **case.numbers))(*(x.reshape(2, 4, T) for x in case.arrays.values()))
    close(out, case.whole(*(x.reshape(2, 4, T) for x in exact(case)), **case.numbers))


@every_case("numbers", lambda case: case.numbers)
def test_numbers_may_be_traced(case):
    """And mapped over: each number in turn at two values, all in one compiled program."""
    settings = [case.numbers | {name: x * share} for name, x in case.numbers.items() for share in (0.5, 1.1)]
    stacked = {name: jnp.array([setting[name] for setting in settings]) for name in case.numbers}
    out = jax.jit(jax.vmap(lambda numbers: case.function(*case.arrays.values(), **numbers)))(stacked)
    close(out, np.stack([case.oracle(*exact(case), **setting) for setting in settings]))


# ---- several devices -------------------------------------------------------------------------------------------------

STATE = losses.RunningMoments(*map(jnp.float32, (4, 1.5, 20)))
X, REWARDS = list(MASKED_X.values()), list(DENSE.values())
COUPLED = {
    "masked_mean": (losses.masked_mean, X),
    "masked_var": (losses.masked_var, X),
    "whiten": (losses.whiten, X),
    "whiten, mean kept": (partial(losses.whiten, shift_mean=False), X),
    "kto_kl": (losses.kto_kl, KTO_SUMS[::2]),
    "kto_pair_loss": (partial(losses.kto_pair_loss, beta=0.3), KTO_SUMS),
    "update_moments": (lambda x, mask, **axis: jnp.stack(losses.update_moments(STATE, x, mask, **axis)), X),
    "reinforce_pp_advantages": (partial(losses.reinforce_pp_advantages, gamma=0.9), REWARDS),
    "token_mean": (lambda *args, **axis: jnp.stack(losses.over_devices(losses.token_mean(*args), **axis)), X),
    "sequence_mean": (lambda *args, **axis: jnp.stack(losses.over_devices(losses.sequence_mean(*args), **axis)), X),
}


@pytest.mark.parametrize(
    ("shape", "axes"), [((8,), ("data",)), ((4, 2), ("data", "fsdp"))], ids=["one axis", "two axes"]
)
def test_eight_devices_make_one_batch(shape, axes):
    """Each has one row, of another length, one of them none: values and gradients of the whole batch."""
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    axis_name = axes if len(axes) > 1 else axes[0]

    @jax.jit
    def everything():
        out = {}
        for name, (function, arrays) in COUPLED.items():
            floats, rest = [x for x in arrays if x.dtype != bool], [x for x in arrays if x.dtype == bool]
            whole, pullback = jax.vjp(lambda *x, f=function, rest=rest: f(*x, *rest), *floats)
            spec = P(axes) if whole.shape[:1] == (B,) else P()
            sharded = jax.shard_map(partial(function, axis_name=axis_name), mesh=mesh, in_specs=P(axes), out_specs=spec)
            split, split_pullback = jax.vjp(lambda *x, f=sharded, rest=rest: f(*x, *rest), *floats)
            weights = jnp.asarray(normal(99, *whole.shape))
            out[name] = (whole, pullback(weights)), (split, split_pullback(weights))
        return out

    for whole, split in everything().values():
        jax.tree.map(partial(close, rtol=1e-5, atol=1e-5), split, whole)


@pytest.mark.parametrize("pair", [losses.token_mean, losses.sequence_mean])
@pytest.mark.parametrize("sizes", [(1, 3, 4), (2,) * 4, (8,), (7, 1)], ids=str)
def test_micro_batches_add_up(pair, sizes):
    """Small integers over 1, 2 or 4 tokens: sums without rounding, so the pairs must be equal to the last bit."""
    x = np.random.default_rng(0).integers(-9, 10, (B, T)).astype(np.float32)
    mask = MASK & (np.cumsum(MASK, axis=1) <= np.array([4, 4, 2, 4, 2, 4, 4, 4])[:, None])
    pieces = np.cumsum(sizes)[:-1]

    @jax.jit
    def gradient(x, mask):
        """Of the first of the pair, which is what is accumulated; the second is a constant."""
        (first, count), pullback = jax.vjp(lambda x: pair(x, mask), x)
        return (first, count), pullback((jnp.ones(()), jnp.zeros(())))[0]

    whole, whole_gradient = gradient(x, mask)
    parts = [gradient(*piece) for piece in zip(np.split(x, pieces), np.split(mask, pieces), strict=True)]
    np.testing.assert_array_equal(np.sum([out for out, _ in parts], axis=0), whole)
    np.testing.assert_array_equal(np.concatenate([g for _, g in parts]), whole_gradient)
    assert whole[1] == (mask.sum() if pair is losses.token_mean else mask.any(-1).sum())


# ---- masks -----------------------------------------------------------------------------------------------------------


def with_junk(case: Case, floats: float, integers: int) -> list[np.ndarray]:
    """The arrays, with junk wherever the mask is False, and in what belongs to rows without any token."""
    arrays = {}
    for name, x in case.arrays.items():
        keep = np.ones((), bool)
        if x.shape[: case.mask.ndim] == case.mask.shape:
            keep = case.mask.reshape(case.mask.shape + (1,) * (x.ndim - case.mask.ndim))
        elif x.shape == case.mask.shape[:-1] and f"junk in {name}" not in case.exempt:
            keep = case.mask.any(-1)
        junk = ~x if x.dtype == bool else x.dtype.type(floats if x.dtype == np.float32 else integers)
        arrays[name] = x if name == case.mask_name else np.where(keep, x, junk)
    return list(arrays.values())


@pytest.mark.parametrize("junk", JUNK)
@every_masked_case("junk")
def test_what_stands_at_masked_positions_changes_nothing(case, junk):
    arrays = with_junk(case, *junk)
    np.testing.assert_array_equal(case(*arrays), case())
    for dirty, clean in zip(case.gradients(*arrays), case.gradients(*case.arrays.values()), strict=True):
        np.testing.assert_array_equal(dirty, clean)
        if dirty.shape[: case.mask.ndim] == case.mask.shape:
            assert not np.asarray(dirty)[~case.mask].any()


@every_masked_case("zeros")
def test_masked_positions_get_zero(case):
    out = np.asarray(case())
    if out.shape[-1] == T:
        mask = np.broadcast_to(case.mask if out.ndim == case.mask.ndim else case.mask[:, None], out.shape)
        assert not out[~mask].any() and out[mask].any()
    np.testing.assert_array_equal(out[1], np.broadcast_to(case.nothing, out[1].shape))  # the row without any token


LAYOUTS = {"left": range(T, 2 * T), "right": range(T), "both sides": range(3, 3 + T), "holes": (0, 1, 4, 5, 6, 11, 13)}


@every_masked_case("padding")
def test_padding_and_holes_change_nothing(case):
    """The tokens stand in a row twice as wide, with junk around them, or between them (a user's turn)."""
    axis, expected = case.mask.ndim - 1, np.asarray(case())

    def spread(x, positions):
        if x.shape[: case.mask.ndim] != case.mask.shape:
            return x
        junk = {"f": np.nan, "i": 3, "b": x is not case.mask}[x.dtype.kind]
        wide = np.full((*x.shape[:axis], 2 * T, *x.shape[axis + 1 :]), junk, x.dtype)
        wide[(slice(None),) * axis + (positions,)] = x
        return wide

    for layout, positions in LAYOUTS.items():
        if layout in case.exempt:
            continue
        out = np.asarray(case.value(*(spread(x, np.array(positions)) for x in case.arrays.values())))
        if expected.shape[-1] == T:
            assert not np.delete(out, positions, axis=-1).any(), layout
            out = out[..., positions]
        np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6, err_msg=layout)


def test_padding_moves_the_best_answer():
    positions = np.array(LAYOUTS["holes"])
    rewards, mask = np.full((B, 2 * T), np.nan), np.zeros((B, 2 * T), bool)
    rewards[:, positions], mask[:, positions] = ANSWERS["rewards"], MASK
    best = losses.best_of_n(*ANSWERS.values())
    assert losses.best_of_n(rewards, mask).tolist() == np.where(best < 0, -1, positions[best]).tolist()


@every_masked_case("full mask")
def test_nothing_to_see_gives_zeros_and_zero_gradients(case):
    arrays = case.replace(**{case.mask_name: np.zeros_like(case.mask)})
    out = np.asarray(case(*arrays))
    np.testing.assert_array_equal(out, np.broadcast_to(case.nothing, out.shape))
    for gradient in case.gradients(*arrays):
        assert not np.asarray(gradient).any()


# ---- extremes --------------------------------------------------------------------------------------------------------


@every_case("extremes")
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
    """Every masked function, at T = 0."""
    chosen = {name: case for name, case in CASES.items() if not {"masks", "no tokens"} & set(case.exempt)}

    def cut(case, x):
        at = (slice(None),) * (case.mask.ndim - 1)
        return x[(*at, slice(0))] if x.shape[: case.mask.ndim] == case.mask.shape else x

    @jax.jit
    def everything():
        return {
            name: (case.row or case.function)(*(cut(case, x) for x in case.arrays.values()), **case.numbers)
            for name, case in chosen.items()
        }

    for name, out in everything().items():
        case, shape = CASES[name], CASES[name]().shape
        if shape[-1] == T:
            shape = (*shape[:-1], 0)
        elif case.row:
            shape = shape[1:]  # one batch
        chex.assert_shape(out, shape)
        np.testing.assert_array_equal(out, np.broadcast_to(CASES[name].nothing, out.shape), name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_size_of_a_chunk_changes_nothing(dtype):
    """1 position at a time, a size that doesn't divide T, and all at once; bfloat16 logits get bfloat16 gradients."""
    logits, ref = (jnp.asarray(x, dtype) for x in BOTH_LOGITS.values())

    def both(chunk):
        def weighted(logits, ref):
            parts = [
                losses.entropy(logits, MASK, temperature=0.7, chunk=chunk),
                losses.token_kl(logits, ref, MASK, temperature=0.7, chunk=chunk),
                losses.sequence_kl(logits, ref, MASK, temperature=0.7, chunk=chunk),
            ]
            return sum(jnp.sum(x * normal(i, *x.shape)) for i, x in enumerate(parts)), parts

        return jax.grad(weighted, (0, 1), has_aux=True)(logits, ref)

    results = jax.jit(lambda: {chunk: both(chunk) for chunk in (1, 3, 128)})()
    for gradients, values in results.values():
        assert all(g.dtype == dtype for g in gradients)
        chex.assert_trees_all_close(values, results[128][1], rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(gradients, results[128][0], rtol=1e-2 if dtype == jnp.bfloat16 else 1e-5)


def test_moments_from_nothing():
    """Nothing seen: rewards pass unchanged. One batch seen: its own count, mean and squares, a masked NaN aside."""
    state, (x, mask) = losses.running_moments(), X
    assert [(float(m), m.dtype) for m in state] == [(0, jnp.float32)] * 3
    close(losses.normalise_rewards(state, x), x, 1e-6)
    state = losses.update_moments(state, np.where(mask, x, np.nan), mask)
    close(jnp.stack(state), [mask.sum(), x[mask].mean(), mask.sum() * x[mask].var()])
    close(losses.normalise_rewards(state, x)[mask], losses.whiten(x, mask)[mask])


def test_every_row_may_have_a_key():
    keys = jax.random.split(jax.random.key(1), B)
    rewards, mask = map(jnp.asarray, ANSWERS.values())
    mapped = jax.vmap(partial(losses.rejection_sample, beta=2.0))(keys, rewards, mask)
    one = jax.jit(partial(losses.rejection_sample, beta=2.0))
    np.testing.assert_array_equal(mapped, [one(*row) for row in zip(keys, rewards, mask, strict=True)])


# ---- the contract ----------------------------------------------------------------------------------------------------

FOUR = "chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps"
LENGTHS = "chosen_lengths, rejected_lengths"
GROUP = "token_rewards=None, mask=None, *, gamma=1.0"
SIGNATURES = {
    "ComposedReward": "(rewards, parts, totals)",
    "LinearStatistics": "(logps, entropy, ref_logps, kl)",
    "RewardTerm": "(values, scale=1.0, clip=None, placement='token')",
    "RunningMoments": "(count, mean, squares)",
    "adaptive_kl": "(coefficient, kl, *, samples, target=6.0, horizon=10000)",
    "best_of_n": "(rewards, mask=None)",
    "best_of_n_kl_bound": "(n)",
    "bradley_terry_loss": "(chosen_rewards, rejected_rewards, *, margin=0.0)",
    "compose_rewards": "(terms, mask, *, ends=None)",
    "cpo_loss": ("(chosen_logps, rejected_logps, chosen_lengths, *, beta, label_smoothing=0.0, nll_weight=1.0)"),
    "dpo_loss": f"({FOUR}, *, beta, label_smoothing=0.0)",
    "entropy": "(logits, mask=None, *, temperature=1.0, chunk=128)",
    "expected_implicit_rewards": "(logits, ref_logits, *, beta)",
    "fixed_kl": "(coefficient, kl)",
    "gae": "(rewards, values, mask, *, gamma=1.0, lam=0.95)",
    "gae_associative": "(rewards, values, mask, *, gamma=1.0, lam=0.95)",
    "grpo_advantages": f"(scores, {GROUP}, scale=True)",
    "hinge_loss": f"({FOUR}, *, beta)",
    "implicit_token_rewards": "(policy_logps, ref_logps, mask, *, beta)",
    "ipo_loss": f"({FOUR}, *, beta)",
    "kl_k1": "(logps, ref_logps)",
    "kl_k2": "(logps, ref_logps)",
    "kl_k3": "(logps, ref_logps)",
    "kto_kl": "(logps, ref_logps, *, axis_name=None)",
    "kto_loss": "(logps, ref_logps, desirable, kl, *, beta, desirable_weight=1.0, undesirable_weight=1.0)",
    "kto_pair_loss": f"({FOUR}, *, beta, axis_name=None)",
    "lambda_returns": "(rewards, values, mask, *, gamma=1.0, lam=0.95)",
    "linear_statistics": (
        "(hidden, unembedding, ref_hidden, ref_unembedding, tokens, mask=None, *, temperature=1.0, chunk=4096, shards=1)"
    ),
    "linear_token_logps": "(hidden, unembedding, tokens, mask=None, *, temperature=1.0, chunk=4096, shards=1)",
    "masked_mean": "(x, mask, *, axis=None, axis_name=None)",
    "masked_sum": "(x, mask, *, axis=None)",
    "masked_var": "(x, mask, *, axis=None, axis_name=None)",
    "monte_carlo_returns": "(rewards, mask, *, gamma=1.0)",
    "normalise_rewards": "(state, rewards, *, shift_mean=True, clip=None)",
    "optimal_advantages": "(logits, ref_logits, *, beta)",
    "orpo_loss": f"(chosen_logps, rejected_logps, {LENGTHS}, *, lam)",
    "over_devices": "(pair, axis_name=None)",
    "place_rewards": "(rewards, mask, ends=None, *, placement)",
    "plackett_luce_loss": "(rewards, mask=None)",
    "ppo_policy_loss": "(logps, old_logps, advantages, *, clip=0.2, clip_high=None, dual_clip=None)",
    "ppo_value_loss": "(values, old_values, returns, *, clip=0.2)",
    "preference_metrics": f"({FOUR}, *, beta)",
    "prefix_sums": "(x, mask)",
    "proxy_logits": "(base_logits, proxy_logits, ref_logits, *, alpha)",
    "q_values": "(logits, *, beta)",
    "r_dpo_loss": f"({FOUR}, {LENGTHS}, *, beta, alpha)",
    "reinforce_pp_advantages": "(rewards, mask, *, gamma=1.0, axis_name=None)",
    "rejection_sample": "(key, rewards, mask=None, *, beta)",
    "remax_advantages": f"(scores, greedy_scores, {GROUP})",
    "response_mask": "(tokens, valid, *, start, end)",
    "reward_labels": "(rewards, mask, *, digits=2)",
    "rewards_of_q": "(logits, tokens, ref_logps, mask, *, beta)",
    "rloo_advantages": f"(scores, {GROUP})",
    "robust_dpo_loss": f"({FOUR}, *, beta, label_smoothing)",
    "rto_token_rewards": (
        "(dpo_logps, ref_logps, policy_logps, terminal_rewards, mask, *, beta1, beta2, beta3=1.0, dpo_clip=None, "
        "dpo_ref_logps=None, placement='token', ends=None, official_parity=False)"
    ),
    "running_moments": "()",
    "segment_ends": "(tokens, mask, *, delimiters)",
    "sequence_kl": "(logits, ref_logits, mask, *, temperature=1.0, chunk=128)",
    "sequence_mean": "(x, mask)",
    "shape_rewards": "(rewards, potentials, mask, *, gamma=1.0)",
    "simpo_loss": f"(chosen_logps, rejected_logps, {LENGTHS}, *, beta, gamma)",
    "soft_values": "(logits, *, beta)",
    "tdpo_loss": f"({FOUR}, chosen_kl, rejected_kl, *, beta, alpha=0.5, variant=2)",
    "token_kl": "(logits, ref_logits, mask=None, *, temperature=1.0, chunk=128)",
    "token_logps": "(logits, tokens, *, temperature=1.0)",
    "token_mean": "(x, mask)",
    "top_answers": "(rewards, mask=None, *, k)",
    "update_moments": "(state, x, mask, *, axis_name=None)",
    "whiten": "(x, mask, *, shift_mean=True, axis_name=None)",
}


def test_public_names_and_signatures():
    assert sorted(losses.__all__) == sorted(SIGNATURES)
    for name, expected in SIGNATURES.items():
        signature = inspect.signature(getattr(losses, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == expected, name
        long = len(getattr(losses, name).__doc__.splitlines()) >= 4
        assert long or name in (
            "ComposedReward",
            "LinearStatistics",
            "RewardTerm",
            "RunningMoments",
            "over_devices",
            "running_moments",
        )


def test_every_function_has_a_case():
    """But those that take no arrays of their own; and no case is exempt from a check that there isn't."""
    without = {
        "ComposedReward": "what compose_rewards returns",
        "LinearStatistics": "what linear_statistics returns",
        "RewardTerm": "what compose_rewards takes",
        "RunningMoments": "what update_moments takes and returns",
        "running_moments": "takes nothing: test_moments_from_nothing",
        "over_devices": "sums pairs: test_eight_devices_make_one_batch",
    }
    assert {re.match(r"\w+", name)[0] for name in CASES} == set(losses.__all__) - set(without)
    for name, case in CASES.items():
        assert set(case.exempt) <= CHECKS, name


@every_case("shapes")
def test_a_wrong_shape_raises_when_traced(case):
    """Every argument in turn, one column (or row) short, is named, with its shape and the one that it should have."""
    function = partial(case.row if case.whole else case.function, **case.numbers)
    for name, x in case.arrays.items():
        short = case.replace(**{name: x[:, :-1] if x.ndim > 1 else x[:-1]})
        with pytest.raises(ValueError, match=r"has shape \(") as error:
            jax.eval_shape(function, *short)
        message = str(error.value)
        assert name in message
        shape = short[list(case.arrays).index(name)].shape
        shapes = set(re.findall(r"\(\d[\d, ]*\)", message))
        assert len(shapes) == 2 and shapes & {str(shape), str(shape[:-1])}, message  # the latter: logits without V


@every_case("booleans", lambda case: any(x.dtype == bool for x in case.arrays.values()))
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_a_mask_that_is_not_boolean_raises_when_traced(case, dtype):
    for name, x in case.arrays.items():
        if x.dtype == bool:
            with pytest.raises(ValueError, match=f"^{name} must be boolean, but its dtype is {np.dtype(dtype)}"):
                jax.eval_shape(partial(case.function, **case.numbers), *case.replace(**{name: x.astype(dtype)}))


@every_case("empty batch")
def test_an_empty_batch_raises_when_traced(case):
    function = partial(case.row if case.whole else case.function, **case.numbers)
    with pytest.raises(ValueError, match=r"^(\w+) has shape \(0,.*\)") as error:
        jax.eval_shape(function, *(x[:0] for x in case.arrays.values()))
    assert str(error.value).split()[0] in case.arrays


@every_case("numbers", lambda case: case.numbers)
def test_a_number_out_of_range_raises_when_traced(case):
    """NaN too, and an array; a traced number cannot be looked at."""
    for name in case.numbers:
        bad = case.bad.get(name, BAD.get(name))
        for value in bad:
            with pytest.raises(ValueError, match=rf"^{name} must be (above|at least) .*but it is "):
                jax.eval_shape(partial(case.function, **case.numbers | {name: value}), *case.arrays.values())
        if bad:
            with pytest.raises(ValueError, match=rf"^{name} (must be a number, but it )?has shape \(2,\)"):
                jax.eval_shape(partial(case.function, **case.numbers | {name: np.ones(2)}), *case.arrays.values())


ONE = np.ones(3)
REAL = np.ones(3, bool)
ROW = np.ones((2, 3))
IDS = np.zeros(3, int)
STEEP = {"clip": losses.RewardTerm(ONE, clip=0), "scale": losses.RewardTerm(ONE, scale=np.nan)}
KEY = jax.random.key


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("tokens", lambda: losses.token_logps(np.ones((3, 2)), np.zeros(3))),
        ("logits", lambda: losses.token_logps(np.float32(1), np.zeros((), int))),
        ("logits", lambda: losses.token_logps(np.ones((3, 0)), IDS)),
        ("logits", lambda: losses.entropy(ONE)),
        ("chunk", lambda: losses.entropy(ROW, chunk=0)),
        ("chunk", lambda: losses.token_kl(ROW, ROW, chunk=0)),
        ("ref_logits", lambda: losses.token_kl(ROW, ONE)),
        ("rewards", lambda: losses.plackett_luce_loss(np.float32(1))),
        ("variant", lambda: losses.tdpo_loss(*[ONE] * 6, beta=1, variant=3)),
        ("terminal_rewards", lambda: losses.rto_token_rewards(ONE, ONE, ONE, ONE, REAL, beta1=1, beta2=1)),
        ("terminal_rewards", lambda: losses.rto_token_rewards(1.0, 1.0, 1.0, 1.0, np.bool_(True), beta1=1, beta2=1)),
        (
            "beta3",
            lambda: losses.rto_token_rewards(*[ONE] * 3, 1.0, REAL, beta1=1, beta2=1, beta3=2, official_parity=True),
        ),
        ("placement", lambda: losses.rto_token_rewards(*[ONE] * 3, 1.0, REAL, beta1=1, beta2=1, placement="word")),
        ("placement", lambda: losses.place_rewards(ONE, REAL, placement="end")),
        ("ends", lambda: losses.place_rewards(ONE, REAL, placement="segment")),
        ("ends", lambda: losses.place_rewards(ONE, REAL, REAL[:2], placement="segment")),
        ("terms", lambda: losses.compose_rewards({}, REAL)),
        ("mask", lambda: losses.compose_rewards(STEEP, np.bool_(True))),
        ("clip of clip", lambda: losses.compose_rewards(STEEP, REAL)),
        ("scale of scale", lambda: losses.compose_rewards({"scale": STEEP["scale"]}, REAL)),
        ("placement", lambda: losses.compose_rewards({"x": losses.RewardTerm(ONE, placement="word")}, REAL)),
        ("tokens", lambda: losses.segment_ends(ONE, REAL, delimiters=(1,))),
        ("logits", lambda: losses.q_values(np.float32(1), beta=1)),
        ("logits", lambda: losses.soft_values(np.ones((3, 0)), beta=1)),
        ("tokens", lambda: losses.rewards_of_q(np.ones((3, 2)), ONE, ONE, REAL, beta=1)),
        ("rewards", lambda: losses.gae(1.0, 1.0, np.bool_(True))),
        ("scores", lambda: losses.rloo_advantages(np.ones((3, 1)))),
        ("scores", lambda: losses.grpo_advantages(np.float32(1))),
        ("mask", lambda: losses.rloo_advantages(ONE, np.ones((3, 2)))),
        ("mask", lambda: losses.remax_advantages(ONE, ONE, np.ones((3, 2)))),
        ("mask", lambda: losses.grpo_advantages(ONE, np.ones((3, 2)))),
        ("coefficient", lambda: losses.fixed_kl(-1, 0)),
        ("coefficient", lambda: losses.fixed_kl(ONE, 0)),
        ("coefficient", lambda: losses.adaptive_kl(-1, 0, samples=1)),
        ("kl", lambda: losses.adaptive_kl(1, ONE, samples=1)),
        ("rewards", lambda: losses.best_of_n(np.ones((3, 0)))),
        ("n", lambda: losses.best_of_n_kl_bound(0)),
        ("k", lambda: losses.top_answers(ONE, k=0)),
        ("k", lambda: losses.top_answers(ONE, k=4)),
        ("digits", lambda: losses.reward_labels(ONE, REAL, digits=-1)),
        ("tokens", lambda: losses.response_mask(ONE, REAL, start=(1,), end=2)),
        ("want tokens", lambda: losses.response_mask(IDS, REAL, start=(), end=2)),
    ],
)
def test_what_else_is_wrong_is_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name} (must|has|is|\[)"):
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
