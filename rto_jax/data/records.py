"""Files of preferences, answers and prompts, read into records of chat messages.

A file is JSON Lines (`.jsonl`, or gzipped `.jsonl.gz`; standard library only) or `.parquet` (pyarrow); a folder holds
`train.jsonl.gz` and the like, or the shards `train-*.parquet`, also in its folder `data`, as on the Hugging Face hub.
The shape of each record is found from its fields, in this order; a field that is null counts as absent:

preferences  chosen, rejected           two answers, or two conversations that share all but their last message
                                        (texts, one {role, content} or {from, value} message, or lists of them);
                                        the prompt is theirs, or stands in one of the prompt fields below
             chosen, rejected alone     HH dialogues "\\n\\nHuman: … \\n\\nAssistant: …"; the prompt is what stands
                                        before the last "\\n\\nAssistant:"
             output_1, output_2,        AlpacaEval pairs: 1 prefers the first, 2 the second, a number between is
             preference                 nearer to one of them; 1.5 is a tie, dropped and counted
examples     response | completion | output | answer, beside a prompt field; or messages | conversations that end
             with the assistant's; or a preference, whose chosen answer is used
prompts      prompt | conversations | messages | context_messages | instruction (with input) | question | turns[0]
"""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rto_jax.errors import UserError

Messages = tuple[dict[str, str], ...]  # ({"role": "system" | "user" | "assistant", "content": str}, ...)

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
PROMPT_FIELDS = ("prompt", "conversations", "messages", "context_messages", "instruction", "question", "turns")
ANSWER_FIELDS = ("response", "completion", "output", "answer")
DIALOGUE_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """`chosen` was preferred to `rejected` as the answer to `prompt`."""

    prompt: Messages
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)  # "file:line"


@dataclass(frozen=True)
class Example:
    """An answer to imitate."""

    prompt: Messages
    response: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class PromptRecord:
    """A prompt to answer; its last message is the user's."""

    prompt: Messages
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Report:
    """What reading a file kept and left out."""

    records: int
    """Records kept."""
    bad: int = 0
    """Bad records skipped (`skip_bad`)."""
    ties: int = 0
    """Ties dropped: preferences that prefer neither side."""
    repeated: int = 0
    """Prompts dropped because the file holds them already."""
    first_bad: str = ""
    """File, line and fault of the first bad record."""

    def notes(self) -> str:
        """What was left out, as ", 3 bad records skipped (the first: …)"; empty where nothing was."""
        parts = [f"{self.ties} ties dropped"] * bool(self.ties)
        parts += [f"{self.repeated} repeated prompts dropped"] * bool(self.repeated)
        parts += [f"{self.bad} bad records skipped (the first: {self.first_bad})"] * bool(self.bad)
        return "".join(", " + part for part in parts)


class _Bad(Exception):
    """What is wrong with one record."""


class _Tie(Exception):
    """The record prefers neither answer."""


def read_preferences(path: str | Path, split: str = "train", *, skip_bad: bool = False):
    """The preferences of a file, or of a split in a folder -> (list[Preference], Report).

    Raises UserError with file and line for the first bad record; `skip_bad` counts them instead.
    """
    return _read(path, split, skip_bad, _preference)


def read_examples(path: str | Path, split: str = "train", *, skip_bad: bool = False):
    """Prompts with the answer to imitate -> (list[Example], Report); errors as in read_preferences."""
    return _read(path, split, skip_bad, _example)


def read_prompts(path: str | Path, split: str = "train", *, skip_bad: bool = False):
    """Each prompt of the file once, in order -> (list[PromptRecord], Report); errors as in read_preferences."""
    records, report = _read(path, split, skip_bad, _prompt_record)
    unique: dict[str, PromptRecord] = {}
    for record in records:
        unique.setdefault(json.dumps(record.prompt), record)
    kept = list(unique.values())
    return kept, Report(len(kept), report.bad, report.ties, len(records) - len(kept), report.first_bad)


READERS = {"preferences": read_preferences, "examples": read_examples, "prompts": read_prompts}


