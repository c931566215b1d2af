"""RTO's TL;DR results (Table 3, Figures 5 and 6): who wins against whom, at which temperature, and the implicit reward.

    python -m experiments.tldr                      5 seeds of the embedded world, 10 minutes on 2 cores
    python -m experiments.tldr --cheap              a minute: one seed, hardly any steps
    python -m experiments.tldr --draw               from results/tldr/gold.json alone

The paper (Pythia-2.8B, GPT-4 judges 100 prompts, so a standard error of 0.05; the row's win rate against the column):

            RTO   DPO   SFT   PPO   DDPO
    RTO     .50   .61   .67   .67   .67
    PPO     .33   .41   .41   .50   .40

Here the judge is the gold reward: it makes no errors, so what is left is the prompts and the seeds. What would reproduce:
RTO above .50 in its row, at every temperature, and an implicit reward that rises for RTO and not for DDPO.
"""

from pathlib import Path

import numpy as np

from experiments.study import (
    COLOURS,
    MARKERS,
    Arm,
    Table,
    base_arms,
    command,
    curve,
    draw_curves,
    drawing,
    gold_returns,
    interval,
    markdown,
    numbers,
    shown,
    wins,
)  # fmt: skip

TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    found = {name: base[name] for name in ("RTO", "DPO", "SFT", "PPO")}
    return found | {"DDPO": base["RTO"].changed(placement="last")}


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    matrix: dict[str, dict[str, list[float]]] = {one: {other: [] for other in arms} for one in arms}
    against: dict[str, dict[str, list[float]]] = {name: {str(t): [] for t in TEMPERATURES} for name in arms if name != "RTO"}
    for seed in numbers(seeds):
        for temperature in TEMPERATURES:
            drawn = {name: gold_returns(arm, base, seed, temperature) for name, arm in arms.items()}
            for name, runs in against.items():
                runs[str(temperature)].append(wins(drawn[name], drawn["RTO"])["win_rate"])
        for one, other in ((one, other) for one in arms for other in arms):
            matrix[one][other].append(wins(drawn[one], drawn[other])["win_rate"])
    implicit = {name: curve(arms[name], base, seeds, "implicit_reward") for name in ("RTO", "DDPO")}
    return {"answers": len(drawn["SFT"]), "win_rates": matrix, "against_rto": against, "implicit_reward": implicit}


def draw(found: dict, folder: Path) -> str:
    matrix, seeds = found["win_rates"], len(found["win_rates"]["RTO"]["DPO"])
    error = lambda values: np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan  # noqa: E731
    rows = [
        [one, *(f"{np.mean(x):.2f}" + ("" if one == other or seeds == 1 else f" ± {error(x):.3f}") for other, x in row.items())]
        for one, row in matrix.items()
    ]
    with drawing(folder / "gold.svg", 2) as (left, right):
        for number, (name, runs) in enumerate(found["against_rto"].items(), 1):
            x, values = [float(t) for t in runs], np.array(list(runs.values()))
            style = dict(color=COLOURS[number], marker=MARKERS[number])
            left.plot(x, values.mean(1), label=name, **style)
            left.fill_between(x, values.min(1), values.max(1), color=COLOURS[number], alpha=0.12, linewidth=0)
        left.axhline(0.5, color="#777777", ls=":", lw=1)
        left.set(xlabel="temperature", ylabel="win rate against RTO at that temperature", ylim=(0, 1))
        left.legend()
        draw_curves(right, found["implicit_reward"], "β1 · implicit DPO reward of an answer")
    pairs = {name: interval(matrix["RTO"][name]) for name in matrix if name != "RTO"}
    text = markdown(("row against column", *matrix), rows)
    text += f"\n\nMean over {seeds} seeds ± the standard error over the seeds; {found['answers']} answers a seed at temperature "
    text += f"{TEMPERATURES[-1]:g}, the gold reward judges. A seed's own standard error from its prompts is at most "
    text += f"{0.5 / found['answers'] ** 0.5:.3f}. RTO's row with 95 % intervals: "
    return text + ", ".join(f"{name} {shown(found, 3)}" for name, found in pairs.items()) + "."


TABLE = Table("tldr", arms, collect, draw)

if __name__ == "__main__":
    command(TABLE, __doc__)
