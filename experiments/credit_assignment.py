"""From r to Q*'s Figure 1: which tokens of an answer a DPO model rewards, beside what the other models of a run say of them.

    python -m experiments.credit_assignment                       the newest quickstart's gold runs, half a minute on a CPU
    python -m experiments.credit_assignment --sft DIR --dpo DIR --reward-model DIR --critic DIR --index 3
    python -m experiments.credit_assignment --preset smollm2 --data DIR
    python -m experiments.credit_assignment --preset smollm2 --data DIR --prompt "…" --chosen "…" --rejected "…"
    python -m experiments.credit_assignment --draw --out DIR      the page and the picture again, from DIR/pair.json alone

Of one pair, chosen and rejected side by side, aligned by their diff, token by token:

    implicit reward   β·log(π/π_ref), of one or two models (eq. 10)
    A*                what it would be with endless data (the gold world alone)
    reward model      its score of the answer up to this token, less that of the answer before it
    KL                KL(π_ref ‖ π) of the state before the token: −β times it is the implicit reward's mean (eq. 16)
    value, advantage, return    of a PPO or RTO run's critic, with the run's own token reward, γ and λ

It writes pair.json, pair.html (no scripts, nothing fetched), pair.svg and pair.png, and prints the page in colour to a
terminal. The paper shows three pairs on TL;DR (Pythia-2.8B, β 0.1) whose hand-edited facts are singled out, and no number;
experiments/error_injection.py measures it.
"""

import dataclasses
import functools
import json
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import (
    GOLD,
    GoldData,
    Model,
    Stage,
    frozen,
    main,
    open_model,
    same_size,
    same_tokenizer,
    write_json,
)
from experiments.pages import hardware
from experiments.presets import ABOUT, PAPER, SMOLLM2
from experiments.presets import GOLD as GOLD_PRESET
from experiments.study import drawing
from experiments.tasks import DigitsTask, GoldTask, TextTask, make_task, map_rows, take
from rto_jax import gold, heatmap, losses, programs
from rto_jax.checkpoint import restore_params
from rto_jax.data import Encoder, Lengths, Preference
from rto_jax.errors import UserError
from rto_jax.losses.masking import last_token, next_token
from rto_jax.metrics import git_commit
from rto_jax.models import LlamaConfig, language_model, scalar_model
from rto_jax.report import Report
from rto_jax.sharding import batch_sharding, blocks, make_mesh
from rto_jax.types import Pairs, Params, Sequences, prompt_length

Task = GoldTask | DigitsTask | TextTask
PAGE_TOKENS = 2_200  # coloured on one page, over all its measures: 200 to 300 kB


@dataclass(frozen=True, kw_only=True)
class CreditConfig(Stage):
    freezes: ClassVar[bool] = True
    runs: str = "runs/gold"
    """folder with the runs sft, dpo, reward_model (or reward-model) and rto or ppo, for the flags below that are not
    given; where it has none, the newest runs/quickstart-*/seed0 of the same world"""
    sft: str = ""
    """the reference"""
    dpo: str = ""
    """the model whose implicit reward is shown"""
    other: str = ""
    """a second model to put beside it: another loss, or the policy of an RL run"""
    reward_model: str = ""
    """for its prefix differences; without one they are left out"""
    critic: str = ""
    """a PPO or RTO run, for value, advantage and return; without one they are left out"""
    beta: float | None = None
    """of the implicit reward; default: that of the run in --dpo"""
    split: str = ""
    """of the data; default: the first held-out one"""
    index: int = -1
    """of the pair in it; −1: the one with the largest gold difference, or the first of two whole answers"""
    prompt: str = ""
    """instead of a pair of the data: the prompt, with --chosen and --rejected (of the gold world: names of tokens)"""
    chosen: str = ""
    """the better answer to --prompt"""
    rejected: str = ""
    """the worse answer to --prompt"""
    draw: bool = False
    """draw page and picture from OUT/pair.json, and run no model"""

    def __post_init__(self):
        super().__post_init__()
        texts = {"--prompt": self.prompt, "--chosen": self.chosen, "--rejected": self.rejected}
        if any(texts.values()) and not all(texts.values()):
            raise UserError(f"{', '.join(texts)} go together: {', '.join(n for n, x in texts.items() if not x)} is missing.")
        if self.lora.rank or self.dry_run or self.resume:
            raise UserError("--lora.rank, --dry-run and --resume have no effect: nothing is trained here.")


