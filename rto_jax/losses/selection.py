"""Choosing among sampled answers, and saying which tokens of a conversation are actions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number
from rto_jax.losses.masking import whiten


def best_of_n(rewards: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """argmax_i r(x, y_i) over N answers drawn from one policy; the first of equals.

    The simplest search under a reward, and the frontier that RL has to beat; its cost in KL is `best_of_n_kl_bound`.

    rewards: [..., N]. mask: bool [..., N], answers that exist; None: all. Returns int32 [...]; −1 without any answer.
    A NaN among the real rewards is returned as the best, to be seen.
    """
    rewards, mask = _answers(rewards, mask)
    best = jnp.argmax(jnp.where(mask, rewards, -jnp.inf), axis=-1).astype(jnp.int32)
    # Where every real reward is −∞, argmax may point at a masked answer.
    first = jnp.argmax(mask, axis=-1).astype(jnp.int32)
    best = jnp.where(jnp.take_along_axis(mask, best[..., None], axis=-1)[..., 0], best, first)
    return jnp.where(jnp.any(mask, axis=-1), best, -1)


def best_of_n_kl_bound(n: jax.Array | int) -> jax.Array:
    """KL(best of n ‖ policy) ≤ log n − (n − 1)/n: how far choosing the best of n moves the distribution of answers.

    Stiennon et al. (arXiv 2009.01325, appendix G.3); an equality where all rewards differ and no answer is likely
    (Beirami et al., arXiv 2401.01879, show it to be a bound).

    n: int, at least 1, a number or an array of any shape. Returns float32, the shape of n, nats.
    """
    if jnp.ndim(n) == 0:
        n = number("n", n, 1)
    n = jnp.asarray(n).astype(jnp.float32)
    return jnp.log(n) - (n - 1) / n


def rejection_sample(key: jax.Array, rewards: jax.Array, mask: jax.Array | None = None, *, beta: Scalar) -> jax.Array:
    """Keeps answer i with probability exp((r_i − max_j r_j)/β): what is kept is distributed as π · exp(r/β).

    One pass of statistical rejection sampling, RSO (arXiv 2309.06657, section 3.2), with the maximum over the N answers
    at hand in place of that over all answers. A small β keeps the best alone (it is always kept), a large one nearly all.

    key: a JAX random key. rewards: [..., N], of answers drawn from π. mask: bool [..., N], answers that exist; None: all.
    beta: above 0, reward units. Returns bool [..., N], False where masked.
    """
    rewards, mask = _answers(rewards, mask)
    beta = number("beta", beta, 0, open_low=True)
    best = jnp.max(rewards, axis=-1, keepdims=True, where=mask, initial=-jnp.inf)
    gap = jnp.where(mask, jnp.where(rewards == best, 0, rewards - best), -jnp.inf)
    return mask & (jax.random.uniform(key, rewards.shape, jnp.float32) < jnp.exp(gap / beta))


def top_answers(rewards: jax.Array, mask: jax.Array | None = None, *, k: int) -> jax.Array:
    """True for the k answers with the highest rewards; the first of equals: what RAFT fine-tunes on.

    RAFT (arXiv 2304.06767): sample N, keep the k best (k = 1 in the paper), do SFT on them, and again.

    rewards: [..., N]. mask: bool [..., N], answers that exist; None: all. k: a Python int, 1 to N.
    Returns bool [..., N]: k of them, or all where fewer exist; never a masked one.
    """
    rewards, mask = _answers(rewards, mask)
    if not 1 <= k <= rewards.shape[-1]:
        raise ValueError(f"k must be at least 1, at most N = {rewards.shape[-1]}, but it is {k}")
    order = jnp.lexsort((-rewards, ~mask), axis=-1)  # stable; the masked ones last
    return mask & (jnp.argsort(order, axis=-1) < k)


def reward_labels(rewards: jax.Array, mask: jax.Array, *, digits: int = 2) -> jax.Array:
    """round((r − μ)/σ, digits): the score that reward-conditioned SFT writes into the prompt.

    Conditional SFT (arXiv 2308.12050): train on "<prompt> <rm_score>: 0.43" → answer, and ask for a high score later.
    The text is the caller's: f"{label:.2f}".

    rewards: [...], over the training set. mask: bool, the shape of rewards. digits: decimals kept, a Python int.
    Returns float32, the shape of rewards, 0 where masked.
    """
    if digits < 0:
        raise ValueError(f"digits must be at least 0, but it is {digits}")
    (rewards,) = float32(rewards=rewards)
    return jnp.round(whiten(rewards, boolean(mask, rewards=rewards)), digits)


def response_mask(tokens: jax.Array, valid: jax.Array, *, start: Sequence[int], end: int) -> jax.Array:
    """True where an assistant acts in a conversation: behind each `start`, up to and including the next `end`.

    Users' and tools' tokens are transitions of the environment: they take no loss and earn no reward, and `gae` passes
    over them. The end token is an action: the assistant chose to stop. A turn cut off by the row's end is kept.

    tokens: int [B, S], whole conversations as a chat template wrote them. valid: bool [B, S], not padding.
    start: the ids that open an assistant's turn, in order, such as those of "<|im_start|>assistant\\n"; end: the id that
    closes a turn. Both static. Returns bool [B, S].
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but their dtype is {tokens.dtype}")
    valid = boolean(valid, "valid", tokens=tokens)
    if tokens.ndim == 0 or len(start) == 0:
        raise ValueError(f"want tokens [..., S] and a start of one id or more, not {tokens.shape} and {tuple(start)}")
    axis = tokens.ndim - 1
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, axis)

    def back(x, by):
        """x of the position `by` before, and False before the first."""
        by = min(by, x.shape[-1])
        return jnp.pad(x[..., : x.shape[-1] - by], [(0, 0)] * axis + [(by, 0)])

    opened = valid
    for place, token in enumerate(reversed(start)):
        opened = opened & back(valid & (tokens == int(token)), place)
    # The last opening and the last closing strictly before each token.
    last = [
        jax.lax.cummax(jnp.where(back(found, 1), index, 0), axis=axis)
        for found in (opened, valid & (tokens == int(end)))
    ]
    return valid & (last[0] > last[1])


def _answers(rewards: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    (rewards,) = float32(rewards=rewards)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {rewards.shape}, want [..., N] with N at least 1")
    mask = jnp.ones(rewards.shape, bool) if mask is None else boolean(mask, rewards=rewards)
    return jnp.where(mask, rewards, 0), mask
