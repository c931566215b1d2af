"""Log-probabilities of answers under a model: only the response's positions meet the unembedding."""

import jax
import jax.numpy as jnp

from rto_jax.losses import LinearStatistics
from rto_jax.types import PackedPairs, Pairs, Params, Sequences, prompt_length


def response_logps(logps_fn, params: Params, sequences: Sequences, *, temperature: float = 1.0) -> jax.Array:
    """Log-probabilities of the response tokens, [B, T] float32, 0 where masked."""
    start = prompt_length(sequences)
    return logps_fn(params, sequences.tokens, sequences.valid, start, sequences.mask, temperature)


def side_by_side(pairs: Pairs) -> Sequences:
    """One row per pair, [prompt | chosen | rejected]: the prompt, the same in both, is read once. Its T is 2T."""
    start = prompt_length(pairs.chosen)

    def join(chosen, rejected):
        return jnp.concatenate([chosen, rejected[:, rejected.shape[1] - pairs.rejected.mask.shape[1] :]], axis=1)

    (tokens, valid, mask), (other_tokens, other_valid, other_mask) = pairs
    if prompt_length(pairs.rejected) != start:
        raise ValueError(f"the prompts have {start} and {prompt_length(pairs.rejected)} slots")
    return Sequences(join(tokens, other_tokens), join(valid, other_valid), jnp.concatenate([mask, other_mask], axis=1))


def pair_logps(logps_fn, params: Params, pairs: Pairs | PackedPairs) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of the chosen and the rejected answers, two [B]; of packed rows [B, n], 0 without a pair."""
    rows = pair_rows(pairs)
    return pair_sums(logps_fn(params, rows.tokens, rows.valid, prompt_length(rows), rows.mask, branches=2), rows, pairs)


def pair_statistics(statistics_fn, params: Params, reference: Params, pairs: Pairs | PackedPairs) -> LinearStatistics:
    """(chosen, rejected) as `pair_logps` has them, of each of a language model's `statistics`: their kl is `sequence_kl`."""
    rows = pair_rows(pairs)
    found = statistics_fn(params, reference, rows.tokens, rows.valid, prompt_length(rows), rows.mask, branches=2)
    return LinearStatistics(*(pair_sums(x, rows, pairs) for x in found))


def pair_lengths(pairs: Pairs | PackedPairs) -> tuple[jax.Array, jax.Array]:
    """Tokens of the chosen and of the rejected answers, float32, as `pair_logps` counts them."""
    rows = pair_rows(pairs)
    return pair_sums(rows.mask.astype(jnp.float32), rows, pairs)


def pair_rows(pairs: Pairs | PackedPairs) -> Sequences:
    """What a model reads of them: rows whose T is that of both answers."""
    return pairs.rows if isinstance(pairs, PackedPairs) else side_by_side(pairs)


def pair_sums(x: jax.Array, rows: Sequences, pairs: Pairs | PackedPairs) -> tuple[jax.Array, jax.Array]:
    """Numbers per token of `pair_rows`, summed over each answer: the chosen ones' and the rejected ones'."""
    if not isinstance(pairs, PackedPairs):
        chosen, rejected = (jnp.sum(part, axis=-1) for part in jnp.split(x, 2, axis=1))
        return chosen, rejected
    x = x.reshape(x.shape[0], 2, 1, -1)
    numbers = jnp.arange(1, pairs.chosen.shape[1] + 1, dtype=jnp.int32)[None, None, :, None]
    own = rows.valid[:, prompt_length(rows) :].reshape(x.shape) == numbers  # [B, 2, n, T]
    return chosen_first(jnp.sum(jnp.where(own, x, 0.0), axis=-1), pairs)


def chosen_first(both: jax.Array, pairs: PackedPairs) -> tuple[jax.Array, jax.Array]:
    """Of numbers [B, 2, n] for the two parts of answers of packed rows: the chosen answers', and the rejected ones'."""
    first, second = both[:, 0], both[:, 1]
    return jnp.where(pairs.chosen == 1, second, first), jnp.where(pairs.chosen == 1, first, second)
