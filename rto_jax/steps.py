"""Pure train steps (state, batch) -> (state, metrics); the caller jits, donates and shards them.

A step is `make_step` around one of the objectives below. An objective maps (params, batch) to
{name: (sum, count)} with the loss under "loss": sums and counts add over micro-batches and devices exactly,
so the gradient of one batch does not depend on how it is cut.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rto_jax import losses
from rto_jax.errors import UserError
from rto_jax.scoring import chosen_first, pair_lengths, pair_logps, pair_statistics, response_logps, side_by_side
from rto_jax.train_state import TrainState, apply_gradients, over
from rto_jax.types import Experience, Metrics, PackedPairs, Pairs, Params, Sequences, prompt_length

Sums = dict[str, tuple[jax.Array, jax.Array]]
Objective = Callable[[Params, object], Sums]


class PairsWithReference(NamedTuple):
    """What DPO trains on: pairs, and the frozen reference's log-probabilities of the answers, [B]; packed, [B, n]."""

    pairs: Pairs | PackedPairs
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


def _mean(x: jax.Array, pairs: Pairs | PackedPairs) -> tuple[jax.Array, jax.Array]:
    """Over the pairs; of packed rows, over the places that hold one."""
    if isinstance(pairs, PackedPairs):
        return losses.token_mean(x, pairs.chosen >= 0)
    return jnp.sum(x.astype(jnp.float32)), jnp.float32(x.size)


def sft_objective(logps_fn) -> Objective:
    """-mean over response tokens of log pi(y_t | s_t)."""

    def objective(params: Params, batch: Sequences) -> Sums:
        return {"loss": losses.token_mean(-response_logps(logps_fn, params, batch), batch.mask)}

    return objective


def reward_objective(scores_fn, *, margin: float = 0.0) -> Objective:
    """Bradley–Terry (RTO eq. 2.2) on the two answers' scores."""

    def objective(params: Params, pairs: Pairs | PackedPairs) -> Sums:
        if isinstance(pairs, PackedPairs):
            rows = pairs.rows
            both = scores_fn(params, rows.tokens, rows.valid, rows.mask, 2, pairs.chosen.shape[1])
            chosen, rejected = chosen_first(both, pairs)
        else:
            rows = side_by_side(pairs)
            chosen, rejected = scores_fn(params, rows.tokens, rows.valid, rows.mask, 2).T
        return {
            "loss": _mean(losses.bradley_terry_loss(chosen, rejected, margin=margin), pairs),
            "accuracy": _mean(chosen > rejected, pairs),
            "margin": _mean(chosen - rejected, pairs),
        }

    return objective


class PairLoss(NamedTuple):
    """A loss of the log-probabilities of chosen and rejected answers."""

    function: Callable[..., jax.Array]
    reads: tuple[str, ...] = ("reference",)
    """what it is given besides, two arrays each: "reference", the log-probabilities that the batch holds; "lengths";
    "kl", the reference's log-probabilities and its sequential KL, for which its weights are needed"""
    takes: tuple[str, ...] = ()
    """its numbers besides beta"""
    per_token: bool = False
    """whether the reward that it ranks answers by is a mean over their tokens"""

    @property
    def has_reference(self) -> bool:
        return "reference" in self.reads or "kl" in self.reads


def _orpo(*sums, beta):
    return losses.orpo_loss(*sums, lam=beta)


def _cpo(chosen, rejected, chosen_lengths, _, *, beta, label_smoothing, alpha):
    return losses.cpo_loss(
        chosen, rejected, chosen_lengths, beta=beta, label_smoothing=label_smoothing, nll_weight=alpha
    )


