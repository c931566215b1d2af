"""RTO's theory as commands: the searches, Algorithm 1 and its variant against enumeration, and the run end to end."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import exact, theory
from experiments.common import main
from rto_jax.errors import UserError
from rto_jax.evaluation import bootstrap_interval
from rto_jax.losses import bradley_terry_loss

MDP = exact.random_mdp(
    np.random.default_rng(0), states=4, actions=3, horizon=4, features=5, prompts=2, beta=0.5
)  # fmt: skip
THETA = 3 * np.random.default_rng(1).normal(size=5) / 5**0.5
REWARDS = MDP.features @ THETA
SHAPE = (MDP.horizon, *MDP.following.shape)
UNIFORM = np.full(SHAPE, -np.log(MDP.actions))
BEST, OPTIMUM = exact.soft_plan(MDP, REWARDS)


def random_policy(seed):
    return exact.log_softmax(2 * np.random.default_rng(seed).normal(size=SHAPE))


def responses():
    """Every response: (prompt's state, [(position, state, token)])."""
    for prompt in MDP.prompts:
        for tokens in itertools.product(range(MDP.actions), repeat=MDP.horizon):
            state, steps = prompt, []
            for h, token in enumerate(tokens):
                steps.append((h, state, token))
                state = MDP.following[state, token]
            yield prompt, steps


def expectation(log_pi, of_step):
    """E_π Σ_h of_step(h, s, a), by enumeration."""
    return sum(
        np.exp(sum(log_pi[step] for step in steps)) * sum(of_step(*step) for step in steps) / len(MDP.prompts)
        for _, steps in responses()
    )


def random_conditionals(rng, a, h):
    return [rng.dirichlet([0.4] * a, size=a**k) for k in range(h)]


def data(n, seed=0, log_pi=UNIFORM):
    return exact.sample_pairs(MDP, log_pi, THETA, n, np.random.default_rng(seed))


# ---- Proposition 3.2 -------------------------------------------------------------------------------------------------


def test_the_papers_example_takes_at_most_four_responses():
    """Figure 2: A = 2, H = 3, ξ = 1; the best leaf has 1/2, one 1/4, the others less than 1/8."""
    conditionals = theory.figure_2()
    prefixes = exact.leaf_probabilities(conditionals)
    leaves = np.sort(prefixes[-1])
    np.testing.assert_allclose(leaves[-2:], [1 / 4, 1 / 2])
    assert leaves[-3] < 1 / 8
    assert exact.stated_bound(2, 3, 0.5) == 4 == exact.count_separating(prefixes)
    rng = np.random.default_rng(0)
    found = [exact.best_first(exact.table_judge(conditionals), 2, 3, rng) for _ in range(200)]
    assert {tuple(map(int, y)) for y, _ in found} == {(0, 0, 0)}
    assert max(queries for _, queries in found) == 4


def test_the_counter_example():
    """A = 2, H = 10, π*(y*) = 0.9: stated 2.2 responses, |N ∪ N*| = 11, and some searches need nearly all of them."""
    assert exact.planted_separating(2, 10, 0.9) == 11
    assert exact.stated_bound(2, 10, 0.9) == pytest.approx(2 / 0.9)
    assert exact.corrected_bound(2, 10, 0.9) == pytest.approx(20 / 0.9)
    rng = np.random.default_rng(0)
    queries = []
    for _ in range(400):
        target = rng.integers(2, size=10)
        answer, n = exact.best_first(exact.planted_judge(target, 0.9, 2), 2, 10, rng)
        assert (answer == target).all()
        queries.append(n)
    assert max(queries) in (10, 11)
    # 1 + H(A − 1)/2 in the mean: 1 and ten coins, of variance 1/4 each.
    assert abs(np.mean(queries) - 6) < 4 * np.sqrt(10 / 4 / 400)


def test_a_factor_of_h_is_missing_where_xi_is_an_integer():
    """Uniform for k tokens, certain from then on: A^k (1 + (A − 1)(H − k)) against A^(k+1)."""
    a, k, h = 3, 2, 6
    conditionals = [np.full((a**d, a), 1 / a) if d < k else np.tile([1.0, 0, 0], (a**d, 1)) for d in range(h)]
    count = exact.count_separating(exact.leaf_probabilities(conditionals))
    assert count == a**k * (1 + (a - 1) * (h - k)) == 81
    assert exact.stated_bound(a, h, a**-k) == pytest.approx(27)
    assert count <= exact.corrected_bound(a, h, a**-k)


@pytest.mark.parametrize(("a", "h", "p"), [(2, 10, 0.9), (2, 7, 0.1), (3, 5, 0.05), (4, 4, 0.3), (5, 3, 0.02)])
def test_the_planted_judge_is_the_tree_that_is_counted(a, h, p):
    target = np.random.default_rng(0).integers(a, size=h)
    judge = exact.planted_judge(target, p, a)
    leaves = np.exp([judge(np.array(y)).sum() for y in itertools.product(range(a), repeat=h)])
    prefixes = [leaves.reshape(a**k, -1).sum(1) for k in range(h + 1)]
    assert leaves.sum() == pytest.approx(1) and leaves.max() == pytest.approx(p)
    assert exact.count_separating(prefixes) == exact.planted_separating(a, h, p)


@pytest.mark.parametrize(("a", "h"), [(2, 6), (3, 4), (5, 2)])
def test_the_search_is_right_and_within_the_corrected_bound_for_any_judge(a, h):
    """It finds the argmax and reads at most |N ∪ N*| = 1 + (A − 1)·#{high inner nodes} ≤ min(H·A^(ξ+1), A^H)."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        conditionals = random_conditionals(rng, a, h)
        prefixes = exact.leaf_probabilities(conditionals)
        answer, queries = exact.best_first(exact.table_judge(conditionals), a, h, rng)
        assert np.ravel_multi_index(tuple(answer), (a,) * h) == prefixes[-1].argmax()
        best, count = prefixes[-1].max(), exact.count_separating(prefixes)
        high = sum((level >= best * (1 - 1e-9)).sum() for level in prefixes[:-1])
        assert queries <= count == 1 + (a - 1) * high
        assert count <= exact.corrected_bound(a, h, best)


def test_sentence_rewards_in_random_order():
    """(A^H + 1)/2 in the mean where π*(y*) ≥ 1/2; for any π*, the first moment at which nothing unread can be better."""
    rng = np.random.default_rng(0)
    p = np.array([0.6, *[0.4 / 31] * 31])
    queries = [exact.read_all_until_sure(p, rng) for _ in range(1_000)]
    assert min(queries) == 1 and max(queries) == 32
    assert abs(np.mean(queries) - 16.5) < 4 * np.sqrt((32**2 - 1) / 12 / 1_000)
    p = rng.dirichlet(np.ones(12))
    for seed in range(20):
        read = np.random.default_rng(seed).permutation(p)
        expected = next(n for n in range(1, 13) if read[n:].sum() <= read[:n].max())
        assert exact.read_all_until_sure(p, np.random.default_rng(seed)) == expected


# ---- Algorithm 1 -----------------------------------------------------------------------------------------------------


def test_soft_planning_is_the_gibbs_distribution_over_responses():
    weights = dict.fromkeys(MDP.prompts, 0.0)
    for prompt, steps in responses():
        weights[prompt] += np.exp(sum(MDP.ref_logps[s, a] + REWARDS[s, a] / MDP.beta for _, s, a in steps))
    assert pytest.approx(np.mean([MDP.beta * np.log(w) for w in weights.values()]), abs=1e-12) == BEST
    for prompt, steps in responses():
        logp = sum(MDP.ref_logps[s, a] + REWARDS[s, a] / MDP.beta for _, s, a in steps) - np.log(weights[prompt])
        assert sum(OPTIMUM[step] for step in steps) == pytest.approx(logp, abs=1e-10)


def test_values_and_visits_are_those_of_enumeration():
    log_pi = random_policy(0)
    visits = exact.visits(MDP, log_pi)
    np.testing.assert_allclose(visits.sum((1, 2)), 1)
    probe = np.random.default_rng(5).normal(size=SHAPE)
    assert (visits * probe).sum() == pytest.approx(expectation(log_pi, lambda h, s, a: probe[h, s, a]), abs=1e-12)
    charged = expectation(
        log_pi, lambda h, s, a: REWARDS[s, a] - MDP.beta * (log_pi[h, s, a] - MDP.ref_logps[s, a])
    )  # fmt: skip
    assert exact.policy_value(MDP, log_pi, REWARDS) == pytest.approx(charged, abs=1e-12)
    assert exact.policy_value(MDP, OPTIMUM, REWARDS) == pytest.approx(BEST, abs=1e-12)
    for seed in range(5):
        assert exact.policy_value(MDP, random_policy(seed), REWARDS) < BEST - 1e-3


def test_the_performance_difference_lemma():
    """Lemma A.2: V^π − V^π' = E_{d^π}[Q^π' − V^π' − β log π], with β log π_ref in Q."""
    pi, other = random_policy(0), random_policy(1)
    q, v, following = np.zeros(SHAPE), np.zeros(SHAPE[:2]), np.zeros(SHAPE[1])
    for h in reversed(range(MDP.horizon)):
        q[h] = REWARDS + MDP.beta * MDP.ref_logps + following[MDP.following]
        v[h] = following = (np.exp(other[h]) * (q[h] - MDP.beta * other[h])).sum(-1)
    right = (exact.visits(MDP, pi) * (q - v[..., None] - MDP.beta * pi)).sum()
    left = exact.policy_value(MDP, pi, REWARDS) - exact.policy_value(MDP, other, REWARDS)
    assert left == pytest.approx(right, abs=1e-12)


def test_pairs_are_drawn_by_the_policy_and_labelled_by_bradley_terry():
    log_pi = random_policy(2)
    z = data(40_000, log_pi=log_pi)
    # E zzᵀ is free of labels: E_prompt[2 Cov_π(Σφ)].
    second = np.zeros((5, 5))
    for prompt in MDP.prompts:
        rows = [(steps, np.exp(sum(log_pi[x] for x in steps))) for start, steps in responses() if start == prompt]
        totals = np.array([sum(MDP.features[s, a] for _, s, a in steps) for steps, _ in rows])
        second += np.cov(totals.T, aweights=[p for _, p in rows], ddof=0)  # 2 Cov, half of the prompts
    np.testing.assert_allclose(z.T @ z / len(z), second, atol=0.06)
    # σ(z·θ*) is how often the winner was to win: the residuals of the model are uncorrelated with z.
    signs = np.random.default_rng(3).choice([-1, 1], size=len(z))
    x, y = signs[:, None] * z, signs > 0
    residual = x.T @ (y - 1 / (1 + np.exp(-x @ THETA))) / len(z)
    assert np.abs(residual).max() < 0.02 and np.abs(x.T @ (y - 0.5) / len(z)).max() > 0.1


@pytest.mark.parametrize(("n", "bound"), [(2_000, 50.0), (2_000, 1.0), (8, 5.0), (3, 2.0)])
def test_the_mle_satisfies_its_conditions_by_the_shipped_loss(n, bound):
    """−∇L(θ) = μθ with μ ≥ 0 for L the sum of `bradley_terry_loss`; μ = 0 inside the ball. L is convex: that is all."""
    z = data(n)
    theta = exact.fit_mle(z, bound)
    with jax.enable_x64(True):
        loss = lambda t: bradley_terry_loss(jnp.float32(z) @ t, jnp.zeros(n, jnp.float32)).sum()  # noqa: E731
        down = -np.asarray(jax.grad(loss)(jnp.float32(theta)), np.float64)
    norm = np.linalg.norm(theta)
    assert norm <= bound + 1e-9
    if norm < bound * (1 - 1e-6):
        np.testing.assert_allclose(down, 0, atol=2e-2)
    else:
        np.testing.assert_allclose(down, down @ theta / norm**2 * theta, atol=2e-2)
        assert down @ theta > 0


def test_the_mle_is_where_projected_gradient_ends():
    z, bound = data(30), 2.0
    theta = np.zeros(5)
    for _ in range(20_000):
        theta = theta + 0.02 * z.T @ (1 / (1 + np.exp(z @ theta)))
        theta *= min(1, bound / np.linalg.norm(theta))
    np.testing.assert_allclose(exact.fit_mle(z, bound), theta, atol=1e-4)


def test_lowest_point_of_ball_and_ellipsoid():
    """Against a fine grid in the plane, where one or the other or both are touched."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(*[np.linspace(-2, 2, 201)] * 2)
    grid = np.stack([x.ravel(), y.ravel()], -1)
    touched = set()
    for _ in range(30):
        root = rng.normal(size=(2, 2))
        sigma, centre, g = root @ root.T + 0.2 * np.eye(2), rng.normal(size=2), rng.normal(size=2)
        centre *= min(1, 1.8 / np.linalg.norm(centre))
        varrho, bound = rng.choice([0.3, 1.0, 6.0]), 2.0
        off = np.einsum("ni,ij,nj->n", grid - centre, sigma, grid - centre)
        inside = (off <= varrho**2) & (np.linalg.norm(grid, axis=1) <= bound)
        theta = exact.lowest(g, centre, sigma, varrho, bound)
        length, distance = np.linalg.norm(theta), np.sqrt((theta - centre) @ sigma @ (theta - centre))
        assert length <= bound + 1e-6 and distance <= varrho + 1e-6
        if inside.any():
            assert g @ theta <= (grid[inside] @ g).min() + 1e-9
        touched.add((length > bound - 1e-6, distance > varrho - 1e-6))
    assert touched == {(False, True), (True, True), (True, False)}


def test_the_value_level_solution_is_a_saddle_point():
    z = data(50)
    theta, sigma, bound, varrho = exact.fit_mle(z, 5.0), exact.covariance(z, 1.0), 5.0, 3.0
    log_pi, worst, gap = exact.value_level(MDP, theta, sigma, varrho, bound, gap=1e-8)
    assert gap <= 1e-8
    value = exact.policy_value(MDP, log_pi, MDP.features @ worst)
    assert value == pytest.approx(exact.soft_plan(MDP, MDP.features @ worst)[0], abs=1e-10)
    rng, root, seen = np.random.default_rng(0), np.linalg.cholesky(np.linalg.inv(sigma)), 0
    for _ in range(300):
        step = rng.normal(size=5)
        other = theta + varrho * rng.random() ** 0.2 * root @ step / np.linalg.norm(step)
        if np.linalg.norm(other) <= bound:
            seen += 1
            assert exact.policy_value(MDP, log_pi, MDP.features @ other) >= value - 1e-7
            assert exact.soft_plan(MDP, MDP.features @ other)[0] >= value - 1e-7
    assert seen > 100
    plain = exact.value_level(MDP, theta, sigma, 1e-4, bound, gap=1e-8)[0]
    np.testing.assert_allclose(plain, exact.soft_plan(MDP, MDP.features @ theta)[1], atol=1e-3)


def test_derivatives_of_the_value_are_those_of_finite_differences():
    theta = np.random.default_rng(7).normal(size=5)
    value, slope, curve = exact.value_derivatives(MDP, theta)
    best, log_pi = exact.soft_plan(MDP, MDP.features @ theta)
    assert value == pytest.approx(best, abs=1e-12)
    np.testing.assert_allclose(slope, np.einsum("hsa,sad->d", exact.visits(MDP, log_pi), MDP.features), atol=1e-12)
    steps = 1e-5 * np.eye(5)
    sides = [[exact.value_derivatives(MDP, theta + sign * step)[1] for step in steps] for sign in (1, -1)]
    np.testing.assert_allclose(curve, (np.array(sides[0]) - sides[1]) / 2e-5, atol=1e-8)


def test_both_theorems_hold_where_theta_is_covered():
    offline = theory.OfflineConfig(varrho=(0.0, 2.0))
    for seed, policy in itertools.product(range(4), (UNIFORM, random_policy(0))):
        for n in (10, 100, 1_000):
            found = theory.fit_once(MDP, THETA, data(n, seed, policy), policy, offline)
            for kind in theory.KINDS:
                assert -1e-9 < found[f"{kind} covering"] <= found[f"bound {kind}"]
            assert found["bound value"] <= found["first term"]  # the norm of the mean, the mean of the norms
            assert found["token 0"] >= -1e-9 and found["gap"] <= 1e-6


def test_an_exact_reward_is_planned_without_regret():
    found = exact.soft_plan(MDP, exact.pessimistic_rewards(MDP, THETA, np.eye(5), 0.0))[1]
    assert exact.policy_value(MDP, found, REWARDS) == pytest.approx(BEST, abs=1e-12)


def test_centring_changes_norms_and_nothing_else():
    moved = exact.centred(MDP, UNIFORM)
    mean = np.einsum("hsa,sad->d", exact.visits(MDP, UNIFORM), moved.features)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(exact.soft_plan(moved, moved.features @ THETA)[1], OPTIMUM, atol=1e-12)
    args = UNIFORM, THETA, 50
    same = [exact.sample_pairs(m, *args, np.random.default_rng(0)) for m in (MDP, moved)]
    np.testing.assert_allclose(*same, atol=1e-12)
    assert np.abs(exact.norms(moved.features, np.eye(5)) - exact.norms(MDP.features, np.eye(5))).max() > 0.01


def test_one_feature_per_state_and_token_makes_the_first_theorem_vacuous():
    """However much data: Σ_a ‖φ(s_1, a)‖² ≥ 1/λ in Σ⁻¹, for z can't see what every response to the prompt has."""
    tree = MDP._replace(
        following=np.array([[1, 2], [3, 3], [3, 3], [3, 3]]), features=np.eye(8).reshape(4, 2, 8), horizon=2,
        ref_logps=np.full((4, 2), np.log(0.5)), prompts=np.array([0]),
    )  # fmt: skip
    for n in (100, 10_000):
        z = exact.sample_pairs(tree, np.full((2, 4, 2), np.log(0.5)), np.ones(8), n, np.random.default_rng(0))
        squares = exact.norms(tree.features, exact.covariance(z, 2.0)) ** 2
        assert squares[0].sum() >= 1 / 2.0 - 1e-9


# ---- Proposition C.2 -------------------------------------------------------------------------------------------------


def test_an_autoregressive_policy_is_better_by_a_half():
    assert exact.best_markov(*exact.proposition_c2()) == 1
    assert exact.best_sentence(*exact.proposition_c2()) == 0.5


def test_the_two_classes_coincide_with_deterministic_transitions():
    """And the best Markov policy, by trying all of them, is that of backward induction, whatever the transitions."""
    rng = np.random.default_rng(0)
    for seed in range(12):
        rewards, deterministic = rng.normal(size=(3, 2)), seed % 2 == 0
        chances = np.eye(3)[rng.integers(3, size=(3, 2))] if deterministic else rng.dirichlet(np.ones(3), size=(3, 2))
        value = np.zeros(3)
        for _ in range(3):
            value = (rewards + chances @ value).max(-1)
        markov, sentence = exact.best_markov(chances, rewards, 3), exact.best_sentence(chances, rewards, 3)
        assert markov == pytest.approx(value[0], abs=1e-12) and sentence <= markov + 1e-12
        if deterministic:
            assert sentence == pytest.approx(markov, abs=1e-12)


# ---- the run ---------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_evaluation_module():
    values = np.random.default_rng(0).exponential(size=(25, 1))
    (found,) = theory.bootstrap(values, 0)
    expected = bootstrap_interval(values[:, 0])
    np.testing.assert_allclose(list(found.values()), list(expected), rtol=0.03)
    sizes = np.array(theory.OfflineConfig(smallest=3, fit_from=4, largest=7).sizes, float)
    slope = theory.slope(theory.OfflineConfig(smallest=3, fit_from=4, largest=7))
    np.testing.assert_allclose(slope(7 * sizes**-0.5), [-0.5])


TINY = [
    "--preset=cheap", "--search.actions", "2", "3", "--search.horizons", "2", "4", "--search.probabilities", "0.5",
    "--search.responses=5", "--search.judges=2", "--search.exhaustive-depth=2", "--offline.seeds=2",
    "--offline.largest=7", "--offline.fit-from=6", "--deterministic=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The command, cut down to a second."""
    out = tmp_path_factory.mktemp("theory") / "run"
    main(theory.PRESETS, theory.run, theory.__doc__, [*TINY, "--out", str(out)])
    return out


def test_the_run_writes_json_table_and_figures(made):
    for name in theory.PARTS:
        about = json.loads((made / f"{name}.json").read_text())["about"]
        assert about["config"]["offline"]["seeds"] == 2 and {"git", "hardware", "seconds", "command"} <= set(about)
    table = (made / "table.md").read_text()
    assert all(word in table for word in ("Proposition 3.2", "| 2 | 10 | 0.9 |", "Theorem B.1", "| 1 | 0.5 |"))
    assert "nan" not in table
    for name in ("sample_complexity", "suboptimality"):
        assert "</svg>" in (made / f"{name}.svg").read_text()


def test_table_and_figures_are_drawn_from_the_json_alone(made, tmp_path):
    for name in theory.PARTS:
        (tmp_path / f"{name}.json").write_text((made / f"{name}.json").read_text())
    main(theory.PRESETS, theory.run, theory.__doc__, ["--draw", "--out", str(tmp_path)])
    for name in ("table.md", "sample_complexity.svg", "suboptimality.svg"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes()
    changed = json.loads((tmp_path / "stochastic.json").read_text())
    changed["example"]["predetermined"] = 0.123
    (tmp_path / "stochastic.json").write_text(json.dumps(changed))
    parts = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in theory.PARTS}
    assert "| 0.123 |" in theory.table(parts)


def test_a_part_is_kept_and_the_others_come_out_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "draw", lambda out: "")
    (tmp_path / "algorithm1.json").write_text((made / "algorithm1.json").read_text())
    before = (tmp_path / "algorithm1.json").stat().st_mtime_ns
    main(theory.PRESETS, theory.run, theory.__doc__, [*TINY, "--resume", "--out", str(tmp_path)])
    assert (tmp_path / "algorithm1.json").stat().st_mtime_ns == before
    for name in ("sample_complexity", "stochastic"):
        one, two = (json.loads((folder / f"{name}.json").read_text()) for folder in (made, tmp_path))
        assert {**one, "about": 0} == {**two, "about": 0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--draw", "--draw needs --out"),
        ("--offline.seeds 1", "--offline.seeds must be at least 2"),
        ("--offline.norm 9", "--offline.norm 9"),
        ("--offline.varrho -1", "--offline.varrho must be at least 0"),
        ("--search.actions 1", "--search.actions must be at least 2"),
        ("--search.probabilities 1.5", "--search.probabilities must be"),
        ("--preset none", "--preset none is not one of theory, cheap"),
    ],
)
def test_bad_flags_end_in_one_sentence(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(theory.PRESETS, theory.run, theory.__doc__, flags.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and "Traceback" not in error and error.count("\n") == 1


def test_results_are_not_overwritten_and_not_invented(made, tmp_path):
    config = theory.PRESETS["cheap"][1]
    with pytest.raises(UserError, match="already holds results"):
        theory.run(theory.dataclasses.replace(config, out=str(made)))
    with pytest.raises(UserError, match="another configuration"):
        theory.run(theory.dataclasses.replace(config, out=str(made), resume=True))
    with pytest.raises(UserError, match=r"holds no sample_complexity\.json"):
        theory.run(theory.dataclasses.replace(config, out=str(tmp_path), draw=True))


@pytest.mark.slow
def test_the_cheap_preset_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments/theory.py"])
    main(theory.PRESETS, theory.run, theory.__doc__, ["--preset", "cheap", "--out", str(tmp_path / "run")])
    checks = json.loads((tmp_path / "run" / "algorithm1.json").read_text())["checks"]
    assert set(checks["violated"].values()) == {0}
