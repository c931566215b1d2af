"""Advantages and returns: with a critic (`gae`, `lambda_returns`) or a baseline from other answers to the prompt.

Advantages are data, not functions of the policy: compute them outside of the gradient, or stop it.
"""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, float32, number, per_row, tokens_of
from rto_jax.losses.masking import AxisName, whiten


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0, lam: Scalar = 0.95
) -> tuple[jax.Array, jax.Array]:
    """A_t = δ_t + γλ A_{t'},  δ_t = r_t + γ V_{t'} − V_t,  R_t = A_t + V_t, where t' is the next position in the mask.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16), as PPO and RTO use it with γ = 1, λ = 0.95. After the
    last token, V = A = 0: the response has ended. A masked position is no transition: value and advantage pass over
    it, neither discounted nor decayed, so the turns of a user in the middle and padding on either side change nothing.

    rewards: [B, T], rewards[t] is earned by token t. values: [B, T], values[t] is of the state *before* token t.
    mask: bool [B, T]. gamma, lam: 0 to 1.
    Returns (advantages, returns), float32 [B, T] each, 0 where masked; not whitened. Gradients flow: treat both as
    data (compute them outside of the gradient, or stop it).
    Differs from OpenRLHF, the base of RTO's code: that multiplies by the mask, so a hole is a state worth 0.
    """
    return _gae(_backwards_scan, rewards, values, mask, gamma, lam)


def gae_associative(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0, lam: Scalar = 0.95
) -> tuple[jax.Array, jax.Array]:
    """`gae`, in ⌈log₄ T⌉ steps over whole arrays instead of T steps: for accelerators, and wide batches.

    A_t is a linear recurrence (arXiv 1506.02438, eq. 16), and those compose: after k rounds each position has summed
    the next 4^k. The same numbers as `gae` to rounding; arguments, result and masks are its own.
    """
    return _gae(_backwards_associative, rewards, values, mask, gamma, lam)


def lambda_returns(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0, lam: Scalar = 0.95
) -> jax.Array:
    """G_t = r_t + γ[(1 − λ) V_{t'} + λ G_{t'}]: the λ-return, what `gae` fits the critic to (R_t = A_t + V_t).

    Sutton and Barto, eq. 12.18; 0 after the last token. λ = 1 is `monte_carlo_returns`, λ = 0 the one-step target.
    Arguments and masks as in `gae`; the values at a response's first token don't enter. Returns float32 [B, T].
    Differs from rlax.lambda_returns, which takes the values of the states *after* the steps.
    """
    return gae(rewards, values, mask, gamma=gamma, lam=lam)[1]


def monte_carlo_returns(rewards: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0) -> jax.Array:
    """G_t = r_t + γ G_{t'} = Σ_{k≥0} γ^k r_{t+k} over the mask: the return to go, no critic.

    rewards: [B, T]. mask: bool [B, T]; a masked position neither earns nor discounts. gamma: 0 to 1.
    Returns float32 [B, T], 0 where masked. REINFORCE (Williams 1992) weighs ∇ log π(a_t|s_t) by it.
    """
    mask, rewards = tokens_of(mask, rewards=rewards)
    gamma = number("gamma", gamma, 0, 1)
    return jnp.where(mask, rewards + _backwards_scan(gamma * rewards, mask, gamma), 0)


def rloo_advantages(
    scores: jax.Array,
    token_rewards: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    gamma: Scalar = 1.0,
) -> jax.Array:
    """A_i = R_i − mean_{j≠i} R_j over the K answers to a prompt: leave-one-out, an unbiased baseline.

    RLOO (arXiv 2402.14740). With dense rewards r_it, the form of PRIME (arXiv 2502.01456, section 3.2):

        A_it = Σ_{s≥t} γ^{s−t} (r_is − mean_{j≠i} r̄_j) + R_i − mean_{j≠i} R_j,   r̄_j = answer j's mean token reward.

    Its dense baseline grows with the tokens that are left, so it is unbiased for answers of one length only: a reward
    that every token earns cancels, though a longer answer earns more of it.

    scores: R, [..., K], K at least 2, what each answer earns as a whole (with −β KL in it, or that as a dense reward).
    token_rewards: [..., K, T], with mask: bool [..., K, T]. gamma: 0 to 1, per token, of the dense part only.
    Returns float32 [..., K], or [..., K, T] with dense rewards, 0 where masked.
    """
    scores = _group(scores)
    rest = _others_mean(scores)
    if token_rewards is None:
        return scores - rest
    mask, rewards = _dense(scores, token_rewards, mask)
    mean = jnp.sum(rewards, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1, dtype=jnp.float32), 1)
    centred = jnp.where(mask, rewards - _others_mean(mean)[..., None], 0)
    return jnp.where(mask, monte_carlo_returns(centred, mask, gamma=gamma) + (scores - rest)[..., None], 0)


