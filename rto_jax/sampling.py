"""Drawing responses: prefill and decode with a KV cache, as one traceable program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rto_jax.errors import UserError
from rto_jax.losses import token_logps
from rto_jax.types import Params, Prompts, Sequences


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How a response is drawn. Hashable: a static argument of the jitted program."""

    max_new_tokens: int
    """T, the most tokens of a response, its EOS included."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy (the likeliest token, the lowest id of a tie)."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens whose probability reaches p (after top_k, renormalised); 1 is off."""

    def __post_init__(self):
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
        ):
            if not good:
                raise UserError(f"sampling: {name} must be {wanted}, not {getattr(self, name)}")


def sample(
    model: Any,
    params: Params,
    prompts: Prompts,
    keys: jax.Array,
    *,
    config: SamplingConfig,
    eos_id: int,
    pad_id: int,
) -> tuple[Sequences, jax.Array]:
    """Draws one response to each prompt: y_t ~ softmax(logits_t / temperature), cut to top-k and top-p.

    Pure and traceable; the caller jits, e.g. `jax.jit(sample, static_argnums=0, static_argnames="config")`.
    Decoding ends when every row has ended, so a batch costs as many decode steps as its longest response, less one.
    The noise of row i at position t depends on keys[i] and t alone (Gumbel-max, one number per token of the
    vocabulary), so a row draws in a batch what it draws alone, however far it is padded; top-k and top-p cross
    tokens off and change no noise.

    Args:
      model: has `prefill(params, tokens, valid, cache_length) -> (logits [B, V], cache)` and
        `decode(params, token [B], cache) -> (logits [B, V], cache)`, such as a `models.LanguageModel`.
      params: the model's parameters.
      prompts: [B, P], padded on the left. A row without any real token is a filler: its response is empty, and
        it keeps no other row waiting.
      keys: threefry keys [B], such as `jax.random.split(key, B)`; greedy ignores them.
      config: static.
      eos_id: the token that ends a response; it belongs to it. Negative: no response ends before T.
      pad_id: fills the response after its end.

    Returns:
      Sequences over P + T: the prompt as it came, then the response, every real token of which is an action; and
      logps, float32 [B, T], nats: `token_logps(logits, tokens, temperature=temperature)` of the distribution
      before top-k and top-p, 0 where the mask is False. Greedy counts as temperature 1.

    Raises:
      ValueError: keys are not threefry keys [B].
    """
    (batch, prompt_length), length = prompts.tokens.shape, config.max_new_tokens
    if keys.shape != (batch,) or jax.random.key_impl(keys) != "threefry2x32":  # under vmap, rbg keys mix the rows
        raise ValueError(f"sample needs one threefry key per row, [{batch}], not {keys.shape} of {keys.dtype}")

    def emit(t, logits, out, alive):
        """Draws token t of every row and writes it where the row is alive; the others go on unseen, whatever pad_id is."""
        token = draw_tokens(logits, keys, t, config)
        logp = token_logps(logits, token, temperature=config.temperature or 1.0)
        column = (jnp.where(alive, token, pad_id).astype(jnp.int32), alive, jnp.where(alive, logp, 0.0))
        out = jax.tree.map(lambda buffer, x: jax.lax.dynamic_update_index_in_dim(buffer, x, t, axis=1), out, column)
        return out, token, alive & (token != eos_id)

    def unfinished(state):
        t, _, _, alive, _ = state
        return (t < length) & jnp.any(alive)

    def step(state):
        t, out, token, alive, cache = state
        logits, cache = model.decode(params, token, cache)
        return t + 1, *emit(t, logits, out, alive), cache

    logits, cache = model.prefill(params, prompts.tokens, prompts.valid, prompt_length + length)
    out = (
        jnp.full((batch, length), pad_id, jnp.int32),
        jnp.zeros((batch, length), bool),
        jnp.zeros((batch, length), jnp.float32),
    )
    # The first token needs no decode step and the last one is never decoded: T tokens, T - 1 steps.
    state = (jnp.int32(1), *emit(0, logits, out, prompts.valid.any(axis=1)), cache)
    _, (tokens, mask, logps), _, _, _ = jax.lax.while_loop(unfinished, step, state)
    return Sequences(
        tokens=jnp.concatenate([prompts.tokens.astype(jnp.int32), tokens], axis=1),
        valid=jnp.concatenate([prompts.valid, mask], axis=1),
        mask=mask,
    ), logps


def draw_tokens(logits: jax.Array, keys: jax.Array, t: jax.Array | int, config: SamplingConfig) -> jax.Array:
    """Token t of every row: [B, V] logits -> int32 [B]."""
    logits = logits.astype(jnp.float32)
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    batch, vocabulary = logits.shape
    logits = logits / config.temperature
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, t), (vocabulary,), jnp.float32))(keys)
    if config.top_k == 0 and config.top_p == 1:
        return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)

    logits, tokens = jax.lax.top_k(logits, min(config.top_k or vocabulary, vocabulary))  # ties: the lower id first
    if config.top_p < 1:
        # A token stays if the likelier ones have not reached p. The sum is shifted, not reduced by the token's own
        # probability: rounding in that difference would let one token too many through.
        reached = jnp.cumsum(jax.nn.softmax(logits), axis=-1)[:, :-1]
        kept = jnp.concatenate([jnp.ones((batch, 1), bool), reached < config.top_p], axis=1)
        logits = jnp.where(kept, logits, -jnp.inf)
    # The noise goes with the token, not with its rank, which an ulp can change between two near-equal logits.
    best = jnp.argmax(logits + jnp.take_along_axis(noise, tokens, axis=1), axis=-1, keepdims=True)
    return jnp.take_along_axis(tokens, best, axis=1)[:, 0].astype(jnp.int32)
