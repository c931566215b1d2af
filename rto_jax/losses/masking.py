"""Reductions and whitening that see only where a mask is True. Nothing else may reduce what a loss returns."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import boolean, float32

Axis = int | tuple[int, ...] | None


def masked_sum(x: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Σ x over mask: float32, over all axes unless `axis` names some; nothing to sum gives 0.

    x: [...]; mask: bool, the shape of x. The sequence log-probability that `dpo_loss` takes is
    `masked_sum(token_logps(logits, tokens), mask, axis=-1)`.
    """
    (x,) = float32(x=x)
    return jnp.sum(jnp.where(boolean(mask, x=x), x, 0), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Σ x / n over the n positions of mask: float32, over all axes unless `axis` names some; n = 0 gives 0.

    x: [...]; mask: bool, the shape of x. Over all axes this is the mean per token. It is not the mean of means of
    micro-batches or of devices: there, add up `masked_sum` and the counts, and divide once.
    """
    (x,) = float32(x=x)
    return _mean(x, boolean(mask, x=x), axis)


def masked_var(x: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Σ (x − mean)² / n over the n positions of mask (the biased variance, ÷ n and not ÷ (n − 1)); n = 0 gives 0.

    x: [...]; mask: bool, the shape of x; float32, over all axes unless `axis` names some. Two passes, so that a mean
    far from 0 costs no digits.
    """
    (x,) = float32(x=x)
    mask = boolean(mask, x=x)
    mean = _mean(x, mask, axis, keepdims=True)
    return _mean(jnp.square(jnp.where(mask, x, mean) - mean), mask, axis)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """y = (x − μ) / √(σ² + 10⁻⁸), with μ and the biased σ² taken over the whole mask; masked positions get 0.

    PPO whitens advantages with the mean (shift_mean=True) and, where it whitens rewards, without: shift_mean=False
    (a Python bool) adds μ back, y + μ. As in "The N Implementation Details of RLHF with PPO" and TRL, the 10⁻⁸ stands
    under the root (a constant x gives 0); OpenRLHF, the base of RTO's code, instead raises σ² to at least 10⁻⁸.

    x: [...]; mask: bool, the shape of x. Returns float32, the shape of x. The statistics are of the array at hand:
    inside vmap those of one row, inside shard_map those of one shard.
    """
    (x,) = float32(x=x)
    mask = boolean(mask, x=x)
    mean, variance = masked_mean(x, mask), masked_var(x, mask)
    x = (jnp.where(mask, x, mean) - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, x if shift_mean else x + mean, 0)


def _mean(x: jax.Array, mask: jax.Array, axis: Axis, keepdims: bool = False) -> jax.Array:
    total = jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims)
    return total / jnp.maximum(jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32), 1)
