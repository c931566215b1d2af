"""Answers of any checkpoint, drawn or searched for (rto_jax/search.py).

    python -m experiments.generate --model runs/gold/dpo --method beam
    python -m experiments.generate --preset smollm2 --prompt "What is the capital of France?" --method greedy
    python -m experiments.generate --preset smollm2 --method guided-beam --top-k 5 --model runs/smollm2/dpo --reference smollm2 --data DIR

    sample        y_t ~ π at --temperature, --top-k, --top-p
    greedy        the likeliest token each time
    beam          --beams by log π, over tokens^--length-penalty
    guided-beam   --beams by Σ β log π_guide/π_ref, among the --top-k tokens that the model itself finds likeliest; without
                  it among all, and of a large vocabulary it finds tokens that no reward was learned for
    proxy         π · (π_guide/π_ref)^α: drawn or, with --beams, searched
    chunk-beam    --beams of chunks: --n continuations of --chunk tokens of each are drawn from the model, and ranked by
                  --reward-model or by Σ β log π_guide/π_ref
    best-of-n     the best of --n answers of the model, by the same or by a Python function (--score)

π_guide is --guide or, without it, the model itself. The score written beside an answer is what it was chosen by; of sample,
greedy and proxy its log-probability at the temperature (greedy: 1), nats.
"""

import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import Model, Stage, frozen, main, open_model, same_tokenizer
from experiments.presets import ABOUT, GOLD, SMOLLM2
from experiments.tasks import in_batches, make_task, take
from rto_jax import gold, losses, programs
from rto_jax.data import Encoder, Lengths, PromptRecord
from rto_jax.errors import UserError
from rto_jax.metrics import progress, write_config
from rto_jax.models import language_model, scalar_model
from rto_jax.proxy_tuning import ProxyParams, ProxyTuned
from rto_jax.rng import stream
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.search import BeamConfig, ChunkConfig, beam_search, best_of_n, chunk_beam_search, implicit_reward
from rto_jax.sharding import MeshConfig, batch_sharding, blocks, make_mesh, put_whole, to_host
from rto_jax.types import Prompts, Sequences

Method = Literal["sample", "greedy", "beam", "guided-beam", "proxy", "chunk-beam", "best-of-n"]
PAIR, DRAWN, SCORED = ("reference", "guide"), ("temperature", "top_k", "top_p"), ("reward_model", "beta", "n")
TAKES = {
    "sample": DRAWN, "greedy": (), "beam": ("beams", "length_penalty"),
    "guided-beam": (*PAIR, "beta", "beams", "length_penalty", "top_k"),
    "proxy": (*PAIR, *DRAWN, "alpha", "beams", "length_penalty"),
    "chunk-beam": (*PAIR, *DRAWN, *SCORED, "beams", "chunk"), "best-of-n": (*PAIR, *DRAWN, *SCORED, "score"),
}  # fmt: skip


