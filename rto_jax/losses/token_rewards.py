"""Token rewards for policy optimisation: what a DPO model implies, RTO's mixture, and any other sum of named terms."""

import numbers
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number, per_row, tokens_of
from rto_jax.losses.masking import last_token, next_token

PLACEMENTS = ("token", "segment", "last", "shaping")


class RewardTerm(NamedTuple):
    """One part of a token reward: clip(scale · values, ±clip), moved to where `placement` says. For `compose_rewards`."""

    values: jax.Array
    """[B, T], or [B] for what the whole response earns, at its last token"""
    scale: Scalar = 1.0
    """of any sign; 0 switches the term off, whatever stands in `values`"""
    clip: Scalar | None = None
    """bound on the size of each scaled value, above 0; None: no bound"""
    placement: str = "token"
    """as in `place_rewards`: token, segment, last or shaping"""


class ComposedReward(NamedTuple):
    """A token reward and what it is made of, float32."""

    rewards: jax.Array
    """[B, T]: the sum of the parts, in their order (by name)"""
    parts: dict[str, jax.Array]
    """[B, T] each: the terms, scaled, clipped and placed"""
    totals: dict[str, jax.Array]
    """[B] each: what the response earns by the term, the number to log"""


def implicit_token_rewards(
    policy_logps: jax.Array, ref_logps: jax.Array, mask: jax.Array, *, beta: Scalar
) -> jax.Array:
    """r_t = β log π(a_t|s_t)/π_ref(a_t|s_t): the reward of which π is the optimal policy, up to shaping.

    From r to Q* (arXiv 2404.12358) eq. 10: it equals r(s_t, a_t) + V*(s_{t+1}) − V*(s_t), an optimal advantage.
    Its sum over the response is DPO's implicit reward, the r of `bradley_terry_loss` that makes it `dpo_loss`.

    policy_logps, ref_logps: [B, T], of the same tokens, in nats. mask: bool [B, T].
    beta: at least 0, that of the DPO training, to speak of its reward.
    Returns float32 [B, T], 0 where masked. Gradients flow to both log-probabilities.
    """
    policy, ref = float32(policy_logps=policy_logps, ref_logps=ref_logps)
    return _scaled(policy - ref, number("beta", beta, 0), boolean(mask, policy_logps=policy))


def rto_token_rewards(
    dpo_logps: jax.Array,
    ref_logps: jax.Array,
    policy_logps: jax.Array,
    terminal_rewards: jax.Array,
    mask: jax.Array,
    *,
    beta1: Scalar,
    beta2: Scalar,
    beta3: Scalar = 1.0,
    dpo_clip: Scalar | None = None,
    dpo_ref_logps: jax.Array | None = None,
    placement: str = "token",
    ends: jax.Array | None = None,
    official_parity: bool = False,
) -> jax.Array:
    """r_t = β₁ log π_dpo(a_t|s_t)/π_ref(a_t|s_t) − β₂ log π(a_t|s_t)/π_ref(a_t|s_t) + 1[t last] β₃ r_MLE(x, y).

    RTO (arXiv 2404.18922) eq. 4.7. The last token is the last one that the mask keeps, wherever padding and other
    people's turns are; a row without any earns 0. A weight of 0 switches its term off, whatever stands in its array
    (so its own derivative there is 0 too): beta1=0 is PPO's reward, eq. 2.3, exactly. dpo_clip=c clips the *scaled*
    dense term to ±c; the authors' script does so with c = 0.05 at β₁ = 0.05 (±1 nat), the paper does not.

    dpo_logps, ref_logps, policy_logps: [B, T], in nats; policy_logps are those of the policy that sampled the tokens.
    terminal_rewards: [B], the reward model's score. mask: bool [B, T]. beta1, beta2, beta3: at least 0.
    dpo_ref_logps: [B, T], where the DPO model was trained from another model than the policy's reference.
    placement: of the dense term, as in `place_rewards`: "token" is RTO, "segment" Semi-RTO (with `ends` from
    `segment_ends`), "last" DDPO, "shaping" RS-PPO, where the total of the terms without KL is β₃ r_MLE, clipped or not.

    Returns float32 [B, T], 0 where masked. Differentiable in every array, but they are rewards: compute them once
    per rollout, outside of the policy's gradient. `compose_rewards` gives the terms one by one, and takes others.
    official_parity=True computes what the authors' code computes: β₁ ≤ 0 runs as 1, β₂ ≤ 0 as 0, dpo_clip ≤ 0 as
    None, r_MLE is clamped to ±10, and dpo_ref_logps is not looked at; β₃ is not theirs and must be 1.
    """
    dpo, ref, policy = float32(dpo_logps=dpo_logps, ref_logps=ref_logps, policy_logps=policy_logps)
    mask = boolean(mask, dpo_logps=dpo)
    (score,) = per_row(mask, terminal_rewards=terminal_rewards)
    dpo_ref = ref if dpo_ref_logps is None else float32(dpo_logps=dpo, dpo_ref_logps=dpo_ref_logps)[1]
    score_clip = None
    if official_parity:
        if not isinstance(beta3, numbers.Real) or beta3 != 1:
            raise ValueError(f"beta3 must be 1 with official_parity, but it is {beta3}")
        beta1 = number("beta1", beta1, -jnp.inf)
        beta1 = jnp.where((beta1 != 1) & (beta1 > 0), beta1, 1)
        beta2 = jnp.maximum(number("beta2", beta2, -jnp.inf), 0)
        if dpo_clip is not None:
            dpo_clip = number("dpo_clip", dpo_clip, -jnp.inf)
            dpo_clip = jnp.where(dpo_clip > 0, dpo_clip, jnp.inf)
        dpo_ref, score_clip = ref, 10.0
    terms = {
        "implicit": RewardTerm(dpo - dpo_ref, number("beta1", beta1, 0), _positive("dpo_clip", dpo_clip), placement),
        "kl": RewardTerm(ref - policy, number("beta2", beta2, 0)),
        "score": RewardTerm(score, number("beta3", beta3, 0), score_clip),
    }
    return compose_rewards(terms, mask, ends=ends).rewards