def held_out_splits(path: str | Path) -> list[str]:
    """The names of the held-out splits of a folder, those that begin with "test"; a file has none but itself."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return ["train"]
    files = [f for folder in (path, path / "data") for f in folder.glob("test*") if f.suffix in (".gz", ".jsonl", ".parquet")]
    names = {re.split(r"[.-]", f.name)[0] for f in files}
    preferred = {name.removesuffix("_prefs") for name in names if name.endswith("_prefs")}
    return sorted(preferred or names) or ["train"]


def find_files(path: str | Path, split: str) -> list[Path]:
    """The file itself, or the files of `split` in the folder; UserError if there is none, or one is empty."""
    path = Path(path).expanduser()
    files = [path]
    if path.is_dir():
        names = [f"{split}.jsonl.gz", f"{split}.jsonl", f"{split}.parquet"]
        found = [[path / name] for name in names if (path / name).is_file()]
        # UltraFeedback's preferences are in train_prefs-*, beside train_sft-* and train_gen-*.
        shards = [(folder, name) for folder in (path, path / "data") for name in (split, f"{split}_prefs")]
        found += [sorted(f) for folder, name in shards if (f := [*folder.glob(f"{name}-*.parquet")])]
        if not found:
            has = sorted(p.name for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
            raise UserError(f"{path} has no {', '.join(names)} or {split}-*.parquet; it has {', '.join(has) or 'none'}")
        if len(found) > 1:
            raise UserError(f"{path} has both {found[0][0].name} and {found[1][0].name}; name the file itself")
        files = found[0]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such file or folder")
        if not os.access(file, os.R_OK):
            raise UserError(f"{file}: not readable (permission denied)")
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
    return files


Record = TypeVar("Record")


def _read(path: str | Path, split: str, skip_bad: bool, parse: Callable[[dict, str], Record]):
    files = find_files(path, split)
    records: list[Record] = []
    bad = ties = 0
    first_bad = ""
    for file in files:
        for number, row in _parquet_rows(file) if file.suffix == ".parquet" else _lines(file):
            try:
                records.append(parse(_fields(row), f"{file}:{number}"))
            except _Tie:
                ties += 1
            except _Bad as error:
                if not skip_bad:
                    raise UserError(f"{file}:{number}: {error}") from None
                bad, first_bad = bad + 1, first_bad or f"{file.name}:{number}: {error}"
    if not records:
        if bad or ties:
            raise UserError(f"{path}: no usable record" + Report(0, bad, ties, first_bad=first_bad).notes())
        raise UserError(f"{files[0]}: the file is empty")
    return records, Report(len(records), bad, ties, first_bad=first_bad)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered non-blank lines, split at b"\n" only: a record may hold U+2028, where str.splitlines() breaks it."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of every line of a JSON Lines file, whatever its fields."""
    for number, line in _lines(path):
        try:
            record = _json_object(line)
        except _Bad as error:
            raise UserError(f"{path}:{number}: {error}") from None
        yield f"{path}:{number}", record


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Numbered rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: broken parquet file ({str(error).splitlines()[0]})") from None


def _fields(row: bytes | dict[str, Any]) -> dict[str, Any]:
    """The fields of a line of JSON or of a parquet row, without those that are null."""
    record = _json_object(row) if isinstance(row, bytes) else row
    return {name: value for name, value in record.items() if value is not None}


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise _Bad("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _Bad(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _Bad(f"a JSON object is expected, not a {type(record).__name__}")
    return record


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Bad(f"{name} holds half of a surrogate pair, which is no text") from None
    return value


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """A list of {role, content} or {from, value} messages, or one such message."""
    value = [value] if isinstance(value, dict) else value
    messages = []
    for item in value:
        if not isinstance(item, dict) or not ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys()):
            raise _Bad(f"{name} holds a message without role and content (or from and value)")
        role, content = (item["role"], item["content"]) if "role" in item else (item["from"], item["value"])
        if not isinstance(role, str) or role not in ROLES:
            raise _Bad(f"{name} holds the unknown role {role!r}; known: {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": _text(content, f"a message of {name}")})
    if not messages:
        raise _Bad(f"{name} is an empty list")
    return messages


def _dialogue(text: str, name: str) -> list[dict[str, str]]:
    """An HH dialogue as messages; the last may be an assistant's with empty content (the prompt of an answer)."""
    head, *parts = DIALOGUE_TURN.split(text)
    if head.strip() or not parts or parts[0] != "Human":
        raise _Bad(f'{name} is not a dialogue that starts with "\\n\\nHuman:", and there is no prompt field')
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in turns]


def _prompt_field(record: dict[str, Any]) -> list[dict[str, str]] | None:
    """The messages of the record's prompt field, or None; may end with the assistant's (of messages, conversations)."""
    system = record.get("system")
    prefix = [{"role": "system", "content": system}] if isinstance(system, str) and system.strip() else []
    for name in PROMPT_FIELDS:
        value = record.get(name)
        if value is None:
            continue
        if name == "turns" and isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, (list, dict)):
            messages = _messages(value, name)
            return messages if messages[0]["role"] == "system" else prefix + messages
        value = _text(value, name)
        if name == "instruction" and record.get("input"):
            value = f"{value}\n\n{_text(record['input'], 'input')}"
        if name == "prompt" and value.startswith("\n\nHuman:"):
            messages = _dialogue(value, name)
            if messages[-1] == {"role": "assistant", "content": ""}:
                messages.pop()
            return prefix + messages
        return prefix + [{"role": "user", "content": value}]
    return None


