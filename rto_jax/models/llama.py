"""One Llama-family decoder, applied statelessly: parameters are a plain nested dict, the KV cache an argument and a result.

Letters: B batch, S sequence, C cache slots, L layers, D width, H query heads, K key/value heads, d numbers per head,
F width of the MLP, V vocabulary. Parameters of an LM:

    embed/embedding [V, D]                      norm/scale [D]          lm_head/kernel [D, V]  (absent if tied)
    layers/attn_norm/scale [L, D]               layers/mlp_norm/scale [L, D]
    layers/attn/q/kernel [L, D, H, d]           layers/attn/{k,v}/kernel [L, D, K, d]
    layers/attn/o/kernel [L, H, d, D]           layers/mlp/{gate,up}/kernel [L, D, F]    layers/mlp/down/kernel [L, F, D]

Beside a kernel of 8-bit integers lies its `scale`, and beside all these `lora`, where adapters are in use (see `frozen`).

Attention is causal by slot and sees valid keys only; positions count valid tokens. So padding on either side, whatever
ids stand there, changes nothing at the valid tokens; what comes out at padding is finite and means nothing.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from rto_jax import losses
from rto_jax.errors import UserError
from rto_jax.models.attention import BACKENDS, Layout, attend, attention, platform, positions, row_layout
from rto_jax.types import BATCH, TENSOR, Params

DTYPES = ("float32", "bfloat16", "float16")
REMAT = ("none", "full", "attention", "dots", "offload")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank (arXiv 2106.09685): a projection's kernel W acts as W + alpha/rank · A·B, and only A, B train."""

    rank: int = 0
    """columns of A, rows of B; 0: no adapters, all weights are trained"""
    alpha: float = 16.0
    """A·B counts alpha / rank times"""
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = PROJECTIONS
    """the projections that have one, in every block"""

    def __post_init__(self):
        if self.rank < 0 or not self.alpha > 0:
            raise UserError(f"--lora.rank must not be negative and --lora.alpha positive, not {self.rank}, {self.alpha}.")
        if not self.targets or not set(self.targets) <= set(PROJECTIONS):
            raise UserError(f"--lora.targets takes some of {', '.join(PROJECTIONS)}, not {' '.join(self.targets) or 'none'}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


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
    remat: str = "none"
    """What the backward pass computes again instead of keeping it: see `remat_policy`."""
    attention: str = "auto"
    """Back end of attention over whole rows: auto, xla, splash (TPU) or cudnn (NVIDIA GPU, 16-bit dtype)."""
    unroll: int = 1
    """Blocks per turn of the loop over layers: a divisor of layers; more to compile, fewer copies of activations."""
    lora: LoraConfig = LoraConfig()
    """Adapters: how parameters with a `lora` entry are read, and what `init_adapters` makes."""

    def __post_init__(self):
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"LlamaConfig.{name} must be at least 1, not {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise UserError(f"LlamaConfig.heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads}).")
        if self.unroll < 1 or self.layers % self.unroll:
            raise UserError(f"LlamaConfig.unroll ({self.unroll}) must divide layers ({self.layers}).")
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
        if self.attention not in BACKENDS:
            raise UserError(f"LlamaConfig.attention must be one of {', '.join(BACKENDS)}, not {self.attention!r}.")
        if self.remat not in REMAT:
            raise UserError(f"LlamaConfig.remat must be one of {', '.join(REMAT)}, not {self.remat!r}.")
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
    logps: Callable[..., jax.Array]
    """logps(params, tokens[B, S], valid[B, S], start, mask=None, temperature=1.0, branches=1) -> float32 [B, S - start]:
    log-probabilities of tokens[:, start:], in nats, 0 where mask is False; the logits are never whole. With branches=K
    the slots behind start are K answers of equal length to one prompt, which don't see each other."""
    statistics: Callable[..., losses.LinearStatistics]
    """statistics(params, reference, ...) and the arguments of logps -> float32 [B, S - start] each: log-probabilities
    under both models, entropy, and KL(reference ‖ params); no gradient flows to the reference, in whatever form it is."""
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


