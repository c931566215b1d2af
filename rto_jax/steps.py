"""Pure train steps (state, batch) -> (state, metrics); the caller jits, donates and shards them.

A step is `make_step` around one of the objectives below. An objective maps (params, batch) to
{name: (sum, count)} with the loss under "loss": sums and counts add over micro-batches and devices exactly,
so the gradient of one batch does not depend on how it is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rto_jax import losses
from rto_jax.errors import UserError
from rto_jax.scoring import pair_logps, response_logps, stack_pairs
from rto_jax.train_state import TrainState, apply_gradients
from rto_jax.types import Experience, Metrics, Pairs, Params, Sequences, prompt_length

Sums = dict[str, tuple[jax.Array, jax.Array]]
Objective = Callable[[Params, object], Sums]


class PairsWithReference(NamedTuple):
    """What DPO trains on: pairs, and the frozen reference's log-probabilities of the answers, [B]."""

    pairs: Pairs
    ref_chosen: jax.Array
    ref_rejected: jax.Array


class ActorCritic(NamedTuple):
    policy: TrainState
    critic: TrainState


@dataclass(frozen=True)
class PpoConfig:
    gamma: float = 1.0
    """discount per token"""
    lam: float = 0.95
    """GAE's lambda"""
    clip: float = 0.2
    """the ratio is clipped to 1 ± this"""
    value_clip: float = 0.2
    """a value may move this far from its rollout's before its loss is clipped"""
    epochs: int = 1
    """passes over each rollout buffer"""
    minibatches: int = 4
    """updates per pass"""

    def __post_init__(self):
        for name in ("clip", "value_clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"--ppo.{name.replace('_', '-')} must be positive, not {getattr(self, name)}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--ppo.{name} must be in [0, 1], not {getattr(self, name)}.")
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"--ppo.{name} must be at least 1, not {getattr(self, name)}.")


