"""The formulas: arrays and keyword numbers in, unreduced float32 arrays out; only jax and numpy are loaded.

    preference      losses over pairs and rankings           token_rewards   what PPO is paid per token, as named terms
    advantages      GAE, returns, baselines of a group       ppo             clipped losses, KL estimators, controllers
    logprobs        log-probabilities, entropy, exact KL     q_star          a language model as an optimal Q-function
    selection       best of n, rejection, whose turn it is   masking         sums, means, whitening under a mask
    linear          log-probabilities, entropy, KL from hidden states, without logits

Shapes: B stands for any leading dimensions, also none (so `vmap` and batches both work), T for tokens. Alignment as
in `rto_jax.types`: index t of every [B, T] array speaks of the same token. Masks are boolean, True = an action.
Where a function takes a mask, a masked position is no transition: it gets 0, and what stands there (NaN too) changes
neither the values nor the gradients of the rest. Log-probabilities, KL and token rewards are in nats.
A wrong shape, a mask that is not boolean or a number out of its range raises ValueError, which names the argument,
when the function is traced (numbers that are themselves traced are not checked).
"""

from rto_jax.losses.advantages import (
    gae,
    gae_associative,
    grpo_advantages,
    lambda_returns,
    monte_carlo_returns,
    reinforce_pp_advantages,
    remax_advantages,
    rloo_advantages,
)
from rto_jax.losses.linear import LinearStatistics, linear_statistics, linear_token_logps
from rto_jax.losses.logprobs import entropy, sequence_kl, token_kl, token_logps
from rto_jax.losses.masking import masked_mean, masked_sum, masked_var, over_devices, sequence_mean, token_mean, whiten
from rto_jax.losses.ppo import (
    RunningMoments,
    adaptive_kl,
    fixed_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    normalise_rewards,
    ppo_policy_loss,
    ppo_value_loss,
    running_moments,
    update_moments,
)
from rto_jax.losses.preference import (
    bradley_terry_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    kto_pair_loss,
    orpo_loss,
    plackett_luce_loss,
    preference_metrics,
    r_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    tdpo_loss,
)
from rto_jax.losses.q_star import (
    expected_implicit_rewards,
    optimal_advantages,
    proxy_logits,
    q_values,
    rewards_of_q,
    soft_values,
)
from rto_jax.losses.selection import (
    best_of_n,
    best_of_n_kl_bound,
    rejection_sample,
    response_mask,
    reward_labels,
    top_answers,
)
from rto_jax.losses.token_rewards import (
    ComposedReward,
    RewardTerm,
    compose_rewards,
    implicit_token_rewards,
    place_rewards,
    prefix_sums,
    rto_token_rewards,
    segment_ends,
    shape_rewards,
)

__all__ = [
    "ComposedReward",
    "LinearStatistics",
    "RewardTerm",
    "RunningMoments",
    "adaptive_kl",
    "best_of_n",
    "best_of_n_kl_bound",
    "bradley_terry_loss",
    "compose_rewards",
    "cpo_loss",
    "dpo_loss",
    "entropy",
    "expected_implicit_rewards",
    "fixed_kl",
    "gae",
    "gae_associative",
    "grpo_advantages",
    "hinge_loss",
    "implicit_token_rewards",
    "ipo_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kto_kl",
    "kto_loss",
    "kto_pair_loss",
    "lambda_returns",
    "linear_statistics",
    "linear_token_logps",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "monte_carlo_returns",
    "normalise_rewards",
    "optimal_advantages",
    "orpo_loss",
    "over_devices",
    "place_rewards",
    "plackett_luce_loss",
    "ppo_policy_loss",
    "ppo_value_loss",
    "preference_metrics",
    "prefix_sums",
    "proxy_logits",
    "q_values",
    "r_dpo_loss",
    "reinforce_pp_advantages",
    "rejection_sample",
    "remax_advantages",
    "response_mask",
    "reward_labels",
    "rewards_of_q",
    "rloo_advantages",
    "robust_dpo_loss",
    "rto_token_rewards",
    "running_moments",
    "segment_ends",
    "sequence_kl",
    "sequence_mean",
    "shape_rewards",
    "simpo_loss",
    "soft_values",
    "tdpo_loss",
    "token_kl",
    "token_logps",
    "token_mean",
    "top_answers",
    "update_moments",
    "whiten",
]
