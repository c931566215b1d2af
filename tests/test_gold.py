"""The gold world against its published figures, a loop written from its definition, and brute-force enumeration."""

import itertools
import subprocess
import sys

import chex
import numpy as np
import pytest

from rto_jax import gold
from rto_jax.errors import UserError
from rto_jax.gold import CLOSE, EOS, OPEN, PAD, SEP, World

WORLD = World()
SHORT = World(horizon=4)  # 137,180 full responses: small enough to enumerate
BETA = 0.5


# ---- The oracle: plain loops over one response, from the definition, sharing nothing with rto_jax.gold


def oracle_draws(seed):
    rng = np.random.default_rng(seed)
    mu, mv = rng.permutation([0, 1, 2, 3, 0, 1, 2, 3]), rng.permutation([0, 1, 2, 3, 0, 1, 2, 3])
    return mu, mv, 0.6 * rng.standard_normal((20, 20))


def oracle_step(u, v, t, prev, q, a, horizon):
    """(token reward, next q)."""
    content, on_topic = a >= 4, a >= 4 and (a - 4) // 4 == u
    following = q
    if q == 0 and a == 2:
        following = 1
    elif q == 1 and on_topic:
        following = 2
    elif (q == 1 and a == 3) or (q in (1, 2) and a == 1):
        following = 0
    elif q == 2 and a == 3:
        following = 3
    reward = -0.1
    if content:
        reward -= 0.1
        if on_topic:
            reward += 0.6
        if (a - 4) % 4 == v:
            reward -= 1.0
        if prev >= 4 and (a - 4) % 4 == ((prev - 4) % 4 + 1) % 4:
            reward += 0.3
    if a == prev:
        reward -= 0.5
    if a == 2:
        reward -= 0.3 if q == 0 else 0.5
    if a == 3:
        reward += 3.0 if q == 2 else -0.5
    if a == 1 and q in (1, 2):
        reward -= 0.5
    if a == 0:
        reward += (0.5 if prev == 1 else 0.0) - (1.0 if q in (1, 2) else 0.0)
    if t == horizon - 1 and a != 0:
        reward -= 1.0 + (1.0 if following in (1, 2) else 0.0)
    return reward, following


def oracle_log_pi0(u, v, t, prev, q, horizon, G):
    logits = []
    for a in range(20):
        x = G[prev, a]
        if a >= 4 and (a - 4) // 4 == u:
            x += 0.6
        if a >= 4 and (a - 4) % 4 == v:
            x -= 0.6
        if a == 2:
            x += 0.6 if q == 0 else -1.0
        if a == 3:
            x += 1.2 if q in (1, 2) else -1.5
        if a == 1:
            x += 0.9
        if a == 0:
            x = -6.0 if t < 4 else -1.2 + 2.5 * t / horizon + (0.8 if prev == 1 else 0.0)
        if a == prev:
            x -= 0.5
        logits.append(x)
    return np.array(logits) - np.log(np.exp(logits).sum())


def random_policy(world, seed, scale=1.0):
    """A policy table that is neither pi0 nor near pi*."""
    logits = world.log_pi0 + scale * np.random.default_rng(seed).standard_normal(world.log_pi0.shape)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def rollouts(world, log_policy, n, seed):
    rng = np.random.default_rng(seed)
    prompts = world.prompts(rng, n)
    tokens, mask = world.sample(log_policy, prompts, rng)
    return prompts, tokens, mask


# ---- The published figures


def test_published_figures():
    best = WORLD.solve()
    assert (round(best.J0, 3), round(best.Jstar, 3)) == (-2.328, 2.426)
    at_best, at_pi0 = WORLD.evaluate(best.log_pistar), WORLD.evaluate(best.log_pi0)
    assert round(at_best["gold_return"], 3) == 5.586
    assert round(at_best["kl"], 2) == 6.32
    assert round(at_best["length"], 1) == 20.3
    assert round(at_pi0["length"], 1) == 18.2
    assert at_pi0["kl"] == 0.0
    np.testing.assert_allclose(at_best["J"], best.Jstar, atol=1e-10)  # two roads: forward visitation, backward DP
    np.testing.assert_allclose(at_pi0["J"], best.J0, atol=1e-10)