def _mean(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(x.astype(jnp.float32)), jnp.float32(x.size)


def _token_mean(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    return losses.masked_sum(x, mask), jnp.sum(mask, dtype=jnp.float32)


def sft_objective(logits_fn) -> Objective:
    """-mean over response tokens of log pi(y_t | s_t)."""

    def objective(params: Params, batch: Sequences) -> Sums:
        return {"loss": _token_mean(-response_logps(logits_fn, params, batch), batch.mask)}

    return objective


def reward_objective(scores_fn, *, margin: float = 0.0) -> Objective:
    """Bradley–Terry (RTO eq. 2.2) on the two answers' scores."""

    def objective(params: Params, pairs: Pairs) -> Sums:
        both = stack_pairs(pairs)
        chosen, rejected = jnp.split(scores_fn(params, both.tokens, both.valid, both.mask), 2)
        return {
            "loss": _mean(losses.bradley_terry_loss(chosen, rejected, margin=margin)),
            "accuracy": _mean(chosen > rejected),
            "margin": _mean(chosen - rejected),
        }

    return objective


def dpo_objective(logits_fn, *, beta: float, label_smoothing: float = 0.0) -> Objective:
    """DPO; the metrics are its implicit rewards beta·log(pi/pi_ref), in nats times beta."""

    def objective(params: Params, batch: PairsWithReference) -> Sums:
        chosen, rejected = pair_logps(logits_fn, params, batch.pairs)
        loss = losses.dpo_loss(
            chosen, rejected, batch.ref_chosen, batch.ref_rejected, beta=beta, label_smoothing=label_smoothing
        )
        reward_chosen, reward_rejected = beta * (chosen - batch.ref_chosen), beta * (rejected - batch.ref_rejected)
        return {
            "loss": _mean(loss),
            "accuracy": _mean(reward_chosen > reward_rejected),
            "chosen_reward": _mean(reward_chosen),
            "rejected_reward": _mean(reward_rejected),
            "margin": _mean(reward_chosen - reward_rejected),
        }

    return objective


def policy_objective(logits_fn, *, clip: float, temperature: float = 1.0) -> Objective:
    """PPO's clipped objective; mean over the tokens of the batch."""

    def objective(params: Params, batch: Experience) -> Sums:
        mask = batch.sequences.mask
        logps = response_logps(logits_fn, params, batch.sequences, temperature=temperature)
        log_ratio = jnp.where(mask, logps - batch.logps, 0.0)
        return {
            "loss": _token_mean(losses.ppo_policy_loss(logps, batch.logps, batch.advantages, clip=clip), mask),
            "clip_fraction": _token_mean(jnp.abs(jnp.exp(log_ratio) - 1) > clip, mask),
            "update_kl": _token_mean(jnp.expm1(log_ratio) - log_ratio, mask),  # k3 of (old, new), nats per token
        }

    return objective


def value_objective(values_fn, *, clip: float) -> Objective:
    """PPO's clipped value loss; mean over the tokens of the batch."""

    def objective(params: Params, batch: Experience) -> Sums:
        seqs = batch.sequences
        values = values_fn(params, seqs.tokens, seqs.valid, prompt_length(seqs))
        return {"loss": _token_mean(losses.ppo_value_loss(values, batch.values, batch.returns, clip=clip), seqs.mask)}

    return objective


def _split(batch, parts: int):
    """[B, ...] -> [parts, B/parts, ...], strided, so that each part stays spread over the devices as the batch is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def value_and_grads(objective: Objective, params: Params, batch, *, micro_batches: int = 1) -> tuple[Metrics, Params]:
    """Means of the objective's entries, and the gradient of its mean loss, over the whole batch.

    With micro-batches the gradient of the *sum* is accumulated in float32 and divided by the total count once:
    equal to one big batch whatever the split of tokens over the parts.
    """

    def total(params, part):
        sums = objective(params, part)
        return sums["loss"][0], sums

    grad = jax.grad(total, has_aux=True)
    if micro_batches == 1:
        grads, sums = grad(params, batch)
    else:
        parts = _split(batch, micro_batches)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
        carry, _ = jax.lax.scan(lambda carry, part: (jax.tree.map(jnp.add, carry, grad(params, part)), None), zeros, parts)
        grads, sums = carry
    count = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, params)
    return {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()}, grads


def make_step(objective: Objective, optimizer: optax.GradientTransformation, *, micro_batches: int = 1):
    """The pure step of one objective: TrainState, batch -> TrainState, metrics (float32 scalars, with grad_norm)."""

    def step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        metrics, grads = value_and_grads(objective, state.params, batch, micro_batches=micro_batches)
        return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": optax.tree.norm(grads)}

    return step


def make_ppo_step(policy_step, critic_step):
    """The pure PPO step on one mini-batch: ActorCritic, Experience -> ActorCritic, metrics."""

    def step(state: ActorCritic, batch: Experience) -> tuple[ActorCritic, Metrics]:
        policy, policy_metrics = policy_step(state.policy, batch)
        critic, critic_metrics = critic_step(state.critic, batch)
        metrics = {f"policy_{name}": x for name, x in policy_metrics.items()}
        metrics |= {f"value_{name}": x for name, x in critic_metrics.items()}
        return ActorCritic(policy, critic), metrics

    return step


def make_ppo_update(ppo_step, *, epochs: int, minibatches: int):
    """All updates on one rollout buffer, reshuffled every epoch: ActorCritic, Experience, key -> ActorCritic, metrics.

    The metrics are means over the updates; `first_update_kl` is the first update's, 0 up to rounding:
    anything else says that rollout and training disagree about log-probabilities.
    """

    def update(state: ActorCritic, buffer: Experience, key: jax.Array) -> tuple[ActorCritic, Metrics]:
        rows = buffer.logps.shape[0]
        order = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))
        order = order.reshape(epochs * minibatches, rows // minibatches)

        def one(state, rows):
            return ppo_step(state, jax.tree.map(lambda x: x[rows], buffer))

        state, metrics = jax.lax.scan(one, state, order)
        means = {name: jnp.mean(x) for name, x in metrics.items()}
        return state, means | {"first_update_kl": metrics["policy_update_kl"][0]}

    return update