def turns(config: LlamaConfig, positions: jax.Array, length: int, mesh) -> tuple[jax.Array, jax.Array]:
    """cos and sin of RoPE's angles, float32 [B, S, d / 2] each, for positions below `length`."""
    frequencies = rope_frequencies(config)
    if platform(mesh) == "cpu":  # looked up: its compiler would compute them again in every block, for every head
        table = np.arange(length, dtype=np.float32)[:, None] * frequencies
        return tuple(jnp.take(jnp.asarray(f(table)), positions, axis=0, mode="clip") for f in (np.cos, np.sin))
    angles = positions[:, :, None].astype(jnp.float32) * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE as Hugging Face orders it: number i turns with number i + d/2. x [B, S, n, d], cos and sin [B, S, d / 2]."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def product(x: jax.Array, kernel: jax.Array, inputs: int, first: bool, mesh: Mesh, rings: tuple[int, ...]) -> jax.Array:
    """x [B, S, *in] · kernel [*in, *out] over `inputs` dimensions, with a kernel's gradient that stays split over `fsdp`.

    Left to the compiler, TPUs sum it as a whole on all devices and then cut it; a sum in as many steps as the devices
    form `rings` (outermost first) is one of the parts from the beginning: half the bytes. `first`: whether the kernel is
    split along its first dimension, or its last. Rows are split over `data` and `fsdp`.
    """
    axes = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))
    return jax.lax.dot_general(x, kernel, (axes, ((), ())))


def _product_forward(x, kernel, inputs, first, mesh, rings):
    return product(x, kernel, inputs, first, mesh, rings), (x, kernel)


def _product_backward(inputs, first, mesh, rings, kept, g):
    x, kernel = kept
    outputs = tuple(range(inputs, kernel.ndim))
    into_x = jax.lax.dot_general(g, kernel, ((tuple(range(g.ndim - len(outputs), g.ndim)), outputs), ((), ())))
    names = tuple(f"fsdp{n}" for n in range(len(rings)))
    data, axes = mesh.devices.shape[0], (BATCH[0], *names)
    split = Mesh(mesh.devices.reshape(data, *rings), axes, axis_types=(AxisType.Auto,) * len(axes))

    def local(x, g):
        rows = tuple(range(x.ndim - inputs))
        part = jax.lax.dot_general(*((x, g) if first else (g, x)), ((rows, rows), ((), ())))
        for name in names:
            part = jax.lax.psum_scatter(part, name, scatter_dimension=0, tiled=True)  # of another one it would be a sum
        return jax.lax.psum(part, BATCH[0]) if data > 1 else part

    part = jax.shard_map(local, mesh=split, in_specs=(P(axes), P(axes)), out_specs=P(names), check_vma=False)(x, g)
    return into_x, part if first else jnp.moveaxis(part, 0, -1)


product.defvjp(_product_forward, _product_backward)


def rings(mesh: Mesh | AbstractMesh | None) -> tuple[int, ...]:
    """The `fsdp` axis of a TPU's mesh as steps along one dimension of its torus each, outermost first; () elsewhere.

    Also () where `tensor` is in use, over which a kernel's gradient would be gathered first.
    """
    if not isinstance(mesh, Mesh) or platform(mesh) != "tpu" or mesh.shape[TENSOR] > 1:
        return ()
    return lines([(*d.coords, d.core_on_chip) for d in mesh.devices[0, :, 0]])


def lines(where: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Devices at these coordinates as an array of sizes (outermost first) along each of whose axes one coordinate changes."""

    def line(size):  # whether each `size` neighbours differ in one coordinate at most
        groups = (where[at : at + size] for at in range(0, len(where), size))
        return all(sum(len(set(values)) > 1 for values in zip(*group, strict=True)) <= 1 for group in groups)

    found: tuple[int, ...] = ()
    while len(where) > 1:
        size = next(n for n in range(len(where), 0, -1) if len(where) % n == 0 and line(n))
        if size == 1:
            return ()
        found, where = (size, *found), where[::size]
    return found


class Linear(nn.Module):
    """x · kernel over x's last `inputs` dimensions; the kernel may be int8 with a scale per output, or have an adapter."""

    config: LlamaConfig
    features: tuple[int, ...]
    mesh: Mesh | AbstractMesh | None
    inputs: int = 1
    first: bool = True  # whether the mesh splits the kernel's first dimension over `fsdp`, or its last

    @nn.compact
    def __call__(self, x):
        c, dtype, rows = self.config, jnp.dtype(self.config.dtype), x.shape[: -self.inputs]
        shape = (*x.shape[-self.inputs :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(c.init_std), shape, jnp.dtype(c.param_dtype))

        def times(x, weights, contracted, out=None):
            if platform(self.mesh) == "cpu":  # of two dimensions, or its gradient transposes a copy of the activations
                y = jnp.matmul(
                    x.reshape(-1, math.prod(weights.shape[:contracted])),
                    weights.astype(dtype).reshape(math.prod(weights.shape[:contracted]), -1),
                    preferred_element_type=out,
                )
                return y.reshape(*x.shape[: x.ndim - contracted], *weights.shape[contracted:])
            axes = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
            return jax.lax.dot_general(x, weights.astype(dtype), (axes, ((), ())), preferred_element_type=out)

        if kernel.dtype == jnp.int8:  # exact in bfloat16; scaled before it is rounded
            scale = self.get_variable("params", "scale").astype(jnp.float32).reshape((1,) * len(rows) + self.features)
            y = (times(x, kernel, self.inputs, jnp.float32) * scale).astype(dtype)
        elif (steps := rings(self.mesh)) and x.shape[1] > 1:
            y = product(x, kernel.astype(dtype), self.inputs, self.first, self.mesh, steps)
            y = checkpoint_name(y, "product")  # policies of remat don't see into it
        else:
            y = times(x, kernel, self.inputs)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name) for name in "ab")
            y = y + c.lora.scale * times(times(x, a, self.inputs), b, 1)
        return y


