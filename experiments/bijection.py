"""From r to Q*'s theorems where all is known: r <-> Q*, Theorem 1, and DPO's token reward against the optimal advantage.

    python -m experiments.bijection                 5 seeds of the embedded world, 20 s over the runs of data_scaling
    python -m experiments.bijection --cheap         a minute: one seed, hardly any steps
    python -m experiments.bijection --draw          from results/bijection/gold.json alone

With endless data (arXiv 2404.12358, Lemma 1, eq. 10, Theorem 1), on random trees of all responses, tabular, float64, and on
the gold world's exact tables:
  r -> Q* -> r and Q* -> r -> Q* are the identity: any language model is the optimal Q-function of one reward;
  DPO's token reward β log π/π_ref is r(s, a) + V*(s') − V*(s) = A*, not r: rewards that differ by shaping, and a reward
  paid at the last token alone, give the same preferences, so the same token reward;
  the log-ratio is a reward of that class itself: same optimal policy, same preferences, and V* = 0 in every state.
The paper proves these and shows none of them in numbers. What it leaves open is how near the token reward comes with N pairs:
here tabular DPO on the trees, and the gold world's DPO models on 1/8 to all of their pairs (the runs of data_scaling).
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common import numpy_rng, open_model
from experiments.data_scaling import FRACTIONS, scaled
from experiments.exact import log_softmax, log_sum_exp
from experiments.study import (
    COLOURS,
    MARKERS,
    PRESETS,
    Arm,
    Table,
    base_arms,
    command,
    drawing,
    interval,
    markdown,
    numbers,
    over_seeds,
    shown,
)  # fmt: skip
from experiments.tasks import make_task, map_rows, sample_rows, take
from rto_jax import gold, losses, programs
from rto_jax.metrics import progress
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import make_mesh

ACTIONS, HORIZON, BETA = 3, 4, 0.5  # of the trees
SIZES = tuple(2**k for k in range(5, 16))  # N, pairs
RIDGE = 0.25  # of the fits to N pairs: a prior N(0, 4) on every logit of π less that of π_ref
TREES = 4  # per seed


# ---------------------------------------------------------------------------------------------- trees


class Tree(NamedTuple):
    """All responses of H tokens of A kinds. The n inner nodes are states, breadth first: child a of s is node A·s + a + 1.

    Tables are [n, A]; responses are the L = A^H leaves.
    """

    passes: np.ndarray  # [L, n, A]: 1 where the response takes a in s

    @property
    def shape(self) -> tuple[int, int]:
        return self.passes.shape[1:]


@functools.cache
def tree(actions: int, horizon: int) -> Tree:
    nodes = (actions**horizon - 1) // (actions - 1)
    passes = np.zeros((actions**horizon, nodes, actions))
    for leaf, tokens in enumerate(itertools.product(range(actions), repeat=horizon)):
        node = 0
        for token in tokens:
            passes[leaf, node, token] = 1
            node = actions * node + token + 1
    return Tree(passes)


def totals(tree: Tree, table: np.ndarray) -> np.ndarray:
    """Sums of a table along the responses, [L]."""
    return np.tensordot(tree.passes, table, 2)


def ahead(values: np.ndarray, actions: int) -> np.ndarray:
    """The value of the state that every token leads to, [n, A], from the inner nodes' values [n]; a leaf's is 0."""
    leaves = np.zeros(len(values) * actions + 1 - len(values))
    return np.concatenate([values, leaves])[1:].reshape(-1, actions)


def q_of(rewards: np.ndarray, ref: np.ndarray, *, beta: float) -> np.ndarray:
    """Q*(s, a) = r + β log π_ref + V*(s'), eq. 7, V* = β log Σ exp(Q*/β), eq. 6: backwards from the leaves. [n, A]."""
    nodes, actions = rewards.shape
    values, q = np.zeros(nodes * actions + 1), np.zeros(rewards.shape)
    for s in reversed(range(nodes)):
        q[s] = rewards[s] + beta * ref[s] + values[actions * s + 1 : actions * (s + 1) + 1]
        values[s] = beta * log_sum_exp(q[s] / beta)
    return q


def rewards_of(q: np.ndarray, ref: np.ndarray, *, beta: float) -> np.ndarray:
    """r = Q* − β log π_ref − V*(s'): eq. 7 inverted, the other way of Lemma 1. [n, A]."""
    return q - beta * ref - ahead(beta * log_sum_exp(q / beta), q.shape[1])


def shaped(rewards: np.ndarray, potentials: np.ndarray) -> np.ndarray:
    """r + Φ(s') − Φ(s), Definition 1, with Φ [n] of the inner nodes and 0 at the leaves."""
    return rewards + ahead(potentials, rewards.shape[1]) - potentials[:, None]


def at_the_end(tree: Tree, rewards: np.ndarray) -> np.ndarray:
    """The reward that pays a response's whole sum with its last token."""
    out = np.zeros(rewards.shape)
    inner = len(tree.passes) // rewards.shape[1]  # parents of leaves: the last of the inner nodes
    out[-inner:] = totals(tree, rewards).reshape(inner, -1)
    return out


def log_ratios(log_pi: np.ndarray, ref: np.ndarray, *, beta: float) -> np.ndarray:
    return beta * (log_pi - ref)


def preferences(scores: np.ndarray) -> np.ndarray:
    """P(i ≻ j) = σ(score_i − score_j), eq. 1, [L, L]."""
    return 0.5 + 0.5 * np.tanh((scores[:, None] - scores) / 2)


def fit_dpo(tree: Tree, wins: np.ndarray, ref: np.ndarray, *, beta: float, ridge: float = 0.0) -> np.ndarray:
    """log π [n, A] that minimises Σ_ij wins_ij · −log σ(h_i − h_j) + ridge/2 ‖θ‖², θ the logits of π less log π_ref.

    h = β log π(y)/π_ref(y), eq. 8 and 9, over tables of token logits; starts at π_ref. Gauss-Newton, damped: at the optimum
    of exact preferences it is Newton's method. wins: [L, L], how often i was preferred to j, counts or expected ones.
    """
    nodes, actions = tree.shape
    flat, own = tree.passes.reshape(len(wins), -1), tree.passes.sum(2)
    shifts = np.kron(np.eye(nodes), np.ones((actions, actions)))  # of a state's logits: no loss sees them
    theta = np.zeros((nodes, actions))

    def loss_of(theta):
        log_pi = log_softmax(ref + theta)
        h = totals(tree, log_ratios(log_pi, ref, beta=beta))
        return (wins * np.logaddexp(0, h - h[:, None])).sum() + ridge / 2 * (theta**2).sum(), log_pi, h

    loss, log_pi, h = loss_of(theta)
    for _ in range(200):
        lost = wins * (1 - preferences(h))
        both = (wins + wins.T) * preferences(h) * preferences(h).T
        jacobian = beta * (flat - (own[:, :, None] * np.exp(log_pi)).reshape(flat.shape))
        slope = jacobian.T @ (lost.sum(0) - lost.sum(1)) + ridge * theta.ravel()
        curve = jacobian.T @ (np.diag(both.sum(1)) - both) @ jacobian + ridge * np.eye(theta.size)
        step = -np.linalg.solve(curve + np.diag(curve).max() * shifts, slope).reshape(theta.shape)
        size = 1.0
        while size > 1e-6 and (found := loss_of(theta + size * step))[0] > loss:
            size /= 2
        if size <= 1e-6:
            break
        theta, (loss, log_pi, h) = theta + size * step, found
        if np.abs(size * step).max() < 1e-12:
            break
    return log_pi


def random_tree(rng: np.random.Generator) -> tuple[Tree, np.ndarray, np.ndarray]:
    """(tree, log π_ref, r): logits N(0, 0.7²) and rewards N(0, 1)."""
    found = tree(ACTIONS, HORIZON)
    return found, log_softmax(0.7 * rng.normal(size=found.shape)), rng.normal(size=found.shape)


def largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def theorems(rng: np.random.Generator) -> tuple[dict[str, float], dict[str, list]]:
    """What the theorems say is 0, on one tree, the largest over its states; and its token rewards, for the picture."""
    tree, ref, rewards = random_tree(rng)
    by = dict(beta=BETA)
    optimum = lambda r: log_softmax(q_of(r, ref, **by) / BETA)  # noqa: E731
    q, any_q = q_of(rewards, ref, **by), rng.normal(size=rewards.shape)
    values, best = BETA * log_sum_exp(q / BETA), optimum(rewards)
    advantages = rewards + ahead(values, ACTIONS) - values[:, None]
    chances = np.exp(totals(tree, ref))
    wins = np.outer(chances, chances) * preferences(totals(tree, rewards))
    fitted = log_ratios(fit_dpo(tree, wins, ref, **by), ref, **by)
    others = shaped(rewards, rng.normal(size=len(rewards))), at_the_end(tree, rewards)
    same = [preferences(totals(tree, other)) - preferences(totals(tree, rewards)) for other in (*others, fitted)]
    facts = {
        "r → Q* → r": largest(rewards_of(q, ref, **by) - rewards),
        "Q* → r → Q*": largest(q_of(rewards_of(any_q, ref, **by), ref, **by) - any_q),
        "β log π*/π_ref − A*": largest(log_ratios(best, ref, **by) - advantages),
        "DPO's token reward − A*": largest(fitted - advantages),
        "π* of a shaped reward and of one paid at the end": max(largest(optimum(other) - best) for other in others),
        "π* of DPO's token reward": largest(optimum(fitted) - best),
        "V* of DPO's token reward": largest(BETA * log_sum_exp(q_of(fitted, ref, **by) / BETA)),
        "preferences of these rewards": max(map(largest, same)),
    }
    picture = {"advantages": advantages, "fitted": fitted, "rewards": rewards, "at_the_end": others[1]}
    return facts, {name: [round(float(x), 4) for x in table.ravel()] for name, table in picture.items()}


def errors_of_n_pairs(rng: np.random.Generator) -> dict[str, list[float] | float]:
    """Errors of tabular DPO on one tree, against N: root mean squares over the tokens of π_ref, relative to that of A*."""
    tree, ref, rewards = random_tree(rng)
    chances = np.exp(totals(tree, ref))
    weights = np.tensordot(chances, tree.passes, 1)
    exact = log_ratios(log_softmax(q_of(rewards, ref, beta=BETA) / BETA), ref, beta=BETA)
    rms = lambda x: float(np.sqrt((weights * x**2).sum()))  # noqa: E731
    first, second = rng.choice(len(chances), size=(2, max(SIZES)), p=chances / chances.sum())
    swap = rng.random(max(SIZES)) > preferences(totals(tree, rewards))[first, second]
    winner, loser = np.where(swap, second, first), np.where(swap, first, second)
    found: dict = {"A*": [], "r": [], "limit of r": rms(exact - rewards) / rms(exact)}
    for n in SIZES:
        wins = np.zeros((len(chances),) * 2)
        np.add.at(wins, (winner[:n], loser[:n]), 1)
        fitted = log_ratios(fit_dpo(tree, wins, ref, beta=BETA, ridge=RIDGE), ref, beta=BETA)
        found["A*"].append(rms(fitted - exact) / rms(exact))
        found["r"].append(rms(fitted - rewards) / rms(exact))
    return found


# ---------------------------------------------------------------------------------------------- the gold world


def gold_facts(world: gold.World, rng: np.random.Generator, pairs: int) -> dict[str, float]:
    """The theorems on the world's exact tables, along answers of π_0: largest differences, and how r and A* differ."""
    best = world.solve()
    prompts = np.repeat(world.prompts(rng, pairs), 2, axis=0)
    tokens, mask = world.sample_pi0(prompts, rng)
    along = lambda table: world.policy_logps(table, prompts, tokens, mask)  # noqa: E731
    values = np.where(mask, along(np.broadcast_to(best.V[..., None], best.A.shape))[..., 0], 0)
    after = np.concatenate([values[:, 1:], np.zeros((len(mask), 1))], 1)
    taken = lambda table: np.take_along_axis(along(table), np.where(mask, tokens, 0)[..., None], 2)[..., 0]  # noqa: E731
    rewards, log_ratio = (np.where(mask, taken(x), 0) for x in (world.rewards, world.beta * (best.log_pistar - best.log_pi0)))
    logits = along(best.log_pi0 + best.Q / world.beta).astype(np.float32)
    recovered = losses.rewards_of_q(logits, np.where(mask, tokens, 0), taken(best.log_pi0).astype(np.float32), mask, beta=world.beta)
    margin, implicit = (x.sum(1)[0::2] - x.sum(1)[1::2] for x in (rewards, log_ratio))
    chance = lambda gap: 0.5 + 0.5 * np.tanh(gap / 2)  # noqa: E731
    return {
        "β log π*/π_ref − (r + V*(s') − V*(s))": largest(log_ratio - (rewards + after - values)),
        "Q* → r, losses.rewards_of_q in float32": largest(np.asarray(recovered) - rewards),
        "preferences of r and of β log π*/π_ref": largest(chance(margin) - chance(implicit)),
        "correlation of r and A*": float(np.corrcoef(rewards[mask], log_ratio[mask])[0, 1]),
        "tokens whose r and A* differ in sign": float(np.mean(rewards[mask] * log_ratio[mask] < 0)),
    }  # fmt: skip


def fidelity(arm: Arm, base: Path, seed: int) -> dict[str, float]:
    """How near a trained model's token rewards are to A* and to r, over the tokens of its reference's own answers."""
    folder, reference = (base / f"seed{seed}" / x.folder for x in (arm, arm.upstream["init"]))
    stage = dataclasses.replace(arm.config, out="", seed=seed)
    mesh = make_mesh(stage.mesh)
    models = [open_model(str(x), stage, "--runs") for x in (folder, reference)]
    task = make_task(stage, mesh, models[0])
    ours, theirs = (model.load(mesh) for model in models)
    prompts = take(task.prompts("test"), stage.gold.rollouts, seed)
    seqs = sample_rows(task, models[1].config, theirs, prompts, seed, SamplingConfig(task.world.horizon), 1024)
    logps = programs.response_logps(models[0].config, mesh)
    rewards = map_rows(lambda batch: stage.beta * (logps(ours, batch) - logps(theirs, batch)), seqs, 1024, mesh)
    where = prompts.tokens, seqs.tokens[:, gold.PROMPT_LENGTH :], seqs.mask
    found, exact, raw = (x[seqs.mask].astype(float) for x in (rewards, task.world.exact_advantages(*where), task.world.token_rewards(*where)))
    return {
        "error": float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2))),
        "correlation": float(np.corrcoef(found, exact)[0, 1]), "correlation_r": float(np.corrcoef(found, raw)[0, 1]),
    }  # fmt: skip


