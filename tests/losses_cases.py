"""The cases of `test_losses.py`: for every function of rto_jax.losses its arrays, its numbers and an oracle.

An oracle is plain loops over float64 NumPy arrays, written from the formula, of one row where `rows` wraps it. A check
that cannot apply to a function is listed in its case, with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np

from rto_jax import losses

B, T, V, K = 8, 7, 5, 3


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def logps(seed: int, *shape: int) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(size=shape).astype(np.float32)


def integers(seed: int, low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def coins(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 1, 0],
        [1, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0, 0, 0],
    ],
    bool,
)
# Three answers to a prompt: row b, and the two after it. Prompt 1 has no tokens at all.
GROUP_MASK = np.stack([np.roll(MASK, -k, axis=0) for k in range(K)], axis=1) & (np.arange(B) != 1)[:, None, None]


@dataclass(frozen=True, eq=False)
class Case:
    """`function` takes a batch of rows and `row` one row: the same function, but where it couples its whole batch."""

    function: Callable
    arrays: dict[str, np.ndarray]
    numbers: dict[str, float]
    oracle: Callable
    exempt: dict[str, str] = field(default_factory=dict)
    """checks that cannot apply, and why"""
    row: Callable | None = None
    whole: Callable | None = None
    """where `row` couples its batch: the oracle of arrays of any shape"""
    stopped: tuple[str, ...] = ()
    """arrays that no gradient flows into: finite differences see what the gradient must not"""
    mask_name: str = "mask"
    nothing: np.ndarray | float = 0.0
    """what a row without any token gives"""
    dtype: type = np.float32
    bad: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """numbers out of range, where that is not what BAD says of the name"""

    def __post_init__(self):
        assert ("masks" in self.exempt) == (self.mask_name not in self.arrays), "no mask wants a reason"

    def __call__(self, *arrays):
        return self.both(*(arrays or self.arrays.values()))[0]

    def gradients(self, *arrays):
        return self.both(*arrays)[1]

    @cached_property
    def value(self) -> Callable:
        return jax.jit(partial(self.function, **self.numbers))

    @cached_property
    def both(self) -> Callable:
        """The value, and the gradients of a weighted sum of all of it, so that every output has a say."""
        return jax.jit(partial(value_and_gradients, self, partial(self.function, **self.numbers)))

    @property
    def mask(self) -> np.ndarray:
        return self.arrays[self.mask_name]

    @property
    def floats(self) -> tuple[int, ...]:
        return tuple(i for i, x in enumerate(self.arrays.values()) if x.dtype == np.float32)

    def replace(self, **arrays) -> list[np.ndarray]:
        return list((self.arrays | arrays).values())


def value_and_gradients(case: Case, function: Callable, *arrays) -> tuple[jax.Array, list[jax.Array]]:
    def weighted(*arrays):
        out = function(*arrays)
        return jnp.sum(out * normal(99, *out.shape)), out

    if not case.floats:
        return function(*arrays), []
    gradients, out = jax.grad(weighted, case.floats, has_aux=True)(*arrays)
    return out, list(gradients)


def rows(function: Callable) -> Callable:
    """The oracle of a batch from the oracle of a row."""
    return lambda *arrays, **numbers: np.stack([function(*row, **numbers) for row in zip(*arrays, strict=True)])


def over_rows(function: Callable) -> Callable:
    return lambda *arrays, **numbers: jax.vmap(partial(function, **numbers))(*map(jnp.asarray, arrays))


def coupled(row: Callable, arrays: dict, numbers: dict, oracle: Callable, **fields) -> Case:
    """Of a function that couples its whole batch: here every row is a batch of its own."""
    return Case(over_rows(row), arrays, numbers, rows(oracle), row=row, whole=oracle, **fields)


def reduced(loss: Callable) -> Callable:
    """A loss without a mask, as it is used: reduced by a mean over one."""
    return lambda *args, **numbers: losses.masked_mean(loss(*args[:-1], **numbers), args[-1], axis=-1)


def stacked(function: Callable, axis: int = -2) -> Callable:
    """Of a function that returns a tuple or a dict, one array."""

    def one(*arrays, **numbers):
        out = function(*arrays, **numbers)
        return jnp.stack(list(out.values()) if isinstance(out, dict) else out, axis=axis)

    return one


# ---- oracles: log-probabilities --------------------------------------------------------------------------------------


def softmax(logits):
    weights = [np.exp(z) for z in logits]
    return np.array(weights) / sum(weights)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle_token_logps(logits, tokens, temperature):
    return np.array([np.log(softmax(z / temperature)[token]) for z, token in zip(logits, tokens, strict=True)])


def oracle_entropy(logits, mask, temperature):
    out = np.zeros(mask.shape)
    for t in np.flatnonzero(mask):
        out[t] = -sum(p * np.log(p) for p in softmax(logits[t] / temperature))
    return out


def kl(p, q):
    return sum(p[v] * np.log(p[v] / q[v]) for v in range(len(p)))


def oracle_token_kl(logits, ref_logits, mask, temperature):
    out = np.zeros(mask.shape)
    for t in np.flatnonzero(mask):
        out[t] = kl(softmax(ref_logits[t] / temperature), softmax(logits[t] / temperature))
    return out


def oracle_linear_logps(hidden, unembedding, tokens, mask, temperature):
    out = np.zeros(mask.shape)
    for t in np.flatnonzero(mask):
        out[t] = np.log(softmax(unembedding @ hidden[t] / temperature)[tokens[t]])
    return out


def oracle_linear_statistics(hidden, unembedding, ref_hidden, ref_unembedding, tokens, mask, temperature):
    out = np.zeros((4, len(mask)))
    for t in np.flatnonzero(mask):
        p, q = (softmax(w @ h[t] / temperature) for h, w in ((hidden, unembedding), (ref_hidden, ref_unembedding)))
        out[:, t] = np.log(p[tokens[t]]), -sum(p * np.log(p)), np.log(q[tokens[t]]), kl(q, p)
    return out


def everywhere(oracle):
    """An oracle that takes a mask last, without one."""
    return lambda *arrays, **numbers: oracle(*arrays, np.ones(arrays[0].shape[:1], bool), **numbers)


# ---- oracles: preferences --------------------------------------------------------------------------------------------


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def log_odds(chosen, rejected, ref_chosen, ref_rejected):
    # TRL's order of operations: the policy's log-ratio minus the reference's.
    return (chosen - rejected) - (ref_chosen - ref_rejected)


def oracle_dpo(*sums, beta, label_smoothing):
    z = beta * log_odds(*sums)
    return -log_sigmoid(z) * (1 - label_smoothing) - log_sigmoid(-z) * label_smoothing


def oracle_robust_dpo(*sums, beta, label_smoothing):
    z = beta * log_odds(*sums)
    noisy = -(1 - label_smoothing) * log_sigmoid(z) + label_smoothing * log_sigmoid(-z)
    return noisy / (1 - 2 * label_smoothing)


def oracle_r_dpo(*arrays, beta, alpha):
    *sums, chosen_lengths, rejected_lengths = arrays
    return -log_sigmoid(beta * log_odds(*sums) + alpha * (chosen_lengths - rejected_lengths))


def oracle_tdpo(*arrays, beta, alpha=1.0):
    *sums, chosen_kl, rejected_kl = arrays
    return -log_sigmoid(beta * (log_odds(*sums) - alpha * (rejected_kl - chosen_kl)))


def mean_logps(sums, lengths):
    return np.array([total / length if length else 0.0 for total, length in zip(sums, lengths, strict=True)])


def oracle_simpo(chosen, rejected, chosen_lengths, rejected_lengths, beta, gamma):
    gap = mean_logps(chosen, chosen_lengths) - mean_logps(rejected, rejected_lengths)
    return -log_sigmoid(beta * gap - gamma)


def oracle_orpo(chosen, rejected, chosen_lengths, rejected_lengths, lam):
    m, other = mean_logps(chosen, chosen_lengths), mean_logps(rejected, rejected_lengths)
    odds, other_odds = np.exp(m) / (1 - np.exp(m)), np.exp(other) / (1 - np.exp(other))
    return -m - lam * log_sigmoid(np.log(odds / other_odds))


def oracle_cpo(chosen, rejected, chosen_lengths, beta, label_smoothing, nll_weight):
    z = beta * (chosen - rejected)
    preference = -log_sigmoid(z) * (1 - label_smoothing) - log_sigmoid(-z) * label_smoothing
    return preference - nll_weight * mean_logps(chosen, chosen_lengths)


def oracle_kto(policy, ref, desirable, kl, beta, desirable_weight, undesirable_weight):
    out = []
    for ratio, good, z in zip(policy - ref, desirable, np.broadcast_to(kl, policy.shape), strict=True):
        if good:
            out.append(desirable_weight * (1 - sigmoid(beta * (ratio - z))))
        else:
            out.append(undesirable_weight * (1 - sigmoid(beta * (z - ratio))))
    return np.array(out)


def oracle_kto_kl(policy, ref):
    return np.array(max(0.0, (policy - ref).mean()))


def oracle_kto_pair(chosen, rejected, ref_chosen, ref_rejected, beta):
    z_chosen, z_rejected = oracle_kto_kl(chosen, ref_chosen), oracle_kto_kl(rejected, ref_rejected)
    good = 1 - sigmoid(beta * (chosen - ref_chosen - z_rejected))
    bad = 1 - sigmoid(beta * (z_chosen - (rejected - ref_rejected)))
    return (good + bad) / 2


def oracle_plackett_luce(rewards, mask):
    """Minus the log of: the best is drawn first, then the best of the rest, …"""
    weights = np.exp(rewards[mask])
    return -sum(np.log(weights[k] / weights[k:].sum()) for k in range(len(weights)))


def oracle_preference_metrics(chosen, rejected, ref_chosen, ref_rejected, beta):
    win, lose = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return np.stack([win, lose, win - lose, 1.0 * (win > lose)], axis=-1)


# ---- oracles: token rewards ------------------------------------------------------------------------------------------


def clamp(x, bound):
    return x if bound is None else min(max(x, -bound), bound)


def oracle_place(rewards, mask, ends=None, placement="token"):
    real = np.flatnonzero(mask)
    out = np.zeros(mask.shape)
    run = 0.0
    for t in real:
        run += rewards[t]
        if placement in ("token", "shaping"):
            out[t] = rewards[t]
        if placement == "segment" and (ends[t] or t == real[-1]):
            out[t], run = run, 0.0
        if placement == "last" and t == real[-1]:
            out[t] = run
        if placement == "shaping" and t == real[-1]:
            out[t] -= run
    return out


def oracle_rto(
    dpo, ref, policy, terminal, mask, dpo_ref, ends, beta1, beta2, beta3=1.0, dpo_clip=None, placement="token"
):
    dense = np.array([clamp(beta1 * x, dpo_clip) for x in dpo - dpo_ref])
    out = oracle_place(dense, mask, ends, placement)
    for t in np.flatnonzero(mask):
        out[t] -= beta2 * (policy[t] - ref[t])
        if not mask[t + 1 :].any():
            out[t] += beta3 * terminal
    return out


def oracle_rto_alone(dpo, ref, policy, terminal, mask, **numbers):
    return oracle_rto(dpo, ref, policy, terminal, mask, ref, None, **numbers)


def oracle_official(dpo, ref, policy, terminal, mask, other, beta1, beta2, dpo_clip):
    """In the order of the authors' code, which asks of each flag whether it is above 0."""
    dense = (dpo - ref) * mask
    if beta1 != 1 and beta1 > 0:
        dense = dense * beta1
    if dpo_clip > 0:
        dense = np.array([clamp(x, dpo_clip) for x in dense])
    out = dense - (beta2 if beta2 > 0 else 0) * (policy - ref) * mask
    for last in np.flatnonzero(mask)[-1:]:
        out[last] += clamp(terminal, 10)
    return out


