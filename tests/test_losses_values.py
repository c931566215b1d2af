"""Hand-worked values of the losses, and the identities that tie them to each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax import losses
from rto_jax.losses import (
    bradley_terry_loss,
    dpo_loss,
    gae,
    implicit_token_rewards,
    masked_mean,
    masked_sum,
    masked_var,
    ppo_policy_loss,
    ppo_value_loss,
    rto_token_rewards,
    token_logps,
    whiten,
)

B, T, V = 5, 8, 6
RNG = np.random.default_rng(0)
MASK = RNG.random((B, T)) < 0.6
POLICY, REF, DPO, OLD = (-RNG.exponential(size=(B, T)).astype(np.float32) for _ in range(4))
SCORE = RNG.normal(size=B).astype(np.float32)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(actual, desired, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def array(*numbers):
    return jnp.array(numbers, jnp.float32)


# ---- log-probabilities -----------------------------------------------------------------------------------------------


def test_token_logps_by_hand():
    logits = jnp.log(array(1, 3))[None]  # probabilities 1/4 and 3/4
    close(token_logps(logits, jnp.array([0])), np.log([1 / 4]))
    close(token_logps(logits, jnp.array([1])), np.log([3 / 4]))
    # At temperature 2 the weights are √1 and √3: dividing the logits, not the log-probabilities.
    close(token_logps(logits, jnp.array([1]), temperature=2), [np.log(np.sqrt(3) / (1 + np.sqrt(3)))])


def test_token_logps_are_a_log_softmax_and_shift_nothing():
    logits = normal(T, V)
    every = jnp.stack([token_logps(logits, jnp.full(T, v)) for v in range(V)], axis=-1)
    close(every, jax.nn.log_softmax(logits))
    close(jnp.exp(every).sum(-1), np.ones(T))


def test_token_logps_of_bfloat16_logits_do_not_round_again():
    logits = jnp.asarray(10 * normal(T, V), jnp.bfloat16)
    tokens = jnp.arange(T) % V
    out = token_logps(logits, tokens)
    close(out, jax.nn.log_softmax(np.asarray(logits, np.float32))[np.arange(T), tokens])
    in_bfloat16 = jax.nn.log_softmax(logits)[np.arange(T), tokens].astype(jnp.float32)
    assert np.abs(out - in_bfloat16).max() > 1e-2  # what the float32 is for


def test_a_token_outside_the_vocabulary_gives_nan_and_no_gradient_under_a_mask():
    logits, mask = normal(3, V), jnp.array([True, False, True])

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(logits, padding):
        # Through PPO's loss, where a NaN would otherwise meet a gradient of 0.
        logps = token_logps(logits, jnp.array([1, padding, 2]))
        tokenwise = ppo_policy_loss(logps, array(-1, jnp.nan, -1), array(1, jnp.nan, -1), clip=100)
        return masked_sum(tokenwise, mask), logps

    clean, _ = gradient(logits, 0)
    assert np.isfinite(clean).all() and np.abs(clean).max() > 0
    for token in (-1, -100, V, 10**6):
        dirty, logps = gradient(logits, token)
        assert np.isnan(logps).tolist() == [False, True, False]
        np.testing.assert_array_equal(dirty, clean)


def test_minus_infinity_forbids_a_token():
    logits = array(0, -jnp.inf, 0)[None]
    close(token_logps(logits, jnp.array([0])), [np.log(1 / 2)])
    assert token_logps(logits, jnp.array([1])) == -jnp.inf
    gradient = jax.grad(lambda x: token_logps(x, jnp.array([0])).sum())(logits)
    close(gradient, [[1 / 2, 0, -1 / 2]])


# ---- preferences -----------------------------------------------------------------------------------------------------


def test_bradley_terry_by_hand():
    close(bradley_terry_loss(array(2), array(2)), [np.log(2)])
    close(bradley_terry_loss(array(np.log(3)), array(0)), [np.log(4 / 3)])  # σ(log 3) = 3/4
    close(bradley_terry_loss(array(np.log(3)), array(0), margin=np.log(3)), [np.log(2)])
    close(bradley_terry_loss(array(1, 1), array(0, 0), margin=array(0, 1)), [np.log1p(np.exp(-1)), np.log(2)])
    close(bradley_terry_loss(array(-1e4), array(0)), [1e4])


def test_the_two_orders_of_a_pair_share_one_probability():
    a, b = SCORE, SCORE[::-1]
    close(jnp.exp(-bradley_terry_loss(a, b)) + jnp.exp(-bradley_terry_loss(b, a)), np.ones(B))


def test_dpo_by_hand_with_beta_applied_once():
    # Log-ratios +1 (chosen) and −0.5 (rejected): h = 1.5. TRL: −logsigmoid(β·h) = log(1 + e^−0.15) = 0.62096;
    # with β applied twice it would be log(1 + e^−0.015) = 0.68567.
    sums = array(-10), array(-12), array(-11), array(-11.5)
    close(dpo_loss(*sums, beta=0.1), [0.620957], atol=1e-6)
    # cDPO, ε = 0.1: 0.9 · log(1 + e^−0.15) + 0.1 · log(1 + e^0.15).
    close(dpo_loss(*sums, beta=0.1, label_smoothing=0.1), [0.635957], atol=1e-6)
    close(dpo_loss(*sums[2:], *sums[2:], beta=0.1), [np.log(2)])  # π = π_ref


def test_dpo_is_bradley_terry_on_the_summed_implicit_rewards():
    def reward(policy, mask):
        return masked_sum(implicit_token_rewards(policy, REF, mask, beta=0.3), mask, axis=-1)

    chosen, rejected = MASK, ~MASK
    sums = [masked_sum(x, m, axis=-1) for x in (POLICY, REF) for m in (chosen, rejected)]
    close(dpo_loss(*sums, beta=0.3), bradley_terry_loss(reward(POLICY, chosen), reward(POLICY, rejected)))


def test_label_smoothing_mixes_the_two_orders():
    a, b, c, d = (x.sum(-1) for x in (POLICY, DPO, REF, OLD))
    right, flipped = dpo_loss(a, b, c, d, beta=0.2), dpo_loss(b, a, d, c, beta=0.2)
    close(dpo_loss(a, b, c, d, beta=0.2, label_smoothing=0.3), 0.7 * right + 0.3 * flipped)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_dpo(smoothing):
    a, b, c, d = (x.sum(-1) for x in (POLICY, DPO, REF, OLD))
    beta, h = 0.2, (a - c) - (b - d)
    gradient = jax.grad(lambda a: dpo_loss(a, b, c, d, beta=beta, label_smoothing=smoothing).sum())(a)
    close(gradient, -beta * (jax.nn.sigmoid(-beta * h) - smoothing))


# ---- token rewards ---------------------------------------------------------------------------------------------------


def test_token_rewards_by_hand():
    dpo, ref, policy = array(-1, -2, -3), array(-2, -2, -3), array(-1.5, -1, -3)
    mask = jnp.array([True, True, False])
    numbers = dict(beta1=0.05, beta2=0.01)
    # 0.05·1 − 0.01·0.5, and 0.05·0 − 0.01·1 + 0.7; nothing on the padding.
    close(rto_token_rewards(dpo, ref, policy, 0.7, mask, **numbers), [0.045, 0.69, 0])
    close(rto_token_rewards(dpo, ref, policy, 0.7, mask, **numbers, beta3=2), [0.045, 1.39, 0])
    # The clip holds the scaled term, ±0.02, and neither KL nor score.
    close(rto_token_rewards(dpo, ref, policy, 0.7, mask, **numbers, dpo_clip=0.02), [0.015, 0.69, 0])
    close(rto_token_rewards(ref, dpo, policy, 0.7, mask, **numbers, dpo_clip=0.02), [-0.015, 0.69, 0])
    close(implicit_token_rewards(dpo, ref, mask, beta=0.1), [0.1, 0, 0])


@pytest.mark.parametrize(
    ("mask", "last"),
    [("1110", 2), ("0111", 3), ("1011", 3), ("1101", 3), ("1010", 2), ("0100", 1), ("1000", 0), ("1111", 3)],
)
def test_the_score_lands_on_the_last_real_token(mask, last):
    mask = jnp.array([c == "1" for c in mask])
    zeros = jnp.zeros(4)
    rewards = rto_token_rewards(zeros, zeros, zeros, 0.7, mask, beta1=1, beta2=1)
    np.testing.assert_array_equal(rewards, np.where(np.arange(4) == last, np.float32(0.7), 0))


def test_a_fractional_score_stays_fractional_among_integers():
    """A reward buffer made "like the tokens" is int32, and 0.7 becomes 0."""
    zeros, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    rewards = rto_token_rewards(zeros, zeros, zeros, np.array([0.7]), mask, beta1=1, beta2=1)
    assert rewards.dtype == jnp.float32
    close(rewards, [[0, 0, 0.7]])
    close(rto_token_rewards(zeros, zeros, zeros, jnp.array([1]), mask, beta1=1, beta2=1, beta3=0.7), [[0, 0, 0.7]])
    advantages, _ = gae(jnp.array([[0, 0, 1]]), zeros, mask, lam=0.5)
    close(advantages, [[0.25, 0.5, 1]])
    close(whiten(jnp.array([[0, 1, 1]]), mask), [[-np.sqrt(2), np.sqrt(1 / 2), np.sqrt(1 / 2)]])


def ppo_reward(policy, beta2):
    """RTO eq. 2.3, written out: −β log(π/π_ref), and the score at the last token."""
    out = np.where(MASK, -np.float32(beta2) * (policy - REF), np.float32(0))
    for row, real in enumerate(MASK):
        out[row, np.flatnonzero(real)[-1]] += SCORE[row]
    return out


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("junk", [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_beta1_of_zero_is_ppos_reward_exactly(junk, traced):
    dpo = np.full_like(REF, junk)

    def rewards(dpo, policy, beta1):
        return rto_token_rewards(dpo, REF, policy, SCORE, MASK, beta1=beta1, beta2=0.25, dpo_clip=0.05)

    beta1 = jnp.float32(0) if traced else 0
    out = (jax.jit(rewards) if traced else rewards)(dpo, POLICY, beta1)
    np.testing.assert_array_equal(out, ppo_reward(POLICY, 0.25))
    by_dpo, by_policy = jax.grad(lambda d, p: rewards(d, p, beta1).sum(), (0, 1))(dpo, POLICY)
    np.testing.assert_array_equal(by_dpo, np.zeros_like(REF))
    np.testing.assert_array_equal(by_policy, np.where(MASK, np.float32(-0.25), 0))


def test_a_weight_of_zero_switches_any_term_off():
    junk, numbers = np.full_like(REF, np.nan), dict(beta1=0.5, beta2=0.1, beta3=2.0)
    full = [rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers | {name: 0}) for name in numbers]
    inputs = [(junk, REF, POLICY, SCORE), (DPO, REF, junk, SCORE), (DPO, REF, POLICY, np.full_like(SCORE, np.nan))]
    for name, arrays, expected in zip(numbers, inputs, full, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(rto_token_rewards(*arrays, MASK, **numbers | {name: 0}), expected)


def test_rto_is_the_sum_of_its_terms():
    rewards = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, beta1=0.5, beta2=0.1, beta3=2)
    dense, kl = (implicit_token_rewards(x, REF, MASK, beta=1) for x in (DPO, POLICY))
    close(masked_sum(rewards, MASK, axis=-1), 0.5 * dense.sum(-1) - 0.1 * kl.sum(-1) + 2 * SCORE)
    alone = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, beta1=0.5, beta2=0, beta3=0)
    np.testing.assert_array_equal(alone, implicit_token_rewards(DPO, REF, MASK, beta=0.5))
    # A policy that is the DPO model pays back in KL what it earns: β1 = β2 leaves the score.
    same = rto_token_rewards(DPO, REF, DPO, SCORE, MASK, beta1=0.3, beta2=0.3)
    close(same.sum(-1), SCORE)


def test_a_wide_clip_is_no_clip():
    numbers = dict(beta1=0.5, beta2=0.1)
    wide = rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers, dpo_clip=1e3)
    np.testing.assert_array_equal(wide, rto_token_rewards(DPO, REF, POLICY, SCORE, MASK, **numbers))


# ---- advantages ------------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    # δ = (1 + 1 − 0.5, 0 + 1.5 − 1, 2 − 1.5) = (1.5, 0.5, 0.5); A_2 = 0.5, A_1 = 0.5 + 0.25, A_0 = 1.5 + 0.375.
    advantages, returns = gae(array(1, 0, 2), array(0.5, 1, 1.5), jnp.ones(3, bool), lam=0.5)
    close(advantages, [1.875, 0.75, 0.5])
    close(returns, [2.375, 1.75, 2])
    # A user's turn of two tokens in the middle: the same, and neither discounted nor decayed.
    mask = jnp.array([True, False, False, True, True])
    advantages, returns = gae(array(1, 9, jnp.nan, 0, 2), array(0.5, 9, jnp.nan, 1, 1.5), mask, lam=0.5)
    close(advantages, [1.875, 0, 0, 0.75, 0.5])
    close(returns, [2.375, 0, 0, 1.75, 2])
    # With discount 0.5: δ = (1 + 0.5 − 0.5, 0.75 − 1, 2 − 1.5); A_1 = −0.25 + 0.25·0.5, A_0 = 1 − 0.25·0.125.
    advantages, _ = gae(array(1, 0, 2), array(0.5, 1, 1.5), jnp.ones(3, bool), gamma=0.5, lam=0.5)
    close(advantages, [0.96875, -0.125, 0.5])


def test_gae_at_the_ends_of_lambda():
    rewards, values = np.where(MASK, POLICY, 0), np.where(MASK, DPO, 0)
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    advantages, returns = gae(rewards, values, MASK, lam=1)  # Monte Carlo
    close(returns, np.where(MASK, to_go, 0), 1e-5, 1e-5)
    close(advantages, np.where(MASK, to_go - values, 0), 1e-5, 1e-5)
    advantages, returns = gae(rewards, values, MASK, gamma=0, lam=0.95)  # short-sighted
    close(returns, rewards)
    # λ = 0: one-step temporal differences; their sum telescopes to Σ r − V(s_1).
    advantages, _ = gae(rewards, values, MASK, lam=0)
    first = np.array([values[row, np.flatnonzero(real)[0]] for row, real in enumerate(MASK)])
    close(advantages.sum(-1), rewards.sum(-1) - first, 1e-5, 1e-5)


def test_gae_of_a_perfect_critic_is_zero():
    rewards = np.where(MASK, POLICY, 0)
    to_go = np.where(MASK, np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1], np.nan)
    advantages, returns = gae(rewards, to_go, MASK)
    close(advantages, np.zeros((B, T)), atol=1e-5)
    close(returns, np.where(MASK, to_go, 0), 1e-5, 1e-5)


def test_potential_shaping_moves_the_critic_and_no_advantage():
    """r + Φ(s') − Φ(s), with Φ = 0 at the end, is the same problem for V − Φ."""
    mask, potential = np.ones((B, T), bool), DPO
    ahead = np.concatenate([potential[:, 1:], np.zeros((B, 1))], axis=1)
    plain, _ = gae(POLICY, REF, mask)
    shaped, _ = gae(POLICY + ahead - potential, REF - potential, mask)
    close(shaped, plain, 1e-4, 1e-5)


def test_gae_is_linear_and_its_gradient_is_the_discount():
    gradient = jax.grad(lambda r: gae(r, jnp.zeros(4), jnp.array([True, True, False, True]), gamma=0.9, lam=0.5)[0][0])
    close(gradient(jnp.ones(4)), [1, 0.45, 0, 0.45**2])


def test_gae_compiles_to_one_loop():
    jaxpr = str(jax.make_jaxpr(lambda *args: gae(*args))(POLICY, REF, MASK))
    assert jaxpr.count("scan[") == 1 and "while[" not in jaxpr


# ---- PPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2, -2.4, 0),  # good, and already past 1.2: clipped, no push
        (1.5, -2, 3, 3),  # bad, and more likely than before: the full push back
        (0.5, 2, -1, -1),
        (0.5, -2, 1.6, 0),
        (1.0, 2, -2, -2),  # at the start the gradient is −A, plain policy gradient
        (1.0, 0, 0, 0),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, gradient):
    args = array(np.log(ratio) - 3), array(-3), array(advantage)
    close(ppo_policy_loss(*args), [loss], atol=1e-5)
    close(jax.grad(lambda x: ppo_policy_loss(x, *args[1:]).sum())(args[0]), [gradient], atol=1e-5)


