"""How methods are compared: win rates, ratings, accuracy and calibration, reward against KL. On the host, no jax.

A preference is a judge's, for the model: 1 a win, 0.5 a tie, 0 a loss, or a probability between. Results are floats
and float64 arrays; a standard error or an interval is over the prompts (the rows) as a sample of all prompts.
ValueError names the argument that is empty, of another shape, not finite, or out of its range.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, xlog1py, xlogy

ELO = 400 / math.log(10)
"""Points of rating per unit of log-odds: 400 points are odds of 10 to 1"""

STYLE = ("length", "headers", "lists", "bold")
"""The columns of `style_covariates`"""


class Interval(NamedTuple):
    estimate: float
    low: float
    high: float


class WinRate(NamedTuple):
    win_rate: float
    standard_error: float
    """sample standard deviation over prompts / √n"""
    binomial_error: float
    """√(p(1 − p)/n), what papers print: too large where the judge gives ties or probabilities"""
    ties: float
    """share of prompts at exactly 0.5"""
    position_bias: float
    """mean of preferences − swapped, −1 to 1: above 0, the judge likes the place that the model has in `preferences`"""
    agreement: float
    """share of prompts on which both orders name the same winner, or both none"""


class LengthControlled(NamedTuple):
    win_rate: float
    standard_error: float
    raw_win_rate: float
    theta: float
    """log-odds at equal length"""
    phi: float
    """log-odds per unit of tanh(Δ/std Δ): below 0, the judge likes the longer answer"""
    far_from_raw: bool
    """AlpacaEval would warn: off by 0.1 and by a quarter of what there was to lose (or to win)"""
    model_length: float
    baseline_length: float
    """mean lengths, to be reported beside any win rate"""


class BradleyTerry(NamedTuple):
    ratings: dict[Hashable, Interval]
    """by model, 400 points to a factor of 10 in odds; the anchor's is fixed"""
    win_rates: dict[Hashable, Interval]
    """by model, against the anchor, at equal style if there are covariates"""
    coefficients: tuple[Interval, ...]
    """of the covariates, log-odds per standard deviation"""
    unbounded: int
    """resamples without a finite fit; the intervals leave them out, and are too narrow if there are many"""


class RewardAccuracy(NamedTuple):
    accuracy: float
    standard_error: float
    ties: float


class Calibration(NamedTuple):
    error: float
    """ECE = Σ_b (n_b/n) |accuracy_b − confidence_b|"""
    brier: float
    """mean (p − y)²"""
    log_loss: float
    """mean −y log p − (1 − y) log(1 − p), nats; infinite where a certainty was wrong"""
    confidence: np.ndarray
    """[bins], mean p; NaN in an empty bin"""
    accuracy: np.ndarray
    """[bins], mean y; NaN in an empty bin"""
    count: np.ndarray
    """int [bins]"""


class Overoptimisation(NamedTuple):
    a: float
    b: float
    peak: float
    """d = √KL of the highest reward; infinite where b is not above 0: the fit has no peak"""
    rmse: float
    """of the fit, in units of reward"""


# ---- judges ----------------------------------------------------------------------------------------------------------


def win_rate(preferences: ArrayLike, swapped: ArrayLike | None = None) -> WinRate:
    """mean_i p_i, with p_i the average of both orders of the two answers where the judge saw both.

    preferences: [n], 0 to 1, n at least 2. swapped: [n], the same prompts with the answers' places exchanged, still
    the preference for the model. position_bias and agreement need it, and are NaN without; they mean what
    they say only if the model had the same place in all of `preferences`.
    """
    both = {"preferences": preferences} | ({} if swapped is None else {"swapped": swapped})
    orders = _numbers(**both, low=0, high=1, least=2)
    average, bias, agreement = sum(orders) / len(orders), math.nan, math.nan
    if swapped is not None:
        bias = float(np.mean(orders[0] - orders[1]))
        agreement = float(np.mean(np.sign(orders[0] - 0.5) == np.sign(orders[1] - 0.5)))
    p = float(average.mean())
    binomial = math.sqrt(p * (1 - p) / len(average))
    return WinRate(p, _standard_error(average), binomial, float(np.mean(average == 0.5)), bias, agreement)


