"""Who judges text: a reward model that saw none of the training pairs, a sentiment program, and other people's benchmarks.

The embedded world's judge is its gold reward. On real text (`--preset smollm2`) a policy's answers to held-out prompts are
scored by a reward model of another seed and other preferences (`--judges.data`), and its continuations of film reviews
(`--judges.reviews`) by VADER's sentiment, a program that no training can have reached. At the paper's scale
(`--preset paper`) the answers to AlpacaEval 2 and Arena-Hard are written for these benchmarks' own judges, and what they
print is read back.

    python -m experiments.judges DIR OUT    cuts a folder of preferences for the two: OUT/arms for --data, OUT/judge for
                                            --judges.data; no prompt is in both, and both have the same held-out prompts
"""

import csv
import functools
import gzip
import itertools
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from experiments.common import Model, Stage, open_model, same_tokenizer, write_json
from experiments.tasks import make_task, map_rows, sample_rows, take
from rto_jax import programs
from rto_jax.data import Encoder, held_out_splits, read_preferences
from rto_jax.data.records import Preference, PromptRecord, json_lines
from rto_jax.errors import UserError
from rto_jax.metrics import progress
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import make_mesh
from rto_jax.types import Prompts, Sequences


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    data: str = ""
    """(smollm2) preferences that the judging reward model is trained on, as --data; not those of the arms"""
    reviews: str = ""
    """(smollm2) a JSONL[.gz] file with a film review's sentence as "text" in each line; the answers' sentiment is scored"""
    alpaca_eval: str = ""
    """(paper) AlpacaEval 2's instructions, its alpaca_eval.json; the answers go to results/TABLE/paper/alpaca_eval"""
    arena_hard: str = ""
    """(paper) Arena-Hard's question.jsonl; the answers go to results/TABLE/paper/arena_hard"""
    alpaca_leaderboard: str = ""
    """(paper) the leaderboard.csv that `alpaca_eval` wrote on those answers"""
    arena_table: str = ""
    """(paper) what Arena-Hard's show_result.py printed on those answers, in a file"""


JUDGE_SEED = 1000  # of the judging reward model: none of a study's
REVIEW = "Here is a sentence of a film review. Write the next sentence.\n\n"


def encoded(model: Model, texts: Sequence[str], stage: Stage) -> Prompts:
    """The user's words in the chat template of the model's tokenizer."""
    return Encoder(model.tokenizer, stage.lengths)([PromptRecord(({"role": "user", "content": text},), "") for text in texts])


def sentiment(texts: Sequence[str]) -> np.ndarray:
    """VADER's compound score of each text, in [-1, 1]."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("--judges.reviews needs vaderSentiment: pip install vaderSentiment.") from None
    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts])


def review_prompts(path: str, limit: int) -> list[str]:
    """The first `limit` sentences of a file of reviews, as instructions."""
    texts = []
    for where, review in itertools.islice(json_lines(Path(path)), limit):
        if not isinstance(review.get("text"), str):
            raise UserError(f'--judges.reviews {where}: want an object with a "text".')
        texts.append(REVIEW + review["text"])
    if not texts:
        raise UserError(f"--judges.reviews {path} is empty.")
    return texts


Trained = tuple[Path, Stage]  # a run directory and its configuration


class Bench:
    """One seed's held-out prompts, its SFT model and the judging reward model."""

    def __init__(self, sft: Trained, judge: Trained, config: JudgeConfig):
        stage, self.mesh = sft[1], make_mesh(sft[1].mesh)
        self.model = open_model(str(sft[0]), stage, "--runs")
        judging = open_model(str(judge[0]), judge[1], "--judges.data")
        same_tokenizer(self.model, ("--judges.data", judging))
        self.task, self.stage = make_task(stage, self.mesh, self.model), stage
        self.prompts = take(self.task.prompts(self.task.evaluation_splits()[0]), stage.eval_size, stage.seed)
        texts = review_prompts(config.reviews, stage.eval_size) if config.reviews else []
        self.reviews = encoded(self.model, texts, stage) if texts else None
        self.reference, self.judge = self.model.load(self.mesh), judging.load(self.mesh)
        self.logps = programs.response_logps(self.model.config, self.mesh)
        self.score = programs.scores(judging.config, judging.head, self.mesh)

    def answers(self, params, rows: Prompts) -> Sequences:
        stage = self.stage
        return sample_rows(self.task, self.model.config, params, rows, stage.seed, SamplingConfig(stage.lengths.response), stage.batch_size)

    def figures(self, params) -> dict[str, np.ndarray]:
        size, seqs = self.stage.batch_size, self.answers(params, self.prompts)
        ratio = map_rows(lambda batch: (self.logps(params, batch) - self.logps(self.reference, batch)).sum(-1), seqs, size, self.mesh)
        score = map_rows(lambda batch: self.score(self.judge, batch), seqs, size, self.mesh)
        found = {"kl": ratio, "length": seqs.mask.sum(1), "judge": score}
        if self.reviews is not None:
            found["sentiment"] = sentiment(decoded(self.model, self.answers(params, self.reviews)))
        return found