def test_labels_agree_with_the_sign_of_the_gold_difference_as_often_as_published():
    rng = np.random.default_rng(0)
    prompts = WORLD.prompts(rng, 16384)
    a, b = (WORLD.returns(prompts, *WORLD.sample_pi0(prompts, rng)) for _ in range(2))
    preferred = WORLD.label(a, b, rng)
    assert preferred.shape == (16384,) and preferred.dtype == bool
    assert abs((preferred == (a > b)).mean() - 0.86) < 0.01
    p = 1 / (1 + np.exp(-(a - b).astype(float)))
    bayes_loss = -np.where(preferred, np.log(p), np.log1p(-p)).mean()
    assert abs(bayes_loss - 0.31) < 0.01


def test_labels_follow_the_sigmoid():
    n = 40000
    wins = WORLD.label(np.full(n, 1.5), np.full(n, 0.5), np.random.default_rng(0)).mean()
    assert abs(wins - 1 / (1 + np.exp(-1.0))) < 4 * np.sqrt(0.2 / n)
    assert WORLD.label(np.array([5e3, -5e3]), np.zeros(2), np.random.default_rng(0)).tolist() == [True, False]


# ---- Tables and rollouts against the loop


def test_rewards_and_classes_of_rollouts_match_the_loop():
    prompts, tokens, mask = rollouts(WORLD, WORLD.log_pi0, 400, seed=1)
    # responses that pi0 hardly ever writes: uniform tokens, no EOS, so that every automaton edge and the cut are met
    wild = np.random.default_rng(2).integers(1, 20, (400, 24)).astype(np.int32)
    wild[::2] = np.where(np.random.default_rng(3).random((200, 24)) < 0.6, wild[::2] % 3 + 1, wild[::2])
    prompts, tokens = np.concatenate([prompts, prompts]), np.concatenate([tokens, wild])
    mask = np.concatenate([mask, np.ones_like(mask)])
    mu, mv, _ = oracle_draws(0)
    expected, seen = np.zeros(tokens.shape), set()
    for i, (x, row, real) in enumerate(zip(prompts, tokens, mask, strict=True)):
        u, v, prev, q = mu[x[0] - 20], mv[x[1] - 20], 1, 0
        assert WORLD.classes(x[None])[0] == 4 * u + v
        for t in range(real.sum()):
            expected[i, t], following = oracle_step(u, v, t, prev, q, row[t], 24)
            seen.add((q, following))
            prev, q = row[t], following
    assert seen == {(0, 0), (0, 1), (1, 1), (1, 2), (1, 0), (2, 2), (2, 3), (2, 0), (3, 3)}
    rewards = WORLD.token_rewards(prompts, tokens, mask)
    assert rewards.dtype == np.float32
    np.testing.assert_allclose(rewards, expected, atol=1e-6)
    np.testing.assert_allclose(WORLD.returns(prompts, tokens, mask), expected.sum(1), atol=1e-5)


def test_a_hand_worked_response():
    mu, mv, _ = oracle_draws(0)
    x1, x2 = list(mu).index(2), list(mv).index(1)
    prompt = np.array([[20 + x1, 20 + x2, 20, 27]])
    words = [OPEN, 4 + 4 * 2 + 2, 4 + 4 * 2 + 3, CLOSE, SEP, EOS]  # topic 2 in styles 2 and 3
    tokens, mask = np.full((1, 24), PAD), np.arange(24)[None] < 6
    tokens[0, :6] = words
    hand = [-0.4, 0.4, 0.7, 2.9, -0.1, 0.4]
    np.testing.assert_allclose(WORLD.token_rewards(prompt, tokens, mask)[0, :6], hand, atol=1e-6)
    np.testing.assert_allclose(WORLD.returns(prompt, tokens, mask), [3.9], atol=1e-6)
    assert WORLD.describe(prompt[0], tokens[0]) == "topic 2, not style 1: OPEN t2s2 t2s3 CLOSE SEP EOS"
    assert gold.TOKEN_NAMES[20] == "x0" and gold.TOKEN_NAMES[PAD] == "PAD" and len(gold.TOKEN_NAMES) == PAD + 1