def test_policy_loss_at_the_first_update_is_the_policy_gradient():
    close(ppo_policy_loss(POLICY, POLICY, DPO), -DPO)
    close(jax.grad(lambda x: ppo_policy_loss(x, POLICY, DPO).sum())(POLICY), -DPO)


def test_policy_loss_is_never_below_the_unclipped_one():
    unclipped = -jnp.exp(POLICY - OLD) * DPO
    clipped = ppo_policy_loss(POLICY, OLD, DPO)
    assert (clipped >= unclipped - 1e-6).all() and (clipped > unclipped + 0.1).any()
    close(ppo_policy_loss(POLICY, OLD, DPO, clip=1e3), unclipped)


def test_policy_loss_survives_a_ratio_beyond_float32():
    logps, old, advantages = array(0, -1e4, -jnp.inf), array(-1e4, 0, 0), array(1, 1, 1)
    close(ppo_policy_loss(logps, old, advantages), [-1.2, 0, 0])
    assert not np.asarray(jax.grad(lambda x: ppo_policy_loss(x, old, advantages).sum())(logps)).any()
    assert np.isfinite(ppo_policy_loss(logps, old, -advantages)).all()


def test_a_nan_at_a_real_token_is_not_hidden():
    nan, one = array(jnp.nan), array(1)
    for position in range(3):
        arrays = [nan if i == position else one for i in range(3)]
        assert np.isnan(ppo_policy_loss(*arrays)).all() and np.isnan(ppo_value_loss(*arrays)).all()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1, 0, 2, 1.62, 0),  # moved by 1 towards the target; the clipped value 0.2 is the worse: ½·1.8²
        (1, 0.9, 2, 0.5, -1),  # within the clip: ½(1 − 2)²
        (1, 0, -2, 4.5, 3),  # moved away: the value itself is the worse
        (-1, 0, -2, 1.62, 0),
    ],
)
def test_value_loss_by_hand(value, old, target, loss, gradient):
    args = array(value), array(old), array(target)
    close(ppo_value_loss(*args), [loss])
    close(jax.grad(lambda x: ppo_value_loss(x, *args[1:]).sum())(args[0]), [gradient])