bench = functools.lru_cache(maxsize=1)(Bench)  # the arms of a seed follow each other


def judge_run(run: Trained, sft: Trained, judge: Trained, config: JudgeConfig) -> dict[str, np.ndarray]:
    """A policy's `judge`, `kl`, `length` and perhaps `sentiment`, a number per answer; kept in its run directory."""
    folder, stage = run
    what = [judge[0].name, config.data, config.reviews, sft[0].name, sft[1].eval_size]
    file = folder / f"judged-{sha256(json.dumps(what).encode()).hexdigest()[:8]}.npz"
    if not file.exists():
        found = bench(sft, judge, config)
        params = found.reference if folder == sft[0] else open_model(str(folder), stage, "--runs").load(found.mesh)
        partial = file.with_suffix(".part.npz")
        np.savez(partial, **found.figures(params))
        partial.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def judged(arms: Mapping[str, Trained], sft: Trained, judge: Trained, config: JudgeConfig) -> dict:
    """One seed's policies, each (run directory, configuration), on held-out prompts of their data.

    Returns, for each arm: `judge` (mean score of the judging reward model), `win_rate` and `ties` against the SFT model's
    answers by that score, `kl` (log π/π_sft of its own answers, nats per answer), `length` in tokens, and with reviews
    `sentiment` and `sentiment_win_rate`. All answer with the same random numbers.
    """
    theirs, rows = judge_run(sft, sft, judge, config), {}
    for name, run in arms.items():
        ours = judge_run(run, sft, judge, config)
        gap = {key: np.sign(ours[key] - theirs[key]) for key in ("judge", "sentiment") if key in ours}
        rows[name] = {key: float(x.mean()) for key, x in ours.items()}
        rows[name] |= {"win_rate": float(np.mean(0.5 + 0.5 * gap["judge"])), "ties": float(np.mean(gap["judge"] == 0))}
        if "sentiment" in gap:
            rows[name]["sentiment_win_rate"] = float(np.mean(0.5 + 0.5 * gap["sentiment"]))
    return {"arms": rows, "answers": len(theirs["judge"]), "reviews": len(theirs.get("sentiment", ()))}


# ---------------------------------------------------------------------------------------------- other people's benchmarks


def questions(path: str, flag: str, key: str) -> list[dict]:
    """The objects of a JSON list or of JSON lines, each with a text under `key`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{flag} {path} is neither a JSON list nor JSON lines: {error}.") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise UserError(f'{flag} {path}: record {number} has no text "{key}".')
    return rows


def file_name(name: str) -> str:
    """An arm's name as a generator of the benchmarks: "PPO, λ = 1" -> "rto_jax-PPO-1"."""
    return "rto_jax-" + "-".join(re.findall(r"[A-Za-z0-9.]+", name))


def write_answers(arms: Mapping[str, tuple[Path, Stage]], config: JudgeConfig, folder: Path) -> None:
    """Each arm's answers (temperature 1) in the files that AlpacaEval 2 and Arena-Hard read; those that are there stay."""
    asked = {
        "alpaca_eval": config.alpaca_eval and questions(config.alpaca_eval, "--judges.alpaca-eval", "instruction"),
        "arena_hard": config.arena_hard and questions(config.arena_hard, "--judges.arena-hard", "prompt"),
    }
    wanted = [(name, kind) for name in arms for kind, rows in asked.items() if rows]
    with progress(len(wanted), "answer files") as bar:
        for name, kind in wanted:
            rows, (run, stage) = asked[kind], arms[name]
            if not list((folder / kind).glob(f"{file_name(name)}.json*")):
                mesh = make_mesh(stage.mesh)
                model = open_model(str(run), stage, "--runs")
                prompts = encoded(model, [row["instruction" if kind == "alpaca_eval" else "prompt"] for row in rows], stage)
                seqs = sample_rows(
                    make_task(stage, mesh, model), model.config, model.load(mesh), prompts, stage.seed,
                    SamplingConfig(stage.lengths.response), stage.batch_size,
                )  # fmt: skip
                _write(folder / kind, file_name(name), kind, rows, decoded(model, seqs))
            bar.update()