@pytest.mark.parametrize("world", [WORLD, World(seed=7, horizon=9)])
def test_tables_match_the_loop(world):
    *_, G = oracle_draws(world.seed)
    rng = np.random.default_rng(4)
    for c, t, prev, q in zip(*(rng.integers(0, k, 300) for k in (16, world.horizon, 20, 4)), strict=True):
        u, v = divmod(c, 4)
        expected = oracle_log_pi0(u, v, t, prev, q, world.horizon, G)
        np.testing.assert_allclose(world.log_pi0[c, t, prev, q], expected, atol=1e-12)
        rewards = [oracle_step(u, v, t, prev, q, a, world.horizon)[0] for a in range(20)]
        np.testing.assert_allclose(world.rewards[c, t, prev, q], rewards, atol=1e-12)


# ---- Brute force: every response of four tokens


@pytest.mark.parametrize("cls", [1, 14])
def test_enumeration_gives_the_same_optimum_and_the_same_J_of_any_policy(cls):
    *_, G = oracle_draws(0)
    u, v = divmod(cls, 4)
    best, other = SHORT.solve(), random_policy(SHORT, 5)
    J_other = kl_other = length_other = 0.0

    def walk(t, prev, q, gained, log_pi, log_pi0):
        """sum over the continuations of pi0(rest) exp(R(rest)/beta); adds whole responses to the sums of `other`."""
        nonlocal J_other, kl_other, length_other
        log_p, weights = oracle_log_pi0(u, v, t, prev, q, 4, G), np.zeros(20)
        for a in range(20):
            reward, following = oracle_step(u, v, t, prev, q, a, 4)
            total, lp, lp0 = gained + reward, log_pi + other[cls, t, prev, q, a], log_pi0 + log_p[a]
            if a == EOS or t == 3:
                rest = 1.0
                J_other += np.exp(lp) * (total - BETA * (lp - lp0))
                kl_other += np.exp(lp) * (lp - lp0)
                length_other += np.exp(lp) * (t + 1)
            else:
                rest = walk(t + 1, a, following, total, lp, lp0)
            weights[a] = np.exp(log_p[a] + reward / BETA) * rest
        z = weights.sum()
        reached.append((t, prev, q, BETA * np.log(z), np.log(weights / z)))
        return z

    reached = []
    walk(0, SEP, 0, 0.0, 0.0, 0.0)
    assert len(reached) == 1 + 19 + 19**2 + 19**3
    for t, prev, q, value, log_pistar in reached:
        assert abs(best.V[cls, t, prev, q] - value) < 1e-10
        assert np.abs(best.log_pistar[cls, t, prev, q] - log_pistar).max() < 1e-10
    # evaluate() averages over classes: give the other classes pi0 and compare the difference to pi0 everywhere
    mixed = SHORT.log_pi0.copy()
    mixed[cls] = other[cls]
    exact, base = SHORT.evaluate(mixed), SHORT.evaluate(SHORT.log_pi0)
    J_pi0 = float(
        (SHORT.occupancy(SHORT.log_pi0)[cls, ..., None] * np.exp(SHORT.log_pi0[cls]) * SHORT.rewards[cls]).sum()
    )
    np.testing.assert_allclose(16 * (exact["J"] - base["J"]) + J_pi0, J_other, atol=1e-9)
    np.testing.assert_allclose(16 * exact["kl"], kl_other, atol=1e-9)
    pi0_length = SHORT.occupancy(SHORT.log_pi0)[cls].sum()
    np.testing.assert_allclose(16 * (exact["length"] - base["length"]) + pi0_length, length_other, atol=1e-9)


# ---- Identities