# ---------------------------------------------------------------------------------------------- scores of tokens


@functools.cache
def statistics(config: LlamaConfig, mesh):
    """Program: parameters, reference, Sequences -> log-probabilities under both and KL(reference ‖ parameters), [B, T]."""
    of = language_model(config, mesh).statistics
    return jax.jit(
        lambda params, reference, rows: of(params, reference, rows.tokens, rows.valid, prompt_length(rows), rows.mask),
        out_shardings=batch_sharding(mesh),
    )


@functools.cache
def values(config: LlamaConfig, mesh):
    """Program: parameters, Sequences -> a "last" head's number in the state before each token, [B, T]."""
    of = scalar_model(config, "last", mesh).values
    return jax.jit(
        lambda params, rows: jnp.where(rows.mask, of(params, rows.tokens, rows.valid, prompt_length(rows)), 0.0),
        out_shardings=batch_sharding(mesh),
    )


def in_blocks(n: int, mesh, size: int = 512) -> int:
    """A batch size for n rows that the mesh can cut."""
    ways = blocks(mesh)
    return -(-min(n, size) // ways) * ways


def prefix_differences(model: Model, params: Params, rows: Sequences, mesh, size: int = 512) -> np.ndarray:
    """score(x, y_{≤t}) − score(x, y_{<t}): what a reward model of whole answers gives to each token, float32 [n, T].

    The score of no token at all is that of the prompt. Their sum is the answer's score less that. One pass for a "last"
    head, whose number at every token is the score of the answer up to it; T + 1 passes for another. rows: n of them, NumPy.
    """
    size = in_blocks(len(rows.tokens), mesh, size)
    score = functools.partial(
        map_rows, functools.partial(programs.scores(model.config, model.head, mesh), params), size=size, mesh=mesh
    )
    mask, start = rows.mask, prompt_length(rows)
    if model.head == "last":
        before = map_rows(functools.partial(values(model.config, mesh), params), rows, size, mesh)
        after = next_token(jnp.asarray(before), jnp.asarray(mask))
        after = np.where(last_token(jnp.asarray(mask)), score(rows)[:, None], after)
        return np.where(mask, after - before, 0.0).astype(np.float32)

    def cut(count: int) -> Sequences:
        kept = np.arange(rows.tokens.shape[1]) < start + count
        return Sequences(rows.tokens, rows.valid & kept, mask & kept[start:])

    scores = np.stack([score(cut(count)) for count in range(mask.shape[1] + 1)], axis=1)
    return np.where(mask, np.diff(scores, axis=1), 0.0).astype(np.float32)


def token_texts(task: Task, ids: np.ndarray) -> list[str]:
    """The texts of tokens as `rto_jax.heatmap` takes them: with their own spaces, parts of characters as bare bytes."""
    if not isinstance(task, TextTask):
        return task.pieces(ids)
    backend, added = task.tokenizer.hf.backend_tokenizer, task.tokenizer.hf.added_tokens_decoder
    is_bytes = '"ByteLevel"' in json.dumps(json.loads(backend.to_str())["decoder"])
    out = []
    for i in map(int, ids):
        text = backend.id_to_token(i)
        if text is None or i in added:
            out.append(text or "")
        elif is_bytes:
            out.append(bytes(_byte_values()[c] for c in text).decode("utf-8", "surrogateescape"))
        elif len(text) == 6 and text.startswith("<0x"):
            out.append(bytes([int(text[3:5], 16)]).decode("utf-8", "surrogateescape"))
        else:
            out.append(text.replace("▁", " "))
    return out


@functools.cache
def _byte_values() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the characters from U+0100."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


# ---------------------------------------------------------------------------------------------- one pair


class Measure(NamedTuple):
    """A number for each token of two answers, of one or two models."""

    name: str
    about: str
    unit: str
    word: str  # what a merged word has: the sum of its pieces, or the first
    panels: dict[str, tuple[list[str], list[float]]]


def run(config: CreditConfig) -> dict:
    out = Path(config.out)
    if config.draw:
        if not (out / "pair.json").exists():
            raise UserError(f"--draw: there is no {out / 'pair.json'}; run without it first.")
        found = json.loads((out / "pair.json").read_text())
    else:
        found = compute(config)
        if jax.process_index():
            return found
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "pair.json", found)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        print(terminal(found))
    print(f"page: {page(found, out / 'pair.html').resolve()}")
    for suffix in ("svg", "png"):
        picture(found, out / f"pair.{suffix}")
    return found