def oracle_compose(dense, penalty, score, mask, ends, scale, clip):
    """The rewards, then the parts by name."""
    dense = oracle_place(np.array([clamp(scale * x, clip) for x in dense]), mask, placement="shaping")
    length, penalty = np.where(mask, -0.3, 0), oracle_place(-0.1 * penalty, mask, ends, "segment")
    whole = np.zeros(mask.shape)
    for last in np.flatnonzero(mask)[-1:]:
        whole[last] = clamp(2 * score, clip)
    return np.stack([dense + length + penalty + whole, dense, length, penalty, whole])


def compose(dense, penalty, score, mask, ends, *, scale, clip):
    terms = {
        "dense": losses.RewardTerm(dense, scale, clip, "shaping"),
        "penalty": losses.RewardTerm(penalty, scale=-0.1, placement="segment"),
        "score": losses.RewardTerm(score, 2.0, clip),
        "length": losses.RewardTerm(jnp.ones(mask.shape), scale=-0.3),
    }
    return losses.compose_rewards(terms, mask, ends=ends)


def oracle_segment_ends(tokens, mask):
    real = np.flatnonzero(mask)
    return np.array([t in real and (tokens[t] in (1, 3) or t == real[-1]) for t in range(len(tokens))])


def oracle_shape(rewards, potentials, mask, gamma):
    real, out = np.flatnonzero(mask), np.zeros(mask.shape)
    for i, t in enumerate(real):
        ahead = potentials[real[i + 1]] if i + 1 < len(real) else 0
        out[t] = rewards[t] + gamma * ahead - potentials[t]
    return out