def test_value_loss_without_a_clip_is_half_the_square():
    close(ppo_value_loss(POLICY, OLD, DPO, clip=jnp.inf), 0.5 * (POLICY - DPO) ** 2)
    assert (ppo_value_loss(POLICY, OLD, DPO) >= 0.5 * (POLICY - DPO) ** 2 - 1e-6).all()


# ---- masked reductions -----------------------------------------------------------------------------------------------


def test_masked_reductions_by_hand():
    x, mask = array(1, jnp.nan, 3, 8), jnp.array([True, False, True, True])
    assert masked_sum(x, mask) == 12 and masked_mean(x, mask) == 4
    close(masked_var(x, mask), (9 + 1 + 16) / 3)  # ÷ 3, not ÷ 2
    assert masked_mean(jnp.ones((2, 2), bool), jnp.ones((2, 2), bool)) == 1  # a share of tokens


@pytest.mark.parametrize("axis", [None, 1, -1, (0, 2)])
def test_masked_reductions_are_those_of_numpy_ma(axis):
    x, mask = 5 + 3 * normal(2, 3, 4), normal(2, 3, 4, seed=2) < 0.3
    mask[0, 0], mask[:, 1, 1] = False, False  # nothing along an axis: 0
    hidden = np.ma.array(x.astype(np.float64), mask=~mask)
    for ours, theirs in ((masked_sum, hidden.sum), (masked_mean, hidden.mean), (masked_var, hidden.var)):
        close(ours(x, mask, axis=axis), np.ma.filled(theirs(axis=axis), 0), 1e-5, 1e-5)