def compute(config: CreditConfig) -> dict:
    """The pair and its measures, as they go into pair.json."""
    mesh, source = make_mesh(config.mesh), sources(config)
    sft, dpo = (open_model(source[name], config, f"--{name}") for name in ("sft", "dpo"))
    models = {"DPO": dpo}
    if source["other"]:
        models[name_of(source["other"]) + " (other)"] = open_model(source["other"], config, "--other")
    reward = open_model(source["reward_model"], config, "--reward-model") if source["reward_model"] else None
    named = [*zip(("--dpo", "--other"), models.values(), strict=False)]
    same_tokenizer(sft, *named, *([("--reward-model", reward)] if reward else []))
    same_size(sft, *named)
    if reward and reward.head == "lm":
        raise UserError(f"--reward-model {reward.source} is a language model, without a scalar head.")
    # A pair in words needs no data: the folder stands for it, and is never read.
    task = make_task(dataclasses.replace(config, data=config.data or "." * bool(config.prompt)), mesh, sft)
    pair = one_pair(config, task, sft)
    rows = jax.tree.map(lambda *sides: np.concatenate(sides), *pair)
    tokens = {
        side: token_texts(task, row[-len(mask) :][mask])
        for side, row, mask in zip(("chosen", "rejected"), rows.tokens, rows.mask, strict=True)
    }

    def measure(name, about, unit, word, scores: dict[str, np.ndarray]) -> Measure:
        """`scores`: [2, T] of each model."""
        panels = {}
        for label, found in scores.items():
            for (side, texts), x, mask in zip(tokens.items(), np.asarray(found), rows.mask, strict=True):
                panels[f"{label}: {side}" if len(scores) > 1 else side] = (texts, [float(f"{v:.6g}") for v in x[mask]])
        return Measure(name, about, unit, word, panels)

    size, reference, program = in_blocks(2, mesh), frozen(sft.load(mesh), config, mesh), statistics(sft.config, mesh)
    implicit, kl, logps, betas = {}, {}, {}, {}
    for label, model in models.items():
        params = frozen(model.load(mesh), config, mesh)
        found = map_rows(functools.partial(program, params, reference), rows, size, mesh)
        own = run_settings(Path(model.source)).get("beta") if config.beta is None else config.beta
        betas[label] = betas.get("DPO") if own is None else own
        if betas[label] is None:
            raise UserError(f"--beta is missing: --dpo {model.source} is no DPO run that says its own.")
        implicit[label] = losses.implicit_token_rewards(found.logps, found.ref_logps, rows.mask, beta=betas[label])
        logps[label], kl[label], ref_logps = found.logps, found.kl, found.ref_logps
    said = ", ".join(f"β {beta:g}" if len(betas) == 1 else f"{label} β {beta:g}" for label, beta in betas.items())
    measures = [
        measure("Implicit reward", f"β·log(π/π_ref) of each token; {said}. Its sum ranks the pair.", "reward", "sum", implicit)
    ]
    if isinstance(task, GoldTask):
        exact = task.world.exact_advantages(rows.tokens[:, : prompt_length(rows)], rows.tokens[:, prompt_length(rows) :], rows.mask)
        about = "A* = β·log(π*/π₀): what DPO's implicit reward would be with endless data. OPEN costs gold reward now and "
        about += "earns it at CLOSE, so its advantage can be positive."
        measures.append(measure("Exact advantage A*", about, "reward", "sum", {"": exact}))
    if reward:
        weights = frozen(reward.load(mesh), config, mesh)
        about = "The score of the answer up to this token, less that of the answer before it. "
        about += "The model adds up a number per token." if reward.head == "token" else "The model was trained on whole answers alone."
        found = prefix_differences(reward, weights, rows, mesh)
        measures.append(measure("Reward model, prefix differences", about, "score", "sum", {"": found}))
    about = "KL(π_ref ‖ π) of the state before the token, over the whole vocabulary: −β times it is the mean of the implicit reward there."
    measures.append(measure("KL to the reference", about, "nats", "sum", kl))
    if source["critic"]:
        if reward is None:
            raise UserError("--critic needs --reward-model: the run's reward ends with its score.")
        scores = map_rows(functools.partial(programs.scores(reward.config, reward.head, mesh), weights), rows, size, mesh)
        about, found = of_critic(Path(source["critic"]), config, mesh, reward, rows, task, scores, logps["DPO"], ref_logps)
        what = {"Value": "The critic's, of the state before the token", "Advantage": "GAE's, not whitened", "Return": "Value + advantage"}
        measures += [measure(name, f"{what[name]}; {about}.", "reward", "first", {"": x}) for name, x in found.items()]
    start = prompt_length(rows)
    prompt = rows.tokens[0, :start][rows.valid[0, :start]]
    said = task.prompt_text(prompt)
    if isinstance(task, GoldTask):
        said += " (topic {}, not style {})".format(*divmod(int(task.world.classes(prompt[None])[0]), 4))
    return {"facts": facts(config, source), "prompt": said, "measures": [m._asdict() for m in measures]}


