"""The mathematics of RTO and of From r to Q*, checked on a token MDP that is small enough to enumerate.

Three letters and EOS, at most three tokens: 13 states (the prefixes) and 40 responses. The reference policy and the
rewards are random. NumPy in float64 solves it by backward induction; the shipped functions see the 40 responses as a
batch [40, 3]. Tables are [13, 4], by state and action. Q* contains β log π_ref, as in both papers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rto_jax.gold import World
from rto_jax.losses import (
    dpo_loss,
    expected_implicit_rewards,
    gae,
    implicit_token_rewards,
    masked_sum,
    optimal_advantages,
    place_rewards,
    ppo_policy_loss,
    prefix_sums,
    proxy_logits,
    q_values,
    rewards_of_q,
    rto_token_rewards,
    segment_ends,
    sequence_kl,
    shape_rewards,
    soft_values,
    token_kl,
    token_logps,
)

EOS, ACTIONS, HORIZON, BETA = 3, 4, 3, 0.5

STATES = [(), *((a,) for a in range(3)), *((a, b) for a in range(3) for b in range(3))]  # parents before children
INDEX = {state: i for i, state in enumerate(STATES)}
NEXT = np.array([[INDEX.get((*state, a), -1) for a in range(ACTIONS)] for state in STATES])  # −1: the response ends
RESPONSES = [(*state, a) for state in STATES for a in range(ACTIONS) if (*state, a) not in INDEX]
MASK = np.array([[t < len(y) for t in range(HORIZON)] for y in RESPONSES])
TOKENS = np.array([[*y, *[EOS] * (HORIZON - len(y))] for y in RESPONSES])
STATE = np.array([[INDEX[y[:t]] if t < len(y) else 0 for t in range(HORIZON)] for y in RESPONSES])  # before the token
N = len(RESPONSES)
LAST = [INDEX[state] for state in STATES if len(state) == HORIZON - 1]  # where one more token ends it: bandits


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def normalised(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def random_policy(seed):
    return normalised(normal(seed, *NEXT.shape))


LOG_REF, LOG_DPO, LOG_PI = (random_policy(seed) for seed in (0, 1, 2))
POTENTIAL = normal(3, len(STATES))
REWARDS = {
    "dense": 0.6 * normal(4, *NEXT.shape),
    "terminal": np.where(NEXT < 0, normal(5, *NEXT.shape), 0),  # a reward model: nothing before the end
}
every_reward = pytest.mark.parametrize("reward", REWARDS.values(), ids=REWARDS)


class Solution(NamedTuple):
    Q: np.ndarray
    V: np.ndarray
    log_pi: np.ndarray


def solve(reward, beta=BETA):
    """Soft dynamic programming, From r to Q* eq. 5 to 7, from the leaves to the root."""
    Q, V = np.zeros(NEXT.shape), np.zeros(len(STATES))
    for s in reversed(range(len(STATES))):
        for a in range(ACTIONS):
            Q[s, a] = reward[s, a] + beta * LOG_REF[s, a] + (V[NEXT[s, a]] if NEXT[s, a] >= 0 else 0)
        V[s] = beta * np.log(np.exp(Q[s] / beta).sum())
    return Solution(Q, V, (Q - V[:, None]) / beta)


def along(table):
    """A table's entries on every response, NaN in the padding."""
    return np.where(MASK, table[STATE, TOKENS], np.nan)


def total(table):
    return np.nansum(along(table), axis=-1)


def table(token_values):
    """The table of what the tokens of every response hold: the way back from `along`."""
    token_values = np.asarray(token_values, np.float64)
    out = np.zeros(NEXT.shape)
    out[STATE[MASK], TOKENS[MASK]] = token_values[MASK]
    np.testing.assert_allclose(along(out)[MASK], token_values[MASK], atol=1e-5)  # a function of state and action
    return out


def shaped(reward, potential):
    return reward + np.where(NEXT < 0, 0, potential[NEXT]) - potential[:, None]


