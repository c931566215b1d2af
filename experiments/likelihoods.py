"""From r to Q*'s Figure 3: implicit rewards while DPO trains, after SFT on the chosen answers, on both, and after none.

    python -m experiments.likelihoods               5 seeds of the embedded world, 16 minutes on 2 cores
    python -m experiments.likelihoods --cheap       a minute: one seed, hardly any steps
    python -m experiments.likelihoods --draw        from results/likelihoods/gold.json alone

The implicit reward of an answer is β log π(y|x)/π_ref(y|x), 0 when DPO begins. Its mean over π_ref's own answers is
−β KL(π_ref ‖ π) ≤ 0 whatever π is (arXiv 2404.12358, eq. 16), so it must fall while DPO learns anything. The paper (TL;DR,
Pythia-2.8B; no numbers in the text) says: after SFT on the chosen answers these are π_ref's own, so the chosen ones' implicit
reward falls too, to that KL, while the margin grows; without SFT there is no clear trend, and the chosen ones stay above 0.

Here all arms learn from the same pairs of each seed, whose answers are the SFT model's. "No SFT" starts at a model that has
seen PRETRAINING of its updates: it writes the language, but not these answers; the two SFTs start there too.
Every EVERY updates: the mean implicit reward of held-out chosen and rejected answers and, of new answers of π_ref each time,
the mean implicit reward beside the exact −β Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) of the same states. Their difference has mean 0
if eq. 16 holds, so it is given in its standard errors.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments import dpo, sft
from experiments.common import Model, describe_model, open_model, to_train, write_json
from experiments.study import (
    COLOURS,
    MARKERS,
    PRESETS,
    Arm,
    Table,
    base_arms,
    column,
    command,
    drawing,
    interval,
    markdown,
    numbers,
    over_seeds,
    runs,
    shown,
)  # fmt: skip
from experiments.supervised import run_supervised
from experiments.tasks import Source, make_task, map_rows, sample_rows, stream_batches, take
from rto_jax import losses, programs
from rto_jax.checkpoint import restore_params
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import make_mesh, put_batch

STAGE = "experiments.likelihoods"
PRETRAINING, TUNING, EVERY = 30, 300, 32  # updates
KEYS = ("chosen", "rejected", "margin", "accuracy", "sampled", "exact", "deviation", "deviation_se")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig(sft.SftConfig):
    sampler: str = "runs/gold/sft"
    """the model whose answers the pairs are of"""
    answers: Literal["chosen", "both"] = "chosen"
    """the answers of the pairs that are learnt"""


@dataclass(frozen=True, kw_only=True)
class FollowedConfig(dpo.DpoConfig):
    sampler: str = "runs/gold/sft"
    """the model whose answers the pairs are of"""


def learn(config: sft.SftConfig, model: Model, examples: Callable[[Any], Source]) -> dict:
    """SFT of `model` on the rows that `examples` makes of the gold world's task; the figures that `sft.run` leaves."""
    mesh = make_mesh(config.mesh)
    task = make_task(config, mesh, model)
    result, params = run_supervised(
        config, "sft", model, "lm", config.optim, config.steps, stream_batches(examples(task), config, mesh),
        lambda batch: put_batch(batch, mesh), lambda mesh: to_train(model, config, mesh), mesh,
    )  # fmt: skip
    describe_model(result.out, config, model, "lm")
    figures = task.score(model.config, params, config.seed)
    write_json(result.out / "results.json", figures)
    return figures


def run(config: AnswersConfig | FollowedConfig) -> dict:
    if isinstance(config, FollowedConfig):
        return dpo.run(config, config.sampler)

    def examples(task) -> Source:
        pairs = task.pairs("train", open_model(config.sampler, config, "--sampler")).rows
        return Source(pairs.chosen if config.answers == "chosen" else jax.tree.map(lambda *x: np.concatenate(x), *pairs))

    return learn(config, open_model(config.model, config, "--model"), examples)


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    sampler, fields = {"sampler": base["SFT"]}, lambda config: vars(config) | {"out": ""}
    before = base["SFT"].changed(steps=PRETRAINING)
    tuned = AnswersConfig(**fields(base["SFT"].config)), {"model": before} | sampler
    learnt = lambda answers: Arm(STAGE, dataclasses.replace(tuned[0], steps=TUNING, answers=answers), tuned[1])  # noqa: E731
    followed = FollowedConfig(**fields(base["DPO"].config) | {"save_every": EVERY, "keep": base["DPO"].config.steps})
    references = {"SFT on chosen": learnt("chosen"), "SFT on both": learnt("both"), "no SFT": before}
    return {name: Arm(STAGE, followed, {"init": init} | sampler) for name, init in references.items()}