def remax_advantages(
    scores: jax.Array,
    greedy_scores: jax.Array,
    token_rewards: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    gamma: Scalar = 1.0,
) -> jax.Array:
    """A = R(x, y) − R(x, ŷ), ŷ the greedy answer to the same prompt: one more rollout instead of a critic.

    ReMax (arXiv 2310.10505). With dense rewards, as its authors add the KL: A_t = A + Σ_{s≥t} γ^{s−t} r_s,
    which have no baseline of their own.

    scores, greedy_scores: R, [B]. token_rewards: [B, T], with mask: bool [B, T]. gamma: 0 to 1, of the dense part.
    Returns float32 [B], or [B, T] with dense rewards, 0 where masked.
    """
    scores, greedy = float32(scores=scores, greedy_scores=greedy_scores)
    if token_rewards is None:
        return scores - greedy
    mask, rewards = _dense(scores, token_rewards, mask)
    return jnp.where(mask, monte_carlo_returns(rewards, mask, gamma=gamma) + (scores - greedy)[..., None], 0)


def grpo_advantages(
    scores: jax.Array,
    token_rewards: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    gamma: Scalar = 1.0,
    scale: bool = True,
) -> jax.Array:
    """A_i = (R_i − mean R) / (std R + 10⁻⁴) over the K answers to a prompt: group-relative, no critic.

    GRPO (arXiv 2402.03300, section 4.1.2); std is the unbiased one (÷ K − 1) and the 10⁻⁴ as in TRL. With dense
    rewards, its process supervision (section 4.1.3): r̃ = (r − mean r) / (std r + 10⁻⁴) over *all* tokens of the
    group, and A_it = A_i + Σ_{s≥t} γ^{s−t} r̃_is.

    scores: R, [..., K], K at least 2. token_rewards: [..., K, T], with mask: bool [..., K, T]. gamma: 0 to 1, of the
    dense part. scale=False (a Python bool) leaves both divisions out (Dr. GRPO, arXiv 2503.20783).
    Returns float32 [..., K], or [..., K, T] with dense rewards, 0 where masked. Answers of one score get 0.
    """
    scores = _group(scores)

    def normalised(x, mask, axes):
        count = jnp.maximum(jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.float32), 1)
        # Less the largest first: the mean of equal numbers can miss them by a bit, which the division would blow up.
        largest = jnp.max(x, axis=axes, keepdims=True, where=mask, initial=-jnp.inf)
        x = jnp.where(mask, x - jax.lax.stop_gradient(largest), 0)
        centred = jnp.where(mask, x - jnp.sum(x, axis=axes, keepdims=True) / count, 0)
        if not scale:
            return centred
        variance = jnp.sum(jnp.square(centred), axis=axes, keepdims=True) / jnp.maximum(count - 1, 1)
        flat = variance == 0  # the square root has no gradient there
        return centred / (jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, variance))) + 1e-4)

    whole = normalised(scores, jnp.ones(scores.shape, bool), (-1,))
    if token_rewards is None:
        return whole
    mask, rewards = _dense(scores, token_rewards, mask)
    dense = monte_carlo_returns(normalised(rewards, mask, (-2, -1)), mask, gamma=gamma)
    return jnp.where(mask, dense + whole[..., None], 0)


