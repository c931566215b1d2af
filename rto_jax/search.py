"""Searching for an answer instead of drawing one: beams, chunk-level beams, and the best of n.

From r to Q* (arXiv 2404.12358, section 5.2): a DPO model's log π is β⁻¹(r + β log π_ref) shaped by V* (eq. 10), so the
answer that is best under reward and value function is the likeliest one: over a prefix of K + 1 tokens

    Σ_t [r(s_t, a_t) + β log π_ref(a_t|s_t)] + V*(s_{K+1}) = V*(s_0) + Σ_t β log π*(a_t|s_t)      (eq. 12 and 13)

(the paper prints −V*(s_0), a constant either way). Value-guided search is beam search by likelihood.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rto_jax import losses
from rto_jax.errors import UserError
from rto_jax.sampling import SamplingConfig, draw_tokens, sample
from rto_jax.scoring import response_logps
from rto_jax.types import Params, Prompts, Sequences


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """How wide a beam is. Hashable: a static argument of the jitted program."""

    max_new_tokens: int
    """T, the most tokens of an answer, its EOS included"""
    beams: int = 5
    """K, answers kept; 1 is greedy"""
    top_k: int = 0
    """an answer goes on with one of the k tokens that the first model finds likeliest; 0: with any"""

    def __post_init__(self):
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
        ):
            if not good:
                raise UserError(f"beam search: {name} must be {wanted}, not {getattr(self, name)}")


class Beams(NamedTuple):
    """Answers, the best of each row first."""

    sequences: Sequences  # [B, K, ...]
    scores: jax.Array  # float32 [B, K]


class _Hypotheses(NamedTuple):
    """Beginnings of answers, and whole ones."""

    tokens: jax.Array  # int32 [B, K, T], PAD behind the end
    length: jax.Array  # int32 [B, K], tokens
    total: jax.Array  # float32 [B, K], the sum of their tokens' scores; -inf: there is none
    alive: jax.Array  # bool [B, K]: not ended


def beam_search(
    models: tuple[Any, ...],
    params: tuple[Params, ...],
    prompts: Prompts,
    weights: jax.Array | tuple[float, ...] = (1.0,),
    *,
    length_penalty: jax.Array | float = 0.0,
    config: BeamConfig,
    eos_id: int,
    pad_id: int,
) -> Beams:
    """The K best answers that a beam finds under Σ_t Σ_m weights[m] · log π_m(y_t|s_t), divided by tokens^length_penalty.

    By the likelihood of a model (eq. 13): `(dpo,)`, weights (1,). By DPO's implicit reward: `(dpo, reference)`, weights
    (β, −β); as noise decides where both find a token unlikely, with `top_k`. By a steered policy: a
    `proxy_tuning.ProxyTuned` as the model. With a proposal of its own: weight 0 on the first model, and `top_k`.

    Every step extends the K answers by every token and keeps the K best. Ended answers are among them and stay as they
    are until better ones push them out; the search ends when all have ended, or after T tokens. Width 1 is greedy
    decoding, and a beam as wide as there are prefixes of T − 1 tokens is exhaustive. Differs from transformers, which
    keeps ended answers apart and whose length_penalty is 1 by default.

    Pure and traceable: jit it with models and config static. Rows don't affect each other, whatever their padding. A
    step costs K rows of a decode step, and moves the K caches of a row among them.

    Args:
      models: each has `prefill` and `decode` as a `models.LanguageModel` has; one vocabulary; hashable, static.
      params: of each model.
      prompts: [B, P], padded on the left. A row without any real token is a filler with empty answers.
      weights: [number of models], traced. A token that the first model forbids (−∞) is never taken.
      length_penalty: traced. 0 ranks by the sum (eq. 13), 1 by the mean per token.
      config: static.
      eos_id: the token that ends an answer, and belongs to it. Negative: none ends before T.
      pad_id: fills the answers after their end.

    Returns:
      Beams: sequences [B, K, ...] over P + T as `sample` has them, best first (of equals the one whose prefix was
      better, then the lower id); scores as ranked. Where fewer than K answers exist the rest are empty, with score −∞.

    Raises:
      ValueError: not one set of parameters and one weight for each model.
    """
    (batch, prompt_length), width, length = prompts.tokens.shape, config.beams, config.max_new_tokens
    weights = jnp.asarray(weights, jnp.float32)
    if not len(models) == len(params) == weights.size or weights.ndim != 1:
        raise ValueError(f"beam_search has {len(models)} models, {len(params)} parameters, weights {weights.shape}")

    def extend(t, logits, old: _Hypotheses) -> tuple[_Hypotheses, jax.Array]:
        """The K best of what the hypotheses are, if they have ended, or become with token t; and which each comes from."""
        count = old.total.shape[1]
        gains, tokens = _best_tokens(logits, weights, width, config.top_k)  # [B * count, n], best first
        gains, tokens = (x.reshape(batch, count, -1) for x in (gains, tokens))
        n = tokens.shape[2]
        stays = jnp.where(jnp.arange(n) == 0, 0.0, -jnp.inf)[None, None, :]  # an ended one is its only continuation
        total = old.total[:, :, None] + jnp.where(old.alive[:, :, None], gains, stays)
        lengths = old.length + old.alive
        rank = (total / _norm(lengths, length_penalty)[:, :, None]).reshape(batch, -1)
        rank = jnp.pad(rank, ((0, 0), (0, max(0, width - count * n))), constant_values=-jnp.inf)
        best, index = jax.lax.top_k(rank, width)
        index = jnp.minimum(index, count * n - 1)
        parent = index // n
        of_parent = lambda x: jnp.take_along_axis(x, parent, axis=1)  # noqa: E731
        flat = lambda x: jnp.take_along_axis(x.reshape(batch, -1), index, axis=1)  # noqa: E731
        found, alive = best > -jnp.inf, of_parent(old.alive)
        token = jnp.where(alive & found, flat(tokens), pad_id)
        rows = jnp.take_along_axis(old.tokens, parent[:, :, None], axis=1)
        return _Hypotheses(
            tokens=jax.lax.dynamic_update_index_in_dim(rows, token, t, axis=2),
            length=jnp.where(found, of_parent(lengths), 0),
            total=jnp.where(found, flat(total), -jnp.inf),
            alive=alive & found & (token != eos_id),
        ), parent

    logits, caches, move = [], [], []
    for model, weight in zip(models, params, strict=True):
        first, cache = model.prefill(weight, prompts.tokens, prompts.valid, prompt_length + length)
        logits.append(first)
        caches.append(cache)
        move.append(_mover(cache, model, weight, prompts, prompt_length + length) if width > 1 else None)
    start = _Hypotheses(
        tokens=jnp.full((batch, 1, length), pad_id, jnp.int32),
        length=jnp.zeros((batch, 1), jnp.int32),
        total=jnp.zeros((batch, 1), jnp.float32),
        alive=prompts.valid.any(axis=1)[:, None],
    )

    def moved(caches, rows):
        return tuple(each(cache, rows) if each else cache for each, cache in zip(move, caches, strict=True))

    def unfinished(state):
        t, found, _ = state
        return (t < length) & jnp.any(found.alive)

    def step(state):
        t, found, caches = state
        last = jax.lax.dynamic_index_in_dim(found.tokens, t - 1, axis=2, keepdims=False)
        last = jnp.where(found.alive, last, 0).reshape(-1)
        read = [model.decode(weight, last, cache) for model, weight, cache in zip(models, params, caches, strict=True)]
        logits, caches = zip(*read, strict=True)
        found, parent = extend(t, logits, found)
        rows = jnp.arange(batch)[:, None] * width + parent
        return t + 1, found, moved(caches, rows.reshape(-1))

    found, _ = extend(0, logits, start)
    state = (jnp.int32(1), found, moved(caches, jnp.repeat(jnp.arange(batch), width)))
    _, found, _ = jax.lax.while_loop(unfinished, step, state)
    mask = jnp.arange(length)[None, None, :] < found.length[:, :, None]
    scores = found.total / _norm(found.length, length_penalty)
    return Beams(_beside(prompts, jnp.where(mask, found.tokens, pad_id), mask), scores)


def _best_tokens(logits, weights, width: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The scores of the tokens that may become one of `width` answers, best first, and their ids: [N, V] -> [N, n]."""
    logps = [jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits]
    scores = sum(jnp.where(w == 0, 0.0, w * x) for w, x in zip(weights, logps, strict=True))
    scores = jnp.where(logps[0] > -jnp.inf, scores, -jnp.inf)
    vocabulary = scores.shape[-1]
    if not 0 < top_k < vocabulary:
        return jax.lax.top_k(scores, min(width, vocabulary))
    _, allowed = jax.lax.top_k(logps[0], top_k)
    best, which = jax.lax.top_k(jnp.take_along_axis(scores, allowed, axis=1), min(width, top_k))
    return best, jnp.take_along_axis(allowed, which, axis=1)


