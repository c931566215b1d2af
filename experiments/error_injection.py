"""Does a token reward point at the wrong token? Errors at known places in right answers, and what finds them.

    python -m experiments.error_injection              5 seeds of the embedded world, about 10 minutes on 2 cores
    python -m experiments.error_injection --cheap      a minute: one seed, hardly any steps
    python -m experiments.error_injection --draw       from results/error_injection/gold.json alone
    python -m experiments.error_injection --preset smollm2 --data DIR --pairs FILE      models and answers in words

From r to Q* (arXiv 2404.12358) shows three answers with hand-edited facts whose tokens get a low implicit reward, even the
second one after the first (Figure 1), and no number. Here:

    AUC          P(the wrong token scores below another token of the same answer), a tie counts ½: ½ is chance
    found first  how often the wrong token has the lowest score of its answer
    second       AUC of the later of two errors
    correlation  of the scores with the exact advantage A*, over tokens; on held-out pairs with the gold reward r* too,
                 which is another thing (OPEN costs now and pays later) and what a reward model is nearer to

In the embedded world right answers are the optimal policy's, and an error is a token whose exact advantage is at most −1
where no other token's is: A* itself has AUC 1. In words (--data with right answers, such as GSM8K's) a number, a name or
a sign is changed; the tokens that overlap it are the error. --pairs are wrong answers as they come (LLMBar, or any
preferences), without known places: how often the score's sum prefers the right one.

A reward model's score of a token is the difference that it makes to the score of the answer so far. What would reproduce:
DPO's implicit reward well above ½, and above a reward model that was trained on whole answers; the probability under SFT,
the simplest score, stands beside them.
"""

import dataclasses
import functools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from experiments.common import Stage, frozen, main, numpy_rng, open_model, same_size, same_tokenizer, write_json
from experiments.credit_assignment import in_blocks, prefix_differences, run_settings, statistics
from experiments.presets import SMOLLM2
from experiments.study import (
    COLOURS,
    MARKERS,
    Arm,
    StudyConfig,
    Table,
    base_arms,
    drawing,
    interval,
    make,
    markdown,
    numbers,
    over_seeds,
    shown,
)  # fmt: skip
from experiments.tasks import local_data, make_task, map_rows, say, take
from rto_jax import losses
from rto_jax.data import (
    Encoder,
    Example,
    Lengths,
    Preference,
    Tokenizer,
    held_out_splits,
    read_examples,
    read_preferences,
)
from rto_jax.data.records import json_lines
from rto_jax.errors import UserError
from rto_jax.evaluation import auc
from rto_jax.gold import OUTPUTS, World
from rto_jax.metrics import git_commit, progress
from rto_jax.sharding import make_mesh
from rto_jax.types import Sequences

THRESHOLD = 1.0  # an error of the gold world has A* at most −1, no other token has
EXACT, DPO, RANDOM = "exact advantage A*", "DPO's implicit reward", "random numbers"
LIKELY = "log-probability under SFT"
# Prefix differences; in brackets, how the model reads an answer: a sum over its tokens, or one number at the last.
REWARD = {"token": "reward model (sum of tokens)", "last": "reward model (last token)"}

# ---------------------------------------------------------------------------------------------- what is measured