def length_controlled_win_rate(
    preferences: ArrayLike, model_lengths: ArrayLike, baseline_lengths: ArrayLike
) -> LengthControlled:
    """σ(θ) of the fit logit P(model preferred) = θ + φ tanh(Δ/std Δ),  Δ = len(baseline) − len(model).

    AlpacaEval's length-controlled win rate (arXiv 2404.04475) in its minimal form, which needs no published data: no
    term for the instruction's difficulty, no rows of gamed baselines, no L1 penalty. So it is not the leaderboard's
    number. Maximum likelihood; a preference between 0 and 1 is a soft target; std divides by n − 1. The standard error
    is the delta method's, from a sandwich covariance (soft targets vary less than coins), times √(n/(n − 2)).

    preferences: [n], 0 to 1, n at least 3. model_lengths, baseline_lengths: [n], at least 0, characters in AlpacaEval.
    Where all pairs are of equal length the result is the raw win rate, with φ = 0. ValueError where there is no finite
    unique fit: the same other Δ in all pairs (length and quality are one), or lengths or wins that separate the data.
    """
    lengths = {"model_lengths": model_lengths, "baseline_lengths": baseline_lengths}
    (y,) = _numbers(preferences=preferences, low=0, high=1, least=3)
    _, model, baseline = _numbers(preferences=preferences, **lengths, low=0)
    delta, n = baseline - model, len(y)
    raw = float(y.mean())
    if not delta.any():
        theta, phi, value, error = float(logit(raw)), 0.0, raw, _standard_error(y)
    else:
        spread = delta.std(ddof=1)
        length = np.tanh(delta / spread) if spread > 0 else np.sign(delta)
        x = np.stack([np.ones(n), length], axis=1)
        fit = _logistic(x, y, np.ones(n))
        if np.isnan(fit).any():
            raise ValueError(
                "preferences and lengths have no finite fit: the difference in length is (nearly) the same in all "
                f"pairs, or it or the wins separate the data (raw win rate {raw:g}, differences {delta.min():g} to "
                f"{delta.max():g})"
            )
        theta, phi = map(float, fit)
        p = expit(x @ fit)
        bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
        scores = x * (y - p)[:, None]
        variance = (bread @ scores.T @ scores @ bread)[0, 0] * n / (n - 2)
        value = float(expit(theta))
        error = value * (1 - value) * math.sqrt(variance)
    far = value < min(0.75 * raw, raw - 0.1) or value > max(raw + (1 - raw) / 4, raw + 0.1)
    return LengthControlled(value, error, raw, theta, phi, far, float(model.mean()), float(baseline.mean()))


def bradley_terry_fit(
    first: Sequence[Hashable],
    second: Sequence[Hashable],
    outcomes: ArrayLike,
    covariates: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    anchor: Hashable,
    anchor_rating: float = 1000.0,
    bootstrap: int = 100,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    centre: bool = False,
) -> BradleyTerry:
    """logit P(first beats second) = (R_first − R_second) log(10)/400 + Σ_k c_k z_k, by weighted maximum likelihood.

    Arena-Hard's ratings (arXiv 2406.11939; Bradley and Terry 1952) and, with covariates, its style control. A tie is
    an outcome of 0.5 (half a win each); a strong verdict (>>) has weight 3. No penalty, whereas their style-controlled
    fit keeps scikit-learn's L2. Intervals are percentiles, 95 %, of `bootstrap` resamples; 0: none, and they are NaN.

    first, second: [n], names. outcomes: [n], 0 to 1, for `first`. weights: [n], at least 0. anchor: the baseline's
    name, rated `anchor_rating`; it moves no difference. groups: [n], ids of prompts, whose games are resampled
    together: two games of one prompt are not independent, though Arena-Hard takes them so.
    covariates: [n, k], first's minus second's, such as `style_covariates`; z = c/√mean c², the z-score over both
    orders of each game, so that it does not matter who is called first and a rating is at *equal* style.
    centre=True subtracts the mean, as Arena-Hard does: with the baseline always on one side, ratings against it are
    then at the *mean* difference in style, which takes nothing away from a model that is always the longer one.

    ValueError where there is no finite unique fit: somebody won (or lost) all games against the rest or never met
    them, or the covariates are collinear or separate the outcomes.
    """
    (y,) = _numbers(outcomes=outcomes, low=0, high=1)
    (w,) = _numbers(weights=np.ones(len(y)) if weights is None else weights, low=0)
    groups = range(len(y)) if groups is None else groups
    for name, values in {"weights": w, "first": first, "second": second, "groups": groups}.items():
        if len(values) != len(y):
            raise ValueError(f"{name} has {len(values)} entries, but outcomes has {len(y)}")
    if not w.any():
        raise ValueError("weights are all 0")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0, but it is {bootstrap}")
    column = {name: i for i, name in enumerate(dict.fromkeys([*first, *second]))}
    if anchor not in column:
        raise ValueError(f"anchor is {anchor!r}, but first and second name {', '.join(map(repr, column))}")
    one, two = ([column[name] for name in names] for names in (first, second))
    if same := [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a == b]:
        raise ValueError(f"first and second are both {first[same[0]]!r} at {same[0]}")
    design = (np.eye(len(column))[one] - np.eye(len(column))[two]) / ELO
    design = np.delete(design, column[anchor], axis=1)
    if covariates is not None:
        design = np.concatenate([design, _z_scores(covariates, w, centre)], axis=1)

    def fit(weights):
        c = _logistic(design, y, weights)
        c[: len(column) - 1] += anchor_rating
        return np.insert(c, column[anchor], anchor_rating)

    estimate = fit(w)
    if np.isnan(estimate).any():
        raise ValueError(
            "outcomes have no finite fit: a model, or a group of models, won or lost every game against the rest or "
            "never met it, or the covariates are collinear or separate the outcomes"
        )
    unit = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    of_row = np.array([unit[group] for group in groups])
    resamples = [
        fit(w * np.bincount(rows, minlength=len(unit))[of_row]) for rows in _resamples(len(unit), bootstrap, seed)
    ]
    finite = [row for row in resamples if not np.isnan(row).any()]
    low, high = np.quantile(finite, [0.025, 0.975], axis=0) if finite else np.full((2, len(estimate)), np.nan)
    all_three = [Interval(*map(float, row)) for row in zip(estimate, low, high, strict=True)]
    ratings = dict(zip(column, all_three, strict=False))
    rates = {name: Interval(*(elo_win_rate(r, anchor_rating) for r in row)) for name, row in ratings.items()}
    return BradleyTerry(ratings, rates, tuple(all_three[len(column) :]), len(resamples) - len(finite))