def _norm(length: jax.Array, penalty: jax.Array | float) -> jax.Array:
    return jnp.maximum(length, 1).astype(jnp.float32) ** penalty


def _beside(prompts: Prompts, tokens: jax.Array, mask: jax.Array) -> Sequences:
    """Rows of prompt and answer, of answers [B, K, T]."""
    spread = lambda x: jnp.broadcast_to(x[:, None], (*mask.shape[:2], x.shape[1]))  # noqa: E731
    return Sequences(
        tokens=jnp.concatenate([spread(prompts.tokens.astype(jnp.int32)), tokens], axis=2),
        valid=jnp.concatenate([spread(prompts.valid), mask], axis=2),
        mask=mask,
    )


def _mover(cache: Any, model, params: Params, prompts: Prompts, cache_length: int) -> Callable:
    """(cache, rows int [M]) -> the cache whose row i is row rows[i] of the old one, whatever the cache is made of.

    The batch's dimension of a leaf is the one that is another for a batch of another size. `cache` is the prompts'.
    """
    twice = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2 * x.shape[0], x.shape[1]), x.dtype), prompts)
    other = jax.eval_shape(lambda p, x: model.prefill(p, *x, cache_length)[1], params, twice)

    def axis(one, other) -> int:
        return next((i for i, (m, n) in enumerate(zip(one.shape, other.shape, strict=True)) if m != n), -1)

    axes = jax.tree.map(axis, cache, other)
    return lambda cache, rows: jax.tree.map(lambda x, i: x if i < 0 else jnp.take(x, rows, axis=i), cache, axes)


