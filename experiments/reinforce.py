"""RTO's Table 2, REINFORCE++ with and without the DPO reward, and the same for RLOO and GRPO.

    python -m experiments.reinforce                 5 seeds of the embedded world, about 15 minutes on 2 cores
    python -m experiments.reinforce --cheap         a minute: one seed, hardly any steps
    python -m experiments.reinforce --draw          from results/reinforce/gold.json alone

The paper (AlpacaEval 2, length-controlled; Arena-Hard, style-controlled; Llama-3-8B):

    PPO 19.5, 16.2       REINFORCE++ 18.3, 13.4
    RTO 27.0, 20.3       RTO with REINFORCE++ 24.7, 18.8

RLOO and GRPO are ours; all have the same number of rollouts, RLOO and GRPO in groups of 4 answers to a prompt. What would
reproduce: the DPO reward raises each estimator. An estimator without a critic is asked for more by a dense reward: its
rewards to go hold the noise of all later tokens.
"""

import functools
from pathlib import Path

from experiments.study import (
    Arm,
    Table,
    base_arms,
    column,
    command,
    curve,
    draw_curves,
    drawing,
    interval,
    markdown,
    over_seeds,
    runs,
    shown,
)  # fmt: skip

ESTIMATORS = {
    "REINFORCE++": dict(advantage="reinforce_pp"),
    "RLOO": dict(advantage="rloo", group_size=4),
    "GRPO": dict(advantage="grpo", group_size=4),
}


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    found = {"PPO": base["PPO"], "RTO": base["RTO"]}
    for name, fields in ESTIMATORS.items():
        found |= {name: base["PPO"].changed(**fields), f"RTO with {name}": base["RTO"].changed(**fields)}
    return found


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    return {
        "arms": runs(arms, base, seeds),
        "curves": {name: curve(arm, base, seeds, "eval_share") for name, arm in arms.items()},
    }


def draw(found: dict, folder: Path) -> str:
    table, rows = found["arms"], []
    of = functools.partial(column, table)
    for plain in ("PPO", *ESTIMATORS):
        dense = "RTO" if plain == "PPO" else f"RTO with {plain}"
        for name in (plain, dense):
            gap = "" if name == plain else shown(interval(of(dense, "share"), of(plain, "share")), 3)
            cells = [shown(interval(of(name, key)), 3 if key == "share" else 2) for key in ("gold_return", "kl", "J", "share")]
            rows.append([name, *cells, gap])
    with drawing(folder / "gold.svg", 2) as (left, right):
        draw_curves(left, {name: found["curves"][name] for name in ("PPO", *ESTIMATORS)}, "share of the exact optimum")
        with_reward = {name: x for name, x in found["curves"].items() if name.startswith("RTO")}
        draw_curves(right, with_reward, "share of the exact optimum")
        low, high = zip(left.get_ylim(), right.get_ylim(), strict=True)
        limits = max(min(low), -0.3), max(high)  # RTO with GRPO may leave below
        for ax, title in ((left, "without the DPO reward"), (right, "with it")):
            ax.set(title=title, ylim=limits)
    head = ("arm", "gold return", "KL, nats", "objective J", "share of the optimum", "gain in share by the DPO reward")
    return markdown(head, rows) + over_seeds(len(table["PPO"]))


PAPER = {"PPO": (19.5, 16.2), "RTO": (27.0, 20.3), "REINFORCE++": (18.3, 13.4), "RTO with REINFORCE++": (24.7, 18.8)}
TABLE = Table("reinforce", arms, collect, draw, PAPER)

if __name__ == "__main__":
    command(TABLE, __doc__)