def finds(scores: np.ndarray, errors: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each answer: AUC of the negated scores for its errors, and whether the lowest score is an error's.

    scores: [n, T]. errors, mask: bool [n, T], errors within the mask, at least one in each row and not all of it. Of equal
    lowest scores the share that is errors counts. Both float64 [n].
    """
    area = np.array([auc(-row[kept], wrong[kept]) for row, wrong, kept in zip(scores, errors, mask, strict=True)])
    lowest = mask & (scores == np.where(mask, scores, np.inf).min(1, keepdims=True))
    return area, (lowest & errors).sum(1) / lowest.sum(1)


def correlation(scores: np.ndarray, exact: np.ndarray, mask: np.ndarray) -> float:
    """Pearson's, over the tokens of all answers; 0 for scores that are all the same."""
    x, y = scores[mask].astype(float), exact[mask].astype(float)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


# ---------------------------------------------------------------------------------------------- the embedded world


class Injected(NamedTuple):
    """Answers of the gold world with errors; [n, H]."""

    prompts: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    errors: np.ndarray  # bool: the tokens that were put in


def inject(world: World, prompts, tokens, mask, count: int, rng: np.random.Generator, tries: int = 400) -> Injected:
    """`count` tokens of each answer exchanged, so that A* ≤ −THRESHOLD at these and at no other token of what results.

    Places and tokens are drawn at random until that holds; answers in which no try of `tries` does are left out. The EOS,
    or the last token of a cut answer, stays what it is.
    """
    n, length = len(tokens), mask.sum(1)
    out, errors, waiting = tokens.copy(), np.zeros_like(mask), np.flatnonzero(length > count)
    slots = np.arange(tokens.shape[1])
    done = np.zeros(n, bool)
    for _ in range(tries):
        order = np.where(slots < length[waiting, None] - 1, rng.random((len(waiting), len(slots))), np.inf)
        at = np.argsort(order, axis=1)[:, :count]
        tried, wrong = tokens[waiting].copy(), np.zeros((len(waiting), len(slots)), bool)
        np.put_along_axis(tried, at, rng.integers(1, OUTPUTS, at.shape, dtype=tokens.dtype), axis=1)  # never the EOS, 0
        np.put_along_axis(wrong, at, True, axis=1)
        low = (world.exact_advantages(prompts[waiting], tried, mask[waiting]) <= -THRESHOLD) & mask[waiting]
        good = (low == wrong).all(1) & ((tried != tokens[waiting]) == wrong).all(1)
        rows = waiting[good]
        out[rows], errors[rows], done[rows] = tried[good], wrong[good], True
        waiting = waiting[~good]
        if not len(waiting):
            break
    return Injected(prompts[done], out[done], mask[done], errors[done])


def gold_figures(arms: Mapping[str, Arm], base: Path, seed: int) -> dict[str, dict[str, float]]:
    """Every figure of every score, of one seed's models."""
    stage = dataclasses.replace(arms["DPO"].config, out="", seed=seed)
    mesh = make_mesh(stage.mesh)
    models = {name: open_model(str(base / f"seed{seed}" / arm.folder), stage, "--runs") for name, arm in arms.items()}
    params = {name: model.load(mesh) for name, model in models.items()}
    task = make_task(stage, mesh, models["SFT"])
    world, rng = task.world, numpy_rng(seed, "error-injection")
    prompts = world.prompts(rng, stage.gold.rollouts)
    right = world.sample(world.solve().log_pistar, prompts, rng)
    one, two = (inject(world, prompts, *right, count, rng) for count in (1, 2))
    pairs = take(task.pairs("test", models["SFT"]), stage.gold.rollouts // 4, seed)
    held_out = jax.tree.map(lambda *sides: np.concatenate(sides), *pairs)

    def scores(rows: Sequences) -> dict[str, np.ndarray]:
        size = in_blocks(len(rows.tokens), mesh, 1024)
        program = statistics(models["DPO"].config, mesh)
        found = map_rows(functools.partial(program, params["DPO"], params["SFT"]), rows, size, mesh)
        cut = rows.tokens.shape[1] - rows.mask.shape[1]
        return {
            EXACT: world.exact_advantages(rows.tokens[:, :cut], rows.tokens[:, cut:], rows.mask),
            DPO: np.asarray(losses.implicit_token_rewards(found.logps, found.ref_logps, rows.mask, beta=arms["DPO"].config.beta)),
            **{
                REWARD[models[name].head]: prefix_differences(models[name], params[name], rows, mesh, 1024)
                for name in ("reward model", "last")
            },
            LIKELY: np.asarray(found.ref_logps),
            RANDOM: rng.standard_normal(rows.mask.shape),
        }

    with_one, with_two = (scores(task.rows(*x[:3])) for x in (one, two))
    plain, cut = scores(held_out), held_out.tokens.shape[1] - held_out.mask.shape[1]
    gold_rewards = world.token_rewards(held_out.tokens[:, :cut], held_out.tokens[:, cut:], held_out.mask)
    # The later error against what is none: the first one is left out of the comparison.
    later = two.errors & (np.cumsum(two.errors, axis=1) == 2)
    others = two.mask & (later | ~two.errors)
    figures = {}
    for name in with_one:
        area, first = finds(with_one[name], one.errors, one.mask)
        second, _ = finds(with_two[name], later, others)
        figures[name] = {
            "auc": float(area.mean()), "first": float(first.mean()), "second": float(second.mean()),
            "correlation": correlation(with_one[name], with_one[EXACT], one.mask),
            "held_out": correlation(plain[name], plain[EXACT], held_out.mask),
            "gold": correlation(plain[name], gold_rewards, held_out.mask),
        }  # fmt: skip
    return {"scores": figures, "answers": [len(one.tokens), len(two.tokens), len(held_out.tokens)], "length": float(one.mask.sum(1).mean())}


def arms(preset: str) -> dict[str, Arm]:
    base = base_arms(preset)
    return {name: base[name] for name in ("SFT", "DPO", "reward model")} | {"last": base["reward model"].changed(head="last")}


def collect(arms: Mapping[str, Arm], base: Path, seeds: int) -> dict:
    found = [gold_figures(arms, base, seed) for seed in numbers(seeds)]
    return {
        "answers": [f["answers"] for f in found], "length": float(np.mean([f["length"] for f in found])),
        "scores": {name: [f["scores"][name] for f in found] for name in found[0]["scores"]},
    }  # fmt: skip


KEYS = {
    "auc": "AUC", "first": "found first", "second": "AUC, second of two",
    "correlation": "correlation with A*", "held_out": "held-out pairs: with A*", "gold": "with the gold token reward r*",
}  # fmt: skip


def draw(found: dict, folder: Path) -> str:
    of = lambda name, key: [run[key] for run in found["scores"][name]]  # noqa: E731
    names = list(found["scores"])
    with drawing(folder / "gold.svg", 2, 4.0, 2.6) as panels:
        for panel, key, chance in zip(panels, ("auc", "held_out"), (0.5, 0.0), strict=True):
            for number, name in enumerate(names):
                style = dict(color=COLOURS[number], marker=MARKERS[number], ls="")
                panel.plot(of(name, key), [number] * len(of(name, key)), ms=3, alpha=0.5, **style)
                panel.plot([np.mean(of(name, key))], [number], ms=7, **style)
            panel.axvline(chance, color="#777777", ls=":", lw=1)
            panel.set(yticks=range(len(names)), yticklabels=names if key == "auc" else [])
            panel.margins(y=0.12)
            panel.invert_yaxis()
        panels[0].set(xlabel="AUC of the wrong token in its answer")
        panels[1].set(xlabel="correlation with A*, held-out pairs")
    rows = [[name, *(shown(interval(of(name, key)), 3) for key in KEYS)] for name in names]
    text = markdown(("score of a token", *KEYS.values()), rows)
    gap = {other: shown(interval(of(DPO, "auc"), of(other, "auc")), 3) for other in (*REWARD.values(), LIKELY)}
    ones, twos, plain = np.mean(found["answers"], axis=0)
    text += f"\n\nAUC of DPO's implicit reward less that of {'; '.join(f'{name}: {x}' for name, x in gap.items())}."
    text += f"\n\n{ones:.0f} answers a seed with one error and {twos:.0f} with two, of {found['length']:.0f} tokens on average, "
    text += f"and {plain:.0f} held-out answers of the SFT policy; an error is a token with A* ≤ −{THRESHOLD:g} where no other has that."
    return text + over_seeds(len(of(DPO, "auc")))


TABLE = Table("error_injection", arms, collect, draw)

# ---------------------------------------------------------------------------------------------- answers in words


@dataclass(frozen=True, kw_only=True)
class TextConfig(Stage):
    freezes: ClassVar[bool] = True
    sft: str = "runs/smollm2/sft"
    """the reference"""
    dpo: str = "runs/smollm2/dpo"
    """the model of the implicit reward"""
    reward_model: str = "runs/smollm2/reward_model"
    """a reward model of whole answers; "": none"""
    beta: float | None = None
    """of the implicit reward, which it only scales; default: that of the run in --dpo, or 1"""
    split: str = ""
    """of --data; default: the first held-out one"""
    pairs: str = ""
    """preferences whose wrong answers are as they come: LLMBar's file, or a file or folder as --data of DPO may be"""
    answers: int = 200
    """right answers of each kind of error, and pairs, at most"""
    draw: bool = False
    """print the table of OUT/results.json, and run no model"""

    def __post_init__(self):
        super().__post_init__()
        if self.answers < 2:
            raise UserError(f"--answers must be at least 2, not {self.answers}.")


class Corrupted(NamedTuple):
    """A right answer with one thing changed at text[begin:end]."""

    text: str
    begin: int
    end: int


_NUMBER = re.compile(r"(?<![\w.])(?<!\d,)\d+(?!\w|[.,]\d)")  # whole, and no part of another
_SIGN = re.compile(r"(?<=[\d)])\s*([-+*/])\s*(?=[\d(])|\b(more|less|fewer)\b")
_SIGNS = {"+": "-", "-": "+", "*": "/", "/": "*", "more": "less", "less": "more", "fewer": "more"}
_NAME = re.compile(r"\b[A-Z][a-z]{2,}\b")
_WORKING = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes, which would betray a changed result


def proper_names(texts: Sequence[str]) -> list[str]:
    """Capitalised words that the texts never have in lower case, sorted."""
    words = {word for text in texts for word in re.findall(r"\b[a-z]+\b", text)}
    return sorted({name for text in texts for name in _NAME.findall(text) if name.lower() not in words})


def corrupt(text: str, kind: str, rng: np.random.Generator, names: Sequence[str] = ()) -> Corrupted | None:
    """One number, name or sign of the text made another, drawn at random; None where there is none of the kind.

    number: a whole number, by 1 to 10 up or down and never below 0. sign: + and -, * and / between numbers, "more" and
    "less". name: one of `names` by another of them.
    """
    if kind == "number":
        found = [(m.start(), m.end()) for m in _NUMBER.finditer(text)]
    elif kind == "sign":
        found = [m.span(m.lastindex) for m in _SIGN.finditer(text)]
    else:
        found = [m.span() for m in _NAME.finditer(text) if m[0] in names]
    if not found:
        return None
    begin, end = found[rng.integers(len(found))]
    old = text[begin:end]
    if kind == "number":
        step = int(rng.integers(1, 11))
        new = str(int(old) + (-step if rng.random() < 0.5 and int(old) >= step else step))
    elif kind == "sign":
        new = _SIGNS[old]
    else:
        others = [name for name in names if name != old]
        if not others:
            return None
        new = others[rng.integers(len(others))]
    return Corrupted(text[:begin] + new + text[end:], begin, begin + len(new))


KINDS = ("number", "name", "sign")


def encode(wrong: Sequence[tuple[Example, Corrupted]], tokenizer: Tokenizer, lengths: Lengths) -> tuple[Sequences, np.ndarray]:
    """Rows of the corrupted answers, and where the errors' tokens are, bool [n, T]."""
    rows = Encoder(tokenizer, lengths)([dataclasses.replace(e, response=c.text) for e, c in wrong])
    errors = np.zeros(rows.mask.shape, bool)
    for row, (_, c) in zip(errors, wrong, strict=True):
        spans = tokenizer.offsets(c.text)[: row.size]
        row[: len(spans)] = [begin < c.end and end > c.begin for begin, end in spans]
    return rows, errors & rows.mask


def _judged(where: str, row: dict) -> Preference:
    """Of a row of LLMBar's."""
    texts = [row.get(name) for name in ("input", "output_1", "output_2")]
    if not all(isinstance(text, str) and text.strip() for text in texts) or row.get("label") not in (1, 2):
        raise UserError(f"--pairs {where}: want texts input, output_1 and output_2, and a label of 1 or 2.")
    prompt, *answers = texts
    return Preference(({"role": "user", "content": prompt},), *answers[:: 3 - 2 * row["label"]])


def natural_pairs(path: Path) -> list[Preference]:
    """Preferences of any shape that the stages read, or a file of LLMBar's: input, output_1, output_2, label (1 or 2)."""
    if path.is_dir():
        return read_preferences(path, held_out_splits(path)[0])[0]
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        _, first = next(json_lines(path), ("", {}))
        if {"label", "output_1"} <= first.keys():
            return [_judged(where, row) for where, row in json_lines(path)]
    return read_preferences(path)[0]


def run_text(config: TextConfig) -> dict:
    """Corrupted answers, and pairs as they come, under text models; intervals are over the answers."""
    out = Path(config.out)
    if config.draw:
        if not (out / "results.json").exists():
            raise UserError(f"--draw: there is no {out / 'results.json'}; run without it first.")
        found = json.loads((out / "results.json").read_text())
    else:
        found = text_figures(config)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "results.json", found)
    text = text_table(found)
    (out / "results.md").write_text(text + "\n")
    print(text)
    return found


def text_figures(config: TextConfig) -> dict:
    began, mesh = time.time(), make_mesh(config.mesh)
    sft, dpo = open_model(config.sft, config, "--sft"), open_model(config.dpo, config, "--dpo")
    reward = open_model(config.reward_model, config, "--reward-model") if config.reward_model else None
    same_tokenizer(sft, ("--dpo", dpo), *([("--reward-model", reward)] if reward else []))
    if sft.tokenizer is None:
        raise UserError("--sft is a model of the gold world; its errors are those of --preset gold.")
    same_size(sft, ("--dpo", dpo))
    if reward and reward.head == "lm":
        raise UserError(f"--reward-model {reward.source} is a language model, without a scalar head.")
    if not config.data:
        raise UserError("--data is missing: a folder or file of right answers, such as GSM8K's.")
    path = local_data(config.data)
    records, report = read_examples(path, config.split or held_out_splits(path)[0], skip_bad=config.skip_bad_records)
    say(f"{report.records} right answers{report.notes()}")
    records = [dataclasses.replace(r, response=_WORKING.sub("", r.response)) for r in records]
    names = proper_names([r.prompt[-1]["content"] for r in records])
    rng, sets = numpy_rng(config.seed, "error-injection"), {}
    for kind in KINDS:
        wrong = []
        for i in rng.permutation(len(records)):
            made = corrupt(records[i].response, kind, rng, names)
            if made and len(sft.tokenizer.encode(made.text)) < config.lengths.response:  # whole, with its EOS
                wrong.append((records[i], made))
            if len(wrong) == config.answers:
                break
        if len(wrong) > 1:
            sets[kind] = encode(wrong, sft.tokenizer, config.lengths)
    if not sets:
        raise UserError(f"--data {config.data}: no answer fits --lengths.response {config.lengths.response} and has a number, name or sign.")
    params = {"sft": frozen(sft.load(mesh), config, mesh), "dpo": frozen(dpo.load(mesh), config, mesh)}
    weights = reward and frozen(reward.load(mesh), config, mesh)
    beta = config.beta or run_settings(Path(dpo.source)).get("beta") or 1.0
    size = in_blocks(config.batch_size, mesh, config.batch_size)
    program = statistics(dpo.config, mesh)

    def scores(rows: Sequences) -> dict[str, np.ndarray]:
        found = map_rows(functools.partial(program, params["dpo"], params["sft"]), rows, size, mesh)
        out = {DPO: np.asarray(losses.implicit_token_rewards(found.logps, found.ref_logps, rows.mask, beta=beta))}
        if reward:
            out[REWARD[reward.head]] = prefix_differences(reward, weights, rows, mesh, config.batch_size)
        return out | {LIKELY: np.asarray(found.ref_logps), RANDOM: rng.standard_normal(rows.mask.shape) * rows.mask}

    figures: dict[str, dict[str, Any]] = {}
    pairs = None
    if config.pairs:
        natural = natural_pairs(local_data(config.pairs))
        pairs = Encoder(sft.tokenizer, config.lengths)([natural[i] for i in sorted(rng.permutation(len(natural))[: config.answers])])
    with progress(len(sets) + bool(pairs), "sets of answers") as bar:
        for kind, (rows, errors) in sets.items():
            for name, found in scores(rows).items():
                area, first = finds(found, errors, rows.mask)
                figures.setdefault(name, {})[kind] = {"auc": area.tolist(), "first": first.tolist()}
            bar.update()
        if pairs:
            chosen, rejected = (scores(rows) for rows in pairs)
            for name in figures:
                gap = np.sum(chosen[name], axis=1) - np.sum(rejected[name], axis=1)
                figures[name]["pairs"] = {"right": (0.5 + 0.5 * np.sign(gap)).tolist()}
            bar.update()
    return {
        "facts": {
            "git": git_commit(), "seconds": round(time.time() - began), "sft": config.sft, "dpo": config.dpo, "beta": beta,
            "reward_model": config.reward_model, "data": Path(config.data).name, "pairs": Path(config.pairs).name, "seed": config.seed,
        },
        "tokens": {kind: [float(rows.mask.sum(1).mean()), float(errors.sum(1).mean())] for kind, (rows, errors) in sets.items()},
        "scores": figures,
    }  # fmt: skip


def text_table(found: dict) -> str:
    kinds, any_pairs = list(found["tokens"]), any("pairs" in x for x in found["scores"].values())
    head = ["score of a token", *(f"{kind}: AUC" for kind in kinds), *(f"{kind}: found first" for kind in kinds)]
    rows = []
    for name, figures in found["scores"].items():
        row = [name, *(shown(interval(figures[kind][key]), 3) for key in ("auc", "first") for kind in kinds)]
        rows.append(row + ([shown(interval(figures["pairs"]["right"]), 3)] if any_pairs else []))
    text = markdown(head + ["pairs as they come: right"] * any_pairs, rows)
    sizes = "; ".join(
        f"{kind}: {len(found['scores'][RANDOM][kind]['auc'])} answers of {a:.0f} tokens, {b:.1f} of them wrong"
        for kind, (a, b) in found["tokens"].items()
    )
    return f"{text}\n\n{sizes}. Means and 95 % bootstrap intervals over the answers, of one set of models."


# ---------------------------------------------------------------------------------------------- command line


def run(config: StudyConfig | TextConfig) -> Any:
    if isinstance(config, TextConfig):
        return run_text(config)
    print(make(TABLE, "gold", config))


PRESETS: dict[str, tuple[str, Any]] = {
    "gold": ("the embedded world", StudyConfig()),
    "smollm2": (
        "SmolLM2-135M: --data with right answers (GSM8K), --pairs with natural cases (LLMBar); minutes on 2 cores",
        TextConfig(out="runs/smollm2/error_injection", **SMOLLM2 | {"lengths": Lengths(prompt=128, response=160)}),
    ),
}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
