"""Choosing among a policy's own answers by the reward model: what RL has to beat, from the same models and prompts.

    python -m experiments.selection --method raft       the embedded world, half a minute on a laptop
    python -m experiments.selection --method rso --preset smollm2 --data DIR

    best_of_n      the best of n answers of the SFT policy; nothing is trained
    raft           SFT on the `keep` best of n answers of the policy itself, and again (arXiv 2304.06767)
    rso            n answers of the SFT policy, `keep` of them by rejection sampling, in pairs that the reward model
                   ranks; DPO's loss or the hinge (arXiv 2309.06657; there n = 64, keep = 8)
    conditioned    SFT on all answers of the SFT policy, each with its score behind the prompt; in the end a high
                   score is asked for (arXiv 2308.12050)
    iterative_dpo  DPO on the best and the worst of n answers of the policy itself; the reference stays the SFT model

Rollouts: an iteration samples batch-size answers, to batch-size/n prompts, whatever becomes of them, and a run has as
many iterations of as many answers as PPO in the same preset. RAFT and iterative DPO sample from the policy as it is
then; RSO and conditioned SFT from the SFT model, so theirs could be drawn once and kept. Best of n has no rollouts
before it is used, and then n for every answer.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import (
    Model,
    Stage,
    describe_model,
    frozen,
    main,
    open_model,
    open_run,
    same_tokenizer,
    to_train,
    write_json,
)  # fmt: skip
from experiments.dry_run import abstract_mesh, first_rows, kept_activations, report_shapes
from experiments.pages import stage_page
from experiments.ppo import COMMON
from experiments.preemption import PREEMPTION
from experiments.presets import ABOUT
from experiments.rl import answers, summary
from experiments.supervised import abstract_rows
from experiments.tasks import make_task, map_rows, repeat, sample_rows, stream_batches, take
from rto_jax import gold, loops, losses, programs
from rto_jax.errors import UserError
from rto_jax.models import SIZES, LlamaConfig
from rto_jax.optim import OptimConfig
from rto_jax.rng import stream
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import batch_sharding, check_batch, make_mesh, put_batch, replicated
from rto_jax.steps import PairsWithReference
from rto_jax.train_state import over
from rto_jax.types import Pairs, Params, Prompts, Sequences

Method = Literal["best_of_n", "raft", "rso", "conditioned", "iterative_dpo"]
TAKES = {
    "best_of_n": (), "raft": ("temperature", "keep"), "rso": ("temperature", "keep", "loss", "beta", "rejection_beta"),
    "conditioned": ("temperature", "want"), "iterative_dpo": ("temperature", "loss", "beta"),
}  # fmt: skip
PAIRED, FROM_SFT = ("rso", "iterative_dpo"), ("rso", "conditioned")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig(Stage):
    freezes: ClassVar[bool] = True
    sft: str = "runs/gold/sft"
    """the policy to start from, and DPO's frozen reference"""
    reward_model: str = "runs/gold/reward_model"
    """scores whole answers"""
    method: Method = "raft"
    """what becomes of the scores; every method has defaults of its own"""
    n: int = 4
    """answers to each prompt"""
    keep: int = 1
    """answers kept of the n: raft trains on them, rso makes keep/2 pairs of them"""
    iterations: int = 60
    """buffers of batch-size answers; each gives epochs x minibatches updates"""
    epochs: int = 1
    """passes over what was chosen in an iteration"""
    minibatches: int = 1
    """updates per pass"""
    temperature: float = 1.0
    """of the rollouts; held-out prompts are answered at 1"""
    loss: Literal["dpo", "hinge"] = "dpo"
    """rso, iterative_dpo: the loss over pairs, RSO's sigmoid-norm or its hinge-norm"""
    beta: float = 0.1
    """rso, iterative_dpo: the loss's strength of the KL constraint"""
    rejection_beta: float = 0.5
    """rso: temperature of the rejection sampling, in units of the score"""
    want: float = 2.0
    """conditioned: the score asked for in the end, in standard deviations above the SFT policy's mean"""
    eval_every: int = 5
    """iterations between evaluations; 0: only at the end"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("n", "keep", "iterations", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("temperature", "beta", "rejection_beta"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}.")
        for name in ("temperature", "keep", "loss", "beta", "rejection_beta", "want"):
            value = getattr(self, name)
            if name not in TAKES[self.method] and value != type(self).__dataclass_fields__[name].default:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {value} has no effect: --method {self.method} does not take it.")
        if self.keep > self.n:
            raise UserError(f"--keep {self.keep} is more than the --n {self.n} answers to a prompt.")
        if self.method == "rso" and self.keep % 2:
            raise UserError(f"--method rso makes pairs of what it keeps: --keep must be even, not {self.keep}.")
        if self.method == "iterative_dpo" and self.n < 2:
            raise UserError("--method iterative_dpo needs an --n of 2 or more: the best and the worst answer.")
        if self.method != "best_of_n" and (self.batch_size % self.n or self.rows % self.minibatches):
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into --n {self.n} answers a prompt, or what is chosen "
                f"of them into --minibatches {self.minibatches}."
            )

    @property
    def rows(self) -> int:
        """What an iteration trains on: answers, or pairs."""
        of_prompt = {"raft": self.keep, "rso": self.keep // 2, "conditioned": self.n}.get(self.method, 1)
        return self.batch_size // self.n * of_prompt

    @property
    def updates(self) -> int:
        return self.iterations * self.epochs * self.minibatches


# ---------------------------------------------------------------------------------------------- choosing


class Labels(NamedTuple):
    """The texts that conditioned SFT writes behind a prompt: row i for normalised scores between edges i-1 and i."""

    edges: jax.Array  # float32 [K - 1]
    tokens: jax.Array  # int32 [K, L]
    valid: jax.Array  # bool [K, L]


def make_labels(task, model: Model) -> Labels:
    """The score as text; in the gold world the third it is in, as one of the three ids that nothing else uses."""
    if model.tokenizer is None:
        ids = np.arange(gold.PAD + 1, gold.VOCAB_SIZE, dtype=np.int32)[:, None]
        return Labels(np.float32([-0.43, 0.43]), ids, np.ones(ids.shape, bool))
    hundredths = np.arange(-300, 301)
    texts = model.tokenizer.encode_all([f" <rm_score>: {x / 100:.2f}\n" for x in hundredths])
    length = max(map(len, texts))
    tokens = np.array([[task.pad_id] * (length - len(x)) + x for x in texts], np.int32)
    valid = np.arange(length) >= length - np.array([len(x) for x in texts])[:, None]
    return Labels((hundredths[1:] / 100 - 0.005).astype(np.float32), tokens, valid)


def labelled(prompts: Prompts, labels: Labels, scores: jax.Array) -> Prompts:
    """Prompts with the texts of the normalised scores behind them, padded on the left."""
    index = jnp.searchsorted(labels.edges, scores)
    texts = (jnp.take(x, index, axis=0) for x in labels[1:])
    tokens, valid = (jnp.concatenate(both, axis=1) for both in zip(prompts, texts, strict=True))
    order = jnp.argsort(valid, axis=1, stable=True)
    return Prompts(*(jnp.take_along_axis(x, order, axis=1) for x in (tokens, valid)))


def accepted(key: jax.Array, scores: jax.Array, *, beta: float, k: int) -> jax.Array:
    """The first k answers that rejection sampling accepts, pass after pass over those that are left; int [..., k]."""
    left, passed = jnp.ones(scores.shape, bool), jnp.full(scores.shape, k, jnp.int32)
    for number in range(k):  # each accepts one at least
        kept = losses.rejection_sample(jax.random.fold_in(key, number), scores, left, beta=beta)
        left, passed = left & ~kept, jnp.where(kept, number, passed)
    return jnp.argsort(passed, axis=-1, stable=True)[..., :k]


def choose(config: SelectionConfig, scores: jax.Array, key: jax.Array) -> jax.Array:
    """Which rows of the buffer to train on, by scores [prompts, n]: [rows] or, of (chosen, rejected), [rows, 2]."""
    first = jnp.arange(0, scores.size, config.n)[:, None]
    if config.method == "conditioned":
        return jnp.arange(scores.size)
    if config.method == "raft":
        kept = losses.top_answers(scores, k=config.keep)
        return (first + jnp.argsort(~kept, axis=-1, stable=True)[:, : config.keep]).reshape(-1)
    if config.method == "iterative_dpo":
        return first + jnp.stack([losses.best_of_n(scores), losses.best_of_n(-scores)], axis=-1)
    pairs = accepted(key, scores, beta=config.rejection_beta, k=config.keep)
    better = jnp.argsort(-jnp.take_along_axis(scores, pairs, axis=-1).reshape(-1, 2), axis=-1, stable=True)
    return jnp.take_along_axis((first + pairs).reshape(-1, 2), better, axis=-1)


@functools.cache
def collector(
    config: SelectionConfig, policy: LlamaConfig, reward: LlamaConfig, head: str, eos_id: int, pad_id: int, mesh
):
    """Program: weights to sample from, reward model, reference (of pairs), Labels (of conditioned SFT), Prompts (each n
    times), key -> the batches of an iteration's updates, metrics."""
    sampling = SamplingConfig(config.lengths.response, temperature=config.temperature)
    sampler = programs.sampler(policy, sampling, eos_id, pad_id, mesh)
    score, logps = programs.scores(reward, head, mesh), programs.pair_logps(policy, mesh)

    def collect(params, reward_params, reference, labels, prompts: Prompts, key):
        draw, pick = jax.random.split(key)
        seqs, _ = sampler(params, prompts, jax.random.split(draw, config.batch_size))
        scores = score(reward_params, seqs)
        index, tokens = choose(config, scores.reshape(-1, config.n), pick), seqs.tokens[:, -seqs.mask.shape[1] :]
        metrics = {
            "score": jnp.mean(scores),
            "chosen_score": jnp.mean(scores[index if index.ndim == 1 else index[:, 0]]),
            "length": jnp.mean(jnp.sum(seqs.mask, axis=-1, dtype=jnp.float32)),
            "ended": jnp.mean(jnp.any((tokens == eos_id) & seqs.mask, axis=-1), dtype=jnp.float32),
        }
        if labels is not None:
            values = losses.reward_labels(scores, jnp.ones(scores.shape, bool))
            seqs = answered(labelled(prompts, labels, values), seqs)
        if index.ndim == 1:
            batch = jax.tree.map(lambda x: x[index], seqs)
        else:
            pairs = Pairs(*(jax.tree.map(lambda x, i=i: x[index[:, i]], seqs) for i in (0, 1)))
            batch = PairsWithReference(pairs, *logps(reference, pairs))
            metrics["rejected_score"] = jnp.mean(scores[index[:, 1]])
        parts = config.minibatches
        return tuple(jax.tree.map(lambda x, i=i: x[i::parts], batch) for i in range(parts)), metrics

    return jax.jit(collect, out_shardings=(batch_sharding(mesh), replicated(mesh)))


