"""Beyond RTO's paper: where a dense reward helps and where it doesn't, and what RTO's optimum is. docs/what_we_found.md.

    python -m experiments.findings                  5 seeds of the embedded world, half an hour on 2 cores
    python -m experiments.findings --cheap          minutes: one seed, hardly any steps
    python -m experiments.findings --draw           from results/findings/gold.json alone

The paper says that a dense reward helps, not when. Here PPO and RTO differ in the DPO term alone, while one thing changes
at a time: GAE's λ, how fast the critic learns, the horizon (with everything upstream trained again), β1, and the official
script's clip. Three questions more: how near each policy comes to the optimum of the reward that it was really given
(RTO's is π_ref·(π_dpo/π_ref)^{β1/β2}·exp(r/β2), exact here); what each method pays in KL for its gold return (the
frontier); and whether RTO's gain follows the quality of DPO's credit, its correlation with the exact advantage.
"""

import dataclasses
import functools
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from experiments.bijection import fidelity
from experiments.data_scaling import FRACTIONS, scaled
from experiments.study import (
    COLOURS,
    MARKERS,
    Arm,
    Table,
    base_arms,
    column,
    command,
    controls,
    curve,
    drawing,
    interval,
    markdown,
    numbers,
    over_seeds,
    runs,
    shown,
)  # fmt: skip
from experiments.table1 import exact_frontier
from rto_jax import gold


def _ppo(arm: Arm, **fields) -> Arm:
    return arm.changed(ppo=dataclasses.replace(arm.config.ppo, **fields))


def _critic(arm: Arm, times: float) -> Arm:
    optim = arm.config.critic_optim
    return arm.changed(critic_optim=dataclasses.replace(optim, learning_rate=times * optim.learning_rate))


def _horizon(arm: Arm, horizon: int) -> Arm:
    """The same in a world whose answers are so long at most, and all that it starts from too."""
    lengths = dataclasses.replace(arm.config.lengths, response=horizon)
    return arm.changed(lengths=lengths).after(**{flag: _horizon(other, horizon) for flag, other in arm.upstream.items()})


# What changes, its values (the default is where the two arms are the tables'), and how an arm gets one.
SWEEPS = {
    "λ of GAE": ((0.0, 0.8, 0.95, 1.0), lambda arm, x: _ppo(arm, lam=x)),
    "critic's learning rate, times": ((0.01, 1.0), _critic),
    "horizon, tokens": ((12, 24), _horizon),
    "β1 / β2": ((0.125, 0.25, 0.5, 1.0), lambda arm, x: arm.changed(beta1=x * arm.config.beta2)),
    "clip of log(π_dpo/π_ref), nats": ((0.25, 0.5, 1.0, np.inf), lambda arm, x: arm.changed(dpo_clip=_clip(arm, x))),
}
RTO_ONLY = ("β1 / β2", "clip of log(π_dpo/π_ref), nats")


def _clip(arm: Arm, nats: float) -> float | None:
    """The bound on the weighted term; the official script's 0.05 at β1 = 0.05 is 1 nat."""
    return None if nats == np.inf else nats * arm.config.beta1


def _label(name: str, sweep: str, x: float) -> str:
    return f"{name}, {sweep} {x:g}"


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    found = {name: base[name] for name in ("SFT", "DPO", "PPO", "RTO")} | controls(base)
    for sweep, (values, change) in SWEEPS.items():
        for name in ("RTO",) if sweep in RTO_ONLY else ("PPO", "RTO"):
            found |= {_label(name, sweep, x): change(base[name], x) for x in values}
    for fraction in FRACTIONS:  # of the preferences that DPO, and DPO alone, sees
        dpo = scaled(base["RTO"], fraction, "preferences").upstream["dpo"]
        found[f"DPO of {fraction}"] = dpo
        found[f"RTO, DPO of {fraction}"] = base["RTO"].after(dpo=dpo)
    return found


FRONTIER = ("PPO", "RTO", "PPO, λ = 1", "PPO, RTO's temperature")


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    return {
        "arms": runs(arms, base, seeds),
        "frontier": {
            name: {key: curve(arms[name], base, seeds, f"eval_{key}")["runs"] for key in ("kl", "gold_return")} for name in FRONTIER
        },
        "credit": {str(f): [fidelity(arms[f"DPO of {f}"], base, seed)["correlation"] for seed in numbers(seeds)] for f in FRACTIONS},
    }


# ---------------------------------------------------------------------------------------------- the exact world


