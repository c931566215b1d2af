"""RTO's ablations ("Figure 3", Figure 4a and 4b): where the DPO reward is paid, and what a dense reward is compared with.

    python -m experiments.ablations                 5 seeds of the embedded world, about 15 minutes on 2 cores
    python -m experiments.ablations --cheap         a minute: one seed, hardly any steps
    python -m experiments.ablations --draw          from results/ablations/gold.json alone

The paper (AlpacaEval 2, length-controlled; Arena-Hard, style-controlled; Llama-3-8B):

    RTO, at its token            27.0, 20.3         DDPO, all at the last token            21.1, 13.1
    Semi-RTO, at sentence ends   23.8, 19.0         RS-PPO, at its token, total taken back 27.5, 19.2

It reads: the total of the DPO reward matters little, its placement does. What would reproduce: RTO and RS-PPO above
Semi-RTO, Semi-RTO above DDPO, in return and in the reward model's score along training. The controls say what else could
give such a gap: PPO at λ = 1 (then where a reward is paid makes no difference but for the critic), PPO at the temperature
that RTO's reward amounts to, DPO itself, and both arms with a worse reward model (the score read at the last token alone).
"""

import functools
from pathlib import Path

from experiments.study import (
    Arm,
    Table,
    base_arms,
    column,
    command,
    controls,
    curve,
    draw_curves,
    drawing,
    figures,
    interval,
    markdown,
    numbers,
    over_seeds,
    runs,
    shown,
)  # fmt: skip

PLACED = {"Semi-RTO": "segment", "DDPO": "last", "RS-PPO": "shaping"}


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    found = {"PPO": base["PPO"], "RTO": base["RTO"]}
    found |= {name: base["RTO"].changed(placement=placement) for name, placement in PLACED.items()}
    if preset == "gold":
        weak = base["reward model"].changed(head="last")
        found |= controls(base) | {"DPO": base["DPO"]}
        found |= {f"{name}, weak reward model": base[name].after(reward_model=weak) for name in ("PPO", "RTO")}
    return found


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    accuracy = {
        name: [figures(arms[arm].upstream["reward_model"], base, seed)["test"]["accuracy"] for seed in numbers(seeds)]
        for name, arm in {"good": "PPO", "weak": "PPO, weak reward model"}.items()
        if arm in arms
    }
    curves = {
        key: {name: curve(arm, base, seeds, key) for name, arm in arms.items() if name != "DPO"}
        for key in ("score", "eval_gold_return", "eval_share")
    }
    return {"arms": runs(arms, base, seeds), "reward_model_accuracy": accuracy, "curves": curves}


def draw(found: dict, folder: Path) -> str:
    table = found["arms"]
    of = functools.partial(column, table)
    rows = [
        [
            name, shown(interval(of(name, "gold_return"))), shown(interval(of(name, "kl"))), shown(interval(of(name, "J"))),
            shown(interval(of(name, "share")), 3),
            "" if name == "RTO" else shown(interval(of(name, "share"), of("RTO", "share")), 3),
        ]
        for name in table
    ]  # fmt: skip
    placed = ("RTO", *PLACED, "PPO")
    with drawing(folder / "gold.svg", 2) as axes:
        for ax, (key, label) in zip(axes, {"score": "reward model's score", "eval_gold_return": "gold return"}.items(), strict=True):
            draw_curves(ax, {name: found["curves"][key][name] for name in placed}, label)
    said = {name: shown(interval(values), 3) for name, values in found["reward_model_accuracy"].items()}
    text = markdown(("arm", "gold return", "KL, nats", "objective J", "share of the optimum", "share − RTO's"), rows)
    text += over_seeds(len(table["PPO"]))
    if said:
        text += f" Accuracy of the reward model on held-out pairs: {said['good']}, the weak one {said['weak']}."
    return text


PAPER = {"RTO": (27.0, 20.3), "Semi-RTO": (23.8, 19.0), "DDPO": (21.1, 13.1), "RS-PPO": (27.5, 19.2), "PPO": (19.5, 16.2)}
TABLE = Table("ablations", arms, collect, draw, PAPER)

if __name__ == "__main__":
    command(TABLE, __doc__)
