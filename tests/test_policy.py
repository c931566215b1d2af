"""Hand-worked values of the policy's objectives, KL estimators and controllers, and of choosing among answers."""

import math
from functools import partial
from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rto_jax.losses import (
    RunningMoments,
    adaptive_kl,
    best_of_n,
    best_of_n_kl_bound,
    entropy,
    fixed_kl,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    normalise_rewards,
    ppo_policy_loss,
    rejection_sample,
    response_mask,
    reward_labels,
    running_moments,
    sequence_mean,
    token_kl,
    token_logps,
    token_mean,
    top_answers,
    update_moments,
    whiten,
)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


# ---- PPO's clips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "numbers", "loss", "gradient"),
    [
        # clip_high moves the upper side alone. Good tokens: 1.25 is now within, 1.5 is held at 1.28.
        (1.25, 2, dict(clip_high=0.28), -2.5, -2.5),
        (1.5, 2, dict(clip_high=0.28), -2.56, 0),
        (0.5, -2, dict(clip_high=0.28), 1.6, 0),  # a bad one is held at 1 − 0.2, as before
        (0.9, -2, dict(clip_high=0.28), 1.8, 1.8),
        (1.5, -2, dict(clip_high=0.28), 3, 3),
        (1.15, 2, dict(clip_high=0.1), -2.2, 0),  # it may be the smaller one
        (1.25, 2, dict(clip=0.3), -2.5, -2.5),
        # dual_clip 3 bounds a bad token's loss by 3|A|, and no gradient past it.
        (4, -2, dict(dual_clip=3), 6, 0),
        (2.5, -2, dict(dual_clip=3), 5, 5),
        (0.5, -2, dict(dual_clip=3), 1.6, 0),
        (4, 2, dict(dual_clip=3), -2.4, 0),  # a good one keeps the ordinary clip
        (0.5, 2, dict(dual_clip=3), -1, -1),
        (4, 0, dict(dual_clip=3), 0, 0),
        (4, -2, dict(dual_clip=3, clip_high=4), 6, 0),
        (4, 2, dict(dual_clip=3, clip_high=4), -8, -8),
    ],
)
def test_clips_by_hand(ratio, advantage, numbers, loss, gradient):
    args = array(np.log(ratio) - 3), array(-3), array(advantage)
    value, slope = jax.value_and_grad(lambda x: ppo_policy_loss(x, *args[1:], **numbers).sum())(args[0])
    close(value, loss, atol=1e-5)
    close(slope, [gradient], atol=1e-5)


def test_clips_that_change_nothing():
    logps, old, advantages = normal(50), normal(50, seed=2), normal(50, seed=3)
    plain = ppo_policy_loss(logps, old, advantages)
    np.testing.assert_array_equal(ppo_policy_loss(logps, old, advantages, clip_high=0.2), plain)
    np.testing.assert_array_equal(ppo_policy_loss(logps, old, advantages, dual_clip=1e6), plain)
    tight = ppo_policy_loss(logps, old, advantages, dual_clip=1.5)
    assert (tight <= plain).all() and (tight < plain).any() and (tight <= -1.5 * advantages)[advantages < 0].all()


# ---- KL estimators: every token of a small vocabulary, so that no sampling is left to chance --------------------------

V = 6
LOGITS, REF_LOGITS = normal(V), normal(V, seed=2)
REF = jax.nn.log_softmax(REF_LOGITS)


def kl(logits):
    """KL(π ‖ π_ref), written out."""
    logps = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logps) * (logps - REF))


def reverse_kl(logits):
    """KL(π_ref ‖ π)."""
    return jnp.sum(jnp.exp(REF) * (REF - jax.nn.log_softmax(logits)))


def expected(of_tokens):
    """logits -> E_π[f], and by its gradient E_π[∇f], where the tokens are drawn and their odds no part of f."""

    def expectation(logits):
        logps = token_logps(jnp.broadcast_to(logits, (V, V)), jnp.arange(V))
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logps)) * of_tokens(logps))

    return expectation


