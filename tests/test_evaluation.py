"""rto_jax.evaluation: hand-worked values, identities, slow oracles of the fits, recovery and coverage on simulated data."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rto_jax import evaluation
from rto_jax.evaluation import (
    bootstrap_interval,
    bradley_terry_fit,
    calibration,
    elo_win_rate,
    fit_overoptimisation,
    frontier,
    length_controlled_win_rate,
    reward_accuracy,
    style_covariates,
    win_rate,
)

NAN = np.nan
ELO = 400 / np.log(10)


def close(actual, desired, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ascend(x, y, weights, steps=30_000):
    """argmax of Σ w [y log σ(xc) + (1 − y) log σ(−xc)] by gradient ascent from 0, step 1/(bound of the curvature)."""
    c = np.zeros(x.shape[1])
    rate = 4 / np.linalg.eigvalsh((x * weights[:, None]).T @ x)[-1]
    for _ in range(steps):
        c = c + rate * x.T @ (weights * (y - sigmoid(x @ c)))
    return c


# ---- win rates -------------------------------------------------------------------------------------------------------


def test_win_rate_by_hand():
    # Averages of the two orders: 1, ½, ½, 0. Deviations ½, 0, 0, −½: variance ½/3, over n = 4.
    result = win_rate([1, 1, 0.5, 0], [1, 0, 0.5, 0])
    close(result, [0.5, math.sqrt(0.5 / 3 / 4), math.sqrt(0.25 / 4), 2 / 4, 1 / 4, 3 / 4])
    # One order: ¾ and ¼ are the judge's probabilities.
    result = win_rate([0.75, 0.25, 1, 1])
    close(result, [0.75, math.sqrt((0 + 0.25 + 2 * 0.0625) / 3 / 4), math.sqrt(0.1875 / 4), 0, NAN, NAN])


def test_binomial_error_of_the_papers():
    for n, error in ((100, 0.05), (256, 0.03125)):  # 0.05 and 0.031 in their notes
        coins = np.arange(n) % 2
        close(win_rate(coins).binomial_error, error)
        close(win_rate(coins).standard_error, error * math.sqrt(n / (n - 1)))  # of coins, the same but for n − 1


def test_a_judge_who_sees_only_the_place():
    first = np.ones(5)
    close(win_rate(first, 1 - first), [0.5, 0, math.sqrt(0.25 / 5), 1, 1, 0])
    close(win_rate(1 - first, first).position_bias, -1)
    close(win_rate(first, first)[-2:], [0, 1])


def test_win_rate_mirrors():
    a, b = np.random.default_rng(0).random((2, 50))
    ours, theirs = win_rate(a, b), win_rate(1 - a, 1 - b)
    close(ours.win_rate + theirs.win_rate, 1)
    close(ours[1:4] + ours[5:], theirs[1:4] + theirs[5:])
    close(ours.position_bias, -theirs.position_bias)
    close(win_rate(a, b)[:4], win_rate((a + b) / 2)[:4])


# ---- length control --------------------------------------------------------------------------------------------------


def test_length_control_by_hand():
    # Δ = −d, −d, d, d: std (n − 1) is d·√(4/3), so the covariate is ∓tanh(√3/2). Two values, two parameters: the fit
    # is exact, P = 3/4 where the model's answer is longer and 1/2 where it is shorter.
    result = length_controlled_win_rate([1, 0.5, 0.5, 0.5], [300, 200, 10, 20], [200, 100, 110, 120])
    root = math.sqrt(3)
    close(result.theta, math.log(3) / 2)
    close(result.phi, -math.log(3) / 2 / math.tanh(root / 2))  # Δ = baseline − model: longer wins, so below 0
    close(result.win_rate, root / (1 + root))  # 0.634
    # Var(log-odds of the longer) = [2·(1/4)²/2²] / (3/4·1/4)² = 8/9, of the shorter 0; θ is their mean: 2/9, by
    # n/(n − 2) = 2 is (2/3)².
    close(result.standard_error, root / (1 + root) ** 2 * 2 / 3)
    close([result.raw_win_rate, result.model_length, result.baseline_length], [0.625, 132.5, 132.5])
    assert result.far_from_raw is False


def test_equal_lengths_give_the_raw_win_rate():
    y = np.random.default_rng(0).random(30)
    lengths = np.arange(30)
    result, raw = length_controlled_win_rate(y, lengths, lengths), win_rate(y)
    close(result[:3], [raw.win_rate, raw.standard_error, raw.win_rate])
    close([sigmoid(result.theta), result.phi], [raw.win_rate, 0])
    close(length_controlled_win_rate([1, 1, 1], [5, 6, 7], [5, 6, 7])[:4], [1, 0, 1, np.inf])


def simulated(n, theta=0.4, phi=-1.0, seed=0, longer=30):
    rng = np.random.default_rng(seed)
    model, baseline = rng.integers(50, 500, (2, n)).astype(float)
    model += longer
    delta = baseline - model
    p = sigmoid(theta + phi * np.tanh(delta / delta.std(ddof=1)))
    return (rng.random(n) < p).astype(float), model, baseline


def test_length_control_mirrors_and_has_no_unit_of_length():
    y, model, baseline = simulated(200)
    ours, theirs = length_controlled_win_rate(y, model, baseline), length_controlled_win_rate(1 - y, baseline, model)
    close([ours.win_rate, ours.theta, ours.phi], [1 - theirs.win_rate, -theirs.theta, theirs.phi])
    close(ours.standard_error, theirs.standard_error)
    close(length_controlled_win_rate(y, 4 * model, 4 * baseline)[:5], ours[:5])


def test_length_control_against_gradient_ascent():
    y, model, baseline = simulated(60)
    y = 0.8 * y + 0.07  # soft targets
    delta = baseline - model
    std = math.sqrt(sum((d - delta.mean()) ** 2 for d in delta) / 59)
    x = np.array([[1, math.tanh(d / std)] for d in delta])
    result = length_controlled_win_rate(y, model, baseline)
    close([result.theta, result.phi], ascend(x, y, np.ones(60)), rtol=1e-8)


def test_length_control_recovers_what_made_the_data():
    y, model, baseline = simulated(40_000, longer=100)
    result = length_controlled_win_rate(y, model, baseline)
    assert abs(result.theta - 0.4) < 0.04 and abs(result.phi + 1) < 0.05  # 3 standard errors
    assert abs(result.win_rate - sigmoid(0.4)) < 3 * result.standard_error
    assert result.raw_win_rate - result.win_rate > 10 * result.standard_error  # what it is for


def test_the_standard_error_of_length_control_is_that_over_data_sets():
    results = [length_controlled_win_rate(*simulated(150, seed=seed)) for seed in range(400)]
    rates, errors = np.array([(r.win_rate, r.standard_error) for r in results]).T
    close(errors.mean(), rates.std(), rtol=0.1)  # the deviation over 400 has an error of 3.5 %
    # A judge who gives probabilities varies less, which an error from the fit's own p(1 − p) would not see.
    soft, model, baseline = simulated(150)
    soft = length_controlled_win_rate(0.5 + 0.02 * soft, model, baseline)
    assert soft.standard_error < 0.002


def test_a_judge_of_length_alone_is_far_from_raw():
    rng = np.random.default_rng(0)
    delta = rng.normal(-100, 50, 400)  # ours is nearly always the longer one
    y = 0.02 + 0.96 * (delta < 0)
    result = length_controlled_win_rate(y, 500 - delta, np.full(400, 500.0))
    assert result.raw_win_rate > 0.9 and result.win_rate < 0.7 and result.far_from_raw is True


# ---- Bradley-Terry ---------------------------------------------------------------------------------------------------


def estimates(fit):
    return {name: interval.estimate for name, interval in fit.ratings.items()}


def test_two_models_by_hand():
    # 3 wins of 4: odds of 3, so 400 log10(3) points.
    fit = bradley_terry_fit("AAAA", "BBBB", [1, 1, 1, 0], anchor="B", bootstrap=0)
    close([estimates(fit)["A"], estimates(fit)["B"]], [1000 + 400 * math.log10(3), 1000])  # 1190.8
    close([fit.win_rates["A"].estimate, fit.win_rates["B"].estimate], [0.75, 0.5])
    close(fit.win_rates["A"][1:] + fit.ratings["A"][1:], [NAN] * 4)
    assert fit.unbounded == 0 and fit.coefficients == ()
    # A strong verdict counts three times, a tie half to each: odds (3 + ½)/(1 + ½).
    fit = bradley_terry_fit("AAB", "BBA", [1, 0.5, 1], weights=[3, 1, 1], anchor="B", bootstrap=0)
    close(estimates(fit)["A"] - 1000, 400 * math.log10(7 / 3))


def test_three_models_whose_odds_agree():
    # A:B = 3, B:C = 2, and A:C = 6: the fit is exact, and odds multiply.
    fit = bradley_terry_fit("ABC", "BCA", [3 / 4, 2 / 3, 1 / 7], anchor="C", anchor_rating=0, bootstrap=0)
    close([estimates(fit)[name] for name in "ABC"], [400 * math.log10(6), 400 * math.log10(2), 0], atol=1e-9)
    close([fit.win_rates[name].estimate for name in "ABC"], [6 / 7, 2 / 3, 1 / 2])
    assert list(fit.ratings) == ["A", "B", "C"]
    close(elo_win_rate(1400, 1000), 10 / 11)
    close(elo_win_rate(1000, 1400), 1 / 11)


def league(n, strengths=(0.0, 0.5, -0.4, 1.0), style=0.0, seed=0):
    """Games of models 0, 1, …, whose log-odds differ by `strengths`; style[i] is N(0.5, 2) times its coefficient."""
    rng = np.random.default_rng(seed)
    first = rng.integers(len(strengths), size=n)
    second = (first + rng.integers(1, len(strengths), n)) % len(strengths)
    covariates = rng.normal(0.5, 2, (n, 1))
    s = np.asarray(strengths)
    y = (rng.random(n) < sigmoid(s[first] - s[second] + style * covariates[:, 0])).astype(float)
    return first.tolist(), second.tolist(), y, covariates


def test_what_changes_no_rating():
    first, second, y, covariates = league(200, style=0.3)
    weights = np.random.default_rng(1).integers(1, 4, 200)
    same = {"anchor": 0, "bootstrap": 0}
    fit = bradley_terry_fit(first, second, y, covariates, weights, **same)
    rated = [estimates(fit)[i] for i in range(4)]

    def check(other, ratings=rated, sign=1):
        close([estimates(other)[i] for i in range(4)], ratings)
        close(other.coefficients[0].estimate, sign * fit.coefficients[0].estimate)

    # Another anchor and its rating: a constant.
    other = bradley_terry_fit(first, second, y, covariates, weights, anchor=2, anchor_rating=50, bootstrap=0)
    check(other, [r + 50 - rated[2] for r in rated])
    # Who of the two is called first, game by game.
    flip = np.random.default_rng(2).random(200) < 0.5
    sides = [(b, a) if f else (a, b) for a, b, f in zip(first, second, flip, strict=True)]
    sign = np.where(flip, -1, 1)
    check(
        bradley_terry_fit(
            *zip(*sides, strict=True), np.where(flip, 1 - y, y), covariates * sign[:, None], weights, **same
        )
    )
    # A weight, or so many games; the unit of the covariate; a game of weight 0.
    many = np.repeat(np.arange(200), weights)
    repeated = [np.array(x)[many] for x in (first, second, y, covariates)]
    check(bradley_terry_fit(repeated[0].tolist(), repeated[1].tolist(), *repeated[2:], **same))
    check(bradley_terry_fit(first, second, y, covariates * 7, weights * 0.1, **same))
    extra = [[*first, 0], [*second, 1], [*y, 0.3], [*covariates, [9.0]], [*weights, 0]]
    check(bradley_terry_fit(*extra, **same))
    # A tie is half a win each.
    halves = np.concatenate([y * 0 + 1, y * 0])
    soft = np.clip(y, 0.2, 0.8)
    tied = bradley_terry_fit(first, second, soft, **same)
    split = bradley_terry_fit(first * 2, second * 2, halves, weights=[*soft, *(1 - soft)], **same)
    close(list(estimates(split).values()), list(estimates(tied).values()))
    # All verdicts the other way round: the differences too.
    mirrored = bradley_terry_fit(first, second, 1 - y, covariates, weights, **same)
    check(mirrored, [2000 - r for r in rated], sign=-1)


def test_centred_covariates_are_ratings_at_the_mean_style():
    # One always first, and always the longer one: what centring leaves to it is c·mean/√mean c².
    rng = np.random.default_rng(0)
    c = rng.random((400, 1)) + 0.5
    y = (rng.random(400) < sigmoid(1.5 * c[:, 0])).astype(float)
    fits = [bradley_terry_fit("A" * 400, "B" * 400, y, c, anchor="B", bootstrap=0, centre=x) for x in (False, True)]
    (free, centred), scale = fits, math.sqrt((c**2).mean())
    shift = free.coefficients[0].estimate * c.mean() / scale
    close(estimates(centred)["A"] - estimates(free)["A"], ELO * shift)
    close(centred.coefficients[0].estimate, free.coefficients[0].estimate * c.std() / scale)
    assert abs(estimates(free)["A"] - 1000) < 0.25 * (estimates(centred)["A"] - 1000)


def test_bradley_terry_against_gradient_ascent():
    first, second, y, covariates = league(80, style=0.3)
    weights = np.random.default_rng(1).integers(1, 4, 80).astype(float)
    x = np.zeros((80, 4))
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        x[i, a], x[i, b] = 1, -1
    square = sum(w * v**2 for w, v in zip(weights, covariates[:, 0], strict=True)) / weights.sum()
    x[:, 0] = covariates[:, 0] / math.sqrt(square)  # model 0 is the anchor, with no column
    style, *strengths = ascend(x, y, weights)
    fit = bradley_terry_fit(first, second, y, covariates, weights, anchor=0, bootstrap=0)
    close([estimates(fit)[i] - 1000 for i in range(1, 4)], ELO * np.array(strengths), rtol=1e-7)
    close(fit.coefficients[0].estimate, style, rtol=1e-7)


def test_wild_covariates_still_solve_the_score_equations():
    # Cauchy covariates, on which Newton's method with full steps diverges.
    rng = np.random.default_rng(985)
    c, side = rng.standard_t(1, (40, 3)), rng.integers(2, size=40)
    y = (rng.random(40) < sigmoid(np.clip(c @ [1, 2, -3], -500, 500))).astype(float)
    y[:2] = 1 - y[:2]
    first, second = (["BA"[i] for i in order] for order in (side, 1 - side))
    fit = bradley_terry_fit(first, second, y, c, anchor="B", bootstrap=0)
    x = np.concatenate([2 * side[:, None] - 1, c / np.sqrt((c**2).mean(axis=0))], axis=1)
    coefficients = [(estimates(fit)["A"] - 1000) / ELO, *(interval.estimate for interval in fit.coefficients)]
    close(x.T @ (y - sigmoid(x @ coefficients)), np.zeros(4), atol=1e-9)


def test_bradley_terry_recovers_what_made_the_data():
    first, second, y, covariates = league(10_000, style=0.6)
    fit = bradley_terry_fit(first, second, y, covariates, anchor=0, bootstrap=30)
    for i, strength in enumerate((0.0, 0.5, -0.4, 1.0)):
        assert abs(estimates(fit)[i] - 1000 - ELO * strength) < 25  # 3 standard errors
    close(fit.coefficients[0].estimate, 0.6 * math.sqrt((covariates**2).mean()), rtol=0.1)
    without = bradley_terry_fit(first, second, y, anchor=0, bootstrap=0)
    assert estimates(without)[3] < 1000 + ELO - 25  # a covariate left out pulls ratings together
    low, high = fit.ratings[3].low, fit.ratings[3].high
    assert low < estimates(fit)[3] < high and 15 < high - low < 60
    close(fit.win_rates[3], [elo_win_rate(r, 1000) for r in fit.ratings[3]])
    assert fit.ratings[0] == (1000, 1000, 1000) and fit.win_rates[0] == (0.5, 0.5, 0.5)


def test_bootstrap_intervals_of_ratings_cover():
    covered = []
    for seed in range(50):
        first, second, y, _ = league(150, strengths=(0.0, 0.5, -0.4), seed=seed)
        fit = bradley_terry_fit(first, second, y, anchor=0, seed=seed)
        assert fit.unbounded == 0
        covered += [fit.ratings[i].low < 1000 + ELO * s < fit.ratings[i].high for i, s in ((1, 0.5), (2, -0.4))]
    assert 0.88 <= np.mean(covered) <= 1  # 0.95 less what 100 percentiles lose; error 0.02 of 100


def test_the_games_of_a_prompt_are_resampled_together():
    first, second, y, _ = league(100)
    fit = bradley_terry_fit(first, second, y, anchor=0)
    prompts = [f"p{i}" for i in range(100)]
    twice = bradley_terry_fit(first * 2, second * 2, [*y, *y], anchor=0, groups=prompts * 2)
    for name, interval in fit.ratings.items():
        close(twice.ratings[name], interval)
    # Taken as independent, copies narrow the intervals by about √2.
    naive = bradley_terry_fit(first * 2, second * 2, [*y, *y], anchor=0)
    widths = [np.mean([r.high - r.low for r in x.ratings.values()]) for x in (twice, naive)]
    assert 1.2 < widths[0] / widths[1] < 1.7
    assert bradley_terry_fit(first, second, y, anchor=0) == fit
    assert bradley_terry_fit(first, second, y, anchor=0, seed=1).ratings[1] != fit.ratings[1]


def test_resamples_without_a_finite_fit_are_counted():
    # One loss in 5: a resample misses it with probability 0.8⁵ = 0.33, and has nothing else with 0.0003.
    fit = bradley_terry_fit("AAAAA", "BBBBB", [1, 1, 1, 1, 0], anchor="B", bootstrap=400)
    assert abs(fit.unbounded / 400 - 0.33) < 3 * math.sqrt(0.33 * 0.67 / 400)
    # The best finite resample has 4 wins of 5, as the data; the worst one that is likely, 1 of 5 or 2 of 5.
    close(fit.ratings["A"].high, 1000 + 400 * math.log10(4))
    assert fit.ratings["A"].low <= 1000 + 400 * math.log10(2 / 3) + 1e-9


@pytest.mark.parametrize(
    ("first", "second", "outcomes", "covariates"),
    [
        ("AAA", "BBB", [1, 1, 1], None),  # a model that won everything
        ("ABAC", "BACC"[:3] + "A", [1, 1, 1, 0], None),  # C won nothing
        ("ABCD", "BADC", [1, 1, 1, 1], None),  # A, B never met C, D
        ("ABCDAC", "BADCCA", [1, 1, 1, 1, 1, 0], None),  # and A, B won against C, D
        ("ABAB", "BABA", [1, 1, 0, 0], [[1.0], [-1], [1], [-1]]),  # the covariate is who plays
        ("ABAB", "BABA", [1, 1, 0, 0], [[1.0], [1], [-1], [-1]]),  # the covariate tells the winner
        ("ABAB", "BABA", [1, 1, 0, 0], [[1.0, 2.0], [1, 2], [-1, -2], [2, 4]]),  # two that say the same
    ],
)
def test_fits_without_a_finite_maximum(first, second, outcomes, covariates):
    with pytest.raises(ValueError, match="outcomes have no finite fit"):
        bradley_terry_fit(first, second, outcomes, covariates, anchor="A")


def test_one_upset_makes_a_fit_finite():
    # 1 loss in 100,000 is far from 0.5, and still finite.
    fit = bradley_terry_fit("AB", "BA", [1, 1], weights=[99_999, 1], anchor="B", bootstrap=0)
    close(estimates(fit)["A"] - 1000, 400 * math.log10(99_999))


def test_parity_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    first, second, y, covariates = league(300, style=0.3)
    x = np.concatenate([np.eye(4)[first] - np.eye(4)[second], covariates / np.sqrt((covariates**2).mean())], axis=1)
    model = linear_model.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x[:, 1:], y)
    fit = bradley_terry_fit(first, second, y, covariates, anchor=0, bootstrap=0)
    ours = [(estimates(fit)[i] - 1000) / ELO for i in range(1, 4)] + [fit.coefficients[0].estimate]
    close(ours, model.coef_[0], rtol=1e-5)


# ---- style -----------------------------------------------------------------------------------------------------------


def test_style_by_hand():
    rich = """# Title