def oracle_prefix_sums(x, mask):
    return np.array([x[: t + 1][mask[: t + 1]].sum() if mask[t] else 0.0 for t in range(len(x))])


# ---- oracles: From r to Q* -------------------------------------------------------------------------------------------


def oracle_soft_values(logits, beta):
    return np.array([beta * np.log(sum(np.exp(z) for z in state)) for state in logits])


def oracle_optimal_advantages(logits, ref_logits, beta):
    return np.stack([beta * np.log(softmax(z) / softmax(r)) for z, r in zip(logits, ref_logits, strict=True)])


def oracle_expected_rewards(logits, ref_logits, beta):
    return np.array([-beta * kl(softmax(r), softmax(z)) for z, r in zip(logits, ref_logits, strict=True)])


def oracle_rewards_of_q(logits, tokens, ref, mask, beta):
    """Eq. 7 read backwards, Q and V in reward units."""
    real, out = np.flatnonzero(mask), np.zeros(mask.shape)
    q, v = beta * logits, beta * np.log(np.exp(logits).sum(-1))
    for i, t in enumerate(real):
        out[t] = q[t, tokens[t]] - beta * ref[t] - (v[real[i + 1]] if i + 1 < len(real) else 0)
    return out


# ---- oracles: advantages ---------------------------------------------------------------------------------------------


def oracle_gae(rewards, values, mask, gamma, lam):
    """The double sum Σ_l (γλ)^l δ_{t+l} over the row without its masked positions."""
    real = np.flatnonzero(mask)
    reward, value = rewards[real], np.append(values[real], 0)
    delta = [reward[i] + gamma * value[i + 1] - value[i] for i in range(len(real))]
    out = np.zeros((2, len(mask)))
    for i, t in enumerate(real):
        out[0, t] = sum((gamma * lam) ** k * delta[i + k] for k in range(len(real) - i))
        out[1, t] = out[0, t] + values[t]
    return out


def oracle_lambda_returns(rewards, values, mask, gamma, lam):
    """Backwards from the end, where value and return are 0."""
    out, value, ahead = np.zeros(mask.shape), 0.0, 0.0
    for t in np.flatnonzero(mask)[::-1]:
        out[t] = rewards[t] + gamma * ((1 - lam) * value + lam * ahead)
        value, ahead = values[t], out[t]
    return out


def oracle_monte_carlo(rewards, mask, gamma):
    real, out = np.flatnonzero(mask), np.zeros(mask.shape)
    for i, t in enumerate(real):
        out[t] = sum(gamma**k * rewards[s] for k, s in enumerate(real[i:]))
    return out


def others(x, i):
    return np.mean([x[j] for j in range(len(x)) if j != i])


def oracle_rloo(scores):
    return np.array([scores[i] - others(scores, i) for i in range(len(scores))])


def oracle_rloo_dense(scores, rewards, mask, gamma):
    means = [compact(np.mean)(r, m) for r, m in zip(rewards, mask, strict=True)]
    out = np.zeros(mask.shape)
    for i in range(len(scores)):
        to_go = oracle_monte_carlo(rewards[i] - others(means, i), mask[i], gamma)
        out[i] = np.where(mask[i], to_go + scores[i] - others(scores, i), 0)
    return out


def oracle_remax_dense(score, greedy, rewards, mask, gamma):
    return np.where(mask, oracle_monte_carlo(rewards, mask, gamma) + score - greedy, 0)


def group_normalised(x, scale):
    if x.size < 2:
        return x - x.sum()
    return (x - x.mean()) / (x.std(ddof=1) + 1e-4 if scale else 1)


def oracle_grpo(scores, scale=True):
    return group_normalised(scores, scale)


def oracle_grpo_dense(scores, rewards, mask, gamma, scale=True):
    dense = np.zeros(mask.shape)
    dense[mask] = group_normalised(rewards[mask], scale)
    whole = group_normalised(scores, scale)
    return np.stack(
        [np.where(m, oracle_monte_carlo(r, m, gamma) + w, 0) for r, m, w in zip(dense, mask, whole, strict=True)]
    )


def oracle_reinforce_pp(rewards, mask, gamma):
    flat_rewards, flat_mask = rewards.reshape(-1, rewards.shape[-1]), mask.reshape(-1, mask.shape[-1])
    return oracle_whiten(rows(oracle_monte_carlo)(flat_rewards, flat_mask, gamma=gamma), flat_mask, True).reshape(
        mask.shape
    )


# ---- oracles: PPO ----------------------------------------------------------------------------------------------------


def oracle_policy_loss(logps, old_logps, advantages, clip, clip_high=None, dual_clip=None):
    out = np.zeros(logps.shape)
    for i, advantage in np.ndenumerate(advantages):
        ratio = np.exp(logps[i] - old_logps[i])
        clipped = min(max(ratio, 1 - clip), 1 + (clip if clip_high is None else clip_high))
        objective = min(ratio * advantage, clipped * advantage)
        if dual_clip is not None and advantage < 0:
            objective = max(objective, dual_clip * advantage)
        out[i] = -objective
    return out


def oracle_value_loss(values, old_values, returns, clip):
    clipped = np.minimum(np.maximum(values, old_values - clip), old_values + clip)
    return np.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2


def oracle_k3(logps, ref_logps):
    ratio = np.exp(ref_logps - logps)
    return ratio - 1 - np.log(ratio)


def oracle_adaptive_kl(coefficient, kl, samples, target, horizon):
    return coefficient * (1 + min(max(kl / target - 1, -0.2), 0.2) * samples / horizon)


def oracle_update_moments(x, mask, count, mean, squares):
    """From sums of powers: Σ(x − μ)² = Σx² − nμ²."""
    total, power = count * mean + x[mask].sum(), squares + count * mean**2 + (x[mask] ** 2).sum()
    count = count + mask.sum()
    return np.array([count, total / count, power - total**2 / count])


def moments(count, mean, squares):
    return losses.RunningMoments(jnp.float32(count), jnp.float32(mean), jnp.float32(squares))


def oracle_normalise(rewards, count, mean, squares, clip=np.inf, shift_mean=True):
    normalised = (rewards - (mean if shift_mean else 0)) / np.sqrt(squares / count + 1e-8)
    return np.minimum(np.maximum(normalised, -clip), clip)


