"""Log-probabilities of tokens, in float32 whatever the logits are."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, number


def token_logps(logits: jax.Array, tokens: jax.Array, *, temperature: Scalar = 1.0) -> jax.Array:
    """log π(a_t | s_t) = z_t[a_t] − log Σ_v exp z_t[v], with z = logits / temperature.

    logits: [..., T, V], any float; logits at t are the distribution that tokens[t] was drawn from, so nothing is
    shifted here: the logits that a decoder emits at the position before. tokens: int [..., T].
    temperature: that of the sampler, above 0. Policy, reference and DPO model must all get the same one, or the KL
    between them is that of other distributions.

    Returns float32 [..., T], in nats. The arithmetic is float32 also for bfloat16 logits: at 8 bits of precision,
    log-probabilities near −10 come in steps of 1/16, which swamps a policy ratio of 1 ± 0.2.
    A token outside 0..V−1 (padding, −100) has no log-probability and gives NaN; reduce with a mask.
    """
    logits, tokens = jnp.asarray(logits), jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but their dtype is {tokens.dtype}")
    if logits.shape[:-1] != tokens.shape or logits.ndim == 0:
        raise ValueError(
            f"logits has shape {logits.shape}, but tokens has shape {tokens.shape}: want [..., T, V], [..., T]"
        )
    scale = 1 / number("temperature", temperature, 0, open_low=True)
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits.astype(jnp.float32) * scale, axis=-1)
    return jnp.where(known, chosen.astype(jnp.float32) * scale - normaliser, jnp.nan)