def preferences(reward):
    """P(i preferred to j) for all pairs of responses, Bradley–Terry on the totals."""
    gap = total(reward)[:, None] - total(reward)
    return 1 / (1 + np.exp(-gap))


def objective(log_pi, reward, beta=BETA):
    """J(π) = E_π[R − β log π/π_ref], by enumeration."""
    return (np.exp(total(log_pi)) * (total(reward) - beta * total(log_pi - LOG_REF))).sum()


def close(actual, desired, atol=2e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(desired, np.float64), rtol=0, atol=atol)


def zero_where_masked(x):
    return np.where(MASK, x, 0)


def test_the_world_is_what_it_should_be():
    assert len(STATES) == 13 and N == 40 == len(set(RESPONSES))
    close(np.exp(total(LOG_REF)).sum(), 1)
    assert MASK.sum(-1).tolist() == [len(y) for y in RESPONSES] and set(MASK.sum(-1)) == {1, 2, 3}


# ---- the optimal policy ----------------------------------------------------------------------------------------------


@every_reward
def test_soft_values_and_q_values_are_those_of_dynamic_programming(reward):
    best = solve(reward)
    close(soft_values(best.Q / BETA, beta=BETA), best.V)
    close(q_values(best.Q / BETA, beta=BETA), best.Q)
    close(soft_values(best.log_pi, beta=BETA), np.zeros(13))  # a policy does not show its values
    # RTO's eq. 3.3 and 3.4 with π_ref outside of Q.
    outside = best.Q - BETA * LOG_REF
    close(soft_values(LOG_REF + outside / BETA, beta=BETA), best.V)


@every_reward
def test_the_optimum_over_responses_is_a_gibbs_distribution(reward):
    best = solve(reward)
    weights = np.exp(total(LOG_REF) + total(reward) / BETA)
    close(total(best.log_pi), np.log(weights / weights.sum()), 1e-10)
    close(best.V[0], BETA * np.log(weights.sum()), 1e-10)
    close(objective(best.log_pi, reward), best.V[0], 1e-10)


@every_reward
def test_no_policy_is_better_and_the_gap_is_a_kl(reward):
    """J* − J(π) = β E_π Σ_t KL(π ‖ π*), RTO's Lemma A.2, with the KL of the library."""
    best = solve(reward)
    assert best.V[0] - objective(LOG_REF, reward) > 0.1
    policies = np.stack([LOG_REF, *map(random_policy, range(20)), normalised(best.log_pi + 0.1 * LOG_PI)])
    at = policies[:, STATE]
    kl = sequence_kl(np.broadcast_to(best.log_pi[STATE], at.shape), at, np.broadcast_to(MASK, at.shape[:-1]))
    for log_pi, divergences in zip(policies, kl, strict=True):
        regret = BETA * np.exp(total(log_pi)) @ divergences
        close(best.V[0] - objective(log_pi, reward), regret)
        assert regret > 1e-4


# ---- sums along a response -------------------------------------------------------------------------------------------


@every_reward
def test_log_ratios_of_the_optimum_telescope(reward):
    """Σ_t β log π*/π_ref = R − V*(s_0): RTO eq. 4.3 to 4.5, From r to Q* section 4.1; also for every prefix."""
    best = solve(reward)
    implicit = implicit_token_rewards(along(best.log_pi), along(LOG_REF), MASK, beta=BETA)
    close(implicit.sum(-1), total(reward) - best.V[0])
    ahead = np.where(NEXT < 0, 0, best.V[NEXT])
    prefixes = prefix_sums(along(reward), MASK) + np.nan_to_num(along(ahead)) - best.V[0]
    close(prefix_sums(implicit, MASK), zero_where_masked(prefixes))