# ---- oracles: masked reductions --------------------------------------------------------------------------------------


def compact(function):
    return lambda x, mask: function(x[mask]) if mask.any() else 0.0


def oracle_whiten(x, mask, shift_mean):
    out, real = np.zeros(x.shape), x[mask]
    if real.size:
        out[mask] = (real - real.mean()) / np.sqrt(real.var() + 1e-8) + (0 if shift_mean else real.mean())
    return out


def oracle_token_mean(x, mask):
    return np.array([x[mask].sum(), mask.sum()])


def oracle_sequence_mean(x, mask):
    means = [r[m].mean() for r, m in zip(x.reshape(-1, T), mask.reshape(-1, T), strict=True) if m.any()]
    return np.array([sum(means), len(means)])


# ---- oracles: selection ----------------------------------------------------------------------------------------------


def oracle_best_of_n(rewards, mask):
    best = -1
    for i in np.flatnonzero(mask):
        if best < 0 or rewards[i] > rewards[best]:
            best = i
    return np.array(best)


def oracle_top_answers(rewards, mask):
    """The 3 best, the first of equals."""
    best = sorted(np.flatnonzero(mask), key=lambda i: (-rewards[i], i))[:3]
    return np.isin(np.arange(len(rewards)), best)


def oracle_rejection(rewards, mask, beta):
    draws = np.asarray(jax.random.uniform(jax.random.key(0), rewards.shape, jnp.float32))
    out = np.zeros(mask.shape, bool)
    for i in range(len(rewards)):
        for j in np.flatnonzero(mask[i]):
            out[i, j] = draws[i, j] < np.exp((rewards[i, j] - rewards[i][mask[i]].max()) / beta)
    return out


def oracle_response_mask(tokens, valid, start, end):
    out, acting = np.zeros(valid.shape, bool), False
    for t in range(len(tokens)):
        out[t] = acting and valid[t]
        opening = slice(t + 1 - len(start), t + 1)
        if valid[t] and tokens[t] == end:
            acting = False
        elif opening.start >= 0 and valid[opening].all() and tuple(tokens[opening]) == start:
            acting = True
    return out


# ---- data ------------------------------------------------------------------------------------------------------------


FOUR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
SUMS = {name: 10 * logps(i, B) for i, name in enumerate(FOUR)}
LENGTHS = {name: integers(i, 1, 30, B) for i, name in enumerate(("chosen_lengths", "rejected_lengths"))}
POLICY_PAIR = {name: x for name, x in SUMS.items() if "ref" not in name}
EMPTY = np.arange(B) == 3  # an answer without tokens
ONE_EMPTY = {
    "rejected_logps": np.where(EMPTY, np.float32(0), POLICY_PAIR["rejected_logps"]),
    "rejected_lengths": np.where(EMPTY, 0, LENGTHS["rejected_lengths"]),
}
DIVERGENCES = {"chosen_kl": -4 * logps(7, B), "rejected_kl": -4 * logps(8, B)}
SINGLES = {"logps": 5 * logps(1, B), "ref_logps": 5 * logps(2, B), "desirable": coins(3, B)}
REWARDS = {
    "dpo_logps": logps(1, B, T),
    "ref_logps": logps(2, B, T),
    "policy_logps": logps(3, B, T),
    "terminal_rewards": normal(4, B),
    "mask": MASK,
}
DPO_REF, ENDS = {"dpo_ref_logps": logps(13, B, T)}, {"ends": coins(5, B, T)}
RTO_NUMBERS = {"beta1": 0.5, "beta2": 0.1, "dpo_clip": 0.4}
DENSE = {"rewards": normal(5, B, T), "mask": MASK}
COMPOSED = {"dense": normal(1, B, T), "penalty": normal(2, B, T), "score": normal(3, B), "mask": MASK, **ENDS}
CRITIC = {"rewards": normal(5, B, T), "values": normal(6, B, T), "mask": MASK}
DISCOUNTS = {"gamma": 0.9, "lam": 0.8}
GROUP = {"scores": normal(1, B, K), "token_rewards": normal(2, B, K, T), "mask": GROUP_MASK}
GREEDY = {"scores": normal(1, B), "greedy_scores": normal(2, B), "token_rewards": normal(3, B, T), "mask": MASK}
SURROGATE = {"logps": logps(5, B, T), "old_logps": logps(6, B, T), "advantages": normal(7, B, T)}
ASYMMETRIC = {"clip": 0.2, "clip_high": 0.4, "dual_clip": 1.6}
VALUES = {"values": normal(8, B, T), "old_values": normal(9, B, T), "returns": normal(10, B, T)}
ESTIMATED = {"logps": logps(5, B, T), "ref_logps": logps(6, B, T)}
MASKED_X = {"x": 2 + 3 * normal(11, B, T), "mask": MASK}
LOGITS = {"logits": 2 * normal(0, B, T, V)}
# One unembedding for all rows, of numbers that bfloat16 has too, as it is rounded to the dtype of the hidden states.
EMBEDDING, REF_EMBEDDING = (np.asarray(jnp.asarray(normal(i, V, K), "bfloat16"), np.float32) for i in (2, 3))
HIDDEN = {"hidden": normal(4, B, T, K), "tokens": integers(5, 0, V, B, T), "mask": MASK}
BOTH_HIDDEN = {"hidden": HIDDEN["hidden"], "ref_hidden": normal(6, B, T, K)} | HIDDEN
MODELS = {"unembedding": normal(7, B, V, K), "ref_unembedding": normal(8, B, V, K + 1)}  # one for every row
BOTH_LOGITS = LOGITS | {"ref_logits": 2 * normal(1, B, T, V)}
ANSWERS = {"rewards": np.round(2 * normal(3, B, T)), "mask": MASK}  # rounded: some are equal
STATE = {"count": 4.0, "mean": 1.5, "squares": 20.0}
SEEN = {"count": (), "mean": (), "squares": ()}  # a state, not numbers that a caller chooses

# ---- reasons ---------------------------------------------------------------------------------------------------------

