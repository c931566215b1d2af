"""Fewer padded slots: several examples to a row (packing), or rows of a few sizes that fit the data (buckets).

Either is arranged from the examples' lengths before the first batch. Batch number n is then a function of the data, the
settings and n, so that a run resumes at a number, and several processes agree without a word.

A packed row has the layout of any row (rto_jax/types.py), and every part of it holds several examples:

    [ prompt prompt … | answer answer … ]            pairs: [ prompts | answers | answers ], the prompt once for both

`valid` numbers the examples from 1, and 0 is padding. An answer starts with its prompt's last token, which the prompts
lack instead: so the state before an answer's first token stands one slot to its left, as everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rto_jax.errors import UserError
from rto_jax.types import PackedPairs, Pairs, Sequences, prompt_length

WINDOW = 512  # examples looked at together; twice as many fill half a per cent better
SHAPES = 32  # lengths of prompts, and of answers, that buckets are chosen from


def check(pack: int, buckets: int) -> None:
    """Raises UserError for numbers that mean nothing; 0 and 1 are one example a row, and rows of one size."""
    if pack < 0:
        raise UserError(f"--pack must be a number of slots, or 0 for one example a row, not {pack}.")
    if buckets < 1:
        raise UserError(f"--buckets must be at least 1, not {buckets}.")
    if pack and buckets > 1:
        raise UserError(f"--pack {pack} and --buckets {buckets} exclude each other: packed rows have one size.")


def _sides(rows: Sequences | Pairs) -> list[Sequences]:
    return [rows] if isinstance(rows, Sequences) else list(rows)


def lengths_of(rows: Sequences | Pairs) -> np.ndarray:
    """Tokens of the prompt and of every answer: int [B, 2], of pairs [B, 3]."""
    sides = _sides(rows)
    start = prompt_length(sides[0])
    return np.stack([sides[0].valid[:, :start].sum(1), *(side.valid[:, start:].sum(1) for side in sides)], axis=1)


@dataclass(frozen=True)
class Single:
    """One record a row, all rows of one size: what batches are without packing and buckets."""

    count: int
    """Rows."""
    shapes: int = 1
    """Shapes of batches that there are."""
    note: str = ""
    """What to tell the user."""
    label: str = ""
    """What a saved position must belong to."""

    def schedule(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """The rows of every batch of an epoch, [batches, size]: a permutation without its end, less than a batch."""
        return rng.permutation(self.count)[: self.count // size * size].reshape(-1, size)

    def batch(self, take: Callable, rows: np.ndarray, own: np.ndarray):
        """The part `own` of the batch of these rows; `take` gives the encoded records of some indices."""
        return take(rows[own])


# ------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packed(Single):
    """Several records to a row; made by `pack`."""

    shape: tuple[int, int] = (0, 0)
    """Slots of the prompts, and of each part of answers."""
    groups: Sequence[np.ndarray] = ()
    """The records of each row."""
    swapped: np.ndarray | None = None
    """Of each record, whether its second answer comes first; bool [records]."""
    most: int = 0
    """Records of the fullest row."""

    def batch(self, take, rows, own):
        groups = [self.groups[row] for row in rows[own]]
        records = np.concatenate(groups)
        return assemble(take(records), [len(g) for g in groups], self.shape, self.swapped[records], self.most)


def pack(lengths: np.ndarray, slots: int, seed: int, limit: tuple[int, int]) -> Packed:
    """An arrangement of all records into rows of `slots` slots.

    lengths: of `lengths_of`. seed: of the order in which records meet. limit: slots of prompt and answer in a row of
    one record, to compare. Raises UserError where the longest prompt and the longest answers don't fit in one row.
    """
    shape, need, answers = row_shape(lengths, slots), _needs(lengths), lengths.shape[1] - 1
    order = np.random.default_rng((seed % 2**32, 1)).permutation(len(need))
    groups, swapped = [], np.zeros(len(need), bool)
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for members, turned in fold(need[window], shape):
            groups.append(window[members])
            swapped[window[members]] = turned
    most = max(map(len, groups))
    text = _text(shape, answers)
    note = f"packed: {len(need)} examples in {len(groups)} rows of {text} slots, at most {most} in one; "
    note += _use(lengths, len(groups) * slots, limit, "one a row")
    return Packed(len(groups), 1, note, f"{len(groups)} of {text}", shape, groups, swapped, most)


def _text(shape: tuple[int, int], answers: int) -> str:
    return "+".join(map(str, [shape[0], *[shape[1]] * answers]))


def _use(lengths: np.ndarray, slots: int, limit: tuple[int, int], otherwise: str) -> str:
    plain = len(lengths) * (limit[0] + (lengths.shape[1] - 1) * limit[1])
    return f"{lengths.sum() / slots:.1%} of the slots are used, {lengths.sum() / plain:.1%} with {otherwise}"


def _needs(lengths: np.ndarray) -> np.ndarray:
    """Slots that a record takes of each part of a packed row: the prompt's last token is moved to its answers."""
    return lengths + np.array([-1] + [1] * (lengths.shape[1] - 1))