@every_reward
def test_searching_by_value_is_searching_by_likelihood(reward):
    """Σ_{i≤t} [r + β log π_ref] + V*(s_{t+1}) = V*(s_0) + β Σ_{i≤t} log π*: From r to Q* eq. 12 and 13."""
    best = solve(reward)
    value_guided = prefix_sums(along(reward + BETA * LOG_REF), MASK) + np.nan_to_num(
        along(np.where(NEXT < 0, 0, best.V[NEXT]))
    )
    close(value_guided, zero_where_masked(best.V[0] + BETA * prefix_sums(along(best.log_pi), MASK)))


@every_reward
def test_the_optimum_gives_the_preferences_back(reward):
    """P(w ≻ l) = σ(βh) = exp(−dpo_loss) at π*: From r to Q* eq. 8."""
    best = solve(reward)
    i, j = np.divmod(np.arange(N * N), N)
    policy, ref = total(best.log_pi), total(LOG_REF)
    close(np.exp(-dpo_loss(policy[i], policy[j], ref[i], ref[j], beta=BETA)).reshape(N, N), preferences(reward))


# ---- advantages ------------------------------------------------------------------------------------------------------


@every_reward
def test_the_log_ratio_is_the_optimal_advantage(reward):
    best = solve(reward)
    expected = shaped(reward, best.V)  # r + V*(s') − V*(s)
    for shift in (0, POTENTIAL[:, None]):  # a constant per state is free, in both logits
        close(optimal_advantages(best.Q / BETA + shift, LOG_REF - shift, beta=BETA), expected)
    close(best.Q - best.V[:, None] - BETA * LOG_REF, expected, 1e-10)
    taken = implicit_token_rewards(along(best.log_pi), along(LOG_REF), MASK, beta=BETA)
    close(taken, np.nan_to_num(along(expected)))


@every_reward
def test_the_reference_expects_to_lose(reward):
    """E_π_ref[A*] = −β KL(π_ref ‖ π*) < 0 in every state, From r to Q* eq. 16; under π* it is +β KL(π* ‖ π_ref)."""
    best = solve(reward)
    advantages = optimal_advantages(best.log_pi, LOG_REF, beta=BETA)
    expected = [sum(np.exp(LOG_REF[s, a]) * advantages[s, a] for a in range(ACTIONS)) for s in range(13)]
    out = expected_implicit_rewards(best.log_pi, LOG_REF, beta=BETA)
    close(out, expected)
    close(out, -BETA * token_kl(best.log_pi, LOG_REF))
    assert (out < -1e-5).all()
    close((np.exp(best.log_pi) * advantages).sum(-1), BETA * token_kl(LOG_REF, best.log_pi))


# ---- rewards and Q-functions -----------------------------------------------------------------------------------------


def rewards_of(Q):
    """The table of `rewards_of_q` on every response."""
    return table(rewards_of_q(Q[STATE] / BETA, TOKENS, along(LOG_REF), MASK, beta=BETA))


@every_reward
def test_from_r_to_q_and_back(reward):
    close(rewards_of(solve(reward).Q), reward)


def test_from_q_to_r_and_back():
    """Any logits are the optimal Q-function of some reward: Lemma 1 of From r to Q*."""
    for Q in normal(6, 3, *NEXT.shape):
        best = solve(rewards_of(Q))
        close(best.Q, Q)
        close(best.log_pi, jax.nn.log_softmax(Q / BETA), 1e-4)


def test_another_reward_has_another_q_here_and_upstream_only():
    """Change r at one state and action: Q* changes there and at the actions that lead there."""
    at, action = INDEX[(1,)], 2
    other = REWARDS["dense"].copy()
    other[at, action] += 0.5
    change = solve(other).Q - solve(REWARDS["dense"]).Q
    expected = np.zeros(NEXT.shape, bool)
    expected[at, action] = expected[INDEX[()], 1] = True
    np.testing.assert_array_equal(np.abs(change) > 1e-9, expected)
    close(change[at, action], 0.5, 1e-10)