def test_advantage_is_reward_plus_change_of_value_along_rollouts():
    best = WORLD.solve()
    prompts, tokens, mask = rollouts(WORLD, best.log_pi0, 500, seed=6)
    advantages = WORLD.exact_advantages(prompts, tokens, mask)
    assert advantages.dtype == np.float32 and not advantages[~mask].any()
    rewards, mu_mv = WORLD.token_rewards(prompts, tokens, mask), oracle_draws(0)
    for i in range(500):
        u, v, prev, q = mu_mv[0][prompts[i, 0] - 20], mu_mv[1][prompts[i, 1] - 20], 1, 0
        total = 0.0
        for t in range(mask[i].sum()):
            a, here = tokens[i, t], (4 * u + v, t, prev, q)
            prev, q = a, oracle_step(u, v, t, prev, q, a, 24)[1]
            after = best.V[4 * u + v, t + 1, prev, q] if mask[i, t:].sum() > 1 else 0.0
            assert abs(advantages[i, t] - (rewards[i, t] + after - best.V[here])) < 1e-5
            assert abs(advantages[i, t] - BETA * (best.log_pistar[here][a] - best.log_pi0[here][a])) < 1e-5
            total += advantages[i, t]
        assert abs(total - (rewards[i].sum() - best.V[4 * u + v, 0, SEP, 0])) < 1e-4  # telescopes


@pytest.mark.parametrize("beta", [0.2, 0.5, 2.0])
def test_performance_difference_of_a_random_policy(beta):
    world = World(seed=3, beta=beta)
    best, policy = world.solve(), random_policy(world, 8)
    kl = (np.exp(policy) * (policy - best.log_pistar)).sum(-1)
    regret = beta * (world.occupancy(policy) * kl).sum() / 16
    assert regret > 0.1
    np.testing.assert_allclose(best.Jstar - world.evaluate(policy)["J"], regret, atol=1e-9)
    np.testing.assert_allclose(np.exp(best.log_pistar).sum(-1), 1.0, atol=1e-12)
    assert world.solve(beta) is best and world.solve(beta / 2).Jstar > best.Jstar


def test_open_costs_now_and_pays_later():
    best = WORLD.solve()
    assert WORLD.rewards[..., OPEN].max() == pytest.approx(-0.4)
    useful = best.A[:, :, 4:, 0, OPEN]  # after a content token, no segment open
    assert useful[:, 13:21].min() > 0
    assert (useful[:, :13] > 0).mean() > 0.9
    assert best.A[:, 22:, :, 0, OPEN].max() < 0  # too late to close it


# ---- Sampling


def test_sampled_frequencies_match_the_tables():
    prompts, tokens, mask = rollouts(WORLD, WORLD.log_pi0, 32768, seed=9)
    assert tokens.dtype == np.int32 and mask.dtype == bool
    assert (tokens[~mask] == PAD).all() and (np.isin(tokens[mask], range(20))).all()
    lengths = mask.sum(1)
    assert (tokens[np.arange(len(tokens)), lengths - 1][lengths < 24] == EOS).all()
    # expected counts by walking the oracle's automaton: at each visited state, the table's probabilities
    p = np.exp(WORLD.policy_logps(WORLD.log_pi0, prompts, tokens, mask))
    hit = tokens[..., None] == np.arange(20)
    prev = np.concatenate([np.full((len(tokens), 1), SEP), tokens[:, :-1]], 1)
    groups = {
        "t": np.broadcast_to(np.arange(24), mask.shape),
        "prev": prev,
        "class": np.broadcast_to(WORLD.classes(prompts)[:, None], mask.shape),
    }
    for group in groups.values():
        member = (group[mask][:, None] == np.arange(24)).astype(float)
        expected, counts, variance = (member.T @ x[mask] for x in (p, hit, p * (1 - p)))
        z = (counts - expected)[variance > 5] / np.sqrt(variance[variance > 5])
        assert np.abs(z).max() < 5 and 0.8 < z.std() < 1.2
    # and the states themselves are visited as often as the forward recursion says
    visits = WORLD.occupancy(WORLD.log_pi0).mean(0).sum((1, 2))  # [t]: probability of being alive
    assert np.abs(mask.mean(0) - visits).max() < 5 * 0.5 / np.sqrt(32768)
    by_prev = WORLD.occupancy(WORLD.log_pi0).mean(0)[12].sum(-1)
    sampled = np.bincount(prev[mask[:, 12], 12], minlength=20)[:20] / 32768
    assert np.abs(sampled - by_prev).max() < 5 * np.sqrt(by_prev.max() / 32768)