PAIR = {"masks": "one number per pair or response: its tokens are summed before"}
STATES = {"masks": "every state by itself: nothing is summed over tokens"}
BARE = {"masks": "unreduced: the case of its masked mean has the mask"}
ALL = {"masks": "no mask given: the case with a mask has one"}
ONE_ARRAY = {"shapes": "one array: nothing to disagree with"}
REVERSE = {"forward mode": "a custom VJP: reverse mode only"}
ONE_MODEL = {
    check: "the rows' own unembeddings are mapped over: test_linear, and the case with one for all"
    for check in ("no tokens", "shapes", "empty batch")
}
CLIPS = {"bfloat16 is near": "a rounded input may fall on the other side of a clip"}
CHOICE = {
    "gradients": "a choice, not a number",
    "extremes": "nothing to differentiate",
    "bfloat16 is near": "a rounded input may change the choice",
}
SELECTION = CHOICE | {"no tokens": "chooses among one answer or more"}
NUMBERS = {
    "masks": "takes numbers",
    "shapes": "takes numbers: an array is refused",
    "empty batch": "takes numbers",
    "leading dimensions": "takes numbers",
}
COUNTS = {
    "masks": "takes a count",
    "gradients": "takes integers",
    "extremes": "takes integers",
    "empty batch": "averages nothing",
}
SCORED = {"junk in scores": "an answer without tokens still has a score, the others' baseline"}
TOKEN_IDS = {"empty batch": "marks tokens: nothing is averaged"}

# ---- cases -----------------------------------------------------------------------------------------------------------

