"""RTO in a Flax Linen loop: sample, reward every token, GAE, PPO with a value head. `python examples/linen_rto.py`"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from rto_jax.losses import gae, masked_mean, ppo_policy_loss, ppo_value_loss, rto_token_rewards, token_logps, whiten

VOCABULARY, ROWS, LENGTH, END = 12, 128, 10, 0
TASTE = jnp.where(jnp.arange(VOCABULARY) % 2, 0.0, 1.0).at[END].set(0.0)  # for even tokens


class Policy(nn.Module):
    """Logits of the next token and the value of the state, from the last token and the mean of all before."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = nn.Embed(VOCABULARY, 32)(tokens)
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        x = nn.relu(nn.Dense(64)(jnp.concatenate([x, mean], axis=-1)))
        return nn.Dense(VOCABULARY)(x), nn.Dense(1)(x)[..., 0]


policy = Policy()
optimizer = optax.adam(3e-3)


def rollout(params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens with one prompt token in front [ROWS, 1 + LENGTH], mask of the answer up to its end [ROWS, LENGTH])."""
    prompt, key = jax.random.split(key)
    tokens = jnp.zeros((ROWS, 1 + LENGTH), jnp.int32).at[:, 0].set(jax.random.randint(prompt, (ROWS,), 1, VOCABULARY))

    def add(t, tokens):
        logits, _ = policy.apply(params, tokens)
        return tokens.at[:, t + 1].set(jax.random.categorical(jax.random.fold_in(key, t), logits[:, t]))

    tokens = jax.lax.fori_loop(0, LENGTH, add, tokens)
    ended = jnp.cumsum(tokens[:, 1:] == END, axis=1) - (tokens[:, 1:] == END)
    return tokens, ended == 0


def read(params, tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of each answer token, value of the state before it, and the logits that it was drawn from."""
    logits, values = (x[:, :-1] for x in policy.apply(params, tokens))
    return token_logps(logits, tokens[:, 1:]), values, logits


@jax.jit
def iteration(params, opt_state, reference, key):
    tokens, mask = rollout(params, key)
    old_logps, old_values, _ = read(params, tokens)
    ref_logps, _, ref_logits = read(reference, tokens)
    dpo_logps = token_logps(ref_logits + TASTE, tokens[:, 1:])  # stands for a DPO model that shares the taste
    scores = masked_mean(TASTE[tokens[:, 1:]], mask, axis=-1)  # stands for a reward model
    rewards = rto_token_rewards(dpo_logps, ref_logps, old_logps, scores, mask, beta1=0.05, beta2=0.01)
    advantages, returns = gae(rewards, old_values, mask)
    advantages = whiten(advantages, mask)

    def loss(params):
        logps, values, _ = read(params, tokens)
        per_token = ppo_policy_loss(logps, old_logps, advantages) + 0.5 * ppo_value_loss(values, old_values, returns)
        return masked_mean(per_token, mask)

    for _ in range(2):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, updates)
    return params, opt_state, scores.mean()


def main() -> None:
    params = policy.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    opt_state, reference = optimizer.init(params), params
    for step in range(41):
        params, opt_state, score = iteration(params, opt_state, reference, jax.random.key(step))
        if step % 10 == 0:
            print(f"iteration {step:2d}  score {score:.3f}")


if __name__ == "__main__":
    main()
