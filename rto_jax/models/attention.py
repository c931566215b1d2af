"""Attention over whole rows: one function, several back ends, the same answer.

A row may hold padding, several examples (segments), or several answers to one prompt side by side (a layout). A query
sees a key of its own segment, at its own slot or before, in its own block of the layout or one that this block sees.

Letters as in `llama`: B batch, S sequence, H query heads, K key/value heads, d numbers per head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from rto_jax.errors import UserError
from rto_jax.types import BATCH, TENSOR

BACKENDS = ("auto", "xla", "splash", "cudnn")

Layout = tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]
"""Blocks of a row's slots: ((first, end), earlier blocks that it sees as a whole); within itself a block is causal."""


def row_layout(length: int, start: int = 0, branches: int = 1) -> Layout:
    """A row [prompt of `start` slots | answer | answer …]: every answer sees the prompt and itself, not the others."""
    if branches == 1:
        return (((0, length), ()),)
    size = (length - start) // branches
    if start < 1 or size < 1 or start + branches * size != length:
        raise ValueError(f"a row of {length} slots is no prompt of {start} and {branches} answers of one length")
    answers = [(first, first + size) for first in range(start, length, size)]
    return (((0, start), ()), *((answer, ((0, start),)) for answer in answers))


def _seen(segments: jax.Array, first: int, end: int, earlier) -> list[jax.Array]:
    """Of a block's queries, which keys of each earlier block and of its own they see, pieces bool [B, end - first, n]."""
    own = segments[:, first:end, None]
    causal = jnp.tril(jnp.ones((1, end - first, end - first), bool))
    return [*(own == segments[:, None, a:b] for a, b in earlier), (own == segments[:, None, first:end]) & causal]


def positions(segments: jax.Array, layout: Layout) -> jax.Array:
    """RoPE's positions, int32 [B, S]: how many tokens a token sees beside itself; padding is 0."""
    counts = [sum(jnp.sum(x, axis=2, dtype=jnp.int32) for x in _seen(segments, *own, earlier)) for own, earlier in layout]
    return jnp.where(segments > 0, jnp.concatenate(counts, axis=1) - 1, 0)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, layout: Layout, *, backend: str = "xla",
    mesh: Mesh | AbstractMesh | None = None,
) -> jax.Array:  # fmt: skip
    """Grouped-query attention within a batch of rows.

    Args:
      q: [B, S, H, d]; query head h reads key/value head h // (H / K). k, v: [B, S, K, d].
      segments: int32 [B, S], 0 for padding, else the number of the example that the token belongs to; or bool [B, S],
        of rows that hold one example each.
      layout: what may see what, static.
      backend: "xla", "splash" (Pallas, for TPUs), "cudnn" (NVIDIA GPUs, 16 bits), or "auto": the fastest here.
      mesh: over whose `data` and `fsdp` axes the rows are split, and over whose `tensor` axis the heads. Only the
        kernels need it; XLA splits what it compiles by itself.

    Returns:
      [B, S, H, d]. What comes out at padding is finite and means nothing.
    """
    backend = choose(backend, q.dtype, mesh)
    if backend == "splash":
        return _splash(q, k, v, segments, layout, mesh)
    if backend == "cudnn":
        return checkpoint_name(_cudnn(q, k, v, segments, layout, mesh), "attention")
    cuts, spans, blocks = [end for (_, end), _ in layout[:-1]], [own for own, _ in layout], []
    own_q, own_k, own_v = (dict(zip(spans, jnp.split(x, cuts, axis=1), strict=True)) for x in (q, k, v))
    for span, earlier in layout:
        seen = jnp.concatenate(_seen(segments, *span, earlier), axis=-1)
        keys, values = (jnp.concatenate([own[x] for x in (*earlier, span)], axis=1) for own in (own_k, own_v))
        blocks.append(attend(own_q[span], [keys], [values], [seen]))
    return checkpoint_name(blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1), "attention")