PAIR_LOSSES = {
    "dpo": PairLoss(losses.dpo_loss, takes=("label_smoothing",)),
    "ipo": PairLoss(losses.ipo_loss),
    "hinge": PairLoss(losses.hinge_loss),
    "kto": PairLoss(losses.kto_pair_loss),  # its reference points are means over the batch: no parts, no packed rows
    "r_dpo": PairLoss(losses.r_dpo_loss, ("reference", "lengths"), ("alpha",)),
    "tdpo1": PairLoss(functools.partial(losses.tdpo_loss, variant=1), ("kl",)),
    "tdpo2": PairLoss(losses.tdpo_loss, ("kl",), ("alpha",)),
    "simpo": PairLoss(losses.simpo_loss, ("lengths",), ("gamma",), per_token=True),
    "orpo": PairLoss(_orpo, ("lengths",), per_token=True),
    "cpo": PairLoss(_cpo, ("lengths",), ("label_smoothing", "alpha")),
}


def dpo_objective(model_fn, *, beta: float, loss: str = "dpo", **numbers: float) -> Objective:
    """DPO or another of `PAIR_LOSSES`; the metrics are implicit rewards beta·log(pi/pi_ref), in nats times beta.

    A loss without a reference has beta·log pi instead, of the mean token if it takes means; its batches are Pairs.
    model_fn: a language model's `logps` or, for a loss that reads "kl", its `statistics`. That one takes its reference
    from the parameters: the base of adapters, or what lies under "reference" beside the model's weights; its batches are
    Pairs too.
    """
    function, reads, *_ = PAIR_LOSSES[loss]

    def objective(params: Params, batch: PairsWithReference | Pairs | PackedPairs) -> Sums:
        pairs, *reference = batch if isinstance(batch, PairsWithReference) else (batch,)
        if "kl" in reads:
            found = pair_statistics(model_fn, *_and_reference(params), pairs)
            own, reference, more = found.logps, found.ref_logps, found.kl
        else:
            own, more = pair_logps(model_fn, params, pairs), pair_lengths(pairs) if "lengths" in reads else ()
        each = {"loss": function(*own, *reference, *more, beta=beta, **numbers)}
        if not reference:
            own = own_rewards(loss, own, pairs)
            reference = [jnp.zeros_like(x) for x in own]
        each |= losses.preference_metrics(*own, *reference, beta=beta)
        return {name: _mean(x, pairs) for name, x in each.items()}

    return objective


def own_rewards(loss: str, logps: tuple[jax.Array, jax.Array], pairs: Pairs | PackedPairs) -> list[jax.Array]:
    """What a loss without a reference ranks the two answers by, before beta: log pi, of the mean token if it takes means."""
    if not PAIR_LOSSES[loss].per_token:
        return list(logps)
    return [x / jnp.maximum(n, 1) for x, n in zip(logps, pair_lengths(pairs), strict=True)]


def _and_reference(params: Params) -> tuple[Params, Params]:
    """The model and its reference, of parameters that hold both."""
    if "reference" not in params and "lora" not in params:
        raise ValueError('there is no reference: train adapters over it, or pass {"reference": its weights} as the base')
    model = {name: tree for name, tree in params.items() if name != "reference"}
    return model, params.get("reference", {name: tree for name, tree in model.items() if name != "lora"})


def policy_objective(logps_fn, *, clip: float, temperature: float = 1.0) -> Objective:
    """PPO's clipped objective; mean over the tokens of the batch."""

    def objective(params: Params, batch: Experience) -> Sums:
        mask = batch.sequences.mask
        logps = response_logps(logps_fn, params, batch.sequences, temperature=temperature)
        log_ratio = jnp.where(mask, logps - batch.logps, 0.0)
        return {
            "loss": losses.token_mean(losses.ppo_policy_loss(logps, batch.logps, batch.advantages, clip=clip), mask),
            "clip_fraction": losses.token_mean(jnp.abs(jnp.exp(log_ratio) - 1) > clip, mask),
            "update_kl": losses.token_mean(jnp.expm1(log_ratio) - log_ratio, mask),  # k3 of (old, new), nats per token
        }

    return objective


def value_objective(values_fn, *, clip: float) -> Objective:
    """PPO's clipped value loss; mean over the tokens of the batch."""

    def objective(params: Params, batch: Experience) -> Sums:
        seqs = batch.sequences
        values = values_fn(params, seqs.tokens, seqs.valid, prompt_length(seqs))
        return {
            "loss": losses.token_mean(losses.ppo_value_loss(values, batch.values, batch.returns, clip=clip), seqs.mask)
        }

    return objective


