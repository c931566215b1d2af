"""Token rewards for policy optimisation: what a DPO model implies, and RTO's mixture."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number


def implicit_token_rewards(
    policy_logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, beta: Scalar
) -> jax.Array:
    """r_t = β log π(a_t|s_t)/π_ref(a_t|s_t): the reward of which π is the optimal policy, up to shaping.

    From r to Q* (arXiv 2404.12358) eq. 10: it equals r(s_t, a_t) + V*(s_{t+1}) − V*(s_t), an optimal advantage.
    Its sum over the response is DPO's implicit reward, the r of `bradley_terry_loss` that makes it `dpo_loss`.

    policy_logps, ref_logps: [B, T], of the same tokens, in nats. mask: bool [B, T].
    beta: at least 0, that of the DPO training, to speak of its reward.
    Returns float32 [B, T], 0 where masked. Gradients flow to both log-probabilities.
    """
    policy, ref = float32(policy_logps=policy_logps, ref_logps=ref_logps)
    return _term(number("beta", beta, 0), policy, ref, boolean(mask, policy_logps=policy))


def rto_token_rewards(
    dpo_logps: jax.Array,
    ref_logps: jax.Array,
    policy_logps: jax.Array,
    terminal_rewards: jax.Array,
    mask: jax.Array,
    *,
    beta1: Scalar,
    beta2: Scalar,
    beta3: Scalar = 1.0,
    dpo_clip: Scalar | None = None,
) -> jax.Array:
    """r_t = β₁ log π_dpo(a_t|s_t)/π_ref(a_t|s_t) − β₂ log π(a_t|s_t)/π_ref(a_t|s_t) + 1[t last] β₃ r_MLE(x, y).

    RTO (arXiv 2404.18922) eq. 4.7. The last token is the last one that the mask keeps, wherever padding and other
    people's turns are; a row without any earns 0. A weight of 0 switches its term off, whatever stands in its array
    (so its own derivative there is 0 too): beta1=0 is PPO's reward, eq. 2.3, exactly. dpo_clip=c clips the *scaled*
    dense term to ±c; the authors' script does so with c = 0.05 at β₁ = 0.05 (±1 nat), the paper does not.

    dpo_logps, ref_logps, policy_logps: [B, T], in nats; policy_logps are those of the policy that sampled the tokens.
    terminal_rewards: [B], the reward model's score. mask: bool [B, T]. beta1, beta2, beta3: at least 0.
    Returns float32 [B, T], 0 where masked. Differentiable in every array, but they are rewards: compute them once
    per rollout, outside of the policy's gradient.
    Differs from the authors' code: that runs β₁ = 0 as β₁ = 1, and clamps r_MLE to ±10 first (clip it before).
    """
    dpo, ref, policy = float32(dpo_logps=dpo_logps, ref_logps=ref_logps, policy_logps=policy_logps)
    mask = boolean(mask, dpo_logps=dpo)
    terminal = jnp.asarray(terminal_rewards).astype(jnp.float32)  # float32 of its own: no buffer is made "like" tokens
    if mask.ndim == 0 or terminal.shape != mask.shape[:-1]:
        raise ValueError(
            f"terminal_rewards has shape {terminal.shape}, but mask has shape {mask.shape}: want [B], [B, T]"
        )
    dense = _term(number("beta1", beta1, 0), dpo, ref, mask)
    if dpo_clip is not None:
        dpo_clip = number("dpo_clip", dpo_clip, 0, open_low=True)
        dense = jnp.clip(dense, -dpo_clip, dpo_clip)
    kl = _term(number("beta2", beta2, 0), policy, ref, mask)
    beta3 = number("beta3", beta3, 0)
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    last = index == jnp.max(jnp.where(mask, index, -1), axis=-1, keepdims=True, initial=-1)
    score = beta3 * jnp.where(last & (beta3 != 0), terminal[..., None], 0)
    return dense - kl + score


def _term(weight: Scalar, logps: jax.Array, ref_logps: jax.Array, mask: jax.Array) -> jax.Array:
    """weight · (logps − ref_logps) where masked in and the weight is not 0; elsewhere exactly 0, gradients included."""
    used = mask & (weight != 0)
    return weight * (jnp.where(used, logps, 0) - jnp.where(used, ref_logps, 0))
