"""Losses over preference pairs: one number per pair.

Throughout, y_w is the chosen answer, y_l the rejected one, and

    h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x),

log-probabilities in nats, *summed* over the answer's tokens: `masked_sum(token_logps(logits, tokens), mask, axis=-1)`.
No function here takes a mask: a pair without tokens has sums of 0. Lengths count the tokens that were summed.
"""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number
from rto_jax.losses.masking import over_devices


def bradley_terry_loss(
    chosen_rewards: jax.Array, rejected_rewards: jax.Array, *, margin: Scalar | jax.Array = 0.0
) -> jax.Array:
    """L = −log σ(r(x, y_w) − r(x, y_l) − m): the negative log-likelihood of Bradley–Terry.

    RTO (arXiv 2404.18922) eq. 2.1 and 2.2 with m = 0; a margin m > 0 asks for a gap between the two (Llama 2, arXiv
    2307.09288).

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


def plackett_luce_loss(rewards: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """L = −Σ_{k<K} [r_k − log Σ_{j≥k} exp r_j], answers in order, the best first: the likelihood of a whole ranking.

    Plackett–Luce, the model of which RTO's eq. 2.1 and From r to Q*'s eq. 1 are the case K = 2 (and DPO's appendix
    A.3, arXiv 2305.18290, the case of implicit rewards: pass β·Σ log π/π_ref for `rewards`).

    rewards: [..., K], on any scale. mask: bool [..., K], answers that exist; None: all. A masked answer was not
    ranked: it is passed over. Returns float32 [...]; 0 for fewer than two answers.
    """
    (rewards,) = float32(rewards=rewards)
    if rewards.ndim == 0:
        raise ValueError("rewards has shape (), want [..., K]")
    mask = jnp.ones(rewards.shape, bool) if mask is None else boolean(mask, rewards=rewards)
    rewards = jnp.where(mask, rewards, jnp.finfo(jnp.float32).min / 2)  # not −∞, whose gradient would be NaN
    rest = jax.lax.cumlogsumexp(rewards, axis=rewards.ndim - 1, reverse=True)
    return jnp.sum(jnp.where(mask, rest - rewards, 0), axis=-1)


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

    DPO with ε = 0 (arXiv 2305.18290, eq. 7; From r to Q*, arXiv 2404.12358, eq. 9: the same loss written over tokens);
    cDPO (Mitchell 2023) with ε, the probability that a label is flipped. The gradient in h is −β(σ(−βh) − ε).

    The four log-probabilities: [B], in nats, *sums* over the response's tokens and not means:
    `masked_sum(token_logps(...), mask, axis=-1)`. β multiplies h once, here: pass no β-scaled rewards.
    beta: above 0, 0.1 in both papers; label_smoothing: ε, 0 to 0.5.
    Returns float32 [B]; log 2 = 0.693 at the start, where π = π_ref.
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = number("beta", beta, 0, open_low=True) * h
    smoothing = number("label_smoothing", label_smoothing, 0, 0.5)
    return (1 - smoothing) * jax.nn.softplus(-logits) + smoothing * jax.nn.softplus(logits)


def robust_dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar,
) -> jax.Array:
    """L = [−(1 − ε) log σ(βh) + ε log σ(−βh)] / (1 − 2ε): unbiased for DPO's loss when labels flip with probability ε.

    Robust DPO (arXiv 2403.00409). Averaged over noisy labels it is `dpo_loss` on clean ones, which cDPO is
    not; it may be negative, and is unbounded below where h is large.

    The four log-probabilities: [B], nats, sums over the response. beta: above 0. label_smoothing: ε, 0 to below 0.5.
    Returns float32 [B]; log 2 where π = π_ref.
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logits = number("beta", beta, 0, open_low=True) * h
    smoothing = number("label_smoothing", label_smoothing, 0, 0.5, open_high=True)
    clean, flipped = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def ipo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """L = (h − 1/(2β))²: drives the log-odds to a set gap and no further, so that certain labels don't overfit.

    IPO (arXiv 2310.12036, eq. 17, with τ = β).

    The four log-probabilities: [B], nats, sums over the response, as in the paper. TRL divides each by its answer's
    length first: pass means to get that. beta: above 0. Returns float32 [B]; 1/(4β²) where π = π_ref.
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jnp.square(h - 1 / (2 * number("beta", beta, 0, open_low=True)))


def hinge_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
) -> jax.Array:
    """L = max(0, 1 − βh): no gradient once the log-odds exceed the margin 1/β.

    SLiC's hinge on log-ratios, as in RSO (arXiv 2309.06657, eq. 10). With a reference of zeros it is SLiC-HF's own
    (arXiv 2305.10425): δ·L with β = 1/δ is max(0, δ − log π(y_w|x) + log π(y_l|x)), to which SLiC adds −λ log π of
    the SFT answer.

    The four log-probabilities: [B], nats, sums over the response. beta: above 0. Returns float32 [B]; 1 where π = π_ref.
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return jax.nn.relu(1 - number("beta", beta, 0, open_low=True) * h)