@every_reward
def test_logits_shifted_per_state_are_a_shaped_reward_and_the_same_policy(reward):
    best = solve(reward)
    moved = best.Q + POTENTIAL[:, None]
    close(jax.nn.log_softmax(moved / BETA), best.log_pi)
    close(rewards_of(moved), shaped(reward, -POTENTIAL))
    along_responses = rewards_of_q(moved[STATE] / BETA, TOKENS, along(LOG_REF), MASK, beta=BETA)
    close(along_responses, shape_rewards(along(reward), -POTENTIAL[STATE], MASK))
    # The shift to normalised logits is Φ = −V*, and their reward is the advantage.
    close(rewards_of(BETA * best.log_pi), optimal_advantages(best.log_pi, LOG_REF, beta=BETA))


# ---- classes of rewards ----------------------------------------------------------------------------------------------


@every_reward
def test_shaping_leaves_policy_and_preferences(reward):
    """Ng et al. (1999), Definition 1 of From r to Q*."""
    other = table(shape_rewards(along(reward), POTENTIAL[STATE], MASK))
    close(other, shaped(reward, POTENTIAL))
    assert np.abs(other - reward).max() > 0.5
    before, after = solve(reward), solve(other)
    close(after.log_pi, before.log_pi, 1e-4)
    close(after.V, before.V - POTENTIAL)
    close(preferences(other), preferences(reward))


@every_reward
def test_any_other_change_of_the_reward_changes_both(reward):
    for state, action in [((), 0), ((2,), EOS), ((0, 1), 1)]:
        other = reward.copy()
        other[INDEX[state], action] += 0.5
        assert np.abs(solve(other).log_pi - solve(reward).log_pi).max() > 0.05
        assert np.abs(preferences(other) - preferences(reward)).max() > 0.05


@every_reward
def test_equal_totals_are_one_class(reward):
    """Rewards moved to the end differ by the potential −Σ_{i<t} r_i: preferences cannot tell the two apart."""
    r = along(reward)
    last = place_rewards(r, MASK, placement="last")
    close(shape_rewards(r, np.nan_to_num(r) - prefix_sums(r, MASK), MASK), last)
    close(solve(table(last)).log_pi, solve(reward).log_pi, 1e-4)


@every_reward
def test_every_reward_is_a_log_ratio_up_to_shaping(reward):
    """Theorem 1 of From r to Q*: β log π*/π_ref is r shaped by V*, the member of r's class whose own V* is 0."""
    best = solve(reward)
    implicit = implicit_token_rewards(along(best.log_pi), along(LOG_REF), MASK, beta=BETA)
    close(implicit, shape_rewards(along(reward), best.V[STATE], MASK))
    again = solve(table(implicit))
    close(again.V, np.zeros(13))
    close(again.log_pi, best.log_pi, 1e-4)
    close(preferences(table(implicit)), preferences(reward))


# ---- DPO on infinite data --------------------------------------------------------------------------------------------

SAMPLERS = np.full((2, N), 1 / N)  # where the pairs come from: all alike, or half of them from some policy
SAMPLERS[1] = (SAMPLERS[0] + np.exp(total(LOG_PI))) / 2
CASES = [(name, sampler) for name in REWARDS for sampler in range(2)]
I, J = np.divmod(np.arange(N * N), N)


def expected_dpo_loss(logits, returns, sampler):
    """Over all pairs of responses, weighed by how often they are drawn and labelled so."""
    policy = masked_sum(token_logps(logits[STATE], TOKENS), MASK, axis=-1)
    ref = total(LOG_REF).astype(np.float32)
    weight = sampler[I] * sampler[J] * jax.nn.sigmoid(returns[I] - returns[J])
    return 2 * jnp.sum(weight * dpo_loss(policy[I], policy[J], ref[I], ref[J], beta=BETA))


dpo_gradient = jax.jit(jax.grad(expected_dpo_loss))