def answered(prompts: Prompts, seqs: Sequences) -> Sequences:
    """The same answers behind other prompts."""
    numpy = np if isinstance(seqs.mask, np.ndarray) else jnp
    tokens = numpy.concatenate([prompts.tokens, seqs.tokens[:, -seqs.mask.shape[1] :]], axis=1)
    return Sequences(tokens, numpy.concatenate([prompts.valid, seqs.mask], axis=1), seqs.mask)


# ---------------------------------------------------------------------------------------------- a run


def _programs(
    config: SelectionConfig, policy: LlamaConfig, reward: LlamaConfig, head: str, eos_id: int, pad_id: int, mesh
):
    """Collector, train step, and the abstract state that it trains."""
    same = dict(out="", data="", sft="", reward_model="", seed=0, resume=False)  # no reason to compile again
    kind = "dpo" if config.method in PAIRED else "sft"
    options = (("loss", config.loss), ("beta", config.beta)) if kind == "dpo" else ()
    return (
        collector(dataclasses.replace(config, **same), policy, reward, head, eos_id, pad_id, mesh),
        programs.supervised_step(kind, policy, "lm", config.optim, config.updates, config.micro_batches, mesh, options),
        programs.abstract_state(policy, "lm", config.optim, config.updates, mesh),
    )


