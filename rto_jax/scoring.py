"""Log-probabilities of answers under a model: only the response's positions go through the unembedding."""

import jax
import jax.numpy as jnp

from rto_jax import losses
from rto_jax.types import Pairs, Params, Sequences, prompt_length


def response_logps(logits_fn, params: Params, sequences: Sequences, *, temperature: float = 1.0) -> jax.Array:
    """Log-probabilities of the response tokens, [B, T] float32, 0 where masked."""
    start = prompt_length(sequences)
    logits = logits_fn(params, sequences.tokens, sequences.valid, start)
    logps = losses.token_logps(logits, sequences.tokens[:, start:], temperature=temperature)
    return jnp.where(sequences.mask, logps, 0.0)


def stack_pairs(pairs: Pairs) -> Sequences:
    """Chosen rows, then rejected rows: one forward pass for both."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs.chosen, pairs.rejected)


def pair_logps(logits_fn, params: Params, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of the chosen and the rejected answers, two [B]."""
    both = stack_pairs(pairs)
    sums = losses.masked_sum(response_logps(logits_fn, params, both), both.mask, axis=-1)
    return tuple(jnp.split(sums, 2))