@pytest.fixture(scope="module")
def fitted():
    """Logits that minimise it, per case, from π_ref; and the loss there."""
    steps = 3000
    optimiser = optax.adam(optax.cosine_decay_schedule(0.1, steps))  # to rounding

    def fit(returns, sampler):
        def step(carry, _):
            logits, state = carry
            loss, gradient = jax.value_and_grad(expected_dpo_loss)(logits, returns, sampler)
            update, state = optimiser.update(gradient, state)
            return (logits + update, state), loss

        start = jnp.asarray(LOG_REF, jnp.float32)
        (logits, _), loss = jax.lax.scan(step, (start, optimiser.init(start)), length=steps)
        return logits, loss[-1]

    returns = np.stack([total(REWARDS[name]) for name, _ in CASES])
    samplers = np.stack([SAMPLERS[sampler] for _, sampler in CASES])
    logits, losses = jax.jit(jax.vmap(fit))(jnp.float32(returns), jnp.float32(samplers))
    return dict(zip(CASES, zip(np.asarray(logits), np.asarray(losses), strict=True), strict=True))


every_case = pytest.mark.parametrize("case", CASES, ids=[f"{name}-{sampler}" for name, sampler in CASES])


@every_case
def test_dpo_recovers_the_optimal_advantage_token_by_token(case, fitted):
    """And not the reward; whatever policy the pairs came from. Within 10⁻⁵ where advantages reach 1.7."""
    logits, _ = fitted[case]
    reward = REWARDS[case[0]]
    best = solve(reward)
    learned = optimal_advantages(logits, LOG_REF, beta=BETA)
    close(learned, shaped(reward, best.V), 1e-5)
    close(jax.nn.log_softmax(logits), best.log_pi)
    assert np.abs(learned - reward).max() > 0.5


@every_case
def test_the_expected_dpo_loss_ends_at_the_noise_of_the_labels(case, fitted):
    reward, sampler = REWARDS[case[0]], SAMPLERS[case[1]]
    p = preferences(reward)
    floor = -(sampler[:, None] * sampler * (p * np.log(p) + (1 - p) * np.log(1 - p))).sum()
    close(fitted[case][1], floor, 1e-6)
    numbers = jnp.float32(total(reward)), jnp.float32(sampler)
    at_best, at_ref = (dpo_gradient(jnp.float32(x), *numbers) for x in (solve(reward).log_pi, LOG_REF))
    assert np.abs(at_best).max() < 1e-6 < 0.01 < np.abs(at_ref).max()


@pytest.mark.parametrize("sampler", range(2))
def test_dpo_gives_dense_credit_where_the_reward_waits_for_the_end(sampler, fitted):
    logits, _ = fitted["terminal", sampler]
    reward = REWARDS["terminal"]
    credit = table(implicit_token_rewards(along(jax.nn.log_softmax(logits)), along(LOG_REF), MASK, beta=BETA))
    earlier = NEXT >= 0
    assert not reward[earlier].any()
    assert np.abs(credit[earlier]).min() > 0.01 and np.abs(credit[earlier]).max() > 0.3
    V = solve(reward).V  # the credit is what the token does to the soft value
    close(credit[earlier], (V[NEXT] - V[:, None])[earlier], 1e-5)


# ---- what RTO optimises ----------------------------------------------------------------------------------------------

ENDS = np.asarray(segment_ends(TOKENS, MASK, delimiters=[1]))
WEIGHTS = dict(beta1=0.6, beta2=0.4)
SCORE = total(REWARDS["terminal"])


def rto_reward(log_dpo=LOG_DPO, **numbers):
    """The table of RTO's reward without its KL term, which the dynamic programme adds."""
    numbers = WEIGHTS | numbers | dict(beta2=0)
    ref = along(LOG_REF)
    return table(rto_token_rewards(along(log_dpo), ref, ref, SCORE, MASK, **numbers, ends=ENDS))


