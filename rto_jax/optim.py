"""The optimiser: Adam with warm-up, cosine decay and gradient clipping, as in both papers' code."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from rto_jax.errors import UserError


@dataclass(frozen=True)
class OptimConfig:
    learning_rate: float = 5e-7
    """peak learning rate"""
    warmup: float = 0.03
    """share of the steps that warm up linearly from 0 (RTO: 3 %)"""
    final: float = 0.1
    """learning rate at the end of the cosine, as a share of the peak (RTO: 10 %)"""
    b1: float = 0.9
    """Adam's first moment decay"""
    b2: float = 0.95
    """Adam's second moment decay (RTO: 0.95)"""
    eps: float = 1e-8
    """Adam's epsilon"""
    weight_decay: float = 0.0
    """decoupled weight decay"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm"""
    moments: Literal["float32", "bfloat16"] = "float32"
    """dtype that Adam's two moments are kept in; its arithmetic is float32"""
    gradients: Literal["float32", "bfloat16"] = "float32"
    """dtype of the blocks' gradients between backward pass and optimiser; sums over micro-batches are float32"""
    offload: bool = False
    """keep Adam's moments in the host's memory, and move them to the device for the update only"""

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"learning-rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a share of the steps, in [0, 1), not {self.warmup}.")
        if not self.max_grad_norm > 0:
            raise UserError(f"max-grad-norm must be positive, not {self.max_grad_norm}.")
        # A bfloat16 times b2 must differ from it, or the second moment can only grow: half a step is up to 2^-8 of it.
        if self.moments == "bfloat16" and max(self.b1, self.b2) > 1 - 2**-8:
            raise UserError(f"moments bfloat16 cannot decay by b1 {self.b1} and b2 {self.b2}: both must be at most 0.996.")


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then Adam(W) on a warm-up and cosine schedule over `steps` updates."""
    warmup = int(config.warmup * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final,
    )
    adam = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )
    adam = _kept_in(jnp.dtype(config.moments), adam)
    return _on_host(adam) if config.offload else adam


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _kept_in(dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` computes in float32 whatever the dtypes of gradients and parameters; its state is kept in `dtype`."""

    def update(grads, state, params=None):
        updates, state = inner.update(*_cast((grads, state, params), jnp.float32))
        return updates, _cast(state, dtype)

    return optax.GradientTransformation(lambda params: inner.init(_cast(params, dtype)), update)


def _on_host(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, with the arrays of its state in the host's memory between updates; its counters stay on the device."""

    def move(state, where):
        return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, state)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, move(state, jax.memory.Space.Device), params)
        return updates, move(state, jax.memory.Space.Host)

    return optax.GradientTransformation(lambda params: move(inner.init(params), jax.memory.Space.Host), update)