def reinforce_pp_advantages(
    rewards: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0, axis_name: AxisName = None
) -> jax.Array:
    """A = whiten(G), G_t = Σ_{k≥0} γ^k r_{t+k}: returns to go of the token rewards, normalised over the whole batch.

    REINFORCE++ (arXiv 2501.03262), as RTO's appendix E runs it: no critic and no baseline, the KL penalty (and RTO's
    dense term) inside the token rewards, PPO's clipped loss on top. Clip the score before it goes in.

    rewards: [B, T], e.g. of `rto_token_rewards`. mask: bool [B, T]. gamma: 0 to 1.
    axis_name: a mesh axis of shard_map over which the batch goes on. Returns float32 [B, T], 0 where masked.
    """
    return whiten(monte_carlo_returns(rewards, mask, gamma=gamma), mask, axis_name=axis_name)


def _gae(backwards, rewards, values, mask, gamma, lam) -> tuple[jax.Array, jax.Array]:
    mask, rewards, values = tokens_of(mask, rewards=rewards, values=values)
    gamma, lam = number("gamma", gamma, 0, 1), number("lam", lam, 0, 1)
    # One recurrence: ahead_t = γ V_{t'} + γλ A_{t'} = own_{t'} + γλ ahead_{t'}, so that A_t = r_t − V_t + ahead_t.
    ahead = backwards(gamma * values + gamma * lam * (rewards - values), mask, gamma * lam)
    advantages = jnp.where(mask, rewards - values + ahead, 0)
    return advantages, advantages + values


def _backwards_scan(own: jax.Array, mask: jax.Array, decay: Scalar) -> jax.Array:
    """ahead_t = own_{t'} + decay · ahead_{t'}, t' the next position in the mask, and 0 after the last: [..., T]."""

    def step(ahead, now):
        own, real = now
        return jnp.where(real, own + decay * ahead, ahead), ahead  # a masked position hands it on

    # A zero that varies over the same mesh axes as the inputs, as shard_map demands of a carry.
    end = jnp.zeros_like(jnp.sum(own, axis=-1))
    _, ahead = jax.lax.scan(step, end, (jnp.moveaxis(own, -1, 0), jnp.moveaxis(mask, -1, 0)), reverse=True)
    return jnp.moveaxis(ahead, 0, -1)


def _backwards_associative(own: jax.Array, mask: jax.Array, decay: Scalar) -> jax.Array:
    """The same. Position t holds the map ahead ↦ sums + factors · ahead of the positions behind it that it has seen."""
    length = mask.shape[-1]

    def extended(x, by, fill):
        return jnp.pad(x, [(0, 0)] * (mask.ndim - 1) + [(0, by)], constant_values=fill)

    sums = extended(jnp.where(mask, own, 0), 1, 0.0)[..., 1:]
    factors = extended(jnp.where(mask, jnp.float32(decay), 1), 1, 1.0)[..., 1:]
    reach = 1
    while reach < length:
        starts = [min(k * reach, length) for k in range(4)]
        # Each round is one pass, padding included: fused into the next, it would be computed four times over, and
        # each shift would branch at every number, which a CPU cannot vectorise.
        wide = jax.lax.optimization_barrier((extended(sums, starts[-1], 0.0), extended(factors, starts[-1], 1.0)))
        (sums, factors), *further = [[x[..., start : start + length] for x in wide] for start in starts]
        for later_sums, later_factors in further:
            sums, factors = sums + factors * later_sums, factors * later_factors
        reach *= 4
    return sums


def _group(scores: jax.Array) -> jax.Array:
    (scores,) = float32(scores=scores)
    if scores.ndim == 0 or scores.shape[-1] < 2:
        raise ValueError(f"scores has shape {scores.shape}, want [..., K] with K at least 2 answers per prompt")
    return scores


def _others_mean(x: jax.Array) -> jax.Array:
    """Mean over the others of the last axis. Differences are summed, so that the mean of equal numbers is that number."""
    first = x[..., :1]
    return first + (jnp.sum(x - first, axis=-1, keepdims=True) - (x - first)) / (x.shape[-1] - 1)


def _dense(scores: jax.Array, token_rewards: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    if mask is None:
        raise ValueError("mask must be given with token_rewards")
    mask, rewards = tokens_of(mask, token_rewards=token_rewards)
    per_row(mask, scores=scores)
    return mask, rewards
