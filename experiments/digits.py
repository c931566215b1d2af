"""Beyond text ("From r to Q*", discussion): pictures of digits as tokens, through the same stages, losses and steps.

    python -m experiments.digits                    2 seeds, one to a core: 10 minutes
    python -m experiments.digits --seeds 5          enough for intervals over the seeds
    python -m experiments.digits --cheap            one seed, hardly any steps
    python -m experiments.digits --draw             from results/digits/gold.json alone
    python -m experiments.sft --data digits --lengths.prompt 1 --lengths.response 64        one stage alone

The paper proposes DPO's token view for image generation; it has no numbers. Here a policy writes the 64 pixels of a digit
that it is asked for (rto_jax/digits.py), and a classifier's log-probability of that digit is the gold reward: a reward of
the whole picture, so that DPO has to find the pixels that it hangs on. SFT on the real digits is the reference; the optimum
of J = gold return - beta·KL(pi || SFT) is exact up to sampling noise, and so is the credit of a part of a picture,
    A* = V*(s') - V*(s),   V*(s) = beta·log E_SFT[exp(R/beta) | s],
from pictures that SFT finishes. Model and losses are those of the embedded world. What would reproduce: every method raises the gold return, the judge that
nothing is trained on agrees, and DPO's credit of a row of pixels goes with the exact one.
"""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from experiments import dpo, reward_model, rl, sft, study
from experiments.common import GoldData, Model, open_model
from experiments.presets import DIGITS
from experiments.study import (
    Arm,
    StudyConfig,
    Table,
    base_arms,
    column,
    controls,
    drawing,
    interval,
    markdown,
    numbers,
    shown,
)
from experiments.tasks import DigitsTask, map_rows, sample_rows
from rto_jax import digits, programs
from rto_jax.data import Lengths
from rto_jax.losses import implicit_token_rewards
from rto_jax.metrics import progress
from rto_jax.optim import OptimConfig
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import make_mesh
from rto_jax.types import Prompts, Sequences

# What differs from the embedded world, the same for every arm. Chosen on seed 0, which is none of the table's (the best first):
# learning rates of SFT 3e-3, 8e-3, 2e-3 (more than 500 steps draw digits that leave little to gain: 800 steps, 77 % recognised),
# of the reward model 5e-4, 3e-4, 1e-3, 4e-3, of DPO 3e-4, 1e-4, 2e-3 (that unlearns the digits); of PPO and RTO, two tries
# each, 1e-3 and 2e-3, as good in the mean of both, so that 2e-3, the embedded world's, stays. BETA 0.2, 0.5: the second keeps
# every policy near SFT.
BETA = 0.2  # of J, of PPO's and RTO's KL penalty, and of DPO; RTO's beta1 is half of it, as in the embedded world
BETA1 = BETA / 2
SETTINGS = {
    sft.__name__: dict(steps=500, batch_size=64, optim=OptimConfig(learning_rate=3e-3)),
    reward_model.__name__: dict(steps=600, optim=OptimConfig(learning_rate=5e-4)),
    dpo.__name__: dict(steps=500, beta=BETA, optim=OptimConfig(learning_rate=3e-4)),
    rl.__name__: dict(iterations=60, eval_every=0, beta2=BETA),
}
FINISHED = 64  # pictures behind the value of a state
SIDE = digits.SIDE


def on_digits(arm: Arm) -> Arm:
    """The gold world's arm, on pictures."""
    common = dict(data=DIGITS, lengths=Lengths(digits.PROMPT_LENGTH, digits.PIXELS), gold=GoldData(0, 16_000, 1_000, 1_000))
    upstream = {flag: on_digits(other) for flag, other in arm.upstream.items()}
    return arm.changed(**common, **SETTINGS[arm.stage])._replace(upstream=upstream)


def arms(preset: str) -> dict[str, Arm]:
    found = {name: on_digits(base_arms(preset)[name]) for name in ("SFT", "DPO", "PPO", "RTO")}
    found["RTO"] = found["RTO"].changed(beta1=BETA1)
    name = "PPO, RTO's temperature"
    return found | {name: controls(found)[name]}


# ---------------------------------------------------------------------------------------------- what policies are worth