def row_shape(lengths: np.ndarray, slots: int) -> tuple[int, int]:
    """How a packed row is cut: slots of the prompts and of each part of answers, in proportion to what records need."""
    if lengths[:, 0].min() < 1:
        raise UserError("an example without a prompt can't be packed")
    need, parts = _needs(lengths), lengths.shape[1] - 1
    prompt, answer = int(need[:, 0].max()), int(need[:, 1:].max())
    if prompt + parts * answer > slots:
        raise UserError(
            f"--pack {slots} is too short a row: the longest prompt ({prompt + 1} tokens) and the longest answers "
            f"({answer - 1}) take {prompt + parts * answer}"
        )
    answers = int(slots / (parts + need[:, 0].mean() / need[:, 1:].mean()))
    answers = min(max(answers, answer), (slots - prompt) // parts)
    return slots - parts * answers, answers


def fold(need: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Vector bin packing: the members of one row after another, and whether the answers of each are swapped.

    A row starts with the largest example; then comes, again and again, the one of those that fit whose needs point most
    in the direction of the room left (dot product; Panigrahy et al., Heuristics for Vector Bin Packing, 2011). A pair's
    two answers may go either way round: that fills both parts alike even where chosen answers are the longer ones.

    need: int [examples, parts], each row within `shape`.
    """
    room = np.array([shape[0], *[shape[1]] * (need.shape[1] - 1)])
    index, turned = np.arange(len(need)), np.zeros(len(need), bool)
    if need.shape[1] == 3:
        need, index = np.concatenate([need, need[:, [0, 2, 1]]]), np.tile(index, 2)
        turned = np.repeat([False, True], len(need) // 2)
    while len(need):
        share, left = need / room, room
        open_, members, ways = np.ones(len(need), bool), [], []
        while (fits := open_ & (need <= left).all(1)).any():
            worth = share @ (left / room)
            best = int(np.argmax(np.where(fits, worth, -1.0)))
            members.append(index[best])
            ways.append(turned[best])
            left = left - need[best]
            open_ &= index != index[best]
        need, index, turned = need[open_], index[open_], turned[open_]
        yield np.array(members), np.array(ways)


def assemble(
    rows: Sequences | Pairs, sizes: Sequence[int], shape: tuple[int, int], swapped: np.ndarray, most: int
) -> Sequences | PackedPairs:
    """Packed rows of the first sizes[0] of `rows`, the next sizes[1], and so on; of pairs, at most `most` in one."""
    sides, (prompts, answers) = _sides(rows), shape
    start, counts = prompt_length(sides[0]), lengths_of(rows)
    tokens = np.zeros((len(sizes), prompts + len(sides) * answers), np.int32)
    valid, mask = np.zeros_like(tokens), np.zeros((len(sizes), len(sides) * answers), bool)
    chosen = np.full((len(sizes), most), -1, np.int32)
    record = 0
    for row, size in enumerate(sizes):
        place = [0, *(prompts + part * answers for part in range(len(sides)))]  # the next free slot of each part
        for number in range(size):
            order = (1, 0) if swapped[record] else range(len(sides))
            prompt = counts[record, 0]
            pieces = [sides[0].tokens[record, start - prompt : start - 1]]
            pieces += [sides[k].tokens[record, start - 1 : start + counts[record, 1 + k]] for k in order]
            for part, piece in enumerate(pieces):
                slots = slice(place[part], place[part] + len(piece))
                tokens[row, slots], valid[row, slots] = piece, number + 1
                if part:
                    side = sides[order[part - 1]]
                    mask[row, slots.start - prompts + 1 : slots.stop - prompts] = side.mask[record, : len(piece) - 1]
                place[part] = slots.stop
            chosen[row, number] = order[0]
            record += 1
    packed = Sequences(tokens, valid, mask)
    return packed if len(sides) == 1 else PackedPairs(packed, chosen)


# ------------------------------------------------------------------------------------------------------- buckets


@dataclass(frozen=True)
class Bucketed(Single):
    """One record a row, every batch in the smallest of a few nested shapes that holds it; made by `bucket`."""

    sizes: tuple[tuple[int, int], ...] = ()
    """Slots of prompt and answer, the smallest first; each holds what those before it hold."""
    of: np.ndarray | None = None
    """Which of them each record needs; int [records]."""

    def schedule(self, rng, size):
        """What is left of a bucket, less than a batch, goes into the next one; then the batches are shuffled."""
        order = rng.permutation(self.count)
        batches, left = [], order[:0]
        for index in range(len(self.sizes)):
            left = np.concatenate([left, order[self.of[order] == index]])
            whole = len(left) // size * size
            batches.append(left[:whole].reshape(-1, size))
            left = left[whole:]
        batches = np.concatenate(batches)
        return batches[rng.permutation(len(batches))]

    def batch(self, take, rows, own):
        prompt, answer = self.sizes[self.of[rows].max()]
        whole = take(rows[own])
        cut = [cut_row(side, prompt, answer) for side in _sides(whole)]
        return cut[0] if len(cut) == 1 else Pairs(*cut)


def cut_row(rows: Sequences, prompt: int, answer: int) -> Sequences:
    """The last `prompt` slots of the prompts and the first `answer` of the answers."""
    start = prompt_length(rows)
    slots = slice(start - prompt, start + answer)
    return Sequences(rows.tokens[:, slots], rows.valid[:, slots], rows.mask[:, :answer])


def bucket(lengths: np.ndarray, limit: tuple[int, int], count: int) -> Bucketed:
    """An arrangement of all records into at most `count` shapes, the last of them `limit` (prompt, answer)."""
    answers = lengths.shape[1] - 1
    pairs = np.stack([lengths[:, 0], lengths[:, 1:].max(1)], axis=1)
    sizes = bucket_shapes(pairs, limit, count, answers)
    fits = (pairs[:, None, :] <= np.array(sizes)[None, :, :]).all(2)
    of = fits.argmax(1)
    slots = np.array([prompt + answers * answer for prompt, answer in sizes])[of].sum()
    text = ", ".join(_text(size, answers) for size in sizes)
    note = f"buckets: {len(lengths)} examples in rows of {text} slots; " + _use(lengths, slots, limit, "one bucket")
    return Bucketed(len(lengths), len(sizes), note, text, sizes, of)


def bucket_shapes(lengths: np.ndarray, limit: tuple[int, int], count: int, answers: int = 1) -> tuple[tuple[int, int], ...]:
    """At most `count` nested shapes, the last one `limit`, of the fewest slots when each record takes the first it fits in.

    Dynamic programming over the lengths that occur (at most SHAPES quantiles of them): the best way to end at a shape
    with k buckets is the best way to end at a smaller one with k − 1, and all records between the two in this one.

    lengths: int [records, 2], prompt and longer answer. answers: parts of a row that are as long as the answer.
    """
    grids = []
    for column, last in zip(lengths.T, limit, strict=True):
        found = np.unique(column)
        if len(found) > SHAPES:
            found = np.unique(np.quantile(column, np.linspace(0, 1, SHAPES), method="higher"))
        grids.append(np.append(found[(found < last) & (found > 0)], last))
    prompts, longest = grids
    cell = [np.searchsorted(grid, np.maximum(column, 1)) for grid, column in zip(grids, lengths.T, strict=True)]
    held = np.zeros((len(prompts), len(longest)), np.int64)
    np.add.at(held, tuple(cell), 1)
    held = held.cumsum(0).cumsum(1)  # records that fit within a shape
    width = prompts[:, None] + answers * longest[None, :]
    best, before = held * width, []
    for _ in range(count - 1):
        now, origin = np.empty_like(best), np.empty((*best.shape, 2), int)
        for i, j in np.ndindex(best.shape):
            cost = best[: i + 1, : j + 1] + (held[i, j] - held[: i + 1, : j + 1]) * width[i, j]
            origin[i, j] = np.unravel_index(cost.argmin(), cost.shape)
            now[i, j] = cost[tuple(origin[i, j])]
        before.append(origin)
        best = now
    at = (len(prompts) - 1, len(longest) - 1)
    chosen = [at]
    for origin in reversed(before):
        at = tuple(origin[at])
        chosen.append(at)
    return tuple((int(prompts[i]), int(longest[j])) for i, j in sorted(set(chosen)))
