"""Reductions and whitening that see only where a mask is True. Nothing else may reduce what a loss returns."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import boolean, float32, tokens_of

Axis = int | tuple[int, ...] | None
AxisName = str | tuple[str, ...] | None
SumCount = tuple[jax.Array, jax.Array]


def masked_sum(x: jax.Array, mask: jax.Array, *, axis: Axis = None) -> jax.Array:
    """Σ x over mask: float32, over all axes unless `axis` names some; nothing to sum gives 0.

    x: [...]; mask: bool, the shape of x. The sequence log-probability that `dpo_loss` takes is
    `masked_sum(token_logps(logits, tokens), mask, axis=-1)`.
    """
    (x,) = float32(x=x)
    return jnp.sum(jnp.where(boolean(mask, x=x), x, 0), axis=axis)


def masked_mean(x: jax.Array, mask: jax.Array, *, axis: Axis = None, axis_name: AxisName = None) -> jax.Array:
    """Σ x / n over the n positions of mask: float32, over all axes unless `axis` names some; n = 0 gives 0.

    x: [...]; mask: bool, the shape of x. Over all axes this is the mean per token. It is not the mean of means of
    micro-batches or of devices: there, add up the pairs of `token_mean`, or name the mesh axis of shard_map (or
    several) in `axis_name`.
    """
    (x,) = float32(x=x)
    return _mean(x, boolean(mask, x=x), axis, axis_name)


def masked_var(x: jax.Array, mask: jax.Array, *, axis: Axis = None, axis_name: AxisName = None) -> jax.Array:
    """Σ (x − mean)² / n over the n positions of mask (the biased variance, ÷ n and not ÷ (n − 1)); n = 0 gives 0.

    x: [...]; mask: bool, the shape of x; float32, over all axes unless `axis` names some, and over the devices of the
    mesh axis `axis_name` too. Two passes, so that a mean far from 0 costs no digits.
    """
    (x,) = float32(x=x)
    mask = boolean(mask, x=x)
    mean = _mean(x, mask, axis, axis_name, keepdims=True)
    return _mean(jnp.square(jnp.where(mask, x, mean) - mean), mask, axis, axis_name)


def whiten(x: jax.Array, mask: jax.Array, *, shift_mean: bool = True, axis_name: AxisName = None) -> jax.Array:
    """y = (x − μ) / √(σ² + 10⁻⁸), with μ and the biased σ² taken over the whole mask; masked positions get 0.

    PPO whitens advantages with the mean (shift_mean=True) and, where it whitens rewards, without: shift_mean=False
    (a Python bool) adds μ back, y + μ. As in "The N Implementation Details of RLHF with PPO" and TRL, the 10⁻⁸ stands
    under the root (a constant x gives 0); OpenRLHF, the base of RTO's code, instead raises σ² to at least 10⁻⁸.

    x: [...]; mask: bool, the shape of x. Returns float32, the shape of x. The statistics are of the array at hand:
    under jit all devices' of a sharded array; inside vmap those of one row, inside shard_map those of one shard,
    unless `axis_name` names the mesh axis (or several) to take them over.
    """
    (x,) = float32(x=x)
    mask = boolean(mask, x=x)
    mean = masked_mean(x, mask, axis_name=axis_name)
    variance = masked_var(x, mask, axis_name=axis_name)
    centred = jnp.where(mask, x, mean) - mean
    # The mean of equal numbers can miss them by a bit, which the division would blow up: 0.15 for 18 times 64.83768.
    centred = centred - masked_mean(centred, mask, axis_name=axis_name)
    x = centred * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask, x if shift_mean else x + mean, 0)


def token_mean(x: jax.Array, mask: jax.Array) -> SumCount:
    """(Σ_i Σ_t x_it, Σ_i n_i): the mean over the batch's tokens, before the division. Every token weighs the same.

    x: [..., T]; mask: bool, the shape of x. Returns two float32 scalars. Pairs add: the sum of the pairs of
    micro-batches (and of devices, by `over_devices`) is that of the whole batch, whatever the split; divide the sums
    once, or accumulate the gradient of the first and divide it by the total of the second.
    As in "The N Implementation Details of RLHF with PPO" and DAPO (arXiv 2503.14476, eq. 8).
    """
    mask, x = tokens_of(mask, x=x)
    return jnp.sum(x), jnp.sum(mask, dtype=jnp.float32)


def sequence_mean(x: jax.Array, mask: jax.Array) -> SumCount:
    """(Σ_i Σ_t x_it / n_i, number of rows with a token): the mean over sequences of their own means, undivided.

    OpenRLHF's mean, and so that of RTO's code: a token of a long response weighs less. Rows without a token count
    neither above nor below. Arguments and use as in `token_mean`.
    """
    mask, x = tokens_of(mask, x=x)
    count = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return jnp.sum(jnp.sum(x, axis=-1) / jnp.maximum(count, 1)), jnp.sum(count > 0, dtype=jnp.float32)


def over_devices(pair: SumCount, axis_name: AxisName = None) -> SumCount:
    """The pair summed over the devices of a mesh axis of shard_map (or several); itself, without a name.

    pair: of `token_mean` or `sequence_mean`. axis_name: the mesh axis, or several. Returns (sum, count), on every device.
    """
    return pair if axis_name is None else jax.lax.psum(pair, axis_name)


def last_token(mask: jax.Array) -> jax.Array:
    """True at the last position of each row that the mask keeps, wherever padding is: bool [..., T]."""
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    return mask & (index == jnp.max(jnp.where(mask, index, -1), axis=-1, keepdims=True, initial=-1))


def next_token(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x at the next position that the mask keeps, and 0 where there is none: [..., T]."""
    length = mask.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, mask.shape, mask.ndim - 1)
    following = jax.lax.cummin(jnp.where(mask, index, length), axis=mask.ndim - 1, reverse=True)
    edge = [(0, 0)] * (mask.ndim - 1) + [(0, 1)]
    following = jnp.pad(following, edge, constant_values=length)[..., 1:]
    return jnp.take_along_axis(jnp.pad(x, edge), following, axis=-1)


def _mean(x: jax.Array, mask: jax.Array, axis: Axis, axis_name: AxisName, keepdims: bool = False) -> jax.Array:
    total = jnp.sum(jnp.where(mask, x, 0), axis=axis, keepdims=keepdims)
    count = jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
    total, count = over_devices((total, count), axis_name)
    return total / jnp.maximum(count, 1)
