"""The body of PPO and RTO: the same loop, reward model, critic and prompts; RTO adds the DPO model's token reward."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import (
    Model,
    Stage,
    describe_model,
    frozen,
    open_model,
    open_run,
    same_size,
    same_tokenizer,
    to_train,
    write_json,
)  # fmt: skip
from experiments.dry_run import abstract_mesh, first_rows, kept_activations, report_shapes
from experiments.pages import stage_page
from experiments.preemption import PREEMPTION
from experiments.supervised import abstract_rows
from experiments.tasks import in_batches, make_task, repeat, stream_batches, take
from rto_jax import loops, programs
from rto_jax.errors import UserError
from rto_jax.models import SIZES, LlamaConfig, LoraConfig, with_head
from rto_jax.optim import OptimConfig
from rto_jax.rng import stream
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import blocks, check_batch, make_mesh, put_batch, put_whole, to_host
from rto_jax.steps import ActorCritic, PpoConfig
from rto_jax.train_state import TrainState, over, sharded_init
from rto_jax.types import Params, Prompts


@dataclass(frozen=True, kw_only=True)
class PpoRunConfig(Stage):
    freezes: ClassVar[bool] = True
    sft: str = "runs/gold/sft"
    """the policy to start from, and the frozen reference of the KL penalty"""
    reward_model: str = "runs/gold/reward_model"
    """scores whole answers; its trunk is where the critic starts"""
    iterations: int = 60
    """rollout buffers; each gives ppo.epochs x ppo.minibatches updates"""
    temperature: float = 1.0
    """sampling temperature, applied to every log-probability too"""
    beta2: float = 0.01
    """KL penalty, reward per nat (RTO eq. 4.7; PPO's beta in eq. 2.3)"""
    beta3: float = 1.0
    """weight of the reward model's score at the last token"""
    reward_clip: float | None = None
    """bound on the score's size before beta3 (the authors' code: 10)"""
    critic_head: Literal["zero", "reward"] = "zero"
    """the critic's head starts at zero, or as the reward model's (which must be a "last" head)"""
    eval_every: int = 5
    """iterations between evaluations; 0: only at the end"""
    advantage: Literal["gae", "reinforce_pp", "rloo", "grpo"] = "gae"
    """gae has a critic, the others none. reinforce_pp: whitened returns to go of the token rewards; rloo and grpo: an
    answer's score and KL against those of its group, and the DPO term token by token (grpo divides each of the two by its
    spread in the group, so the size of beta1 says nothing there)"""
    group_size: int = 1
    """answers to each prompt of a rollout buffer, which has batch-size answers in all; rloo and grpo need 2 or more"""
    pack: int = 0
    """slots of a row of the PPO update, which then holds several answers; 0: one answer a row"""
    ppo: PpoConfig = field(default_factory=PpoConfig)
    """advantages and updates"""
    policy_optim: OptimConfig = field(default_factory=OptimConfig)
    """policy's optimiser"""
    critic_optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=9e-6))
    """critic's optimiser"""

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise UserError(f"--temperature must be positive for PPO, not {self.temperature}.")
        if self.beta2 < 0:
            raise UserError(f"--beta2 must not be negative, not {self.beta2}.")
        if self.batch_size % self.ppo.minibatches:
            raise UserError(f"--batch-size {self.batch_size} is not divisible by --ppo.minibatches {self.ppo.minibatches}.")
        if self.advantage in ("rloo", "grpo") and self.group_size < 2:
            raise UserError(f"--advantage {self.advantage} needs a --group-size of 2 or more, not {self.group_size}.")
        if self.group_size < 1 or self.batch_size % self.group_size:
            raise UserError(f"--batch-size {self.batch_size} is not divisible by --group-size {self.group_size}.")
        if self.pack and self.pack < self.lengths.prompt + self.lengths.response:
            raise UserError(f"--pack {self.pack} is too short for {self.lengths.prompt} + {self.lengths.response} tokens.")


@dataclass(frozen=True, kw_only=True)
class RtoRunConfig(PpoRunConfig):
    dpo: str = "runs/gold/dpo"
    """the DPO model of the token reward"""
    beta1: float = 0.05
    """weight of log(pi_dpo / pi_ref), reward per nat (RTO eq. 4.7)"""
    dpo_clip: float | None = None
    """bound on the size of each beta1·log(pi_dpo / pi_ref) (the authors' script: 0.05)"""
    placement: Literal["token", "segment", "last", "shaping"] = "token"
    """where the DPO term is paid: at its token (RTO), in sums at the ends of sentences (Semi-RTO; at SEP in the gold world)
    or at the last token (DDPO), or at its token and taken back at the last, which adds nothing to the total (RS-PPO)"""


