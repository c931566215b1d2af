"""Advantages and returns from token rewards and a critic."""

import jax
import jax.numpy as jnp

from rto_jax.losses._checks import Scalar, boolean, float32, number


def gae(
    rewards: jax.Array, values: jax.Array, mask: jax.Array, *, gamma: Scalar = 1.0, lam: Scalar = 0.95
) -> tuple[jax.Array, jax.Array]:
    """A_t = δ_t + γλ A_{t'},  δ_t = r_t + γ V_{t'} − V_t,  R_t = A_t + V_t, where t' is the next position in the mask.

    Generalised advantage estimation (arXiv 1506.02438, eq. 16), as PPO and RTO use it with γ = 1, λ = 0.95. After the
    last token, V = A = 0: the response has ended. A masked position is no transition: value and advantage pass over
    it, neither discounted nor decayed, so the turns of a user in the middle and padding on either side change nothing.

    rewards: [B, T], rewards[t] is earned by token t. values: [B, T], values[t] is of the state *before* token t.
    mask: bool [B, T]. gamma, lam: 0 to 1.
    Returns (advantages, returns), float32 [B, T] each, 0 where masked; not whitened. Gradients flow: treat both as
    data (compute them outside of the gradient, or stop it).
    Differs from OpenRLHF, the base of RTO's code: that multiplies by the mask, so a hole is a state worth 0.
    """
    rewards, values = float32(rewards=rewards, values=values)
    mask = boolean(mask, rewards=rewards)
    if mask.ndim == 0:
        raise ValueError("rewards has shape (), want [..., T]")
    gamma, lam = number("gamma", gamma, 0, 1), number("lam", lam, 0, 1)
    rewards, values = (jnp.where(mask, x, 0) for x in (rewards, values))

    # One carry: `ahead` = γ V_{t'} + γλ A_{t'}, so that A_t = r_t − V_t + ahead; a masked position hands it on.
    def step(ahead, now):
        own, real = now
        return jnp.where(real, own + gamma * lam * ahead, ahead), ahead

    own = gamma * values + gamma * lam * (rewards - values)
    time_major = jnp.moveaxis(own, -1, 0), jnp.moveaxis(mask, -1, 0)
    # A zero that varies over the same mesh axes as the inputs, as shard_map demands of a carry.
    end = jnp.zeros_like(jnp.sum(own, axis=-1))
    _, ahead = jax.lax.scan(step, end, time_major, reverse=True)
    advantages = jnp.where(mask, rewards - values + jnp.moveaxis(ahead, 0, -1), 0)
    return advantages, advantages + values