def check(config: SelectionConfig, mesh) -> None:
    check_batch(config.batch_size, mesh, "--batch-size")
    if config.method != "best_of_n":
        check_batch(config.batch_size // config.n, mesh, "the prompts of an iteration,")
        check_batch(config.rows // config.minibatches, mesh, "a mini-batch of", config.micro_batches)


def dry_run(config: SelectionConfig) -> None:
    mesh = abstract_mesh(config.mesh)
    check(config, mesh)
    policy, reward = (config.levers(SIZES[name]) for name in (config.policy_size, config.reward_size))
    lm, rm = (
        programs.abstract_params(dataclasses.replace(size, param_dtype="float32"), head, mesh, config.frozen_dtype)
        for size, head in ((policy, "lm"), (reward, "last"))
    )
    rows = abstract_rows(config.batch_size, config.lengths.prompt, config.lengths.response)
    prompts = Prompts(*(jax.ShapeDtypeStruct((config.batch_size, config.lengths.prompt), x.dtype) for x in rows[:2]))
    if config.method == "best_of_n":
        jax.eval_shape(programs.scores(reward, "last", mesh), rm, rows)
        return report_shapes(config.method, mesh, {"policy": lm, "reward model": rm}, (), {}, {})
    collect, step, state = _programs(config, policy, reward, "last", 1, 0, mesh)
    lora, labels = config.lora.rank > 0, None
    if config.method == "conditioned":
        labels = Labels(*(jax.ShapeDtypeStruct(*x) for x in (((2,), jnp.float32), ((3, 1), jnp.int32), ((3, 1), bool))))
    base = lm if lora else None
    sampled = lm if config.method in FROM_SFT else over(base, state.params)
    key = jax.eval_shape(lambda: jax.random.key(0))
    parts, metrics = jax.eval_shape(collect, sampled, rm, lm if config.method in PAIRED else None, labels, prompts, key)
    _, updated = jax.eval_shape(step, state, parts[0], base)
    kind = "dpo" if config.method in PAIRED else "sft"
    objective = programs.objective(kind, policy, "lm", (("beta", config.beta),) if kind == "dpo" else (), mesh)
    part = first_rows(parts[0], config.rows // config.minibatches // config.micro_batches)
    kept = kept_activations(objective, over(base, state.params), part, mesh)
    trees = {"policy, trained": state, "base" if lora else "SFT": lm, "reward model": rm}
    report_shapes(config.method, mesh, trees, metrics | updated, {"policy, trained": config.optim.gradients}, kept)


class Judge(NamedTuple):
    """What an answer is worth: the fixed models of a run, and rows of held-out prompts."""

    config: SelectionConfig
    task: Any
    sft: Model
    reference: Params
    score_fn: Callable
    reward: Params
    labels: Labels | None

    def prompts(self) -> Prompts:
        """Held out. In the gold world those of the exact score."""
        config, task = self.config, self.task
        n = config.gold.rollouts if self.sft.tokenizer is None else config.eval_size
        return take(task.prompts(task.evaluation_splits()[0]), n, config.seed)

    def sample(self, params: Params, prompts: Prompts) -> Sequences:
        """Every policy draws with the same random numbers."""
        config = self.config
        sampling = SamplingConfig(config.lengths.response)
        size = config.batch_size if self.sft.tokenizer else 1024
        return sample_rows(self.task, self.sft.config, params, prompts, config.seed, sampling, size)

    def asked(self, prompts: Prompts) -> Prompts:
        """What the trained policy is shown."""
        if self.labels is None:
            return prompts
        want = np.full(len(prompts.tokens), self.config.want, np.float32)
        return jax.tree.map(np.asarray, labelled(prompts, self.labels, want))

    def scores(self, seqs: Sequences) -> np.ndarray:
        rows = self.config.batch_size
        return map_rows(lambda batch: self.score_fn(self.reward, batch), seqs, rows, self.task.mesh)

    def logps(self, params: Params, seqs: Sequences) -> np.ndarray:
        """log pi(y|x) of whole answers."""
        run = programs.response_logps(self.sft.config, self.task.mesh)
        return map_rows(lambda batch: run(params, batch), seqs, self.config.batch_size, self.task.mesh).sum(1)

    def figures(self, params: Params, prompts: Prompts, shown: Prompts) -> dict[str, float]:
        """Of a policy that is shown something; gold: the exact score."""
        config, task = self.config, self.task
        if self.sft.tokenizer:
            seqs = self.sample(params, shown)
            plain = answered(prompts, seqs)
            kl = self.logps(params, seqs) - self.logps(self.reference, plain)
            return summary(task, plain, self.scores(plain), kl)
        if self.labels is None:
            return task.score(self.sft.config, params, config.seed)
        seqs = task.sample(self.sft.config, params, shown, config.seed)
        logits = map_rows(
            lambda batch: programs.response_logits(self.sft.config, task.mesh)(params, batch), seqs, 1024, task.mesh
        )
        return task.world.score(logits, prompts.tokens, seqs.tokens[:, -seqs.mask.shape[1] :], seqs.mask)

    def best_of(self, n: int, prompts: Prompts, seqs: Sequences, scores: np.ndarray) -> tuple[dict, Sequences]:
        """Figures of the best of the first n of each prompt's answers, and these answers.

        Of its KL only a bound is known: KL(best of n, pi0) <= log n - (n-1)/n + E[log sft - log pi0] over the answers
        chosen, so J_bound and share_bound are too low, up to the noise of that mean.
        """
        groups = scores.reshape(len(prompts.tokens), -1)
        best = np.arange(len(groups)) * groups.shape[1] + np.asarray(losses.best_of_n(groups[:, :n]))
        chosen, bound = jax.tree.map(lambda x: x[best], seqs), float(losses.best_of_n_kl_bound(n))
        if self.sft.tokenizer:
            found = summary(self.task, chosen, scores[best], np.full(len(best), bound))
            found = {key: x for key, x in found.items() if key not in ("kl", "kl_se")} | {"kl_bound": bound}
            return found | {"n_answers": n}, chosen
        world, length = self.task.world, chosen.mask.shape[1]
        rows = prompts.tokens, chosen.tokens[:, -length:], chosen.mask
        tables = world.policy_logps(world.log_pi0, *rows)
        actions = np.where(chosen.mask, rows[1], 0)
        log_pi0 = np.where(chosen.mask, np.take_along_axis(tables, actions[..., None], 2)[..., 0], 0).sum(1)
        returns, drift = world.returns(*rows).astype(np.float64), self.logps(self.reference, chosen) - log_pi0
        solution, kl = world.solve(), bound + float(drift.mean())
        value = float(returns.mean()) - world.beta * kl
        se = {"gold_return": returns, "kl_bound": drift, "J_bound": returns - world.beta * drift}
        return {
            "n_answers": n, "gold_return": float(returns.mean()), "score": float(scores[best].mean()),
            "kl_to_sft_bound": bound, "kl_bound": kl, "J_bound": value,
            "share_bound": (value - solution.J0) / (solution.Jstar - solution.J0),
            "length": float(chosen.mask.sum(1).mean()),
        } | {f"{key}_se": float(x.std(ddof=1) / len(x) ** 0.5) for key, x in se.items()}, chosen  # fmt: skip


def run(config: SelectionConfig) -> dict[str, Any]:
    """Figures of the method's policy. Writes what RL stages write; best of n, which has no policy, no checkpoint."""
    if config.dry_run:
        return dry_run(config)
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    sft, reward = open_model(config.sft, config, "--sft"), open_model(config.reward_model, config, "--reward-model")
    same_tokenizer(sft, ("--reward-model", reward))
    if reward.head == "lm":
        raise UserError(f"--reward-model {config.reward_model} is a language model, without a scalar head.")
    task = make_task(config, mesh, sft)
    reference, rewards = frozen(sft.load(mesh), config, mesh), frozen(reward.load(mesh), config, mesh)
    labels = make_labels(task, sft) if config.method == "conditioned" else None
    judge = Judge(config, task, sft, reference, programs.scores(reward.config, reward.head, mesh), rewards, labels)
    result, figures, plain, chosen = (best_of_n if config.method == "best_of_n" else train)(config, judge, reward, mesh)
    rows = jax.tree.map(lambda x: x[:8], judge.prompts())
    texts = [answers(task, rows, found) for found in (plain, chosen)]
    shown = [{"prompt": x, "texts": {"SFT": a, config.method: b}} for (x, a), (_, b) in zip(*texts, strict=True)]
    write_json(result.out / "samples.json", shown)
    curves = {
        "score": "reward model's score", "chosen_score": "score of the chosen", "loss": "loss",
        "length": "length, tokens", "eval_share": "share of the exact optimum",
        "eval_score": "score on held-out prompts",
    }  # fmt: skip
    stage_page(result.out, config.method, curves, figures)
    write_json(result.out / "results.json", figures)  # last: it stands for the end
    return figures


def best_of_n(config: SelectionConfig, judge: Judge, reward: Model, mesh):
    """Figures at n and, under "frontier", at 1, 2, 4 … of the same answers; the first eight before and after."""
    with open_run(config, config.method, None, lambda: None, None) as result:
        prompts = judge.prompts()
        seqs = judge.sample(judge.reference, repeat(prompts, config.n))
        scores = judge.scores(seqs)
        sizes = sorted({2**i for i in range(config.n.bit_length())} | {config.n})
        found = [judge.best_of(n, prompts, seqs, scores) for n in sizes]
        figures, chosen = found[-1]
        result.log.push(0, {key: x for key, x in figures.items() if not key.endswith("_se")})
        result.log.flush()
        keep_returns(judge, result.out, prompts, chosen)
    first = lambda rows: jax.tree.map(lambda x: x[:8], rows)  # noqa: E731
    return result, figures | {"frontier": [row for row, _ in found]}, first(found[0][1]), first(chosen)


def keep_returns(judge: Judge, out, prompts: Prompts, seqs: Sequences) -> None:
    """The answers' gold returns, where `study.gold_returns` looks: there is no saved model to sample them from."""
    if judge.sft.tokenizer is None and jax.process_index() == 0:
        tokens = seqs.tokens[:, -seqs.mask.shape[1] :]
        np.save(out / "returns-1.npy", judge.task.world.returns(prompts.tokens, tokens, seqs.mask))


def train(config: SelectionConfig, judge: Judge, reward: Model, mesh):
    """The exact score (text: `summary`) of the trained policy; the first eight answers before and after."""
    sft, task, reference, labels = judge.sft, judge.task, judge.reference, judge.labels
    ids = task.eos_id, task.pad_id
    collect, update, abstract = _programs(config, sft.config, reward.config, reward.head, *ids, mesh)
    base = reference if config.lora.rank else None
    prompts, asked = judge.prompts(), judge.asked(judge.prompts())
    batches = stream_batches(task.prompts("train"), config, mesh, group_size=config.n)

    def fresh():
        return programs.start(sft.config, "lm", config.optim, config.updates, mesh)(to_train(sft, config, mesh))

    def step(state, batch, number):
        params = reference if config.method in FROM_SFT else over(base, state.params)
        ranked = reference if config.method in PAIRED else None
        parts, metrics = collect(params, judge.reward, ranked, labels, batch, stream(config.seed, "rollout", number))
        for part in parts * config.epochs:
            state, updated = update(state, part, base)
        return state, metrics | updated  # of the last update

    def evaluate(state) -> dict[str, float]:
        found = judge.figures(over(base, state.params), prompts, asked)
        return {key: value for key, value in found.items() if not key.endswith("_se") and key != "n"}

    def place(batch: Prompts) -> Prompts:
        return put_batch(repeat(batch, config.n), mesh)

    with open_run(config, config.method, abstract, fresh, batches) as result:
        state = loops.train(
            step, result.state, loops.python_iterator(batches, place),
            start=result.start, steps=config.iterations, name=config.method, log=result.log,
            checkpointer=result.checkpointer, save_every=config.save_every, stop=PREEMPTION.asked,
            programs=(collect, update), evaluate=evaluate, evaluate_every=config.eval_every,
        )  # fmt: skip
    policy = over(base, state.params)
    if config.method == "conditioned":  # a later stage would not ask for a score: no model.json
        keep_returns(judge, result.out, prompts, judge.sample(policy, asked))
    else:
        describe_model(result.out, config, sft, "lm")
    figures = judge.figures(policy, prompts, asked)
    if sft.tokenizer:
        figures["SFT"] = judge.figures(reference, prompts, prompts)
    first = [jax.tree.map(lambda x: x[:8], rows) for rows in (prompts, asked)]
    return result, figures, judge.sample(reference, first[0]), judge.sample(policy, first[1])


# ---------------------------------------------------------------------------------------------- presets

METHODS = {
    # beta is the world's own; the rest is the best of three settings each, by the exact share with seed 0.
    "gold": {
        "best_of_n": dict(n=16),
        "raft": dict(n=4, optim=OptimConfig(learning_rate=5e-4)),
        "rso": dict(n=4, keep=2, epochs=4, beta=0.5, optim=OptimConfig(learning_rate=2e-3)),
        "conditioned": dict(n=1, epochs=4, minibatches=4, optim=OptimConfig(learning_rate=2e-3)),
        "iterative_dpo": dict(n=2, minibatches=2, beta=0.5, optim=OptimConfig(learning_rate=2e-3)),
    },
    "smollm2": {
        "best_of_n": dict(n=4),
        "raft": dict(n=4, optim=OptimConfig(learning_rate=1e-5)),
        "rso": dict(n=4, keep=2, optim=OptimConfig(learning_rate=5e-6)),
        "conditioned": dict(n=1, minibatches=2, optim=OptimConfig(learning_rate=1e-5)),
        "iterative_dpo": dict(n=4, optim=OptimConfig(learning_rate=5e-6)),
    },
    # n, batches of 128 and learning rates of RAFT, conditioned SFT and iterative DPO: OpenRLHF (whose RAFT has
    # 10 iterations of 40,960 answers). RSO's prompts must divide over 64 devices: 16 answers to each, not 64.
    "paper": {
        "best_of_n": dict(n=64),
        "raft": dict(n=4, minibatches=2, optim=OptimConfig(learning_rate=2e-6)),
        "rso": dict(n=16, keep=4, optim=OptimConfig(learning_rate=5e-7)),
        "conditioned": dict(n=1, minibatches=8, optim=OptimConfig(learning_rate=5e-6)),
        "iterative_dpo": dict(n=8, optim=OptimConfig(learning_rate=5e-7)),
    },
}  # fmt: skip


def presets(method: str) -> dict[str, tuple[str, SelectionConfig]]:
    """Of one method, with RL's starting points, prompts and number of rollouts."""
    shared = {f.name for f in dataclasses.fields(Stage)} | {"sft", "reward_model", "iterations", "eval_every"}
    found = {}
    for name, own in METHODS.items():
        rl = {key: x for key, x in COMMON[name].items() if key in shared}
        found[name] = ABOUT[name], SelectionConfig(out=f"runs/{name}/{method}", method=method, **rl | own[method])
    return found


def chosen_method(argv: list[str]) -> str:
    """The value of --method, by which the defaults are chosen; raft where it is none or another word."""
    words = " ".join(argv).replace("=", " ").split()
    value = dict(itertools.pairwise(words)).get("--method")
    return value if value in get_args(Method) else "raft"


PRESETS = presets("raft")

if __name__ == "__main__":
    main(presets(chosen_method(sys.argv)), run, __doc__)
