"""One rollout: sample, score with every frozen model once, build the token reward, estimate advantages."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rto_jax import losses
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.scoring import response_logps
from rto_jax.types import Experience, Metrics, Params, Prompts, prompt_length


class RolloutParams(NamedTuple):
    """The models of an RL iteration. `dpo` is None for plain PPO, `critic` where the advantages need none.

    With a base, policy, reference, reward model and DPO model are what they have instead of its weights or beside them
    (the reference nothing: {}), and the critic what it has besides the reward model's.
    """

    policy: Params
    critic: Params | None
    reference: Params
    reward: Params
    dpo: Params | None
    base: Params | None = None


class RewardScales(NamedTuple):
    """RTO eq. 4.7 and GAE, as traced numbers: one compiled program serves every arm."""

    beta1: jax.Array | float
    beta2: jax.Array | float
    beta3: jax.Array | float
    gamma: jax.Array | float
    lam: jax.Array | float


class RolloutDetail(NamedTuple):
    """What a rollout's means hide."""

    rewards: jax.Array  # [B, T], the token rewards that the advantages came from
    scores: jax.Array  # [B], the reward model's, clipped, before beta3
    kl: jax.Array  # [B], nats: sum over the response of log(pi/pi_ref)


def make_rollout(
    policy, critic, reward, *, sampling: SamplingConfig, eos_id: int, pad_id: int,
    dpo_clip: float | None = None, reward_clip: float | None = None, placement: str = "token",
    delimiters: Sequence[int] = (), advantage: str = "gae", group_size: int = 1,
):  # fmt: skip
    """The pure rollout: RolloutParams, Prompts, key, RewardScales -> Experience, metrics, RolloutDetail.

    Log-probabilities are those of the training forward pass at the sampling temperature, not the decoder's,
    so the first update starts at ratio 1. Advantages are whitened once over the whole buffer; returns are not.
    `reward_clip` bounds the reward model's score (the authors' code: 10). `placement` is the dense term's, as in
    `losses.place_rewards`; `delimiters` are the ids that end a segment.

    `advantage` is "gae", or an estimator that has no critic (then `critic` is None, and values and returns are 0):
    "reinforce_pp", whitened returns to go of the token rewards; "rloo" and "grpo", where each `group_size` neighbouring
    rows answer one prompt. These two compare beta3·score - beta2·KL of whole answers, and take the dense term token by
    token; neither is whitened.
    """
    temperature = sampling.temperature

    def rollout(params: RolloutParams, prompts: Prompts, key: jax.Array, scales: RewardScales):
        if (base := params.base) is not None:
            policy_weights, reference, reward_weights = (base | x for x in (params.policy, params.reference, params.reward))
            dpo = None if params.dpo is None else base | params.dpo
            critic_weights = None if params.critic is None else reward_weights | params.critic
            params = RolloutParams(policy_weights, critic_weights, reference, reward_weights, dpo)
        keys = jax.random.split(key, prompts.tokens.shape[0])
        seqs, sampled_logps = sample(
            policy, params.policy, prompts, keys, config=sampling, eos_id=eos_id, pad_id=pad_id
        )
        mask = seqs.mask

        def logps_of(weights):
            return response_logps(policy.logps, weights, seqs, temperature=temperature)

        logps, ref_logps = logps_of(params.policy), logps_of(params.reference)
        dpo_logps = ref_logps if params.dpo is None else logps_of(params.dpo)
        if critic is None:
            values = jnp.zeros_like(logps)
        else:
            values = jnp.where(mask, critic.values(params.critic, seqs.tokens, seqs.valid, prompt_length(seqs)), 0.0)
        scores = reward.scores(params.reward, seqs.tokens, seqs.valid, mask)
        if reward_clip is not None:
            scores = jnp.clip(scores, -reward_clip, reward_clip)
        ends = None
        if placement == "segment":
            ends = losses.segment_ends(seqs.tokens[:, -mask.shape[1] :], mask, delimiters=delimiters)

        def token_rewards(beta2, beta3):
            return losses.rto_token_rewards(
                dpo_logps, ref_logps, logps, scores, mask,
                beta1=scales.beta1, beta2=beta2, beta3=beta3, dpo_clip=dpo_clip, placement=placement, ends=ends,
            )  # fmt: skip

        rewards = token_rewards(scales.beta2, scales.beta3)
        detail = RolloutDetail(rewards, scores, losses.masked_sum(logps - ref_logps, mask, axis=-1))
        returns = values
        if advantage == "gae":
            advantages, returns = losses.gae_associative(rewards, values, mask, gamma=scales.gamma, lam=scales.lam)
            advantages = losses.whiten(advantages, mask)
        elif advantage == "reinforce_pp":
            advantages = losses.reinforce_pp_advantages(rewards, mask, gamma=scales.gamma)
        else:
            estimate = {"rloo": losses.rloo_advantages, "grpo": losses.grpo_advantages}[advantage]
            whole = scales.beta3 * scores - scales.beta2 * detail.kl
            groups = (x.reshape(-1, group_size, *x.shape[1:]) for x in (whole, token_rewards(0.0, 0.0), mask))
            advantages = estimate(*groups, gamma=scales.gamma).reshape(mask.shape)
        experience = Experience(seqs, logps, values, advantages, returns)

        def per_sequence(x):
            return jnp.mean(losses.masked_sum(x, mask, axis=-1))

        metrics: Metrics = {
            "score": jnp.mean(scores),
            "kl": jnp.mean(detail.kl),
            "implicit_reward": per_sequence(scales.beta1 * (dpo_logps - ref_logps)),
            "total_reward": per_sequence(rewards),
            "length": jnp.mean(jnp.sum(mask, axis=-1, dtype=jnp.float32)),
            "ended": jnp.mean(jnp.any((seqs.tokens[:, -mask.shape[1] :] == eos_id) & mask, axis=-1), dtype=jnp.float32),
            "entropy": -losses.masked_mean(logps, mask),
            "sampler_gap": losses.masked_mean(jnp.abs(sampled_logps - logps), mask),
        }
        if critic is not None:
            missed, spread = losses.masked_var(returns - values, mask), losses.masked_var(returns, mask)
            metrics["explained_variance"] = 1 - missed / jnp.maximum(spread, 1e-8)
        return experience, metrics, detail

    return rollout