def compose_rewards(
    terms: Mapping[str, RewardTerm], mask: jax.Array, *, ends: jax.Array | None = None
) -> ComposedReward:
    """r_t = Σ_k place_k(clip(scale_k · values_k, ±clip_k))_t, with every term kept beside the sum.

    The terms of RTO (arXiv 2404.18922) eq. 4.7, for example, and a charge for length, which PPO gets in one array and
    people log apart:

        terms = {
            "implicit": RewardTerm(dpo_logps - ref_logps, scale=0.05, clip=0.05),
            "kl": RewardTerm(ref_logps - policy_logps, scale=0.01),
            "score": RewardTerm(scores),
            "length": RewardTerm(jnp.ones(mask.shape), scale=-0.001),
        }
        compose_rewards(terms, mask)

    terms: by name; their values are [B, T], or [B] for what a whole response earns. mask: bool [B, T].
    ends: bool [B, T], for terms placed by "segment": `segment_ends(tokens, mask, delimiters=…)`.
    Returns a `ComposedReward` (rewards, parts, totals): the parts add up to the rewards exactly.
    Masked positions get 0; what stands there, and in the row of a response without tokens, changes nothing.
    """
    if not terms:
        raise ValueError("terms is empty")
    mask = jnp.asarray(mask)
    boolean(mask, mask=mask)
    if 0 in mask.shape[:-1] or mask.ndim == 0:
        raise ValueError(f"mask has shape {mask.shape}, want [B, T] with a row at least")
    parts = {}
    for name, (values, scale, clip, placement) in terms.items():
        scale, clip = number(f"scale of {name}", scale, -jnp.inf), _positive(f"clip of {name}", clip)
        whole = jnp.ndim(values) == mask.ndim - 1
        if whole:
            (values,), where = per_row(mask, **{name: values}), last_token(mask)
            values = jnp.broadcast_to(values[..., None], mask.shape)
        else:
            (values,), where = float32(**{name: values}), boolean(mask, **{name: values})
        part = _scaled(values, scale, where)
        if clip is not None:
            part = jnp.clip(part, -clip, clip)
        parts[name] = place_rewards(part, mask, ends, placement=placement)
    # Sorted by name, as jit returns any dict, and added in that order: without the barrier XLA may take another.
    parts = jax.lax.optimization_barrier(parts)
    return ComposedReward(sum(parts.values()), parts, {name: jnp.sum(x, axis=-1) for name, x in parts.items()})