@pytest.mark.parametrize("placement", ["token", "segment", "last"])
def test_the_optimum_of_rto_is_a_dpo_model_extrapolated_and_tilted(placement):
    """π ∝ π_ref (π_dpo/π_ref)^{β₁/β₂} e^{r/β₂}, wherever the dense reward is placed."""
    power = WEIGHTS["beta1"] / WEIGHTS["beta2"]
    weights = np.exp(total(LOG_REF) + power * total(LOG_DPO - LOG_REF) + SCORE / WEIGHTS["beta2"])
    optimum = solve(rto_reward(placement=placement), WEIGHTS["beta2"])
    close(total(optimum.log_pi), np.log(weights / weights.sum()), 1e-4)
    ppo = solve(REWARDS["terminal"], WEIGHTS["beta2"])
    assert np.abs(optimum.log_pi - ppo.log_pi).max() > 0.5


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_optimum_of_rs_ppo_is_ppos(clip):
    optimum = solve(rto_reward(placement="shaping", dpo_clip=clip), WEIGHTS["beta2"])
    close(optimum.log_pi, solve(REWARDS["terminal"], WEIGHTS["beta2"]).log_pi, 1e-4)


def test_a_clip_moves_the_optimum_of_rto():
    clipped, plain = (solve(rto_reward(dpo_clip=clip), WEIGHTS["beta2"]).log_pi for clip in (0.1, None))
    assert np.abs(clipped - plain).max() > 0.1


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_rto_with_a_perfect_dpo_model_is_ppo_at_a_lower_temperature(share):
    """β₁ = wβ pays the score w times over again: the optimum at β₂/(1 + w). The control of any comparison."""
    dpo = solve(REWARDS["terminal"]).log_pi
    optimum = solve(rto_reward(log_dpo=dpo, beta1=share * BETA), WEIGHTS["beta2"])
    close(optimum.log_pi, solve(REWARDS["terminal"], WEIGHTS["beta2"] / (1 + share)).log_pi, 1e-4)


@pytest.mark.parametrize("placement", ["token", "segment", "last", "shaping"])
def test_the_reward_with_its_kl_term_is_stationary_at_that_optimum(placement):
    """The whole of eq. 4.7, with the policy's own log-probabilities in it."""

    def objective(log_pi):
        logps = token_logps(log_pi[STATE], TOKENS)
        rewards = rto_token_rewards(
            *(along(LOG_DPO), along(LOG_REF), logps, SCORE, MASK), **WEIGHTS, placement=placement, ends=ENDS
        )
        return jnp.sum(jnp.exp(masked_sum(logps, MASK, axis=-1)) * rewards.sum(-1))

    optimum = solve(rto_reward(placement=placement), WEIGHTS["beta2"])
    value_and_gradient = jax.jit(jax.value_and_grad(objective))
    value, gradient = value_and_gradient(jnp.float32(optimum.log_pi))
    close(value, optimum.V[0])
    assert np.abs(gradient).max() < 1e-5
    value, gradient = value_and_gradient(jnp.float32(LOG_REF))
    assert value < optimum.V[0] - 0.1 and np.abs(gradient).max() > 0.01


# ---- policy optimisation ---------------------------------------------------------------------------------------------


def regularised_values(log_pi, reward, beta=BETA):
    """Q and V of a policy with the KL charge in its reward, by backward induction; Q charges its own action too."""
    Q, V = np.zeros(NEXT.shape), np.zeros(13)
    for s in reversed(range(13)):
        Q[s] = reward[s] - beta * (log_pi - LOG_REF)[s] + np.where(NEXT[s] < 0, 0, V[NEXT[s]])
        V[s] = np.exp(log_pi[s]) @ Q[s]
    return Q, V


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_nothing_is_left_to_gain_at_the_optimum(lam):
    """PPO's reward under π* has advantage 0 at every token when the critic is V*: β log π*/π_ref is all of A*."""
    best = solve(REWARDS["terminal"])
    policy, ref = along(best.log_pi), along(LOG_REF)
    rewards = rto_token_rewards(ref, ref, policy, SCORE, MASK, beta1=0, beta2=BETA)
    advantages, returns = gae(rewards, best.V[STATE], MASK, lam=lam)
    close(advantages, np.zeros(MASK.shape))
    close(returns, zero_where_masked(best.V[STATE]))
    # Under π_ref, which pays no KL, one step of the same critic is A* itself.
    rewards = rto_token_rewards(ref, ref, ref, SCORE, MASK, beta1=0, beta2=BETA)
    one_step, _ = gae(rewards, best.V[STATE], MASK, lam=0)
    close(one_step, np.nan_to_num(along(optimal_advantages(best.log_pi, LOG_REF, beta=BETA))))


