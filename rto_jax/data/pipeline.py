"""From records to batches of static shape: tokenise, cut, pad, shuffle, and read ahead through grain.

    source, encoder, line = load("preferences", path, "train", tokenizer, Lengths(prompt=64, response=96))
    iterator = batches(source, encoder, batch_size=16, seed=0)
    batch = next(iterator)        # types.Pairs of NumPy arrays
    saved = iterator.state()      # JSON; iterator.restore(saved) goes on from there, on any number of hosts

Arrays in memory go the same way without an encoder: `batches(arrays, batch_size=128, seed=0)`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from rto_jax.data import packing
from rto_jax.data.records import Example, Messages, Preference, PromptRecord
from rto_jax.data.tokenizer import Tokenizer
from rto_jax.errors import UserError
from rto_jax.types import Pairs, Prompts, Sequences, prompt_length

Record = Preference | Example | PromptRecord


@dataclass(frozen=True)
class Lengths:
    """How long rows are, and what happens to a prompt that is longer."""

    prompt: int = 256
    """Positions of the prompt, tokens; shorter prompts are padded on the left."""
    response: int = 256
    """Positions of the response with its EOS, tokens; a longer answer is cut at its end and gets no EOS."""
    on_long_prompt: Literal["cut", "error"] = "cut"
    """A longer prompt: "cut" keeps its end (the template's own tokens survive), "error" refuses the record."""

    def __post_init__(self):
        for name in ("prompt", "response"):
            if getattr(self, name) < 1:
                raise UserError(f"the {name} length must be at least 1 token, not {getattr(self, name)}")
        if self.on_long_prompt not in ("cut", "error"):
            raise UserError(f'on_long_prompt must be "cut" or "error", not "{self.on_long_prompt}"')


@dataclass(frozen=True)
class Survey:
    """What the lengths do to a source. Counts are of the records kept."""

    records: int
    """Records kept."""
    prompts_cut: int
    """Prompts that were cut."""
    answers: int
    """Answers: two per pair."""
    answers_cut: int
    """Answers that were cut, and so have no EOS."""
    alike: int
    """Pairs whose two answers are the same tokens after the cut; they teach nothing."""
    refused: tuple[int, ...] = ()
    """Indices of the records left out (skip_bad)."""
    first_refused: str = ""
    """Why the first of them was."""


def _sides(record: Record) -> tuple[str, ...]:
    """The names of a record's answers, in the order of Pairs."""
    return {Preference: ("chosen", "rejected"), Example: ("response",), PromptRecord: ()}[type(record)]


@dataclass(frozen=True)
class Encoder:
    """Records -> one batch: Preferences to Pairs, Examples to Sequences, PromptRecords to Prompts (NumPy arrays).

    Prompts are padded on the left to lengths.prompt, responses on the right to lengths.response. The EOS is the
    response's last token, valid and an action. Raises UserError for a record whose prompt is too long for "error".
    """

    tokenizer: Tokenizer
    lengths: Lengths = field(default_factory=Lengths)

    def __post_init__(self):
        least = len(self.tokenizer.encode_prompt(({"role": "user", "content": ""},))) + 1
        if self.lengths.prompt < least:
            raise UserError(
                f"a prompt length of {self.lengths.prompt} tokens leaves no room for the user's text: "
                f"the chat template alone takes {least - 1}"
            )

    def __call__(self, records: Sequence[Record]) -> Pairs | Sequences | Prompts:
        prompts = [self.prompt(record)[0] for record in records]
        sides = [self._rows(prompts, [ids for ids, _ in self._responses(records, side)]) for side in _sides(records[0])]
        if len(sides) == 2:
            return Pairs(*sides)
        if sides:
            return sides[0]
        rows, size = self._rows(prompts, [[]] * len(prompts)), self.lengths.prompt
        return Prompts(rows.tokens[:, :size], rows.valid[:, :size])

    def prompt(self, record: Record) -> tuple[list[int], bool]:
        """The ids of a record's prompt, at most lengths.prompt of them, and whether it was cut."""
        try:
            ids = self.tokenizer.encode_prompt(record.prompt)
            if len(ids) <= self.lengths.prompt:
                return ids, False
            if self.lengths.on_long_prompt == "error":
                raise UserError(f"the prompt has {len(ids)} tokens, more than the limit of {self.lengths.prompt}")
            return self._cut(record.prompt), True
        except UserError as error:
            raise UserError(f"{record.where}: {error}" if record.where else str(error)) from None

    def _cut(self, messages: Messages) -> list[int]:
        """The end of a prompt: whole exchanges go first, the oldest before the others; then the text that is left of
        the user's last turn loses its start. A record's own system text is kept where it takes half the limit at most.
        """
        encode, limit = self.tokenizer.encode_prompt, self.lengths.prompt
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = list(messages[len(system) :])
        for start in [i for i, m in enumerate(turns) if i and m["role"] == "user"]:
            ids = encode((*system, *turns[start:]))
            if len(ids) <= limit:
                return ids
        last = turns[-1]
        if system and 2 * len(encode((*system, last | {"content": ""}))) > limit:
            system = []
        starts = [start for start, _ in self.tokenizer.offsets(last["content"])]
        ids, drop = encode((*system, last)), 0
        while len(ids) > limit:  # once or twice: what is left may merge into other tokens at its new start
            drop += len(ids) - limit
            text = last["content"][starts[drop] :] if drop < len(starts) else ""
            ids = encode((*system, last | {"content": text}))
            if not text and len(ids) > limit:  # a template that adds to what it is given
                raise UserError(f"the chat template alone takes {len(ids)} tokens, more than the limit of {limit}")
        return ids

    def response(self, ids: list[int]) -> tuple[list[int], bool]:
        """An answer's ids with EOS; or the first lengths.response alone, where they do not fit with it, and True."""
        limit = self.lengths.response
        return (ids + [self.tokenizer.eos_id], False) if len(ids) < limit else (ids[:limit], True)

    def _responses(self, records: Sequence[Record], side: str) -> list[tuple[list[int], bool]]:
        return [self.response(ids) for ids in self.tokenizer.encode_all([getattr(r, side) for r in records])]

    def _rows(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Sequences:
        size = self.lengths.prompt
        shape = (len(prompts), size + self.lengths.response)
        tokens, valid = np.full(shape, self.tokenizer.pad_id, np.int32), np.zeros(shape, bool)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            row = slice(size - len(prompt), size + len(response))
            tokens[i, row], valid[i, row] = prompt + response, True
        return Sequences(tokens, valid, valid[:, size:].copy())

    def survey(self, source: Sequence[Record], *, skip_bad: bool = False) -> Survey:
        """Counts what is cut, in one pass over the source. A refused record raises UserError, or is noted (skip_bad)."""
        return self.measure(source, skip_bad=skip_bad)[0]

    def measure(self, source: Sequence[Record], *, skip_bad: bool = False) -> tuple[Survey, np.ndarray]:
        """The survey, and how many tokens the prompt and the answers of each kept record have: int32 [records, 1 to 3]."""
        prompts_cut = answers = answers_cut = alike = 0
        refused, first_refused, lengths = [], "", []
        for start in range(0, len(source), 1024):
            kept, prompts = [], []
            for index, record in enumerate(_get(source, range(start, min(start + 1024, len(source)))), start):
                try:
                    ids, cut = self.prompt(record)
                except UserError as error:
                    if not skip_bad:
                        raise
                    refused.append(index)
                    first_refused = first_refused or str(error)
                    continue
                kept.append(record)
                prompts.append(len(ids))
                prompts_cut += cut
            sides = [self._responses(kept, side) for side in (_sides(kept[0]) if kept else ())]
            answers += len(sides) * len(kept)
            answers_cut += sum(cut for side in sides for _, cut in side)
            if len(sides) == 2:
                alike += sum(a == b for (a, _), (b, _) in zip(*sides, strict=True))
            lengths += zip(prompts, *([len(ids) for ids, _ in side] for side in sides), strict=True)
        if len(refused) == len(source):
            raise UserError(f"no usable record: {first_refused}")
        survey = Survey(
            len(source) - len(refused), prompts_cut, answers, answers_cut, alike, tuple(refused), first_refused
        )
        return survey, np.array(lengths, np.int32)

    def line(self, split: str, survey: Survey, notes: str = "") -> str:
        """ "train: 20000 pairs, 312 prompts cut to 64 tokens, 9120 answers cut to 96 tokens", then the notes."""
        each = survey.answers // survey.records
        text = f"{split}: {survey.records} {('prompts', 'examples', 'pairs')[each]}"
        text += f", {survey.prompts_cut} prompts cut to {self.lengths.prompt} tokens"
        if each:
            text += f", {survey.answers_cut} answers cut to {self.lengths.response} tokens"
        if survey.alike:
            text += f", {survey.alike} pairs alike after the cut"
        if survey.refused:
            text += f", {len(survey.refused)} records refused (the first: {survey.first_refused})"
        return text + notes


def load(
    kind: Literal["preferences", "examples", "prompts"],
    path: str | Path,
    split: str,
    tokenizer: Tokenizer,
    lengths: Lengths,
    *,
    skip_bad: bool = False,
    cache: str | Path | None = None,
) -> tuple[Sequence[Record], Encoder, str]:
    """The prepared records of a split, the encoder for them, and the line that says what was cut and left out.

    The counts, and every record's lengths, are kept beside the prepared data, so only the first start reads it all.
    """
    from rto_jax.data.tfds_builder import prepare

    encoder = Encoder(tokenizer, lengths)
    source, report = prepare(kind, path, split, skip_bad=skip_bad, cache=cache)
    settings = json.dumps([2, tokenizer.fingerprint, dataclasses.astuple(lengths), skip_bad])
    file = source.folder / f"survey-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
    try:
        survey, measured = Survey(**json.loads(file.read_text())), np.load(file.with_suffix(".npy"))
        if len(measured) != survey.records:
            raise ValueError
    except (OSError, ValueError, TypeError, EOFError):  # not there, or half-written
        survey, measured = encoder.measure(source, skip_bad=skip_bad)
        with contextlib.suppress(OSError):  # a cache of someone else's is only read
            np.save(file.with_suffix(".npy"), measured)
            file.write_text(json.dumps(dataclasses.asdict(survey)))
    kept = np.setdiff1d(np.arange(len(source)), np.array(survey.refused, int))
    return _Measured(source, kept, measured), encoder, encoder.line(split, survey, report.notes())


@dataclass(frozen=True)
class _Measured:
    """The kept records of a source, and how long each is."""

    source: Any
    indices: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int):
        return self.source[self.indices[index]]

    def __getitems__(self, indices: Sequence[int]) -> list:
        return _get(self.source, self.indices[indices])


def _get(source: Any, indices: Sequence[int]) -> list:
    read = getattr(source, "__getitems__", None)
    return list(read(indices)) if read else [source[int(i)] for i in indices]


def _is_arrays(source: Any) -> bool:
    return hasattr(source, "shape") or isinstance(source, dict) or hasattr(source, "_fields")


def _rows_of(source: Any) -> int:
    """The number of records; UserError for none, or for arrays of unequal length."""
    if _is_arrays(source):
        counts = {np.shape(leaf)[0] for leaf in jax.tree.leaves(source)}
        if len(counts) != 1:
            raise UserError(f"the arrays of a data set must have one length, not {sorted(counts)}")
        rows = counts.pop()
    else:
        rows = len(source)
    if not rows:
        raise UserError("the data set is empty")
    return rows


def _take(source: Any, encode: Callable | None, rows: np.ndarray) -> Any:
    batch = jax.tree.map(lambda leaf: leaf[rows], source) if _is_arrays(source) else _get(source, rows)
    return encode(batch) if encode else batch


def _arrange(source: Any, take: Callable, records: int, pack: int, buckets: int, seed: int) -> packing.Single:
    """What goes into which row: from the lengths of all records, where it depends on them."""
    packing.check(pack, buckets)
    if not pack and buckets == 1:
        return packing.Single(records)
    lengths = getattr(source, "lengths", None)
    if lengths is None:
        chunks = [np.arange(start, min(start + 1024, records)) for start in range(0, records, 1024)]
        lengths = np.concatenate([packing.lengths_of(take(chunk)) for chunk in chunks])
    first = take(np.arange(1))
    side = first if isinstance(first, Sequences) else first.chosen
    limit = prompt_length(side), side.mask.shape[1]
    return packing.pack(lengths, pack, seed, limit) if pack else packing.bucket(lengths, limit, buckets)


def _own_rows(batch_size: int, parts: int, own: Sequence[int]) -> np.ndarray:
    """The rows of a batch that lie in the parts `own`."""
    if batch_size < 1 or batch_size % parts:
        raise UserError(f"the batch size {batch_size} is not a multiple of the {parts} parts that devices take of it")
    return np.arange(batch_size).reshape(parts, -1)[np.asarray(own)].reshape(-1)


class BatchIterator(Iterator):
    """Shuffled batches without end, or of `epochs` epochs; made by `batches`."""

    def __init__(self, source, encode, batch_size, seed, epochs, parts, own, workers, pack, buckets):
        import grain

        records = _rows_of(source)
        if _is_arrays(source):
            source = jax.tree.map(np.asarray, source)
        if epochs is not None and epochs < 1:
            raise UserError(f"the number of epochs must be at least 1, not {epochs}")
        own = _own_rows(batch_size, parts, own)
        take = functools.partial(_take, source, encode)
        arranged = _arrange(source, take, records, pack, buckets, seed)
        if batch_size > arranged.count:
            raise UserError(
                f"the batch size {batch_size} is larger than the data set, {records} records"
                + (f" in {arranged.count} packed rows" if pack else "")
            )
        self.note, self.shapes = arranged.note, arranged.shapes
        self.batches_per_epoch = arranged.count // batch_size
        self._belongs_to = {"records": records, "batch_size": batch_size, "seed": seed}
        if arranged.label:
            self._belongs_to["rows"] = arranged.label

        # grain's own shuffle(seed) orders epoch e by seed + e, so that seed 1 repeats the second epoch of seed 0.
        @functools.lru_cache(maxsize=2)
        def schedule(epoch: int) -> np.ndarray:
            return arranged.schedule(np.random.default_rng((seed % 2**32, epoch)), batch_size)

        def batch(number: int):
            epoch, i = divmod(number, self.batches_per_epoch)
            return arranged.batch(take, schedule(epoch)[i], own)

        self._total = total = sys.maxsize if epochs is None else epochs * self.batches_per_epoch
        # An element is a whole batch, so the saved position counts batches and is the same for any number of hosts.
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        self._iterator = iter(grain.MapDataset.range(total).map(batch).to_iter_dataset(options))

    def __next__(self):
        return next(self._iterator)

    def state(self) -> dict[str, int]:
        """The position, as JSON: what was read ahead but not handed out counts as unread."""
        return {"batch": self._iterator.get_state()["next_index"], **self._belongs_to}

    def restore(self, state: dict[str, int]) -> None:
        """Goes on after the last batch handed out before `state()`; UserError if the state is of other data."""
        for name, value in ({"rows": None} | self._belongs_to).items():
            if state.get(name) != value:
                raise UserError(
                    f"the saved data position belongs to {name.replace('_', ' ')} {state.get(name)}, "
                    f"but this run has {value}"
                )
        if not 0 <= state.get("batch", -1) <= self._total:
            raise UserError(f"the saved data position, batch {state.get('batch')}, is beyond this run's {self._total}")
        self._iterator.set_state({"next_index": state["batch"]})

    def close(self) -> None:
        """Ends the threads."""
        self._iterator.close()


def batches(
    source: Any,
    encode: Callable[[list], Any] | None = None,
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    parts: int = 1,
    own: Sequence[int] = (0,),
    workers: int = 1,
    pack: int = 0,
    buckets: int = 1,
) -> BatchIterator:
    """Batches of `batch_size` records in an order that depends on the seed and the epoch alone.

    `source` is a sequence of records (`encode` makes a batch of a list of them), or arrays in memory: one, or a dict
    or NamedTuple of them, with one leading length. Each epoch is a new permutation; its last rows, fewer than a
    batch, are left out. A batch is what one process alone would get; of several, each takes, of the batch's `parts`
    equal parts, those that its devices hold (`own`, in order: `sharding.own_blocks`), and `sharding.put_batch` joins them.
    `workers` threads read and encode ahead; 0 does it on demand. Raises UserError for a batch larger than the data.

    Sequences and Pairs can be packed, several to a row of `pack` slots (a batch is then `batch_size` such rows), or kept
    in batches of at most `buckets` shapes: see `packing`. The result's `note` says what that gains, `shapes` how many
    shapes of batches there are. Both need the length of every record: a source may have `lengths`, as `load`'s does
    (int [records, prompt and answers]), else all are encoded once before the first batch.
    """
    return BatchIterator(source, encode, batch_size, seed, epochs, parts, own, workers, pack, buckets)