def _split(batch, parts: int):
    """[B, ...] -> [parts, B/parts, ...], strided, so that each part stays spread over the devices as the batch is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


class Parts(NamedTuple):
    """Micro-batches [M, rows, ...], of which the first `used` hold anything: the others cost nothing."""

    batch: Experience
    used: jax.Array  # int32 []


def repack(batch: Experience, shape: tuple[int, int], rows: int) -> Parts:
    """The rows of a mini-batch in fewer rows, of shape[0] slots of prompts and shape[1] of answers, as data.packing has them.

    The longest first, each into the first row with room. `rows` packed rows make a micro-batch; their number is an array,
    so one program serves however long the answers are.
    """
    seqs, start = batch.sequences, prompt_length(batch.sequences)
    (count, length), (prompts, answers) = seqs.tokens.shape, shape
    if prompts < start - 1 or answers < length - start + 1:
        raise ValueError(f"a packed row of {prompts}+{answers} slots is too short for {start}+{length - start} tokens")
    parts = -(-count // rows)
    real = jnp.stack([jnp.sum(x, axis=1, dtype=jnp.int32) for x in (seqs.valid[:, :start], seqs.valid[:, start:])], axis=1)
    need = real + jnp.array([[-1, 1]], jnp.int32)  # the prompt's last token stands before the answer
    room = jnp.array([shape], jnp.int32)
    order = jnp.argsort(-jnp.sum(need / room, axis=1))

    def place(state, one):
        taken, members = state
        row = jnp.argmax(jnp.all(taken + need[one][None, :] <= room, axis=1))
        found = row, taken[row], members[row] + 1
        return (taken.at[row].add(need[one]), members.at[row].add(1)), found

    empty = jnp.zeros((parts * rows, 2), jnp.int32), jnp.zeros(parts * rows, jnp.int32)
    (_, members), found = jax.lax.scan(place, empty, order)
    row, offset, number = (jnp.zeros_like(x).at[order].set(x) for x in found)

    slot = jnp.arange(length, dtype=jnp.int32)[None, :]
    in_prompt = offset[:, :1] + slot - (start - real[:, :1])
    in_answer = offset[:, 1:] + slot - (start - 1)

    def moved(x, to, valid, width):
        to = jnp.where(valid, row[:, None] * width + to, parts * rows * width)
        return jnp.zeros(parts * rows * width, x.dtype).at[to].set(x, mode="drop").reshape(parts, rows, width)

    def whole(x):
        return moved(x, jnp.where(slot < start - 1, in_prompt, prompts + in_answer), seqs.valid, prompts + answers)

    def after_prompt(x):
        return moved(x, in_answer[:, start:], seqs.valid[:, start:], answers)

    numbers = jnp.broadcast_to(number[:, None], seqs.tokens.shape)
    packed = Sequences(whole(seqs.tokens), whole(numbers), after_prompt(seqs.mask))
    used = (jnp.sum(members > 0, dtype=jnp.int32) + rows - 1) // rows
    return Parts(Experience(packed, *(after_prompt(x) for x in batch[1:])), used)


def value_and_grads(objective: Objective, params: Params, batch, *, micro_batches: int = 1) -> tuple[Metrics, Params]:
    """Means of the objective's entries, and the gradient of its mean loss, over the whole batch.

    With micro-batches the gradient of the *sum* is accumulated in float32 and divided by the total count once:
    equal to one big batch whatever the split of tokens over the parts. A batch that is Parts brings its own.
    Gradients have the parameters' dtypes.
    """

    def total(params, part):
        sums = objective(params, part)
        return sums["loss"][0], sums

    grad = jax.grad(total, has_aux=True)
    if micro_batches == 1 and not isinstance(batch, Parts):
        grads, sums = grad(params, batch)
    else:
        parts = batch.batch if isinstance(batch, Parts) else _split(batch, micro_batches)
        shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)

        def add(carry, part):
            return jax.tree.map(jnp.add, carry, grad(params, part))

        if isinstance(batch, Parts):
            turn = lambda i, carry: add(carry, jax.tree.map(lambda x: x[i], parts))  # noqa: E731
            grads, sums = jax.lax.fori_loop(0, batch.used, turn, zeros)
        else:
            (grads, sums), _ = jax.lax.scan(lambda carry, part: (add(carry, part), None), zeros, parts)
    count = jnp.maximum(sums["loss"][1], 1.0)
    grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, params)
    return {name: total / jnp.maximum(n, 1.0) for name, (total, n) in sums.items()}, grads


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, *, micro_batches: int = 1, gradients: str = "float32"
):
    """The pure step of one objective: TrainState, batch, base -> TrainState, metrics (float32 scalars, with grad_norm).

    `base` holds the weights that the trained ones lie over (`base | state.params` is the model), if not all are trained.
    `gradients` is the dtype of the kernels' gradients, where their own is wider.
    """

    def step(state: TrainState, batch, base: Params | None = None) -> tuple[TrainState, Metrics]:
        def over_base(params, part):
            return objective(over(base, params), part)

        narrow = cast_kernels(state.params, gradients)
        metrics, grads = value_and_grads(over_base, narrow, batch, micro_batches=micro_batches)
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": norm}

    return step


def cast_kernels(params: Params, dtype: str) -> Params:
    """The blocks' kernels in `dtype`: in the compute dtype that changes no number, but halves what their gradients take."""

    def cast(path, x):
        return x.astype(dtype) if path[0].key == "layers" and path[-1].key == "kernel" else x

    return params if dtype == "float32" else jax.tree_util.tree_map_with_path(cast, params)


