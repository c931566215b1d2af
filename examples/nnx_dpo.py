"""DPO in a Flax NNX training loop: a tiny causal model learns to count upwards from pairs. `python examples/nnx_dpo.py`"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rto_jax.losses import dpo_loss, masked_sum, preference_metrics, token_logps

VOCABULARY, PAIRS, PROMPT, LENGTH, BETA = 12, 64, 2, 8, 0.1


class Model(nnx.Module):
    """Logits from the last two tokens and the mean of all before: enough to count."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, 32, rngs=rngs)
        self.hidden = nnx.Linear(3 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return self.head(nnx.relu(self.hidden(jnp.concatenate([x, before, mean], axis=-1))))


def answer_logps(model: Model, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """log π(y|x): [B]. The logits at one position are those of the next token."""
    return masked_sum(token_logps(model(tokens)[:, :-1], tokens[:, 1:]), mask[:, 1:], axis=-1)


def pairs(key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(tokens, mask) of the chosen and of the rejected answers: one counts on from the prompt, the other is random."""
    start, noise, lengths = jax.random.split(key, 3)
    counting = (jax.random.randint(start, (PAIRS, 1), 0, VOCABULARY) + jnp.arange(LENGTH)) % VOCABULARY
    rejected = counting.at[:, PROMPT:].set(jax.random.randint(noise, (PAIRS, LENGTH - PROMPT), 0, VOCABULARY))
    ends = jax.random.randint(lengths, (2, PAIRS, 1), PROMPT + 1, LENGTH + 1)  # the rest is padding
    position = jnp.arange(LENGTH)[None]
    masks = (position >= PROMPT) & (position < ends)
    return (counting, masks[0]), (rejected, masks[1])


@nnx.jit
def train_step(model: Model, optimizer: nnx.Optimizer, reference: Model, batch) -> tuple[jax.Array, jax.Array]:
    references = [answer_logps(reference, *answers) for answers in batch]

    def loss(model):
        policy = [answer_logps(model, *answers) for answers in batch]
        per_pair = dpo_loss(*policy, *references, beta=BETA)
        return per_pair.mean(), preference_metrics(*policy, *references, beta=BETA)["accuracy"].mean()

    (value, accuracy), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return value, accuracy


def main() -> None:
    model = Model(nnx.Rngs(0))
    reference = nnx.clone(model)
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for step in range(101):
        loss, accuracy = train_step(model, optimizer, reference, pairs(jax.random.key(step)))
        if step % 20 == 0:
            print(f"step {step:3d}  loss {loss:.3f}  accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