class Bench:
    """The models of one seed, and what is measured of them."""

    def __init__(self, arms: dict[str, Arm], base: Path, seed: int):
        self.arms, self.folder, self.seed = arms, base / f"seed{seed}", seed
        self.stage = dataclasses.replace(arms["SFT"].config, out="", seed=seed, data=DIGITS)
        self.mesh = make_mesh(self.stage.mesh)
        self.task = DigitsTask(self.stage, self.mesh)
        self.world, self.beta = self.task.world, arms["PPO"].config.beta2
        models = {name: self.open(arm) for name, arm in arms.items()}
        self.config = models["SFT"].config
        self.params = {name: model.load(self.mesh) for name, model in models.items()}

    def open(self, arm: Arm) -> Model:
        return open_model(str(self.folder / arm.folder), self.stage, "--runs")

    def of_stage(self, arm: Arm) -> dict:
        return json.loads((self.folder / arm.folder / "results.json").read_text())["test"]

    def logits(self, name: str, seqs: Sequences) -> np.ndarray:
        """Log-probabilities of every grey level at every pixel, [n, 64, 20]."""
        run = programs.response_logits(self.config, self.mesh)
        return map_rows(lambda rows: jax.nn.log_softmax(run(self.params[name], rows)), seqs, 1_000, self.mesh)

    def credit(self, seqs: Sequences) -> np.ndarray:
        """DPO's reward of every pixel, beta·log(pi_dpo/pi_ref), [n, 64]."""
        run, beta = programs.response_logps(self.config, self.mesh), self.arms["DPO"].config.beta
        ours, theirs = (lambda rows: run(self.params["DPO"], rows)), (lambda rows: run(self.params["SFT"], rows))
        return map_rows(lambda rows: implicit_token_rewards(ours(rows), theirs(rows), rows.mask, beta=beta), seqs, 1_000, self.mesh)

    def judged(self, seqs: Sequences) -> dict[str, np.ndarray]:
        prompts, pictures = seqs.tokens[:, :1], seqs.tokens[:, 1:]
        seen = {judge: self.world.recognised(prompts, pictures, judge) for judge in digits.Judges._fields}
        return {"gold_return": self.task.returns(seqs), "recognised": seen["gold"], "recognised_other": seen["other"]}

    def figures(self, name: str, seqs: Sequences, optimum: dict[str, float]) -> dict[str, float]:
        """Means over pictures and their standard errors; the KL is exact at every state that was visited."""
        log_pi, log_ref = self.logits(name, seqs), self.logits("SFT", seqs)
        columns = self.judged(seqs) | {"kl": (np.exp(log_pi) * (log_pi - log_ref)).sum((1, 2))}
        columns["J"] = columns["gold_return"] - self.beta * columns["kl"]
        found = {key: float(x.mean()) for key, x in columns.items()}
        found |= {f"{key}_se": float(x.std(ddof=1) / len(x) ** 0.5) for key, x in columns.items()}
        gap = optimum["J"] - optimum["J_reference"]
        return found | {"share": (found["J"] - optimum["J_reference"]) / gap, "share_se": found["J_se"] / gap}

    def optimum(self, seqs: Sequences) -> dict[str, float]:
        """The optimum of J, from pictures of SFT weighted by exp(R/beta); every digit counts the same."""
        columns = {key: x.reshape(-1, 10).astype(float) for key, x in self.judged(seqs).items()}  # [pictures of it, digit]
        returns = columns["gold_return"]
        weights = np.exp(returns / self.beta)  # at most 1
        values = self.beta * np.log(weights.mean(0))
        spread = self.beta * weights.std(0, ddof=1) / weights.mean(0) / len(weights) ** 0.5
        found = {key: float(((weights * x).sum(0) / weights.sum(0)).mean()) for key, x in columns.items()}
        found |= {"J": float(values.mean()), "J_se": float(np.sqrt((spread**2).mean() / 10)), "J_reference": float(returns.mean())}
        return found | {"kl": (found["gold_return"] - found["J"]) / self.beta, "values": values.tolist()}

    def exact_credit(self, seqs: Sequences, start: np.ndarray) -> np.ndarray:
        """A* of every row of pixels, [n, 8], from pictures that SFT finishes; `start`: V* of the ten prompts."""
        n, pictures = len(seqs.tokens), seqs.tokens[:, 1:]
        longest = 1 + digits.PIXELS - SIDE
        prompts, rows = np.zeros((n, SIDE - 1, longest), np.int32), np.arange(1, SIDE)
        for row in rows:
            prompts[:, row - 1, longest - 1 - SIDE * row :] = seqs.tokens[:, : 1 + SIDE * row]
        valid = np.arange(longest) >= (longest - 1 - SIDE * rows)[:, None]
        flat = Prompts(prompts.reshape(-1, longest), np.broadcast_to(valid, prompts.shape).reshape(-1, longest))
        flat = Prompts(*(np.repeat(x, FINISHED, axis=0) for x in flat))
        drawn = sample_rows(self.task, self.config, self.params["SFT"], flat, self.seed, SamplingConfig(digits.PIXELS - SIDE), 1_024)
        first = np.tile(np.repeat(longest - SIDE * rows, FINISHED), n)  # where each picture begins
        whole = np.take_along_axis(drawn.tokens, first[:, None] + np.arange(digits.PIXELS), axis=1)
        returns = self.world.returns(np.repeat(seqs.tokens[:, :1], (SIDE - 1) * FINISHED, axis=0), whole).astype(float)
        inside = self.beta * np.log(np.exp(returns / self.beta).reshape(n, SIDE - 1, FINISHED).mean(-1))
        ends = start[self.world.asked(seqs.tokens[:, :1])][:, None], self.world.returns(seqs.tokens[:, :1], pictures)[:, None]
        return np.diff(np.concatenate([ends[0], inside, ends[1]], axis=1), axis=1)


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    rows: dict[str, list[dict]] = {name: [] for name in [*arms, "exact optimum"]}
    stages: dict[str, list[dict]] = {"reward model": [], "DPO": []}
    with progress(seeds, "judged") as bar:
        for seed in numbers(seeds):
            bench = Bench(arms, base, seed)
            task, n = bench.task, bench.stage.gold.rollouts
            drawn = {name: task.sample(bench.config, params, task.asking(n), seed) for name, params in bench.params.items()}
            many = task.sample(bench.config, bench.params["SFT"], task.asking(80 * (n // 10)), seed + 1_000_000)
            optimum = bench.optimum(many)
            for name, seqs in drawn.items():
                rows[name].append(bench.figures(name, seqs, optimum))
            rows["exact optimum"].append({key: x for key, x in optimum.items() if key != "values"} | {"share": 1.0})
            stages["DPO"].append(bench.of_stage(arms["DPO"]))
            stages["reward model"].append(bench.of_stage(arms["PPO"].upstream["reward_model"]))
            if seed == 1:
                shown_rows = pictures(bench, drawn, many, np.array(optimum["values"]))
            bar.update()
    real, labels = bench.world.real("test")
    prompts = (digits.ASK + labels)[:, None]
    judged = {judge: float(bench.world.recognised(prompts, real, judge).mean()) for judge in digits.Judges._fields}
    judges = judged | {"gold_return": float(bench.world.returns(prompts, real).mean()), "n": len(labels)}
    return {"arms": rows, "stages": stages, "judges": judges, "answers": n, "beta": bench.beta, **shown_rows}


def pictures(bench: Bench, drawn: dict[str, Sequences], many: Sequences, start: np.ndarray) -> dict:
    """What the figure shows, nothing chosen by eye: first samples, and the first of SFT that the judge takes for others."""
    returns, wrong = bench.task.returns(many), ~bench.judged(many)["recognised"]
    kept = np.random.default_rng(bench.seed).random(len(returns)) < np.exp(returns / bench.beta)
    first = lambda mask: [next((i for i in range(d, len(mask), 10) if mask[i]), d) for d in range(10)]  # noqa: E731
    at = lambda seqs, index: jax.tree.map(lambda x: x[index], seqs)  # noqa: E731
    found = {name: seqs.tokens[:10, 1:].tolist() for name, seqs in drawn.items()}
    found["exact optimum"] = many.tokens[first(kept), 1:].tolist()
    examined = at(many, first(wrong) + list(range(10)))
    reading = lambda rows: bench.world.judges.gold.predict(digits.ink(np.array(rows)))  # noqa: E731
    read = reading(examined.tokens[:10, 1:])
    return {
        "pictures": found, "read_as": {name: reading(rows).tolist() for name, rows in found.items()},
        "credit": {
            "pictures": examined.tokens[:, 1:].tolist(), "read_as": read.tolist(),
            "dpo": bench.credit(examined).round(4).tolist(),
            "exact": bench.exact_credit(examined, start).round(4).tolist(),
        },
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- table and figure


def mosaic(rows: list, at: list[int], height: int) -> np.ndarray:
    """Rows of ten pictures in one array whose gaps are NaN; the rows begin at the lines `at` of it."""
    whole = np.full((height, 10 * (SIDE + 1) - 1), np.nan)
    for row, line in zip(rows, at, strict=True):
        for number, picture in enumerate(row):
            whole[line : line + SIDE, number * (SIDE + 1) :][:, :SIDE] = np.reshape(picture, (SIDE, SIDE))
    return whole


def draw(found: dict, folder: Path) -> str:
    credit, names = found["credit"], list(found["pictures"])
    step = SIDE + 1
    lines = [step * i for i in range(len(names))]
    below = [lines[-1] + 2 * step + step * i for i in range(3)]
    height = below[-1] + SIDE
    ours, exact = np.array(credit["dpo"]), np.array(credit["exact"])
    bands = np.repeat(exact / SIDE, SIDE, axis=1)  # a row's credit, spread evenly over its pixels
    limit = float(np.quantile(np.abs(ours[:10]), 0.99))
    with drawing(folder / "gold.svg", 1, 6.6, 5.2) as (axes,):
        wrong = np.array(credit["pictures"])[:10]
        grey = mosaic([*found["pictures"].values(), wrong], [*lines, below[0]], height)
        axes.imshow(grey, cmap="gray_r", vmin=0, vmax=digits.GREYS - 1, interpolation="none")
        image = axes.imshow(
            mosaic([ours[:10], bands[:10]], below[1:], height), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none"
        )
        for line, read in zip(lines, found["read_as"].values(), strict=True):
            for d in np.flatnonzero(np.array(read) != np.arange(10)):
                axes.plot([step * d - 0.5, step * d + SIDE - 0.5], [line + SIDE - 0.1] * 2, color="#D55E00", lw=2, solid_capstyle="butt")
        axes.text(10 * step, -1.5, "recognised", va="bottom", fontsize=8, in_layout=False)
        for line, name in zip(lines, names, strict=True):
            share = np.mean([run["recognised"] for run in found["arms"][name]])
            axes.text(10 * step, line + SIDE / 2 - 0.5, f"{100 * share:.0f} %", va="center", fontsize=8, in_layout=False)
        labels = [*(name.replace("RTO's ", "RTO's\n") for name in names), "SFT, misread as", "DPO's credit", "exact credit\nof rows"]
        axes.set_yticks([line + SIDE / 2 - 0.5 for line in [*lines, *below]], labels)
        axes.set_xticks([step * d + SIDE / 2 - 0.5 for d in range(10)], [str(d) for d in range(10)])
        axes.xaxis.tick_top()
        for d, read in enumerate(credit["read_as"]):
            axes.text(step * d + SIDE / 2 - 0.5, below[0] - 1.5, f"{read}?", ha="center", va="bottom", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.figure.colorbar(image, ax=axes, shrink=0.35, anchor=(0, 0.02), label="reward of a pixel")
    return text(found)


def cell(runs: list[dict], key: str, places: int) -> str:
    """Over the seeds, with an interval; of one seed, with the standard error over its pictures."""
    if len(runs) > 1:
        return shown(interval([run[key] for run in runs]), places)
    error = f" ± {runs[0][f'{key}_se']:.{places}f}" if f"{key}_se" in runs[0] else ""
    return f"{runs[0][key]:.{places}f}".replace("-", "−") + error


def text(found: dict) -> str:
    judges, seeds = found["judges"], len(found["arms"]["SFT"])
    columns = {"gold_return": 2, "kl": 2, "J": 2, "share": 2, "recognised": 3, "recognised_other": 3}
    rows = [[name, *(cell(runs, key, places) for key, places in columns.items())] for name, runs in found["arms"].items()]
    rows.append(["real digits, held out", f"{judges['gold_return']:.2f}".replace("-", "−"), "", "", "", f"{judges['gold']:.3f}", f"{judges['other']:.3f}"])
    head = ("method", "gold return, nats", "KL to SFT, nats", "objective J", "share of the optimum", "recognised by the gold judge", "by the other judge")
    over = f"means over {seeds} seeds with 95 % bootstrap intervals" if seeds > 1 else "± the standard error over pictures"
    accuracy = [
        f"{name} {np.mean([run['accuracy'] for run in runs]):.3f} of {np.mean([run['ceiling'] for run in runs]):.3f}"
        for name, runs in found["stages"].items()
    ]
    exact, ours = (np.array(found["credit"][key]) for key in ("exact", "dpo"))
    ours = ours.reshape(len(ours), SIDE, SIDE).sum(-1)
    gap = interval(column(found["arms"], "RTO", "share"), column(found["arms"], "PPO", "share"))
    return (
        markdown(head, rows)
        + f"\n\n{found['answers']} pictures a seed and method, {over}; J = gold return − {found['beta']}·KL. Share of RTO less that "
        f"of PPO: {shown(gap)}. The judges were tested on {judges['n']} real digits; the other one trained nothing. In the figure of seed 1's "
        "first samples, those that the gold judge takes for another digit are underlined.\n\n"
        f"Accuracy on held-out pairs, and how often the label is that of the gold reward: {'; '.join(accuracy)}. Correlation of "
        f"DPO's credit with the exact one, over the {ours.size} rows of pixels of {len(ours)} pictures by SFT: "
        f"{np.corrcoef(exact.ravel(), ours.ravel())[0, 1]:.2f}."
    )


TABLE = Table("digits", arms, collect, draw)
PRESETS = {"gold": ("8x8 digits, a classifier as the gold reward", StudyConfig(data=DIGITS, runs="runs/study-digits", seeds=2))}

if __name__ == "__main__":
    study.command(TABLE, __doc__, PRESETS)