def make_ppo_step(policy_step, critic_step=None):
    """The pure PPO step on one mini-batch: state, Experience, base, reward -> state, metrics.

    The state is an ActorCritic or, without a critic's step, the policy's TrainState. With a base (see `make_step`) the
    policy is trained over it, and the critic over it and the reward model's weights.
    """

    def alone(state: TrainState, batch: Experience, base: Params | None = None, reward: Params | None = None):
        state, metrics = policy_step(state, batch, base)
        return state, {f"policy_{name}": x for name, x in metrics.items()}

    def step(state: ActorCritic, batch: Experience, base: Params | None = None, reward: Params | None = None):
        policy, metrics = alone(state.policy, batch, base)
        critic, critic_metrics = critic_step(state.critic, batch, over(base, reward))
        metrics |= {f"value_{name}": x for name, x in critic_metrics.items()}
        return ActorCritic(policy, critic), metrics

    return step if critic_step else alone


def make_ppo_update(ppo_step, *, epochs: int, minibatches: int, pack: Callable[[Experience], Parts] | None = None):
    """All updates on one rollout buffer, reshuffled every epoch: state of the step, Experience, key -> state, metrics.

    Whatever else is given (base and reward) goes to the step.
    The metrics are means over the updates; `first_update_kl` is the first update's, 0 up to rounding:
    anything else says that rollout and training disagree about log-probabilities. With `pack` (`repack`) every
    mini-batch is packed first, and `used_slots` is the share of the slots in use then.
    """

    def update(state, buffer: Experience, key: jax.Array, *bases: Params) -> tuple[Any, Metrics]:
        rows = buffer.logps.shape[0]
        order = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(key, epochs))
        order = order.reshape(epochs * minibatches, rows // minibatches)

        def one(state, rows):
            batch = jax.tree.map(lambda x: x[rows], buffer)
            if pack is None:
                return ppo_step(state, batch, *bases)
            packed = pack(batch)
            state, metrics = ppo_step(state, packed, *bases)
            slots = packed.used * math.prod(packed.batch.sequences.tokens.shape[1:])
            return state, metrics | {"used_slots": jnp.sum(batch.sequences.valid) / slots}

        state, metrics = jax.lax.scan(one, state, order)
        means = {name: jnp.mean(x) for name, x in metrics.items()}
        return state, means | {"first_update_kl": metrics["policy_update_kl"][0]}

    return update