def elo_win_rate(rating: float, other: float) -> float:
    """1 / (1 + 10^((other − rating)/400)): how often the one beats the other."""
    return float(expit((rating - other) / ELO))


def style_covariates(
    texts_a: Sequence[str],
    texts_b: Sequence[str],
    lengths_a: ArrayLike | None = None,
    lengths_b: ArrayLike | None = None,
) -> np.ndarray:
    """(a − b)/(a + b + 1) of the numbers a, b of tokens, headers, list items and bold spans: float64 [n, 4].

    Arena-Hard's style control, for `bradley_terry_fit`; the columns are `STYLE`. Markdown inside a fenced code block
    does not count. texts_a, texts_b: [n]. lengths_a, lengths_b: [n], in tokens, at least 0; None: words.
    """
    sides = []
    for side, texts, lengths in (("a", texts_a, lengths_a), ("b", texts_b, lengths_b)):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"texts_{side} must be a sequence of strings")
        if len(texts) != len(texts_a) or len(texts) == 0:
            raise ValueError(f"texts_{side} has {len(texts)} entries, texts_a {len(texts_a)}: want [n] each, n above 0")
        if lengths is None:
            lengths = [len(text.split()) for text in texts]
        (lengths,) = _numbers(**{f"lengths_{side}": lengths}, low=0)
        if len(lengths) != len(texts):
            raise ValueError(f"lengths_{side} has {len(lengths)} entries, but texts_{side} has {len(texts)}")
        outside = [_CODE.sub("", text) for text in texts]
        sides.append(np.stack([lengths, *([len(p.findall(text)) for text in outside] for p in _MARKDOWN)], axis=1))
    a, b = sides
    return (a - b) / (a + b + 1)


_CODE = re.compile(r"```.*?```", re.S)
_MARKDOWN = (
    re.compile(r"^#{1,6}[ \t]", re.M),
    re.compile(r"^[ \t]*(?:\d+\.|[-*+])[ \t]", re.M),
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
)

# ---- reward models ---------------------------------------------------------------------------------------------------