CASES = {
    # log-probabilities
    "token_logps": Case(
        losses.token_logps,
        LOGITS | {"tokens": integers(0, 0, V, B, T)},
        {"temperature": 0.7},
        rows(oracle_token_logps),
        {"masks": "a mask reduces it: test_losses_values has junk tokens under one"},
    ),
    "entropy": Case(losses.entropy, LOGITS | {"mask": MASK}, {"temperature": 0.7}, rows(oracle_entropy), REVERSE),
    "entropy, everywhere, in chunks": Case(
        partial(losses.entropy, chunk=3),
        LOGITS,
        {"temperature": 0.7},
        rows(everywhere(oracle_entropy)),
        REVERSE | ALL | ONE_ARRAY,
    ),
    "token_kl": Case(losses.token_kl, BOTH_LOGITS | {"mask": MASK}, {"temperature": 2}, rows(oracle_token_kl), REVERSE),
    "token_kl, everywhere": Case(
        losses.token_kl, BOTH_LOGITS, {"temperature": 2}, rows(everywhere(oracle_token_kl)), REVERSE | ALL
    ),
    "sequence_kl, in chunks": Case(
        partial(losses.sequence_kl, chunk=3),
        BOTH_LOGITS | {"mask": MASK},
        {"temperature": 2},
        lambda *args, **numbers: rows(oracle_token_kl)(*args, **numbers).sum(-1),
        REVERSE,
    ),
    "linear_token_logps, in chunks": Case(
        lambda hidden, *args, **numbers: losses.linear_token_logps(hidden, EMBEDDING, *args, chunk=2, **numbers),
        HIDDEN,
        {"temperature": 0.7},
        rows(lambda hidden, *args, **numbers: oracle_linear_logps(hidden, EMBEDDING, *args, **numbers)),
        REVERSE,
    ),
    "linear_token_logps of several models": Case(
        over_rows(losses.linear_token_logps),
        {"hidden": HIDDEN["hidden"], "unembedding": MODELS["unembedding"]} | HIDDEN,
        {"temperature": 0.7},
        rows(oracle_linear_logps),
        REVERSE | ONE_MODEL,
        row=losses.linear_token_logps,
    ),
    "linear_statistics, in chunks": Case(
        stacked(
            lambda hidden, ref, *args, **numbers: losses.linear_statistics(
                hidden, EMBEDDING, ref, REF_EMBEDDING, *args, chunk=2, **numbers
            )
        ),
        BOTH_HIDDEN,
        {"temperature": 2},
        rows(
            lambda hidden, ref, *args, **numbers: oracle_linear_statistics(
                hidden, EMBEDDING, ref, REF_EMBEDDING, *args, **numbers
            )
        ),
        REVERSE,
        stopped=("ref_hidden",),
    ),
    "linear_statistics of several models": Case(
        over_rows(stacked(losses.linear_statistics)),
        {
            "hidden": HIDDEN["hidden"],
            "unembedding": MODELS["unembedding"],
            "ref_hidden": normal(6, B, T, K + 1),
            "ref_unembedding": MODELS["ref_unembedding"],
        }
        | HIDDEN,
        {"temperature": 2},
        rows(oracle_linear_statistics),
        REVERSE | ONE_MODEL,
        row=stacked(losses.linear_statistics),
        stopped=("ref_hidden", "ref_unembedding"),
    ),
    # preferences
    "bradley_terry_loss": Case(
        losses.bradley_terry_loss,
        {"chosen_rewards": 2 * normal(1, B), "rejected_rewards": 2 * normal(2, B)},
        {"margin": 0.3},
        lambda chosen, rejected, margin: -log_sigmoid(chosen - rejected - margin),
        PAIR,
        bad={"margin": (np.nan,)},
    ),
    "bradley_terry_loss, a margin for each": Case(
        lambda chosen, rejected, margin: losses.bradley_terry_loss(chosen, rejected, margin=margin),
        {"chosen_rewards": 2 * normal(1, B), "rejected_rewards": 2 * normal(2, B), "margin": normal(3, B)},
        {},
        lambda chosen, rejected, margin: -log_sigmoid(chosen - rejected - margin),
        PAIR,
    ),
    "plackett_luce_loss": Case(
        losses.plackett_luce_loss, {"rewards": normal(1, B, T), "mask": MASK}, {}, rows(oracle_plackett_luce)
    ),
    "plackett_luce_loss of all": Case(
        losses.plackett_luce_loss,
        {"rewards": normal(1, B, T)},
        {},
        rows(everywhere(oracle_plackett_luce)),
        ALL | ONE_ARRAY,
    ),
    "dpo_loss": Case(losses.dpo_loss, SUMS, {"beta": 0.1, "label_smoothing": 0.2}, oracle_dpo, PAIR),
    "robust_dpo_loss": Case(
        losses.robust_dpo_loss,
        SUMS,
        {"beta": 0.1, "label_smoothing": 0.2},
        oracle_robust_dpo,
        PAIR,
        bad={"label_smoothing": (-0.1, 0.5, 0.6)},
    ),
    "ipo_loss": Case(
        losses.ipo_loss, SUMS, {"beta": 0.1}, lambda *sums, beta: (log_odds(*sums) - 1 / (2 * beta)) ** 2, PAIR
    ),
    "hinge_loss": Case(
        losses.hinge_loss, SUMS, {"beta": 0.1}, lambda *sums, beta: np.maximum(0, 1 - beta * log_odds(*sums)), PAIR
    ),
    "r_dpo_loss": Case(losses.r_dpo_loss, SUMS | LENGTHS, {"beta": 0.1, "alpha": 0.05}, oracle_r_dpo, PAIR),
    "simpo_loss": Case(
        losses.simpo_loss,
        POLICY_PAIR | LENGTHS | ONE_EMPTY,
        {"beta": 2.5, "gamma": 0.5},
        oracle_simpo,
        PAIR,
        bad={"gamma": (-0.1, np.nan)},
    ),
    "tdpo_loss, both pushed": Case(
        partial(losses.tdpo_loss, variant=1), SUMS | DIVERGENCES, {"beta": 0.1}, oracle_tdpo, PAIR
    ),
    "tdpo_loss": Case(
        losses.tdpo_loss, SUMS | DIVERGENCES, {"beta": 0.1, "alpha": 0.7}, oracle_tdpo, PAIR, stopped=("chosen_kl",)
    ),
    "kto_loss": Case(
        losses.kto_loss,
        SINGLES | {"kl": -2 * logps(4, B)},
        {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7},
        oracle_kto,
        PAIR,
        stopped=("kl",),
    ),
    "kto_loss, one reference point": Case(
        losses.kto_loss,
        SINGLES,
        {"kl": 1.5, "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7},
        oracle_kto,
        PAIR,
        bad={"kl": ()},
    ),
    "kto_kl": coupled(
        losses.kto_kl,
        {"logps": normal(1, B, T), "ref_logps": normal(2, B, T)},
        {},
        oracle_kto_kl,
        exempt=PAIR | {"gradients": "a constant: it has none"},
        stopped=("logps", "ref_logps"),
    ),
    "kto_pair_loss": coupled(
        losses.kto_pair_loss,
        {name: 3 * normal(i, B, T) for i, name in enumerate(FOUR)},
        {"beta": 0.3},
        oracle_kto_pair,
        exempt=PAIR | {"gradients": "its means are constants: test_the_means_of_kto_are_constants has them"},
    ),
    "orpo_loss": Case(losses.orpo_loss, POLICY_PAIR | LENGTHS, {"lam": 0.5}, oracle_orpo, PAIR, bad={"lam": (-0.1,)}),
    "cpo_loss": Case(
        losses.cpo_loss,
        POLICY_PAIR | {"chosen_lengths": LENGTHS["chosen_lengths"]},
        {"beta": 0.1, "label_smoothing": 0.2, "nll_weight": 0.6},
        oracle_cpo,
        PAIR,
    ),
    "preference_metrics": Case(
        stacked(losses.preference_metrics, -1),
        SUMS,
        {"beta": 0.1},
        oracle_preference_metrics,
        PAIR | {"bfloat16 is near": "the accuracy jumps"},
    ),
    # token rewards
    "implicit_token_rewards": Case(
        losses.implicit_token_rewards,
        {"policy_logps": logps(1, B, T), "ref_logps": logps(2, B, T), "mask": MASK},
        {"beta": 0.1},
        lambda policy, ref, mask, beta: np.where(mask, beta * (policy - ref), 0),
        bad={"beta": (-0.1, np.nan)},
    ),
    "rto_token_rewards": Case(
        losses.rto_token_rewards, REWARDS, {"beta1": 0.5, "beta2": 0.1, "beta3": 0.7}, rows(oracle_rto_alone)
    ),
    "rto_token_rewards, clipped": Case(losses.rto_token_rewards, REWARDS, RTO_NUMBERS, rows(oracle_rto_alone)),
    "rto_token_rewards, another reference": Case(
        lambda *args, **numbers: losses.rto_token_rewards(*args[:-1], dpo_ref_logps=args[-1], **numbers),
        REWARDS | DPO_REF,
        RTO_NUMBERS,
        rows(lambda *args, **numbers: oracle_rto(*args, None, **numbers)),
    ),
    "rto_token_rewards, of segments": Case(
        lambda *args, **numbers: losses.rto_token_rewards(*args[:-1], ends=args[-1], placement="segment", **numbers),
        REWARDS | ENDS,
        RTO_NUMBERS,
        rows(lambda *args, **n: oracle_rto(*args[:-1], args[1], args[-1], placement="segment", **n)),
    ),
    "rto_token_rewards, at the end": Case(
        partial(losses.rto_token_rewards, placement="last"),
        REWARDS,
        RTO_NUMBERS,
        rows(partial(oracle_rto_alone, placement="last")),
    ),
    "rto_token_rewards, shaping": Case(
        partial(losses.rto_token_rewards, placement="shaping"),
        REWARDS,
        RTO_NUMBERS,
        rows(partial(oracle_rto_alone, placement="shaping")),
    ),
    "rto_token_rewards, as the authors' code": Case(
        lambda *args, **numbers: losses.rto_token_rewards(
            *args[:-1], dpo_ref_logps=args[-1], official_parity=True, **numbers
        ),
        REWARDS | {"terminal_rewards": 12 * normal(4, B)} | DPO_REF,  # some beyond ±10
        RTO_NUMBERS,
        rows(oracle_official),
        bad={"beta1": (np.nan,), "beta2": (np.nan,), "dpo_clip": (np.nan,)},
        stopped=("dpo_ref_logps",),
    ),
    "rto_token_rewards, as the authors' code with its flags at 0": Case(
        lambda *args, **numbers: losses.rto_token_rewards(
            *args[:-1], dpo_ref_logps=args[-1], official_parity=True, **numbers
        ),
        REWARDS | DPO_REF,
        {"beta1": 0.0, "beta2": -0.1, "dpo_clip": 0.0},
        rows(oracle_official),
        bad={"beta1": (np.nan,), "beta2": (np.nan,), "dpo_clip": (np.nan,)},
        stopped=("dpo_ref_logps", "policy_logps"),
    ),
    "compose_rewards": Case(
        stacked(lambda *args, **numbers: [(c := compose(*args, **numbers)).rewards, *c.parts.values()]),
        COMPOSED,
        {"scale": 0.5, "clip": 0.4},
        rows(oracle_compose),
        bad={"scale": (), "clip": ()},  # named after their term: see below
    ),
    "compose_rewards, totals": Case(
        stacked(lambda *args, **numbers: compose(*args, **numbers).totals, -1),
        COMPOSED,
        {"scale": 0.5, "clip": 0.4},
        lambda *args, **numbers: rows(oracle_compose)(*args, **numbers)[:, 1:].sum(-1),
        bad={"scale": (), "clip": ()},
    ),
    "place_rewards, token": Case(partial(losses.place_rewards, placement="token"), DENSE, {}, rows(oracle_place)),
    "place_rewards, segment": Case(
        partial(losses.place_rewards, placement="segment"),
        DENSE | ENDS,
        {},
        rows(partial(oracle_place, placement="segment")),
    ),
    "place_rewards, last": Case(
        partial(losses.place_rewards, placement="last"), DENSE, {}, rows(partial(oracle_place, placement="last"))
    ),
    "place_rewards, shaping": Case(
        partial(losses.place_rewards, placement="shaping"), DENSE, {}, rows(partial(oracle_place, placement="shaping"))
    ),
    "segment_ends": Case(
        partial(losses.segment_ends, delimiters=(1, 3)),
        {"tokens": integers(1, 0, V, B, T), "mask": MASK},
        {},
        rows(oracle_segment_ends),
        CHOICE | TOKEN_IDS,
        dtype=np.bool_,
    ),
    "shape_rewards": Case(
        losses.shape_rewards,
        {"rewards": normal(1, B, T), "potentials": normal(2, B, T), "mask": MASK},
        {"gamma": 0.9},
        rows(oracle_shape),
    ),
    "prefix_sums": Case(losses.prefix_sums, MASKED_X, {}, rows(oracle_prefix_sums)),
    # From r to Q*
    "q_values": Case(losses.q_values, LOGITS, {"beta": 0.3}, lambda z, beta: beta * z, STATES | ONE_ARRAY),
    "soft_values": Case(losses.soft_values, LOGITS, {"beta": 0.3}, rows(oracle_soft_values), STATES | ONE_ARRAY),
    "optimal_advantages": Case(
        losses.optimal_advantages, BOTH_LOGITS, {"beta": 0.3}, rows(oracle_optimal_advantages), STATES
    ),
    "expected_implicit_rewards": Case(
        losses.expected_implicit_rewards, BOTH_LOGITS, {"beta": 0.3}, rows(oracle_expected_rewards), STATES
    ),
    "rewards_of_q": Case(
        losses.rewards_of_q,
        LOGITS | {"tokens": integers(2, 0, V, B, T), "ref_logps": logps(3, B, T), "mask": MASK},
        {"beta": 0.3},
        rows(oracle_rewards_of_q),
    ),
    "proxy_logits": Case(
        losses.proxy_logits,
        {f"{name}_logits": normal(i, B, T, V) for i, name in enumerate(("base", "proxy", "ref"))},
        {"alpha": 0.6},
        lambda base, proxy, ref, alpha: base + alpha * (proxy - ref),
        STATES,
    ),
    # advantages
    "gae": Case(stacked(losses.gae), CRITIC, DISCOUNTS, rows(oracle_gae)),
    "gae_associative": Case(stacked(losses.gae_associative), CRITIC, DISCOUNTS, rows(oracle_gae)),
    "lambda_returns": Case(losses.lambda_returns, CRITIC, DISCOUNTS, rows(oracle_lambda_returns)),
    "monte_carlo_returns": Case(losses.monte_carlo_returns, DENSE, {"gamma": 0.9}, rows(oracle_monte_carlo)),
    "rloo_advantages": Case(
        losses.rloo_advantages, {"scores": GROUP["scores"]}, {}, rows(oracle_rloo), PAIR | ONE_ARRAY
    ),
    "rloo_advantages, dense": Case(losses.rloo_advantages, GROUP, {"gamma": 0.9}, rows(oracle_rloo_dense), SCORED),
    "remax_advantages": Case(
        losses.remax_advantages,
        {name: GREEDY[name] for name in ("scores", "greedy_scores")},
        {},
        lambda score, greedy: score - greedy,
        PAIR,
    ),
    "remax_advantages, dense": Case(losses.remax_advantages, GREEDY, {"gamma": 0.9}, rows(oracle_remax_dense)),
    "grpo_advantages": Case(
        losses.grpo_advantages, {"scores": GROUP["scores"]}, {}, rows(oracle_grpo), PAIR | ONE_ARRAY
    ),
    "grpo_advantages, unscaled": Case(
        partial(losses.grpo_advantages, scale=False),
        {"scores": GROUP["scores"]},
        {},
        rows(partial(oracle_grpo, scale=False)),
        PAIR | ONE_ARRAY,
    ),
    "grpo_advantages, dense": Case(losses.grpo_advantages, GROUP, {"gamma": 0.9}, rows(oracle_grpo_dense), SCORED),
    "grpo_advantages, dense and unscaled": Case(
        partial(losses.grpo_advantages, scale=False),
        GROUP,
        {"gamma": 0.9},
        rows(partial(oracle_grpo_dense, scale=False)),
        SCORED,
    ),
    "reinforce_pp_advantages": coupled(losses.reinforce_pp_advantages, DENSE, {"gamma": 0.9}, oracle_reinforce_pp),
    # PPO
    "ppo_policy_loss": Case(losses.ppo_policy_loss, SURROGATE, {"clip": 0.2}, oracle_policy_loss, BARE | CLIPS),
    "ppo_policy_loss, asymmetric": Case(
        losses.ppo_policy_loss, SURROGATE, ASYMMETRIC, oracle_policy_loss, BARE | CLIPS
    ),
    "ppo_policy_loss, reduced": Case(
        reduced(losses.ppo_policy_loss),
        SURROGATE | {"mask": MASK},
        ASYMMETRIC,
        lambda *args, **numbers: rows(compact(np.mean))(oracle_policy_loss(*args[:-1], **numbers), args[-1]),
        CLIPS,
    ),
    "ppo_value_loss": Case(losses.ppo_value_loss, VALUES, {"clip": 0.2}, oracle_value_loss, BARE | CLIPS),
    "ppo_value_loss, reduced": Case(
        reduced(losses.ppo_value_loss),
        VALUES | {"mask": MASK},
        {"clip": 0.2},
        lambda *args, clip: rows(compact(np.mean))(oracle_value_loss(*args[:-1], clip), args[-1]),
        CLIPS,
    ),
    "kl_k1": Case(losses.kl_k1, ESTIMATED, {}, lambda logps, ref: logps - ref, BARE),
    "kl_k2": Case(losses.kl_k2, ESTIMATED, {}, lambda logps, ref: (logps - ref) ** 2 / 2, BARE),
    "kl_k3": Case(losses.kl_k3, ESTIMATED, {}, oracle_k3, BARE),
    "kl_k1, reduced": Case(
        reduced(losses.kl_k1),
        ESTIMATED | {"mask": MASK},
        {},
        lambda logps, ref, mask: rows(compact(np.mean))(logps - ref, mask),
    ),
    "kl_k2, reduced": Case(
        reduced(losses.kl_k2),
        ESTIMATED | {"mask": MASK},
        {},
        lambda logps, ref, mask: rows(compact(np.mean))((logps - ref) ** 2 / 2, mask),
    ),
    "kl_k3, reduced": Case(
        reduced(losses.kl_k3),
        ESTIMATED | {"mask": MASK},
        {},
        lambda logps, ref, mask: rows(compact(np.mean))(oracle_k3(logps, ref), mask),
    ),
    "fixed_kl": Case(
        over_rows(losses.fixed_kl),
        {"coefficient": -logps(1, B), "kl": normal(2, B)},
        {},
        lambda coefficient, kl: coefficient,
        NUMBERS,
        row=losses.fixed_kl,
    ),
    "adaptive_kl": Case(
        over_rows(losses.adaptive_kl),
        {"coefficient": -logps(1, B), "kl": np.linspace(3, 9, B, dtype=np.float32)},
        {"samples": 64.0, "target": 6.0, "horizon": 200.0},
        rows(oracle_adaptive_kl),
        NUMBERS,
        row=losses.adaptive_kl,
    ),
    "update_moments": coupled(
        stacked(lambda x, mask, **state: losses.update_moments(moments(**state), x, mask), -1),
        MASKED_X,
        STATE,
        oracle_update_moments,
        nothing=np.array(list(STATE.values())),
        bad=SEEN,
    ),
    "normalise_rewards": Case(
        lambda rewards, *, clip, **state: losses.normalise_rewards(moments(**state), rewards, clip=clip),
        {"rewards": 2 * normal(1, B, T)},
        STATE | {"clip": 1.0},
        oracle_normalise,
        {"masks": "a mask counts in update_moments"} | CLIPS | ONE_ARRAY,
        bad=SEEN,
    ),
    "normalise_rewards, mean kept": Case(
        lambda rewards, **state: losses.normalise_rewards(moments(**state), rewards, shift_mean=False),
        {"rewards": 2 * normal(1, B, T)},
        STATE,
        partial(oracle_normalise, shift_mean=False),
        {"masks": "a mask counts in update_moments"} | ONE_ARRAY,
        bad=SEEN,
    ),
    # masked reductions
    "masked_sum": Case(partial(losses.masked_sum, axis=-1), MASKED_X, {}, rows(compact(np.sum))),
    "masked_mean": Case(partial(losses.masked_mean, axis=-1), MASKED_X, {}, rows(compact(np.mean))),
    "masked_var": Case(partial(losses.masked_var, axis=-1), MASKED_X, {}, rows(compact(np.var))),
    "whiten": coupled(losses.whiten, MASKED_X, {}, partial(oracle_whiten, shift_mean=True)),
    "whiten, mean kept": coupled(
        partial(losses.whiten, shift_mean=False), MASKED_X, {}, partial(oracle_whiten, shift_mean=False)
    ),
    "token_mean": coupled(stacked(losses.token_mean, -1), MASKED_X, {}, oracle_token_mean),
    "sequence_mean": coupled(stacked(losses.sequence_mean, -1), MASKED_X, {}, oracle_sequence_mean),
    # selection
    "best_of_n": Case(
        losses.best_of_n,
        ANSWERS,
        {},
        rows(oracle_best_of_n),
        SELECTION | {"padding": "says a position: test_padding_moves_the_best_answer"},
        dtype=np.int32,
        nothing=-1,
    ),
    "best_of_n of all": Case(
        losses.best_of_n,
        {"rewards": ANSWERS["rewards"]},
        {},
        rows(everywhere(oracle_best_of_n)),
        SELECTION | ALL | ONE_ARRAY,
        dtype=np.int32,
    ),
    "best_of_n_kl_bound": Case(
        losses.best_of_n_kl_bound,
        {"n": np.arange(1, B + 1)},
        {},
        lambda n: np.log(n) - (n - 1) / n,
        COUNTS | ONE_ARRAY,
    ),
    "top_answers": Case(
        partial(losses.top_answers, k=3), ANSWERS, {}, rows(oracle_top_answers), SELECTION, dtype=np.bool_
    ),
    "top_answers of all": Case(
        partial(losses.top_answers, k=3),
        {"rewards": ANSWERS["rewards"]},
        {},
        rows(everywhere(oracle_top_answers)),
        SELECTION | ALL | ONE_ARRAY,
        dtype=np.bool_,
    ),
    "rejection_sample": Case(
        lambda *args, beta: losses.rejection_sample(jax.random.key(0), *args, beta=beta),
        ANSWERS,
        {"beta": 2.0},
        oracle_rejection,
        SELECTION
        | {
            "rows": "one key draws for the whole batch: test_every_row_may_have_a_key",
            "leading dimensions": "one key draws for the whole batch",
            "padding": "the draws depend on the shape",
        },
        dtype=np.bool_,
    ),
    "reward_labels": coupled(
        losses.reward_labels,
        {"rewards": 2 * normal(5, B, T), "mask": MASK},
        {},
        lambda *args: np.round(oracle_whiten(*args, True), 2),
        exempt={"gradients": "rounded to steps"},
    ),
    "response_mask": Case(
        partial(losses.response_mask, start=(3,), end=1),
        {"tokens": integers(7, 1, 4, B, T), "valid": MASK},
        {},
        rows(partial(oracle_response_mask, start=(3,), end=1)),
        CHOICE | TOKEN_IDS,
        mask_name="valid",
        dtype=np.bool_,
    ),
    "response_mask, opened by two": Case(
        partial(losses.response_mask, start=(3, 2), end=1),
        {"tokens": np.tile(np.array([3, 2, 0, 3, 2, 1, 0], np.int32), (B, 1)), "valid": MASK},
        {},
        rows(partial(oracle_response_mask, start=(3, 2), end=1)),
        CHOICE | TOKEN_IDS | {"holes": "padding stands around a conversation, not within an opening"},
        mask_name="valid",
        dtype=np.bool_,
    ),
}

# Numbers out of the range of every function that has one of the name, but where the case says otherwise.
BAD = {
    "temperature": (0, -1, np.nan),
    "beta": (0, -0.1, np.nan),
    "beta1": (-1, np.nan),
    "beta2": (-1, np.nan),
    "beta3": (-1, np.nan),
    "label_smoothing": (-0.1, 0.6, np.nan),
    "alpha": (-0.1, np.nan),
    "gamma": (-0.1, 1.1, np.nan),
    "lam": (-0.1, 1.1, np.nan),
    "clip": (0, -1, np.nan),
    "clip_high": (0, -1, np.nan),
    "dual_clip": (1, 0.5, np.nan),
    "dpo_clip": (0, -1, np.nan),
    "desirable_weight": (-1, np.nan),
    "undesirable_weight": (-1, np.nan),
    "nll_weight": (-1, np.nan),
    "samples": (-1, np.nan),
    "target": (0, -1, np.nan),
    "horizon": (0, -1, np.nan),
}