def _scales(config: PpoRunConfig) -> RewardScales:
    beta1 = getattr(config, "beta1", 0.0)
    return RewardScales(*(jnp.float32(x) for x in (beta1, config.beta2, config.beta3, config.ppo.gamma, config.ppo.lam)))


def _packed_rows(config: PpoRunConfig, mesh) -> tuple[int, int, int] | None:
    """Slots of prompts and of answers in a packed row, and rows per micro-batch: as many slots as without packing."""
    if not config.pack:
        return None
    prompt, response = config.lengths.prompt - 1, config.lengths.response + 1
    answers = config.pack * response // (prompt + response)
    rows = config.batch_size // config.ppo.minibatches // config.micro_batches * (prompt + response)
    ways = blocks(mesh)
    return config.pack - answers, answers, max(1, rows // config.pack // ways) * ways


def _programs(
    config: PpoRunConfig, policy, reward, head: str, eos_id: int, pad_id: int, delimiters: tuple[int, ...], mesh
):
    """Rollout, update, the abstract state that this trains, and the number of updates in a run."""
    sampling = SamplingConfig(config.lengths.response, temperature=config.temperature)
    critic = reward if config.advantage == "gae" else None
    rollout = programs.rollout(
        policy, critic, reward, head, sampling, eos_id, pad_id, getattr(config, "dpo_clip", None), config.reward_clip, mesh,
        _placement(config), delimiters, config.advantage, config.group_size,
    )  # fmt: skip
    updates = config.iterations * config.ppo.epochs * config.ppo.minibatches
    trained = policy, critic, config.policy_optim, config.critic_optim, updates
    update = programs.ppo_update(
        *trained, dataclasses.replace(config.ppo, gamma=1.0, lam=1.0),  # traced in the rollout: no reason to compile again
        config.temperature, config.micro_batches, mesh, _packed_rows(config, mesh),
    )  # fmt: skip
    return rollout, update, programs.abstract_ppo_state(*trained, mesh), updates


def _placement(config: PpoRunConfig) -> str:
    return getattr(config, "placement", "token")


def weights_of(state: ActorCritic | TrainState) -> tuple[Params, Params | None]:
    """The policy's parameters and, where there is one, the critic's."""
    if isinstance(state, ActorCritic):
        return state.policy.params, state.critic.params
    return state.params, None


def dry_run(config: PpoRunConfig) -> None:
    mesh = abstract_mesh(config.mesh)
    check(config, mesh)
    policy, reward = (config.levers(SIZES[name]) for name in (config.policy_size, config.reward_size))
    rollout, update, state, _ = _programs(config, policy, reward, "last", 1, 0, (), mesh)
    actor, critic = weights_of(state)
    # With --lora.rank, as if DPO model and (of the policy's size) reward model were adapters over the policy's base.
    lora, is_rto = config.lora.rank > 0, isinstance(config, RtoRunConfig)
    lm, rm = (
        programs.abstract_params(dataclasses.replace(size, param_dtype="float32"), head, mesh, config.frozen_dtype)
        for size, head in ((policy, "lm"), (reward, "last"))
    )
    reference, own = ({}, programs.abstract_trained(policy, "lm", mesh)) if lora else (lm, lm)
    if lora and config.reward_size == config.policy_size:
        rm = programs.abstract_trained(reward, "last", mesh)
    models = RolloutParams(actor, critic, reference, rm, own if is_rto else None, lm if lora else None)
    rows = abstract_rows(config.batch_size, config.lengths.prompt, config.lengths.response)
    prompts = Prompts(*(jax.ShapeDtypeStruct((config.batch_size, config.lengths.prompt), x.dtype) for x in rows[:2]))
    key = jax.eval_shape(lambda: jax.random.key(0))
    experience, metrics, _ = jax.eval_shape(rollout, models, prompts, key, _scales(config))
    _, updated = jax.eval_shape(update, state, experience, key, *((lm, rm) if lora else ()))
    trees = {"policy, trained": state.policy, "critic, trained": state.critic} if critic else {"policy, trained": state}
    trees |= {"base of all": lm} if lora else {"reference": reference}
    trees |= {"reward model": rm} | ({"DPO model": own} if is_rto else {})
    part = config.batch_size // config.ppo.minibatches // config.micro_batches
    kept = kept_activations(
        programs.objective("policy", policy, "lm", (("clip", config.ppo.clip),), mesh),
        over(models.base, actor), first_rows(experience, part), mesh,
    )  # fmt: skip
    gradients = {"policy, trained": config.policy_optim.gradients, "critic, trained": config.critic_optim.gradients}
    report_shapes("rto" if is_rto else "ppo", mesh, trees, metrics | updated, gradients, kept)


def answers(task, prompts: Prompts, seqs) -> list[tuple[str, str]]:
    """(prompt, answer) of the rows that were answered, as text."""
    rows = zip(prompts.tokens, prompts.valid, seqs.tokens, seqs.mask, strict=False)
    return [
        (task.prompt_text(prompt[valid]), task.answer_text(prompt[valid], tokens[-len(mask) :][mask]))
        for prompt, valid, tokens, mask in rows
    ]


def summary(task, seqs, scores: np.ndarray, kl: np.ndarray) -> dict[str, float]:
    """Means over the rows, their standard errors as NAME_se, and n."""
    ended = ((seqs.tokens[:, -seqs.mask.shape[1] :] == task.eos_id) & seqs.mask).any(1)
    columns = {"score": scores, "kl": kl, "length": seqs.mask.sum(1), "ended": ended}
    means = {key: float(x.mean()) for key, x in columns.items()}
    return means | {f"{key}_se": float(x.std(ddof=1) / len(x) ** 0.5) for key, x in columns.items()} | {"n": len(kl)}


def check(config: PpoRunConfig, mesh) -> None:
    check_batch(config.batch_size, mesh, "--batch-size")
    check_batch(config.batch_size // config.group_size, mesh, "--batch-size / --group-size =")
    check_batch(config.batch_size // config.ppo.minibatches, mesh, "the PPO mini-batch of", config.micro_batches)


def load_fixed(config: PpoRunConfig, mesh, sft: Model, reward: Model, dpo: Model | None) -> dict[str, Params | None]:
    """The models that are not trained, as `RolloutParams` has them: adapters alone, where they lie over --sft too."""

    def whole(model):
        return frozen(model.load(mesh), config, mesh)

    def beside(model):
        return model.own(mesh) if model.base == sft.identity else whole(model)

    if not config.lora.rank:
        return {"reference": whole(sft), "reward": whole(reward), "dpo": dpo and whole(dpo), "base": None}
    return {"reference": {}, "reward": beside(reward), "dpo": dpo and beside(dpo), "base": whole(sft)}


def start_critic(config: PpoRunConfig, mesh, sft: Model, reward: Model) -> tuple[LlamaConfig, Callable[[], Params]]:
    """The critic's sizes, and what makes its first parameters: the reward model's, its adapters, or new ones over it."""
    shared = bool(config.lora.rank) and reward.base == sft.identity
    size = reward.config
    if shared:
        kept = reward.adapters
        size = dataclasses.replace(size, lora=LoraConfig(kept.rank, config.lora.scale * kept.rank, kept.targets))

    def first() -> Params:
        params = reward.own(mesh) if shared else to_train(reward, config, mesh)
        if config.critic_head == "zero":
            add = lambda p: with_head(p, size, stream(config.seed, "critic"), "last", zero=True)  # noqa: E731
            return sharded_init(add, mesh, params)
        return params if "head" in params else params | {"head": reward.load(mesh)["head"]}

    return size, first


def run(config: PpoRunConfig) -> dict[str, Any]:
    """Train a policy; returns its figures. Writes checkpoints, metrics.jsonl, samples.json, results.json, report.html."""
    if config.dry_run:
        return dry_run(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    name = "rto" if isinstance(config, RtoRunConfig) else "ppo"
    sft, reward = open_model(config.sft, config, "--sft"), open_model(config.reward_model, config, "--reward-model")
    dpo = open_model(config.dpo, config, "--dpo") if name == "rto" else None
    same_tokenizer(sft, ("--reward-model", reward), *([("--dpo", dpo)] if dpo else []))
    if reward.head == "lm":
        raise UserError(f"--reward-model {config.reward_model} is a language model, without a scalar head.")
    if (config.advantage, config.critic_head) == ("gae", "reward") and reward.head != "last":
        raise UserError('--critic-head reward needs a reward model with a "last" head.')
    same_size(sft, *([("--dpo", dpo)] if dpo else []))
    is_gold, task = sft.tokenizer is None, make_task(config, mesh, sft)
    critic_size, first_critic = start_critic(config, mesh, sft, reward)
    delimiters = task.delimiters if _placement(config) == "segment" else ()
    rollout, update, abstract, updates = _programs(
        config, sft.config, critic_size, reward.head, task.eos_id, task.pad_id, delimiters, mesh
    )
    scales, prompts = _scales(config), stream_batches(task.prompts("train"), config, mesh, group_size=config.group_size)
    fixed = load_fixed(config, mesh, sft, reward, dpo)
    bases = (fixed["base"], fixed["reward"]) if config.lora.rank else ()

    def fresh() -> ActorCritic | TrainState:
        policy = programs.start(sft.config, "lm", config.policy_optim, updates, mesh)(to_train(sft, config, mesh))
        if config.advantage != "gae":
            return policy
        return ActorCritic(policy, programs.start(critic_size, "last", config.critic_optim, updates, mesh)(first_critic()))

    def score(policy) -> dict[str, float]:
        return task.score(sft.config, over(fixed["base"], policy), config.seed)

    def step(state, batch, number):
        models = RolloutParams(*weights_of(state), **fixed)
        experience, metrics, _ = rollout(models, batch, stream(config.seed, "rollout", number), scales)
        state, updated = update(state, experience, stream(config.seed, "shuffle", number), *bases)
        return state, metrics | updated

    held_out = take(task.prompts(task.evaluation_splits()[0]), config.eval_size, config.seed)

    def answer(policy, critic, rows: Prompts):
        """Held-out prompts answered, with the same random numbers for every policy."""
        parts = []
        for number, (batch, count) in enumerate(in_batches(rows, config.batch_size)):
            params = RolloutParams(policy=policy, critic=critic, **fixed)
            key = stream(config.seed, "held-out", number)
            experience, _, detail = rollout(params, put_whole(batch, mesh), key, scales)
            found = to_host((experience.sequences, detail.scores, detail.kl))
            parts.append(jax.tree.map(lambda x, n=count: x[:n], found))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    few = jax.tree.map(lambda x: x[: config.batch_size], held_out)

    def evaluate(state) -> dict[str, float]:
        policy, critic = weights_of(state)
        found = score(policy) if is_gold else summary(task, *answer(policy, critic, few))
        return {key: value for key, value in found.items() if not key.endswith("_se") and key != "n"}

    def place(batch: Prompts) -> Prompts:
        return put_batch(repeat(batch, config.group_size), mesh)

    with open_run(config, name, abstract, fresh, prompts) as result:
        state = loops.train(
            step, result.state, loops.python_iterator(prompts, place),
            start=result.start, steps=config.iterations, name=name, log=result.log, checkpointer=result.checkpointer,
            save_every=config.save_every, stop=PREEMPTION.asked, programs=(rollout, update), evaluate=evaluate,
            evaluate_every=config.eval_every,
        )  # fmt: skip
    describe_model(result.out, config, sft, "lm")
    trained, critic = weights_of(state)
    policies = {"SFT": fixed["reference"], **({"DPO": fixed["dpo"]} if dpo else {}), name.upper(): trained}
    drawn = {label: answer(policy, critic, few if is_gold else held_out) for label, policy in policies.items()}
    if is_gold:
        figures = {label: score(policy) for label, policy in policies.items()}
    else:
        figures = {label: summary(task, *found) for label, found in drawn.items()}
    texts = {label: answers(task, held_out, found[0])[:8] for label, found in drawn.items()}
    shown = [
        {"prompt": prompt, "texts": {label: found[i][1] for label, found in texts.items()}}
        for i, (prompt, _) in enumerate(texts["SFT"])
    ]
    write_json(result.out / "samples.json", shown)
    curves = {
        "score": "reward model's score", "kl": "KL to the reference, nats per answer", "length": "length, tokens",
        "total_reward": "total reward of an answer", "value_loss": "value loss", "policy_clip_fraction": "clip fraction",
        "eval_share": "share of the exact optimum", "eval_score": "score on held-out prompts",
    }  # fmt: skip
    stage_page(result.out, name.upper(), curves, figures[name.upper()])
    write_json(result.out / "results.json", figures)  # last: quickstart takes it for the end
    return figures
