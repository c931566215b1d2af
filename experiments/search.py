"""From r to Q*'s Figure 2: beams by a DPO policy's likelihood, for three β; how many are too many?

    python -m experiments.search                    5 seeds of the embedded world, 17 minutes on 2 cores
    python -m experiments.search --cheap            minutes: one seed, hardly any steps
    python -m experiments.search --draw             from results/search/gold.json alone

The paper (arXiv 2404.12358, section 5.2 and appendix E; TL;DR, Pythia-2.8B, GPT-4 judges): 5 beams raise the win rate by
10 to 15 % over 1; more than 5 lower it, and lengths explode; beams over a PPO policy, the control, gain less. The three β and
the figure's numbers are not in the text; nor is whether beams were ranked by Σ log π, which is eq. 13, or by its mean per
token, as transformers does unless it is told otherwise. Here both are tried, and beams by Σ β log π/π_ref; beside them the best
of n of the SFT policy's answers by the same implicit reward. The gold reward judges against the SFT policy's answers.

What is only here is the exact optimum: the same beams over π*, the likeliest of all its answers, and the answer with the
largest gold return, both by dynamic programming. They tell what too much search does from what a wrong reward does: by eq. 12
the likeliest answer earns the most reward + β log π_ref, which every token lowers, so it is not what the judge likes best even
if nothing was learnt wrongly. In the JSON implicit_reward is β log π/π_ref (PPO: β2), logp the answer's log π, nats.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import Model, numpy_rng, open_model
from experiments.generate import best_beam
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
    gold_returns,
    interval,
    markdown,
    numbers,
    shown,
    wins,
)  # fmt: skip
from experiments.tasks import GoldTask, map_rows, repeat, sample_rows, take
from rto_jax import gold, losses, programs
from rto_jax.metrics import progress
from rto_jax.models import language_model
from rto_jax.sampling import SamplingConfig
from rto_jax.search import BeamConfig
from rto_jax.sharding import make_mesh
from rto_jax.types import Params, Prompts, Sequences

BETAS = (0.25, 0.5, 1.0)
WIDTHS = (1, 2, 5, 7, 10, 20)
PROMPTS = 256  # a seed
EXACT = "π*"
WAYS = {"log π": "beam {}", "log π per token": "beam {}, per token", "β log π/π_ref": "guided {}", "best of n": "best of {}"}


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    found = {f"DPO, β = {beta:g}": base["DPO"].changed(beta=beta) for beta in BETAS}
    return {"SFT": base["SFT"]} | found | {"PPO": base["PPO"]}


# ---------------------------------------------------------------------------------------------- the exact policies


class _State(NamedTuple):
    cls: jax.Array  # [B]
    q: jax.Array  # [B]
    t: jax.Array  # []


class TableModel(NamedTuple):
    """A policy of the gold world as a model: its parameters are the table, [16, H, 20, 4, 20] in nats."""

    prefill: Callable
    decode: Callable


@functools.cache
def table_model(world: gold.World) -> TableModel:
    ids = np.arange(gold.OUTPUTS, gold.PAD, dtype=np.int32)
    first, second = np.meshgrid(ids, ids, indexing="ij")
    pairs = np.stack([first.ravel(), second.ravel(), first.ravel(), first.ravel()], axis=1)
    classes = world.classes(pairs).reshape(len(ids), len(ids)).astype(np.int32)
    next_q = gold.NEXT_Q.astype(np.int32)

    def prefill(table, tokens, valid, cache_length):
        words = tokens[:, -gold.PROMPT_LENGTH :] - gold.OUTPUTS
        cls = jnp.asarray(classes)[words[:, 0], words[:, 1]]
        return table[cls, 0, gold.SEP, 0], _State(cls, jnp.zeros_like(cls), jnp.int32(0))

    def decode(table, token, cache: _State):
        q, t = jnp.asarray(next_q)[cache.cls, cache.q, token], cache.t + 1
        return table[cache.cls, jnp.minimum(t, world.horizon - 1), token, q], _State(cache.cls, q, t)

    return TableModel(prefill, decode)


def best_path(world: gold.World, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The answer of each class with the largest sum of an action table [16, H, 20, 4, 20] along it, by dynamic programming.

    Of log π the likeliest answer, of the rewards the largest gold return. Returns (tokens int32 [16, H] with PAD behind
    the end, mask [16, H]).
    """
    cls, actions = np.arange(16), np.arange(gold.OUTPUTS)
    values, future = np.empty(table.shape), np.zeros((16, 4, gold.OUTPUTS))  # future: of the next state, by [class, q, action]
    for t in reversed(range(world.horizon)):
        values[:, t] = table[:, t] + future[:, None]
        future = values[:, t].max(-1)[cls[:, None, None], actions, gold.NEXT_Q]
        future[..., gold.EOS] = 0.0
    tokens = np.full((16, world.horizon), gold.PAD, np.int32)
    prev, q, going = np.full(16, gold.SEP), np.zeros(16, int), np.ones(16, bool)
    for t in range(world.horizon):
        action = values[cls, t, prev, q].argmax(-1)
        tokens[going, t] = action[going]
        q, prev, going = gold.NEXT_Q[cls, q, action], action, going & (action != gold.EOS)
    return tokens, tokens != gold.PAD


