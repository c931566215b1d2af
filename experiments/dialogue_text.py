"""Dialogues in words (HH): DPO's implicit reward of all of the assistant's tokens, and of none of the user's.

    python -m experiments.dpo --preset smollm2 --init smollm2 --data DIR --out runs/hh/dpo --lengths.prompt 192 --skip-bad-records
    python -m experiments.dialogue_text --data DIR --dpo runs/hh/dpo --skip-bad-records

Two dialogues of a pair differ in their last answer. In a token's view every answer before it is a row of actions too, with
the user's words between them as part of the state; their log-ratios cancel in the loss, and DPO's reward of them is defined
all the same. Prints what the answers of each turn earn, how often the sum prefers the better dialogue, and writes
OUT/dialogue.html, which shows one pair token by token. experiments/dialogue.py has the exact world of two turns.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from experiments.common import Stage, frozen, main, numpy_rng, open_model, same_size, same_tokenizer, write_json
from experiments.credit_assignment import in_blocks, run_settings, statistics, token_texts
from experiments.presets import SMOLLM2
from experiments.study import interval, markdown, shown
from experiments.tasks import TextTask, map_rows, say
from rto_jax import losses
from rto_jax.data import Lengths, Tokenizer, held_out_splits, read_preferences
from rto_jax.data.records import Messages, Preference
from rto_jax.errors import UserError
from rto_jax.metrics import git_commit
from rto_jax.report import Report
from rto_jax.sharding import make_mesh
from rto_jax.types import Pairs, Sequences


@dataclass(frozen=True, kw_only=True)
class DialogueTextConfig(Stage):
    freezes: ClassVar[bool] = True
    sft: str = "smollm2"
    """the reference of DPO"""
    dpo: str = "runs/smollm2/dpo"
    """the model of the implicit reward"""
    split: str = ""
    """of --data; default: the first held-out one"""
    dialogues: int = 200
    """pairs of dialogues, at most"""


# ---------------------------------------------------------------------------------------------- rows with several turns


Exchanges = list[tuple[list[int], list[int]]]  # (what is read before an answer, the answer with its EOS), as ids


def exchanges(messages: Messages, tokenizer: Tokenizer) -> Exchanges:
    """A dialogue cut at the assistant's words: what the template writes between them is read, and no action.

    UserError where the roles don't take turns, and for a template that does not go on after an answer as it ended it.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns or turns[-1] != len(messages) - 1 or any(not n or messages[n - 1]["role"] != "user" for n in turns):
        raise UserError("a dialogue must be an exchange of user and assistant that ends with the assistant.")
    found: Exchanges = []
    told = ""
    for number in turns:
        whole = tokenizer.render(messages[:number])
        ids = tokenizer.hf.backend_tokenizer.encode(whole[len(told) :], add_special_tokens=False).ids
        if found and (not whole.startswith(told) or ids[0] != tokenizer.eos_id):
            raise UserError("the chat template does not go on after an answer as it ended it.")
        found.append((ids[1:] if found else ids, [*tokenizer.encode(messages[number]["content"]), tokenizer.eos_id]))
        told = whole + messages[number]["content"]
    return found


def _first_kept(found: Exchanges, length: int) -> int:
    """The first exchange whose answer is in the response: the oldest are prompt where not all fit."""
    after = [len(answer) + sum(len(x) + len(y) for x, y in found[k + 1 :]) for k, (_, answer) in enumerate(found)]
    return next((k for k, size in enumerate(after) if size <= length), len(found) - 1)


def text_rows(dialogues: Sequence[Exchanges], tokenizer: Tokenizer, lengths: Lengths, first: Sequence[int] | None = None) -> Sequences:
    """Rows whose mask holds all of the assistant's answers, EOS included, and none of the user's words.

    The prompt ends before the first answer, or before the exchange `first` (by default the earliest from where all fits);
    it keeps its end, and an answer that is longer than the response its beginning, as in single-turn rows.
    """
    size = lengths.prompt
    tokens = np.full((len(dialogues), size + lengths.response), tokenizer.pad_id, np.int32)
    valid, mask = np.zeros(tokens.shape, bool), np.zeros((len(dialogues), lengths.response), bool)
    first = [_first_kept(found, lengths.response) for found in dialogues] if first is None else first
    for row, (found, start) in enumerate(zip(dialogues, first, strict=True)):
        before = [token for read, answer in found[:start] for token in read + answer] + found[start][0]
        parts = [(found[start][1], True)]
        for read, answer in found[start + 1 :]:
            parts += [(read, False), (answer, True)]
        ids = [token for part, _ in parts for token in part][: lengths.response]
        acts = [action for part, action in parts for _ in part][: lengths.response]
        before = before[-size:]
        slots = slice(size - len(before), size + len(ids))
        tokens[row, slots], valid[row, slots], mask[row, : len(ids)] = before + ids, True, acts
    return Sequences(tokens, valid, mask)


def text_pairs(records: Sequence[Preference], tokenizer: Tokenizer, lengths: Lengths) -> Pairs:
    """Pairs of dialogues that differ in their last answer (HH) for DPO: earlier answers are actions too, alike in both.

    Their log-ratios cancel in the loss, and their tokens get DPO's reward all the same.
    """
    sides = [
        [exchanges((*record.prompt, {"role": "assistant", "content": getattr(record, side)}), tokenizer) for record in records]
        for side in ("chosen", "rejected")
    ]
    first = [max(_first_kept(found, lengths.response) for found in pair) for pair in zip(*sides, strict=True)]
    return Pairs(*(text_rows(side, tokenizer, lengths, first) for side in sides))


