"""Hand-worked advantages and returns, their identities, and that baselines of a group leave the gradient unbiased.

What they share with every loss (masks, gradients, devices, errors) is in `test_losses.py`.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax.losses import (
    gae,
    gae_associative,
    grpo_advantages,
    lambda_returns,
    masked_mean,
    monte_carlo_returns,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
    rto_token_rewards,
    whiten,
)

GAMMAS, LAMBDAS = (0.0, 0.9, 1.0), (0.0, 0.5, 0.95, 1.0)
LENGTHS = (1, 5, 16, 100, 2048)  # 4^k, one more, and neither
K, T = 4, 6


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=rtol, atol=atol)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


def mask_of(*rows):
    return jnp.array([[c == "1" for c in row] for row in rows])


def masks(length: int) -> np.ndarray:
    """Full, empty, ended early, begun late, a long hole, every third token, one token, few at random, many at random."""
    index, rng = np.arange(length), np.random.default_rng(length)
    return np.stack(
        [
            index >= 0,
            index < 0,
            index < 2 * length // 3,
            index >= length // 3,
            (index < length // 4) | (index >= 3 * length // 4),
            index % 3 == 2,
            index == length // 2,
            rng.random(length) < 0.1,
            rng.random(length) < 0.8,
        ]
    )


MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1],
        [0, 0, 0, 0, 1, 0],
    ],
    bool,
)
SCORES, DENSE = normal(K, seed=2), np.where(MASK, normal(K, T, seed=3), np.nan).astype(np.float32)
GREEDY = normal(K, seed=4)


# ---- gae_associative -------------------------------------------------------------------------------------------------


def oracle_gae(rewards, values, mask, gamma, lam):
    """From the last token to the first, in float64."""
    advantages = np.zeros(mask.shape)
    for row, real in enumerate(mask):
        value = advantage = 0.0
        for t in np.flatnonzero(real)[::-1]:
            delta = rewards[row, t] + gamma * value - values[row, t]
            advantage = advantages[row, t] = delta + gamma * lam * advantage
            value = values[row, t]
    return advantages, np.where(mask, advantages + values, 0)


SETTINGS = np.array(list(itertools.product(GAMMAS, LAMBDAS)), np.float32)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_parallel_form_is_gae(length):
    """Values and gradients, of every mask and at every γ and λ; NaN stands where masked."""
    mask = masks(length)
    rewards, values, *weights = (normal(*mask.shape, seed=seed) for seed in range(4))
    dirty = [np.where(mask, x, np.nan).astype(np.float32) for x in (rewards, values)]

    @jax.jit
    def both(rewards, values):
        def at(setting, function):
            def outputs(rewards, values):
                return function(rewards, values, mask, gamma=setting[0], lam=setting[1])

            out, pullback = jax.vjp(outputs, rewards, values)
            return out, pullback(tuple(map(jnp.asarray, weights)))

        return [jax.vmap(lambda setting, f=f: at(setting, f))(SETTINGS) for f in (gae, gae_associative)]

    (out, gradients), (parallel, parallel_gradients) = both(*dirty)
    expected = [oracle_gae(rewards, values, mask, *map(float, setting)) for setting in SETTINGS]
    tolerance = 1e-4 * math.sqrt(length)  # of sums of up to 2048 terms
    for i in range(2):
        close(parallel[i], np.stack([x[i] for x in expected]), 1e-5, 0.1 * tolerance)
        close(parallel[i], out[i], 1e-5, 0.1 * tolerance)
        close(parallel_gradients[i], gradients[i], 1e-5, tolerance)
        assert np.isfinite(gradients[i]).all() and np.abs(gradients[i]).max() > 0.1
        assert not np.asarray(parallel[i])[:, ~mask].any() and not np.asarray(parallel_gradients[i])[:, ~mask].any()


@pytest.mark.parametrize("length", [*LENGTHS, 2, 4, 17, 1024])
def test_the_parallel_form_has_no_loop_and_log4_rounds(length):
    x, mask = np.zeros((2, length)), np.ones((2, length), bool)
    jaxpr = str(jax.make_jaxpr(gae_associative)(x, x, mask))
    assert "scan" not in jaxpr and "while" not in jaxpr
    rounds = next(k for k in range(9) if 4**k >= length)
    assert jaxpr.count("optimization_barrier") == rounds


def test_the_parallel_form_of_no_tokens():
    x = np.zeros((3, 0))
    assert all(out.shape == (3, 0) for out in gae_associative(x, x, np.zeros((3, 0), bool)))


def test_a_perfect_critic_leaves_no_advantage_in_a_long_row():
    rewards, mask = normal(1, 2048), masks(2048)[-1:]
    values = np.where(mask, np.cumsum(np.where(mask, rewards, 0)[:, ::-1], axis=1)[:, ::-1], 0)
    advantages, returns = gae_associative(rewards, values, mask)
    close(advantages, np.zeros((1, 2048)), atol=1e-4)
    close(returns, values, atol=1e-4)


# ---- returns ---------------------------------------------------------------------------------------------------------


def test_returns_by_hand():
    rewards, values = array(1, 0, 2), array(0.5, 1, 1.5)
    # G_2 = 2; G_1 = 0 + ½·1.5 + ½·2; G_0 = 1 + ½·1 + ½·1.75.
    close(lambda_returns(rewards, values, jnp.ones(3, bool), lam=0.5), [2.25 + 0.125, 1.75, 2])
    # γ = ½: G_1 = ½(0.75 + 1); G_0 = 1 + ½(0.5 + ½·0.875).
    close(lambda_returns(rewards, values, jnp.ones(3, bool), gamma=0.5, lam=0.5), [1.46875, 0.875, 2])
    # No critic, γ = ½: 4; 2 + ½·4; 1 + ½·4. A hole neither earns nor discounts.
    close(monte_carlo_returns(array(1, 2, 4), jnp.ones(3, bool), gamma=0.5), [3, 4, 4])
    holes = mask_of("10110")[0]
    close(monte_carlo_returns(array(1, jnp.nan, 2, 4, 9), holes, gamma=0.5), [3, 0, 4, 4, 0])
    close(monte_carlo_returns(array(1, 9, 2, 4, 9), holes), [7, 0, 6, 4, 0])
    close(monte_carlo_returns(array(1, 9, 2, 4, 9), holes, gamma=0), [1, 0, 2, 4, 0])


def test_lambda_returns_are_their_recurrence():
    """Of the next state's value, never of the state's own."""
    mask = masks(T)
    rewards, values = normal(*mask.shape), normal(*mask.shape, seed=2)
    for gamma, lam in ((0.9, 0.7), (1.0, 0.95), (1.0, 0.0)):
        expected = np.zeros(mask.shape)
        for row, real in enumerate(mask):
            value = G = 0.0
            for t in np.flatnonzero(real)[::-1]:
                G = expected[row, t] = rewards[row, t] + gamma * ((1 - lam) * value + lam * G)
                value = values[row, t]
        close(lambda_returns(rewards, values, mask, gamma=gamma, lam=lam), expected, 1e-5, 1e-5)
    first = jax.grad(lambda v: lambda_returns(rewards[0], v, mask[0], lam=0.5).sum())(values[0])
    # The value before token t is in the t returns before it: ½ in the nearest, and half as much in each one further on.
    close(first, [1 - 0.5**t for t in range(T)])


@pytest.mark.parametrize("gamma", GAMMAS)
def test_monte_carlo_is_lambda_of_one_and_gae_without_a_critic(gamma):
    mask = masks(40)
    rewards, values = (np.where(mask, normal(*mask.shape, seed=s), np.nan).astype(np.float32) for s in (1, 2))
    returns = monte_carlo_returns(rewards, mask, gamma=gamma)
    expected = np.zeros(mask.shape)
    for row, real in enumerate(mask):
        at = np.flatnonzero(real)
        for i, t in enumerate(at):
            expected[row, t] = sum(gamma**k * np.float64(rewards[row, s]) for k, s in enumerate(at[i:]))
    close(returns, expected, 1e-5, 1e-5)
    close(lambda_returns(rewards, values, mask, gamma=gamma, lam=1), returns, 1e-5, 1e-5)
    for function in (gae, gae_associative):
        for out in function(rewards, np.zeros(mask.shape), mask, gamma=gamma, lam=1):
            close(out, returns, 1e-5, 1e-5)


# ---- a group's baselines: one number per answer ----------------------------------------------------------------------


def test_group_advantages_by_hand():
    # 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2.
    close(rloo_advantages(array(1, 2, 6)), [-3, -1.5, 4.5])
    close(rloo_advantages(array(1, 3)), [-2, 2])
    close(remax_advantages(array(1, 2, 6), array(3, 2, 1)), [-2, 0, 5])
    # Mean 3, deviations −2, −1, 3: the unbiased variance is 14/2 = 7 (the biased one would be 14/3).
    close(grpo_advantages(array(1, 2, 6)), np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-4))
    close(grpo_advantages(array(1, 2, 6), scale=False), [-2, -1, 3])
    # The 10⁻⁴ stands beside the root and not under it: 10⁻⁴ / (√2·10⁻⁴ + 10⁻⁴) = √2 − 1.
    close(grpo_advantages(array(1e-4, -1e-4)), [np.sqrt(2) - 1, 1 - np.sqrt(2)])


@pytest.mark.parametrize("answers", [2, 3, 8])
def test_identities_within_a_group(answers):
    scores = 3 + 2 * normal(5, answers)
    rloo, grpo = jax.jit(rloo_advantages), jax.jit(grpo_advantages)
    centred = grpo_advantages(scores, scale=False)
    for out in (rloo(scores), grpo(scores), centred):
        close(out.sum(-1), np.zeros(5), atol=1e-5)
    close(centred, rloo(scores) * (answers - 1) / answers, atol=1e-5)
    spread = np.std(scores, axis=-1, ddof=1)
    close(np.std(grpo(scores), axis=-1, ddof=1), spread / (spread + 1e-4))
    close(rloo(scores + 7), rloo(scores), atol=1e-5)
    close(rloo(-2 * scores), -2 * rloo(scores), atol=1e-5)
    # Affine changes of the scores: of no effect once the spread is far above 10⁻⁴.
    close(grpo(1e3 * scores), grpo(3e3 * scores - 5e3), 1e-5, 1e-5)
    close(grpo(-1e3 * scores), -grpo(1e3 * scores))
    # Each group alone.
    close(rloo(scores), np.stack([rloo(x) for x in scores]))
    close(grpo(scores), np.stack([grpo(x) for x in scores]))


@pytest.mark.parametrize("answers", [2, 3, 7, 16])
def test_equal_scores_give_exactly_nothing(answers):
    """The mean of 16 times 0.7 is not 0.7 in float32, and a spread of 10⁻⁸ must not be divided by itself."""
    mask = jnp.ones((answers, 3), bool).at[1, 1:].set(False)

    @jax.jit
    @jax.vmap
    def outs(score):
        scores, rewards = jnp.full(answers, score), jnp.full((answers, 3), score)
        return (
            rloo_advantages(scores),
            grpo_advantages(scores),
            grpo_advantages(scores, scale=False),
            grpo_advantages(scores, rewards, mask),
            grpo_advantages(scores, rewards, mask, scale=False),
        )

    for out in outs(array(0, 0.1, 0.7, -3.3, 1000.1, 12345.678)):
        np.testing.assert_array_equal(out, np.zeros(out.shape))


def test_gradients_at_equal_scores_are_finite():
    """The standard deviation has none where it is 0: what is left is that of the numerator, over 10⁻⁴."""
    mask, weights = jnp.asarray(MASK), normal(K, T)

    def total(scores, rewards):
        return jnp.sum(grpo_advantages(scores, rewards, mask) * weights)

    by_score, by_reward = jax.jit(jax.grad(total, (0, 1)))(jnp.ones(K), jnp.ones((K, T)))
    own = np.where(MASK, weights, 0).sum(-1)
    close(by_score, (own - own.mean()) * 1e4, 1e-4)
    assert np.isfinite(by_reward).all() and np.abs(by_reward).max() > 1e3 and not np.asarray(by_reward)[~MASK].any()


# ---- unbiasedness, by summing over everything that can happen --------------------------------------------------------

PROBABILITIES, PAYS = np.array([0.2, 0.3, 0.5]), np.array([1.0, 4.0, -2.0])  # a softmax policy of three arms
EXACT = PROBABILITIES * (PAYS - PROBABILITIES @ PAYS)  # ∇ Σ_a π(a) r(a) in its logits


def expected_gradient(advantages, probabilities, score_functions):
    """Σ of the probability of each tuple of answers times the mean over its answers of A ∇ log π, both [..., T, θ]."""
    gradients = np.asarray(advantages, np.float64)[..., None] * score_functions
    return np.tensordot(probabilities, gradients.sum(axis=2).mean(axis=1), axes=1)


def bandit_gradient(estimate, answers):
    tuples = np.array(list(itertools.product(range(3), repeat=answers)))
    advantages = jax.jit(estimate)(PAYS[tuples])
    score_functions = np.eye(3)[tuples] - PROBABILITIES
    return expected_gradient(advantages[..., None], PROBABILITIES[tuples].prod(axis=1), score_functions[:, :, None])


@pytest.mark.parametrize("answers", [2, 3, 4])
def test_rloo_is_unbiased(answers):
    close(bandit_gradient(rloo_advantages, answers), EXACT)
    # With the answer itself in the mean, the gradient is shorter by (K − 1)/K; its own spread below changes it more.
    centred = bandit_gradient(lambda scores: grpo_advantages(scores, scale=False), answers)
    close(centred, EXACT * (answers - 1) / answers)
    assert np.abs(bandit_gradient(grpo_advantages, answers) - EXACT).max() > 0.1


def test_remax_is_unbiased():
    greedy = PAYS[PROBABILITIES.argmax()]
    close(bandit_gradient(lambda scores: remax_advantages(scores, jnp.full(scores.shape, greedy)), 1), EXACT)


def test_the_dense_forms_are_unbiased_for_answers_of_one_length():
    """Answers of two tokens from a policy of two, whose second token depends on the first: all pairs of answers."""
    first, second = np.array(list(itertools.product((0, 1), repeat=2))).T  # the four answers
    theta = np.array(
        [0.4, 0.7, 0.2]
    )  # probability of token 1: at first, behind 0, behind 1; parameters: their log-odds
    probability = np.where(first, theta[0], 1 - theta[0]) * np.where(second, theta[1 + first], 1 - theta[1 + first])
    score_functions = np.zeros((4, 2, 3))
    score_functions[:, 0, 0] = first - theta[0]
    score_functions[np.arange(4), 1, 1 + first] = second - theta[1 + first]
    scores, rewards = normal(4), np.stack([normal(2, seed=3)[first], normal(4, seed=4)], axis=-1)
    total = np.float64(scores) + np.float64(rewards).sum(axis=-1)
    exact = (probability * total) @ score_functions.sum(axis=1)  # ∇ Σ_y π(y) (R + Σ_t r_t)
    assert np.abs(exact).min() > 0.01

    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    together = probability[pairs].prod(axis=1)
    rloo = rloo_advantages(scores[pairs], rewards[pairs], np.ones((16, 2, 2), bool))
    close(expected_gradient(rloo, together, score_functions[pairs]), exact)
    greedy = np.full(4, scores[probability.argmax()])
    remax = remax_advantages(scores, greedy, rewards, np.ones((4, 2), bool))
    close(expected_gradient(remax[:, None], probability, score_functions[:, None]), exact)


# ---- dense forms -----------------------------------------------------------------------------------------------------


def test_dense_forms_by_hand():
    scores, rewards, mask = array(1, 2, 6), array([3, 1], [5, jnp.nan], [jnp.nan, jnp.nan]), mask_of("11", "10", "00")
    # RLOO: scores −3, −1.5, 4.5; mean token rewards 2, 5, 0 (the empty answer earned nothing), so the others' means are
    # 2.5, 1, 3.5. Answer 0: (3 − 2.5) + (1 − 2.5) = −1 and −1.5; answer 1: 5 − 1.
    close(rloo_advantages(scores, rewards, mask), [[-4, -4.5], [2.5, 0], [0, 0]])
    close(rloo_advantages(scores, rewards, mask, gamma=0.5), [[-3.25, -4.5], [2.5, 0], [0, 0]])
    # ReMax: −2, 0, 5 and the rewards to go.
    greedy = array(3, 2, 1)
    close(remax_advantages(scores, greedy, rewards, mask), [[2, -1], [5, 0], [0, 0]])
    close(remax_advantages(scores, greedy, rewards, mask, gamma=0.5), [[1.5, -1], [5, 0], [0, 0]])
    # GRPO: the three tokens 3, 1, 5 have mean 3 and unbiased deviation 2: r̃ = 0, −2, 2, over 2 + 10⁻⁴.
    whole, r = np.array([-2, -1, 3]) / (np.sqrt(7) + 1e-4), 2 / (2 + 1e-4)
    close(grpo_advantages(scores, rewards, mask), [[whole[0] - r, whole[0] - r], [whole[1] + r, 0], [0, 0]])
    half = grpo_advantages(scores, rewards, mask, gamma=0.5)
    close(half, [[whole[0] - r / 2, whole[0] - r], [whole[1] + r, 0], [0, 0]])
    close(grpo_advantages(scores, rewards, mask, scale=False), [[-4, -4], [1, 0], [0, 0]])


def test_dense_rewards_of_zero_leave_the_advantage_of_the_answer():
    nothing = (np.zeros((K, T)), MASK)
    for dense, whole in (
        (rloo_advantages(SCORES, *nothing, gamma=0.9), rloo_advantages(SCORES)),
        (remax_advantages(SCORES, GREEDY, *nothing, gamma=0.9), remax_advantages(SCORES, GREEDY)),
        (grpo_advantages(SCORES, *nothing, gamma=0.9), grpo_advantages(SCORES)),
        (grpo_advantages(SCORES, *nothing, gamma=0.9, scale=False), grpo_advantages(SCORES, scale=False)),
    ):
        np.testing.assert_array_equal(dense, np.where(MASK, whole[:, None], 0))


def test_a_token_reward_that_all_answers_earn_cancels():
    """A charge per token is gone, whatever the lengths; a reward per token that sets an answer apart stays."""
    plain, centred = rloo_advantages(SCORES, DENSE, MASK), grpo_advantages(SCORES, DENSE, MASK, scale=False)
    close(rloo_advantages(SCORES, DENSE + 3, MASK), plain, 1e-5, 1e-5)
    close(grpo_advantages(SCORES, DENSE + 3, MASK, scale=False), centred, 1e-5, 1e-5)
    per_answer = array(1, 2, 6, 3)  # less the others' mean: −8/3, −4/3, 4, 0, times the tokens that are left
    left = np.where(MASK, np.cumsum(MASK[:, ::-1], axis=1)[:, ::-1], 0)
    dense = rloo_advantages(jnp.zeros(K), jnp.broadcast_to(per_answer[:, None], MASK.shape), MASK)
    close(dense, left * np.array([-8 / 3, -4 / 3, 4, 0])[:, None], 1e-5, 1e-5)
    # Affine changes of the token rewards, of the scores or of both: nothing to GRPO.
    scaled = grpo_advantages(1e3 * SCORES, 1e3 * DENSE, MASK)
    close(grpo_advantages(5e3 * SCORES - 2e3, 4e3 * DENSE + 1e3, MASK), scaled, 1e-4, 1e-4)


# ---- REINFORCE++ -----------------------------------------------------------------------------------------------------


def test_reinforce_pp_by_hand():
    # Returns 2, 1 and 3: mean 2, variance 2/3.
    rewards, mask = array([1, 1], [3, jnp.nan]), mask_of("11", "10")
    close(reinforce_pp_advantages(rewards, mask), np.sqrt(3 / 2) * np.array([[0, -1], [1, 0]]))
    # γ = 0: 1, 1 and 3; mean 5/3, variance 8/9.
    close(reinforce_pp_advantages(rewards, mask, gamma=0), np.sqrt(1 / 2) * np.array([[-1, -1], [2, 0]]))


def test_reinforce_pp_is_whitened_monte_carlo():
    for gamma in GAMMAS:
        out = reinforce_pp_advantages(DENSE, MASK, gamma=gamma)
        np.testing.assert_array_equal(out, whiten(monte_carlo_returns(DENSE, MASK, gamma=gamma), MASK))
        close([masked_mean(out, MASK), masked_mean(out**2, MASK)], [0, 1], atol=1e-5)
    # A score at the end alone: every token of an answer gets the same, the normalised score.
    nothing = jnp.zeros(MASK.shape)
    rewards = rto_token_rewards(nothing, nothing, nothing, SCORES, MASK, beta1=0, beta2=0)
    everywhere = jnp.broadcast_to(SCORES[:, None], MASK.shape)
    close(reinforce_pp_advantages(rewards, MASK), whiten(everywhere, MASK), 1e-5, 1e-5)
