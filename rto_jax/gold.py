"""The gold world: a small token-level preference MDP whose KL-regularised optimum is known exactly.

A response is written token by token. It earns by opening a segment (OPEN), writing on-topic content and closing it
(CLOSE): OPEN costs now and pays later, so reward and advantage have opposite signs there. The data policy pi0 is an
exact Markov table, and soft dynamic programming over class x t x prev x q = 16 x 24 x 20 x 4 states gives
    V*(s) = beta log sum_a pi0(a|s) exp(Q*(s,a)/beta),   Q* = r* + V*(s'),   A* = Q* - V* = beta log(pi*/pi0),
the maximiser pi* of J(pi) = E[R*] - beta KL(pi || pi0), and J* = V*(start). NumPy only, float64 inside.

Tables are indexed [class, t, prev, q, action]: class = 4 u + v (wanted topic u, bad style v), prev the token before
(SEP at the start), q the segment's state: 0 none, 1 open, 2 open with on-topic content, 3 done. Arrays of rollouts are
[n, horizon], with a mask that is True up to and including the EOS; what stands behind it changes nothing.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from rto_jax.errors import UserError

EOS, SEP, OPEN, CLOSE = 0, 1, 2, 3
OUTPUTS = 20  # tokens that a response can hold: the four above, and content 4..19
PROMPT_IDS = 8  # prompts are written in ids 20..27
PROMPT_LENGTH = 4
PAD = OUTPUTS + PROMPT_IDS
VOCAB_SIZE = 32  # 29 ids, rounded up
TOKEN_NAMES = (
    *("EOS", "SEP", "OPEN", "CLOSE"),
    *(f"t{j // 4}s{j % 4}" for j in range(16)),
    *(f"x{j}" for j in range(PROMPT_IDS)),
    "PAD",
)  # t2s1: content of topic 2 and style 1

_TOKEN = np.arange(OUTPUTS)
_CONTENT = _TOKEN >= 4
_TOPIC = np.where(_CONTENT, (_TOKEN - 4) // 4, -1)
_STYLE = np.where(_CONTENT, (_TOKEN - 4) % 4, -1)
_CLASS = np.arange(16)
_ON_TOPIC = (_CLASS // 4)[:, None] == _TOPIC  # [class, action]
_BAD_STYLE = (_CLASS % 4)[:, None] == _STYLE
_SAME = np.eye(OUTPUTS, dtype=bool)  # [prev, action]


def _next_q() -> np.ndarray:
    """The automaton, [class, q, action]: q OPEN-> 1 on-topic-> 2 CLOSE-> 3; CLOSE in 1 and SEP in 1, 2 give 0."""
    table = np.broadcast_to(np.arange(4)[:, None], (16, 4, OUTPUTS)).copy()
    table[:, 0, OPEN] = 1
    table[:, 1] = np.where(_ON_TOPIC, 2, table[:, 1])
    table[:, 1, CLOSE] = 0
    table[:, 2, CLOSE] = 3
    table[:, [1, 2], SEP] = 0
    return table


NEXT_Q = _next_q()


class Solution(NamedTuple):
    """The exact optimum at one beta. Tables are read-only float64 [16, H, 20, 4(, 20)]; J in reward units."""

    J0: float  # J(pi0) = E_pi0[R*], mean over the 16 classes
    Jstar: float  # J(pi*), mean over the 16 classes
    log_pi0: np.ndarray
    log_pistar: np.ndarray
    V: np.ndarray  # V*, without the action axis
    Q: np.ndarray
    A: np.ndarray


@dataclass(frozen=True)
class World:
    """The world and everything exact about it; the definition is in the comments beside the tables."""

    seed: int = 0
    """draws the classes of the prompts and pi0's bigram table"""
    horizon: int = 24
    """H, the longest response in tokens (EOS included); the action at t = H - 1 always ends it"""
    beta: float = 0.5
    """temperature of the KL penalty in J, reward units per nat"""

    def __post_init__(self):
        if self.seed < 0 or self.horizon < 1 or not self.beta > 0:
            raise UserError(
                f"the gold world needs seed >= 0, horizon >= 1 and beta > 0, "
                f"got seed {self.seed}, horizon {self.horizon}, beta {self.beta}."
            )

    # ---- definition

    @cached_property
    def _draws(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)  # the order of the three draws is part of the definition
        mu = rng.permutation([0, 1, 2, 3, 0, 1, 2, 3])
        mv = rng.permutation([0, 1, 2, 3, 0, 1, 2, 3])
        return mu, mv, 0.6 * rng.standard_normal((OUTPUTS, OUTPUTS))

    @cached_property
    def rewards(self) -> np.ndarray:
        """Gold token reward r*, [16, H, 20, 4, 20]."""
        token = -0.1 - 0.1 * _CONTENT + 0.6 * _ON_TOPIC - 1.0 * _BAD_STYLE  # [class, action]
        follows = _CONTENT[:, None] & _CONTENT & ((_STYLE[:, None] + 1) % 4 == _STYLE)
        pair = -0.5 * _SAME + 0.3 * follows  # [prev, action]
        pair[SEP, EOS] += 0.5
        segment = np.zeros((4, OUTPUTS))  # [q, action]
        segment[:, OPEN] = [-0.3, -0.5, -0.5, -0.5]
        segment[:, CLOSE] = [-0.5, -0.5, 3.0, -0.5]
        segment[[1, 2], SEP] = -0.5
        segment[[1, 2], EOS] = -1.0
        cut = -1.0 * (_TOKEN != EOS) * (1 + np.isin(NEXT_Q, [1, 2]))  # [class, q, action], at t = H - 1
        table = token[:, None, None, None] + pair[:, None] + segment + np.zeros((self.horizon, 1, 1, 1))
        table[:, -1] += cut[:, None]
        return _frozen(table)

    @cached_property
    def log_pi0(self) -> np.ndarray:
        """log pi0, the data policy, [16, H, 20, 4, 20] in nats."""
        segment = np.zeros((4, OUTPUTS))  # [q, action]
        segment[:, OPEN] = [0.6, -1.0, -1.0, -1.0]
        segment[:, CLOSE] = [-1.5, 1.2, 1.2, -1.5]
        segment[:, SEP] = 0.9
        token = 0.6 * _ON_TOPIC - 0.6 * _BAD_STYLE
        table = token[:, None, None, None] + self._draws[2][:, None] + segment + np.zeros((self.horizon, 1, 1, 1))
        t = np.arange(self.horizon)[:, None, None]
        eos = -1.2 + 2.5 * t / self.horizon + 0.8 * (_TOKEN == SEP)[:, None]  # [t, prev, 1]
        table[..., EOS] = np.where(t < 4, -6.0, eos)  # set, not added
        table -= 0.5 * _SAME[:, None]
        return _frozen(table - _logsumexp(table)[..., None])

    def solve(self, beta: float | None = None) -> Solution:
        """The optimum by soft dynamic programming, cached; `beta` defaults to the world's."""
        return _solve(self, float(self.beta if beta is None else beta))

    # ---- data

    def prompts(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n uniform prompts, int32 [n, 4] of ids 20..27; the last two tokens are noise."""
        return rng.integers(OUTPUTS, PAD, (n, PROMPT_LENGTH), dtype=np.int32)

    def classes(self, prompts: np.ndarray) -> np.ndarray:
        """Hidden class 4 u + v of each prompt, int [n]. UserError for ids outside 20..27."""
        prompts = np.asarray(prompts)
        if prompts.ndim != 2 or prompts.shape[1] != PROMPT_LENGTH or np.any((prompts < OUTPUTS) | (prompts >= PAD)):
            raise UserError(f"gold prompts are rows of {PROMPT_LENGTH} ids {OUTPUTS}..{PAD - 1}.")
        mu, mv, _ = self._draws
        return 4 * mu[prompts[:, 0] - OUTPUTS] + mv[prompts[:, 1] - OUTPUTS]

    def sample(self, log_policy: np.ndarray, prompts: np.ndarray, rng: np.random.Generator):
        """Responses of a policy table [16, H, 20, 4, 20]: (tokens int32 [n, H] with PAD behind the end, mask [n, H])."""
        n, cls = len(prompts), self.classes(prompts)
        edges = np.cumsum(np.exp(log_policy), -1)[..., :-1]
        uniform = rng.random((n, self.horizon))  # all drawn at once, so no row depends on another's length
        tokens = np.full((n, self.horizon), PAD, np.int32)
        rows, prev, q = np.arange(n), np.full(n, SEP), np.zeros(n, int)
        for t in range(self.horizon):
            action = (uniform[rows, t, None] >= edges[cls[rows], t, prev, q]).sum(1)
            tokens[rows, t] = action
            q = NEXT_Q[cls[rows], q, action]
            going = action != EOS
            rows, prev, q = rows[going], action[going], q[going]
        return tokens, tokens != PAD

    def sample_pi0(self, prompts: np.ndarray, rng: np.random.Generator):
        """Responses of the data policy, as `sample`."""
        return self.sample(self.log_pi0, prompts, rng)

    def token_rewards(self, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Gold reward of each token, float32 [n, H], 0 outside the mask."""
        return self._along(self.rewards, prompts, tokens, mask).astype(np.float32)

    def returns(self, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Gold return R*, the sum of the token rewards, float32 [n]."""
        return self._along(self.rewards, prompts, tokens, mask).sum(1).astype(np.float32)

    def exact_advantages(self, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """A* = beta log(pi*/pi0) of each token, float32 [n, H], 0 outside the mask."""
        return self._along(self.solve().A, prompts, tokens, mask).astype(np.float32)

    @staticmethod
    def label(returns_a: np.ndarray, returns_b: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Bradley-Terry labels, bool [n]: True (a preferred) with probability sigmoid(R*(a) - R*(b))."""
        gap = np.asarray(returns_a, float) - np.asarray(returns_b, float)
        return rng.random(gap.shape) < 0.5 + 0.5 * np.tanh(gap / 2)  # a sigmoid that cannot overflow

    # ---- evaluation

    def policy_logps(self, log_policy: np.ndarray, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray):
        """Rows of a policy table at the states of rollouts: float64 [n, H, 20], what `score` takes."""
        cls, t, prev, q, _ = self._states(prompts, tokens, mask)
        return log_policy[cls, t, prev, q]

    def evaluate(self, log_policy: np.ndarray) -> dict[str, float]:
        """Exact figures of a policy table, by forward visitation, mean over the 16 classes: keys as `score`."""
        occupancy = self.occupancy(log_policy)[..., None] * np.exp(log_policy) / len(_CLASS)
        gold = float((occupancy * self.rewards).sum())
        kl = float((occupancy * (log_policy - self.log_pi0)).sum())
        return {"gold_return": gold, "kl": kl, "J": gold - self.beta * kl, "length": float(occupancy.sum())}

    def occupancy(self, log_policy: np.ndarray) -> np.ndarray:
        """Probability that a response of each class visits a state, [16, H, 20, 4]."""
        policy, moves = np.exp(log_policy), np.eye(4)[NEXT_Q]
        visits = np.zeros(log_policy.shape[:-1])
        visits[:, 0, SEP, 0] = 1.0
        for t in range(self.horizon - 1):
            taken = np.einsum("cpq,cpqa->cqa", visits[:, t], policy[:, t])
            taken[..., EOS] = 0.0  # ends
            visits[:, t + 1] = np.einsum("cqa,cqan->can", taken, moves)
        return visits

    def score(self, logits: np.ndarray, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> dict[str, float]:
        """Exact-per-state score of the policy pi that drew the rollouts, from its distribution at their states.

        By the performance-difference identity (transitions are deterministic),
            J = J* - beta E_{s~pi} sum_t KL(pi(.|s_t) || pi*(.|s_t)),   share = 1 - (J* - J) / (J* - J(pi0)),
        so only states are sampled. J* and J(pi0) are the exact means over the 16 equally likely classes, not over the
        prompts at hand: alike near pi0, six times less noise in J near pi* (1,024 rollouts), and share <= 1 always.

        Args: logits float [n, H, 20] (any shift; -inf allowed), rollouts tokens and mask [n, H], at least two.
        Returns: gold_return (mean R*), gold_return_exact = J + beta kl (the same without action noise),
            kl = E sum_t KL(pi || pi0) in nats, J, share, length, and the standard error of each as `<name>_se`.
        Raises UserError for rollouts that are no complete responses, and for NaN or infinite logits.
        """
        states = self._states(prompts, tokens, mask)
        mask = np.asarray(mask)
        logits = np.asarray(logits)
        if logits.shape != (*mask.shape, OUTPUTS):
            raise UserError(f"gold logits must be [n, {self.horizon}, {OUTPUTS}], got {list(logits.shape)}.")
        if len(mask) < 2:
            raise UserError("a gold score needs at least 2 rollouts.")
        best, at = self.solve(), tuple(x[mask] for x in states[:4])
        log_pi = logits[mask].astype(np.float64)
        if np.isnan(log_pi).any() or not np.isfinite(log_pi.max(1)).all():
            raise UserError("the policy's logits on gold rollouts hold NaN or infinity.")
        log_pi -= _logsumexp(log_pi)[:, None]

        def divergence(log_other):  # sum_t KL(pi || other), [n]; rounding must not make it negative
            ratio = np.where(np.isneginf(log_pi), 0.0, log_pi - log_other[at])
            total = np.zeros(mask.shape)
            total[mask] = np.maximum((np.exp(log_pi) * ratio).sum(1), 0.0)
            return total.sum(1)

        regret, kl = self.beta * divergence(best.log_pistar), divergence(best.log_pi0)
        per_rollout = {
            "gold_return": self.returns(prompts, tokens, mask).astype(np.float64),
            "gold_return_exact": best.Jstar - regret + self.beta * kl,
            "kl": kl,
            "J": best.Jstar - regret,
            "share": 1 - regret / (best.Jstar - best.J0),
            "length": mask.sum(1).astype(np.float64),
        }
        figures = {name: float(x.mean()) for name, x in per_rollout.items()}
        errors = {f"{name}_se": float(x.std(ddof=1) / np.sqrt(len(x))) for name, x in per_rollout.items()}
        return figures | errors

    def describe(self, prompt: np.ndarray, tokens: np.ndarray) -> str:
        """A response as text, e.g. "topic 2, not style 1: OPEN t2s0 CLOSE SEP EOS"; padding is left out."""
        u, v = divmod(int(self.classes(np.asarray(prompt)[None])[0]), 4)
        tokens = [int(a) for a in tokens if a != PAD]
        if any(not 0 <= a < OUTPUTS for a in tokens):
            raise UserError(f"a gold response holds ids 0..{OUTPUTS - 1}, got {tokens}.")
        return f"topic {u}, not style {v}: " + " ".join(TOKEN_NAMES[a] for a in tokens)

    # ---- helpers

    def _states(self, prompts, tokens, mask):
        """(class, t, prev, q, action), each int [n, H]; what stands outside the mask is a valid index without meaning."""
        cls, tokens, mask = self.classes(prompts), np.asarray(tokens), np.asarray(mask)
        t = np.arange(self.horizon)
        if mask.dtype != bool or mask.shape != (len(cls), self.horizon) or tokens.shape != mask.shape:
            raise UserError(
                f"gold rollouts need tokens and a bool mask of shape [{len(cls)}, {self.horizon}], "
                f"got {list(tokens.shape)} and {mask.dtype} {list(mask.shape)}."
            )
        length = mask.sum(1)[:, None]
        ends = (tokens == EOS) | (t == self.horizon - 1)
        bad = (mask != (t < length)) | (mask & ((tokens < 0) | (tokens >= OUTPUTS) | (ends != (t == length - 1))))
        bad = bad.any(1) | (length[:, 0] == 0)
        if bad.any():
            raise UserError(
                f"gold rollout {int(bad.argmax())} is no complete response: ids 0..{OUTPUTS - 1} from the first "
                f"position to the first EOS, or to position {self.horizon - 1}."
            )
        action = np.where(mask, tokens, EOS).astype(np.intp)
        prev = np.concatenate([np.full_like(action[:, :1], SEP), action[:, :-1]], 1)
        q = np.zeros_like(action)
        for i in range(1, self.horizon):
            q[:, i] = NEXT_Q[cls, q[:, i - 1], action[:, i - 1]]
        return np.broadcast_to(cls[:, None], mask.shape), np.broadcast_to(t, mask.shape), prev, q, action

    def _along(self, table, prompts, tokens, mask):
        """Entries of an action table along rollouts, float64 [n, H], 0 outside the mask."""
        return np.where(mask, table[self._states(prompts, tokens, mask)], 0.0)


@lru_cache(maxsize=8)
def _solve(world: World, beta: float) -> Solution:
    if not beta > 0:
        raise UserError(f"beta must be > 0, got {beta}.")
    reward, log_pi0 = world.rewards, world.log_pi0
    Q, V = np.empty_like(reward), np.empty(reward.shape[:-1])
    future = np.zeros((16, 4, OUTPUTS))  # V*(s') by [class, q, action]: s' = (prev=action, next q)
    for t in reversed(range(world.horizon)):
        Q[:, t] = reward[:, t] + future[:, None]
        V[:, t] = beta * _logsumexp(log_pi0[:, t] + Q[:, t] / beta)
        future = V[:, t][_CLASS[:, None, None], _TOKEN, NEXT_Q]
        future[..., EOS] = 0.0
    A = Q - V[..., None]
    J0, Jstar = world.evaluate(log_pi0)["gold_return"], float(V[:, 0, SEP, 0].mean())
    return Solution(J0, Jstar, log_pi0, *map(_frozen, (log_pi0 + A / beta, V, Q, A)))


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def _frozen(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False  # cached and shared
    return x