# ---------------------------------------------------------------------------------------------- scores of whole answers


@functools.cache
def implicit_reward(logps: Callable, reference_logps: Callable, *, beta: float) -> Callable:
    """score((params, reference params), sequences) -> float32 [B]: β Σ_t log π(y_t|s_t)/π_ref(y_t|s_t) of each answer.

    The value of a beginning too: r of its tokens + V*(s) − V*(s_0), if π is optimal (From r to Q*, eq. 10). The
    arguments are `logps` of two `models.LanguageModel`s. The same function for the same arguments.
    """

    def score(params: tuple[Params, Params], sequences: Sequences) -> jax.Array:
        ours, theirs = (
            response_logps(fn, weights, sequences)
            for fn, weights in zip((logps, reference_logps), params, strict=True)
        )
        rewards = losses.implicit_token_rewards(ours, theirs, sequences.mask, beta=beta)
        return losses.masked_sum(rewards, sequences.mask, axis=-1)

    return score


class Best(NamedTuple):
    """The best of n answers to each prompt."""

    sequences: Sequences  # [B, ...]
    scores: jax.Array  # float32 [B, n], of all n
    chosen: jax.Array  # int32 [B], which of them
    kl_bound: jax.Array  # float32 [], nats: KL(best of n ‖ policy) is at most this


def best_of_n(
    model: Any,
    params: Params,
    prompts: Prompts,
    keys: jax.Array,
    score: Callable[[Sequences], Any],
    *,
    n: int,
    config: SamplingConfig,
    eos_id: int,
    pad_id: int,
) -> Best:
    """Draws n answers to each prompt and takes the one with the highest score (`losses.best_of_n`).

    The bound log n − (n − 1)/n (`losses.best_of_n_kl_bound`) is over the policy that drew: at config's temperature.

    Args:
      model, params, prompts, config, eos_id, pad_id: as in `sample`.
      keys: threefry keys [B]; answer i of a row draws with fold_in(key, i), so more answers change none.
      score: sequences [B · n] (a prompt's answers are neighbours) -> [B · n]: a reward model's, `implicit_reward`'s, or
        any Python callable that gives numbers; then best_of_n cannot be jitted as a whole, and jits the drawing only.
    """
    rows = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), prompts)
    sequences, _ = _sample(model, params, rows, _spread(keys, n), config=config, eos_id=eos_id, pad_id=pad_id)
    scores = jnp.asarray(score(sequences), jnp.float32).reshape(-1, n)
    chosen = losses.best_of_n(scores)
    index = jnp.arange(scores.shape[0]) * n + chosen
    return Best(jax.tree.map(lambda x: x[index], sequences), scores, chosen, losses.best_of_n_kl_bound(n))


_sample = jax.jit(sample, static_argnums=0, static_argnames="config")