#no header

Some **bold** and __also__ words:
- one
  * two
+ three
1. four
10. five
-no item

```
# code
- code **code**
```
####### seven
###### six
"""
    words = len(rich.split())
    plain = "two words"
    # 2 headers, 5 items, 2 spans; code and the two near-misses don't count.
    close(style_covariates([rich], [plain]), [[(words - 2) / (words + 3), 2 / 3, 5 / 6, 2 / 3]])
    close(style_covariates([plain], [rich]), -style_covariates([rich], [plain]))
    close(style_covariates([rich, plain], [rich, ""]), [[0, 0, 0, 0], [2 / 3, 0, 0, 0]])
    close(style_covariates([plain], [plain], [30], [10])[0, 0], 20 / 41)
    assert evaluation.STYLE == ("length", "headers", "lists", "bold")


def test_style_control_takes_the_length_out():
    rng = np.random.default_rng(0)
    short, long = rng.integers(20, 100, 600), rng.integers(20, 140, 600)
    covariates = style_covariates([""] * 600, [""] * 600, long, short)[:, :1]
    y = (rng.random(600) < sigmoid(2 * covariates[:, 0])).astype(float)  # a judge of length alone
    raw = bradley_terry_fit(["long"] * 600, ["short"] * 600, y, anchor="short")
    controlled = bradley_terry_fit(["long"] * 600, ["short"] * 600, y, covariates, anchor="short")
    assert raw.win_rates["long"].low > 0.5
    assert controlled.win_rates["long"].low < 0.5 < controlled.win_rates["long"].high
    assert controlled.coefficients[0].low > 0.2


# ---- reward models ---------------------------------------------------------------------------------------------------


def test_reward_accuracy_by_hand():
    # Right, wrong, a tie, right: 1, 0, ½, 1. Mean 5/8; squared deviations 9, 25, 1, 9 over 64, sum 44/64.
    result = reward_accuracy([2, 0, 1, 5], [1, 1, 1, -5])
    close(result, [5 / 8, math.sqrt(44 / 64 / 3 / 4), 1 / 4])
    a, b = np.random.default_rng(0).integers(0, 5, (2, 60))
    close(reward_accuracy(a, b)[:2], win_rate((1 + np.sign(a - b)) / 2)[:2])
    close(reward_accuracy(a, b).accuracy + reward_accuracy(b, a).accuracy, 1)
    close(reward_accuracy(3 * a + 100, 3 * b + 100), reward_accuracy(a, b))
    close(reward_accuracy([0.0, 0], [0.0, 0]).accuracy, 0.5)  # a DPO model at π = π_ref


def test_calibration_by_hand():
    # Bins [0, ½): p 0.1, 0.3, 0.3, y 0, 1, 0: 0.7/3 against 1/3. [½, 1]: p 0.9, y 1.
    result = calibration([0.1, 0.3, 0.3, 0.9], [0, 1, 0, 1], bins=2)
    close(result.confidence, [0.7 / 3, 0.9])
    close(result.accuracy, [1 / 3, 1])
    assert result.count.tolist() == [3, 1]
    close(result.error, 3 / 4 * 0.1 + 1 / 4 * 0.1)
    close(result.brier, (0.01 + 0.49 + 0.09 + 0.01) / 4)
    close(result.log_loss, -math.log(0.9 * 0.3 * 0.7 * 0.9) / 4)


def test_bins_hold_their_lower_edge():
    edges = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert calibration(edges, edges).count.tolist() == [1] * 9 + [2]
    result = calibration([0.05, 0.95], [0, 1])
    assert np.isnan(result.accuracy).tolist() == np.isnan(result.confidence).tolist() == [False] + [True] * 8 + [False]
    close(result.error, 0.05)


def test_calibration_of_certainties_and_of_one_bin():
    close(calibration([0, 1, 1], [0, 1, 1])[:3], [0, 0, 0])
    close(calibration([0, 1, 1], [0, 1, 0])[:3], [1 / 3, 1 / 3, np.inf])
    p, y = np.random.default_rng(0).random((2, 100))
    close(calibration(p, y, bins=1).error, abs(p.mean() - y.mean()))
    close(calibration(p, y).error, calibration(1 - p, 1 - y).error)  # no p at an edge
    by_loop = 0
    for k in range(10):
        inside = [i for i in range(100) if k / 10 <= p[i] < (k + 1) / 10]
        by_loop += abs(sum(p[i] - y[i] for i in inside)) / 100
    close(calibration(p, y).error, by_loop)


# ---- reward against KL -----------------------------------------------------------------------------------------------


def test_frontier_by_hand():
    kl = [3, 1, 2, 2, 0, 4]
    reward = [5, 2, 3, 4, 2, 5]
    # (0, 2) beats (1, 2), (2, 4) beats (2, 3), (3, 5) beats (4, 5).
    assert frontier(kl, reward).tolist() == [4, 3, 0]
    assert frontier([1, 1], [2, 2]).tolist() == [0, 1]  # neither beats the other
    assert frontier([7], [-1]).tolist() == [0]


def test_frontier_against_all_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        kl, reward = rng.integers(0, 6, (2, 25))  # with ties and copies
        beats = lambda i, j: kl[i] <= kl[j] and reward[i] >= reward[j] and (kl[i] < kl[j] or reward[i] > reward[j])  # noqa: B023, E731
        free = [j for j in range(25) if not any(beats(i, j) for i in range(25))]
        found = frontier(kl, reward)
        assert sorted(found) == free and (np.diff(kl[found]) >= 0).all() and (np.diff(reward[found]) >= 0).all()


@pytest.mark.parametrize("kind", ["bon", "rl"])
def test_overoptimisation_recovers_its_curve_and_peak(kind):
    d = np.array([0, 0.5, 1, 2, 3, 4])  # the reference itself is in
    curve = {"bon": lambda d: d * (1.2 - 0.3 * d), "rl": lambda d: d * (1.2 - 0.6 * np.log(np.maximum(d, 1e-9)))}[kind]
    result = fit_overoptimisation(d**2, curve(d), kind)
    close(result[:2], [1.2, {"bon": 0.3, "rl": 0.6}[kind]])
    close(result.rmse, 0, atol=1e-9)
    grid = np.linspace(0.01, 5, 5000)
    close(result.peak, grid[curve(grid).argmax()], atol=1e-3)


def test_overoptimisation_peaks_by_hand():
    close(fit_overoptimisation([1, 4], [1, 0], "bon"), [2, 1, 1, 0], atol=1e-9)  # d(2 − d) at d = 1, 2
    close(fit_overoptimisation([1, math.e**2], [1, 0], "rl"), [1, 1, 1, 0], atol=1e-9)  # d(1 − log d): peak exp(0)
    for kind in ("bon", "rl"):
        assert fit_overoptimisation([1, 4, 9], [1, 3, 7], kind).peak == np.inf  # still rising
    assert fit_overoptimisation([1, 4], [-1, -4], "bon").peak == 0  # falls from the start


def test_overoptimisation_is_least_squares():
    rng = np.random.default_rng(0)
    d = rng.random(40) * 3
    reward = d * (1 - 0.3 * d) + 0.1 * rng.normal(size=40)
    a, b, _, rmse = fit_overoptimisation(d**2, reward, "bon")
    loss = lambda a, b: math.sqrt(np.mean((d * (a - b * d) - reward) ** 2))  # noqa: E731
    close(rmse, loss(a, b))
    assert all(loss(a + x, b + y) > rmse for x, y in itertools.product((-0.01, 0, 0.01), repeat=2) if x or y)


# ---- the bootstrap ---------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    estimate, low, high = bootstrap_interval(values)
    close(estimate, values.mean())
    close([low, high], values.mean() + np.array([-1.96, 1.96]) * values.std() / 20, rtol=0.005)  # its normal limit
    assert bootstrap_interval(np.full(5, 2.0)) == (2, 2, 2)
    assert bootstrap_interval(values, samples=200) == bootstrap_interval(values, samples=200)
    assert bootstrap_interval(values, samples=200) != bootstrap_interval(values, samples=200, seed=1)
    narrow = bootstrap_interval(values, level=0.5)
    assert low < narrow.low < estimate < narrow.high < high
    close(bootstrap_interval(5 * values + 1, samples=200), 5 * np.array(bootstrap_interval(values, samples=200)) + 1)


def test_bootstrap_of_two_rows_by_enumeration():
    # 0 and 1 drawn twice: means 0, ½, 1 with probabilities ¼, ½, ¼.
    assert bootstrap_interval([0, 1], level=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_interval([0, 1], level=0.6) == (0.5, 0, 1)


def test_bootstrap_covers():
    rng = np.random.default_rng(0)
    data = rng.exponential(size=(200, 60))
    for statistic, truth in ((np.mean, 1), (lambda x: np.sort(x)[30], math.log(2))):  # about the median
        intervals = [bootstrap_interval(x, statistic, samples=200) for x in data]
        assert 0.89 <= np.mean([low < truth < high for _, low, high in intervals]) <= 0.99  # error 0.015


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    prompt = rng.normal(0, 5, 80)
    a, b = prompt + rng.normal(0.3, 1, 80), prompt + rng.normal(0, 1, 80)
    paired = bootstrap_interval(a, paired=b, samples=500)
    close(paired, bootstrap_interval(a - b, samples=500))  # a mean is linear
    wide = bootstrap_interval(a, samples=500)
    assert paired.high - paired.low < 0.5 * (wide.high - wide.low)
    assert bootstrap_interval(a, np.median, paired=a, samples=50) == (0, 0, 0)
    # Columns of a row stay together: the ratio of two sums.
    ratio = bootstrap_interval(np.stack([2 * b, b], axis=1), lambda x: x[:, 0].sum() / x[:, 1].sum(), samples=50)
    close(ratio, [2, 2, 2])


# ---- bad inputs ------------------------------------------------------------------------------------------------------

AB = {"first": "AB", "second": "BA", "outcomes": [0.4, 0.7], "anchor": "A"}
THREE = {"preferences": [0, 1, 0.5], "model_lengths": [1, 2, 3], "baseline_lengths": [3, 2, 2]}


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (win_rate, {"preferences": []}, "preferences has shape (0,), want [n], n at least 2"),
        (win_rate, {"preferences": [1]}, "preferences has shape (1,)"),
        (win_rate, {"preferences": ["A", "B"]}, "preferences is no array of numbers"),
        (win_rate, {"preferences": [1, 0], "swapped": [[1], [1, 0]]}, "swapped is no array of numbers"),
        (win_rate, {"preferences": [[1, 0]]}, "preferences has shape (1, 2)"),
        (win_rate, {"preferences": [1, NAN]}, "preferences holds NaN or infinity, first in row 1"),
        (win_rate, {"preferences": [1, 2]}, "preferences must be from 0 to 1, but it holds 2"),
        (win_rate, {"preferences": [1, 0], "swapped": [1]}, "swapped has shape (1,)"),
        (win_rate, {"preferences": [1, 0], "swapped": [1, 0, 1]}, "swapped has shape (3,), but preferences has shape (2,)"),
        (win_rate, {"preferences": [1, 0], "swapped": [1, -1]}, "swapped must be from 0 to 1"),
        (length_controlled_win_rate, THREE | {"model_lengths": [1, 2]}, "model_lengths has shape (2,)"),
        (length_controlled_win_rate, THREE | {"baseline_lengths": [1, -2, 3]}, "baseline_lengths must be from 0"),
        (length_controlled_win_rate, THREE | {"preferences": [1, 0, 1.5]}, "preferences must be from 0 to 1, but it holds 1.5"),
        (length_controlled_win_rate, THREE | {"model_lengths": [5, 4, 4]}, "no finite fit: the difference in length"),
        (length_controlled_win_rate, THREE | {"preferences": [1, 1, 1]}, "separate the data (raw win rate 1,"),
        (length_controlled_win_rate, THREE | {"preferences": [1, 0.5, 0]}, "separate the data (raw win rate 0.5,"),
        (bradley_terry_fit, AB | {"outcomes": [1]}, "first has 2 entries, but outcomes has 1"),
        (bradley_terry_fit, AB | {"second": "BAB"}, "second has 3 entries, but outcomes has 2"),
        (bradley_terry_fit, AB | {"groups": [1]}, "groups has 1 entries, but outcomes has 2"),
        (bradley_terry_fit, AB | {"outcomes": [1, 1.1]}, "outcomes must be from 0 to 1, but it holds 1.1"),
        (bradley_terry_fit, AB | {"weights": [1]}, "weights has 1 entries"),
        (bradley_terry_fit, AB | {"weights": [1, -1]}, "weights must be from 0"),
        (bradley_terry_fit, AB | {"weights": [0, 0]}, "weights are all 0"),
        (bradley_terry_fit, AB | {"anchor": "C"}, "anchor is 'C', but first and second name 'A', 'B'"),
        (bradley_terry_fit, AB | {"second": "BB"}, "first and second are both 'B' at 1"),
        (bradley_terry_fit, AB | {"bootstrap": -1}, "bootstrap must be at least 0"),
        (bradley_terry_fit, AB | {"covariates": [1.0, 2]}, "covariates has shape (2,), want [n, k] with n = 2"),
        (bradley_terry_fit, AB | {"covariates": [[1.0]]}, "covariates has shape (1, 1)"),
        (bradley_terry_fit, AB | {"covariates": [[1.0, 0], [NAN, 0]]}, "covariates holds NaN or infinity, first in row 1"),
        (bradley_terry_fit, AB | {"covariates": [[1.0, 0], [2, 0]]}, "covariates are all 0 in column 1"),
        (bradley_terry_fit, AB | {"covariates": [[1.0], [1]], "centre": True}, "covariates are all the same in column 0"),
        (style_covariates, {"texts_a": "text", "texts_b": ["text"]}, "texts_a must be a sequence of strings"),
        (style_covariates, {"texts_a": ["a"], "texts_b": [b"b"]}, "texts_b must be a sequence of strings"),
        (style_covariates, {"texts_a": ["a"], "texts_b": ["b", "c"]}, "texts_b has 2 entries, texts_a 1"),
        (style_covariates, {"texts_a": [], "texts_b": []}, "texts_a has 0 entries"),
        (style_covariates, {"texts_a": ["a"], "texts_b": ["b"], "lengths_b": [1, 2]}, "lengths_b has 2 entries"),
        (style_covariates, {"texts_a": ["a"], "texts_b": ["b"], "lengths_a": [-1]}, "lengths_a must be from 0"),
        (reward_accuracy, {"chosen": [1, 2], "rejected": [1, 2, 3]}, "rejected has shape (3,), but chosen has shape (2,)"),
        (reward_accuracy, {"chosen": [1, NAN], "rejected": [1, 2]}, "chosen holds NaN"),
        (calibration, {"probabilities": [0.5, 1.5], "outcomes": [0, 1]}, "probabilities must be from 0 to 1"),
        (calibration, {"probabilities": [0.5, 1], "outcomes": [0, 2]}, "outcomes must be from 0 to 1"),
        (calibration, {"probabilities": [], "outcomes": []}, "probabilities has shape (0,)"),
        (calibration, {"probabilities": [0.5], "outcomes": [1], "bins": 0}, "bins must be at least 1"),
        (frontier, {"kl": [1, 2], "reward": [1]}, "reward has shape (1,), but kl has shape (2,)"),
        (frontier, {"kl": [1, np.inf], "reward": [1, 2]}, "kl holds NaN or infinity"),
        (fit_overoptimisation, {"kl": [1, -2], "reward": [1, 2], "kind": "rl"}, "kl must be from 0"),
        (fit_overoptimisation, {"kl": [1, 2], "reward": [1, 2], "kind": "dpo"}, "kind must be \"bon\" or \"rl\", but it is 'dpo'"),
        (fit_overoptimisation, {"kl": [0, 2, 2], "reward": [0, 2, 1], "kind": "rl"}, "kl must hold at least two different"),
        (fit_overoptimisation, {"kl": [1, 2, 3], "reward": [1, 2], "kind": "rl"}, "reward has shape (2,)"),
        (bootstrap_interval, {"values": [1.0]}, "values has shape (1,), want [n, ...], n at least 2"),
        (bootstrap_interval, {"values": [1.0, NAN]}, "values holds NaN"),
        (bootstrap_interval, {"values": [1.0, 2], "paired": [[1.0], [2]]}, "paired has shape (2, 1), but values has shape (2,)"),
        (bootstrap_interval, {"values": [1.0, 2], "level": 1}, "level must be above 0 and below 1"),
        (bootstrap_interval, {"values": [1.0, 2], "samples": 0}, "samples must be at least 1"),
    ],
)  # fmt: skip
def test_bad_inputs(function, arguments, message):
    with pytest.raises(ValueError) as raised:
        function(**arguments)
    assert message in str(raised.value)


def test_jax_is_not_loaded():
    code = "import sys, rto_jax.evaluation; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(__file__).parents[1])
