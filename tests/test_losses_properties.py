"""What holds of any input of rto_jax.losses: random values and masks, at a few shapes so that little is compiled."""

from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rto_jax import losses
from tests.losses_cases import CASES, B, K, T, V, oracle_place, oracle_response_mask, rows

settings.register_profile("losses", max_examples=25, deadline=None, derandomize=True, database=None)
few = settings.get_profile("losses")
SHAPES = [(2, 1), (3, 6)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def floats(shape, size=10.0):
    return arrays(np.float32, shape, elements=st.floats(-size, size, width=32))


def masks(shape):
    return arrays(bool, shape)


def integers(shape, below):
    return arrays(np.int32, shape, elements=st.integers(0, below - 1))


def close(actual, desired, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=rtol, atol=atol)


# ---- masks -----------------------------------------------------------------------------------------------------------

TOKENWISE = {name: case for name, case in CASES.items() if not {"masks", "padding", "holes"} & set(case.exempt)}


@few
@given(masks((B, T)), floats((4, B, T), 3), integers((B, T), V), masks((B, T)))
def test_a_masked_row_is_its_compacted_row(mask, numbers, tokens, flags):
    """Every masked function: moved to the front, in their order, real tokens earn what they earned where they were."""
    group = np.stack([np.roll(mask, -k, axis=0) for k in range(K)], axis=1)

    def drawn(case, name, i):
        """What was drawn, in the place of the case's array."""
        x = case.arrays[name]
        if name == case.mask_name:
            return mask if x.ndim == 2 else group
        if x.shape == (B, K, T):
            return np.stack([numbers[k] for k in range(K)], axis=1)
        if x.shape == (B, T, V):
            return numbers[i][..., None] * np.linspace(-1, 1, V, dtype=np.float32)
        if x.shape == (B, T):
            return {"f": numbers[i], "i": tokens, "b": flags}[x.dtype.kind]
        return x  # of whole responses

    def packed(x, order):
        if x.shape[: order.ndim] != order.shape:
            return x
        return np.take_along_axis(x, order[..., None] if x.ndim > order.ndim else order, order.ndim - 1)

    inputs = {n: [drawn(case, a, i % 4) for i, a in enumerate(case.arrays)] for n, case in TOKENWISE.items()}
    orders = {n: np.argsort(~(mask if case.mask.ndim == 2 else group), stable=True) for n, case in TOKENWISE.items()}
    apart = tokenwise(inputs)
    together = tokenwise({name: [packed(x, orders[name]) for x in arrays] for name, arrays in inputs.items()})
    for name, out in apart.items():
        if out.shape[-1] == T:
            order = orders[name] if out.ndim == orders[name].ndim else orders[name][:, None]
            out = np.take_along_axis(np.asarray(out), np.broadcast_to(order, out.shape), -1)
        np.testing.assert_allclose(out, together[name], rtol=1e-4, atol=1e-4, err_msg=name)


@jax.jit
def tokenwise(inputs):
    return {name: CASES[name].function(*arrays, **CASES[name].numbers) for name, arrays in inputs.items()}


@every_shape
@few
@given(st.data())
def test_whitened_numbers_have_mean_0_and_variance_1_or_are_equal(shape, data):
    equal = st.floats(-1e4, 1e4, width=32).map(lambda x: np.full(shape, x, np.float32))
    x, mask = data.draw(floats(shape, 100) | equal), data.draw(masks(shape))
    out, mean, variance = whitened(x, mask)
    assert not np.asarray(out)[~mask].any()
    real = x[mask].astype(np.float64)
    if real.size and real.std() > 0.1:
        close(mean, 0, atol=1e-4)
        close(variance, 1, rtol=1e-3)
    elif not real.size or np.ptp(real) == 0:
        close(out, 0)


@jax.jit
def whitened(x, mask):
    out = losses.whiten(x, mask)
    return out, losses.masked_mean(out, mask), losses.masked_var(out, mask)


@few
@given(floats((6, 5)), masks((6, 5)), st.permutations(range(6)))
def test_pairs_of_micro_batches_add_up(x, mask, order):
    """In whatever micro-batches the rows come."""
    for pair, (whole, parts) in micro_batches(x, mask, np.array(order)).items():
        close(whole[0], parts[0], atol=1e-4)
        assert whole[1] == parts[1], pair


@jax.jit
def micro_batches(x, mask, order):
    def both(pair):
        parts = jax.vmap(pair)(x[order].reshape(3, 2, 5), mask[order].reshape(3, 2, 5))
        return pair(x, mask), jax.tree.map(lambda x: x.sum(0), parts)

    return {"tokens": both(losses.token_mean), "sequences": both(losses.sequence_mean)}


@few
@given(floats(12), masks(12), integers(12, 3), st.sampled_from([0.0, 1000.0]))
def test_moments_do_not_depend_on_the_batches(x, mask, batch, offset):
    x = x + np.float32(offset)
    whole, parts = moments(x, mask, batch)
    real = x[mask].astype(np.float64)
    expected = [real.size, real.mean(), real.size * real.var()] if real.size else [0, 0, 0]
    close(whole, expected, rtol=1e-4, atol=1e-2)
    close(parts, expected, rtol=1e-4, atol=1e-2)


@jax.jit
def moments(x, mask, batch):
    state = losses.running_moments()
    parts = state
    for i in range(3):
        parts = losses.update_moments(parts, x, mask & (batch == i))
    return jnp.stack(losses.update_moments(state, x, mask)), jnp.stack(parts)


# ---- rewards and advantages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 1), (3, 6), (2, 21)], ids=str)
@few
@given(st.data())
def test_the_two_forms_of_gae_agree(shape, data):
    rewards, values, mask = data.draw(floats(shape)), data.draw(floats(shape)), data.draw(masks(shape))
    gamma, lam = data.draw(st.floats(0, 1, width=32)), data.draw(st.floats(0, 1, width=32))
    one, other = both_forms(rewards, values, mask, np.float32(gamma), np.float32(lam))
    close(one, other, atol=1e-4)


@jax.jit
def both_forms(*args):
    *arrays, gamma, lam = args
    return [jnp.stack(f(*arrays, gamma=gamma, lam=lam)) for f in (losses.gae, losses.gae_associative)]


@every_shape
@few
@given(st.data())
def test_placements_against_python_loops_and_totals(shape, data):
    rewards, mask, tokens = data.draw(floats(shape)), data.draw(masks(shape)), data.draw(integers(shape, 4))
    ends, placed = placements(rewards, mask, tokens)
    for row, real, ids in zip(np.asarray(ends), mask, tokens, strict=True):
        last = np.flatnonzero(real)[-1:]
        assert row.tolist() == [bool(real[t] and (ids[t] in (0, 2) or t in last)) for t in range(len(real))]
    total = np.where(mask, rewards, 0).sum(-1, dtype=np.float64)
    for placement, out in placed.items():
        close(out, rows(partial(oracle_place, placement=placement))(rewards.astype(float), mask, ends), atol=1e-4)
        close(np.sum(out, -1), 0 * total if placement == "shaping" else total, atol=1e-4)


@jax.jit
def placements(rewards, mask, tokens):
    ends = losses.segment_ends(tokens, mask, delimiters=(0, 2))
    names = ("token", "segment", "last", "shaping")
    return ends, {name: losses.place_rewards(rewards, mask, ends, placement=name) for name in names}


@every_shape
@few
@given(st.data())
def test_the_parts_are_the_reward(shape, data):
    """Exactly: added in their order in float32."""
    dense, score, mask = data.draw(floats(shape)), data.draw(floats(shape[:1])), data.draw(masks(shape))
    scale, clip = data.draw(st.floats(-3, 3, width=32)), data.draw(st.floats(0.125, 5, width=32))
    out = composed(np.where(mask, dense, np.nan), score, mask, np.float32(scale), np.float32(clip))
    total = np.zeros(shape, np.float32)
    for name in sorted(out.parts):
        total = total + np.asarray(out.parts[name])
        close(out.totals[name], np.sum(out.parts[name], -1), atol=1e-4)
        assert np.abs(out.parts[name]).max() <= 5 * shape[1] and not np.asarray(out.parts[name])[~mask].any()
    np.testing.assert_array_equal(out.rewards, total)
    assert np.abs(out.parts["dense"]).max() <= clip


@jax.jit
def composed(dense, score, mask, scale, clip):
    terms = {
        "dense": losses.RewardTerm(dense, scale, clip),
        "score": losses.RewardTerm(score, 0.3),
        "last": losses.RewardTerm(dense, 0.1, 0.5, "last"),
        "shaping": losses.RewardTerm(dense, -0.7, 0.5, "shaping"),
    }
    return losses.compose_rewards(terms, mask)


# ---- estimators, rankings, choices -----------------------------------------------------------------------------------


@few
@given(floats((3, 6), 60), floats((3, 6), 60), st.sampled_from([1.0, 1e-3, 1e-6]))
def test_k3_is_never_negative(logps, ref_logps, scale):
    """And k2 neither, near to equal log-probabilities too."""
    k2, k3 = estimators(np.float32(scale) * logps, np.float32(scale) * ref_logps)
    assert np.min(k3) >= 0 and np.min(k2) >= 0


estimators = jax.jit(lambda *args: (losses.kl_k2(*args), losses.kl_k3(*args)))


@few
@given(floats(4))
def test_the_probabilities_of_all_rankings_sum_to_1(rewards):
    close(rankings(rewards).sum(), 1, atol=1e-5)


@jax.jit
def rankings(rewards):
    return jnp.exp(-losses.plackett_luce_loss(rewards[np.array(list(permutations(range(4))))]))


@every_shape
@few
@given(st.data())
def test_choices_among_answers(shape, data):
    rewards, mask = data.draw(floats(shape, 3)), data.draw(masks(shape))
    if data.draw(st.booleans()):
        rewards = np.round(rewards)  # some are equal
    best, top, kept = choices(rewards, mask)
    for row, real, i, first, sampled in zip(
        rewards, mask, np.asarray(best), *map(np.asarray, (top, kept)), strict=True
    ):
        if not real.any():
            assert i == -1 and not first.any() and not sampled.any()
            continue
        assert real[i] and row[i] == row[real].max() and i == np.flatnonzero(real & (row == row[i]))[0]
        assert first.tolist() == [t == i for t in range(len(row))]  # k = 1
        assert sampled[real & (row == row[i])].all() and not sampled[~real].any()


@jax.jit
def choices(rewards, mask):
    kept = losses.rejection_sample(jax.random.key(0), rewards, mask, beta=0.5)
    return losses.best_of_n(rewards, mask), losses.top_answers(rewards, mask, k=1), kept


STARTS = [(3,), (3, 2), (2, 2), (2, 3, 2)]


@few
@given(integers((6, 10), 4), masks((6, 10)) | st.just(np.ones((6, 10), bool)))
def test_response_mask_against_a_state_machine(tokens, valid):
    for start, out in zip(STARTS, response_masks(tokens, valid), strict=True):
        expected = rows(partial(oracle_response_mask, start=start, end=1))(tokens, valid)
        np.testing.assert_array_equal(out, expected, err_msg=str(start))


response_masks = jax.jit(lambda *args: [losses.response_mask(*args, start=start, end=1) for start in STARTS])