def reward_accuracy(chosen: ArrayLike, rejected: ArrayLike) -> RewardAccuracy:
    """mean of 1[r_w > r_l] + ½·1[r_w = r_l]: how often a reward ranks a pair as its label does.

    chosen, rejected: [n], n at least 2, of held-out pairs; for a DPO model β log π/π_ref of the answers, any β.
    The standard error is the sample standard deviation / √n. Differs from `losses.preference_metrics`, where a tie is wrong: at π = π_ref this is ½, that 0.
    """
    chosen, rejected = _numbers(chosen=chosen, rejected=rejected, least=2)
    hits = (chosen > rejected) + (chosen == rejected) / 2
    return RewardAccuracy(float(hits.mean()), _standard_error(hits), float(np.mean(chosen == rejected)))


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> Calibration:
    """Expected calibration error, Brier score, log loss, and the reliability diagram of stated probabilities.

    For a reward model p = σ(r_a − r_b), in random order: with the chosen answer always first, y is always 1.
    Bins of equal width (Guo et al., arXiv 1706.04599), [k/bins, (k + 1)/bins), the last one with its end.

    probabilities: [n], 0 to 1. outcomes: [n], 0 to 1. bins: at least 1.
    """
    p, y = _numbers(probabilities=probabilities, outcomes=outcomes, low=0, high=1)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, but it is {bins}")
    at = np.searchsorted(np.arange(1, bins) / bins, p, side="right")
    count, sum_p, sum_y = (np.bincount(at, x, minlength=bins) for x in (None, p, y))
    filled = np.where(count > 0, count, np.nan)
    return Calibration(
        error=float(np.abs(sum_y - sum_p).sum() / len(p)),
        brier=float(np.mean((p - y) ** 2)),
        log_loss=float(np.mean(-xlogy(y, p) - xlog1py(1 - y, -p))),
        confidence=sum_p / filled,
        accuracy=sum_y / filled,
        count=count,
    )


def auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """P(score of a positive > score of a negative) + ½ P(the two are equal), over all pairs of one and the other.

    The area under the ROC curve (Mann and Whitney's U / n₊n₋): 1 where the scores separate the two, ½ for scores that
    know nothing. For tokens: does a token reward, negated, single out the wrong ones? From ranks, in O(n log n).

    scores: [n]. positive: bool [n], with both kinds in it. Negating the scores gives 1 − AUC.
    """
    scores, positive = _numbers(scores=scores, positive=positive)
    found = positive != 0
    ours, others = int(found.sum()), int((~found).sum())
    if not ours or not others:
        raise ValueError(f"positive holds {ours} positives and {others} negatives: want one of each at least")
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # of equal scores, their mean rank
    return float((rank[place][found].sum() - ours * (ours + 1) / 2) / (ours * others))


# ---- reward against KL -----------------------------------------------------------------------------------------------


def frontier(kl: ArrayLike, reward: ArrayLike) -> np.ndarray:
    """Indices of the points that no other one beats: none has at most the KL and at least the reward, one strictly.

    The KL-reward frontier of DPO's Figure 2 (arXiv 2305.18290), over temperatures, checkpoints and seeds.
    kl: [n], nats. reward: [n]. Returns int [m], by rising KL (and so by rising reward); equal points all stay.
    """
    kl, reward = _numbers(kl=kl, reward=reward)
    kept = []
    for i in np.lexsort((-reward, kl)):
        if not kept or reward[i] > reward[kept[-1]] or (kl[i], reward[i]) == (kl[kept[-1]], reward[kept[-1]]):
            kept.append(i)
    return np.array(kept)


def fit_overoptimisation(kl: ArrayLike, reward: ArrayLike, kind: str) -> Overoptimisation:
    """R = d(a − b d) for kind="bon", best of n; R = d(a − b log d) for kind="rl";  d = √KL. Least squares in R.

    Gao et al. (arXiv 2210.10760): gold reward against distance while a proxy is optimised. It falls beyond the peak,
    d = a/2b and d = exp(a/b − 1).

    kl: [n], KL(π‖π_ref), nats, at least 0. reward: [n], the gold reward less that of π_ref, so that R(0) = 0.
    ValueError for points at fewer than two different distances above 0.
    """
    (d,) = _numbers(kl=kl, low=0)
    d, (_, r) = np.sqrt(d), _numbers(kl=kl, reward=reward)
    if kind not in ("bon", "rl"):
        raise ValueError(f'kind must be "bon" or "rl", but it is {kind!r}')
    if len(np.unique(d[d > 0])) < 2:
        raise ValueError("kl must hold at least two different values above 0")
    x = np.stack([d, -d * d if kind == "bon" else -xlogy(d, d)], axis=1)
    fit, *_ = np.linalg.lstsq(x, r, rcond=None)
    a, b = map(float, fit)
    peak = math.inf
    if b > 0:
        with np.errstate(over="ignore"):
            peak = float(max(a, 0) / (2 * b) if kind == "bon" else np.exp(a / b - 1))
    return Overoptimisation(a, b, peak, float(np.sqrt(np.mean((x @ fit - r) ** 2))))


