"""Log-probabilities of tokens, entropies and divergences over the vocabulary: float32 whatever the logits are."""

import functools

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, logits_of, number
from rto_jax.losses.masking import masked_sum


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
    logits_of(logits=logits)
    scale = 1 / number("temperature", temperature, 0, open_low=True)
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    normaliser = jax.nn.logsumexp(logits.astype(jnp.float32) * scale, axis=-1)
    return jnp.where(known, chosen.astype(jnp.float32) * scale - normaliser, jnp.nan)


def entropy(
    logits: jax.Array, mask: jax.Array | None = None, *, temperature: Scalar = 1.0, chunk: int = 128
) -> jax.Array:
    """H(π(·|s_t)) = −Σ_v π(v|s_t) log π(v|s_t), over the whole vocabulary, π = softmax(logits / temperature).

    An entropy bonus adds −c · `masked_mean` of it to the loss. −log π of the sampled token is an unbiased estimate of
    it, but its gradient is not: at the sampled tokens alone that is 0 on average.

    logits: [..., T, V], any float; logits of −∞ forbid a token. mask: bool [..., T]; None: all. temperature: above 0;
    no gradient flows to it. chunk: positions that go through float32 at a time, forward and backward; the memory
    depends on it, the result does not. Returns float32 [..., T], nats, 0 where masked.
    """
    return _over_vocabulary(_entropy, mask, temperature, chunk, logits=logits)


def token_kl(
    logits: jax.Array,
    ref_logits: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: Scalar = 1.0,
    chunk: int = 128,
) -> jax.Array:
    """KL(π_ref(·|s_t) ‖ π(·|s_t)) = Σ_v π_ref(v|s_t) log π_ref(v|s_t)/π(v|s_t), over the whole vocabulary.

    The KL of TDPO (arXiv 2404.11999) and of From r to Q*'s identity (eq. 16): the *reference* is the one that is
    averaged over. Swap the two arguments for KL(π ‖ π_ref), the exact form of what `kl_k1` samples.

    logits, ref_logits: [..., T, V], any float; −∞ forbids a token (0 log 0 = 0). mask: bool [..., T]; None: all.
    temperature: above 0, of both; no gradient flows to it. chunk: positions that go through float32 at a time, forward
    and backward; the memory depends on it, the result does not.
    Returns float32 [..., T], nats, at least 0 up to rounding, 0 where masked. Gradients flow to both logits.
    """
    return _over_vocabulary(_kl, mask, temperature, chunk, logits=logits, ref_logits=ref_logits)


def sequence_kl(
    logits: jax.Array, ref_logits: jax.Array, mask: jax.Array, *, temperature: Scalar = 1.0, chunk: int = 128
) -> jax.Array:
    """D(y) = Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)): the sequential KL that `tdpo_loss` takes.

    TDPO (arXiv 2404.11999). Arguments as in `token_kl`. Returns float32 [...], nats, summed over T.
    """
    return masked_sum(token_kl(logits, ref_logits, mask, temperature=temperature, chunk=chunk), mask, axis=-1)


def _over_vocabulary(function, mask, temperature, chunk, **logits) -> jax.Array:
    first = next(iter(logits))
    arrays = tuple(logits_of(**logits))
    if arrays[0].ndim < 2:
        raise ValueError(f"{first} has shape {arrays[0].shape}, want [..., T, V]")
    rows = arrays[0][..., 0]
    mask = jnp.ones(rows.shape, bool) if mask is None else boolean(mask, **{f"{first} without V": rows})
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, but it is {chunk}")
    return _scan_positions(function, chunk, arrays, mask, 1 / number("temperature", temperature, 0, open_low=True))


# A function of distributions is given as (float32 logits at n positions) -> (value [n], its gradients [n, V]): both are
# known in closed form, so the backward pass goes through the positions in chunks too, and keeps nothing of size V.


def _entropy(z):
    logp = jax.nn.log_softmax(z)
    p = jnp.exp(logp)
    logp = jnp.where(p > 0, logp, 0)
    h = -jnp.sum(p * logp, axis=-1)
    return h, (-p * (logp + h[..., None]),)


def _kl(z, ref):
    logp, ref_logp = jax.nn.log_softmax(z), jax.nn.log_softmax(ref)
    p, q = jnp.exp(logp), jnp.exp(ref_logp)
    gap = jnp.where(q > 0, ref_logp - logp, 0)
    kl = jnp.sum(q * gap, axis=-1)
    return kl, (p - q, q * (gap - kl[..., None]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan_positions(function, chunk, logits, mask, scale):
    return _forward(function, chunk, logits, mask, scale)[0]


def _chunks(chunk, mask):
    """(first positions, positions in each): the last chunk ends at the end, so it may overlap the one before."""
    length = mask.shape[-1]
    size = max(1, min(chunk, length))
    return [max(0, min(start, length - size)) for start in range(0, length, size)], size


def _piece(x, start, size, axis):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _at(function, logits, mask, scale, start, size):
    axis = mask.ndim - 1
    # Else XLA, on CPU, takes the conversion of bfloat16 out of the loop: all of the logits in float32 at once.
    logits, start = jax.lax.optimization_barrier((logits, start))
    real = _piece(mask, start, size, axis)
    z = [jnp.where(real[..., None], _piece(x, start, size, axis).astype(jnp.float32) * scale, 0) for x in logits]
    return function(*z), real


def _forward(function, chunk, logits, mask, scale):
    starts, size = _chunks(chunk, mask)
    axis = mask.ndim - 1

    def body(out, start):
        (value, _), real = _at(function, logits, mask, scale, start, size)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(real, value, 0), start, axis), None

    out = jnp.zeros_like(logits[0][..., 0], jnp.float32)
    if starts:
        out, _ = jax.lax.scan(body, out, jnp.array(starts, jnp.int32))
    return out, (logits, mask, scale)


def _backward(function, chunk, kept, cotangent):
    logits, mask, scale = kept
    starts, size = _chunks(chunk, mask)
    axis = mask.ndim - 1

    def body(outs, start):
        (_, gradients), real = _at(function, logits, mask, scale, start, size)
        weight = (jnp.where(real, _piece(cotangent, start, size, axis), 0) * scale)[..., None]
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(
                out, jnp.where(real[..., None], weight * g, 0).astype(out.dtype), start, axis
            )
            for out, g in zip(outs, gradients, strict=True)
        ), None

    outs = tuple(jnp.zeros_like(x) for x in logits)
    if starts:
        outs, _ = jax.lax.scan(body, outs, jnp.array(starts, jnp.int32))
    return outs, None, None


_scan_positions.defvjp(_forward, _backward)
