"""What a stage trains on: the embedded gold world, pictures of digits, or text. All give rows of one layout (rto_jax/types.py)."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.common import Model, Stage, numpy_rng
from experiments.presets import DIGITS
from rto_jax import digits, gold, programs
from rto_jax.data import Lengths, Tokenizer, batches, download, held_out_splits, load
from rto_jax.errors import UserError
from rto_jax.rng import stream
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import blocks, check_batch, own_blocks, put_whole, to_host
from rto_jax.types import Pairs, Prompts, Sequences


class Source(NamedTuple):
    """Rows by index: arrays in memory, or records on disk with what encodes a list of them."""

    rows: Any
    encode: Callable | None = None


def stream_batches(source: Source, stage: Stage, mesh, pack: int = 0, buckets: int = 1, group_size: int = 1):
    """Endless, shuffled, resumable batches of the stage's size, for `put_batch`: each process reads its own rows alone.

    They have a row for each `group_size` of the stage's: `repeat` them.
    """
    check_batch(stage.batch_size, mesh, "--batch-size")
    found = batches(
        *source, batch_size=stage.batch_size // group_size, seed=stage.seed, parts=blocks(mesh), own=own_blocks(mesh),
        pack=pack, buckets=buckets,
    )  # fmt: skip
    if found.note:
        say(found.note)
    return found


def take(source: Source, n: int, seed: int):
    """n rows (or all, if fewer), a fixed random choice, as one NamedTuple of arrays."""
    total = len(source.rows) if source.encode else len(jax.tree.leaves(source.rows)[0])
    index = np.sort(np.random.default_rng(seed).permutation(total)[:n])
    if source.encode is None:
        return jax.tree.map(lambda x: x[index], source.rows)
    return source.encode([source.rows[int(i)] for i in index])


def repeat(rows, times: int):
    """Every row so many times, one after the other."""
    return jax.tree.map(lambda x: np.repeat(x, times, axis=0), rows)


ROWS = 256  # of an evaluation's batches in the embedded world: what a core's cache holds, more are slower


def in_batches(rows, size: int) -> Iterator[tuple[Any, int]]:
    """(batch of `size` rows, how many of them are new): the last batch is filled up with its own rows."""
    total = len(jax.tree.leaves(rows)[0])
    for begin in range(0, total, size):
        index = np.arange(begin, begin + size)
        yield jax.tree.map(lambda x, i=index: x[i % total], rows), min(size, total - begin)


def map_rows(function: Callable, rows, size: int, mesh):
    """`function` over all rows in batches of one size; the results joined, as NumPy. Every process gives and gets all."""
    parts = []
    for batch, count in in_batches(rows, size):
        result = to_host(function(put_whole(batch, mesh)))
        parts.append(jax.tree.map(lambda x, n=count: x[:n], result))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


_PAIRS: dict[tuple, Pairs] = {}  # the reward model and DPO ask for the same pairs; the last few are kept


class SampledTask:
    """What the two worlds with a gold reward share: pairs are two answers of a policy, labelled by their gold returns."""

    name: str
    length: int  # of an answer, in tokens
    returns: Callable[[Sequences], np.ndarray]
    pair_prompts: Callable[[str, np.random.Generator, int], tuple[Prompts, int]]
    """(n prompts, the seed of their answers) of a split."""

    def __init__(self, stage: Stage, mesh):
        self.stage, self.mesh = stage, mesh

    def pairs(self, split: str, model: Model) -> Source:
        """Two responses of `model`'s policy to each prompt, labelled by the gold return's Bradley–Terry probability."""
        n = self.stage.gold.pairs if split == "train" else self.stage.gold.test_pairs
        about = Path(model.source) / "model.json"
        stamp = about.stat().st_mtime_ns if about.exists() else 0
        key = (self.name, split, n, self.stage.seed, str(about.resolve()), stamp)
        if key not in _PAIRS:
            _PAIRS[key] = self._draw_pairs(split, n, model)
            if len(_PAIRS) > 4:
                del _PAIRS[next(iter(_PAIRS))]
        return Source(_PAIRS[key])

    def _draw_pairs(self, split: str, n: int, model: Model) -> Pairs:
        rng = numpy_rng(self.stage.seed, f"{self.name}-pairs-{split}")
        prompts, seed = self.pair_prompts(split, rng, n)
        params, sampling = model.load(self.mesh), SamplingConfig(self.length)
        seqs = sample_rows(self, model.config, params, repeat(prompts, 2), seed, sampling)
        returns = self.returns(seqs)
        first = gold.World.label(returns[0::2], returns[1::2], rng)
        chosen = np.arange(0, 2 * n, 2) + ~first
        return Pairs(*(jax.tree.map(lambda x, i=i: x[i], seqs) for i in (chosen, chosen ^ 1)))

    def evaluation_splits(self) -> list[str]:
        return ["test"]

    def pair_facts(self, split: str, pairs: Pairs) -> dict[str, float]:
        """The ceiling of any accuracy: how often the label agrees with the sign of the gold difference."""
        best, worst = (self.returns(rows) for rows in pairs)
        return {"ceiling": float(np.mean(best > worst))}

    def telling_pair(self, pairs: Pairs) -> int:
        """The pair with the largest gold difference."""
        best, worst = (self.returns(rows) for rows in pairs)
        return int(np.argmax(best - worst))

    def sample(self, config, params, prompts: Prompts, seed: int) -> Sequences:
        return sample_rows(self, config, params, prompts, seed, SamplingConfig(self.length))


class GoldTask(SampledTask):
    """The embedded world (rto_jax/gold.py): data from a seed, pairs from the SFT policy, an exact score."""

    name, eos_id, pad_id = "gold", gold.EOS, gold.PAD
    delimiters = (gold.SEP,)
    HEATMAP_NOTE = (
        "Implicit reward: beta·log(pi_dpo/pi_ref) of each token. The exact advantage A* is what it would be with endless "
        "data. OPEN costs gold reward now and earns it at CLOSE, so its advantage can be positive."
    )

    def __init__(self, stage: Stage, mesh):
        super().__init__(stage, mesh)
        self.length = stage.lengths.response
        self.world = gold.World(horizon=self.length)
        if stage.lengths.prompt != gold.PROMPT_LENGTH:
            raise UserError(f"the gold world has prompts of {gold.PROMPT_LENGTH} tokens, not --lengths.prompt {stage.lengths.prompt}.")

    def rows(self, prompts, tokens, mask) -> Sequences:
        valid = np.concatenate([np.ones(prompts.shape, bool), mask], axis=1)
        return Sequences(np.concatenate([prompts, tokens], axis=1).astype(np.int32), valid, mask)

    def examples(self, split: str) -> Source:
        """Responses of the data policy."""
        rng = numpy_rng(self.stage.seed, f"gold-{split}")
        prompts = self.world.prompts(rng, self.stage.gold.examples)
        return Source(self.rows(prompts, *self.world.sample_pi0(prompts, rng)))

    def prompts(self, split: str) -> Source:
        tokens = self.world.prompts(numpy_rng(self.stage.seed, f"gold-prompts-{split}"), 16_384)
        return Source(Prompts(tokens, np.ones(tokens.shape, bool)))

    def pair_prompts(self, split: str, rng: np.random.Generator, n: int) -> tuple[Prompts, int]:
        tokens = self.world.prompts(rng, n)
        return Prompts(tokens, np.ones(tokens.shape, bool)), self.stage.seed

    def returns(self, rows: Sequences) -> np.ndarray:
        cut = gold.PROMPT_LENGTH
        return self.world.returns(rows.tokens[:, :cut], rows.tokens[:, cut:], rows.mask)

    def exact_panels(self, name: str, tokens: list[str], rows: Sequences) -> dict[str, tuple]:
        """The exact advantages of one row's tokens, beside DPO's."""
        cut = gold.PROMPT_LENGTH
        exact = self.world.exact_advantages(rows.tokens[:, :cut], rows.tokens[:, cut:], rows.mask)
        return {f"{name}: exact advantage A*": (tokens, [float(x) for x in exact[0][rows.mask[0]]])}

    def score(self, config, params, seed: int) -> dict[str, float]:
        """The exact score of a policy: gold return, KL to the data policy, J and its share of the optimum."""
        prompts = take(self.prompts("test"), self.stage.gold.rollouts, seed)
        seqs = self.sample(config, params, prompts, seed)
        logits = map_rows(lambda b: programs.response_logits(config, self.mesh)(params, b), seqs, ROWS, self.mesh)
        return self.world.score(logits, prompts.tokens, seqs.tokens[:, gold.PROMPT_LENGTH :], seqs.mask)

    def prompt_text(self, prompt: np.ndarray) -> str:
        return "".join(self.pieces(prompt[-gold.PROMPT_LENGTH :])).strip()

    def answer_text(self, prompt: np.ndarray, response: np.ndarray) -> str:
        return self.world.describe(prompt[-gold.PROMPT_LENGTH :], response)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [gold.TOKEN_NAMES[a] + " " for a in tokens]


class DigitsTask(SampledTask):
    """Pictures as tokens (rto_jax/digits.py), chosen by --data digits: real digits to imitate, a classifier as gold reward."""

    name, eos_id, pad_id = DIGITS, -1, digits.PAD  # no EOS: every picture has all its pixels
    length = digits.PIXELS
    delimiters = ()
    HEATMAP_NOTE = "Implicit reward: beta·log(pi_dpo/pi_ref) of each pixel, row by row; a token is its grey level, 0 to 16."

    def __init__(self, stage: Stage, mesh):
        super().__init__(stage, mesh)
        self.world = digits.Digits()
        if stage.lengths != Lengths(digits.PROMPT_LENGTH, digits.PIXELS):
            raise UserError(f"--data digits needs --lengths.prompt {digits.PROMPT_LENGTH} and --lengths.response {digits.PIXELS}.")

    def examples(self, split: str) -> Source:
        pictures, asked = self.world.real(split)
        tokens = np.concatenate([digits.ASK + asked[:, None], pictures], axis=1).astype(np.int32)
        return Source(Sequences(tokens, np.ones(tokens.shape, bool), np.ones(pictures.shape, bool)))

    def asking(self, n: int) -> Prompts:
        """n prompts, every digit in turn."""
        tokens = (digits.ASK + np.arange(n, dtype=np.int32) % 10)[:, None]
        return Prompts(tokens, np.ones(tokens.shape, bool))

    def prompts(self, split: str) -> Source:
        return Source(self.asking(16_380))

    def pair_prompts(self, split: str, rng: np.random.Generator, n: int) -> tuple[Prompts, int]:
        return self.asking(n), int(rng.integers(2**31))  # the prompts of all splits are the same, so the answers must not be

    def returns(self, rows: Sequences) -> np.ndarray:
        return self.world.returns(rows.tokens[:, :1], rows.tokens[:, 1:])

    def exact_panels(self, name: str, tokens: list[str], rows: Sequences) -> dict[str, tuple]:
        return {}

    def score(self, config, params, seed: int) -> dict[str, float]:
        """Of pictures that a policy draws, all digits equally often: gold return, and how many the gold judge recognises."""
        seqs = self.sample(config, params, self.asking(self.stage.gold.rollouts), seed)
        returns, prompts = self.returns(seqs), seqs.tokens[:, :1]
        columns = {"gold_return": returns, "recognised": self.world.recognised(prompts, seqs.tokens[:, 1:], "gold")}
        errors = {f"{name}_se": float(x.std(ddof=1) / len(x) ** 0.5) for name, x in columns.items()}
        return {name: float(x.mean()) for name, x in columns.items()} | errors

    def prompt_text(self, prompt: np.ndarray) -> str:
        return f"draw a {int(prompt[-1]) - digits.ASK}"

    def answer_text(self, prompt: np.ndarray, response: np.ndarray) -> str:
        """The picture in characters, two for a pixel."""
        shades = (digits.ink(np.asarray(response)[None]) * 4).round().astype(int).reshape(digits.SIDE, digits.SIDE)
        return "\n".join("".join(2 * " ░▒▓█"[shade] for shade in row) for row in shades)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [f"{token} " for token in tokens]


class TextTask:
    """Prompts, answers and preferences from files (--data), through the policy's tokenizer and chat template."""

    HEATMAP_NOTE = "Implicit reward: beta·log(pi_dpo/pi_ref) of each token; an answer longer than the limit is cut."

    def __init__(self, stage: Stage, mesh, tokenizer: Tokenizer):
        if not stage.data:
            raise UserError("--data is missing: a folder with train.jsonl[.gz] and test.jsonl[.gz], or a file of records.")
        self.stage, self.mesh, self.tokenizer = stage, mesh, tokenizer
        self.eos_id, self.pad_id = tokenizer.eos_id, tokenizer.pad_id
        self.data = local_data(stage.data)

    @functools.cached_property
    def delimiters(self) -> tuple[int, ...]:
        """The tokens whose text ends a sentence or a line."""
        texts = self.tokenizer.hf.backend_tokenizer.decode_batch([[token] for token in range(self.tokenizer.vocab_size)])
        return tuple(token for token, text in enumerate(texts) if text.endswith((".", "!", "?", "\n")))

    def _load(self, kind: str, split: str) -> Source:
        stage = self.stage
        rows, encode, line = load(
            kind, self.data, split, self.tokenizer, stage.lengths, skip_bad=stage.skip_bad_records
        )
        say(line)
        return Source(rows, encode)

    def examples(self, split: str) -> Source:
        return self._load("examples", split)

    def pairs(self, split: str, model: Model) -> Source:
        return self._load("preferences", split)

    def prompts(self, split: str) -> Source:
        return self._load("prompts", split)

    def evaluation_splits(self) -> list[str]:
        return held_out_splits(self.data)

    def pair_facts(self, split: str, pairs: Pairs) -> dict[str, float]:
        """What always preferring the longer answer would score, as far as the rows hold it; a tie counts half."""
        longer = pairs.chosen.mask.sum(1) - pairs.rejected.mask.sum(1)
        return {"longer_answer": float(np.mean(0.5 + 0.5 * np.sign(longer)))}

    def telling_pair(self, pairs: Pairs) -> int:
        """The first pair of two answers that fit whole, if there is one."""
        ended = [(rows.tokens[:, -rows.mask.shape[1] :] == self.eos_id) & rows.mask for rows in pairs]
        return int(np.argmax(ended[0].any(1) & ended[1].any(1)))

    def exact_panels(self, name: str, tokens: list[str], rows: Sequences) -> dict[str, tuple]:
        return {}

    def prompt_text(self, prompt: np.ndarray) -> str:
        """The user's last words: what stands between the special tokens before the assistant's header."""
        special = set(self.tokenizer.hf.all_special_ids) | set(self.tokenizer.hf.added_tokens_decoder)
        parts, part = [], []
        for token in [*prompt.tolist(), next(iter(special))]:
            if token in special:
                parts.append(self.tokenizer.decode(part))
                part = []
            else:
                part.append(token)
        parts = [text for text in parts if text.strip()]
        return parts[-2 if len(parts) > 1 else -1].removeprefix("user\n").strip()

    def answer_text(self, prompt: np.ndarray, response: np.ndarray) -> str:
        return self.tokenizer.decode(response, skip_special_tokens=False)

    def pieces(self, tokens: np.ndarray) -> list[str]:
        return [self.tokenizer.decode([t], skip_special_tokens=False) for t in tokens]