# ---- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    paired: ArrayLike | None = None,
    level: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile bootstrap: `statistic` of the rows, and its quantiles (1 ± level)/2 over resamples of the rows.

    values: [n, ...], n at least 2, independent rows (seeds or prompts, not tokens). statistic: of such an array, a
    number. paired: the shape of values, another method on the same rows: the interval is of statistic(values) −
    statistic(paired), both on the same resampled rows. level: above 0, below 1. samples: at least 1.
    Percentiles are too narrow for few rows: √((n − 1)/n) for a mean, and worse below some 20.
    """
    both = {"values": values} | ({} if paired is None else {"paired": paired})
    arrays = _numbers(**both, least=2, flat=False)
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, but it is {level}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, but it is {samples}")

    def of(rows):
        first, *other = (statistic(array[rows]) for array in arrays)
        return first - other[0] if other else first

    n = len(arrays[0])
    if statistic is np.mean and arrays[0].size * samples <= 1_000_000:  # a page of tables takes hundreds of these
        rows = _few_resamples(n, samples, seed)
        means = [array[rows].reshape(samples, -1).mean(1) for array in arrays]
        drawn = means[0] - means[1] if paired is not None else means[0]
    else:
        drawn = [of(rows) for rows in _resamples(n, samples, seed)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(of(np.arange(n))), float(low), float(high))


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _numbers(
    *, low: float = -math.inf, high: float = math.inf, least: int = 1, flat: bool = True, **arrays: ArrayLike
) -> list[np.ndarray]:
    """The arrays in float64, of one shape, [n] if flat, with n at least `least`, finite and from low to high."""
    out = []
    for name, array in arrays.items():
        try:
            array = np.asarray(array, np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is no array of numbers: {error}") from error
        if array.ndim < 1 or (flat and array.ndim != 1) or len(array) < least:
            raise ValueError(f"{name} has shape {array.shape}, want [n{'' if flat else ', ...'}], n at least {least}")
        if out and array.shape != out[0].shape:
            raise ValueError(f"{name} has shape {array.shape}, but {next(iter(arrays))} has shape {out[0].shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity, first in row {np.argwhere(~np.isfinite(array))[0][0]}")
        if (bad := array[(array < low) | (array > high)]).size:
            raise ValueError(f"{name} must be from {low:g} to {high:g}, but it holds {bad[0]:g}")
        out.append(array)
    return out


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _resamples(n: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of n rows drawn with replacement, `samples` times."""
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(samples))


@lru_cache(maxsize=4)
def _few_resamples(n: int, samples: int, seed: int) -> np.ndarray:
    """The same as one array, [samples, n]."""
    return np.stack(list(_resamples(n, samples, seed)))


def _z_scores(covariates: ArrayLike, weights: np.ndarray, centre: bool) -> np.ndarray:
    (c,) = _numbers(covariates=covariates, flat=False)
    if c.ndim != 2 or len(c) != len(weights):
        raise ValueError(f"covariates has shape {c.shape}, want [n, k] with n = {len(weights)}, as outcomes")
    c = c - np.average(c, axis=0, weights=weights) * centre
    scale = np.sqrt(np.average(c**2, axis=0, weights=weights))
    if not (scale > 1e-12).all():
        raise ValueError(f"covariates are {'all the same' if centre else 'all 0'} in column {int(scale.argmin())}")
    return c / scale


def _logistic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """argmax_c Σ_i w_i [y_i log σ(x_i c) + (1 − y_i) log σ(−x_i c)] by Newton's method, NaN unless finite and unique.

    Where it is not, the information in some direction is 0, or goes to 0 as c goes to infinity. One loss among n wins
    leaves about 4/n of what there is at c = 0.
    """
    c, nothing = np.zeros(x.shape[1]), np.full(x.shape[1], np.nan)

    def loss(c):
        return weights @ (np.logaddexp(0, x @ c) - y * (x @ c))

    for iteration in range(100):
        p, q = expit(x @ c), expit(-(x @ c))
        information = (x * (weights * p * q)[:, None]).T @ x
        if iteration == 0:
            unit = np.sqrt(information.diagonal())
        if not unit.all() or np.linalg.eigvalsh(information / np.outer(unit, unit))[0] < 1e-9:
            return nothing
        step = np.linalg.solve(information, x.T @ (weights * (y * q - (1 - y) * p)))
        if np.abs(x @ step).max() < 1e-6:
            return c + step  # to about 1e-12: the error is squared at each step
        size, limit = 1.0, loss(c) * (1 + 1e-12)
        while loss(c + size * step) > limit and size > 1e-6:
            size /= 2
        c = c + size * step
    return nothing
