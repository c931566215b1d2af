"""r <-> Q*, Theorem 1 and tabular DPO: by hand, against enumeration of all responses, and against the library's loss."""

import numpy as np
import pytest

from experiments import bijection, data_scaling, study
from experiments.bijection import (
    ahead,
    at_the_end,
    errors_of_n_pairs,
    fit_dpo,
    gold_facts,
    log_ratios,
    preferences,
    q_of,
    random_tree,
    rewards_of,
    shaped,
    slopes,
    theorems,
    totals,
    tree,
)
from experiments.exact import log_softmax, log_sum_exp
from rto_jax import losses
from rto_jax.gold import World

BETA = 0.5


def test_one_token_by_hand():
    """π_ref = (½, ½), r = (1, 0), β = ½: V* = ½ log((e² + 1)/2), π* = (e², 1)/(e² + 1)."""
    ref, rewards = np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]])
    q = q_of(rewards, ref, beta=BETA)
    np.testing.assert_allclose(q, [[1 + 0.5 * np.log(0.5), 0.5 * np.log(0.5)]])
    np.testing.assert_allclose(BETA * log_sum_exp(q / BETA), [0.5 * np.log((np.e**2 + 1) / 2)])
    np.testing.assert_allclose(np.exp(log_softmax(q / BETA)), [[np.e**2 / (np.e**2 + 1), 1 / (np.e**2 + 1)]])
    np.testing.assert_allclose(rewards_of(q, ref, beta=BETA), rewards, atol=1e-15)


def test_two_tokens_by_hand():
    """Responses 00, 01, 10, 11 through states 0 (root), 1 (after 0), 2 (after 1)."""
    two, rewards = tree(2, 2), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    np.testing.assert_array_equal(totals(two, rewards), [4, 5, 7, 8])
    np.testing.assert_array_equal(at_the_end(two, rewards), [[0, 0], [4, 5], [7, 8]])
    np.testing.assert_array_equal(ahead(np.array([9.0, 1.0, 2.0]), 2), [[1, 2], [0, 0], [0, 0]])
    np.testing.assert_allclose(preferences(np.log([1.0, 3.0])), [[0.5, 0.25], [0.75, 0.5]])


def test_against_all_responses():
    """V*(s_0) = β log Σ_y π_ref(y) exp(R(y)/β), π*(y) ∝ π_ref(y) exp(R(y)/β)."""
    found, ref, rewards = random_tree(np.random.default_rng(0))
    q = q_of(rewards, ref, beta=BETA)
    weights = np.exp(totals(found, ref) + totals(found, rewards) / BETA)
    np.testing.assert_allclose(BETA * log_sum_exp(q[0] / BETA), BETA * np.log(weights.sum()))
    np.testing.assert_allclose(np.exp(totals(found, log_softmax(q / BETA))), weights / weights.sum())
    assert len(weights) == 81 and np.exp(totals(found, ref)).sum() == pytest.approx(1)


def test_shaping_shifts_every_response_by_the_root_s_potential():
    found, _, rewards = random_tree(np.random.default_rng(1))
    potentials = np.random.default_rng(2).normal(size=len(rewards))
    other = shaped(rewards, potentials)
    np.testing.assert_allclose(totals(found, other), totals(found, rewards) - potentials[0])
    assert np.abs(other - rewards).max() > 1


def test_the_theorems_hold_and_r_is_not_the_token_reward():
    facts, picture = theorems(np.random.default_rng(3))
    assert len(facts) == 8 and max(facts.values()) < 1e-9
    fitted, advantages, rewards = (np.array(picture[key]) for key in ("fitted", "advantages", "rewards"))
    np.testing.assert_allclose(fitted, advantages, atol=1e-4)  # rounded for the file
    assert np.abs(fitted - rewards).max() > 0.5


