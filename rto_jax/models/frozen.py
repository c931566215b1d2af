"""Weights that no step changes: kept in fewer bits, and with adapters that are trained in their stead.

Adapters are a tree of their own, `{"lora": {"layers": {"attn": {"q": {"a": [L, D, r], "b": [L, r, H, d]}, ...}, ...}}}`:
`base | adapters` is a model, whatever form the base is in, and the base alone is the model before training.
"""

import math

import jax
import jax.numpy as jnp

from rto_jax.errors import UserError
from rto_jax.models.llama import PROJECTIONS, LlamaConfig, language_model
from rto_jax.types import Params

FROZEN = ("float32", "bfloat16", "int8")
_GROUPS = {"attn": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}
_INPUTS = {name: 2 if name == "o" else 1 for name in PROJECTIONS}  # how many of a kernel's dimensions are summed over


def init_adapters(config: LlamaConfig, key: jax.Array) -> Params:
    """{"lora": ...} for the projections in `config.lora.targets`: A ~ N(0, 1/inputs), B = 0, so it changes nothing yet."""
    if not config.lora.rank:
        raise ValueError("LlamaConfig.lora.rank is 0: there are no adapters")
    dtype, rank = jnp.dtype(config.param_dtype), config.lora.rank
    keys = dict(zip(PROJECTIONS, jax.random.split(key, len(PROJECTIONS)), strict=True))

    def adapter(name, leaf):
        count, *shape = leaf["kernel"].shape
        inputs, outputs = shape[: _INPUTS[name]], shape[_INPUTS[name] :]
        a = jax.random.normal(keys[name], (count, *inputs, rank), dtype) * math.prod(inputs) ** -0.5
        return {"a": a, "b": jnp.zeros((count, rank, *outputs), dtype)}

    groups = _each(adapter, jax.eval_shape(language_model(config).init, key)["layers"], config.lora.targets)
    return {"lora": {"layers": {group: found for group, found in groups.items() if found}}}


def rescaled(adapters: Params, ratio: float) -> Params:
    """Adapters that do, at another alpha / rank, `ratio` times this one, what these do at this one."""

    def one(path, x):
        return x / ratio if path[0].key == "lora" and path[-1].key == "b" else x

    return adapters if ratio == 1 else jax.tree_util.tree_map_with_path(one, adapters)


def freeze(params: Params, dtype: str) -> Params:
    """The same model in fewer bits; a scalar head stays as it is, since it decides the unit of every score.

    "bfloat16" rounds; "int8" keeps the blocks' kernels as round(kernel / scale), with one scale = max|kernel| / 127 per
    output and layer, and all else (embedding, norms, unembedding) in bfloat16.
    """
    if dtype not in FROZEN:
        raise UserError(f"--frozen-dtype must be one of {', '.join(FROZEN)}, not {dtype}.")
    if dtype == "float32":
        return params

    def integers(name, leaf):
        axes = tuple(range(1, 1 + _INPUTS[name]))
        largest = jnp.max(jnp.abs(leaf["kernel"]), axis=axes, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest == 0, 1.0, largest) / 127
        return {"kernel": jnp.round(leaf["kernel"] / scale).astype(jnp.int8), "scale": jnp.squeeze(scale, axes)}

    half = {
        name: tree if name == "head" else jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
        for name, tree in params.items()
    }
    return half if dtype == "bfloat16" else half | {"layers": half["layers"] | _each(integers, params["layers"])}


def thaw(params: Params) -> Params:
    """float32 weights with the values that these have."""

    def numbers(name, leaf):
        if "scale" not in leaf:
            return leaf
        scale = leaf["scale"]
        scale = scale.reshape(scale.shape[:1] + (1,) * _INPUTS[name] + scale.shape[1:])
        return {"kernel": leaf["kernel"].astype(jnp.float32) * scale}

    layers = params["layers"] | _each(numbers, params["layers"])
    return jax.tree.map(lambda x: x.astype(jnp.float32), params | {"layers": layers})


def merge(config: LlamaConfig, params: Params) -> Params:
    """float32 weights of `base | adapters`: every kernel is W + alpha/rank · A·B, and nothing of the adapters is left."""
    adapters = params["lora"]["layers"]

    def sums(name, leaf):
        found = {**adapters.get("attn", {}), **adapters.get("mlp", {})}.get(name)
        if found is None:
            return leaf
        a, b = (found[x].astype(jnp.float32) for x in "ab")
        product = jax.lax.dot_general(a, b, (((a.ndim - 1,), (1,)), ((0,), (0,))), precision="highest")
        return {"kernel": leaf["kernel"] + config.lora.scale * product}

    whole = thaw({name: value for name, value in params.items() if name != "lora"})
    return whole | {"layers": whole["layers"] | _each(sums, whole["layers"])}


def _each(function, layers: Params, names=PROJECTIONS) -> Params:
    """{"attn": ..., "mlp": ...}, with function(name, {"kernel": ..., ...}) for each projection."""
    return {
        group: {name: function(name, layers[group][name]) for name in members if name in names}
        for group, members in _GROUPS.items()
    }
