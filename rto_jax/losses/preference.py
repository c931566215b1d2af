"""Losses over preference pairs: one number per pair."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, float32, number


def bradley_terry_loss(
    chosen_rewards: jax.Array, rejected_rewards: jax.Array, *, margin: Scalar | jax.Array = 0.0
) -> jax.Array:
    """L = −log σ(r(x, y_w) − r(x, y_l) − m): the negative log-likelihood of Bradley–Terry.

    RTO (arXiv 2404.18922) eq. 2.1 and 2.2 with m = 0; a margin m > 0 asks for a gap between the two (Llama 2).

    chosen_rewards, rejected_rewards: [B], one score per response, on any scale: their difference is the log-odds.
    margin: a number, or [B] for one margin per pair.
    Returns float32 [B]; log 2 = 0.693 where the two scores are equal. Grows linearly, without overflow, where the
    order is wrong by a lot.
    """
    chosen, rejected = float32(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if jnp.ndim(margin) > 0:
        (_, margin) = float32(chosen_rewards=chosen, margin=margin)
    else:
        margin = number("margin", margin, -jnp.inf)
    return jax.nn.softplus(margin - (chosen - rejected))


def dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
) -> jax.Array:
    """L = −(1 − ε) log σ(βh) − ε log σ(−βh), h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x).

    DPO with ε = 0 (From r to Q*, arXiv 2404.12358, eq. 9: the same loss written over tokens); cDPO with ε, the
    probability that a label is flipped. The gradient in h is −β(σ(−βh) − ε).

    The four log-probabilities: [B], in nats, *sums* over the response's tokens and not means:
    `masked_sum(token_logps(...), mask, axis=-1)`. β multiplies h once, here: pass no β-scaled rewards.
    beta: above 0, 0.1 in both papers; label_smoothing: ε, 0 to 0.5.
    Returns float32 [B]; log 2 = 0.693 at the start, where π = π_ref.
    """
    chosen, rejected, ref_chosen, ref_rejected = float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    beta = number("beta", beta, 0, open_low=True)
    smoothing = number("label_smoothing", label_smoothing, 0, 0.5)
    # Each response against its own reference first: these differences are small where the sums are in the hundreds.
    logits = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return (1 - smoothing) * jax.nn.softplus(-logits) + smoothing * jax.nn.softplus(logits)
