"""From configurations to compiled programs: the one place where models, objectives and shardings meet.

Every function is cached by its (hashable) arguments, so the seeds and arms of a study share compiled code.
All arrays are arguments; nothing is closed over but configuration.
"""

import functools

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rto_jax import scoring
from rto_jax import steps as S
from rto_jax.models import LlamaConfig, freeze, init_adapters, language_model, scalar_model, with_head
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.rollout import make_rollout
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.sharding import batch_sharding, in_host_memory, replicated
from rto_jax.train_state import TrainState, abstract_on, new_state
from rto_jax.types import BATCH, prompt_length

Options = tuple[tuple[str, float | str], ...]  # an objective's keywords


def init_fn(config: LlamaConfig, head: str):
    """key -> parameters, for head "lm", "last" or "token"."""
    return language_model(config).init if head == "lm" else scalar_model(config, head=head).init


def trained_fn(config: LlamaConfig, head: str):
    """key -> what a stage trains: all parameters or, with config.lora, the adapters and a scalar model's head."""
    if not config.lora.rank:
        return init_fn(config, head)
    if head == "lm":
        return lambda key: init_adapters(config, key)
    return lambda key: with_head(init_adapters(config, key), config, key, head)


@functools.cache
def abstract_params(config: LlamaConfig, head: str, mesh: Mesh, dtype: str = "float32"):
    """ShapeDtypeStructs of the parameters, frozen in `dtype` if that is another, with the table's shardings."""
    init = init_fn(config, head)
    return abstract_on(jax.eval_shape(lambda key: freeze(init(key), dtype), jax.random.key(0)), mesh)


@functools.cache
def abstract_trained(config: LlamaConfig, head: str, mesh: Mesh):
    """ShapeDtypeStructs of what `trained_fn` makes, with the table's shardings."""
    return abstract_on(jax.eval_shape(trained_fn(config, head), jax.random.key(0)), mesh)


@functools.cache
def abstract_state(config: LlamaConfig, head: str, optim: OptimConfig, steps: int, mesh: Mesh) -> TrainState:
    init = trained_fn(config, head)
    build = lambda key: new_state(init(key), make_optimizer(optim, steps))  # noqa: E731
    state = abstract_on(jax.eval_shape(build, jax.random.key(0)), mesh)
    return state._replace(opt_state=in_host_memory(state.opt_state)) if optim.offload else state


def _shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)


@functools.cache
def start(config: LlamaConfig, head: str, optim: OptimConfig, steps: int, mesh: Mesh):
    """Program: what is trained -> TrainState in config.param_dtype with a zero optimiser state. Donates the parameters."""
    dtype, optimizer = config.param_dtype, make_optimizer(optim, steps)
    return jax.jit(
        lambda params: new_state(jax.tree.map(lambda x: x.astype(dtype), params), optimizer),
        out_shardings=_shardings(abstract_state(config, head, optim, steps, mesh)),
        donate_argnums=0 if dtype == "float32" else (),  # else there is nothing of that size to take over
    )


def reads(kind: str, options: Options = ()) -> tuple[str, ...]:
    """What the loss of a step reads besides log-probabilities of its batch: see `steps.PairLoss`."""
    return S.PAIR_LOSSES[dict(options).get("loss", "dpo")].reads if kind == "dpo" else ()


def objective(
    kind: str, config: LlamaConfig, head: str, options: Options = (), mesh: Mesh | None = None
) -> S.Objective:
    """What the step of `kind` minimises: "sft", "reward", "dpo", "policy" or "value"."""
    if kind in ("reward", "value"):
        model = scalar_model(config, head, mesh)
        make, function = (S.reward_objective, model.scores) if kind == "reward" else (S.value_objective, model.values)
    else:
        make = {"sft": S.sft_objective, "dpo": S.dpo_objective, "policy": S.policy_objective}[kind]
        model = language_model(config, mesh)
        function = model.statistics if "kl" in reads(kind, options) else model.logps
    return make(function, **dict(options))


@functools.cache
def pure_step(
    kind: str, config: LlamaConfig, head: str, optim: OptimConfig, steps: int, micro_batches: int,
    options: Options = (), mesh: Mesh | None = None,
):  # fmt: skip
    """The pure step of one objective; options are the objective's keywords."""
    return S.make_step(
        objective(kind, config, head, options, mesh), make_optimizer(optim, steps), micro_batches=micro_batches,
        gradients=optim.gradients,
    )  # fmt: skip


@functools.cache
def supervised_step(
    kind: str, config: LlamaConfig, head: str, optim: OptimConfig, steps: int, micro_batches: int, mesh: Mesh,
    options: Options = (),
):  # fmt: skip
    """Program: TrainState (donated), batch, base if not all is trained -> TrainState, metrics."""
    state = _shardings(abstract_state(config, head, optim, steps, mesh))
    step = pure_step(kind, config, head, optim, steps, micro_batches, options, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(state, replicated(mesh)))