def test_fit_dpo_minimises_the_library_s_loss():
    """Its sum over the pairs, plus the ridge, is least where `fit_dpo` ends: every direction goes up."""
    rng = np.random.default_rng(4)
    found, ref, _ = random_tree(rng)
    winner, loser = rng.integers(81, size=(2, 200))
    wins = np.zeros((81, 81))
    np.add.at(wins, (winner, loser), 1)
    log_pi = fit_dpo(found, wins, ref, beta=BETA, ridge=0.25)

    def loss(theta):
        own, of_ref = totals(found, log_softmax(ref + theta)), totals(found, ref)
        rows = losses.dpo_loss(own[winner], own[loser], of_ref[winner], of_ref[loser], beta=BETA)
        return float(np.asarray(rows, float).sum() + 0.125 * (theta**2).sum())

    theta = log_pi - ref
    theta -= theta.mean(1, keepdims=True)  # the ridge's choice among the shifts that the policy does not show
    least = loss(theta)
    assert least < loss(np.zeros(theta.shape)) - 1
    for _ in range(5):
        step = rng.normal(size=theta.shape)
        up, down = loss(theta + 0.05 * step) - least, loss(theta - 0.05 * step) - least
        assert up > 0 and down > 0 and abs(up - down) < 0.1 * (up + down)


def test_more_pairs_bring_the_token_reward_nearer_to_a_star_not_to_r(monkeypatch):
    monkeypatch.setattr(bijection, "SIZES", (64, 65_536))
    found = errors_of_n_pairs(np.random.default_rng(5))
    (few, many), limit = found["A*"], found["limit of r"]
    assert many < 0.25 < few < 1 and found["r"][1] == pytest.approx(limit, abs=many) and limit > 0.5


def test_log_ratios_of_a_policy_have_mean_minus_kl():
    """E_ref[β log π/π_ref] = −β KL(π_ref ‖ π) (eq. 16), at most 0."""
    _, ref, rewards = random_tree(np.random.default_rng(6))
    log_pi = log_softmax(rewards)
    kl = (np.exp(ref) * (ref - log_pi)).sum(1)
    np.testing.assert_allclose((np.exp(ref) * log_ratios(log_pi, ref, beta=BETA)).sum(1), -BETA * kl)


def test_the_gold_world_s_tables_keep_the_theorems():
    facts = list(gold_facts(World(), np.random.default_rng(0), 64).values())
    assert max(facts[0], facts[2]) < 1e-12 and facts[1] < 1e-5
    assert 0.3 < facts[3] < 0.95 and 0.02 < facts[4] < 0.5


def test_slopes_by_hand():
    assert slopes([1, 4, 16, 64], np.array([[9.0, 8.0, 4.0, 2.0], [1.0, 1.0, 1.0, 1.0]]), 4) == pytest.approx([-0.5, 0], abs=1e-12)


def test_arms_are_those_of_data_scaling():
    theirs = data_scaling.arms("gold")
    for part, arm in bijection.arms("gold").items():
        assert arm.folder == theirs[f"RTO, {part} of preferences"].upstream["dpo"].folder
    assert bijection.arms("gold")["1"].folder == study.base_arms("gold")["DPO"].folder


def test_drawing_from_the_json_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bijection, "SIZES", (64, 512, 4096))
    told, picture = theorems(np.random.default_rng(7))
    curves = [errors_of_n_pairs(np.random.default_rng(seed)) for seed in (8, 9)]
    row = lambda error: {"error": error, "correlation": 1 - error / 2, "correlation_r": 0.5}  # noqa: E731
    found = {
        "tree": {"actions": 3, "horizon": 4, "beta": 0.5, "ridge": 0.25, "trees": 2}, "theorems": told, "picture": picture,
        "gold": gold_facts(World(), np.random.default_rng(0), 16), "sizes": [64, 512, 4096], "tabular": curves,
        "pairs": {"1/8": 8, "1": 64}, "trained": {"1/8": [row(0.8), row(0.8)], "1": [row(0.4), row(0.4)]},
    }  # fmt: skip
    text = bijection.draw(found, tmp_path)
    assert "distance to A* changes by −0.400 [−0.400, −0.400]" in text and "less that with r is 0.300 [0.300, 0.300]" in text
    assert "| r → Q* → r, trees |" in text and (tmp_path / "gold.svg").read_text().startswith("<?xml")