def r_dpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: Scalar,
    alpha: Scalar,
) -> jax.Array:
    """L = −log σ(βh + α(|y_w| − |y_l|)): DPO against a reward that already charges α per token.

    R-DPO (arXiv 2403.19159), from max E[r − α|y|] − β KL: a longer chosen answer is partly explained by its
    length, so it pulls less.

    The four log-probabilities: [B], nats, sums over the response. Lengths: [B], tokens. beta: above 0 (RTO's
    appendix D: 0.1). alpha: at least 0, reward per token (0.001); 0 is `dpo_loss`. Returns float32 [B].
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    _, chosen, rejected = float32(chosen_logps=h, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    beta, alpha = number("beta", beta, 0, open_low=True), number("alpha", alpha, 0)
    return jax.nn.softplus(-(beta * h + alpha * (chosen - rejected)))


def simpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    beta: Scalar,
    gamma: Scalar,
) -> jax.Array:
    """L = −log σ(β(log π(y_w|x)/|y_w| − log π(y_l|x)/|y_l|) − γ): no reference, mean log-probabilities, a margin γ.

    SimPO (arXiv 2405.14734, eq. 6). Its code takes the ratio γ/β instead: gamma = beta · gamma_beta_ratio. RTO's
    appendix D lists β = 2.5 and "γ = 0.5", taken there as the margin.

    chosen_logps, rejected_logps: [B], nats, *sums*; the division by the lengths is done here. Lengths: [B], tokens;
    an empty answer counts as mean 0. beta: above 0. gamma: at least 0, log-odds. Returns float32 [B].
    """
    chosen, rejected = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    beta, gamma = number("beta", beta, 0, open_low=True), number("gamma", gamma, 0)
    return jax.nn.softplus(gamma - beta * (chosen - rejected))


def tdpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    chosen_kl: jax.Array,
    rejected_kl: jax.Array,
    *,
    beta: Scalar,
    alpha: Scalar = 0.5,
    variant: int = 2,
) -> jax.Array:
    """TDPO1: L = −log σ(β(h − (D_l − D_w))).  TDPO2: L = −log σ(β(h − α(D_l − stop_gradient(D_w)))).

    Token-level DPO (arXiv 2404.11999). D(y) = Σ_t KL(π_ref(·|s_t) ‖ π(·|s_t)) over the whole
    vocabulary is `sequence_kl`. TDPO1 has no α, and gradients flow through both D; TDPO2 lets only the rejected
    answer's D be pushed.

    The four log-probabilities: [B], nats, sums over the response. chosen_kl, rejected_kl: D, [B], nats.
    beta: above 0. alpha: at least 0, TDPO2's (0.5 in its code; RTO's appendix D: 0.2). variant: 1 or 2.
    Returns float32 [B]; log 2 where π = π_ref. The reward that the authors log is β(log π/π_ref + D).
    """
    h = _log_odds(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    _, chosen_kl, rejected_kl = float32(chosen_logps=h, chosen_kl=chosen_kl, rejected_kl=rejected_kl)
    beta, alpha = number("beta", beta, 0, open_low=True), number("alpha", alpha, 0)
    if variant not in (1, 2):
        raise ValueError(f"variant must be 1 or 2, but it is {variant}")
    gap = rejected_kl - chosen_kl if variant == 1 else alpha * (rejected_kl - jax.lax.stop_gradient(chosen_kl))
    return jax.nn.softplus(-beta * (h - gap))


def kto_loss(
    logps: jax.Array,
    ref_logps: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: Scalar,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Scalar = 1.0,
) -> jax.Array:
    """L = λ_D (1 − σ(β(ℓ − z))) for a good answer, λ_U (1 − σ(β(z − ℓ))) for a bad one, ℓ = log π(y|x)/π_ref(y|x).

    KTO (arXiv 2402.01306, eq. 7), for answers that were judged one by one ("uneven"): no pairs. z, the reference
    point, is `kto_kl` of mismatched prompts and answers.

    logps, ref_logps: [B], nats, sums over the response. desirable: bool [B]. kl: z, a number or [B], nats; no gradient
    flows into it. beta: above 0 (0.1). Weights λ_D, λ_U: at least 0.
    Returns float32 [B], 0 to its weight; half of it where π = π_ref.
    """
    policy, ref = float32(logps=logps, ref_logps=ref_logps)
    desirable = boolean(desirable, "desirable", logps=policy)
    kl = jnp.asarray(kl).astype(jnp.float32)
    if kl.ndim:
        (_, kl) = float32(logps=policy, kl=kl)
    beta = number("beta", beta, 0, open_low=True)
    good, bad = number("desirable_weight", desirable_weight, 0), number("undesirable_weight", undesirable_weight, 0)
    gain = beta * (policy - ref - jax.lax.stop_gradient(kl))
    return jnp.where(desirable, good * jax.nn.sigmoid(-gain), bad * jax.nn.sigmoid(gain))


def kto_kl(logps: jax.Array, ref_logps: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """z = max(0, mean log π(y'|x)/π_ref(y'|x)), over answers y' to *other* prompts: KTO's reference point.

    KTO (arXiv 2402.01306); pair each prompt of the batch with another's answer. Constant: no gradient.

    logps, ref_logps: [B], nats, sums over the mismatched answers. axis_name: a mesh axis of shard_map (or several)
    over which the mean goes on. Returns float32 [], nats, at least 0.
    """
    policy, ref = float32(logps=logps, ref_logps=ref_logps)
    total, count = over_devices((jnp.sum(policy - ref), jnp.float32(policy.size)), axis_name)
    return jax.lax.stop_gradient(jax.nn.relu(total / count))


def kto_pair_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
    axis_name: str | None = None,
) -> jax.Array:
    """L = ½(1 − σ(β(ℓ_w − z_l))) + ½(1 − σ(β(z_w − ℓ_l))), z = max(0, batch mean of ℓ) of the other side.

    KTO (arXiv 2402.01306) on pairs ("even"), as in OpenRLHF, the base of RTO's code: each side's reference point is the other side's
    mean log-ratio, so no mismatched answers are needed. A pair has one loss, so the two halves are averaged.

    The four log-probabilities: [B], nats, sums over the response. beta: above 0. axis_name: a mesh axis of shard_map
    over which the means go on. Returns float32 [B]; ½ where π = π_ref.
    """
    chosen, rejected = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    ref, everyone = jnp.zeros_like(chosen), jnp.ones(chosen.shape, bool)
    kl_chosen, kl_rejected = (kto_kl(x, ref, axis_name=axis_name) for x in (chosen, rejected))
    good = kto_loss(chosen, ref, everyone, kl_rejected, beta=beta)
    return 0.5 * (good + kto_loss(rejected, ref, ~everyone, kl_chosen, beta=beta))


def orpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    *,
    lam: Scalar,
) -> jax.Array:
    """L = −m_w − λ log σ(logit(e^{m_w}) − logit(e^{m_l})), m = log π(y|x)/|y|: SFT and an odds ratio in one loss.

    ORPO (arXiv 2403.07691, eq. 4 and 7); no reference. logit(p) = log p/(1 − p) of the mean token probability.

    chosen_logps, rejected_logps: [B], nats, sums. Lengths: [B], tokens; an empty answer counts as mean 0.
    lam: λ, at least 0 (0.1 to 1; `beta` in TRL). Returns float32 [B].
    The mean log-probability is capped at −10⁻⁶: beyond it, odds of a certain answer would be infinite. TRL's SFT
    term is a mean over the tokens of the batch; here it is the pair's own.
    """
    chosen, rejected = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)

    def logit(m):
        m = jnp.minimum(m, -1e-6)
        return m - jnp.log(-jnp.expm1(m))

    return -chosen + number("lam", lam, 0) * jax.nn.softplus(logit(rejected) - logit(chosen))


def cpo_loss(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    chosen_lengths: jax.Array,
    *,
    beta: Scalar,
    label_smoothing: Scalar = 0.0,
    nll_weight: Scalar = 1.0,
) -> jax.Array:
    """L = −(1 − ε) log σ(βd) − ε log σ(−βd) − w·log π(y_w|x)/|y_w|, d = log π(y_w|x) − log π(y_l|x).

    CPO (arXiv 2401.08417, eq. 3 and 5): DPO with a uniform reference, and an SFT term against drift.

    chosen_logps, rejected_logps: [B], nats, sums. chosen_lengths: [B], tokens. beta: above 0. label_smoothing: ε, 0 to
    0.5. nll_weight: w, at least 0 (`cpo_alpha` in TRL), of the negative log-likelihood *per token*, as the authors'
    code has it; their equation 5 sums it (and TRL averages it over the batch's tokens). Returns float32 [B].
    """
    chosen, rejected, lengths = float32(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps, chosen_lengths=chosen_lengths
    )
    zero = jnp.zeros_like(chosen)
    preference = dpo_loss(chosen, rejected, zero, zero, beta=beta, label_smoothing=label_smoothing)
    return preference - number("nll_weight", nll_weight, 0) * _per_token(chosen, lengths)


def preference_metrics(
    chosen_logps: jax.Array,
    rejected_logps: jax.Array,
    ref_chosen_logps: jax.Array,
    ref_rejected_logps: jax.Array,
    *,
    beta: Scalar,
) -> dict[str, jax.Array]:
    """What people log of a preference batch: r = β log π(y|x)/π_ref(y|x) of both answers, margin and accuracy.

    From r to Q* (arXiv 2404.12358) eq. 10, summed over the answer. For SimPO and CPO pass zeros as the reference.

    The four log-probabilities: [B], nats, sums over the response. beta: above 0.
    Returns float32 [B] each: `chosen_reward`, `rejected_reward`, `margin` (their difference, in nats · β) and
    `accuracy` (1 where the margin is above 0, else 0: at π = π_ref it is 0, not ½).
    """
    beta = number("beta", beta, 0, open_low=True)
    ratios = _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = (beta * x for x in ratios)
    accuracy = (chosen > rejected).astype(jnp.float32)
    return {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected, "accuracy": accuracy}


def _log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps) -> tuple[jax.Array, jax.Array]:
    """log π/π_ref of both answers, float32 [B]: each against its own reference, where sums in the hundreds cancel."""
    chosen, rejected, ref_chosen, ref_rejected = float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return chosen - ref_chosen, rejected - ref_rejected


def _log_odds(*logps: jax.Array) -> jax.Array:
    """h, float32 [B]."""
    chosen, rejected = _log_ratios(*logps)
    return chosen - rejected


def _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths) -> tuple[jax.Array, jax.Array]:
    chosen, rejected, chosen_lengths, rejected_lengths = float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return _per_token(chosen, chosen_lengths), _per_token(rejected, rejected_lengths)


def _per_token(total: jax.Array, length: jax.Array) -> jax.Array:
    return total / jnp.maximum(length, 1)
