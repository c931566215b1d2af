"""Bare optax on pytrees: a Bradley-Terry reward model, then GRPO against it. `python examples/optax_grpo.py`"""

import jax
import jax.numpy as jnp
import optax

from rto_jax.losses import bradley_terry_loss, grpo_advantages, kl_k2, masked_mean, ppo_policy_loss, token_logps

VOCABULARY, PROMPTS, ANSWERS, LENGTH = 8, 16, 8, 6
TRUTH = jnp.linspace(-1.0, 1.0, VOCABULARY)  # what a token is worth to whoever labels the pairs
MASK = jnp.ones((PROMPTS, ANSWERS, LENGTH), bool)
optimizer = optax.adam(0.05)


def reward(weights: dict, answers: jax.Array) -> jax.Array:
    """r(y) = Σ_t w[y_t]: [...] for answers [..., LENGTH]."""
    return weights["token"][answers].sum(-1)


@jax.jit
def reward_step(weights, opt_state, key):
    draw, label = jax.random.split(key)
    first, second = jax.random.randint(draw, (2, 256, LENGTH), 0, VOCABULARY)
    better = TRUTH[first].sum(-1) - TRUTH[second].sum(-1) > jax.random.logistic(label, (256,))
    chosen, rejected = jnp.where(better[:, None], first, second), jnp.where(better[:, None], second, first)

    def loss(weights):
        return bradley_terry_loss(reward(weights, chosen), reward(weights, rejected)).mean()

    value, gradients = jax.value_and_grad(loss)(weights)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(weights, updates), opt_state, value


@jax.jit
def policy_step(policy, opt_state, weights, key):
    first, *keys = jax.random.split(key, 1 + LENGTH)
    tokens = jax.random.randint(first, (PROMPTS, 1, 1), 0, VOCABULARY).repeat(ANSWERS, axis=1)  # one token of prompt
    for k in keys:
        following = jax.random.categorical(k, policy["bigram"][tokens[..., -1]])
        tokens = jnp.concatenate([tokens, following[..., None]], axis=-1)
    answers = tokens[..., 1:]

    def logps(policy):
        return token_logps(policy["bigram"][tokens[..., :-1]], answers)

    scores, old_logps = reward(weights, answers), logps(policy)
    advantages = jnp.broadcast_to(grpo_advantages(scores)[..., None], answers.shape)
    ref_logps = jnp.full(answers.shape, -jnp.log(VOCABULARY))  # the reference is uniform

    def loss(policy):
        now = logps(policy)
        return masked_mean(ppo_policy_loss(now, old_logps, advantages) + 0.05 * kl_k2(now, ref_logps), MASK)

    for _ in range(2):
        updates, opt_state = optimizer.update(jax.grad(loss)(policy), opt_state)
        policy = optax.apply_updates(policy, updates)
    return policy, opt_state, scores.mean()


def main() -> None:
    weights = {"token": jnp.zeros(VOCABULARY)}
    opt_state = optimizer.init(weights)
    for step in range(61):
        weights, opt_state, loss = reward_step(weights, opt_state, jax.random.key(step))
        if step % 20 == 0:
            print(f"reward model  step {step:2d}  loss {loss:.3f}")
    policy = {"bigram": jnp.zeros((VOCABULARY, VOCABULARY))}
    opt_state = optimizer.init(policy)
    for step in range(41):
        policy, opt_state, score = policy_step(policy, opt_state, weights, jax.random.key(1000 + step))
        if step % 10 == 0:
            print(f"GRPO  step {step:2d}  reward {score:.3f}")


if __name__ == "__main__":
    main()