def place_rewards(rewards: jax.Array, mask: jax.Array, ends: jax.Array | None = None, *, placement: str) -> jax.Array:
    """Moves token rewards within their response: the ablations of RTO (arXiv 2404.18922), Figure 3.

    "token": where they are (RTO). "segment": the sum of each segment on its last token (Semi-RTO, whose segments are
    sentences). "last": the sum of the response on its last token (DDPO). "shaping": where they are, less their sum on
    the last token (RS-PPO): potential-based shaping, with Φ the prefix sum, which adds nothing to the total.

    rewards: [B, T]. mask: bool [B, T]. ends: bool [B, T], the last tokens of the segments, from `segment_ends`; needed
    by "segment" only. A response's last token ends its last segment whatever `ends` says there.
    Returns float32 [B, T], 0 where masked; every placement but "shaping", whose total is 0, keeps the row's total.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, but it is {placement!r}")
    mask, rewards = tokens_of(mask, rewards=rewards)
    if placement == "token":
        return rewards
    last = last_token(mask)
    if placement == "segment":
        if ends is None:
            raise ValueError('ends must be given for placement="segment"')
        ends = (boolean(ends, "ends", rewards=rewards) & mask) | last
        return jnp.where(ends, _sums_since(rewards, ends), 0)
    total = jnp.where(last, jnp.sum(rewards, axis=-1, keepdims=True), 0)
    return total if placement == "last" else rewards - total


def segment_ends(tokens: jax.Array, mask: jax.Array, *, delimiters: Sequence[int]) -> jax.Array:
    """True at every response token that is a delimiter (a full stop's id, …), and at the response's last token.

    tokens: int [B, T]. mask: bool [B, T]. delimiters: token ids, static. Returns bool [B, T], False where masked.
    """
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers, but their dtype is {tokens.dtype}")
    mask = boolean(mask, tokens=tokens)
    found = [tokens == int(delimiter) for delimiter in delimiters]
    return mask & (sum(found, jnp.zeros(mask.shape, bool)) | last_token(mask))


def shape_rewards(rewards: jax.Array, potentials: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0) -> jax.Array:
    """r'_t = r_t + γ Φ(s_{t'}) − Φ(s_t), t' the next token, Φ = 0 after the last: the optimal policy stays the same.

    Potential-based shaping (Ng et al. 1999), Definition 1 of From r to Q* (arXiv 2404.12358): the class of rewards
    that preferences cannot tell apart. With γ = 1 a row's total changes by −Φ(s_0), a constant of the prompt.

    rewards: [B, T]. potentials: [B, T], potentials[t] is Φ of the state *before* token t, as `values` are. mask: bool
    [B, T]. gamma: 0 to 1. Returns float32 [B, T], 0 where masked.
    """
    mask, rewards, potentials = tokens_of(mask, rewards=rewards, potentials=potentials)
    ahead = next_token(potentials, mask)
    return jnp.where(mask, rewards + number("gamma", gamma, 0, 1) * ahead - potentials, 0)


def prefix_sums(x: jax.Array, mask: jax.Array) -> jax.Array:
    """S_t = Σ_{i≤t} x_i over the mask: the implicit reward of every prefix, for x from `implicit_token_rewards`.

    x: [B, T]. mask: bool [B, T]. Returns float32 [B, T], 0 where masked.
    """
    mask, x = tokens_of(mask, x=x)
    return jnp.where(mask, jnp.cumsum(x, axis=-1), 0)


def _scaled(values: jax.Array, scale: Scalar, mask: jax.Array) -> jax.Array:
    """scale · values where masked in and the scale is not 0; elsewhere exactly 0, gradients included."""
    return scale * jnp.where(mask & (scale != 0), values, 0)


def _positive(name: str, clip: Scalar | None) -> Scalar | None:
    return None if clip is None else number(name, clip, 0, open_low=True)


def _sums_since(x: jax.Array, ends: jax.Array) -> jax.Array:
    """Running sums that start anew behind every end. No difference of long sums, so a segment keeps its digits."""
    starts = jnp.concatenate([jnp.ones_like(ends[..., :1]), ends[..., :-1]], axis=-1)

    def join(left, right):
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(join, (starts, x), axis=x.ndim - 1)[1]
