"""Log-probabilities straight from hidden states: the logits exist for one piece of the vocabulary at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rto_jax.losses._checks import Scalar, boolean, number


class LinearStatistics(NamedTuple):
    """Of the tokens and the distributions that they were drawn from: float32 [..., T], nats, 0 where masked."""

    logps: jax.Array
    """log π(a_t|s_t)"""
    entropy: jax.Array
    """H(π(·|s_t)), as `entropy` gives it"""
    ref_logps: jax.Array
    """log π_ref(a_t|s_t); no gradient"""
    kl: jax.Array
    """KL(π_ref(·|s_t) ‖ π(·|s_t)), as `token_kl` gives it"""


def linear_token_logps(
    hidden: jax.Array,
    unembedding: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: Scalar = 1.0,
    chunk: int = 4096,
    shards: int = 1,
) -> jax.Array:
    """`token_logps(hidden @ unembedding.T, tokens)`, and the array [..., T, V] is never built, forward or backward.

    The vocabulary is taken in chunks of rows of the unembedding: a running maximum and sum give the normaliser, and the
    backward pass computes each chunk's logits again. All products accumulate in float32; the gradient of the
    unembedding is that of its own dtype.

    hidden: [..., T, D], after the last norm. unembedding: [V, D], such as a tied embedding, or a head's kernel [D, V]
    transposed. tokens: int [..., T]. mask: bool [..., T]; None: all. temperature: above 0; no gradient flows to it.
    chunk: rows of the unembedding at a time, at most, a Python int; memory depends on it, the result does not.
    shards: devices that V is split over (a mesh axis of jit); each chunk then takes rows of all of them, and what they
    exchange is a few numbers per token.
    Returns float32 [..., T], nats, 0 where masked; NaN for a token outside 0..V−1, with a gradient of 0. To score
    several models against the same tokens in one pass, vmap over hidden and unembedding.
    """
    hidden, unembedding, tokens, mask = _checked(hidden, unembedding, tokens, mask)
    return _flat((hidden, unembedding), (), tokens, mask, temperature, chunk, shards).logps


def linear_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    ref_hidden: jax.Array,
    ref_unembedding: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: Scalar = 1.0,
    chunk: int = 4096,
    shards: int = 1,
) -> LinearStatistics:
    """Log-probabilities under policy and reference, entropy, and the KL of TDPO, in one pass over the vocabulary.

    hidden, unembedding, tokens, mask, temperature, chunk and shards are those of `linear_token_logps`. ref_hidden:
    [..., T, D'] and ref_unembedding: [V, D'], of the frozen reference, of any width: no gradient flows to it.
    Returns `LinearStatistics`; `sequence_kl` is the sum of its kl over T.
    """
    hidden, unembedding, tokens, mask = _checked(hidden, unembedding, tokens, mask)
    ref_hidden, ref_unembedding, _, _ = _checked(ref_hidden, ref_unembedding, tokens, mask, "ref_")
    if ref_unembedding.shape[0] != unembedding.shape[0]:
        raise ValueError(f"ref_unembedding has shape {ref_unembedding.shape}, but unembedding has {unembedding.shape}")
    ref = jax.lax.stop_gradient((ref_hidden, ref_unembedding))
    return _flat((hidden, unembedding), ref, tokens, mask, temperature, chunk, shards)


def _checked(hidden, unembedding, tokens, mask, prefix=""):
    hidden, unembedding, tokens = jnp.asarray(hidden), jnp.asarray(unembedding), jnp.asarray(tokens)
    if unembedding.ndim != 2 or hidden.ndim < 2 or hidden.shape[-1] != unembedding.shape[1]:
        raise ValueError(
            f"{prefix}unembedding has shape {unembedding.shape}, but {prefix}hidden has shape {hidden.shape}: "
            "want [V, D], [..., T, D]"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but their dtype is {tokens.dtype}")
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(f"tokens has shape {tokens.shape}, but {prefix}hidden has shape {hidden.shape}")
    for name, array in ((f"{prefix}hidden", hidden), (f"{prefix}unembedding", unembedding)):
        if array.shape[0] == 0:
            raise ValueError(f"{name} has shape {array.shape}: it is empty")
    mask = jnp.ones(tokens.shape, bool) if mask is None else boolean(mask, tokens=tokens)
    return hidden, unembedding, tokens, mask


def _flat(model, ref, tokens, mask, temperature, chunk, shards) -> LinearStatistics:
    """The statistics, by way of one row of all tokens: [N] and [N, D]."""
    rows = model[1].shape[0]
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, but it is {chunk}")
    if shards < 1 or rows % shards:
        raise ValueError(f"shards must divide the vocabulary of {rows}, but it is {shards}")
    own = rows // shards
    least = min(-(-rows // chunk), own)
    # As few chunks of one size as there can be. A vocabulary without a fitting divisor (a prime, say) is filled up with
    # rows that no token can be.
    chunks = next((n for n in range(least, min(2 * least, own) + 1) if own % n == 0), least)
    scale = 1 / number("temperature", temperature, 0, open_low=True)
    wide = tokens if tokens.dtype.itemsize > 4 else tokens.astype(jnp.int32)
    tokens = jnp.where((wide >= 0) & (wide < rows), wide, -1).astype(jnp.int32)

    def flat(pair):
        return pair and (pair[0].reshape(-1, pair[0].shape[-1]), pair[1])

    arrays = _alike((flat(model), flat(ref), tokens.ravel(), mask.ravel()))
    out = _scan_vocabulary(*arrays, scale, chunks, shards)
    return LinearStatistics(*(x.reshape(tokens.shape) for x in out))


def _alike(arrays):
    """The arrays, which in shard_map all vary over the axes that one of them does; the gradient of one sums over them."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))

    def cast(x):
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def _pieces(unembedding, chunks, shards):
    """[chunks, shards, size, D]: every chunk takes `size` rows from each of the `shards` parts of the vocabulary."""
    rows, width = unembedding.shape
    own = rows // shards
    size = -(-own // chunks)
    pieces = unembedding.reshape(shards, own, width)
    if own != size * chunks:
        pieces = jnp.pad(pieces, ((0, 0), (0, size * chunks - own), (0, 0)))
    return pieces.reshape(shards, chunks, size, width).swapaxes(0, 1)


def _whole(pieces, rows):
    """The inverse of `_pieces`."""
    _, shards, _, width = pieces.shape
    return pieces.swapaxes(0, 1).reshape(shards, -1, width)[:, : rows // shards].reshape(rows, width)


def _ids(chunks, rows, shards):
    """The ids of the tokens in each chunk, int [chunks, shards, size]; −1 for what fills the last one up."""
    own = rows // shards
    size = -(-own // chunks)
    column = np.arange(chunks)[:, None, None] * size + np.arange(size)
    ids = np.where(column < own, np.arange(shards)[:, None] * own + column, -1)
    return jnp.asarray(ids, jnp.int32)


def _logits(hidden, piece, scale, ids):
    columns = piece.reshape(-1, piece.shape[-1]).astype(hidden.dtype)  # two dimensions: the fastest product on CPUs
    z = jnp.einsum("nd,cd->nc", hidden, columns, preferred_element_type=jnp.float32)
    return jnp.where((ids >= 0)[None, :, :], z.reshape(hidden.shape[0], *ids.shape) * scale, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _scan_vocabulary(model, ref, tokens, mask, scale, chunks, shards):
    return _forward(model, ref, tokens, mask, scale, chunks, shards)[0]


# A sum over the vocabulary is first one per shard, [N, shards], and over the shards at the very end: devices exchange
# nothing from chunk to chunk.


def _forward(model, ref, tokens, mask, scale, chunks, shards):
    hidden = jnp.where(mask[:, None], model[0], 0)
    ref_hidden = jnp.where(mask[:, None], ref[0], 0) if ref else None

    def step(carry, now):
        ids, piece, ref_piece = now
        carry, hit = dict(carry), tokens[:, None, None] == ids[None, :, :]

        def add(name, z, **others):
            """The running maximum of z, and sums of e^(z − max)·x for each x among the others."""
            top = jnp.maximum(carry[f"{name}_max"], jnp.max(z, axis=2))
            decay, weight = jnp.exp(carry[f"{name}_max"] - top), jnp.exp(z - top[:, :, None])
            carry[f"{name}_max"] = top
            for key, x in others.items():
                carry[key] = carry[key] * decay + jnp.sum(weight * x, axis=2)

        z = _logits(hidden, piece, scale, ids)
        finite = jnp.where(z > -jnp.inf, z, 0)
        add("z", z, z_sum=1.0, **({"z_mean": finite} if ref else {}))
        carry["chosen"] = carry["chosen"] + jnp.sum(jnp.where(hit, finite, 0), axis=2)
        if ref:
            q = _logits(ref_hidden, ref_piece, scale, ids)
            ref_finite = jnp.where(q > -jnp.inf, q, 0)
            add("q", q, q_sum=1.0, gap=ref_finite - finite)
            carry["ref_chosen"] = carry["ref_chosen"] + jnp.sum(jnp.where(hit, ref_finite, 0), axis=2)
        return carry, None

    # Zeros that vary over the same mesh axes as the inputs, as shard_map demands of a carry.
    zero = jnp.sum(hidden, axis=1, dtype=jnp.float32) * 0
    start = jnp.broadcast_to(zero[:, None], (tokens.size, shards))
    sums = {"z": ["z_sum", "z_mean"], "q": ["q_sum", "gap"]} if ref else {"z": ["z_sum"]}
    found = {"chosen": start, "ref_chosen": start}
    for name, keys in sums.items():
        found |= {f"{name}_max": start - jnp.inf} | dict.fromkeys(keys, start)
    found, _ = _loop(step, found, _inputs(model, ref, chunks, shards))
    for name, keys in sums.items():
        top = jnp.max(found[f"{name}_max"], axis=1)
        decay = jnp.exp(found[f"{name}_max"] - top[:, None])
        found |= {f"{name}_max": top} | {key: jnp.sum(found[key] * decay, axis=1) for key in keys}
    found |= {key: jnp.sum(found[key], axis=1) for key in ("chosen", "ref_chosen")}
    normaliser = found["z_max"] + jnp.log(found["z_sum"])

    def masked(x, known=True):
        return jnp.where(mask, jnp.where(known, x, jnp.nan), 0)

    entropy, kl, ref_logps, ref_normaliser = zero, zero, zero, zero
    if ref:
        entropy = normaliser - found["z_mean"] / found["z_sum"]
        ref_normaliser = found["q_max"] + jnp.log(found["q_sum"])
        kl = found["gap"] / found["q_sum"] - ref_normaliser + normaliser
        ref_logps = found["ref_chosen"] - ref_normaliser
    out = LinearStatistics(
        masked(found["chosen"] - normaliser, tokens >= 0), masked(entropy), masked(ref_logps, tokens >= 0), masked(kl)
    )
    return out, (model, ref, tokens, mask, scale, normaliser, ref_normaliser, entropy)


def _backward(chunks, shards, kept, cotangents):
    model, ref, tokens, mask, scale, normaliser, ref_normaliser, entropy = kept
    hidden, unembedding = model
    rows, dtype = unembedding.shape[0], hidden.dtype
    clean = jnp.where(mask[:, None], hidden, 0)
    ref_hidden = jnp.where(mask[:, None], ref[0], 0) if ref else None

    def columns(x):
        return x[:, None, None]

    of_logps, of_entropy, of_kl = (
        columns(jnp.where(where, x, 0) * scale)
        for where, x in ((mask & (tokens >= 0), cotangents.logps), (mask, cotangents.entropy), (mask, cotangents.kl))
    )

    def step(into_hidden, now):
        ids, piece, ref_piece = now
        logp = _logits(clean, piece, scale, ids) - columns(normaliser)
        p = jnp.exp(logp)
        gradient = of_logps * ((columns(tokens) == ids[None, :, :]).astype(jnp.float32) - p)
        if ref:
            gradient -= of_entropy * p * (jnp.where(p > 0, logp, 0) + columns(entropy))
            q = jnp.exp(_logits(ref_hidden, ref_piece, scale, ids) - columns(ref_normaliser))
            gradient += of_kl * (p - q)
        gradient = gradient.astype(dtype)
        into_hidden += jnp.einsum("nsc,scd->snd", gradient, piece.astype(dtype), preferred_element_type=jnp.float32)
        flat = gradient.reshape(gradient.shape[0], ids.size)
        into_piece = jnp.einsum("nc,nd->cd", flat, clean, preferred_element_type=jnp.float32)
        return into_hidden, into_piece.reshape(piece.shape).astype(unembedding.dtype)

    start = jnp.broadcast_to(clean.astype(jnp.float32)[None] * 0, (shards, *clean.shape))
    into_hidden, into_pieces = _loop(step, start, _inputs(model, ref, chunks, shards))
    into_hidden = jnp.where(mask[:, None], jnp.sum(into_hidden, axis=0), 0).astype(dtype)
    return (into_hidden, _whole(into_pieces, rows)), jax.tree.map(jnp.zeros_like, ref), None, None, None


_scan_vocabulary.defvjp(_forward, _backward)


def _inputs(model, ref, chunks, shards):
    pieces = _pieces(model[1], chunks, shards)
    return _ids(chunks, model[1].shape[0], shards), pieces, _pieces(ref[1], chunks, shards) if ref else pieces


def _loop(step, carry, xs):
    """`scan`, without a loop where there is one turn."""
    if xs[0].shape[0] > 1:
        return jax.lax.scan(step, carry, xs)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], out)
