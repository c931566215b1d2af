"""The body of PPO and RTO: the same loop, reward model, critic and prompts; RTO adds the DPO model's token reward."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import Stage, describe_model, open_model, open_run, same_tokenizer, write_json
from experiments.dry_run import abstract_mesh, report_shapes
from experiments.pages import stage_page
from experiments.supervised import abstract_rows
from experiments.tasks import in_batches, make_task, stream_batches, take
from rto_jax import loops, programs
from rto_jax.errors import UserError
from rto_jax.models import SIZES, with_head
from rto_jax.optim import OptimConfig
from rto_jax.rng import stream
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import check_batch, make_mesh, put_batch
from rto_jax.steps import ActorCritic, PpoConfig
from rto_jax.train_state import sharded_init
from rto_jax.types import Prompts


@dataclass(frozen=True, kw_only=True)
class PpoRunConfig(Stage):
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


@dataclass(frozen=True, kw_only=True)
class RtoRunConfig(PpoRunConfig):
    dpo: str = "runs/gold/dpo"
    """the DPO model of the token reward"""
    beta1: float = 0.05
    """weight of log(pi_dpo / pi_ref), reward per nat (RTO eq. 4.7)"""
    dpo_clip: float | None = None
    """bound on the size of each beta1·log(pi_dpo / pi_ref) (the authors' script: 0.05)"""


def _scales(config: PpoRunConfig) -> RewardScales:
    beta1 = getattr(config, "beta1", 0.0)
    return RewardScales(*(jnp.float32(x) for x in (beta1, config.beta2, config.beta3, config.ppo.gamma, config.ppo.lam)))


def _programs(config: PpoRunConfig, policy, reward, head: str, eos_id: int, pad_id: int, mesh):
    sampling = SamplingConfig(config.lengths.response, temperature=config.temperature)
    rollout = programs.rollout(
        policy, reward, reward, head, sampling, eos_id, pad_id, getattr(config, "dpo_clip", None), config.reward_clip, mesh
    )
    updates = config.iterations * config.ppo.epochs * config.ppo.minibatches
    update = programs.ppo_update(
        policy, reward, config.policy_optim, config.critic_optim, updates,
        dataclasses.replace(config.ppo, gamma=1.0, lam=1.0),  # traced in the rollout: not a reason to compile again
        config.temperature, config.micro_batches, mesh,
    )  # fmt: skip
    return rollout, update, updates


def dry_run(config: PpoRunConfig) -> None:
    mesh = abstract_mesh(config.mesh)
    check(config, mesh)
    policy, reward = SIZES[config.policy_size], SIZES[config.reward_size]
    rollout, update, updates = _programs(config, policy, reward, "last", 1, 0, mesh)
    state = ActorCritic(
        programs.abstract_state(policy, "lm", config.policy_optim, updates, mesh),
        programs.abstract_state(reward, "last", config.critic_optim, updates, mesh),
    )
    lm, rm = programs.abstract_params(policy, "lm", mesh), programs.abstract_params(reward, "last", mesh)
    models = RolloutParams(lm, rm, lm, rm, lm if isinstance(config, RtoRunConfig) else None)
    rows = abstract_rows(config.batch_size, config.lengths.prompt, config.lengths.response)
    prompts = Prompts(*(jax.ShapeDtypeStruct((config.batch_size, config.lengths.prompt), x.dtype) for x in rows[:2]))
    key = jax.eval_shape(lambda: jax.random.key(0))
    experience, metrics, _ = jax.eval_shape(rollout, models, prompts, key, _scales(config))
    _, updated = jax.eval_shape(update, state, experience, key)
    trees = {"policy with optimiser": state.policy, "critic with optimiser": state.critic, "reference": lm, "reward model": rm}
    if models.dpo is not None:
        trees["DPO model"] = lm
    report_shapes("rto" if models.dpo is not None else "ppo", mesh, trees, metrics | updated)


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
    check_batch(config.batch_size // config.ppo.minibatches, mesh, "the PPO mini-batch of", config.micro_batches)


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
    if config.critic_head == "reward" and reward.head != "last":
        raise UserError('--critic-head reward needs a reward model with a "last" head.')
    if dpo and (dpo.head, dpo.config) != ("lm", sft.config):
        raise UserError(f"--dpo {config.dpo} is not a language model of the size of --sft {config.sft}.")
    is_gold, task = sft.tokenizer is None, make_task(config, mesh, sft)
    rollout, update, updates = _programs(config, sft.config, reward.config, reward.head, task.eos_id, task.pad_id, mesh)
    scales, prompts = _scales(config), stream_batches(task.prompts("train"), config)
    frozen = {"reference": sft.load(mesh), "reward": reward.load(mesh), "dpo": dpo and dpo.load(mesh)}
    abstract = ActorCritic(
        programs.abstract_state(sft.config, "lm", config.policy_optim, updates, mesh),
        programs.abstract_state(reward.config, "last", config.critic_optim, updates, mesh),
    )

    def fresh() -> ActorCritic:
        critic = reward.load(mesh)
        if config.critic_head == "zero":
            add = lambda p: with_head(p, reward.config, stream(config.seed, "critic"), "last", zero=True)  # noqa: E731
            critic = sharded_init(add, mesh, critic)
        return ActorCritic(
            programs.start(sft.config, "lm", config.policy_optim, updates, mesh)(sft.load(mesh)),
            programs.start(reward.config, "last", config.critic_optim, updates, mesh)(critic),
        )

    def models(state: ActorCritic) -> RolloutParams:
        return RolloutParams(policy=state.policy.params, critic=state.critic.params, **frozen)

    def step(state, batch, number):
        experience, metrics, _ = rollout(models(state), batch, stream(config.seed, "rollout", number), scales)
        state, updated = update(state, experience, stream(config.seed, "shuffle", number))
        return state, metrics | updated

    held_out = take(task.prompts(task.evaluation_splits()[0]), config.eval_size, config.seed)

    def answer(policy, critic, rows: Prompts):
        """Held-out prompts answered, with the same random numbers for every policy."""
        parts = []
        for number, (batch, count) in enumerate(in_batches(rows, config.batch_size)):
            params = RolloutParams(policy=policy, critic=critic, **frozen)
            key = stream(config.seed, "held-out", number)
            experience, _, detail = rollout(params, put_batch(batch, mesh), key, scales)
            found = (experience.sequences, detail.scores, detail.kl)
            parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], found))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    few = jax.tree.map(lambda x: x[: config.batch_size], held_out)

    def evaluate(state) -> dict[str, float]:
        policy, critic = state.policy.params, state.critic.params
        found = task.score(sft.config, policy, config.seed) if is_gold else summary(task, *answer(policy, critic, few))
        return {key: value for key, value in found.items() if not key.endswith("_se") and key != "n"}

    with open_run(config, name, abstract, fresh, prompts) as result:
        state = loops.train(
            step, result.state, loops.python_iterator(prompts, lambda batch: put_batch(batch, mesh)),
            start=result.start, steps=config.iterations, name=name, log=result.log, checkpointer=result.checkpointer,
            save_every=config.save_every, programs=(rollout, update), evaluate=evaluate, evaluate_every=config.eval_every,
        )  # fmt: skip
    describe_model(result.out, sft, "lm")
    policies = {"SFT": frozen["reference"], **({"DPO": frozen["dpo"]} if dpo else {}), name.upper(): state.policy.params}
    critic = state.critic.params
    drawn = {label: answer(policy, critic, few if is_gold else held_out) for label, policy in policies.items()}
    if is_gold:
        figures = {label: task.score(sft.config, policy, config.seed) for label, policy in policies.items()}
    else:
        figures = {label: summary(task, *found) for label, found in drawn.items()}
    texts = {label: answers(task, held_out, found[0])[:8] for label, found in drawn.items()}
    shown = [
        {"prompt": prompt, "texts": {label: found[i][1] for label, found in texts.items()}}
        for i, (prompt, _) in enumerate(texts["SFT"])
    ]
    write_json(result.out / "samples.json", shown)
    write_json(result.out / "results.json", figures)
    curves = {
        "score": "reward model's score", "kl": "KL to the reference, nats per answer", "length": "length, tokens",
        "total_reward": "total reward of an answer", "value_loss": "value loss", "policy_clip_fraction": "clip fraction",
        "eval_share": "share of the exact optimum", "eval_score": "score on held-out prompts",
    }  # fmt: skip
    stage_page(result.out, name.upper(), curves, figures[name.upper()])
    return figures