# ---------------------------------------------------------------------------------------------- one seed


class Policy(NamedTuple):
    """What is searched: a network or a table, and its reference."""

    models: tuple[Any, Any]  # of policy and reference
    params: tuple[Params, Params]
    beta: float  # of its implicit reward
    logps: Callable  # parameters, Sequences -> log π(y|x), NumPy [n]


class Setting(NamedTuple):
    """What every policy of a seed is tried on."""

    task: GoldTask
    prompts: Prompts
    theirs: np.ndarray  # gold returns of the SFT policy's answers

    def network(self, model: Model, params: Params, reference: Params, beta: float) -> Policy:
        mesh = self.task.mesh
        lm, run = language_model(model.config, mesh), programs.response_logps(model.config, mesh)
        logps = lambda weights, seqs: map_rows(lambda b: run(weights, b), seqs, 1024, mesh).sum(1)  # noqa: E731
        return Policy((lm, lm), (params, reference), beta, logps)

    def exact(self, beta: float) -> Policy:
        world = self.task.world
        model, tables = table_model(world), (world.solve(beta).log_pistar, world.log_pi0)

        def logps(table, seqs):
            tokens = seqs.tokens[:, gold.PROMPT_LENGTH :]
            found = world.policy_logps(np.asarray(table), seqs.tokens[:, : gold.PROMPT_LENGTH], tokens, seqs.mask)
            taken = np.take_along_axis(found, np.where(seqs.mask, tokens, 0)[..., None], 2)[..., 0]
            return np.where(seqs.mask, taken, 0).sum(1)

        return Policy((model, model), tuple(np.float32(x) for x in tables), beta, logps)

    def beam(self, policy: Policy, width: int, penalty: float = 0.0, guided: bool = False) -> Sequences:
        """The best beam of each prompt: by likelihood, or by the implicit reward."""
        config = BeamConfig(self.task.world.horizon, width)
        count, weights = (2, (policy.beta, -policy.beta)) if guided else (1, (1.0,))
        run = best_beam(policy.models[:count], config, gold.EOS, gold.PAD, self.task.mesh)
        find = lambda rows: run(policy.params[:count], rows, weights, penalty)[0]  # noqa: E731
        return map_rows(find, self.prompts, min(128, len(self.theirs)), self.task.mesh)

    def figures(self, policy: Policy | None, seqs: Sequences) -> dict[str, float]:
        """What the answers are worth."""
        returns, ended = self.task.returns(seqs), ((seqs.tokens[:, gold.PROMPT_LENGTH :] == gold.EOS) & seqs.mask).any(1)
        found = wins(returns, self.theirs) | {"gold_return": float(returns.mean()), "length": float(seqs.mask.sum(1).mean())}
        found["ended"] = float(ended.mean())
        if policy:
            ours, base = (policy.logps(params, seqs) for params in policy.params)
            found |= {"logp": float(ours.mean()), "implicit_reward": float(policy.beta * (ours - base).mean())}
        return found

    def of_classes(self, answers: tuple[np.ndarray, np.ndarray]) -> Sequences:
        """Answers of the prompts, from an answer of each class."""
        cls = self.task.world.classes(self.prompts.tokens)
        return self.task.rows(self.prompts.tokens, *(x[cls] for x in answers))


