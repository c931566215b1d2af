"""PPO's clipped losses, per token."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, float32, number

MAX_LOG_RATIO = 80.0  # exp(80) = 5.5e34 is still finite in float32, and 0 · finite = 0


def ppo_policy_loss(logps: jax.Array, old_logps: jax.Array, advantages: jax.Array, *, clip: Scalar = 0.2) -> jax.Array:
    """L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t),  ρ_t = π(a_t|s_t) / π_old(a_t|s_t).

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised. Its gradient in logps is −ρ_t A_t, and 0 where
    the ratio has already moved past the clip in the direction that the advantage asks for.

    logps: [B, T], of the policy being trained; old_logps: [B, T], of the policy that sampled the tokens, at the same
    temperature and from the same forward pass as training (so ρ = 1 at the first update); in nats.
    advantages: [B, T]. clip: ε, above 0, as a share of the ratio.
    Returns float32 [B, T], unmasked: reduce with `masked_mean`, and then what stands at masked positions, even NaN,
    changes no value and no gradient. A NaN at a real token gives NaN. log ρ is capped at 80, to stay finite.
    """
    logps, old_logps, advantages = float32(logps=logps, old_logps=old_logps, advantages=advantages)
    clip = number("clip", clip, 0, open_low=True)
    log_ratio = logps - old_logps
    # Where a number is missing, differentiate a constant instead: a zero gradient times NaN would be NaN.
    known = ~jnp.isnan(log_ratio) & jnp.isfinite(advantages)
    ratio = jnp.exp(jnp.minimum(jnp.where(known, log_ratio, 0), MAX_LOG_RATIO))
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages)
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
