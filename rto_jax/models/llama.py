"""One Llama-family decoder, applied statelessly: parameters are a plain nested dict, the KV cache an argument and a result.

Letters: B batch, S sequence, C cache slots, L layers, D width, H query heads, K key/value heads, d numbers per head,
F width of the MLP, V vocabulary. Parameters of an LM:

    embed/embedding [V, D]                      norm/scale [D]          lm_head/kernel [D, V]  (absent if tied)
    layers/attn_norm/scale [L, D]               layers/mlp_norm/scale [L, D]
    layers/attn/q/kernel [L, D, H, d]           layers/attn/{k,v}/kernel [L, D, K, d]
    layers/attn/o/kernel [L, H, d, D]           layers/mlp/{gate,up}/kernel [L, D, F]    layers/mlp/down/kernel [L, F, D]

Attention is causal by slot and sees valid keys only; positions count valid tokens. So padding on either side, whatever
ids stand there, changes nothing at the valid tokens; what comes out at padding is finite and means nothing.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rto_jax.errors import UserError
from rto_jax.types import Params

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 scaling of the RoPE frequencies, for contexts longer than the pre-training one."""

    factor: float
    """Wavelengths longer than original_context / low_freq_factor are stretched by this much."""
    low_freq_factor: float = 1.0
    """Turns per original context below which a frequency is scaled in full."""
    high_freq_factor: float = 4.0
    """Turns per original context above which a frequency is left alone; linear in between."""
    original_context: int = 8192
    """Context length of pre-training, tokens."""

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_context > 0):
            raise UserError(f"RopeScaling needs factor >= 1 and 0 < low_freq_factor < high_freq_factor, not {self}.")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama-family decoder."""

    vocab_size: int
    """Rows of the embedding, tokens."""
    width: int
    """Numbers in the residual stream."""
    layers: int
    """Decoder blocks."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads; each serves heads / kv_heads query heads."""
    head_dim: int
    """Numbers per head, even."""
    mlp_width: int
    """Hidden numbers of the SwiGLU MLP."""
    rope_base: float = 10000.0
    """Base of the RoPE wavelengths (`rope_theta`)."""
    rope_scaling: RopeScaling | None = None
    """Llama-3 frequency scaling, if any."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied_embeddings: bool = True
    """Whether the embedding is the unembedding too."""
    output_size: int | None = None
    """Emit logits of the first this many tokens only; needs tied_embeddings=False."""
    dtype: str = "float32"
    """Compute dtype; norms, RoPE, softmax and logits are float32 whatever it is."""
    param_dtype: str = "float32"
    """Dtype of the parameters that init makes."""
    init_std: float = 0.02
    """Standard deviation of every kernel and of the embedding that init draws (`initializer_range`)."""
    remat: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"LlamaConfig.{name} must be at least 1, not {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise UserError(f"LlamaConfig.heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if self.head_dim % 2:
            raise UserError(f"LlamaConfig.head_dim must be even for RoPE, not {self.head_dim}.")
        if min(self.rope_base, self.norm_eps, self.init_std) <= 0:
            found = f"{self.rope_base}, {self.norm_eps}, {self.init_std}"
            raise UserError(f"LlamaConfig needs rope_base, norm_eps and init_std > 0, not {found}.")
        if self.output_size is not None and (self.tied_embeddings or not 1 <= self.output_size <= self.vocab_size):
            raise UserError(
                f"LlamaConfig.output_size ({self.output_size}) must lie in 1..vocab_size ({self.vocab_size}) "
                "and needs tied_embeddings=False."
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in DTYPES:
                raise UserError(f"LlamaConfig.{name} must be one of {', '.join(DTYPES)}, not {getattr(self, name)!r}.")


class Cache(NamedTuple):
    """Keys (after RoPE) and values of what has been read. Every row writes the same slot."""

    k: jax.Array  # compute dtype [L, B, C, K, d]
    v: jax.Array  # compute dtype [L, B, C, K, d]
    valid: jax.Array  # bool [B, C]
    slot: jax.Array  # int32 []: the next slot to write
    position: jax.Array  # int32 [B]: the next token's position


class LanguageModel(NamedTuple):
    """Pure functions of one decoder; they hold its configuration and no array."""

    init: Callable[..., Params]
    """init(key) -> params: kernels and embedding N(0, init_std²), scales 1."""
    logits: Callable[..., jax.Array]
    """logits(params, tokens[B, S], valid[B, S], start) -> float32 [B, S - start, V]: the distributions that
    tokens[:, start:] were drawn from. start is static, 1 <= start < S; the other positions are not unembedded."""
    prefill: Callable[..., tuple[jax.Array, Cache]]
    """prefill(params, tokens[B, P], valid[B, P], cache_length) -> (float32 [B, V], cache): prompts padded on the left;
    the distribution of the next token, and a cache of cache_length >= P slots (static)."""
    decode: Callable[..., tuple[jax.Array, Cache]]
    """decode(params, token[B], cache) -> (float32 [B, V], cache): reads one token more in every row. There is no
    check that a slot is free: decode at most cache_length - P times."""


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair of numbers, float32 [d / 2]: base^(-2i/d), scaled as Llama 3 does if asked."""
    frequency = config.rope_base ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if (scaling := config.rope_scaling) is not None:
        turns = frequency * scaling.original_context / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (keep + (1 - keep) / scaling.factor)
    return frequency.astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE as Hugging Face orders it: number i turns with number i + d/2. x [B, S, n, d], cos and sin [B, S, d / 2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q: jax.Array, keys: list, values: list, seen: list) -> jax.Array:
    """Grouped-query attention over the concatenation of several pieces of keys, without building it.

    Args:
      q: [B, S, H, d]; query head h reads key/value head h // (H / K).
      keys, values: pieces [B, T_i, K, d].
      seen: pieces bool [B, S, T_i], or [B, 1, T_i]: which keys each query may see.

    Returns:
      [B, S, H, d]. A query that may see nothing gets the mean of the values: finite, and never read.
    """
    size = q.shape[-1]
    grouped = q.reshape(*q.shape[:2], keys[0].shape[2], -1, size)
    scores = [
        jnp.where(
            s[:, None, :, None, :],
            jnp.einsum("bskgd,btkd->bksgt", grouped, k, preferred_element_type=jnp.float32) * size**-0.5,
            jnp.finfo(jnp.float32).min,
        )
        for k, s in zip(keys, seen, strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    cuts = np.cumsum([k.shape[1] for k in keys])[:-1]
    pieces = jnp.split(weights, cuts, axis=-1)
    out = sum(jnp.einsum("bksgt,btkd->bskgd", w, v) for w, v in zip(pieces, values, strict=True))
    return out.reshape(q.shape)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale, in float32."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(c.param_dtype))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.norm_eps)
        return (y * scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _linear(config: LlamaConfig, features, name: str, axis=-1) -> nn.Module:
    return nn.DenseGeneral(
        features,
        axis,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=nn.initializers.normal(config.init_std),
        name=name,
    )


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cos, sin, seen, past):
        c = self.config
        q = rotate(_linear(c, (c.heads, c.head_dim), "q")(x), cos, sin)
        k = rotate(_linear(c, (c.kv_heads, c.head_dim), "k")(x), cos, sin)
        v = _linear(c, (c.kv_heads, c.head_dim), "v")(x)
        past_k, past_v = past or ([], [])
        out = attention(q, [*past_k, k], [*past_v, v], seen)
        return _linear(c, c.width, "o", axis=(-2, -1))(out), (k, v)


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return _linear(c, c.width, "down")(
            nn.silu(_linear(c, c.mlp_width, "gate")(x)) * _linear(c, c.mlp_width, "up")(x)
        )


class Block(nn.Module):
    config: LlamaConfig
    keep: bool  # return the new keys and values

    @nn.compact
    def __call__(self, x, cos, sin, seen, past):
        c = self.config
        attended, kv = Attention(c, name="attn")(RMSNorm(c, name="attn_norm")(x), cos, sin, seen, past)
        x = x + attended
        x = x + MLP(c, name="mlp")(RMSNorm(c, name="mlp_norm")(x))
        return x, kv if self.keep else None


class Decoder(nn.Module):
    """Embedding, blocks, norm and, with `unembed`, logits.

    Args:
      tokens, positions: int32 [B, S].
      seen: pieces bool [B, S, T_i] as in `attention`: the cached keys, if any, then the new ones.
      past: None, or ([k], [v]) with k, v [L, B, C, K, d].
      span: the slice of the S positions to return.

    Returns:
      (float32 logits [B, n, V] or hidden states [B, n, D], new (k, v) [L, B, S, K, d] or None).
    """

    config: LlamaConfig
    unembed: bool
    keep: bool = False

    @nn.compact
    def __call__(self, tokens, positions, seen, past, span):
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        embedding = nn.Embed(
            c.vocab_size, c.width, param_dtype=param_dtype, embedding_init=nn.initializers.normal(c.init_std), name="embed"
        ).embedding
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        angles = positions[:, :, None].astype(jnp.float32) * rope_frequencies(c)[None, None, :]
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block  # inside a scan nothing is merged anyway
        shared = nn.broadcast
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(shared, shared, shared, 0),
            length=c.layers,
        )
        x, kv = stack(c, self.keep, name="layers")(x, jnp.cos(angles), jnp.sin(angles), seen, past)
        x = RMSNorm(c, name="norm")(x[:, span])
        if not self.unembed:
            return x, kv
        if c.tied_embeddings:
            return jnp.einsum("bsd,vd->bsv", x, embedding.astype(dtype), preferred_element_type=jnp.float32), kv
        head = nn.Dense(
            c.output_size or c.vocab_size,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
            kernel_init=nn.initializers.normal(c.init_std),
            name="lm_head",
        )
        return head(x), kv


def read(module: Decoder, params: Params, tokens: jax.Array, valid: jax.Array, span: slice):
    """Apply `module` to whole rows without a cache; padding on either side changes nothing."""
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    # Padding may hold any id, one outside the vocabulary too, which would read NaN.
    tokens = jnp.where(valid, tokens, 0)
    return module.apply({"params": params}, tokens, positions, [causal & valid[:, None, :]], None, span)


@functools.lru_cache
def language_model(config: LlamaConfig) -> LanguageModel:
    """The functions of a language model of these sizes: the same objects for equal configs, so nothing compiles twice."""

    def init(key):
        one = jnp.zeros((1, 1), jnp.int32)
        module = Decoder(config, unembed=True)
        return module.init(key, one, one, [one[:, None, :] == 0], None, slice(None))["params"]

    def logits(params, tokens, valid, start):
        if not 1 <= start < tokens.shape[1]:
            raise ValueError(f"start must lie in 1..{tokens.shape[1] - 1}, not {start}")
        return read(Decoder(config, unembed=True), params, tokens, valid, slice(start - 1, -1))[0]

    def prefill(params, tokens, valid, cache_length):
        length = tokens.shape[1]
        if cache_length < length:
            raise ValueError(f"cache_length {cache_length} is shorter than the prompts' {length} slots")
        module = Decoder(config, unembed=True, keep=True)
        out, (k, v) = read(module, params, tokens, valid, slice(-1, None))
        room = [(0, 0), (0, 0), (0, cache_length - length), (0, 0), (0, 0)]
        cache = Cache(
            k=jnp.pad(k, room),
            v=jnp.pad(v, room),
            valid=jnp.pad(valid, room[1:3]),
            slot=jnp.int32(length),
            position=jnp.sum(valid, axis=1, dtype=jnp.int32),
        )
        return out[:, 0], cache

    def decode(params, token, cache):
        # The blocks read the old cache and hand back the new keys only, written here at once for all layers: the
        # cache is never copied.
        seen = [cache.valid[:, None, :], jnp.ones((token.shape[0], 1, 1), bool)]
        out, (k, v) = Decoder(config, unembed=True, keep=True).apply(
            {"params": params}, token[:, None], cache.position[:, None], seen, ([cache.k], [cache.v]), slice(None)
        )
        zero = jnp.int32(0)
        cache = Cache(
            k=jax.lax.dynamic_update_slice(cache.k, k, (zero, zero, cache.slot, zero, zero)),
            v=jax.lax.dynamic_update_slice(cache.v, v, (zero, zero, cache.slot, zero, zero)),
            valid=cache.valid | (jnp.arange(cache.valid.shape[1], dtype=jnp.int32) == cache.slot)[None, :],
            slot=cache.slot + 1,
            position=cache.position + 1,
        )
        return out[:, 0], cache

    return LanguageModel(init, logits, prefill, decode)