@jax.jit
def values_and_gradients(logits):
    functions = dict(
        kl=kl,
        reverse_kl=reverse_kl,
        exact=lambda z: token_kl(REF[None], z[None])[0],
        reverse_exact=lambda z: token_kl(z[None], REF[None])[0],
        k1=expected(lambda x: kl_k1(x, REF)),
        k2=expected(lambda x: kl_k2(x, REF)),
        k3=expected(lambda x: kl_k3(x, REF)),
        # k1 as a reward (a constant), paid to PPO's loss at the first update.
        reward=expected(lambda x: ppo_policy_loss(x, jax.lax.stop_gradient(x), -kl_k1(jax.lax.stop_gradient(x), REF))),
        entropy=lambda z: entropy(z[None])[0],
        entropy_written_out=lambda z: -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z)),
        sampled_entropy=expected(lambda x: -x),
        entropy_reward=expected(lambda x: -jax.lax.stop_gradient(x) * x),
    )
    return {name: jax.value_and_grad(function)(logits) for name, function in functions.items()}


def test_kl_estimators_by_hand():
    # π/π_ref = 2, ½ and 1.
    logps, ref = np.log(array(1 / 2, 1 / 4, 1 / 3)), np.log(array(1 / 4, 1 / 2, 1 / 3))
    close(kl_k1(logps, ref), [0.693147, -0.693147, 0])
    close(kl_k2(logps, ref), [0.240227, 0.240227, 0])
    close(kl_k3(logps, ref), [0.193147, 0.306853, 0])  # ½ − 1 + log 2, 2 − 1 − log 2
    # Near each other k3 is half the square too, without the noise of e^x − 1 in float32.
    close(kl_k3(array(1e-3), array(0)), [5e-7], 1e-3, 0)
    assert (kl_k3(normal(1000), normal(1000, seed=2)) >= 0).all()


def test_the_estimators_are_unbiased_but_k2():
    out = {name: value for name, (value, _) in values_and_gradients(LOGITS).items()}
    assert out["kl"] > 0.2 and abs(out["kl"] - out["reverse_kl"]) > 0.05
    for name in ("k1", "k3", "exact"):
        close(out[name], out["kl"])
    close(out["reverse_exact"], out["reverse_kl"])
    assert abs(out["k2"] - out["kl"]) > 0.05
    # By hand, ¼ and ¾ against ½ and ½: KL = ¼ log ½ + ¾ log 3/2 = 0.130812, E[k2] = ⅛ log² ½ + ⅜ log² 3/2 = 0.121707.
    p, logps, ref = array(1 / 4, 3 / 4), np.log(array(1 / 4, 3 / 4)), np.log(array(1 / 2, 1 / 2))
    close((p * kl_k2(logps, ref)).sum(), 0.121707)
    close([(p * k(logps, ref)).sum() for k in (kl_k1, kl_k3)], [0.130812, 0.130812])