def one_seed(arms: dict[str, Arm], base: Path, seed: int, step: Callable) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of every policy and every way of decoding it."""
    stage = arms["SFT"].config
    stage = dataclasses.replace(stage, out="", seed=seed)
    task = GoldTask(stage, make_mesh(stage.mesh))
    every = take(task.prompts("test"), stage.gold.rollouts, seed)
    prompts = jax.tree.map(lambda x: x[:PROMPTS], every)
    count, world = len(prompts.tokens), task.world
    setting = Setting(task, prompts, gold_returns(arms["SFT"], base, seed)[:count])
    models = {name: open_model(str(base / f"seed{seed}" / arm.folder), stage, "--runs") for name, arm in arms.items()}
    weights = {name: model.load(task.mesh) for name, model in models.items()}
    found: dict[str, dict[str, dict[str, float]]] = {}

    def note(name: str, label: str, policy: Policy | None, seqs: Sequences) -> np.ndarray:
        found.setdefault(name, {})[label] = setting.figures(policy, seqs)
        step()
        return task.returns(seqs)

    def widths(name: str, way: str, policy: Policy, answers: Callable[[int], Sequences]) -> None:
        """Also how often more beams win against 1 and 5 of their kind."""
        returns = {width: note(name, WAYS[way].format(width), policy, answers(width)) for width in WIDTHS}
        for width in WIDTHS:
            found[name][WAYS[way].format(width)] |= {f"over_{few}": wins(returns[width], returns[few])["win_rate"] for few in (1, 5)}

    def beams(name: str, policy: Policy) -> None:
        widths(name, "log π", policy, lambda width: setting.beam(policy, width))
        widths(name, "log π per token", policy, lambda width: setting.beam(policy, width, 1.0))

    for name, arm in arms.items():
        beta = getattr(arm.config, "beta", getattr(arm.config, "beta2", 0.0))
        policy = setting.network(models[name], weights[name], weights["SFT"], beta)
        drawn = task.sample(models[name].config, weights[name], every, seed)
        note(name, "sample", policy, jax.tree.map(lambda x: x[:count], drawn))
        beams(name, policy)
        if not name.startswith("DPO"):
            continue
        widths(name, "β log π/π_ref", policy, lambda width, policy=policy: setting.beam(policy, width, guided=True))
        # Other random numbers than the answers that they are compared with.
        answers = sample_rows(
            task, models["SFT"].config, weights["SFT"], repeat(prompts, WIDTHS[-1]), seed + 1000, SamplingConfig(world.horizon), 1024
        )
        ours, theirs = (policy.logps(params, answers) for params in policy.params)
        scores = (ours - theirs).reshape(count, -1)

        def best(n: int, scores=scores, answers=answers) -> Sequences:
            index = np.arange(count) * WIDTHS[-1] + np.asarray(losses.best_of_n(scores[:, :n]))
            return jax.tree.map(lambda x: x[index], answers)

        widths(name, "best of n", policy, best)
    for beta in BETAS:
        name, policy = f"{EXACT}, β = {beta:g}", setting.exact(beta)
        drawn = world.sample(world.solve(beta).log_pistar, prompts.tokens, numpy_rng(seed, "exact"))
        note(name, "sample", policy, task.rows(prompts.tokens, *drawn))
        beams(name, policy)
        note(name, "likeliest", policy, setting.of_classes(best_path(world, world.solve(beta).log_pistar)))
    note("gold reward", "largest", None, setting.of_classes(best_path(world, world.rewards)))
    return found


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    tuned = sum(name.startswith("DPO") for name in arms)
    each = 2 * len(WIDTHS) * (len(arms) + len(BETAS) + tuned) + len(arms) + 2 * len(BETAS) + 1
    rows: dict[str, dict[str, list]] = {}
    with progress(seeds * each, "answers") as bar:
        for seed in numbers(seeds):
            for name, labels in one_seed(arms, base, seed, bar.update).items():
                for label, figures in labels.items():
                    rows.setdefault(name, {}).setdefault(label, []).append(figures)
    return {"answers": min(PROMPTS, arms["SFT"].config.gold.rollouts), "arms": rows}


# ---------------------------------------------------------------------------------------------- drawing

MIDDLE = f"DPO, β = {BETAS[1]:g}"


def means(labels: dict, way: str, key: str) -> list[float]:
    """Over the seeds, for each width."""
    return [float(np.mean(column(labels, WAYS[way].format(width), key))) for width in WIDTHS]


def draw(found: dict, folder: Path) -> str:
    rows = found["arms"]
    nets = [name for name in rows if "sample" in rows[name] and not name.startswith(EXACT)]
    drawn = [*nets, f"{EXACT}, β = {BETAS[1]:g}"]
    places = range(1, len(WIDTHS) + 1)
    with drawing(folder / "gold.svg", 4, 3.3) as panels:
        for panel, (key, title) in zip(panels, {"win_rate": "win rate against SFT", "gold_return": "gold return", "length": "tokens"}.items(), strict=False):
            for number, name in enumerate(drawn):
                style = dict(color=COLOURS[number], marker=MARKERS[number], ms=4)
                if key != "length":
                    ends = [interval(column(rows[name], WAYS["log π"].format(width), key)) for width in WIDTHS]
                    panel.vlines(places, [x.low for x in ends], [x.high for x in ends], color=COLOURS[number], lw=1, alpha=0.6)
                panel.plot(places, means(rows[name], "log π", key), ls="--" if name.startswith(EXACT) else "-", label=name, **style)
                panel.plot([0], [np.mean(column(rows[name], "sample", key))], ls="", **style)
            panel.set(xticks=[0, *places], xticklabels=["draw", *map(str, WIDTHS)], xlabel="beams by log π", ylabel=title)
        panels[0].legend(loc="center right", bbox_to_anchor=(1, 0.66))
        others = [
            panels[2].plot(places, means(rows[MIDDLE], way, "length"), color="#777777", ls=style, lw=1.2, label=way)[0]
            for way, style in zip(list(WAYS)[1:], (":", "-.", "--"), strict=True)
        ]
        panels[2].set_ylim(0)
        panels[2].legend(handles=others, title=f"{MIDDLE}, by", loc="lower right")
        for number, way in enumerate(WAYS):
            x, y = (means(rows[MIDDLE], way, key) for key in ("implicit_reward", "gold_return"))
            panels[3].plot(x, y, color=COLOURS[number], marker=MARKERS[number], ms=4, label=way)
            for width, *place in zip(WIDTHS, x, y, strict=True):
                if width in (WIDTHS[0], 5, WIDTHS[-1]):
                    panels[3].annotate(str(width), place, xytext=(3, 3), textcoords="offset points", fontsize=7)
        panels[3].set(xlabel=f"implicit reward β log π/π_ref, β = {BETAS[1]:g}", ylabel="gold return", title=MIDDLE)
        panels[3].legend(loc="lower right")
    return tables(rows, found["answers"])


def tables(rows: dict, answers: int) -> str:
    lines = {f"{name}, by {way}": (labels, way) for name, labels in rows.items() for way in WAYS if WAYS[way].format(WIDTHS[-1]) in labels}
    head = ("", "drawn", *map(str, WIDTHS))

    def table(cell: Callable[[list], str]) -> str:
        return markdown(head, [[name, *(cell(labels[x]) for x in ("sample", *(WAYS[way].format(w) for w in WIDTHS)))] for name, (labels, way) in lines.items()])

    of = lambda runs, key: float(np.mean([run[key] for run in runs]))  # noqa: E731
    number = lambda x, digits: f"{x:.{digits}f}".replace("-", "−")  # noqa: E731
    text = "### Win rate against SFT's answers\n\n" + table(lambda runs: shown(interval([run["win_rate"] for run in runs]), 3))
    text += "\n\n### Gold return | implicit reward | tokens\n\n"
    text += table(lambda runs: f"{number(of(runs, 'gold_return'), 2)} \\| {number(of(runs, 'implicit_reward'), 1)} \\| {number(of(runs, 'length'), 1)}")
    text += "\n\n### Exact\n\n" + exact_table(rows) + "\n\n### What reproduces\n\n" + "\n\n".join(claims(rows))
    seeds = len(next(iter(rows["SFT"].values())))
    return text + (
        f"\n\nMeans over {seeds} seeds and 95 % bootstrap intervals over the seeds; {answers} answers a seed, judged by the gold reward, ties "
        "counted half. One beam is greedy; best of n is of SFT's answers, by DPO's implicit reward, and costs at most "
        + ", ".join(f"{x:.2f}" for x in (float(losses.best_of_n_kl_bound(n)) for n in WIDTHS)) + " nats of KL."
    )


def exact_table(rows: dict) -> str:
    """What exact search in the exact world finds."""
    cells = []
    for name, labels in rows.items():
        for label, title in (("likeliest", "the likeliest answer under {}"), ("largest", "the answer with the largest gold return")):
            if label in labels:
                values = [np.mean(column(labels, label, key)) for key in ("gold_return", "win_rate", "length")]
                cells.append([title.format(name), *(f"{x:.{d}f}".replace("-", "−") for x, d in zip(values, (2, 3, 1), strict=True))])
    return markdown(("by dynamic programming", "gold return", "win rate", "tokens"), cells)


def claims(rows: dict) -> list[str]:
    """The paper's sentences, and whether they hold here."""

    def gap(name, way, key, width, other):
        return interval(*(column(rows[name], WAYS[way].format(w), key) for w in (width, other)))

    def over(name, way, width, few, sign):
        values = column(rows[name], WAYS[way].format(width), f"over_{few}")
        return f"{verdict(interval([sign * (x - 0.5) for x in values]))}: {shown(interval(values), 3)}"

    def verdict(found) -> str:
        return "yes" if found.low > 0 else "no" if found.high < 0 else "undecided"

    out, most = [], WIDTHS[-1]
    for way in list(WAYS)[:3]:
        for name in (name for name in rows if "guided 5" in rows[name] or (way == "log π" and "beam 5" in rows[name])):
            longer = gap(name, way, "length", most, 5)
            out.append([
                f"{name}, by {way}", over(name, way, 5, 1, 1), shown(gap(name, way, "gold_return", 5, 1)),
                over(name, way, most, 5, -1), shown(gap(name, way, "gold_return", most, 5)), f"{verdict(longer)}: {shown(longer, 1)}",
            ])  # fmt: skip
    head = ("beams", "5 beat 1: their win rate", "gold return, 5 − 1", f"{most} lose to 5: their win rate", f"gold return, {most} − 5", "they are longer: tokens")
    ours, theirs = (
        [x - y for x, y in zip(*(column(rows[name], WAYS["log π"].format(w), "gold_return") for w in (5, 1)), strict=True)]
        for name in (MIDDLE, "PPO")
    )
    gain = interval(ours, theirs)
    return [markdown(head, out), f"The gain of 5 beams over 1 in gold return is smaller for PPO than for {MIDDLE}: {verdict(gain)}, by {shown(gain)}."]


TABLE = Table("search", arms, collect, draw)

if __name__ == "__main__":
    command(TABLE, __doc__, {"gold": PRESETS["gold"]})