def test_prompts_are_uniform_and_cover_every_class():
    prompts = WORLD.prompts(np.random.default_rng(0), 16000)
    assert prompts.shape == (16000, 4) and prompts.dtype == np.int32
    for column in prompts.T:
        assert np.abs(np.bincount(column, minlength=28)[20:] - 2000).max() < 5 * np.sqrt(2000)
    everyone = np.array(list(itertools.product(range(20, 28), repeat=2)))
    everyone = np.concatenate([everyone, np.full_like(everyone, 20)], 1)
    assert np.bincount(WORLD.classes(everyone)).tolist() == [4] * 16


def test_the_seed_decides_everything():
    same, other = World(seed=0), World(seed=1)
    assert same == WORLD and hash(same) == hash(WORLD)
    np.testing.assert_array_equal(same.log_pi0, WORLD.log_pi0)
    assert np.abs(other.log_pi0 - WORLD.log_pi0).max() > 0.1
    first, again, third = (rollouts(WORLD, WORLD.log_pi0, 64, seed) for seed in (3, 3, 4))
    chex.assert_trees_all_equal(first, again)
    assert (first[1] != third[1]).any()
    prompts = first[0]
    chex.assert_trees_all_equal(  # sample_pi0 is sample of pi0's table
        WORLD.sample_pi0(prompts, np.random.default_rng(5)),
        WORLD.sample(WORLD.log_pi0, prompts, np.random.default_rng(5)),
    )


# ---- The score


def test_score_of_pi0_is_share_0_and_of_pistar_share_1():
    best = WORLD.solve()
    at_best = rollouts(WORLD, best.log_pistar, 1024, seed=10)
    top = WORLD.score(WORLD.policy_logps(best.log_pistar, *at_best), *at_best)
    assert top["share"] == pytest.approx(1.0, abs=1e-9) and top["share"] <= 1.0
    assert top["J"] == pytest.approx(best.Jstar, abs=1e-9)
    at_pi0 = rollouts(WORLD, best.log_pi0, 32768, seed=11)
    bottom = WORLD.score(WORLD.policy_logps(best.log_pi0, *at_pi0), *at_pi0)
    assert 0 < bottom["share_se"] < 0.004
    assert abs(bottom["share"]) < 4 * bottom["share_se"]
    assert bottom["kl"] == pytest.approx(0.0, abs=1e-9)
    # exactly, not only on samples: the same formula summed over every state
    regret = (
        BETA
        * (WORLD.occupancy(best.log_pi0) * (np.exp(best.log_pi0) * (best.log_pi0 - best.log_pistar)).sum(-1)).sum()
        / 16
    )
    assert 1 - regret / (best.Jstar - best.J0) == pytest.approx(0.0, abs=1e-10)


def test_score_agrees_with_exact_evaluation_and_states_its_own_error():
    policy = random_policy(WORLD, 12, scale=0.7)
    exact = WORLD.evaluate(policy)
    scores = []
    for seed in range(20):
        prompts, tokens, mask = rollouts(WORLD, policy, 1024, seed=100 + seed)
        logits = WORLD.policy_logps(policy, prompts, tokens, mask) + 3.0  # logits, not log-probabilities
        scores.append(WORLD.score(logits.astype(np.float32), prompts, tokens, mask))
    exact |= {"gold_return_exact": exact["gold_return"]}
    best = WORLD.solve()
    exact |= {"share": (exact["J"] - best.J0) / (best.Jstar - best.J0)}
    for name, value in exact.items():
        got, error = (np.array([s[key] for s in scores]) for key in (name, f"{name}_se"))
        assert abs(got.mean() - value) < 4 * error.mean() / np.sqrt(20), name
        assert 0.5 < got.std(ddof=1) / error.mean() < 1.7, name  # the standard error is one
    for s in scores:
        assert s["gold_return_exact"] == pytest.approx(s["J"] + BETA * s["kl"], abs=1e-9)
        assert s["share"] < 1 and all(type(x) is float for x in s.values())