# ---------------------------------------------------------------------------------------------- evaluation


def evaluated(config: dpo.DpoConfig) -> list[int]:
    """The steps that are evaluated: 0, and those that a checkpoint is written after."""
    return sorted({0, config.steps, *range(config.save_every, config.steps, config.save_every)})


@functools.cache
def _rewards():
    """Program: logits of policy and reference, tokens, mask, β -> implicit reward and its mean under π_ref, two [B]."""

    def rewards(logits, ref_logits, tokens, mask, beta):
        tokens = jax.numpy.where(mask, tokens, 0)
        ours, theirs = losses.token_logps(logits, tokens), losses.token_logps(ref_logits, tokens)
        implicit = losses.implicit_token_rewards(ours, theirs, mask, beta=beta)
        expected = losses.expected_implicit_rewards(logits, ref_logits, beta=beta)
        return losses.masked_sum(implicit, mask, axis=-1), losses.masked_sum(expected, mask, axis=-1)

    return jax.jit(rewards)


def identity(logits, ref_logits, tokens: np.ndarray, mask: np.ndarray, *, beta: float) -> dict[str, float]:
    """Both sides of eq. 16 on answers of π_ref, means over the answers, reward units.

    sampled: of Σ_t β log π/π_ref of their tokens; exact: of −β Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) in their states;
    deviation: sampled − exact, whose mean over answers of π_ref is 0, and its standard error.
    logits, ref_logits: [B, T, V] of the states before tokens [B, T]; mask: bool [B, T]. At least two answers.
    """
    sampled, exact = (np.asarray(x, float) for x in _rewards()(logits, ref_logits, tokens, mask, beta))
    off = sampled - exact
    return {
        "sampled": float(sampled.mean()), "exact": float(exact.mean()),
        "deviation": float(off.mean()), "deviation_se": float(off.std(ddof=1) / np.sqrt(len(off))),
    }  # fmt: skip