@dataclass(frozen=True)
class PaidWorld(gold.World):
    """The gold world as RTO sees it with an exact DPO and reward model: r* + clip(w·A*, ±w·clip·β), w = β1/β2.

    A* = β·log(π*/π0), so w·A* is β1·log(π_dpo/π_ref) where π_dpo is the optimum at β and β2 = β. Without the clip its
    optimum is π0·exp((1 + w)·R*/β) up to a constant of each prompt: the world's optimum at the temperature β/(1 + w).
    """

    weight: float = 0.5
    """w = β1/β2"""
    clip: float = np.inf
    """bound on |log(π_dpo/π_ref)|, nats"""

    @cached_property
    def rewards(self) -> np.ndarray:
        plain = gold.World(self.seed, self.horizon, self.beta)
        bound = self.clip * self.beta
        return plain.rewards + self.weight * np.clip(plain.solve().A, -bound, bound)


def exact(weight: float, clip: float = np.inf) -> dict[str, float]:
    """What the optimum of RTO's reward is worth in the world itself: gold return, KL, J, share of the optimum."""
    world = gold.World()
    best = world.solve()
    found = world.evaluate(PaidWorld(weight=weight, clip=clip).solve().log_pistar)
    return found | {"share": 1 - (best.Jstar - found["J"]) / (best.Jstar - best.J0)}


def share_at(beta: float, run: dict[str, float]) -> float:
    """A policy's share of the optimum of E[R*] − β·KL at another temperature, from its gold return and its KL."""
    best = gold.World().solve(beta)
    mine = run["J"] + (gold.World().beta - beta) * run["kl"]  # J is exact in every state, the gold return is sampled
    return 1 - (best.Jstar - mine) / (best.Jstar - best.J0)


# ---------------------------------------------------------------------------------------------- drawings


def _points(axes, number: int, x, values: np.ndarray, label: str | None = None) -> None:
    """Mean of [len(x), seeds] as a line, the seeds as dots."""
    style = dict(color=COLOURS[number], marker=MARKERS[number])
    axes.plot(x, values.mean(1), label=label, **style)
    axes.plot(x, values, ls="", ms=3, alpha=0.4, **style)


def draw_sweeps(found: dict, folder: Path) -> str:
    of = lambda name: column(found["arms"], name, "share")  # noqa: E731
    text = ""
    with drawing(folder / "gold-sweeps.svg", len(SWEEPS), 2.7) as panels:
        for panel, (sweep, (values, _)) in zip(panels, SWEEPS.items(), strict=True):
            names = ("RTO",) if sweep in RTO_ONLY else ("PPO", "RTO")
            where, rows = range(len(values)), []
            for number, name in enumerate(("PPO", "RTO")):
                if name in names:
                    _points(panel, number, where, np.array([of(_label(name, sweep, x)) for x in values]), name)
                    rows.append([name, *(shown(interval(of(_label(name, sweep, x))), 3) for x in values)])
            if sweep in RTO_ONLY:
                panel.axhline(np.mean(of("PPO")), color=COLOURS[0], ls=":", lw=1, label="PPO")
            else:
                gaps = (interval(of(_label("RTO", sweep, x)), of(_label("PPO", sweep, x))) for x in values)
                rows.append(["RTO − PPO", *(shown(gap, 3) for gap in gaps)])
            ticks = ["none" if x == np.inf else f"{x:g}" for x in values]
            panel.set(xticks=where, xticklabels=ticks, xlabel=sweep)
            panel.margins(x=0.12)
            text += f"### {sweep}\n\n" + markdown((f"share of the optimum; {sweep}", *ticks), rows) + "\n\n"
        low, high = zip(*(panel.get_ylim() for panel in panels), strict=True)
        for panel in panels:
            panel.set_ylim(min(low), max(high))
        panels[0].set(ylabel="share of the exact optimum")
        panels[0].legend()
    return text


