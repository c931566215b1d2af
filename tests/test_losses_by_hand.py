"""Hand-worked values and identities of the functions that have none in the other files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rto_jax.losses import (
    best_of_n_kl_bound,
    expected_implicit_rewards,
    gae_associative,
    optimal_advantages,
    over_devices,
    place_rewards,
    proxy_logits,
    q_values,
    rejection_sample,
    response_mask,
    reward_labels,
    rewards_of_q,
    segment_ends,
    sequence_mean,
    soft_values,
    token_mean,
    whiten,
)

RNG = np.random.default_rng(0)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


def mask(kept: str) -> jax.Array:
    return jnp.array([c == "1" for c in kept])


# ---- q_star ----------------------------------------------------------------------------------------------------------

WEIGHTS = jnp.log(array(1, 3))  # π = (1/4, 3/4)
EQUAL = array(0, 0)  # π = (1/2, 1/2)


def test_q_and_v_by_hand():
    close(q_values(WEIGHTS, beta=0.5), [0, np.log(3) / 2])
    close(soft_values(WEIGHTS, beta=0.5), np.log(4) / 2)
    close(soft_values(jax.nn.log_softmax(WEIGHTS), beta=0.5), 0)  # a policy alone does not show V


def test_advantages_of_every_action_by_hand():
    close(optimal_advantages(WEIGHTS, EQUAL, beta=0.5), [np.log(1 / 2) / 2, np.log(3 / 2) / 2])
    # Their mean under (1/2, 1/2), which is −β KL: ½ · ½ · log(1/2 · 3/2).
    close(expected_implicit_rewards(WEIGHTS, EQUAL, beta=0.5), np.log(3 / 4) / 4)


def test_rewards_of_q_by_hand():
    logits, tokens, ref_logps = jnp.log(array([1, 3], [2, 6])), jnp.array([1, 0]), jnp.log(array(1 / 2, 1 / 2))
    # r_0 = ½ (log 3 − log ½) − V_1 with V_1 = ½ log(2 + 6); r_1 = ½ (log 2 − log ½) − 0.
    close(rewards_of_q(logits, tokens, ref_logps, mask("11"), beta=0.5), [np.log(6 / 8) / 2, np.log(2)])
    # A user's turn between the two: the next state is the next one of the answer.
    logits, tokens, ref_logps = (jnp.insert(x, 1, 9, axis=0) for x in (logits, tokens, ref_logps))
    close(rewards_of_q(logits, tokens, ref_logps, mask("101"), beta=0.5), [np.log(6 / 8) / 2, 0, np.log(2)])


@pytest.mark.parametrize(("alpha", "policy"), [(0, [1 / 2, 1 / 2]), (1, [1 / 4, 3 / 4]), (2, [1 / 10, 9 / 10])])
def test_proxy_logits_by_hand(alpha, policy):
    # The pair has weights 1 : 3 against 2 : 2, so π ∝ 1 : 3^α.
    close(jax.nn.softmax(proxy_logits(EQUAL, WEIGHTS, jnp.log(array(2, 2)), alpha=alpha)), policy)


# ---- token rewards and advantages ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("token", [1, 2, 0, 4, 5]),
        ("segment", [0, 3, 0, 0, 9]),
        ("last", [0, 0, 0, 0, 12]),
        ("shaping", [1, 2, 0, 4, -7]),
    ],
)
def test_placements_by_hand(placement, expected):
    rewards, ends = array(1, 2, jnp.nan, 4, 5), mask("01000")
    close(place_rewards(rewards, mask("11011"), ends, placement=placement), expected)


def test_delimiters_everywhere_are_rto_and_nowhere_ddpo():
    rewards, tokens, kept = RNG.normal(size=(3, 6)), RNG.integers(0, 4, (3, 6)), RNG.random((3, 6)) < 0.7
    for delimiters, placement in ((range(4), "token"), ((), "last")):
        ends = segment_ends(tokens, kept, delimiters=delimiters)
        segments = place_rewards(rewards, kept, ends, placement="segment")
        close(segments, place_rewards(rewards, kept, placement=placement))


def test_gae_in_parallel_by_hand():
    # δ = (1.5, 0.5, 0.5); A_2 = 0.5, A_1 = 0.5 + 0.25, A_0 = 1.5 + 0.375, across a user's turn.
    rewards, values = array(1, 9, jnp.nan, 0, 2), array(0.5, 9, jnp.nan, 1, 1.5)
    advantages, returns = gae_associative(rewards, values, mask("10011"), lam=0.5)
    close(advantages, [1.875, 0, 0, 0.75, 0.5])
    close(returns, [2.375, 0, 0, 1.75, 2])


# ---- selection -------------------------------------------------------------------------------------------------------


def test_the_bound_of_best_of_n_by_hand():
    close(best_of_n_kl_bound(np.array([1, 2, 4])), [0, np.log(2) - 1 / 2, np.log(4) - 3 / 4])


def test_rejection_sampling_by_hand():
    # Probabilities 1, e^−1000 = 0 and 1; the masked answer is neither kept nor the largest.
    kept = rejection_sample(jax.random.key(0), array(2, -998, 2, 5), mask("1110"), beta=1)
    assert kept.tolist() == [True, False, True, False]


def test_reward_labels_are_whitened_rewards_to_the_digit():
    rewards, kept = RNG.normal(3, 2, 50), RNG.random(50) < 0.8
    labels = np.asarray(reward_labels(rewards, kept, digits=1))
    close(10 * labels, np.rint(10 * labels), atol=1e-5)
    distance = np.abs(labels - whiten(rewards, kept))
    assert distance.max() < 0.0501 and distance.max() > 0.04


def test_turns_by_hand():
    # "1 2" opens an assistant's turn, 9 closes it; the 9 at the front closes none.
    tokens = jnp.array([9, 1, 2, 5, 6, 9, 7, 1, 2, 8])
    assert response_mask(tokens, mask("1111111111"), start=(1, 2), end=9).tolist() == mask("0001110001").tolist()


# ---- over devices ----------------------------------------------------------------------------------------------------


def over_eight(function, *arrays):
    mesh, spec = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))(*arrays)


def test_over_devices_by_hand():
    total, count = over_eight(lambda x: over_devices((x.sum(), jnp.float32(1)), "data"), jnp.arange(8.0))
    assert (total, count) == (28, 8)
    assert over_devices((3.0, 2.0)) == (3, 2)  # one device


def test_means_over_devices_equal_the_loops_in_numpy():
    x, kept = RNG.normal(size=(16, 5)).astype(np.float32), RNG.random((16, 5)) < 0.5
    kept[3] = False
    pairs = over_eight(lambda *x: [over_devices(f(*x), "data") for f in (token_mean, sequence_mean)], x, kept)
    close(pairs[0], [sum(x[i, t] for i, t in np.argwhere(kept)), kept.sum()], 1e-5)
    means = [row[real].mean(dtype=np.float64) for row, real in zip(x, kept, strict=True) if real.any()]
    close(pairs[1], [sum(means), len(means)], 1e-5)


@pytest.mark.parametrize("mean", [token_mean, sequence_mean])
def test_pairs_of_devices_are_the_pair_of_the_batch(mean):
    x, kept = RNG.normal(size=(16, 5)), RNG.random((16, 5)) < 0.5
    close(over_eight(lambda *x: over_devices(mean(*x), "data"), x, kept), mean(x, kept), 1e-5)
