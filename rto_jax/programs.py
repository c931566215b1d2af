"""From configurations to compiled programs: the one place where models, objectives and shardings meet.

Every function is cached by its (hashable) arguments, so the seeds and arms of a study share compiled code.
All arrays are arguments; nothing is closed over but configuration.
"""

import functools

import jax
from jax.sharding import Mesh

from rto_jax import scoring
from rto_jax import steps as S
from rto_jax.models import LlamaConfig, language_model, scalar_model
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.rollout import make_rollout
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.sharding import batch_sharding, replicated, tree_shardings
from rto_jax.train_state import TrainState, abstract_on, new_state
from rto_jax.types import prompt_length


def init_fn(config: LlamaConfig, head: str):
    """key -> parameters, for head "lm", "last" or "token"."""
    return language_model(config).init if head == "lm" else scalar_model(config, head=head).init


def abstract_params(config: LlamaConfig, head: str, mesh: Mesh):
    """ShapeDtypeStructs of the parameters, with the table's shardings."""
    return abstract_on(jax.eval_shape(init_fn(config, head), jax.random.key(0)), mesh)


def abstract_state(config: LlamaConfig, head: str, optim: OptimConfig, steps: int, mesh: Mesh) -> TrainState:
    init = init_fn(config, head)
    build = lambda key: new_state(init(key), make_optimizer(optim, steps))  # noqa: E731
    return abstract_on(jax.eval_shape(build, jax.random.key(0)), mesh)


@functools.cache
def start(config: LlamaConfig, head: str, optim: OptimConfig, steps: int, mesh: Mesh):
    """Program: parameters -> TrainState with a zero optimiser state. Donates, since the state takes them over."""
    shardings = tree_shardings(abstract_state(config, head, optim, steps, mesh), mesh)
    return jax.jit(lambda params: new_state(params, make_optimizer(optim, steps)), out_shardings=shardings, donate_argnums=0)


@functools.cache
def pure_step(
    kind: str, config: LlamaConfig, head: str, optim: OptimConfig, steps: int, micro_batches: int,
    options: tuple[tuple[str, float], ...] = (),
):  # fmt: skip
    """The pure step of `kind`: "sft", "reward" or "dpo"; options are the objective's keyword numbers."""
    if kind == "sft":
        objective = S.sft_objective(language_model(config).logits)
    elif kind == "reward":
        objective = S.reward_objective(scalar_model(config, head=head).scores, **dict(options))
    else:
        objective = S.dpo_objective(language_model(config).logits, **dict(options))
    return S.make_step(objective, make_optimizer(optim, steps), micro_batches=micro_batches)


@functools.cache
def supervised_step(
    kind: str, config: LlamaConfig, head: str, optim: OptimConfig, steps: int, micro_batches: int, mesh: Mesh,
    options: tuple[tuple[str, float], ...] = (),
):  # fmt: skip
    """Program: TrainState (donated), batch -> TrainState, metrics."""
    state = tree_shardings(abstract_state(config, head, optim, steps, mesh), mesh)
    step = pure_step(kind, config, head, optim, steps, micro_batches, options)
    return jax.jit(step, donate_argnums=0, out_shardings=(state, replicated(mesh)))


@functools.cache
def pair_logps(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Pairs -> summed log-probabilities of chosen and rejected, two [B]."""
    model = language_model(config)
    return jax.jit(lambda params, pairs: scoring.pair_logps(model.logits, params, pairs), out_shardings=batch_sharding(mesh))


@functools.cache
def response_logps(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Sequences -> log-probabilities of the response tokens [B, T]."""
    model = language_model(config)
    return jax.jit(lambda params, seqs: scoring.response_logps(model.logits, params, seqs), out_shardings=batch_sharding(mesh))


@functools.cache
def response_logits(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Sequences -> the policy's logits at every response position, [B, T, V]."""
    model = language_model(config)
    return jax.jit(
        lambda params, seqs: model.logits(params, seqs.tokens, seqs.valid, prompt_length(seqs)),
        out_shardings=batch_sharding(mesh),
    )


@functools.cache
def scores(config: LlamaConfig, head: str, mesh: Mesh):
    """Program: parameters, Sequences -> reward-model scores [B]."""
    model = scalar_model(config, head=head)
    return jax.jit(
        lambda params, seqs: model.scores(params, seqs.tokens, seqs.valid, seqs.mask), out_shardings=batch_sharding(mesh)
    )


@functools.cache
def sampler(config: LlamaConfig, sampling: SamplingConfig, eos_id: int, pad_id: int, mesh: Mesh):
    """Program: parameters, Prompts, keys [B] -> Sequences, log-probabilities [B, T]."""
    model = language_model(config)
    return jax.jit(
        lambda params, prompts, keys: sample(
            model, params, prompts, keys, config=sampling, eos_id=eos_id, pad_id=pad_id
        ),
        out_shardings=batch_sharding(mesh),
    )


@functools.cache
def rollout(
    policy: LlamaConfig, critic: LlamaConfig, reward: LlamaConfig, reward_head: str, sampling: SamplingConfig,
    eos_id: int, pad_id: int, dpo_clip: float | None, reward_clip: float | None, mesh: Mesh,
):  # fmt: skip
    """Program: RolloutParams, Prompts, key, RewardScales -> Experience, metrics, RolloutDetail."""
    pure = make_rollout(
        language_model(policy), scalar_model(critic, head="last"), scalar_model(reward, head=reward_head),
        sampling=sampling, eos_id=eos_id, pad_id=pad_id, dpo_clip=dpo_clip, reward_clip=reward_clip,
    )  # fmt: skip
    rows = batch_sharding(mesh)
    return jax.jit(pure, out_shardings=(rows, replicated(mesh), rows))


@functools.cache
def pure_ppo_step(
    policy: LlamaConfig, critic: LlamaConfig, policy_optim: OptimConfig, critic_optim: OptimConfig,
    updates: int, ppo: S.PpoConfig, temperature: float, micro_batches: int,
):  # fmt: skip
    """The pure PPO step on one mini-batch."""
    policy_objective = S.policy_objective(language_model(policy).logits, clip=ppo.clip, temperature=temperature)
    value_objective = S.value_objective(scalar_model(critic, head="last").values, clip=ppo.value_clip)
    return S.make_ppo_step(
        S.make_step(policy_objective, make_optimizer(policy_optim, updates), micro_batches=micro_batches),
        S.make_step(value_objective, make_optimizer(critic_optim, updates), micro_batches=micro_batches),
    )


@functools.cache
def ppo_update(
    policy: LlamaConfig, critic: LlamaConfig, policy_optim: OptimConfig, critic_optim: OptimConfig,
    updates: int, ppo: S.PpoConfig, temperature: float, micro_batches: int, mesh: Mesh,
):  # fmt: skip
    """Program: ActorCritic (donated), Experience, key -> ActorCritic, metrics: all updates on one buffer."""
    step = pure_ppo_step(policy, critic, policy_optim, critic_optim, updates, ppo, temperature, micro_batches)
    states = S.ActorCritic(
        tree_shardings(abstract_state(policy, "lm", policy_optim, updates, mesh), mesh),
        tree_shardings(abstract_state(critic, "last", critic_optim, updates, mesh), mesh),
    )
    update = S.make_ppo_update(step, epochs=ppo.epochs, minibatches=ppo.minibatches)
    return jax.jit(update, donate_argnums=0, out_shardings=(states, replicated(mesh)))
