"""One rollout: sample, score with every frozen model once, build the token reward, estimate advantages."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rto_jax import losses
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.scoring import response_logps
from rto_jax.types import Experience, Metrics, Params, Prompts, prompt_length


class RolloutParams(NamedTuple):
    """The models of an RL iteration. `dpo` is None for plain PPO."""

    policy: Params
    critic: Params
    reference: Params
    reward: Params
    dpo: Params | None


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
    dpo_clip: float | None = None, reward_clip: float | None = None,
):  # fmt: skip
    """The pure rollout: RolloutParams, Prompts, key, RewardScales -> Experience, metrics, RolloutDetail.

    Log-probabilities are those of the training forward pass at the sampling temperature, not the decoder's,
    so the first update starts at ratio 1. Advantages are whitened once over the whole buffer; returns are not.
    `reward_clip` bounds the reward model's score (the authors' code: 10).
    """
    temperature = sampling.temperature

    def rollout(params: RolloutParams, prompts: Prompts, key: jax.Array, scales: RewardScales):
        keys = jax.random.split(key, prompts.tokens.shape[0])
        seqs, sampled_logps = sample(
            policy, params.policy, prompts, keys, config=sampling, eos_id=eos_id, pad_id=pad_id
        )
        mask = seqs.mask

        def logps_of(weights):
            return response_logps(policy.logits, weights, seqs, temperature=temperature)

        logps, ref_logps = logps_of(params.policy), logps_of(params.reference)
        dpo_logps = ref_logps if params.dpo is None else logps_of(params.dpo)
        values = jnp.where(mask, critic.values(params.critic, seqs.tokens, seqs.valid, prompt_length(seqs)), 0.0)
        scores = reward.scores(params.reward, seqs.tokens, seqs.valid, mask)
        if reward_clip is not None:
            scores = jnp.clip(scores, -reward_clip, reward_clip)
        rewards = losses.rto_token_rewards(
            dpo_logps, ref_logps, logps, scores, mask,
            beta1=scales.beta1, beta2=scales.beta2, beta3=scales.beta3, dpo_clip=dpo_clip,
        )  # fmt: skip
        advantages, returns = losses.gae(rewards, values, mask, gamma=scales.gamma, lam=scales.lam)
        experience = Experience(seqs, logps, values, losses.whiten(advantages, mask), returns)

        def per_sequence(x):
            return jnp.mean(losses.masked_sum(x, mask, axis=-1))

        detail = RolloutDetail(rewards, scores, losses.masked_sum(logps - ref_logps, mask, axis=-1))

        metrics: Metrics = {
            "score": jnp.mean(scores),
            "kl": jnp.mean(detail.kl),
            "implicit_reward": per_sequence(scales.beta1 * (dpo_logps - ref_logps)),
            "total_reward": per_sequence(rewards),
            "length": jnp.mean(jnp.sum(mask, axis=-1, dtype=jnp.float32)),
            "ended": jnp.mean(jnp.any((seqs.tokens[:, -mask.shape[1] :] == eos_id) & mask, axis=-1), dtype=jnp.float32),
            "entropy": -losses.masked_mean(logps, mask),
            "explained_variance": 1
            - losses.masked_var(returns - values, mask) / jnp.maximum(losses.masked_var(returns, mask), 1e-8),
            "sampler_gap": losses.masked_mean(jnp.abs(sampled_logps - logps), mask),
        }
        return experience, metrics, detail

    return rollout