def follow(arm: Arm, base: Path, seed: int) -> dict[str, list[float]]:
    """KEYS at every evaluated step of one run, from its checkpoints; kept beside them."""
    folder = base / f"seed{seed}" / arm.folder
    file = folder / "likelihoods.json"
    if file.exists():
        return json.loads(file.read_text())
    at = {flag: str(base / f"seed{seed}" / other.folder) for flag, other in arm.upstream.items()}
    stage = dataclasses.replace(arm.config, out="", seed=seed, **at)
    mesh = make_mesh(stage.mesh)
    model = open_model(stage.init, stage, "--init")
    task, reference = make_task(stage, mesh, model), model.load(mesh)
    pairs = take(task.pairs("test", open_model(stage.sampler, stage, "--sampler")), stage.eval_size, seed)
    prompts = take(task.prompts("test"), stage.gold.rollouts, seed)
    sums, logits = programs.pair_logps(model.config, mesh), programs.response_logits(model.config, mesh)
    abstract = programs.abstract_params(model.config, "lm", mesh)
    ref_sums = map_rows(lambda batch: sums(reference, batch), pairs, stage.batch_size, mesh)
    found: dict[str, list[float]] = {key: [] for key in KEYS}
    for step in evaluated(stage):
        params = restore_params(folder / "checkpoints", abstract, step=step) if step else reference
        ours = map_rows(lambda batch, params=params: sums(params, batch), pairs, stage.batch_size, mesh)
        chosen, rejected = (stage.beta * (np.asarray(x, float) - y) for x, y in zip(ours, ref_sums, strict=True))
        draw = zlib.crc32(f"{arm.folder} {seed} {step}".encode()) % 2**31  # new answers each time: deviations are independent
        answers = sample_rows(task, model.config, reference, prompts, draw, SamplingConfig(task.world.horizon), 1024)
        own, theirs = (
            map_rows(lambda batch, weights=weights: logits(weights, batch), answers, 1024, mesh) for weights in (params, reference)
        )
        row = {
            "chosen": float(chosen.mean()), "rejected": float(rejected.mean()), "margin": float((chosen - rejected).mean()),
            "accuracy": float(np.mean(chosen > rejected)),
        }  # fmt: skip
        row |= identity(own, theirs, answers.tokens[:, -answers.mask.shape[1] :], answers.mask, beta=stage.beta)
        for key in KEYS:
            found[key].append(row[key])
    write_json(file, found)
    return found


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    config = next(iter(arms.values())).config
    followed = {name: [follow(arm, base, seed) for seed in numbers(seeds)] for name, arm in arms.items()}
    before = {name: arm.upstream["init"] for name, arm in arms.items()}
    return {
        "beta": config.beta, "answers": config.gold.rollouts, "steps": evaluated(config), "followed": followed,
        "arms": runs(arms, base, seeds), "references": runs(before, base, seeds),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- drawing


def deviations(followed: dict) -> np.ndarray:
    """Of all evaluations of an arm where policy and reference differ: the deviation in standard errors, [seeds, steps]."""
    of, error = (np.array([run[key][1:] for run in followed]) for key in ("deviation", "deviation_se"))
    return of / error


def draw(found: dict, folder: Path) -> str:
    steps, followed = found["steps"], found["followed"]
    of = lambda name, key: np.array([run[key] for run in followed[name]])  # noqa: E731
    lines = {"chosen": "chosen answers", "rejected": "rejected answers", "exact": "π_ref's answers: −β KL(π_ref ‖ π)"}
    with drawing(folder / "gold.svg", len(followed) + 1, 3.1) as panels:
        for panel, name in zip(panels, followed, strict=False):
            for number, (key, label) in enumerate(lines.items()):
                values, style = of(name, key), dict(color=COLOURS[number])
                panel.plot(steps, values.mean(0), label=label, marker=MARKERS[number], ms=3, **style)
                panel.fill_between(steps, values.min(0), values.max(0), alpha=0.12, linewidth=0, **style)
            panel.axhline(0, color="#777777", ls=":", lw=1)
            panel.set(title=name, xlabel="updates of DPO")
        low, high = min(p.get_ylim()[0] for p in panels[:-1]), max(p.get_ylim()[1] for p in panels[:-1])
        for panel in panels[:-1]:
            panel.set_ylim(low, high)
        panels[0].set_ylabel("mean implicit reward")
        panels[0].legend()
        for number, name in enumerate(followed):
            for off in deviations(followed[name]):
                panels[-1].plot(steps[1:], off, ls="", marker=MARKERS[number], ms=3, alpha=0.6, color=COLOURS[number])
        panels[-1].axhspan(-1.96, 1.96, color="#777777", alpha=0.12, linewidth=0)
        panels[-1].set(title="eq. 16: (sampled − exact)/SE", xlabel="updates of DPO")
    ends = {name: {key: list(of(name, key)[:, -1]) for key in KEYS} for name in followed}
    rows = [
        [
            name, shown(interval(column(found["references"], name, "share")), 3), shown(interval(end["chosen"])),
            shown(interval(end["rejected"])), shown(interval(end["margin"])), shown(interval(end["exact"])),
            shown(interval(end["chosen"], end["exact"])), shown(interval(column(found["arms"], name, "share")), 3),
        ]
        for name, end in ends.items()
    ]  # fmt: skip
    head = ("start", "its share of the optimum", "chosen", "rejected", "margin", "−β KL(π_ref ‖ π)", "chosen less that", "share after DPO")
    text = markdown(head, rows) + f"\n\nImplicit rewards, β = {found['beta']:g}, after {steps[-1]} updates of DPO."
    text += over_seeds(len(ends["no SFT"]["chosen"])).replace("\n\n", " ") + "\n\n"
    text += "\n".join(f"- {name}: {verdict(ends[name])}." for name in followed)
    off = np.concatenate([deviations(x).ravel() for x in followed.values()])
    text += f"\n\nEq. 16: of {len(off)} evaluations with {found['answers']} answers of π_ref each, sampled mean and exact KL are within"
    text += f" 1.96 standard errors in {np.mean(np.abs(off) <= 1.96):.1%} (95 % if the identity holds), within {np.abs(off).max():.1f} in all;"
    return text + f" the root mean square of the deviation is {np.sqrt(np.mean(off**2)):.2f} of them, its mean {np.mean(off):.2f}".replace("-", "−") + "."


def verdict(end: dict[str, list[float]]) -> str:
    """What becomes of the chosen answers' implicit reward, and whether the margin grows."""
    chosen, margin = interval(end["chosen"]), interval(end["margin"])
    way = "falls" if chosen.high < 0 else "rises" if chosen.low > 0 else "has no clear trend"
    return f"the chosen answers' implicit reward {way}, the margin {'grows' if margin.low > 0 else 'is undecided'}"


TABLE = Table("likelihoods", arms, collect, draw)

if __name__ == "__main__":
    from experiments import likelihoods  # by its own name, which the runs' configurations go by

    command(likelihoods.TABLE, __doc__, {"gold": PRESETS["gold"]})