def test_masked_var_far_from_zero_loses_no_digits():
    close(masked_var(array(10001, 10002, 10003, 0), jnp.array([True, True, True, False])), 2 / 3)


def test_whiten_by_hand():
    x, mask = array(10, 7, 30), jnp.array([True, False, True])  # mean 20, standard deviation 10
    close(whiten(x, mask), [-1, 0, 1])
    close(whiten(x, mask, shift_mean=False), [19, 0, 21])
    close(whiten(array(5, 5), jnp.ones(2, bool)), [0, 0])
    # Where the 1e-8 stands: √(1e-8 + 1e-8), not √1e-8 + 1e-8.
    close(whiten(array(-1e-4, 1e-4), jnp.ones(2, bool)), [-np.sqrt(1 / 2), np.sqrt(1 / 2)])


def test_whiten_takes_its_statistics_over_the_whole_batch():
    out = whiten(DPO, MASK)
    close(masked_mean(out, MASK), 0, atol=1e-6)
    close(masked_var(out, MASK), 1)
    close(whiten(3 * DPO + 7, MASK), out, 1e-4, 1e-5)
    close(whiten(DPO, MASK, shift_mean=False)[MASK], out[MASK] + masked_mean(DPO, MASK))
    assert np.abs(masked_mean(out, MASK, axis=-1)).max() > 0.1  # rows keep their differences


