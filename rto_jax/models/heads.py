"""Numbers out of a decoder: the reward model's score of a row, the critic's value before each token.

Parameters are a decoder's without lm_head, and `head`: kernel [D, 1] ("last") or [V, D] ("token"), and bias [1].
The head is computed in float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from rto_jax.errors import UserError
from rto_jax.models.attention import row_layout
from rto_jax.models.llama import LlamaConfig, before_each, language_model, read
from rto_jax.types import Params

HEADS = ("last", "token")


class ScalarModel(NamedTuple):
    """Pure functions of a decoder with a scalar head; they hold its configuration and no array."""

    init: Callable[..., Params]
    """init(key) -> params: the decoder's init, and `with_head`'s."""
    values: Callable[..., jax.Array]
    """values(params, tokens[B, S], valid[B, S], start) -> float32 [B, S - start]: the critic's value of the state
    before each of tokens[:, start:], kernel · h_{t-1} + bias; head "last" only. start is static, 1 <= start < S."""
    scores: Callable[..., jax.Array]
    """scores(params, tokens[B, S], valid[B, S], mask[B, T], branches=1, examples=0) -> float32 [B]: a row's reward; with
    branches=K, [B, K], of K answers to one prompt side by side in the row, as `LanguageModel.logps` has them; of packed
    rows with at most n examples, with examples=n, [B, n] or [B, K, n].
    "last": kernel · h_t + bias at the answer's last valid token t (the EOS of a whole one).
    "token": Σ_t mask_t kernel[a_t] · h_{t-1} + bias, linear in the tokens as a policy's log-likelihood is."""


def _check(head: str):
    if head not in HEADS:
        raise UserError(f"A scalar head is one of {', '.join(HEADS)}, not {head!r}.")


@functools.lru_cache
def scalar_model(config: LlamaConfig, head: str = "last", mesh: Mesh | AbstractMesh | None = None) -> ScalarModel:
    """The functions of a reward model or critic on a decoder of these sizes. Raises UserError on an unknown head.

    mesh: as in `language_model`.
    """
    _check(head)

    def states(params, tokens, valid, span, layout=None):
        trunk = {name: value for name, value in params.items() if name != "head"}
        return read(config, mesh, trunk, tokens, valid, span, layout=layout)[0].astype(jnp.float32)

    def weights(params):
        return params["head"]["kernel"].astype(jnp.float32), params["head"]["bias"].astype(jnp.float32)

    def init(key):
        trunk, top = jax.random.split(key)
        return with_head(language_model(config).init(trunk), config, top, head)

    def values(params, tokens, valid, start):
        if head != "last":
            raise UserError('A critic needs head="last": values of head="token" would know the token they precede.')
        kernel, bias = weights(params)
        return (states(params, tokens, valid, before_each(tokens.shape[1], start)) @ kernel)[:, :, 0] + bias[None, :]

    def scores(params, tokens, valid, mask, branches=1, examples=0):
        kernel, bias = weights(params)
        (rows, length), start = tokens.shape, tokens.shape[1] - mask.shape[1]
        layout = row_layout(length, start, branches)
        whose = valid[:, None, :]  # [B, 1, S]; of packed rows [B, n, S]: of example 1, 2, ...
        whose = whose == jnp.arange(1, examples + 1, dtype=jnp.int32)[None, :, None] if examples else whose
        answers = whose[:, :, start:].reshape(rows, max(examples, 1), branches, -1).swapaxes(1, 2)  # [B, K, n, T / K]
        if head == "token":
            before = states(params, tokens, valid, before_each(length, start, branches), layout)
            chosen = jnp.take(kernel, jnp.where(mask, tokens[:, start:], 0), axis=0)
            each = jnp.where(mask, jnp.sum(before * chosen, axis=-1), 0.0).reshape(rows, branches, 1, -1)
            out = jnp.sum(jnp.where(answers, each, 0.0), axis=-1) + bias[None, None, :]
        else:
            # An answer without tokens is scored at the prompt's last one.
            slots = jnp.arange(length, dtype=jnp.int32)[None, None, :]
            end = jnp.max(jnp.where(whose[:, :, :start], slots[:, :, :start], 0), axis=-1)
            last = jnp.max(jnp.where(answers, slots[:, :, start:].reshape(1, branches, 1, -1), 0), axis=-1)
            last = jnp.maximum(last, end[:, None, :]).reshape(rows, -1, 1)
            after = jnp.take_along_axis(states(params, tokens, valid, slice(None), layout), last, axis=1)
            out = (after @ kernel).reshape(rows, branches, -1) + bias[None, None, :]
        out = out if examples else out[:, :, 0]
        return out[:, 0] if branches == 1 else out

    return ScalarModel(init, values, scores)


def with_head(params: Params, config: LlamaConfig, key: jax.Array, head: str, zero: bool = False) -> Params:
    """The trunk of any model's `params` with a new scalar head: N(0, 1/(D + 1)), that is std 1/√(D+1), or zero; bias 0."""
    _check(head)
    shape = (config.width, 1) if head == "last" else (config.vocab_size, config.width)
    dtype = jnp.dtype(config.param_dtype)
    kernel = jnp.zeros(shape, dtype) if zero else jax.random.normal(key, shape, dtype) * (config.width + 1) ** -0.5
    trunk = {name: value for name, value in params.items() if name not in ("head", "lm_head")}
    return trunk | {"head": {"kernel": kernel, "bias": jnp.zeros((1,), dtype)}}


def fold_affine(params: Params, shift: jax.Array | float, scale: jax.Array | float) -> Params:
    """Parameters whose scores and values are (old - shift) / scale: kernel / scale, bias (bias - shift) / scale."""
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    return params | {"head": {"kernel": kernel / scale, "bias": (bias - shift) / scale}}