def draw_shifted(found: dict, folder: Path) -> str:
    weights, clips = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, np.inf)
    with drawing(folder / "gold-shifted.svg", 2) as (left, right):
        for number, key in enumerate(("gold_return", "J")):
            left.plot(weights, [exact(w)[key] for w in weights], color=COLOURS[number], marker=MARKERS[number],
                      label={"gold_return": "gold return", "J": "objective J"}[key])  # fmt: skip
        left.set(xlabel="β1 / β2", ylabel="exact optimum of RTO's reward", title="what RTO's exact optimum is worth")
        left.legend()
        betas = np.linspace(0.25, 1.0, 31)
        for number, name in enumerate(("PPO", "RTO", "PPO, RTO's temperature", "DPO")):
            values = np.array([[share_at(beta, run) for run in found["arms"][name]] for beta in betas])
            right.plot(betas, values.mean(1), color=COLOURS[number], label=name)
            right.fill_between(betas, values.min(1), values.max(1), color=COLOURS[number], alpha=0.12, linewidth=0)
        right.axvline(gold.World().beta, color="#777777", ls=":", lw=1)
        right.axvline(gold.World().beta / 1.5, color=COLOURS[1], ls=":", lw=1)
        right.set(xlabel="β of the objective E[R*] − β·KL", ylabel="share of its optimum", title="trained policies, judged at other temperatures")
        right.legend()
    rows = []
    for weight, clip in [(w, np.inf) for w in weights] + [(0.5, c) for c in clips[:-1]]:
        value = exact(weight, clip)
        cells = [f"{value[key]:.{n}f}".replace("-", "−") for key, n in {"gold_return": 2, "kl": 2, "J": 2, "share": 3, "length": 1}.items()]
        rows.append([f"β1/β2 = {weight:g}" + (f", clipped at {clip:g} nats" if clip < np.inf else ""), *cells])
    table = markdown(("exact optimum of RTO's reward", "gold return", "KL, nats", "J", "share", "length"), rows)
    of = lambda name, beta: [share_at(beta, run) for run in found["arms"][name]]  # noqa: E731
    own, rto = gold.World().beta, gold.World().beta / 1.5
    rows = [
        [name, shown(interval(of(name, own)), 3), shown(interval(of(name, rto)), 3)]
        for name in ("PPO", "RTO", "PPO, λ = 1", "PPO, RTO's temperature", "DPO")
    ]
    head = ("trained policy", f"share at β = {own:g}", f"share at RTO's β = {rto:.3f}")
    return f"### shifted optimum\n\n{table}\n\n### at RTO's temperature\n\n{markdown(head, rows)}\n\n"


def draw_frontier(found: dict, folder: Path) -> str:
    best = exact_frontier()
    with drawing(folder / "gold-frontier.svg", 1, 5.4, 3.6) as (axes,):
        axes.plot([x["kl"] for x in best], [x["gold_return"] for x in best], color="#777777", lw=1, label="no policy is above")
        for number, (name, runs) in enumerate(found["frontier"].items()):
            x, y = (np.mean(runs[key], 0) for key in ("kl", "gold_return"))
            axes.plot(x, y, color=COLOURS[number], marker=MARKERS[number], ms=3, label=name)
        for number, name in enumerate(("SFT", "DPO"), len(found["frontier"])):
            x, y = (column(found["arms"], name, key) for key in ("kl", "gold_return"))
            axes.plot([np.mean(x)], [np.mean(y)], ls="", color=COLOURS[number], marker=MARKERS[number], label=name)
        axes.set(xlabel="KL to the data policy, nats", ylabel="gold return")
        axes.legend()
    ends = {name: (column(found["arms"], name, "kl"), column(found["arms"], name, "gold_return")) for name in ("DPO", *FRONTIER)}
    x, y = ([b[key] for b in best] for key in ("kl", "gold_return"))
    rows = [
        [name, shown(interval(kl)), shown(interval(got)), f"{np.interp(np.mean(kl), x, y) - np.mean(got):.2f}"]
        for name, (kl, got) in ends.items()
    ]
    return "### frontier\n\n" + markdown(("at the end", "KL, nats", "gold return", "below the frontier at that KL"), rows) + "\n\n"


def draw_credit(found: dict, folder: Path) -> str:
    of = functools.partial(column, found["arms"])
    plain, rows = of("PPO", "share"), []
    with drawing(folder / "gold-credit.svg") as (axes,):
        for number, (fraction, quality) in enumerate(found["credit"].items()):
            gain = np.subtract(of(f"RTO, DPO of {fraction}", "share"), plain)
            style = dict(color=COLOURS[number], marker=MARKERS[number], ls="")
            axes.plot(quality, gain, ms=4, alpha=0.6, label=f"{fraction} of DPO's pairs", **style)
            rows.append([
                fraction, shown(interval(quality), 3), shown(interval(of(f"DPO of {fraction}", "share")), 3),
                shown(interval(of(f"RTO, DPO of {fraction}", "share")), 3), shown(interval(list(gain)), 3),
            ])  # fmt: skip
        axes.axhline(0, color="#777777", ls=":", lw=1)
        axes.set(xlabel="correlation of DPO's token reward with A*", ylabel="share of RTO less that of PPO")
        axes.legend()
    head = ("DPO's share of the pairs", "correlation with A*", "DPO's share of the optimum", "RTO's", "RTO − PPO")
    return "### credit\n\n" + markdown(head, rows)


def draw(found: dict, folder: Path) -> str:
    parts = (draw_sweeps, draw_shifted, draw_frontier, draw_credit)
    return "".join(part(found, folder) for part in parts) + over_seeds(len(found["arms"]["PPO"]))


TABLE = Table("findings", arms, collect, draw)

if __name__ == "__main__":
    command(TABLE, __doc__)