# ---- the whole chain -------------------------------------------------------------------------------------------------


def test_one_ppo_update_ignores_what_padding_holds():
    """Logits to policy and value loss under jit, with out-of-vocabulary padding ids and NaN in every stored array."""
    logits = normal(B, T, V)
    tokens = np.arange(B * T).reshape(B, T) % V

    @jax.jit
    def gradients(logits, values, tokens, dpo, ref, old, score):
        def loss(logits, values):
            logps = token_logps(logits, tokens)
            rewards = rto_token_rewards(dpo, ref, old, score, MASK, beta1=0.05, beta2=0.01, dpo_clip=0.05)
            advantages, returns = gae(rewards, jax.lax.stop_gradient(values), MASK)
            policy = ppo_policy_loss(logps, old, whiten(advantages, MASK))
            value = ppo_value_loss(values, jax.lax.stop_gradient(values), returns)
            return masked_mean(policy, MASK) + masked_mean(value, MASK)

        return jax.value_and_grad(loss, (0, 1))(logits, values)

    def dirt(x, junk):
        return np.where(MASK, x, junk).astype(x.dtype)

    clean = gradients(logits, OLD, tokens, DPO, REF, OLD, SCORE)
    for junk in (np.nan, np.inf, 1e30):
        stored = (dirt(x, junk) for x in (DPO, REF, OLD))
        dirty = gradients(logits, dirt(OLD, junk), dirt(tokens, -100), *stored, SCORE)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert np.isfinite(clean[0]) and np.abs(clean[1][0]).max() > 0 and np.abs(clean[1][1]).max() > 0


def test_the_module_says_what_it_exports():
    assert all(callable(getattr(losses, name)) for name in losses.__all__)