def sources(config: CreditConfig) -> dict[str, str]:
    """Where each model is: the flag, or the run of that name in --runs or in the newest quickstart of the same world."""
    places = [Path(config.runs), *sorted(Path("runs").glob("quickstart-*/seed0"), reverse=True)]
    is_gold = config.policy_size == "gold"

    def fits(place: Path) -> bool:
        about = place / "sft" / "model.json"
        return about.exists() and (json.loads(about.read_text())["tokenizer"] == GOLD) == is_gold

    place = next(filter(fits, places), None)
    names = {"sft": ("sft",), "dpo": ("dpo",), "reward_model": ("reward_model", "reward-model"), "critic": ("rto", "ppo")}
    found = {"other": config.other}
    for flag, folders in names.items():
        given = getattr(config, flag)
        there = [str(place / name) for name in folders if place and (place / name / "model.json").exists()]
        # A critic or a reward model of other runs than the models that are named says nothing of these.
        wanted = flag in ("sft", "dpo") or not (config.sft or config.dpo)
        found[flag] = given or (there[0] if there and wanted else "")
        if not found[flag] and flag in ("sft", "dpo"):
            raise UserError(
                f"--{flag} is missing, and --runs {config.runs} has no {flag}: run `python -m experiments.quickstart` "
                "first, or name the run directories."
            )
    return found


def name_of(source: str) -> str:
    return Path(source).name or source


def run_settings(folder: Path) -> dict[str, Any]:
    """The configuration of a run, {} where the folder is none."""
    file = folder / "config.json"
    return json.loads(file.read_text()).get("config", {}) if file.exists() else {}


def one_pair(config: CreditConfig, task: Task, sft: Model) -> Pairs:
    """One row of each answer."""
    if config.prompt:
        if isinstance(task, GoldTask):
            return Pairs(gold_row(task, config.prompt, "--chosen", config.chosen), gold_row(task, config.prompt, "--rejected", config.rejected))
        record = Preference(({"role": "user", "content": config.prompt},), config.chosen, config.rejected)
        return Encoder(task.tokenizer, config.lengths)([record])
    split = config.split or task.evaluation_splits()[0]
    source = task.pairs(split, sft)
    total = len(source.rows) if source.encode else len(source.rows.chosen.tokens)
    if config.index >= total or config.index < -1:
        raise UserError(f"--index {config.index} is not from −1 to {total - 1}: {split} has {total} pairs.")
    if config.index >= 0 and source.encode:
        return source.encode([source.rows[config.index]])
    pairs = take(source, total if source.encode is None else 64, config.seed)
    index = task.telling_pair(pairs) if config.index < 0 else config.index
    return jax.tree.map(lambda x: x[index : index + 1], pairs)


def gold_row(task: GoldTask, prompt: str, flag: str, answer: str) -> Sequences:
    """A pair of the gold world in words: "x5 x1 x6 x5" and "OPEN t0s1 CLOSE SEP EOS"."""

    def ids(name: str, text: str) -> list[int]:
        if unknown := [word for word in text.split() if word not in gold.TOKEN_NAMES]:
            raise UserError(f"{name}: {unknown[0]} is no token of the gold world: {' '.join(gold.TOKEN_NAMES[:-1])}.")
        return [gold.TOKEN_NAMES.index(word) for word in text.split()]

    tokens = ids(flag, answer)
    if len(tokens) > task.world.horizon:
        raise UserError(f"{flag} has {len(tokens)} tokens, the gold world's answers {task.world.horizon} at most.")
    row = np.full((1, task.world.horizon), gold.PAD, np.int32)
    row[0, : len(tokens)] = tokens
    start, mask = np.array([ids("--prompt", prompt)], np.int32), np.arange(task.world.horizon)[None] < len(tokens)
    task.world.returns(start, row, mask)  # raises UserError where prompt or answer is none
    return task.rows(start, row, mask)


