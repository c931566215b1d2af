"""What else the papers name, on the axes of Table 1: best of n, RAFT, RSO, reward-conditioned SFT, iterative DPO, KTO.

    python -m experiments.baselines                 5 seeds of the embedded world, about 10 minutes on 2 cores
    python -m experiments.baselines --cheap         a minute: one seed, hardly any steps
    python -m experiments.baselines --draw          from results/baselines/gold.json alone

No numbers of the papers belong here. All start from the same SFT model, and those that sample do so as often as PPO, with
the same reward model. Best of n is no policy that has a probability for every token: its KL is a bound from above, so its
objective and its share are bounds from below.
"""

import functools
from pathlib import Path

from experiments import selection
from experiments.study import (
    Arm,
    Table,
    base_arms,
    column,
    command,
    interval,
    markdown,
    over_seeds_and_answers,
    runs_against,
    shown,
)  # fmt: skip

METHODS = {
    "best of 16": "best_of_n", "RAFT": "raft", "RSO": "rso", "conditioned SFT": "conditioned", "iterative DPO": "iterative_dpo",
}  # fmt: skip
# As for the losses of Table 1, the best of three tries on seed 0: 0.25, 0.5, 1 gave 0.49, 0.48, 0.39 of the optimum.
KTO = dict(loss="kto", beta=0.25, micro_batches=1)


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    before = base["PPO"].upstream
    found = {"DPO": base["DPO"], "KTO": base["DPO"].changed(**KTO if preset == "gold" else KTO | dict(beta=0.1))}
    found |= {
        name: Arm(selection.__name__, selection.presets(method)[preset][1], before) for name, method in METHODS.items()
    }
    return found | {"PPO": base["PPO"], "RTO": base["RTO"]}


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    return runs_against(arms["PPO"].upstream["sft"], arms, base, seeds)


def draw(found: dict, folder: Path) -> str:
    table, rows = found["arms"], []
    of = functools.partial(column, table)
    for name in table:
        below, above = ("≤ ", "≥ ") if METHODS.get(name) == "best_of_n" else ("", "")
        gap = "" if name == "PPO" or below else shown(interval(of(name, "share"), of("PPO", "share")), 3)
        rows.append([
            name, shown(interval(of(name, "gold_return"))), below + shown(interval(of(name, "kl"))),
            above + shown(interval(of(name, "J"))), above + shown(interval(of(name, "share")), 3), gap,
            shown(interval(of(name, "win_rate")), 3), shown(interval(of(name, "length")), 1),
        ])  # fmt: skip
    head = ("method", "gold return", "KL, nats", "objective J", "share of the optimum", "share − PPO's", "win rate against SFT",
            "length")  # fmt: skip
    return markdown(head, rows) + over_seeds_and_answers(found)


TABLE = Table("baselines", arms, collect, draw)

if __name__ == "__main__":
    command(TABLE, __doc__)