def _spread(keys: jax.Array, n: int) -> jax.Array:
    """keys [B] -> [B · n]: fold_in(key, i)."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
    return fold(keys, jnp.arange(n)).reshape(-1)


# ---------------------------------------------------------------------------------------------- beams of chunks


@dataclasses.dataclass(frozen=True)
class ChunkConfig:
    """How chunks are proposed and kept. Hashable: a static argument of the jitted program."""

    sampling: SamplingConfig
    """how the proposal draws; its max_new_tokens are T"""
    beams: int = 4
    """K, answers kept after every chunk"""
    samples: int = 4
    """M, continuations drawn of each"""
    chunk: int = 8
    """L, tokens of a chunk"""

    def __post_init__(self):
        for name in ("beams", "samples", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"chunk beams: {name} must be at least 1, not {getattr(self, name)}")


def chunk_beam_search(
    model: Any,
    params: Params,
    prompts: Prompts,
    keys: jax.Array,
    score: Callable[[Params, Sequences], jax.Array],
    score_params: Params,
    *,
    config: ChunkConfig,
    eos_id: int,
    pad_id: int,
) -> Beams:
    """Search with a proposal and a value model apart: draw M chunks of L tokens behind each of K beginnings, keep the K best.

    From r to Q* reads V-STaR as likelihood search with a proposal of its own, perhaps safer against reward hacking
    (section 5.2). One beam and a chunk as long as an answer is the best of M; L = 1 is beam search over drawn tokens.
    Of copies of one beginning the first alone is ranked; the others come after all that differ. Ended answers stay among
    the K · M with the score that they have.

    Pure and traceable: jit it with model, score and config static.

    Args:
      model, params, prompts, eos_id, pad_id: as in `sample`.
      keys: threefry keys [B]; place i of the K · M draws token t with fold_in(key, i) and t.
      score: of beginnings of answers and whole ones, (score_params, Sequences [B · K · M]) -> [B · K · M]: a value
        model, a reward model's `scores`, or an `implicit_reward`. It reads the rows anew after every chunk.

    Returns:
      Beams, with the scores of the answers as they ended.
    """
    (batch, prompt_length), length = prompts.tokens.shape, config.sampling.max_new_tokens
    places, chunk = config.beams * config.samples, min(config.chunk, length)
    rounds = -(-length // chunk)
    keys = _spread(keys, places)
    logits, cache = model.prefill(params, prompts.tokens, prompts.valid, prompt_length + rounds * chunk)
    move = _mover(cache, model, params, prompts, prompt_length + rounds * chunk)
    ranks = jnp.arange(places, dtype=jnp.int32)

    def draw(i, state):
        t, (tokens, count, alive), logits, cache = state
        token = jnp.where(alive, draw_tokens(logits, keys, t, config.sampling), pad_id)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, t, axis=1)
        count = count + alive
        alive = alive & (token != eos_id) & (t + 1 < length)
        logits, cache = model.decode(params, jnp.where(alive, token, 0), cache)
        return t + 1, (tokens, count, alive), logits, cache

    def sequences(answers):
        """[B, K · M, ...]"""
        tokens, count, _ = answers
        mask = jnp.arange(length)[None, :] < count[:, None]
        return _beside(prompts, *(x.reshape(batch, places, length) for x in (tokens[:, :length], mask)))

    def one_round(state):
        t, answers, logits, cache, _, _ = state
        t, answers, logits, cache = jax.lax.fori_loop(0, chunk, draw, (t, answers, logits, cache))
        rows = sequences(answers)
        scores = score(score_params, jax.tree.map(lambda x: x.reshape(batch * places, -1), rows)).reshape(batch, places)
        scores = scores.astype(jnp.float32)
        said = jnp.where(rows.mask, rows.tokens[:, :, prompt_length:], -1)
        copies = jnp.any(jnp.all(said[:, :, None] == said[:, None], axis=-1) & (ranks[None, :] < ranks[:, None])[None], axis=-1)
        kept = jnp.lexsort((-scores, copies), axis=-1)[:, : config.beams]
        into = (jnp.arange(batch)[:, None] * places + jnp.repeat(kept, config.samples, axis=1)).reshape(-1)
        answers, logits = jax.tree.map(lambda x: x[into], (answers, logits))
        return t, answers, logits, move(cache, into), kept, jnp.take_along_axis(scores, kept, axis=1)

    def unfinished(state):
        t, (_, _, alive), *_ = state
        return (t < length) & jnp.any(alive)

    rows = jnp.repeat(jnp.arange(batch), places)
    answers = (
        jnp.full((batch * places, rounds * chunk), pad_id, jnp.int32),
        jnp.zeros((batch * places,), jnp.int32),
        jnp.repeat(prompts.valid.any(axis=1), places),
    )
    best = jnp.zeros((batch, config.beams), jnp.int32), jnp.zeros((batch, config.beams), jnp.float32)
    state = (jnp.int32(0), answers, logits[rows], move(cache, rows), *best)
    _, answers, _, _, _, scores = jax.lax.while_loop(unfinished, one_round, state)
    # The K kept stand at every M-th place.
    return Beams(jax.tree.map(lambda x: x[:, :: config.samples], sequences(answers)), scores)
