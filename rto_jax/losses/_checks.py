"""What every loss does with its arguments first: float32, one shape, boolean masks, numbers within their range."""

import math
import numbers

import jax
import jax.numpy as jnp

Scalar = float | jax.Array  # a number, or a traced array of shape ()


def float32(**arrays: jax.Array) -> list[jax.Array]:
    """The arrays in float32. ValueError unless they all have the shape of the first one, and a row at least."""
    (first, like), *_ = arrays.items()
    shape = jnp.shape(like)
    for name, array in arrays.items():
        if jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, but {first} has shape {shape}")
    if 0 in shape[:1]:
        raise ValueError(f"{first} has shape {shape}: the batch is empty")
    return [jnp.asarray(array).astype(jnp.float32) for array in arrays.values()]


def boolean(mask: jax.Array, name: str = "mask", /, **like: jax.Array) -> jax.Array:
    """The mask as an array. ValueError unless it is boolean and has the shape of `like`."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"{name} must be boolean, but its dtype is {mask.dtype}")
    ((other, array),) = like.items()
    if mask.shape != jnp.shape(array):
        raise ValueError(f"{name} has shape {mask.shape}, but {other} has shape {jnp.shape(array)}")
    return mask


def tokens_of(mask: jax.Array, **arrays: jax.Array) -> tuple[jax.Array, ...]:
    """(mask, *arrays): [..., T] each, in float32, and 0 where masked, so that nothing that stands there matters."""
    floats = float32(**arrays)
    first = next(iter(arrays))
    mask = boolean(mask, **{first: floats[0]})
    if mask.ndim == 0:
        raise ValueError(f"{first} has shape (), want [..., T]")
    return mask, *(jnp.where(mask, x, 0) for x in floats)


def per_row(mask: jax.Array, **arrays: jax.Array) -> list[jax.Array]:
    """[B] arrays in float32. ValueError unless they have the mask's shape [B, T] without its last dimension."""
    out = []
    for name, array in arrays.items():
        array = jnp.asarray(array)
        if mask.ndim == 0 or array.shape != mask.shape[:-1]:
            raise ValueError(f"{name} has shape {array.shape}, but mask has shape {mask.shape}: want [B], [B, T]")
        out.append(array.astype(jnp.float32))  # of its own: no buffer is made "like" tokens
    return out


def logits_of(**arrays: jax.Array) -> list[jax.Array]:
    """[..., V] arrays, of one shape, in the dtype that they have. ValueError without a vocabulary."""
    (first, like), *_ = arrays.items()
    shape = jnp.shape(like)
    for name, array in arrays.items():
        if jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, but {first} has shape {shape}")
    if len(shape) == 0 or 0 in (shape[0], shape[-1]):
        raise ValueError(f"{first} has shape {shape}, want [..., V] with at least one of each")
    return [jnp.asarray(array) for array in arrays.values()]


def number(
    name: str, value: Scalar, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Scalar:
    """The value as a Python float or a float32 array of shape (). ValueError if it is known and out of range."""
    if isinstance(value, numbers.Real):
        value = float(value)  # also a NumPy scalar, which would otherwise promote float32 under x64
        if not low <= value <= high or (open_low and value == low) or (open_high and value == high):
            upper = f", {'below' if open_high else 'at most'} {high:g}" * (high < math.inf)
            raise ValueError(
                f"{name} must be {'above' if open_low else 'at least'} {low:g}{upper}, but it is {value:g}"
            )
        return value
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a number, but it has shape {jnp.shape(value)}")
    return jnp.asarray(value).astype(jnp.float32)