def of_critic(folder: Path, config: CreditConfig, mesh, reward: Model, rows, task, scores, dpo_logps, ref_logps):
    """Value, advantage and return under an RL run's critic and token reward (RTO eq. 4.7), [2, T] each, and its words."""
    about = run_settings(folder)
    if about.get("advantage") != "gae":
        raise UserError(f"--critic {folder} is no PPO or RTO run with a critic (--advantage gae).")
    if about["lora"]["rank"] or reward.base:
        raise UserError(f"--critic {folder}: critics that are adapters over another model can't be shown yet.")
    size = in_blocks(2, mesh)
    policy = open_model(str(folder), config, "--critic")
    critic = restore_params(folder / "checkpoints", programs.abstract_params(reward.config, "last", mesh), "critic")
    params = frozen(policy.load(mesh), config, mesh)
    logps = map_rows(functools.partial(programs.response_logps(policy.config, mesh), params), rows, size, mesh)
    before = map_rows(functools.partial(values(reward.config, mesh), critic), rows, size, mesh)
    if (clip := about["reward_clip"]) is not None:
        scores = np.clip(scores, -clip, clip)
    mask, placement = jnp.asarray(rows.mask), about.get("placement", "token")
    ends = losses.segment_ends(rows.tokens[:, -mask.shape[1] :], mask, delimiters=task.delimiters) if placement == "segment" else None
    rewards = losses.rto_token_rewards(
        dpo_logps, ref_logps, logps, scores, mask, beta1=about.get("beta1", 0.0), beta2=about["beta2"], beta3=about["beta3"],
        dpo_clip=about.get("dpo_clip"), placement=placement, ends=ends,
    )  # fmt: skip
    advantages, returns = losses.gae_associative(rewards, before, mask, gamma=about["ppo"]["gamma"], lam=about["ppo"]["lam"])
    words = f"{name_of(str(folder))}: β1 {about.get('beta1', 0.0):g}, β2 {about['beta2']:g}, β3 {about['beta3']:g}, "
    words += f"γ {about['ppo']['gamma']:g}, λ {about['ppo']['lam']:g}"
    return words, {"Value": before, "Advantage": advantages, "Return": returns}


def facts(config: CreditConfig, source: dict[str, str]) -> dict:
    git = git_commit()
    return {
        "command": f"python -m experiments.credit_assignment {shlex.join(sys.argv[1:])}",
        "commit": f"{git['commit']}{' and uncommitted changes' if git['dirty'] else ''}",
        "hardware": hardware(), "seed": config.seed, "index": config.index,
    } | {f"--{name.replace('_', '-')}": x for name, x in source.items() if x}  # fmt: skip


# ---------------------------------------------------------------------------------------------- page and picture


def sums(found: dict) -> list[list[str]]:
    """A row for each measure that adds up, and model: chosen, rejected, and which is preferred."""
    rows = []
    for m in found["measures"]:
        names = list(m["panels"])
        for chosen, rejected in zip(names[::2], names[1::2], strict=True) if m["word"] == "sum" and m["unit"] != "nats" else ():
            a, b = (sum(m["panels"][name][1]) for name in (chosen, rejected))
            label = m["name"] + (f", {chosen.removesuffix(': chosen')}" if ": " in chosen else "")
            cells = [heatmap.signed(x, ".2f") for x in (a, b, a - b)]
            rows.append([label, *cells, "yes" if a > b else "no"])
    return rows


def page(found: dict, path: Path) -> Path:
    report = Report("Credit assignment", "One pair, token by token: which tokens earn the reward, and which cost it.")
    report.text("Prompt", found["prompt"])
    header = ("sum over the answer", "chosen", "rejected", "difference", "prefers the chosen one")
    report.table("Which answer each prefers", header, sums(found))
    each = PAGE_TOKENS // len(found["measures"])
    for m in found["measures"]:
        report.heatmap(m["name"], m["panels"], unit=m["unit"], note=m["about"], word=m["word"], aligned=True, limit=each)
    report.text(
        "How to read it",
        "Blue is above 0 and orange below, on one scale for all panels of a section; point at a token for its number. Rows "
        "begin where both answers have the same word; what the other answer lacks is underlined.",
    )
    report.facts(found["facts"])
    return report.write(path)