class _Frozen(Stage):
    freezes: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    model: str = "runs/gold/dpo"
    """the policy: a run directory, smollm2, a Hugging Face Llama folder, or owner/name on the hub"""
    method: Method = "sample"
    """how an answer is found"""
    prompt: tuple[str, ...] = ()
    """prompts; in the gold world the names of four tokens, such as "x0 x3 x7 x1" """
    data: str = ""
    """without --prompt: a folder, a file of records with prompts, or owner/name; the gold world needs none"""
    split: str = ""
    """of the folder; default: the first that is held out"""
    prompts: int = 8
    """how many of its prompts, a fixed random choice; 0: all"""
    out: str = ""
    """a new directory for answers.jsonl and config.json; default: answers are only printed"""
    reference: str = ""
    """π_ref of guided-beam, proxy, chunk-beam and best-of-n"""
    guide: str = ""
    """π_guide, tuned from π_ref; default: --model"""
    reward_model: str = ""
    """chunk-beam, best-of-n: ranks answers in the place of guide and reference"""
    score: str = ""
    """best-of-n: MODULE:FUNCTION, which gives (prompt, answer) a number; it ranks in the place of a model"""
    beams: int | None = None
    """answers kept; default: 5 and, of proxy, none: it draws"""
    n: int = 4
    """best-of-n: answers to choose from; chunk-beam: continuations of each beam"""
    chunk: int = 8
    """chunk-beam: tokens of a chunk"""
    length_penalty: float = 0.0
    """beams are ranked by score / tokens^this; 1: by the mean per token"""
    temperature: float = 1.0
    """of drawing; 0: greedy"""
    top_k: int = 0
    """draw among, or extend a guided beam by, the k tokens likeliest under the model; 0: any"""
    top_p: float = 1.0
    """draw among the fewest likeliest tokens whose probability reaches p; 1: any"""
    beta: float = 0.1
    """strength of the guide's KL constraint: the implicit reward is β log π_guide/π_ref"""
    alpha: float = 1.0
    """proxy: exponent of π_guide/π_ref"""
    seed: int = 0
    """of drawing and of the choice of prompts"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """compute dtype"""
    frozen_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """what the weights are kept in"""
    batch_size: int = 128
    """prompts at a time, over all devices; each takes as many rows as beams, or n, or both"""
    lengths: Lengths = field(default_factory=lambda: Lengths(4, 24))
    """most tokens of prompts and answers"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """devices"""
    tokenizer: str = ""
    """folder or hub name of the tokenizer and chat template to use instead of the model's own"""
    skip_bad_records: bool = False
    """count malformed records and go on, instead of stopping at the first"""

    def __post_init__(self):
        defaults = {f.name: f.default for f in fields(GenerateConfig)}
        known = {name for names in TAKES.values() for name in names}
        for name in sorted(known - set(TAKES[self.method])):
            if getattr(self, name) != defaults[name]:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} has no effect: --method {self.method} does not take it.")
        if self.method == "proxy" and self.length_penalty and not self.beams:
            raise UserError("--length-penalty has no effect on --method proxy without --beams.")
        for name, least in (("n", 1), ("batch_size", 1), ("prompts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}.")
        if not self.beta > 0:
            raise UserError(f"--beta must be positive, not {self.beta}.")
        if not 0 <= self.alpha < np.inf:
            raise UserError(f"--alpha must not be negative, not {self.alpha}.")
        if not np.isfinite(self.length_penalty):
            raise UserError(f"--length-penalty must be a number, not {self.length_penalty}.")
        if self.prompt and (self.data or self.split):
            raise UserError("--prompt and --data (or --split) exclude each other.")
        rankers = [name for name in ("reference", "reward_model", "score") if getattr(self, name)]
        wanted = {"guided-beam": 1, "proxy": 1, "chunk-beam": 2, "best-of-n": 3}.get(self.method, 0)
        allowed = [f"--{name}" for name in ("reference", "reward-model", "score")[:wanted]]
        if wanted and len(rankers) != 1:
            raise UserError(f"--method {self.method} needs {' or '.join(allowed)}, and one of them only.")
        if self.guide and not self.reference:
            raise UserError("--guide has no effect without --reference.")
        self.sampling, self.beam  # noqa: B018 (they check themselves)

    @property
    def stage(self) -> Stage:
        """What the model and data readers of the stages take."""
        shared = {f.name for f in fields(Stage)} & {f.name for f in fields(self)}
        return _Frozen(**{name: getattr(self, name) for name in shared})

    @property
    def sampling(self) -> SamplingConfig:
        temperature = 0.0 if self.method == "greedy" else self.temperature
        return SamplingConfig(self.lengths.response, temperature, self.top_k, self.top_p)

    @property
    def beam(self) -> BeamConfig:
        top_k = self.top_k if self.method == "guided-beam" else 0
        return BeamConfig(self.lengths.response, 5 if self.beams is None else self.beams, top_k)


# ---------------------------------------------------------------------------------------------- finding answers


@functools.cache
def best_beam(models: tuple, beams: BeamConfig, eos_id: int, pad_id: int, mesh):
    """Program: parameters of each model, Prompts, weights, length penalty -> Sequences, scores [B]: the best beam."""

    def run(params, prompts: Prompts, weights, length_penalty):
        options = dict(length_penalty=length_penalty, config=beams, eos_id=eos_id, pad_id=pad_id)
        found = beam_search(models, params, prompts, weights, **options)
        return found.sequences._make(x[:, 0] for x in found.sequences), found.scores[:, 0]

    return jax.jit(run, out_shardings=batch_sharding(mesh))


@functools.cache
def proxy_sampler(tuned: ProxyTuned, sampling: SamplingConfig, eos_id: int, pad_id: int, mesh):
    """Program: ProxyParams, Prompts, keys [B] -> Sequences, log-probabilities [B, T]."""

    def run(params: ProxyParams, prompts: Prompts, keys):
        return sample(tuned, params, prompts, keys, config=sampling, eos_id=eos_id, pad_id=pad_id)

    return jax.jit(run, out_shardings=batch_sharding(mesh))


def finder(config: GenerateConfig, models: dict[str, Model], ids: dict[str, int], mesh, by_hand: Callable | None):
    """A function of Prompts and keys [B] on the mesh -> Sequences, scores [B]."""
    stage, method = config.stage, config.method
    functions = {
        name: scalar_model(m.config, m.head, mesh) if m.head != "lm" else language_model(m.config, mesh)
        for name, m in models.items()
    }
    weights = {name: frozen(m.load(mesh), stage, mesh) for name, m in models.items()}
    policy, params = functions["model"], weights["model"]
    guide = "guide" if "guide" in models else "model"
    program = functools.partial(jax.jit, out_shardings=batch_sharding(mesh))

    def beam(names, multiples):
        run = best_beam(tuple(functions[x] for x in names), config.beam, *ids.values(), mesh)
        return lambda prompts, keys: run(tuple(weights[x] for x in names), prompts, multiples, config.length_penalty)

    if method in ("sample", "greedy"):
        return summed(programs.sampler(models["model"].config, config.sampling, *ids.values(), mesh), params)
    if method == "beam":
        return beam(["model"], (1.0,))
    if method == "guided-beam":
        multiples = (config.beta, -config.beta)
        return beam([guide, "reference"], multiples) if guide == "model" else beam(["model", guide, "reference"], (0.0, *multiples))
    if method == "proxy":
        tuned, own = ProxyTuned(policy, functions[guide]), ProxyParams(params, weights[guide], weights["reference"], config.alpha)
        if config.beams:
            run = best_beam((tuned,), config.beam, *ids.values(), mesh)
            return lambda prompts, keys: run((own,), prompts, (1.0,), config.length_penalty)
        return summed(proxy_sampler(tuned, config.sampling, *ids.values(), mesh), own)
    if by_hand:
        return lambda prompts, keys: (
            (best := best_of_n(policy, params, prompts, keys, by_hand, n=config.n, config=config.sampling, **ids)).sequences,
            jnp.max(best.scores, axis=1),
        )
    if "reward_model" in models:
        ranker = functions["reward_model"].scores
        score, own = (lambda p, seqs: ranker(p, seqs.tokens, seqs.valid, seqs.mask)), weights["reward_model"]
    else:
        score = implicit_reward(functions[guide].logps, functions["reference"].logps, beta=config.beta)
        own = weights[guide], weights["reference"]
    if method == "chunk-beam":
        chunks = ChunkConfig(config.sampling, config.beam.beams, config.n, config.chunk)

        def run(params, own, prompts, keys):
            found = chunk_beam_search(policy, params, prompts, keys, score, own, config=chunks, **ids)
            return found.sequences._make(x[:, 0] for x in found.sequences), found.scores[:, 0]

    else:

        def run(params, own, prompts, keys):
            ranked = lambda seqs: score(own, seqs)  # noqa: E731
            best = best_of_n(policy, params, prompts, keys, ranked, n=config.n, config=config.sampling, **ids)
            return best.sequences, jnp.max(best.scores, axis=1)

    run = program(run)
    return lambda prompts, keys: run(params, own, prompts, keys)


def summed(sampler: Callable, params) -> Callable:
    """A sampler's answers with their log-probabilities."""

    def run(prompts, keys):
        seqs, logps = sampler(params, prompts, keys)
        return seqs, losses.masked_sum(logps, seqs.mask, axis=-1)

    return run


# ---------------------------------------------------------------------------------------------- prompts and texts


def open_models(config: GenerateConfig) -> dict[str, Model]:
    """By flag, those that are named."""
    stage, found = config.stage, {}
    for name in ("model", "reference", "guide", "reward_model"):
        if source := getattr(config, name):
            found[name] = open_model(source, stage, f"--{name.replace('_', '-')}")
            if (found[name].head == "lm") == (name == "reward_model"):
                wanted = "a scalar head: it is a language model" if name == "reward_model" else "an unembedding: it is a reward model"
                raise UserError(f"--{name.replace('_', '-')} {source} has not {wanted}.")
    same_tokenizer(found["model"], *((f"--{name.replace('_', '-')}", m) for name, m in found.items() if name != "model"))
    if config.method == "proxy" and found.get("guide", found["model"]).config != found["reference"].config:
        raise UserError("--guide (or --model, without it) and --reference must be of one architecture: proxy tuning adds their difference.")
    return found


def read_prompts(config: GenerateConfig, model: Model, mesh) -> tuple[Prompts, list[str]]:
    """As rows and as text."""
    if not config.prompt:
        task = make_task(config.stage, mesh, model)
        rows = take(task.prompts(config.split or task.evaluation_splits()[0]), config.prompts or 2**31, config.seed)
        return rows, [task.prompt_text(tokens[valid]) for tokens, valid in zip(*rows, strict=True)]
    if model.tokenizer:
        records = [PromptRecord(({"role": "user", "content": text},), f"--prompt {number}") for number, text in enumerate(config.prompt, 1)]
        return Encoder(model.tokenizer, config.lengths)(records), list(config.prompt)
    words = [text.split() for text in config.prompt]
    names = gold.TOKEN_NAMES[gold.OUTPUTS : gold.PAD]
    if any(len(line) != gold.PROMPT_LENGTH or not set(line) <= set(names) for line in words):
        raise UserError(f'a --prompt of the gold world is {gold.PROMPT_LENGTH} of the words {" ".join(names)}, such as "x0 x3 x7 x1".')
    tokens = np.array([[gold.TOKEN_NAMES.index(word) for word in line] for line in words], np.int32)
    return Prompts(tokens, np.ones(tokens.shape, bool)), list(config.prompt)


def records_of(seqs: Sequences, scores: np.ndarray, texts: list[str], model: Model, ids: dict[str, int]) -> list[dict[str, Any]]:
    """What is written of each answer."""
    answers = seqs.tokens[:, -seqs.mask.shape[1] :]
    found = []
    for tokens, mask, score, text in zip(answers, seqs.mask, scores, texts, strict=True):
        said = tokens[mask]
        ended = bool(len(said)) and int(said[-1]) == ids["eos_id"]
        if model.tokenizer:
            answer = model.tokenizer.decode(said)
        else:
            answer = " ".join(gold.TOKEN_NAMES[token] for token in said)
        found.append({"prompt": text, "answer": answer, "score": float(score), "tokens": len(said), "ended": ended})
    return found


def chosen_by(config: GenerateConfig, model: Model, ids: dict[str, int]) -> Callable | None:
    """--score as a score of rows."""
    if not config.score:
        return None
    name, _, attribute = config.score.partition(":")
    try:
        function = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--score {config.score} is not MODULE:FUNCTION that Python can import ({error}).") from None

    def score(seqs: Sequences) -> np.ndarray:
        seqs = to_host(seqs)
        start = seqs.tokens.shape[1] - seqs.mask.shape[1]
        ask = model.tokenizer.decode if model.tokenizer else lambda row: " ".join(gold.TOKEN_NAMES[token] for token in row)
        prompts = [ask(tokens[:start][valid[:start]]) for tokens, valid in zip(seqs.tokens, seqs.valid, strict=True)]
        answers = records_of(seqs, np.zeros(len(prompts)), prompts, model, ids)
        return np.array([function(row["prompt"], row["answer"]) for row in answers], np.float32)

    return score


def run(config: GenerateConfig) -> list[dict[str, Any]]:
    """Prints the answers and, with --out, writes them; returns the records."""
    out = Path(config.out) if config.out else None
    if out and out.exists():
        raise UserError(f"--out {out} exists already: give another.")
    mesh = make_mesh(config.mesh)
    models = open_models(config)
    model = models["model"]
    ids = {"eos_id": model.tokenizer.eos_id, "pad_id": model.tokenizer.pad_id} if model.tokenizer else {"eos_id": gold.EOS, "pad_id": gold.PAD}
    rows, texts = read_prompts(config, model, mesh)
    find = finder(config, models, ids, mesh, chosen_by(config, model, ids))
    total, ways = len(texts), blocks(mesh)
    keys = np.asarray(jax.random.key_data(jax.random.split(stream(config.seed, "sample"), total)))
    size = -(-min(config.batch_size, total) // ways) * ways
    writes = jax.process_index() == 0
    if out:
        write_config(out, config)
    found: list[dict[str, Any]] = []
    with progress(total, config.method) as bar:
        for (prompts, key_data), count in in_batches((rows, keys), size):
            prompts, key_data = put_whole((prompts, key_data), mesh)
            seqs, scores = to_host(find(prompts, jax.random.wrap_key_data(key_data)))
            part = jax.tree.map(lambda x, n=count: x[:n], (seqs, scores))
            new = records_of(*part, texts[len(found) : len(found) + count], model, ids)
            found += new
            bar.update(count)
            if not writes:
                continue
            if out:
                with (out / "answers.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
            for row in new:
                bar.write(f"{row['prompt']}\n  -> {row['answer']}   [score {row['score']:.3f}, {row['tokens']} tokens]")
    if out and writes:
        print(f"answers: {(out / 'answers.jsonl').resolve()}")
    return found


PRESETS = {
    "gold": (ABOUT["gold"], GenerateConfig(lengths=GOLD["lengths"])),
    "smollm2": ("SmolLM2-135M, or any other model of text", GenerateConfig(model="smollm2", lengths=SMOLLM2["lengths"], batch_size=8)),
}

if __name__ == "__main__":
    main(PRESETS, run, __doc__)