@functools.cache
def pair_logps(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Pairs -> summed log-probabilities of chosen and rejected, two [B]."""
    model = language_model(config, mesh)
    return jax.jit(lambda params, pairs: scoring.pair_logps(model.logps, params, pairs), out_shardings=batch_sharding(mesh))


@functools.cache
def response_logps(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Sequences -> log-probabilities of the response tokens [B, T]."""
    model = language_model(config, mesh)
    return jax.jit(lambda params, seqs: scoring.response_logps(model.logps, params, seqs), out_shardings=batch_sharding(mesh))


@functools.cache
def response_logits(config: LlamaConfig, mesh: Mesh):
    """Program: parameters, Sequences -> the policy's logits at every response position, [B, T, V]."""
    model = language_model(config, mesh)
    return jax.jit(
        lambda params, seqs: model.logits(params, seqs.tokens, seqs.valid, prompt_length(seqs)),
        out_shardings=batch_sharding(mesh),
    )


@functools.cache
def scores(config: LlamaConfig, head: str, mesh: Mesh):
    """Program: parameters, Sequences -> reward-model scores [B]."""
    model = scalar_model(config, head, mesh)
    return jax.jit(
        lambda params, seqs: model.scores(params, seqs.tokens, seqs.valid, seqs.mask), out_shardings=batch_sharding(mesh)
    )


@functools.cache
def sampler(config: LlamaConfig, sampling: SamplingConfig, eos_id: int, pad_id: int, mesh: Mesh):
    """Program: parameters, Prompts, keys [B] -> Sequences, log-probabilities [B, T]."""
    model = language_model(config, mesh)
    return jax.jit(
        lambda params, prompts, keys: sample(
            model, params, prompts, keys, config=sampling, eos_id=eos_id, pad_id=pad_id
        ),
        out_shardings=batch_sharding(mesh),
    )


@functools.cache
def rollout(
    policy: LlamaConfig, critic: LlamaConfig | None, reward: LlamaConfig, reward_head: str, sampling: SamplingConfig,
    eos_id: int, pad_id: int, dpo_clip: float | None, reward_clip: float | None, mesh: Mesh, placement: str = "token",
    delimiters: tuple[int, ...] = (), advantage: str = "gae", group_size: int = 1,
):  # fmt: skip
    """Program: RolloutParams, Prompts, key, RewardScales -> Experience, metrics, RolloutDetail."""
    pure = make_rollout(
        language_model(policy, mesh), critic and scalar_model(critic, "last", mesh),
        scalar_model(reward, reward_head, mesh), sampling=sampling, eos_id=eos_id, pad_id=pad_id, dpo_clip=dpo_clip,
        reward_clip=reward_clip, placement=placement, delimiters=delimiters, advantage=advantage, group_size=group_size,
    )  # fmt: skip
    rows = batch_sharding(mesh)
    return jax.jit(pure, out_shardings=(rows, replicated(mesh), rows))


@functools.cache
def pure_ppo_step(
    policy: LlamaConfig, critic: LlamaConfig | None, policy_optim: OptimConfig, critic_optim: OptimConfig,
    updates: int, ppo: S.PpoConfig, temperature: float, micro_batches: int, mesh: Mesh | None = None,
):  # fmt: skip
    """The pure PPO step on one mini-batch; without a critic it trains the policy alone."""
    options = (("clip", ppo.clip), ("temperature", temperature))
    value = (("clip", ppo.value_clip),)
    return S.make_ppo_step(
        pure_step("policy", policy, "lm", policy_optim, updates, micro_batches, options, mesh),
        critic and pure_step("value", critic, "last", critic_optim, updates, micro_batches, value, mesh),
    )


def abstract_ppo_state(
    policy: LlamaConfig, critic: LlamaConfig | None, policy_optim: OptimConfig, critic_optim: OptimConfig,
    updates: int, mesh: Mesh,
) -> S.ActorCritic | TrainState:  # fmt: skip
    """What `ppo_update` trains: policy and critic or, without one, the policy's state alone."""
    state = abstract_state(policy, "lm", policy_optim, updates, mesh)
    return S.ActorCritic(state, abstract_state(critic, "last", critic_optim, updates, mesh)) if critic else state


@functools.cache
def ppo_update(
    policy: LlamaConfig, critic: LlamaConfig | None, policy_optim: OptimConfig, critic_optim: OptimConfig,
    updates: int, ppo: S.PpoConfig, temperature: float, micro_batches: int, mesh: Mesh,
    pack: tuple[int, int, int] | None = None,
):  # fmt: skip
    """Program: `abstract_ppo_state` (donated), Experience, key -> the same, metrics: all updates on one buffer.

    Takes base and reward model too, where policy and critic are trained over them. pack: slots of prompts and of answers
    in a packed row, and rows per micro-batch.
    """
    step = pure_ppo_step(
        policy, critic, policy_optim, critic_optim, updates, ppo, temperature, micro_batches, mesh
    )
    states = _shardings(abstract_ppo_state(policy, critic, policy_optim, critic_optim, updates, mesh))

    def packed(batch):
        prompts, answers, rows = pack
        return jax.lax.with_sharding_constraint(
            S.repack(batch, (prompts, answers), rows), S.Parts(NamedSharding(mesh, P(None, BATCH)), replicated(mesh))
        )

    update = S.make_ppo_update(step, epochs=ppo.epochs, minibatches=ppo.minibatches, pack=packed if pack else None)
    return jax.jit(update, donate_argnums=0, out_shardings=(states, replicated(mesh)))
