"""The optimiser: Adam with warm-up, cosine decay and gradient clipping, as in both papers' code."""

from dataclasses import dataclass

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

    def __post_init__(self):
        if not self.learning_rate > 0:
            raise UserError(f"learning-rate must be positive, not {self.learning_rate}.")
        if not 0 <= self.warmup < 1:
            raise UserError(f"warmup is a share of the steps, in [0, 1), not {self.warmup}.")
        if not self.max_grad_norm > 0:
            raise UserError(f"max-grad-norm must be positive, not {self.max_grad_norm}.")


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
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )
