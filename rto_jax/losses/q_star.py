"""A language model read as an optimal Q-function: From r to Q* (arXiv 2404.12358).

In the token MDP the policy that is optimal under a KL penalty of strength β towards π_ref is

    π*(a|s) = exp((Q*(s, a) − V*(s)) / β),   V*(s) = β log Σ_a exp(Q*(s, a) / β)      (eq. 5 and 6)
    Q*(s_t, a_t) = r(s_t, a_t) + β log π_ref(a_t|s_t) + V*(s_{t+1})                   (eq. 7)

so logits are Q*/β, up to a constant per state that a policy does not show. Logits here are [..., V] and may be
unnormalised; log-probabilities are logits whose soft value is 0.
"""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, logits_of, number
from rto_jax.losses.masking import next_token


def q_values(logits: jax.Array, *, beta: Scalar) -> jax.Array:
    """Q*(s, a) = β z(s, a): the Q-function of which the model with these logits is the optimal policy.

    From r to Q* (arXiv 2404.12358) eq. 5, section 4.1. It contains β log π_ref (eq. 7).
    logits: [..., V]. beta: above 0, that of the DPO training. Returns float32 [..., V], reward units.
    """
    (logits,) = logits_of(logits=logits)
    return logits.astype(jnp.float32) * number("beta", beta, 0, open_low=True)


def soft_values(logits: jax.Array, *, beta: Scalar) -> jax.Array:
    """V*(s) = β log Σ_a exp z(s, a) = β log Σ_a exp(Q*(s, a)/β): the soft maximum over actions.

    From r to Q* (arXiv 2404.12358) eq. 6. 0 for normalised log-probabilities: a policy alone does not show it.
    logits: [..., V]: Q*/β. Pass log π_ref + Q/β where Q is without β log π_ref (RTO's eq. 3.3 and 3.4 have it within).
    beta: above 0. Returns float32 [...], reward units; −∞ where every action is forbidden.
    """
    (logits,) = logits_of(logits=logits)
    return number("beta", beta, 0, open_low=True) * jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)


def optimal_advantages(logits: jax.Array, ref_logits: jax.Array, *, beta: Scalar) -> jax.Array:
    """A*(s, a) = β log π(a|s)/π_ref(a|s) = r(s, a) + V*(s') − V*(s), of every action.

    From r to Q* (arXiv 2404.12358) eq. 10; `implicit_token_rewards` is the entry of the tokens that were taken. Its
    mean under π_ref is −β KL(π_ref ‖ π) (eq. 16), `expected_implicit_rewards`.

    logits, ref_logits: [..., V], of policy and reference, normalised or not. beta: above 0.
    Returns float32 [..., V], reward units; 0 for an action that both forbid with −∞.
    """
    logits, ref_logits = logits_of(logits=logits, ref_logits=ref_logits)
    policy, ref = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, ref_logits))
    return number("beta", beta, 0, open_low=True) * _difference(policy, ref)


def expected_implicit_rewards(logits: jax.Array, ref_logits: jax.Array, *, beta: Scalar) -> jax.Array:
    """E_{a~π_ref(·|s)}[β log π(a|s)/π_ref(a|s)] = −β KL(π_ref(·|s) ‖ π(·|s)), at most 0.

    From r to Q* (arXiv 2404.12358) eq. 16: why the likelihood of data that π_ref produces must fall while DPO learns.

    logits, ref_logits: [..., V]. beta: above 0. Returns float32 [...], reward units. With a mask, and for long
    sequences and large vocabularies, use −β · `token_kl`, which is the same in chunks.
    """
    advantages = optimal_advantages(logits, ref_logits, beta=beta)
    ref = jax.nn.softmax(jnp.asarray(ref_logits).astype(jnp.float32))
    return jnp.sum(jnp.where(ref > 0, ref * advantages, 0), axis=-1)


def rewards_of_q(
    logits: jax.Array, tokens: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, beta: Scalar
) -> jax.Array:
    """r(s_t, a_t) = Q*(s_t, a_t) − β log π_ref(a_t|s_t) − V*(s_{t'}): the reward whose Q* the logits are.

    From r to Q* (arXiv 2404.12358) eq. 7 solved for r: the other way of Lemma 1's bijection. V* = 0 after the last
    token. Its sum is V*(s_0) plus that of `implicit_token_rewards` (section 4.1); logits that are shifted by Φ(s)/β
    in every state give `shape_rewards` with −Φ, and the same policy.

    logits: [B, T, V], unnormalised: Q*/β at the states before the tokens. tokens: int [B, T]. ref_logps: [B, T], nats.
    mask: bool [B, T]; a masked position is no state. beta: above 0. Returns float32 [B, T], 0 where masked.
    """
    (logits,) = logits_of(logits=logits)
    tokens = jnp.asarray(tokens)
    if logits.ndim < 2 or tokens.shape != logits.shape[:-1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}, but logits has shape {logits.shape}: "
            "want integers [B, T], [B, T, V]"
        )
    _, ref = float32(tokens=tokens, ref_logps=ref_logps)
    mask, beta = boolean(mask, tokens=tokens), number("beta", beta, 0, open_low=True)
    z = jnp.where(mask[..., None], logits.astype(jnp.float32), 0)
    chosen = jnp.take_along_axis(z, jnp.where(mask, tokens, 0)[..., None], axis=-1)[..., 0]
    ahead = next_token(soft_values(z, beta=beta), mask)
    return jnp.where(mask, beta * (chosen - jnp.where(mask, ref, 0)) - ahead, 0)


def proxy_logits(base_logits: jax.Array, proxy_logits: jax.Array, ref_logits: jax.Array, *, alpha: Scalar) -> jax.Array:
    """z = z_base + α(z_proxy − z_ref): π ∝ π_base · (π_proxy/π_ref)^α, a model steered by a small pair's advantage.

    From r to Q* (arXiv 2404.12358) eq. 14 and 15: proxy tuning, and emulated fine-tuning, as advantage-guided
    decoding, since the log-ratio of a DPO model is A*/β.

    base_logits, proxy_logits, ref_logits: [..., V], of the same vocabulary, normalised or not; a token that the pair
    forbids in both (−∞) is the base's alone. alpha: at least 0; 0 is the base, 1 emulates the tuning of the base.
    Returns float32 [..., V], unnormalised.
    """
    base, proxy, ref = logits_of(base_logits=base_logits, proxy_logits=proxy_logits, ref_logits=ref_logits)
    base, proxy, ref = (x.astype(jnp.float32) for x in (base, proxy, ref))
    alpha = number("alpha", alpha, 0)
    return base + alpha * jnp.where(alpha != 0, _difference(proxy, ref), 0)


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    """x − y, and 0 where both are −∞."""
    neither = (x == -jnp.inf) & (y == -jnp.inf)
    return jnp.where(neither, 0, x) - jnp.where(neither, 0, y)