def _prompt(messages: list[dict[str, str]]) -> Messages:
    if not messages or messages[-1]["role"] != "user":
        raise _Bad("the prompt does not end with a user's message")
    if not messages[-1]["content"].strip():
        raise _Bad("the prompt is empty")
    return tuple(messages)


def _answer(value: Any, name: str) -> tuple[list[dict[str, str]], str]:
    """The answer, and the messages before it where `value` is a whole conversation."""
    if isinstance(value, (list, dict)):
        *before, last = _messages(value, name)
        if last["role"] != "assistant":
            raise _Bad(f"{name} does not end with the assistant's message")
        return before, last["content"]
    return [], _text(value, name)


def _missing(record: dict[str, Any], expected: str) -> _Bad:
    return _Bad(f"expected the fields {expected}; the record has {', '.join(sorted(record)) or 'none'}")


def _preference(record: dict[str, Any], where: str) -> Preference:
    expected = "chosen and rejected, or output_1, output_2 and preference"
    if "chosen" in record or "rejected" in record:
        if "chosen" not in record or "rejected" not in record:
            raise _missing(record, expected)
        prompt = _prompt_field(record)
        if prompt is None and isinstance(record["chosen"], str) and isinstance(record["rejected"], str):
            # Whole dialogues. A blank last answer stays blank and is refused below.
            *before, chosen = _dialogue(_text(record["chosen"], "chosen"), "chosen")
            *other, rejected = _dialogue(_text(record["rejected"], "rejected"), "rejected")
            if chosen["role"] != "assistant" or rejected["role"] != "assistant":
                raise _Bad("a dialogue does not end with the assistant's turn")
            chosen, rejected = chosen["content"], rejected["content"]
        else:
            before, chosen = _answer(record["chosen"], "chosen")
            other, rejected = _answer(record["rejected"], "rejected")
        if before != other:
            raise _Bad("chosen and rejected do not share their prompt")
        # A conversation of its own is the fuller prompt: "prompt" beside it repeats the first message (UltraFeedback).
        prompt = before or prompt
        if prompt is None:
            raise _missing(record, "prompt, chosen and rejected")
    else:
        if not {"output_1", "output_2", "preference"} <= record.keys():
            raise _missing(record, expected)
        first, second = _text(record["output_1"], "output_1"), _text(record["output_2"], "output_2")
        verdict = record["preference"]
        if isinstance(verdict, bool) or not isinstance(verdict, (int, float)) or not 1 <= verdict <= 2:
            raise _Bad(f"preference must be a number from 1 (the first is better) to 2 (the second), not {verdict!r}")
        prompt = _prompt_field(record)
        if prompt is None:
            raise _missing(record, "instruction, output_1, output_2 and preference")
        if math.isclose(verdict, 1.5, abs_tol=1e-9):
            raise _Tie
        chosen, rejected = (first, second) if verdict < 1.5 else (second, first)
    prompt = _prompt(prompt)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise _Bad(f"the {name} answer is empty")
    if chosen == rejected:
        raise _Bad("the chosen answer is equal to the rejected one")
    return Preference(prompt, chosen, rejected, where)


def _is_preference(record: dict[str, Any]) -> bool:
    return "chosen" in record or "output_1" in record


def _example(record: dict[str, Any], where: str) -> Example:
    if _is_preference(record):
        preference = _preference(record, where)
        return Example(preference.prompt, preference.chosen, where)
    prompt = _prompt_field(record)
    name = next((name for name in ANSWER_FIELDS if name in record), None)
    if prompt is None or (name is None and prompt[-1]["role"] != "assistant"):
        if record.keys() & {"messages", "conversations"}:
            raise _Bad("the conversation does not end with the assistant's message")
        raise _missing(record, f"{' or '.join(ANSWER_FIELDS)} with a prompt, instruction or question, or messages")
    if name is None:
        response = prompt.pop()["content"]
    else:
        before, response = _answer(record[name], name)
        prompt = before or prompt
    prompt = _prompt(prompt)
    if not response.strip():
        raise _Bad("the answer is empty")
    return Example(prompt, response, where)


def _prompt_record(record: dict[str, Any], where: str) -> PromptRecord:
    prompt = _prompt_field(record)
    if isinstance(record.get("chosen"), list):
        prompt = _answer(record["chosen"], "chosen")[0] or prompt
    if prompt is None:
        if not _is_preference(record):
            raise _missing(record, "prompt, instruction, question, turns or messages")
        prompt = list(_preference(record, where).prompt)
    elif prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return PromptRecord(_prompt(prompt), where)
