"""What every loss does with its arguments first: float32, one shape, boolean masks, numbers within their range."""

import math
import numbers

import jax
import jax.numpy as jnp

Scalar = float | jax.Array  # a number, or a traced array of shape ()


def float32(**arrays: jax.Array) -> list[jax.Array]:
    """The arrays in float32. ValueError unless they all have the shape of the first one."""
    (first, like), *_ = arrays.items()
    shape = jnp.shape(like)
    for name, array in arrays.items():
        if jnp.shape(array) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, but {first} has shape {shape}")
    return [jnp.asarray(array).astype(jnp.float32) for array in arrays.values()]


def boolean(mask: jax.Array, **like: jax.Array) -> jax.Array:
    """The mask as an array. ValueError unless it is boolean and has the shape of `like`."""
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be boolean, but its dtype is {mask.dtype}")
    ((name, array),) = like.items()
    if mask.shape != jnp.shape(array):
        raise ValueError(f"mask has shape {mask.shape}, but {name} has shape {jnp.shape(array)}")
    return mask


def number(name: str, value: Scalar, low: float, high: float = math.inf, *, open_low: bool = False) -> Scalar:
    """The value as a Python float or a float32 array of shape (). ValueError if it is known and out of range."""
    if isinstance(value, numbers.Real):
        value = float(value)  # also a NumPy scalar, which would otherwise promote float32 under x64
        if not low <= value <= high or (open_low and value == low):
            bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f", at most {high:g}" * (high < math.inf))
            raise ValueError(f"{name} must be {bounds}, but it is {value:g}")
        return value
    if jnp.shape(value) != ():
        raise ValueError(f"{name} must be a number, but it has shape {jnp.shape(value)}")
    return jnp.asarray(value).astype(jnp.float32)
