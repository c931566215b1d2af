"""RTO's Figure 4c: PPO and RTO on 1/8, 1/4, 1/2 and all of the data. Does RTO with an eighth reach PPO with all?

    python -m experiments.data_scaling              5 seeds of the embedded world, about 20 minutes on 2 cores
    python -m experiments.data_scaling --cheap      a minute: one seed, hardly any steps
    python -m experiments.data_scaling --draw       from results/data_scaling/gold.json alone

The paper's figure says yes (AlpacaEval 2; no numbers in the text). "Data" can mean three things, so there are three
curves: fewer rollouts (a shorter run with its own schedule), fewer preferences (for the reward model and for DPO, with as
many passes over them), and both. What would reproduce: RTO at 1/8 not below PPO at 1.
"""

import dataclasses
from fractions import Fraction
from pathlib import Path

import numpy as np

from experiments.study import (
    COLOURS,
    MARKERS,
    Arm,
    Table,
    base_arms,
    column,
    command,
    drawing,
    interval,
    markdown,
    over_seeds,
    runs,
    shown,
)  # fmt: skip

FRACTIONS = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
AXES = ("rollouts", "preferences", "both")


def scaled(arm: Arm, fraction: Fraction, axis: str) -> Arm:
    """The arm on a part of the data."""
    share = lambda n: max(1, int(n * fraction))  # noqa: E731
    if axis != "preferences":
        arm = arm.changed(iterations=share(arm.config.iterations))
    if axis == "rollouts":
        return arm
    fewer = {}
    for flag in ("reward_model", "dpo"):
        if flag in arm.upstream:
            other = arm.upstream[flag]
            pairs = dataclasses.replace(other.config.gold, pairs=share(other.config.gold.pairs))
            fewer[flag] = other.changed(gold=pairs, steps=share(other.config.steps))
    return arm.after(**fewer)


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    return {
        f"{name}, {fraction} of {axis}": scaled(base[name], fraction, axis)
        for axis in AXES
        for name in ("PPO", "RTO")
        for fraction in FRACTIONS
    }


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    return {"arms": runs(arms, base, seeds)}


def draw(found: dict, folder: Path) -> str:
    """Of text the win rate against SFT, where the gold world has the share of its optimum."""
    preset = found["facts"]["preset"]
    key, label = ("share", "share of the exact optimum") if preset == "gold" else ("win_rate", "win rate against SFT")
    of = lambda name, fraction, axis: column(found["arms"], f"{name}, {fraction} of {axis}", key)  # noqa: E731
    x = [float(fraction) for fraction in FRACTIONS]
    with drawing(folder / f"{preset}.svg", 3, 3.2) as panels:
        for panel, axis in zip(panels, AXES, strict=True):
            for number, name in enumerate(("PPO", "RTO")):
                values = np.array([of(name, fraction, axis) for fraction in FRACTIONS])
                style = dict(color=COLOURS[number], marker=MARKERS[number])
                panel.plot(x, values.mean(1), label=name, **style)
                panel.plot(x, values, ls="", ms=3, alpha=0.4, **style)
            panel.axhline(np.mean(of("PPO", 1, axis)), color=COLOURS[0], ls=":", lw=1)
            panel.set_xscale("log", base=2)
            panel.set(title=f"less of: {axis}", xticks=x, xticklabels=[str(f) for f in FRACTIONS], xlabel="share of the data")
        panels[0].set(ylabel=label)
        panels[0].legend()
        low = min(panel.get_ylim()[0] for panel in panels)
        high = max(panel.get_ylim()[1] for panel in panels)
        for panel in panels:
            panel.set_ylim(low, high)
    rows, answers = [], []
    for axis in AXES:
        rows += [
            [f"{name}, {axis}", *(shown(interval(of(name, fraction, axis)), 3) for fraction in FRACTIONS)]
            for name in ("PPO", "RTO")
        ]
        gap = interval(of("RTO", FRACTIONS[0], axis), of("PPO", 1, axis))
        verdict = "undecided" if not gap.low > 0 and not gap.high < 0 else "yes" if gap.low > 0 else "no"
        answers.append(f"- {axis}: {verdict}: the {label} of RTO at 1/8 less that of PPO at 1 is {shown(gap, 3)}.")
    text = markdown((label, *(str(f) for f in FRACTIONS)), rows)
    text += "\n\nDoes RTO with 1/8 of the data reach PPO with all of it?\n\n" + "\n".join(answers)
    return text + over_seeds(len(of("PPO", 1, "both")))


TABLE = Table("data_scaling", arms, collect, draw, draw_text=draw)

if __name__ == "__main__":
    command(TABLE, __doc__)