def terminal(found: dict) -> str:
    """All measures in colour, below each other."""
    parts = [heatmap.plain(found["prompt"])]
    for m in found["measures"]:
        parts.append(f"── {m['name']} ──\n{heatmap.ansi(m['panels'], unit=m['unit'], limit=1_000)}")
    return "\n\n".join(parts)


def picture(found: dict, path: Path, measures: int = 3, columns: int = 104, most: int = 150) -> None:
    """The first measures of the pair as SVG or PNG, by the suffix, in a paper's width; `most` tokens of an answer."""
    heads, boxes, y, begin = [], [], 0.0, 14  # y in lines, x in characters
    for m in found["measures"][:measures]:
        panels = m["panels"]
        scale = heatmap.scale_of(panels)
        heads.append((y, f"{m['name']} ({m['unit']}; full colour at ±{scale:.2g})"))
        y, names = y + 1.1, list(panels)
        for pair in zip(names[::2], names[1::2], strict=True):
            _, differs = heatmap.align(*(panels[n][0] for n in pair), *(heatmap.word_starts(panels[n][0]) for n in pair))
            for name, mine in zip(pair, differs, strict=True):
                tokens, numbers = panels[name]
                boxes.append((0, y, name, None, False))
                if m["word"] == "sum":
                    boxes.append((0, y + 0.8, f"sum {heatmap.signed(sum(numbers), '.2f')}", None, False))
                x, top = begin, y
                for token, value, differ in list(zip(tokens, numbers, mine, strict=True))[:most]:
                    text = heatmap.plain(token.rstrip(" ")) if token.strip(" ") else "␣"
                    if x + len(text) + 0.6 > columns and x > begin:
                        x, y = begin, y + 1
                    boxes.append((x, y, text, heatmap.rgb(value, scale), bool(differ)))
                    x += len(text) + 1
                    if "\n" in token:
                        x, y = begin, y + 1
                if len(tokens) > most:
                    boxes.append((x, y, f"… {len(tokens) - most:,} more", None, False))
                y = max(y + 1, top + 1.8) + 0.2
        y += 0.3
    width, size = 7.2, 1 / columns
    font = width * 72 / columns / 0.62
    import matplotlib
    from matplotlib.patches import Rectangle

    sharp, quiet = matplotlib.rc_context({"figure.dpi": 220}), warnings.catch_warnings()
    with sharp, quiet, drawing(path, 1, width, (y + 0.6) * font * 1.5 / 72) as (axes,):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of another script: a box is drawn
        axes.figure.get_layout_engine().set(w_pad=0, h_pad=0)
        axes.set(xlim=(0, 1), ylim=(y, -0.6))
        axes.axis("off")
        ink = "#1b1d21"
        for at, text in heads:
            axes.text(0, at, _no_math(text), va="center", fontsize=font, weight="bold", color=ink)
        for x, at, text, colour, differ in boxes:
            left = x + 0.3 * bool(colour)
            if colour:
                face = [c / 255 for c in colour]
                axes.add_patch(Rectangle((x * size, at - 0.42), (len(text) + 0.6) * size, 0.84, facecolor=face, linewidth=0))
            if differ:
                axes.plot([left * size, (left + len(text)) * size], [at + 0.36] * 2, color=ink, lw=0.6)
            axes.text(left * size, at, _no_math(text), family="monospace", fontsize=font * 0.94, va="center", color=ink)


def _no_math(text: str) -> str:
    return text.replace("$", r"\$")


SMALL = GoldData(test_pairs=512)
PRESETS = {
    "gold": (ABOUT["gold"], CreditConfig(out="runs/gold/credit_assignment", gold=SMALL, **GOLD_PRESET)),
    "smollm2": (
        "SmolLM2-135M (--data, or --prompt, --chosen, --rejected): a minute on a CPU",
        CreditConfig(out="runs/smollm2/credit_assignment", runs="runs/smollm2", **SMOLLM2),
    ),
    "paper": (
        "Llama-3-8B's runs and UltraFeedback; --mesh as in their training",
        CreditConfig(
            out="runs/paper/credit_assignment", runs="runs/paper", sft="OpenRLHF/Llama-3-8b-sft-mixture", dpo="runs/paper/dpo",
            reward_model="runs/paper/reward_model", critic="runs/paper/rto", frozen_dtype="bfloat16", batch_size=8,
            **PAPER | {"lengths": Lengths(1024, 1024)},
        ),
    ),
}  # fmt: skip

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
