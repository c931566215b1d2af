"""Policy and value objectives per token, KL estimators, and the controllers around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number
from rto_jax.losses.masking import AxisName, over_devices

MAX_LOG_RATIO = 80.0  # exp(80) = 5.5e34 is still finite in float32, and 0 · finite = 0


def ppo_policy_loss(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    *,
    clip: Scalar = 0.2,
    clip_high: Scalar | None = None,
    dual_clip: Scalar | None = None,
) -> jax.Array:
    """L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t),  ρ_t = π(a_t|s_t) / π_old(a_t|s_t).

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised. Its gradient in logps is −ρ_t A_t, and 0 where
    the ratio has already moved past the clip in the direction that the advantage asks for.

    logps: [B, T], of the policy being trained; old_logps: [B, T], of the policy that sampled the tokens, at the same
    temperature and from the same forward pass as training (so ρ = 1 at the first update); in nats.
    advantages: [B, T]. clip: ε, above 0, as a share of the ratio. clip_high: the upper side's own ε (clip-higher of
    DAPO, arXiv 2503.14476). dual_clip: c above 1; where A_t < 0 the loss is at most −c A_t, so that one very likely
    bad token cannot dominate (dual-clip PPO, arXiv 1912.09729, eq. 5).
    Returns float32 [B, T], unmasked: reduce with `masked_mean`, and then what stands at masked positions, even NaN,
    changes no value and no gradient. A NaN at a real token gives NaN. log ρ is capped at 80, to stay finite.
    """
    logps, old_logps, advantages = float32(logps=logps, old_logps=old_logps, advantages=advantages)
    low = number("clip", clip, 0, open_low=True)
    high = low if clip_high is None else number("clip_high", clip_high, 0, open_low=True)
    log_ratio = logps - old_logps
    # Where a number is missing, differentiate a constant instead: a zero gradient times NaN would be NaN.
    known = ~jnp.isnan(log_ratio) & jnp.isfinite(advantages)
    ratio = jnp.exp(jnp.minimum(jnp.where(known, log_ratio, 0), MAX_LOG_RATIO))
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual_clip is not None:
        bound = -number("dual_clip", dual_clip, 1, open_low=True) * advantages
        loss = jnp.where(advantages < 0, jnp.minimum(loss, bound), loss)
    return jnp.where(known, loss, jnp.nan)


def ppo_value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, *, clip: Scalar = 0.2) -> jax.Array:
    """L_t = ½ max((V_t − R_t)², (V_t^clip − R_t)²),  V_t^clip = V_t^old + clip(V_t − V_t^old, −ε, ε).

    The clipped value loss of PPO-RLHF (OpenAI baselines; RTO's code uses the same, with ε = 0.2). No gradient where
    the value has moved by more than ε and its clipped form is the worse of the two.

    values: [B, T], of the critic being trained; old_values: [B, T], those that made the advantages.
    returns: [B, T], from `gae`, not whitened. clip: ε, above 0, in units of the return; infinity switches it off.
    Returns float32 [B, T], unmasked: reduce with `masked_mean`, and then what stands at masked positions, even NaN,
    changes no value and no gradient. A NaN at a real token gives NaN.
    """
    values, old_values, returns = float32(values=values, old_values=old_values, returns=returns)
    clip = number("clip", clip, 0, open_low=True)
    known = jnp.isfinite(values) & jnp.isfinite(old_values) & jnp.isfinite(returns)
    values, old_values, returns = (jnp.where(known, x, 0) for x in (values, old_values, returns))
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    loss = 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    return jnp.where(known, loss, jnp.nan)


def kl_k1(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k1 = log π(a_t|s_t) − log π_ref(a_t|s_t): unbiased for KL(π ‖ π_ref) at tokens of π, of either sign.

    Schulman, "Approximating KL divergence" (2020). The estimator of PPO's and RTO's penalty (eq. 2.3 and 4.7), where it
    stands in the *reward*. As a *loss* it does nothing: its gradient ∇ log π is 0 on average over the policy's own tokens.

    logps, ref_logps: [B, T], nats, of tokens that π sampled. Returns float32 [B, T], unmasked, as `ppo_policy_loss` is.
    """
    log_ratio, known = _log_ratio(logps, ref_logps)
    return jnp.where(known, log_ratio, jnp.nan)


def kl_k2(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k2 = ½ (log π/π_ref)²: low variance, never negative, biased for KL(π ‖ π_ref) (little, while the two are near).

    Schulman, "Approximating KL divergence" (2020). As a *loss* it is the right one: its gradient, log(π/π_ref) ∇ log π,
    is on average that of KL(π ‖ π_ref) over the policy's own tokens.

    logps, ref_logps: [B, T], nats, of tokens that π sampled. Returns float32 [B, T], unmasked, as `ppo_policy_loss` is.
    """
    log_ratio, known = _log_ratio(logps, ref_logps)
    return jnp.where(known, 0.5 * jnp.square(log_ratio), jnp.nan)


def kl_k3(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """k3 = π_ref/π − 1 − log(π_ref/π): unbiased for KL(π ‖ π_ref) at tokens of π, and never negative.

    Schulman, "Approximating KL divergence" (2020); GRPO's penalty (arXiv 2402.03300, eq. 4). As a *loss* its gradient,
    (1 − π_ref/π) ∇ log π, is on average that of the *other* direction, KL(π_ref ‖ π). The ratio is capped at e⁸⁰.

    logps, ref_logps: [B, T], nats, of tokens that π sampled. Returns float32 [B, T], unmasked, as `ppo_policy_loss` is.
    """
    log_ratio, known = _log_ratio(logps, ref_logps)
    return jnp.where(known, jnp.expm1(jnp.minimum(-log_ratio, MAX_LOG_RATIO)) + log_ratio, jnp.nan)


def fixed_kl(coefficient: Scalar, kl: Scalar) -> jax.Array:
    """β ← β: the penalty's weight for the next batch, whatever the KL is. RTO's controller, to be swapped with `adaptive_kl`.

    coefficient: β, at least 0. kl: not looked at. Returns β, float32 [].
    """
    return jnp.float32(number("coefficient", coefficient, 0))


def adaptive_kl(
    coefficient: Scalar, kl: Scalar, *, samples: Scalar, target: Scalar = 6.0, horizon: Scalar = 10_000
) -> jax.Array:
    """β ← β (1 + clip(KL/target − 1, −0.2, 0.2) · n/horizon): the penalty's weight for the next batch.

    The proportional controller of Ziegler et al. (arXiv 1909.08593, section 2.2); its first β was 0.15. The state is β
    itself: carry it in a scan.

    coefficient: β, at least 0. kl: of the batch, nats per *response* (mean of Σ_t log π/π_ref), observed.
    samples: n, responses in the batch, at least 0. target: nats per response, above 0. horizon: responses, above 0.
    Returns the new β, float32 []. A KL of NaN gives NaN, or ValueError where it is a Python number.
    """
    beta, kl = number("coefficient", coefficient, 0), number("kl", kl, -jnp.inf)
    target, horizon = number("target", target, 0, open_low=True), number("horizon", horizon, 0, open_low=True)
    error = jnp.clip(jnp.float32(kl / target - 1), -0.2, 0.2)
    return jnp.float32(beta) * (1 + error * number("samples", samples, 0) / horizon)


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of all that was seen: float32 [] each. A pure state."""

    count: jax.Array
    mean: jax.Array
    squares: jax.Array


def running_moments() -> RunningMoments:
    """Nothing seen yet."""
    return RunningMoments(*(jnp.zeros((), jnp.float32) for _ in range(3)))


def update_moments(
    state: RunningMoments, x: jax.Array, mask: jax.Array, *, axis_name: AxisName = None
) -> RunningMoments:
    """The moments of everything seen, x included: the same whatever batches and devices it came in.

    Chan et al.'s merging of (n, μ, Σ(x − μ)²), which loses no digits where the mean is far from 0.

    state: of `running_moments`, or of the last call. x: [...]; mask: bool, the shape of x. axis_name: a mesh axis of
    shard_map over which x goes on.
    Returns the new state.
    """
    (x,) = float32(x=x)
    mask = boolean(mask, x=x)
    count = jnp.sum(mask, dtype=jnp.float32)
    total, count = over_devices((jnp.sum(jnp.where(mask, x, 0)), count), axis_name)
    mean = total / jnp.maximum(count, 1)
    squares, _ = over_devices((jnp.sum(jnp.square(jnp.where(mask, x - mean, 0))), count), axis_name)
    both = jnp.maximum(state.count + count, 1)
    gap = mean - state.mean
    return RunningMoments(
        state.count + count,
        state.mean + gap * count / both,
        state.squares + squares + jnp.square(gap) * state.count * count / both,
    )


def normalise_rewards(
    state: RunningMoments, rewards: jax.Array, *, shift_mean: bool = True, clip: Scalar | None = None
) -> jax.Array:
    """(r − μ)/√(σ² + 10⁻⁸) with the running moments (biased σ²), then clipped to ±clip; r itself while nothing was seen.

    PPO-max (MOSS, arXiv 2307.04964) divides by the running σ only (shift_mean=False, a Python bool, here r/σ);
    OpenRLHF, the base of RTO's code, clips to ±10. Call `update_moments` with the batch first.

    state: of `update_moments`. rewards: [...], e.g. the reward model's scores [B]. clip: above 0. Returns float32, the shape of rewards.
    """
    (rewards,) = float32(rewards=rewards)
    seen = state.count > 0
    mean = jnp.where(seen, state.mean, 0) if shift_mean else 0.0
    variance = jnp.where(seen, state.squares / jnp.maximum(state.count, 1), 1)
    out = (rewards - mean) * jax.lax.rsqrt(variance + 1e-8)
    if clip is None:
        return out
    clip = number("clip", clip, 0, open_low=True)
    return jnp.clip(out, -clip, clip)


def _log_ratio(logps: jax.Array, ref_logps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log π/π_ref, 0 where it is NaN or infinite; where it is a number), so that 0 gradients stay 0."""
    logps, ref = float32(logps=logps, ref_logps=ref_logps)
    log_ratio = logps - ref
    known = jnp.isfinite(log_ratio)
    return jnp.where(known, log_ratio, 0), known