def platform(mesh: Mesh | AbstractMesh | None) -> str:
    """What the program will run on: also where it is compiled for a TPU that is not here."""
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def choose(backend: str, dtype, mesh: Mesh | AbstractMesh | None = None) -> str:
    """The back end that "auto" stands for. Raises UserError for one that this dtype or device cannot have."""
    if backend not in BACKENDS:
        raise UserError(f"attention must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if backend == "auto":
        return {"tpu": "splash", "gpu": "cudnn" if half else "xla"}.get(platform(mesh), "xla")
    if backend == "cudnn" and not half:
        raise UserError(f"attention cudnn needs a 16-bit compute dtype, not {jnp.dtype(dtype).name}.")
    if backend == "cudnn" and platform(mesh) != "gpu":
        raise UserError(f"attention cudnn needs an NVIDIA GPU, but this runs on {platform(mesh)}.")
    return backend


def attend(q: jax.Array, keys: list, values: list, seen: list) -> jax.Array:
    """Grouped-query attention over the concatenation of several pieces of keys, without building it.

    Args:
      q: [B, S, H, d]; query head h reads key/value head h // (H / K).
      keys, values: pieces [B, T_i, K, d].
      seen: pieces bool [B, S, T_i], or [B, 1, T_i]: which keys each query may see.

    Returns:
      [B, S, H, d]. A query that may see nothing gets the mean of the values: finite, and never read.
    """
    (rows, length, _, size), kv_heads = q.shape, keys[0].shape[2]
    # Head by head before the products, and one copy back after them: else the CPU's compiler copies the scores instead.
    grouped = q.reshape(rows, length, kv_heads, -1, size).transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, size)
    scores = []
    for k, s in zip(keys, seen, strict=True):
        z = jnp.einsum("bknd,bktd->bknt", grouped, k.swapaxes(1, 2), preferred_element_type=jnp.float32) * size**-0.5
        z = z.reshape(rows, kv_heads, -1, length, k.shape[1])
        scores.append(jnp.where(s[:, None, None, :, :], z, jnp.finfo(jnp.float32).min))
    scores = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(rows, kv_heads, -1, scores.shape[-1])
    pieces = jnp.split(weights, np.cumsum([k.shape[1] for k in keys])[:-1], axis=-1)
    out = sum(jnp.einsum("bknt,bktd->bknd", w, v.swapaxes(1, 2)) for w, v in zip(pieces, values, strict=True))
    return out.reshape(rows, kv_heads, -1, length, size).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def visible(layout: Layout, length: int) -> np.ndarray:
    """Which keys each query may see but for segments, bool [length, length]; slots behind the layout see themselves."""
    out = np.eye(length, dtype=bool)
    for (first, end), earlier in layout:
        out[first:end, first:end] = np.tri(end - first, dtype=bool)
        for a, b in earlier:
            out[first:end, a:b] = True
    return out


def _per_shard(function, mesh):
    """`function` of q, k, v and segments on each device's rows and heads: a kernel is a black box to the compiler."""
    if mesh is None:
        return function
    heads = P(BATCH, None, TENSOR, None)
    return jax.shard_map(
        function, mesh=mesh, in_specs=(heads, heads, heads, P(BATCH, None)), out_specs=heads, check_vma=False
    )


def _splash(q, k, v, segments, layout, mesh):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    length = q.shape[1]
    padded = -(-length // 128) * 128

    def local(q, k, v, segments):
        rows = [jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v)]
        ids = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padded - length)))
        run = _splash_kernel(layout, padded, q.shape[2], platform(mesh) != "tpu")
        out = jax.vmap(run)(rows[0] * q.shape[-1] ** -0.5, rows[1], rows[2], kernel.SegmentIds(ids, ids))
        return out.swapaxes(1, 2)[:, :length].astype(q.dtype)

    return _per_shard(local, mesh)(q, k, v, segments)


@functools.lru_cache(maxsize=32)
def _splash_kernel(layout: Layout, length: int, heads: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    size = next(n for n in (512, 384, 256, 128) if length % n == 0)
    sizes = kernel.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
        block_kv_dkv_compute=size, use_fused_bwd_kernel=True,
    )  # fmt: skip
    one = masks.CausalMask((length, length)) if len(layout) == 1 else masks.NumpyMask(visible(layout, length))
    with jax.ensure_compile_time_eval():
        return kernel.make_splash_mha(
            masks.MultiHeadMask([one] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
            residual_checkpoint_name="attention",
        )


def _cudnn(q, k, v, segments, layout, mesh):
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if segments.dtype == jnp.bool_:
        return _per_shard(functools.partial(by_causal_rows, layout=layout, attend=attend), mesh)(q, k, v, segments)
    allowed = visible(layout, q.shape[1])[None, None]

    def local(q, k, v, segments):
        return attend(q, k, v, mask=(segments[:, None, :, None] == segments[:, None, None, :]) & allowed)

    return _per_shard(local, mesh)(q, k, v, segments)


def by_causal_rows(q, k, v, valid, *, layout: Layout, attend) -> jax.Array:
    """`attention` of rows that hold one example each, by a kernel that masks causally only: the cheapest way on GPUs,
    where a mask is an array of B·S² numbers with a gradient. The tokens of a row move to its front, where nothing is
    seen too much; answers side by side become a row [prompt | answer] each.

    valid: bool [B, S]. attend: of q, k, v and is_causal, as jax.nn.dot_product_attention.
    """
    (first, start), _ = layout[0]
    answers = [slice(*own) for own, _ in layout[1:]]
    if first or any(earlier != ((0, start),) for _, earlier in layout[1:]):
        raise ValueError(f"not a row of answers to one prompt: {layout}")

    def rows(x):  # [B · K, R, ...] of [B, S, ...]
        each = [jnp.concatenate([x[:, :start], x[:, answer]], axis=1) for answer in answers] or [x]
        return jnp.stack(each, axis=1).reshape(-1, *each[0].shape[1:])

    order = jnp.argsort(~rows(valid), axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    out = attend(*(_permuted(rows(x), order, back) for x in (q, k, v)), is_causal=True)
    out = _permuted(out, back, order)
    if answers:
        out = out.reshape(-1, len(answers), *out.shape[1:])
        out = jnp.concatenate([out[:, 0, :start], *(out[:, i, start:] for i in range(len(answers)))], axis=1)
    return out


@jax.custom_vjp
def _permuted(x, order, back):
    """x[b, order[b]]; its gradient is the inverse permutation, where JAX would add up in random order."""
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1, mode="promise_in_bounds")


_permuted.defvjp(
    lambda x, order, back: (_permuted(x, order, back), (order, back)),
    lambda kept, g: (_permuted(g, *reversed(kept)), None, None),
)