def test_k2_is_nearly_unbiased_and_k1_noisy_between_near_policies():
    logps = np.asarray(jax.nn.log_softmax(REF_LOGITS + 0.01 * LOGITS))
    p, exact = np.exp(np.float64(logps)), float(kl(REF_LOGITS + 0.01 * LOGITS))
    mean, deviation = {}, {}
    for name, k in (("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)):
        x = np.float64(k(logps, REF))
        mean[name] = (p * x).sum()
        deviation[name] = np.sqrt((p * (x - mean[name]) ** 2).sum())
    close([mean["k2"], mean["k3"]], [exact, exact], 0.02, 0)
    assert deviation["k1"] > 100 * exact > 0  # it is of either sign
    assert max(deviation["k2"], deviation["k3"]) < 10 * exact


def test_what_the_estimators_do_as_a_loss():
    """E_π[∇k1] = 0, E_π[∇k2] = ∇KL(π ‖ π_ref), E_π[∇k3] = ∇KL(π_ref ‖ π); and k1 as a *reward* is right."""
    gradients = {name: gradient for name, (_, gradient) in values_and_gradients(LOGITS).items()}
    assert np.abs(gradients["kl"] - gradients["reverse_kl"]).max() > 0.05
    close(gradients["k1"], np.zeros(V))
    close(gradients["k2"], gradients["kl"])
    close(gradients["k3"], gradients["reverse_kl"])
    close(gradients["reward"], gradients["kl"])
    close(gradients["exact"], gradients["kl"])
    close(gradients["reverse_exact"], gradients["reverse_kl"])


def test_entropy_has_the_gradient_that_its_sampled_form_lacks():
    out = values_and_gradients(LOGITS)
    close(out["sampled_entropy"][0], out["entropy"][0])
    close(out["entropy"][1], out["entropy_written_out"][1])
    assert np.abs(out["entropy"][1]).max() > 0.05
    close(out["sampled_entropy"][1], np.zeros(V))
    close(out["entropy_reward"][1], out["entropy"][1])  # −log π as a reward gives it back


def test_a_kl_that_is_not_a_number_is_seen_and_hides_under_a_mask():
    logps, ref, mask = array(-1, jnp.nan, -2), array(-1.5, -1, -2.25), jnp.array([True, False, True])
    for k, mean in ((kl_k1, 0.375), (kl_k2, 0.078125), (kl_k3, 0.067666)):  # of log-ratios ½ and ¼
        assert np.isnan(k(logps, ref)).tolist() == [False, True, False]
        value, gradient = jax.value_and_grad(lambda x, k=k: masked_mean(k(x, ref), mask))(logps)
        close(value, mean)
        assert np.isfinite(gradient).all() and gradient[0] > 0 and gradient[1] == 0


# ---- the penalty's weight --------------------------------------------------------------------------------------------


def test_kl_controllers_by_hand():
    # 6.6 nats at a target of 6 is 10 % too much; 5 responses of 10: β = 0.2 · (1 + 0.1 · 0.5).
    control = partial(adaptive_kl, samples=5, horizon=10)
    close(control(0.2, 6.6), 0.21)
    close(control(0.2, 5.4), 0.19)
    close(control(0.2, 6), 0.2)
    # The error is held at ±0.2: from 7.2 up and 4.8 down.
    close([control(0.2, x) for x in (7.2, 12, 1e30, 4.8, 0, -3)], [0.22] * 3 + [0.18] * 3)
    close(adaptive_kl(0.15, 12, samples=256), 0.150768)  # Ziegler et al.: 0.15 · (1 + 0.2 · 0.0256)
    assert np.isnan(control(0.2, jnp.float32(jnp.nan)))
    with pytest.raises(ValueError, match="kl must"):
        control(0.2, math.nan)
    close(fixed_kl(0.05, 1e9), 0.05)
    close(fixed_kl(0.05, jnp.float32(jnp.nan)), 0.05)


def test_kl_controllers_are_carried_in_a_scan_to_the_target():
    """A policy whose KL is 1.5/β reaches 6 nats at β = 0.25, from either side; a fixed weight stays."""

    @jax.jit
    def run(start):
        def carry(control):
            def step(beta, _):
                return control(beta, 1.5 / beta), 1.5 / beta

            return jax.lax.scan(step, start, length=300)

        return carry(partial(adaptive_kl, samples=256, horizon=1000)), carry(fixed_kl)

    for start in (0.02, 3.0):
        (beta, kls), (fixed, _) = run(jnp.float32(start))
        close(beta, 0.25, 1e-4)
        close(kls[-1], 6, 1e-4)
        assert (np.diff(np.abs(np.log(kls / 6))) <= 1e-6).all()  # ever nearer
        close(fixed, start)


# ---- running moments -------------------------------------------------------------------------------------------------


def seen(*batches):
    """The moments after these batches, NaN being masked."""
    state = running_moments()
    for x in batches:
        state = jax.jit(update_moments)(state, np.array(x, np.float32), ~np.isnan(x))
    return state


def test_running_moments_by_hand():
    # 1 and 3: mean 2, squares 1 + 1. With 8: mean 4, squares 9 + 1 + 16.
    close(seen([1, np.nan, 3]), [2, 2, 2])
    close(seen([1, np.nan, 3], [8]), [3, 4, 26])
    close(seen([[1, np.nan], [8, 3]]), [3, 4, 26])
    state = seen([1, np.nan, 3], [8])  # σ² = 26/3, σ = 2.943920
    close(normalise_rewards(state, array(1, 4, 10)), [-1.019049, 0, 2.038099])
    close(normalise_rewards(state, array(1, 4, 10), shift_mean=False), [0.339683, 1.358732, 3.396831])
    close(normalise_rewards(state, array(1, 4, 10), clip=1.5), [-1.019049, 0, 1.5])
    close(normalise_rewards(state, array(-10, 4, 10), shift_mean=False, clip=2), [-2, 1.358732, 2])


def test_running_moments_of_nothing():
    nothing = [np.nan, np.nan]
    close(seen(nothing), [0, 0, 0])
    close(seen([1, np.nan, 3], nothing, [8]), [3, 4, 26])
    rewards = array(-3, 0, 1e6)
    for state in (running_moments(), seen(nothing)):
        np.testing.assert_array_equal(normalise_rewards(state, rewards), rewards)
        np.testing.assert_array_equal(normalise_rewards(state, rewards, shift_mean=False), rewards)
    close(normalise_rewards(seen([7]), array(7)), [0])  # σ = 0


def test_running_moments_in_any_order_are_those_of_everything():
    batches = [5 + 3 * normal(n, seed=n) for n in (1, 4, 50)]
    everything = np.concatenate(batches).astype(np.float64)
    expected = [55, everything.mean(), 55 * everything.var()]
    for order in permutations(batches):
        close(seen(*order), expected)
    close(seen(everything), expected)
    # One batch: whitening.
    x, mask = 5 + 3 * normal(4, 8), normal(4, 8, seed=2) < 0.5
    state = update_moments(running_moments(), x, mask)
    close(normalise_rewards(state, x)[mask], whiten(x, mask)[mask])


def test_running_moments_far_from_zero_lose_no_digits():
    """Sums of squares near 10⁹ would come in steps of 64."""
    count, mean, squares = seen([30001, 30002], [30003, 30006])
    assert (count, mean, squares) == (4, 30003, 14)  # 4 + 1 + 0 + 9


def test_running_moments_over_devices():
    x, mask = 5 + 3 * normal(8, 3), normal(8, 3, seed=2) < 0.5
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        lambda x, mask: update_moments(RunningMoments(*array(2, 3, 4)), x, mask, axis_name="data"),
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    close(jax.jit(spread)(x, mask), update_moments(RunningMoments(*array(2, 3, 4)), x, mask))


# ---- means of a batch ------------------------------------------------------------------------------------------------


def test_token_and_sequence_mean_by_hand():
    # A long row of four 1s and a short one of a single 6; the third has no token. By token 10/5, by sequence (1 + 6)/2.
    x = jnp.array([[1, 1, 1, 1], [jnp.nan, 6, jnp.nan, 9], [jnp.nan] * 4])
    mask = jnp.array([[True] * 4, [False, True, False, False], [False] * 4])
    assert token_mean(x, mask) == (10, 5)
    assert sequence_mean(x, mask) == (7, 2)
    assert masked_mean(x, mask) == 2
    # What a token weighs: 1 and 1, or a quarter and 1.
    by_token, by_sequence = (jax.grad(lambda x, mean=mean: mean(x, mask)[0])(x) for mean in (token_mean, sequence_mean))
    close(by_token, mask.astype(jnp.float32))
    close(by_sequence, [[0.25] * 4, [0, 1, 0, 0], [0] * 4])
    assert token_mean(x, jnp.zeros_like(mask)) == sequence_mean(x, jnp.zeros_like(mask)) == (0, 0)


@pytest.mark.parametrize("mean", [token_mean, sequence_mean])
def test_gradients_accumulate_over_unequal_micro_batches(mean):
    """Sums of gradients by the sum of counts are the whole batch's gradient; means of means are not."""
    mask = jnp.asarray(np.arange(8) < np.array([[8], [1], [2], [0], [5], [1]]))
    features, advantages = (jnp.asarray(normal(6, 8, seed=seed)) for seed in (4, 5))

    @jax.jit
    def gradient(weight, rows):
        def loss(weight):
            return mean(ppo_policy_loss(weight * features[rows], 0 * features[rows], advantages[rows]), mask[rows])

        (total, count), pullback = jax.vjp(loss, weight)
        return pullback((jnp.ones_like(total), jnp.zeros_like(count)))[0], count

    weight = jnp.float32(0.1)
    total, count = gradient(weight, np.arange(6))
    for split in ([1], [3, 5], [1, 2, 3, 4, 5]):
        parts = [gradient(weight, rows) for rows in np.split(np.arange(6), split)]
        close(sum(g for g, _ in parts) / sum(n for _, n in parts), total / count)
    means = [g / np.maximum(n, 1) for g, n in parts]
    assert abs(np.mean(means) - total / count) > 0.01


# ---- choosing among answers ------------------------------------------------------------------------------------------


def test_best_of_n_by_hand():
    rewards, every = jnp.array([[1.0, 3, 3, 2], [-5, -7, -6, -9]]), jnp.ones((2, 4), bool)
    assert best_of_n(rewards).tolist() == [1, 0]  # the first of equals
    assert best_of_n(rewards, every.at[:, 0].set(False)).tolist() == [1, 2]
    assert best_of_n(rewards, jnp.array([[False] * 4, [False, True, False, False]])).tolist() == [-1, 1]
    assert best_of_n(rewards.at[0, 3].set(jnp.nan)).tolist() == [3, 0]  # seen
    assert best_of_n(rewards.at[0, 3].set(jnp.nan), every.at[:, 3].set(False)).tolist() == [1, 0]
    assert best_of_n(jnp.full(3, -jnp.inf), jnp.array([False, True, True])) == 1
    assert best_of_n(rewards).dtype == jnp.int32


def kl_of_best(n, size):
    """KL(best of n ‖ uniform) for `size` answers of different rewards: P(best ≤ k) = (k/size)^n."""
    p = np.diff((np.arange(size + 1) / size) ** n)
    p = p[p > 0]  # the worst of a million underflow
    return (p * np.log(p * size)).sum()


def test_best_of_n_is_as_far_from_its_policy_as_the_bound_says():
    close(best_of_n_kl_bound(jnp.array([1, 2, 4])), [0, np.log(2) - 1 / 2, np.log(4) - 3 / 4])
    assert best_of_n_kl_bound(1) == 0
    close(best_of_n_kl_bound(2), 0.193147)
    for n in (2, 4, 64):
        bound = best_of_n_kl_bound(n)
        kls = np.array([kl_of_best(n, size) for size in (2, 8, 64, 10**6)])
        assert (np.diff(kls) > 0).all() and kls[0] < bound - 0.01 and (kls[:-1] < bound).all()
        close(kls[-1], bound, 1e-4)
    assert kl_of_best(1, 8) == 0


def test_best_of_n_draws_what_that_kl_assumes():
    """All 5³ draws of three answers out of five."""
    reward = array(0.3, -1, 2, 0.7, 0)
    draws = np.array(list(product(range(5), repeat=3)))
    best = draws[np.arange(125), best_of_n(reward[draws])]
    count = np.bincount(best, minlength=5)
    rank = np.argsort(np.argsort(reward)) + 1
    np.testing.assert_array_equal(count, rank**3 - (rank - 1) ** 3)
    close((count / 125 * np.log(count / 25)).sum(), kl_of_best(3, 5))


KEYS = 20_000


def kept(rewards, mask=None, **numbers):
    """bool [KEYS, N]"""

    @jax.jit
    @jax.vmap
    def sample(key):
        return rejection_sample(key, rewards, mask, **numbers)

    return np.asarray(sample(jax.random.split(jax.random.key(0), KEYS)))


def test_rejection_sampling_keeps_by_the_exponent_of_the_gap():
    # A policy of ½, ¼, ¼ that drew each answer as often as it should; e^(r/β) of 1, 4, 2 at β = 2.
    rewards = 2 * np.log(array(1, 1, 4, 2))
    out = kept(rewards, beta=2)
    # A frequency over 20,000 keys has a standard deviation of at most √(¼/20,000) = 0.0035: 0.02 is more than five.
    close(out.mean(0), [1 / 4, 1 / 4, 1, 1 / 2], 0, 0.02)
    assert out[:, 2].all()  # the best, always
    # What is kept: π · e^(r/β) = ½ · 1, ¼ · 4, ¼ · 2, normalised.
    counts = out.sum(0)
    close(np.array([counts[0] + counts[1], counts[2], counts[3]]) / counts.sum(), [1 / 4, 1 / 2, 1 / 4], 0, 0.02)
    # Answers are judged on their own: both of the 1s together as often as chance has it.
    close((out[:, 0] & out[:, 1]).mean(), 1 / 16, 0, 0.02)


def test_rejection_sampling_at_the_ends_of_beta_and_under_a_mask():
    rewards, mask = array(5, 3, jnp.nan, 5, 4.9), jnp.array([True, True, False, True, True])
    cold, warm = kept(rewards, mask, beta=1e-3), kept(rewards, mask, beta=1e6)
    assert (cold == np.array([True, False, False, True, False])).all()  # equals both
    assert (warm.mean(0) > [0.999, 0.999, -1, 0.999, 0.999]).all() and not warm[:, 2].any()
    # Without the masked one the best is another: −7 is kept with e^−2, not e^(−7 − 9).
    hidden = kept(array(-5, -7, 9), jnp.array([True, True, False]), beta=1)
    close(hidden.mean(0), [1, np.exp(-2), 0], 0, 0.02)
    assert not kept(rewards, jnp.zeros(5, bool), beta=1).any()


def test_top_answers_by_hand():
    rewards = jnp.array([[1.0, 3, 3, 2], [-5, -7, -6, -9]])
    assert top_answers(rewards, k=1).tolist() == [[False, True, False, False], [True, False, False, False]]
    assert top_answers(rewards, k=2).tolist() == [[False, True, True, False], [True, False, True, False]]
    assert top_answers(rewards, k=4).all()
    mask = jnp.array([[True, False, True, True], [False, True, False, False]])
    assert top_answers(rewards, mask, k=2).tolist() == [[False, False, True, True], [False, True, False, False]]
    assert not top_answers(jnp.full(3, jnp.nan), jnp.zeros(3, bool), k=3).any()
    # −∞ is a reward too; an answer that does not exist is none.
    assert top_answers(array(-jnp.inf, 9), jnp.array([True, False]), k=1).tolist() == [True, False]


def test_top_answers_best_of_n_and_rejection_agree():
    rewards, mask = normal(6, 5), normal(6, 5, seed=2) < 0.5
    assert mask.any(-1).all() and not mask.all()
    best = best_of_n(rewards, mask)
    np.testing.assert_array_equal(best, np.argmax(top_answers(rewards, mask, k=1), axis=-1))
    sampled = rejection_sample(jax.random.key(0), rewards, mask, beta=0.5)
    assert (np.asarray(sampled)[np.arange(6), best]).all() and not (sampled & ~mask).any()
    # The k best and, by the sign, the other N − k.
    np.testing.assert_array_equal(top_answers(rewards, k=2), ~top_answers(-rewards, k=3))


def test_reward_labels_by_hand():
    # Mean 2, σ² = (4 + 1 + 9)/3, σ = 2.160247: −0.925820, −0.462910, 1.388730.
    rewards, mask = array(0, 1, jnp.nan, 5), jnp.array([True, True, False, True])
    close(reward_labels(rewards, mask), [-0.93, -0.46, 0, 1.39])
    close(reward_labels(rewards, mask, digits=1), [-0.9, -0.5, 0, 1.4])
    assert [f"{x:.2f}" for x in reward_labels(rewards, mask)] == ["-0.93", "-0.46", "0.00", "1.39"]
    np.testing.assert_array_equal(reward_labels(10 * rewards - 7, mask), reward_labels(rewards, mask))


# ---- whose turn it is ------------------------------------------------------------------------------------------------

# Conversations as a chat template writes them, one word a token; [what the assistant does] in brackets.
SYSTEM = "<|im_start|> system \n Be brief . <|im_end|> \n "
QUESTION = "<|im_start|> user \n How is the weather in Rome ? <|im_end|> \n "
CALL = "<|im_start|> assistant \n [ get_weather ( Rome ) <|im_end|> ] \n "
RESULT = "<|im_start|> tool \n assistant \n 31 , sunny <|im_end|> \n "
ANSWER = "<|im_start|> assistant \n [ Hot and sunny . <|im_end|> ] \n "
THANKS = "<|im_start|> user \n Thanks , assistant ! <|im_end|> \n "
CUT_OFF = "<|im_start|> assistant \n [ You are ]"
CONVERSATIONS = {
    "two turns, a tool, the last one cut off": SYSTEM + QUESTION + CALL + RESULT + ANSWER + THANKS + CUT_OFF,
    "one turn": QUESTION + ANSWER,
    "opened at the very end": QUESTION + "<|im_start|> assistant \n",
    "an empty turn": QUESTION + "<|im_start|> assistant \n [ <|im_end|> ] \n",
    "nobody answers": SYSTEM + QUESTION + THANKS,
    "a new line is missing": QUESTION + "<|im_start|> assistant Hot",
    "two turns in a row": ANSWER + CALL,
}
WORDS = {word: i for i, word in enumerate(sorted(set(" ".join(CONVERSATIONS.values()).split(" ")) - {""}))}
START, END = [WORDS[word] for word in ("<|im_start|>", "assistant", "\n")], WORDS["<|im_end|>"]


@jax.jit
def assistants(tokens, valid):
    return response_mask(tokens, valid, start=START, end=END)


def read(text):
    """(token ids, which of them the assistant wrote)"""
    tokens, acts, acting = [], [], False
    for word in text.split(" "):
        if word in ("[", "]"):
            acting = word == "["
        elif word:
            tokens.append(WORDS[word])
            acts.append(acting)
    return np.array(tokens), np.array(acts)


def padded(text, left, length):
    """(tokens, valid, acts); the padding looks like an opened turn on the left and closed ones on the right."""
    tokens, acts = read(text)
    right = length - left - len(tokens)
    tokens = np.concatenate([np.tile(START, left)[-left:], tokens, np.full(right, END)])
    real = np.pad(np.ones(len(acts), bool), (left, right))
    return tokens, real, np.pad(acts, (left, right))


def test_response_mask_reads_a_conversation():
    length = max(len(read(text)[0]) for text in CONVERSATIONS.values()) + 4
    for left in (0, 4):  # right and left padding, what the padding says being nobody's turn
        rows = [padded(text, left, length) for text in CONVERSATIONS.values()]
        tokens, valid, acts = (np.stack(x) for x in zip(*rows, strict=True))
        np.testing.assert_array_equal(assistants(tokens, valid), acts)
    words = list(WORDS)
    said = " ".join(words[token] for token in tokens[0][acts[0]])
    assert said == "get_weather ( Rome ) <|im_end|> Hot and sunny . <|im_end|> You are"
    # The end of a turn is an action, and a turn that was cut off has none.
    assert (tokens[acts] == END).sum() == 6


def test_response_mask_of_single_rows():
    tokens = np.array([START + [END, END]] * 4)
    valid = np.ones((4, 5), bool)
    valid[1], valid[2, 1], valid[3, 3] = False, False, False  # nothing; a hole that is no opening, and one no end
    assert np.argwhere(assistants(tokens, valid)).tolist() == [[0, 3], [3, 4]]
    np.testing.assert_array_equal(assistants(tokens[0], valid[0]), assistants(tokens, valid)[0])
    assert not assistants(tokens[:, :2], valid[:, :2]).any()  # shorter than an opening
    assert response_mask(jnp.array([7, 1, 2]), jnp.ones(3, bool), start=[7], end=2).tolist() == [False, True, True]


def test_advantages_of_two_turns_pass_over_the_user():
    """They are those of the conversation with the user's turn cut out, which is one long answer to `gae`."""
    tokens, mask = read(QUESTION + ANSWER + THANKS + CUT_OFF)
    first, second = (len(read(text)[0]) for text in (QUESTION + ANSWER, QUESTION + ANSWER + THANKS))
    assert mask[:first].sum() == 5 and not mask[first:second].any() and mask[second:].sum() == 2
    rewards, values = normal(len(tokens)), normal(len(tokens), seed=2)

    @jax.jit
    def both(tokens, rewards, values):
        acts = assistants(tokens, jnp.ones(tokens.shape, bool))
        return jnp.stack(gae(rewards, values, acts, gamma=0.99, lam=0.9))

    out = both(tokens, rewards, values)
    keep = np.r_[:first, second : len(tokens)]
    close(out[:, keep], both(tokens[keep], rewards[keep], values[keep]))
    close(out[:, mask], jnp.stack(gae(rewards[mask], values[mask], jnp.ones(7, bool), gamma=0.99, lam=0.9)))
    # The last word's reward reaches the first of the other turn, six actions before, and the user's none: (γλ)⁶.
    reach = jax.grad(lambda rewards: both(tokens, rewards, values)[0][np.argmax(mask)])(rewards)
    close(reach[mask], (0.99 * 0.9) ** np.arange(7))
    assert not np.asarray(reach)[~mask].any()
