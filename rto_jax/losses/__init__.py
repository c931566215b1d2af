"""The formulas: arrays and keyword numbers in, unreduced float32 arrays out; only jax and numpy are loaded.

Shapes: B stands for any leading dimensions, also none (so `vmap` and batches both work), T for tokens. Alignment as
in `rto_jax.types`: index t of every [B, T] array speaks of the same token. Masks are boolean, True = an action.
Where a function takes a mask, a masked position is no transition: it gets 0, and what stands there (NaN too) changes
neither the values nor the gradients of the rest. Log-probabilities, KL and token rewards are in nats.
A wrong shape, a mask that is not boolean or a number out of its range raises ValueError, which names the argument,
when the function is traced (numbers that are themselves traced are not checked).
"""

from rto_jax.losses.advantages import gae
from rto_jax.losses.logprobs import token_logps
from rto_jax.losses.masking import masked_mean, masked_sum, masked_var, whiten
from rto_jax.losses.ppo import ppo_policy_loss, ppo_value_loss
from rto_jax.losses.preference import bradley_terry_loss, dpo_loss
from rto_jax.losses.token_rewards import implicit_token_rewards, rto_token_rewards

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "gae",
    "implicit_token_rewards",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "ppo_policy_loss",
    "ppo_value_loss",
    "rto_token_rewards",
    "token_logps",
    "whiten",
]