def decoded(model: Model, seqs: Sequences) -> list[str]:
    """The answers as text, without the EOS."""
    tokens = seqs.tokens[:, -seqs.mask.shape[1] :]
    return [model.tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in zip(tokens, seqs.mask, strict=True)]


def _write(folder: Path, name: str, kind: str, rows: list[dict], answers: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "alpaca_eval":
        # What `alpaca_eval --model_outputs FILE` takes: a list of these four.
        keep = [{"dataset": row.get("dataset", ""), "instruction": row["instruction"]} for row in rows]
        write_json(folder / f"{name}.json", [row | {"output": text, "generator": name} for row, text in zip(keep, answers, strict=True)])
        return
    # data/BENCHMARK/model_answer/NAME.jsonl; its utils/add_markdown_info.py adds what style control needs.
    lines = [
        {
            "uid": row.get("uid", row.get("question_id", str(number))), "ans_id": f"{name}-{number}", "model": name,
            "messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": {"answer": text}}],
            "tstamp": time.time(),
        }
        for number, (row, text) in enumerate(zip(rows, answers, strict=True))
    ]  # fmt: skip
    partial = folder / f"{name}.jsonl.partial"
    partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    partial.replace(folder / f"{name}.jsonl")


def read_alpaca_eval(path: str) -> dict[str, dict[str, float]]:
    """model -> its length-controlled win rate and win rate, per cent, of a leaderboard.csv."""
    keys = {"alpaca_lc": "length_controlled_winrate", "alpaca": "win_rate"}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {row[""]: {key: float(row[column]) for key, column in keys.items()} for row in csv.DictReader(file)}
    except OSError as error:
        raise UserError(f"--judges.alpaca-leaderboard {path}: {error.strerror}.") from None
    except (KeyError, ValueError, TypeError):
        raise UserError(f"--judges.alpaca-leaderboard {path} is no leaderboard.csv of AlpacaEval 2.") from None


def read_arena_hard(path: str) -> dict[str, dict[str, float]]:
    """model -> its score, per cent, in the table that show_result.py prints: number, model, score as a fraction or per cent."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--judges.arena-table {path}: {error.strerror}.") from None
    found = {m[1]: float(m[2]) for line in lines if (m := re.match(r"\s*\d+\s+(\S+)\s+(\d+(?:\.\d+)?)\s+\(", line))}
    if not found:
        raise UserError(f"--judges.arena-table {path} holds no table of show_result.py.")
    times = 100 if max(found.values()) <= 1 else 1
    return {name: {"arena": times * score} for name, score in found.items()}


def read_results(names: Sequence[str], config: JudgeConfig) -> dict[str, list[dict[str, float]]]:
    """What the benchmarks' judges said of each arm, as a list of one run; nothing of those that they have not seen."""
    boards = []
    if config.alpaca_leaderboard:
        boards.append(read_alpaca_eval(config.alpaca_leaderboard))
    if config.arena_table:
        boards.append(read_arena_hard(config.arena_table))
    return {name: [{k: x for board in boards for k, x in board.get(file_name(name), {}).items()}] for name in names}


# ---------------------------------------------------------------------------------------------- data for arms and judge

HELD_OUT, JUDGES = 0.25, 0.3  # shares of the training prompts; the arms have the others


def split_preferences(source: str | Path, out: str | Path) -> dict[str, int]:
    """Writes OUT/arms and OUT/judge, each train.jsonl.gz and test*.jsonl.gz; returns the number of records in each part.

    A record's part depends on its prompt alone: a quarter of the training prompts joins the test file, the judge has three
    tenths, the arms the others. Other test files are copied.
    """
    parts: dict[str, list[Preference]] = {"arms": [], "judge": [], "test": []}
    for row in read_preferences(source, "train")[0]:
        where = int(sha256(json.dumps(row.prompt).encode()).hexdigest()[:8], 16) / 2**32
        parts["test" if where < HELD_OUT else "judge" if where < HELD_OUT + JUDGES else "arms"].append(row)
    tests = {name: read_preferences(source, name)[0] for name in held_out_splits(source) if name != "train"}
    tests["test"] = tests.get("test", []) + parts["test"]
    for side in ("arms", "judge"):
        folder = Path(out) / side
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in {"train": parts[side], **tests}.items():
            lines = (json.dumps({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}) + "\n" for row in rows)
            (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return {"arms": len(parts["arms"]), "judge": len(parts["judge"]), "test": len(tests["test"])}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m experiments.judges DIR OUT")
    try:
        print(", ".join(f"{name}: {count:,} records" for name, count in split_preferences(*sys.argv[1:]).items()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
