"""Named random streams: a key for a purpose and a step, so that adding a stream moves no other."""

import zlib

import jax


def stream(seed: int, purpose: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of `purpose` at `step`: fold_in(fold_in(key(seed), crc32(purpose)), step)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode())), step)