def test_an_exact_critic_makes_every_lambda_unbiased():
    """E_π[A_t | s_t, a_t] = Q^π − V^π whatever λ; with another critic that holds at λ = 1, up to a baseline, only."""
    Q, V = regularised_values(LOG_PI, REWARDS["terminal"])
    weight = zero_where_masked(np.exp(total(LOG_PI))[:, None] * np.ones(HORIZON))
    rewards = rto_token_rewards(along(LOG_REF), along(LOG_REF), along(LOG_PI), SCORE, MASK, beta1=0, beta2=BETA)

    def expected(values, lam):
        sums, visits = np.zeros(NEXT.shape), np.zeros(NEXT.shape)
        np.add.at(sums, (STATE, TOKENS), weight * gae(rewards, values[STATE], MASK, lam=lam)[0])
        np.add.at(visits, (STATE, TOKENS), weight)
        return sums / visits

    for lam in (0.0, 0.5, 1.0):
        close(expected(V, lam), Q - V[:, None])
    wrong = V + POTENTIAL
    close(expected(wrong, 1.0), Q - wrong[:, None])
    assert np.abs(expected(wrong, 0.5) - (Q - wrong[:, None])).max() > 0.1
    # Monte Carlo without a critic's help along the way: A_t = return to go − V(s_t).
    advantages, _ = gae(rewards, V[STATE], MASK, lam=1)
    to_go = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    close(advantages, zero_where_masked(to_go - V[STATE]))


def test_ppos_first_step_is_the_gradient_of_the_objective():
    """E_π Σ_t ∇ppo_policy_loss = −∇J(π), KL term and all: the charge in the reward is a charge in the objective."""
    ref, old, score = (np.float32(x) for x in (along(LOG_REF), along(LOG_PI), SCORE))
    rewards = rto_token_rewards(ref, ref, old, SCORE, MASK, beta1=0, beta2=BETA)
    V = regularised_values(LOG_PI, REWARDS["terminal"])[1]
    critics = ((V, 0.0), (V, 0.95), (POTENTIAL, 1.0))  # any critic will do at λ = 1
    advantages = jnp.stack([gae(rewards, values[STATE], MASK, lam=lam)[0] for values, lam in critics])

    def answers(x):
        return masked_sum(x, MASK, axis=-1)

    def surrogate(logits, advantages):
        losses = ppo_policy_loss(token_logps(logits[STATE], TOKENS), old, advantages)
        return jnp.sum(jnp.exp(answers(old)) * answers(losses))

    def exact(logits):
        logps = token_logps(logits[STATE], TOKENS)
        return jnp.sum(jnp.exp(answers(logps)) * (score - BETA * answers(logps - ref)))

    @jax.jit
    def gradients(logits):
        return jax.grad(exact)(logits), jax.vmap(jax.grad(surrogate), (None, 0))(logits, advantages)

    expected, steps = gradients(jnp.float32(LOG_PI))
    assert np.abs(expected).max() > 0.05 and np.ptp(advantages, axis=0).max() > 0.5
    for step in steps:
        close(step, -expected, 1e-5)


# ---- steering by advantages ------------------------------------------------------------------------------------------