def remat_policy(name: str):
    """What a block keeps for the backward pass, from most memory to least; besides, its input is always kept.

    none: everything; dots: the products with weights, and as attention; attention: what attention puts out (and, of the
    splash kernel, the softmax's normaliser), so that it is not computed again; full: nothing; offload: as attention, but
    both it and the input of the block lie in the host's memory until they are needed.
    """
    policies = jax.checkpoint_policies
    if name == "dots":
        named = policies.save_only_these_names("product", "attention")
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, named)
    if name == "attention":
        return policies.save_only_these_names("attention")
    if name == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=["input", "attention"],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return None


class Attention(nn.Module):
    config: LlamaConfig
    layout: Layout
    mesh: Mesh | AbstractMesh | None

    @nn.compact
    def __call__(self, x, cos, sin, segments, past):
        c = self.config
        q = rotate(Linear(c, (c.heads, c.head_dim), self.mesh, name="q")(x), cos, sin)
        k = rotate(Linear(c, (c.kv_heads, c.head_dim), self.mesh, name="k")(x), cos, sin)
        v = Linear(c, (c.kv_heads, c.head_dim), self.mesh, name="v")(x)
        if past is None:
            out = attention(q, k, v, segments, self.layout, backend=c.attention, mesh=self.mesh)
        else:
            seen = [(segments > 0)[:, None, :], jnp.ones((x.shape[0], 1, 1), bool)]  # segments are the cache's
            out = attend(q, [past[0], k], [past[1], v], seen)
        return Linear(c, (c.width,), self.mesh, inputs=2, first=False, name="o")(out), (k, v)


@jax.custom_vjp
def _cotangent_alone(x):
    return x


_cotangent_alone.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def alone(x, mesh: Mesh | AbstractMesh | None, *, cotangent: bool = False):
    """x, and its cotangent or that only, computed by themselves: a TPU's compiler would do it inside of every product."""
    if platform(mesh) != "tpu":
        return x
    return _cotangent_alone(x) if cotangent else jax.lax.optimization_barrier(x)


class MLP(nn.Module):
    config: LlamaConfig
    mesh: Mesh | AbstractMesh | None

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate, up = (Linear(c, (c.mlp_width,), self.mesh, name=name)(x) for name in ("gate", "up"))
        gate, up = alone((gate, up), self.mesh, cotangent=True)
        return Linear(c, (c.width,), self.mesh, first=False, name="down")(alone(nn.silu(gate) * up, self.mesh))


class Block(nn.Module):
    config: LlamaConfig
    layout: Layout
    mesh: Mesh | AbstractMesh | None
    keep: bool  # return the new keys and values

    @nn.compact
    def __call__(self, x, cos, sin, segments, past):
        c = self.config
        x = checkpoint_name(x, "input")
        read = Attention(c, self.layout, self.mesh, name="attn")
        attended, kv = read(alone(RMSNorm(c, name="attn_norm")(x), self.mesh), cos, sin, segments, past)
        x = x + attended
        x = x + MLP(c, self.mesh, name="mlp")(alone(RMSNorm(c, name="mlp_norm")(x), self.mesh))
        return x, kv if self.keep else None


class Decoder(nn.Module):
    """Embedding, blocks, norm and, with `unembed`, logits.

    Args:
      tokens, positions: int32 [B, S].
      segments: as in `attention`; with a cache, [B, C], above 0 where a slot of it is real.
      past: None, or (k, v) of the cache, [L, B, C, K, d]; then S is 1.
      span: the positions of S to return, a slice or a list.

    Returns:
      (float32 logits [B, n, V] or hidden states [B, n, D], new (k, v) [L, B, S, K, d] or None).
    """

    config: LlamaConfig
    layout: Layout
    mesh: Mesh | AbstractMesh | None
    unembed: bool
    keep: bool = False

    @nn.compact
    def __call__(self, tokens, positions, segments, past, span):
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        embedding = nn.Embed(
            c.vocab_size, c.width, param_dtype=param_dtype, embedding_init=nn.initializers.normal(c.init_std), name="embed"
        ).embedding
        x = jnp.take(embedding, tokens, axis=0).astype(dtype)
        cos, sin = turns(c, positions, segments.shape[1], self.mesh)
        block = Block
        if c.remat != "none":  # prevent_cse: inside a scan nothing is merged anyway
            block = nn.remat(Block, prevent_cse=False, policy=remat_policy(c.remat))
        shared = nn.broadcast
        stack = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=(shared, shared, shared, 0),
            length=c.layers,
            unroll=c.unroll,
        )
        blocks = stack(c, self.layout, self.mesh, self.keep, name="layers")
        x, kv = blocks(x, cos, sin, segments, past)
        x = RMSNorm(c, name="norm")(x[:, span if isinstance(span, slice) else np.asarray(span)])
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