def make_task(stage: Stage, mesh, model: Model) -> GoldTask | DigitsTask | TextTask:
    """The world that the model's vocabulary belongs to; the two without a tokenizer share one, and --data tells them apart."""
    if model.tokenizer is not None:
        return TextTask(stage, mesh, model.tokenizer)
    return DigitsTask(stage, mesh) if stage.data == DIGITS else GoldTask(stage, mesh)


def local_data(source: str) -> Path:
    """A file or folder as it is; owner/name is fetched from the Hugging Face hub."""
    path = Path(source)
    if path.exists() or source.count("/") != 1 or source.startswith("."):
        return path
    return download(source, "dataset")


@functools.cache
def say(line: str) -> None:
    """Print once, from one process."""
    if jax.process_index() == 0:
        print(line, flush=True)


def sample_rows(task, config, params, prompts: Prompts, seed: int, sampling: SamplingConfig, size: int = ROWS) -> Sequences:
    """One response to every prompt, as NumPy; row i's draws depend on the seed and on i alone."""
    total = len(prompts.tokens)
    ways = blocks(task.mesh)
    size = -(-min(size, total) // ways) * ways
    run = programs.sampler(config, sampling, task.eos_id, task.pad_id, task.mesh)
    keys = jax.random.key_data(jax.random.split(stream(seed, "sample"), total))

    def draw(batch):
        rows, key_data = batch
        return run(params, rows, jax.random.wrap_key_data(key_data))[0]

    return map_rows(draw, (prompts, np.asarray(keys)), size, task.mesh)