def test_proxy_logits_from_the_base_to_the_proxy():
    best = solve(REWARDS["dense"]).log_pi
    close(jax.nn.log_softmax(proxy_logits(LOG_REF, best, LOG_REF, alpha=1)), best)
    other = LOG_PI
    close(proxy_logits(other, best, LOG_REF, alpha=0), other)
    # From r to Q* eq. 15: π ∝ π_base exp(A*/β).
    steered = jax.nn.log_softmax(proxy_logits(other, best, LOG_REF, alpha=1))
    advantages = optimal_advantages(best, LOG_REF, beta=BETA)
    close(steered, normalised(other + np.asarray(advantages, np.float64) / BETA))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_proxy_alpha_is_a_temperature_in_a_bandit_and_not_before(alpha):
    """π_ref (π*/π_ref)^α, state by state, is the optimum at β/α where one token is left. Earlier it uses V* at β.

    RTO's optimum at β₁/β₂ = α without a score is the same power over whole responses, which is that optimum.
    """
    reward = REWARDS["dense"]
    best, colder = solve(reward), solve(reward, BETA / alpha)
    steered = np.asarray(jax.nn.log_softmax(proxy_logits(LOG_REF, best.log_pi, LOG_REF, alpha=alpha)))
    close(steered[LAST], colder.log_pi[LAST], 1e-4)
    earlier = np.setdiff1d(np.arange(13), LAST)
    assert np.abs(steered - colder.log_pi)[earlier].max(-1).min() > 0.05
    assert objective(normalised(steered.astype(np.float64)), reward, BETA / alpha) < colder.V[0] - 1e-4
    over_responses = solve(rto_reward(log_dpo=best.log_pi, beta1=alpha * 0.4, beta3=0), 0.4)
    close(over_responses.log_pi, colder.log_pi, 1e-4)


# ---- the shipped world -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gold():
    """(world, solution, rollouts of the data policy)."""
    world, rng = World(), np.random.default_rng(0)
    prompts = world.prompts(rng, 64)
    return world, world.solve(), (prompts, *world.sample_pi0(prompts, rng))


def gold_logps(gold):
    world, best, (prompts, tokens, mask) = gold
    rows = (world.policy_logps(x, prompts, tokens, mask) for x in (best.log_pistar, best.log_pi0))
    return [token_logps(x, tokens) for x in rows]  # NaN in the padding, whose id is no output


def test_the_gold_worlds_advantages_are_implicit_rewards(gold):
    world, best, rollouts = gold
    implicit = implicit_token_rewards(*gold_logps(gold), rollouts[2], beta=world.beta)
    close(implicit, world.exact_advantages(*rollouts))
    first = world.policy_logps(best.V, *rollouts)[:, 0]
    close(implicit.sum(-1), world.returns(*rollouts) - first, 1e-4)
    # OPEN costs now and pays later: its reward is always below 0, its advantage mostly above.
    opening = rollouts[1] == 2
    assert (world.token_rewards(*rollouts)[opening] < 0).all() and (implicit[opening] > 0).mean() > 0.5


def test_the_gold_worlds_q_gives_its_rewards_back(gold):
    world, best, rollouts = gold
    _, tokens, mask = rollouts
    logits = world.policy_logps(best.log_pi0 + best.Q / world.beta, *rollouts)  # its Q is without β log π0
    close(soft_values(logits, beta=world.beta)[mask], world.policy_logps(best.V, *rollouts)[mask])
    rewards = rewards_of_q(logits, tokens, gold_logps(gold)[1], mask, beta=world.beta)
    close(rewards, world.token_rewards(*rollouts), 1e-4)


@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_nothing_is_left_to_gain_at_the_gold_worlds_optimum(gold, lam):
    world, best, rollouts = gold
    mask = rollouts[2]
    policy, ref = gold_logps(gold)
    charged = world.token_rewards(*rollouts) - implicit_token_rewards(policy, ref, mask, beta=world.beta)
    values = world.policy_logps(best.V, *rollouts)
    advantages, returns = gae(charged, values, mask, lam=lam)
    close(advantages, np.zeros(mask.shape), 1e-4)
    close(returns, np.where(mask, values, 0), 1e-4)
    assert np.abs(gae(world.token_rewards(*rollouts), values, mask, lam=lam)[0]).max() > 0.5