def arms(preset: str) -> dict[str, Arm]:
    return {str(part): scaled(base_arms(preset)["RTO"], part, "preferences").upstream["dpo"] for part in FRACTIONS}


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    trees, facts, curves = TREES * seeds, [], []
    with progress(trees, "trees") as bar:
        for number in range(1, trees + 1):
            told, picture = theorems(numpy_rng(number, "bijection-exact"))
            facts.append(told)
            curves.append(errors_of_n_pairs(numpy_rng(number, "bijection-pairs")))
            bar.update()
    world = gold.World()
    return {
        "tree": {"actions": ACTIONS, "horizon": HORIZON, "beta": BETA, "ridge": RIDGE, "trees": trees},
        "theorems": {name: max(told[name] for told in facts) for name in facts[0]}, "picture": picture,
        "gold": gold_facts(world, numpy_rng(1, "bijection-gold"), 4096),
        "sizes": SIZES, "tabular": curves, "pairs": {name: arm.config.gold.pairs for name, arm in arms.items()},
        "trained": {name: [fidelity(arm, base, seed) for seed in numbers(seeds)] for name, arm in arms.items()},
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- drawing


def slopes(sizes: list[int], errors: np.ndarray, least: int) -> list[float]:
    """Slope in the log-log plot from N = `least` on, of each row."""
    late = np.array(sizes) >= least
    return [float(np.polyfit(np.log(np.array(sizes)[late]), np.log(row[late]), 1)[0]) for row in errors]


def draw(found: dict, folder: Path) -> str:
    picture, sizes, trained = found["picture"], found["sizes"], found["trained"]
    tabular = {key: np.array([x[key] for x in found["tabular"]]) for key in ("A*", "r", "limit of r")}
    of = lambda name, key: [run[key] for run in trained[name]]  # noqa: E731
    with drawing(folder / "gold.svg", 3, 3.7) as (left, middle, right):
        rows = {"advantages": "r + V*(s′) − V*(s)", "rewards": "r", "at_the_end": "the same r, paid at the end"}
        for number, (key, label) in enumerate(rows.items()):
            left.plot(picture[key], picture["fitted"], ls="", marker=MARKERS[number], ms=3, alpha=0.7, color=COLOURS[number], label=label)
        left.axline((0, 0), slope=1, color="#777777", lw=1, ls=":")
        left.set(title="endless data, one tree", xlabel="against", ylabel="DPO's token reward")
        left.legend(loc="lower right", frameon=True, edgecolor="none")
        for number, (key, label) in enumerate({"A*": "to A*", "r": "to r"}.items()):
            middle.plot(sizes, tabular[key].mean(0), marker=MARKERS[number], ms=4, color=COLOURS[number], label=label)
            middle.fill_between(sizes, tabular[key].min(0), tabular[key].max(0), color=COLOURS[number], alpha=0.12, linewidth=0)
        late = np.array(sizes[len(sizes) // 2 :])
        middle.plot(late, tabular["A*"].mean(0)[-1] * np.sqrt(late[-1] / late), color="#777777", ls=":", lw=1, label="N^−½")
        middle.axhline(tabular["limit of r"].mean(), color=COLOURS[1], ls="--", lw=1, label="of A* itself to r")
        middle.set(xscale="log", yscale="log", xlabel="pairs N", ylabel="distance of the token reward / ‖A*‖", title="tabular DPO on trees")
        middle.legend()
        pairs = [found["pairs"][name] for name in trained]
        for number, (key, label) in enumerate({"error": "distance to A* / ‖A*‖", "correlation": "correlation with A*", "correlation_r": "with r"}.items()):
            values = np.array([of(name, key) for name in trained])
            right.plot(pairs, values.mean(1), marker=MARKERS[number], ms=4, color=COLOURS[number], label=label)
            right.plot(pairs, values, ls="", marker=MARKERS[number], ms=3, alpha=0.4, color=COLOURS[number])
        right.axhline(found["gold"]["correlation of r and A*"], color=COLOURS[2], ls="--", lw=1, label="of A* itself with r")
        right.set(xscale="log", xlabel="pairs N", ylim=(0, 1.05), title="DPO models in the gold world")
        right.set_xticks(pairs, [f"{n:,}" for n in pairs])
        right.minorticks_off()
        right.legend()
    zero = [[f"{name}, trees", f"{x:.0e}".replace("-", "−")] for name, x in found["theorems"].items()]
    exact = {name: x for name, x in found["gold"].items() if name not in ("correlation of r and A*", "tokens whose r and A* differ in sign")}
    zero += [[f"{name}, gold world", f"{x:.0e}".replace("-", "−")] for name, x in exact.items()]
    text = markdown(("0 by the theorems", "largest found"), zero)
    about = found["tree"]
    text += f"\n\n{about['trees']} random trees, {about['actions']} kinds of token, {about['horizon']} tokens, β = {about['beta']:g}; answers of π₀ in the gold world."
    text += f" A* is not r: in the gold world they correlate by {found['gold']['correlation of r and A*']:.2f} over tokens, and "
    text += f"{found['gold']['tokens whose r and A* differ in sign']:.0%} of the tokens have opposite signs.\n\n"
    middle_of = len(sizes) // 2
    text += markdown(
        ("tabular DPO, distance / ‖A*‖", *(f"N = {sizes[i]:,}" for i in (0, middle_of, -1)), "endless data"),
        [
            ["to A*", *(shown(interval(list(tabular["A*"][:, i])), 3) for i in (0, middle_of, -1)), "0"],
            ["to r", *(shown(interval(list(tabular["r"][:, i])), 3) for i in (0, middle_of, -1)), shown(interval(list(tabular["limit of r"])), 3)],
        ],
    )
    text += f"\n\nSlope of the distance to A* in the log-log plot from N = {sizes[middle_of]:,}: {shown(interval(slopes(sizes, tabular['A*'], sizes[middle_of])))}"
    text += f" (−½ is the parametric rate); {about['trees']} trees, ridge {about['ridge']:g}.\n\n"
    keys = {"error": "distance to A* / ‖A*‖", "correlation": "correlation with A*", "correlation_r": "correlation with r"}
    text += markdown(
        ("DPO models, gold world", *(f"{found['pairs'][name]:,} pairs" for name in trained)),
        [[label, *(shown(interval(of(name, key)), 3) for name in trained)] for key, label in keys.items()],
    )
    few, all_of = next(iter(trained)), list(trained)[-1]
    gap, credit = interval(of(all_of, "error"), of(few, "error")), interval(of(all_of, "correlation"), of(all_of, "correlation_r"))
    text += f"\n\nWith all pairs instead of {few} of them the distance to A* changes by {shown(gap, 3)}; with all, the correlation with A*"
    text += f" less that with r is {shown(credit, 3)}. The models' reference is the SFT model, that of A* is π₀."
    return text + over_seeds(len(of(few, "error")))


TABLE = Table("bijection", arms, collect, draw)

if __name__ == "__main__":
    command(TABLE, __doc__, {"gold": PRESETS["gold"]})