def turns(mask: np.ndarray) -> np.ndarray:
    """Which answer each of the assistant's tokens belongs to, from 1, and 0 elsewhere: int [n, T] of a mask [n, T]."""
    before = np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return np.where(mask, np.cumsum(mask & ~before, axis=1), 0)


# ---------------------------------------------------------------------------------------------- what the turns earn


def figures(rewards: Sequence[np.ndarray], pairs: Pairs) -> dict:
    """Of the rewards [n, T] of both sides: nats per token and tokens of the earlier and the last answers, and who is preferred.

    Earlier answers are the same in both rows of a pair, so the chosen row's are counted.
    """
    sides = {}
    for name, found, rows in zip(("chosen", "rejected"), rewards, pairs, strict=True):
        turn = turns(rows.mask)
        last = (turn == turn.max(1, keepdims=True)) & rows.mask
        sides[name] = found, last, rows.mask & ~last
    per_token = lambda found, where: [float(x[m].mean()) for x, m in zip(found, where, strict=True) if m.any()]  # noqa: E731
    parts = {f"last answer, {name}": (found, last) for name, (found, last, _) in sides.items()}
    parts["earlier answers"] = sides["chosen"][0], sides["chosen"][2]
    gap = {
        "all answers": np.sum(rewards[0], 1) - np.sum(rewards[1], 1),
        "last answer": np.sum(rewards[0] * sides["chosen"][1], 1) - np.sum(rewards[1] * sides["rejected"][1], 1),
    }
    return {
        "reward": {name: per_token(*part) for name, part in parts.items()},
        "tokens": {name: float(where.sum() / max(where.any(1).sum(), 1)) for name, (_, where) in parts.items()},
        "right": {name: (0.5 + 0.5 * np.sign(np.round(x, 5))).tolist() for name, x in gap.items()},
    }


def run(config: DialogueTextConfig) -> dict:
    mesh, out = make_mesh(config.mesh), Path(config.out)
    sft, dpo = open_model(config.sft, config, "--sft"), open_model(config.dpo, config, "--dpo")
    same_tokenizer(sft, ("--dpo", dpo))
    same_size(sft, ("--dpo", dpo))
    if sft.tokenizer is None:
        raise UserError(f"--sft {sft.source} is a model of the gold world, which has no dialogues in words.")
    task = TextTask(config, mesh, sft.tokenizer)
    records, report = read_preferences(task.data, config.split or held_out_splits(task.data)[0], skip_bad=config.skip_bad_records)
    order = numpy_rng(config.seed, "dialogues").permutation(len(records))[: config.dialogues]
    pairs = text_pairs([records[i] for i in order], sft.tokenizer, config.lengths)
    beta = run_settings(Path(dpo.source)).get("beta") or 1.0
    params, reference = frozen(dpo.load(mesh), config, mesh), frozen(sft.load(mesh), config, mesh)
    program = functools.partial(statistics(dpo.config, mesh), params, reference)
    size = in_blocks(config.batch_size, mesh, config.batch_size)
    rewards = []
    for rows in pairs:
        found = map_rows(program, rows, size, mesh)
        rewards.append(np.asarray(losses.implicit_token_rewards(found.logps, found.ref_logps, rows.mask, beta=beta)))
    answers = turns(pairs.chosen.mask).max(1).mean()
    say(f"{len(order)} pairs of dialogues{report.notes()}, {round(float(answers), 2)} answers each in the mean")
    found = figures(rewards, pairs) | {"facts": {"git": git_commit(), "sft": config.sft, "dpo": config.dpo, "beta": beta, "data": task.data.name}}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", found)
    print(table(found))
    say(f"page: {page(found, rewards, pairs, task, out / 'dialogue.html').resolve()}")
    return found


def table(found: dict) -> str:
    rows = [[name, f"{found['tokens'][name]:.1f}", shown(interval(x), 4), str(len(x))] for name, x in found["reward"].items() if x]
    right = "; ".join(f"by {name} {shown(interval(x), 3)}" for name, x in found["right"].items())
    head = ("tokens of", "how many", "DPO's reward of a token, nats", "dialogues")
    return f"{markdown(head, rows)}\n\nThe better dialogue is preferred, a tie counts half: {right}. 95 % bootstrap intervals over the dialogues."


def page(found: dict, rewards: Sequence[np.ndarray], pairs: Pairs, task: TextTask, path: Path) -> Path:
    """The first pair whose rows have two answers or more, whole; else the first."""
    several = (turns(pairs.chosen.mask).max(1) > 1) & ~pairs.chosen.valid[:, -1] & ~pairs.rejected.valid[:, -1]
    row, panels = int(np.argmax(several)), {}
    for name, values, rows in zip(("chosen", "rejected"), rewards, pairs, strict=True):
        start = rows.tokens.shape[1] - rows.mask.shape[1]
        kept = rows.valid[row, start:]
        numbers = [float(x) if acts else None for x, acts in zip(values[row][kept], rows.mask[row][kept], strict=True)]
        panels[name] = token_texts(task, rows.tokens[row, start:][kept]), numbers
    report = Report("A dialogue's tokens", "DPO's reward of what the assistant says in all of its turns.")
    prompt = pairs.chosen.tokens[row, :start][pairs.chosen.valid[row, :start]]
    report.text("Before its first answer", task.prompt_text(prompt))
    report.heatmap("Implicit reward", panels, unit="nats", note="Tokens without a number are the user's and the template's.", aligned=True)
    report.facts(found["facts"])
    return report.write(path)


PRESETS = {
    "smollm2": (
        "SmolLM2-135M and dialogues (HH): minutes on 2 cores",
        DialogueTextConfig(out="runs/smollm2/dialogue", **SMOLLM2 | {"lengths": Lengths(prompt=128, response=256)}),
    )
}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