def _collections(config: LlamaConfig, params: Params) -> dict[str, Params]:
    """Flax's: the weights, and the adapters."""
    weights = {name: value for name, value in params.items() if name != "lora"}
    if "lora" not in params:
        return {"params": weights}
    if not config.lora.rank:
        raise ValueError("the parameters hold adapters (lora), but LlamaConfig.lora.rank is 0")
    return {"params": weights, "lora": params["lora"]}


def read(config: LlamaConfig, mesh, params: Params, tokens: jax.Array, valid: jax.Array, span, *,
         layout: Layout | None = None, unembed: bool = False, keep: bool = False):  # fmt: skip
    """Apply the decoder to whole rows without a cache; padding on either side changes nothing.

    valid: bool [B, S], or int32 with the numbers of several examples in one row, 0 for padding.
    """
    layout = layout or row_layout(tokens.shape[1])
    segments = valid if valid.dtype == jnp.bool_ else valid.astype(jnp.int32)
    # Padding may hold any id, one outside the vocabulary too, which would read NaN.
    tokens = jnp.where(segments > 0, tokens, 0)
    module = Decoder(config, layout, mesh, unembed, keep)
    return module.apply(_collections(config, params), tokens, positions(segments, layout), segments, None, span)


def before_each(length: int, start: int, branches: int = 1) -> slice | list[int]:
    """The slots whose states precede tokens[:, start:]: one to the left, and the prompt's last one for every answer."""
    if not 1 <= start < length:
        raise ValueError(f"start must lie in 1..{length - 1}, not {start}")
    if branches == 1:
        return slice(start - 1, -1)
    size = (length - start) // branches
    return [start - 1 if (slot - start) % size == 0 else slot - 1 for slot in range(start, length)]


def unembedding(config: LlamaConfig, params: Params) -> jax.Array:
    """[V, D], as `losses.linear_token_logps` takes it."""
    return params["embed"]["embedding"] if config.tied_embeddings else params["lm_head"]["kernel"].T


@functools.lru_cache
def language_model(config: LlamaConfig, mesh: Mesh | AbstractMesh | None = None) -> LanguageModel:
    """The functions of a language model of these sizes: the same objects for equal arguments, so nothing compiles twice.

    mesh: what they will run on, for the parts that XLA does not split by itself: kernels, and the vocabulary's chunks.
    """
    shards = mesh.shape[TENSOR] if mesh else 1

    def init(key):
        one = jnp.zeros((1, 1), jnp.int32)
        return Decoder(config, row_layout(1), None, unembed=True).init(key, one, one, one, None, slice(None))["params"]

    def logits(params, tokens, valid, start):
        return read(config, mesh, params, tokens, valid, before_each(tokens.shape[1], start), unembed=True)[0]

    def before_unembedding(params, tokens, valid, start, branches):
        length = tokens.shape[1]
        layout, span = row_layout(length, start, branches), before_each(length, start, branches)
        states, _ = read(config, mesh, params, tokens, valid, span, layout=layout)
        return states, unembedding(config, params)

    def logps(params, tokens, valid, start, mask=None, temperature=1.0, branches=1):
        model = before_unembedding(params, tokens, valid, start, branches)
        return losses.linear_token_logps(*model, tokens[:, start:], mask, temperature=temperature, shards=shards)

    def statistics(params, reference, tokens, valid, start, mask=None, temperature=1.0, branches=1):
        models = [
            before_unembedding(x, tokens, valid, start, branches) for x in (params, jax.lax.stop_gradient(reference))
        ]
        return losses.linear_statistics(
            *models[0], *models[1], tokens[:, start:], mask, temperature=temperature, shards=shards
        )

    def prefill(params, tokens, valid, cache_length):
        length = tokens.shape[1]
        if cache_length < length:
            raise ValueError(f"cache_length {cache_length} is shorter than the prompts' {length} slots")
        out, (k, v) = read(config, mesh, params, tokens, valid, slice(-1, None), unembed=True, keep=True)
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
        segments = cache.valid.astype(jnp.int32)
        out, (k, v) = Decoder(config, row_layout(1), mesh, unembed=True, keep=True).apply(
            _collections(config, params), token[:, None], cache.position[:, None], segments, (cache.k, cache.v), slice(None)
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

    return LanguageModel(init, logits, logps, statistics, prefill, decode)