def test_share_never_passes_1_even_for_logits_that_did_not_draw_the_states():
    prompts, tokens, mask = rollouts(WORLD, WORLD.log_pi0, 256, seed=13)
    pistar = WORLD.policy_logps(WORLD.solve().log_pistar, prompts, tokens, mask)
    rng = np.random.default_rng(14)
    for scale in (0.0, 1e-9, 1e-3, 1.0, 30.0):
        share = WORLD.score(pistar + scale * rng.standard_normal(pistar.shape), prompts, tokens, mask)["share"]
        assert share <= 1.0
    pi0 = WORLD.policy_logps(WORLD.log_pi0, prompts, tokens, mask)
    for shift in range(5):  # rounding alone must not give a negative KL
        assert 0 <= WORLD.score(pi0 + shift / 3, prompts, tokens, mask)["kl"] < 1e-12
    greedy = np.where(pistar == pistar.max(-1, keepdims=True), 0.0, -np.inf)
    score = WORLD.score(greedy, prompts, tokens, mask)
    assert np.isfinite(score["J"]) and score["share"] < 1
    one = np.argmax(pistar, -1)[..., None]  # by hand: KL of a point mass is -log of the other's probability
    by_hand = -(np.take_along_axis(pistar, one, -1)[..., 0] * mask).sum(1).mean()
    assert score["J"] == pytest.approx(WORLD.solve().Jstar - BETA * by_hand, abs=1e-9)


def test_what_stands_behind_the_end_changes_nothing():
    prompts, tokens, mask = rollouts(WORLD, WORLD.log_pi0, 64, seed=15)
    logits = WORLD.policy_logps(WORLD.log_pi0, prompts, tokens, mask)
    junk, noisy = np.where(mask, tokens, 31), np.where(mask[..., None], logits, np.nan)
    assert WORLD.score(noisy, prompts, junk, mask) == WORLD.score(logits, prompts, tokens, mask)
    for f in (WORLD.token_rewards, WORLD.returns, WORLD.exact_advantages):
        np.testing.assert_array_equal(f(prompts, junk, mask), f(prompts, tokens, mask))


# ---- Bad input


def test_bad_input_is_said_in_one_sentence():
    prompts, tokens, mask = rollouts(WORLD, WORLD.log_pi0, 8, seed=16)
    logits = WORLD.policy_logps(WORLD.log_pi0, prompts, tokens, mask)
    cut = mask.copy()
    cut[3, mask[3].sum() - 1] = False  # the response that never ended
    foreign = tokens.copy()
    foreign[5, 0] = 25
    late = tokens.copy()
    late[2, 0] = EOS
    with pytest.raises(UserError, match="rollout 3 is no complete response"):
        WORLD.returns(prompts, tokens, cut)
    with pytest.raises(UserError, match="rollout 5"):
        WORLD.returns(prompts, foreign, mask)
    with pytest.raises(UserError, match="rollout 2"):
        WORLD.token_rewards(prompts, late, mask)
    with pytest.raises(UserError, match="rollout 0"):
        WORLD.returns(prompts, tokens, np.zeros_like(mask))
    with pytest.raises(UserError, match=r"shape \[8, 24\]"):
        WORLD.returns(prompts, tokens[:, :20], mask[:, :20])
    with pytest.raises(UserError, match=r"20\.\.27"):
        WORLD.classes(prompts - 10)
    with pytest.raises(UserError, match=r"\[8, 24, 32\]"):
        WORLD.score(np.zeros((8, 24, 32)), prompts, tokens, mask)
    with pytest.raises(UserError, match="NaN"):
        WORLD.score(np.where(np.arange(20) == 3, np.nan, logits), prompts, tokens, mask)
    with pytest.raises(UserError, match="at least 2"):
        WORLD.score(logits[:1], prompts[:1], tokens[:1], mask[:1])
    with pytest.raises(UserError, match=r"0\.\.19"):
        WORLD.describe(prompts[0], [OPEN, 25])
    for bad in ({"horizon": 0}, {"beta": 0.0}, {"seed": -1}, {"beta": float("nan")}):
        with pytest.raises(UserError, match="gold world needs"):
            World(**bad)


def test_numpy_alone_is_loaded():
    code = "import sys, rto_jax.gold; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
