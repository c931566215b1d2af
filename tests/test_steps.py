"""The pure steps: micro-batches, meshes, and the facts that every RL run rests on."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rto_jax import losses, programs, scoring
from rto_jax import steps as S
from rto_jax.models import SIZES, language_model, scalar_model, with_head
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_params
from rto_jax.train_state import new_state
from rto_jax.types import Experience, Pairs, Prompts, Sequences

CONFIG = SIZES["gold"]
OPTIM = OptimConfig(learning_rate=1e-2, warmup=0.0)
P, T = 4, 6


def rows(seed: int, n: int = 16) -> Sequences:
    """Rows of unequal length on both sides, with tokens of the response below 20."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 20, (n, P + T)).astype(np.int32)
    left, right = rng.integers(0, P - 1, n), rng.integers(1, T + 1, n)
    index = np.arange(P + T)
    valid = (index >= left[:, None]) & (index < P + right[:, None])
    return Sequences(tokens, valid, valid[:, P:])


def pairs(seed: int) -> Pairs:
    chosen, rejected = rows(seed), rows(seed + 1)
    tokens = np.concatenate([chosen.tokens[:, :P], rejected.tokens[:, P:]], 1)
    valid = np.concatenate([chosen.valid[:, :P], rejected.valid[:, P:]], 1)
    return Pairs(chosen, Sequences(tokens, valid, rejected.mask))


# Whole programs: op by op there is more to compile.
gradients = jax.jit(S.value_and_grads, static_argnums=0, static_argnames="micro_batches")
pair_logps, response_logps = (jax.jit(f, static_argnums=0) for f in (scoring.pair_logps, scoring.response_logps))


@functools.cache
def init(head: str, seed: int):
    return jax.jit(programs.init_fn(CONFIG, head))(jax.random.key(seed))


@functools.cache  # the same objective object: `gradients` compiles it once for all tests
def objective_and_batch(kind: str):
    model = language_model(CONFIG)
    params = init("lm", 0)
    if kind == "sft":
        return S.sft_objective(model.logps), params, rows(0)
    if kind == "reward":
        scalar = scalar_model(CONFIG, head="last")
        return S.reward_objective(scalar.scores), init("last", 1), pairs(0)
    if kind == "dpo":
        reference = jax.tree.map(lambda x: x * 1.1, params)
        sums = pair_logps(model.logps, reference, pairs(0))
        return S.dpo_objective(model.logps, beta=0.3), params, S.PairsWithReference(pairs(0), *sums)
    rng = np.random.default_rng(3)
    numbers = [jnp.asarray(rng.normal(size=(16, T)), jnp.float32) for _ in range(4)]
    experience = Experience(rows(0), numbers[0] * 0.1 - 3, *numbers[1:])
    if kind == "policy":
        return S.policy_objective(model.logps, clip=0.2), params, experience
    scalar = scalar_model(CONFIG, head="last")
    return S.value_objective(scalar.values, clip=0.2), init("last", 1), experience


def slow(*kinds):
    return [pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.mark.parametrize("kind", [*slow("sft", "reward", "policy", "value"), "dpo"])
def test_micro_batches_are_one_batch(kind):
    """Rows hold different numbers of tokens, so a mean of means would differ."""
    objective, params, batch = objective_and_batch(kind)
    whole = gradients(objective, params, batch)
    parts = gradients(objective, params, batch, micro_batches=4)
    chex.assert_trees_all_close(parts, whole, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", [*slow("dpo", "value"), "sft", "reward", "policy"])
def test_padding_changes_nothing(kind):
    """Other ids under the padding: the same loss and the same gradients."""
    objective, params, batch = objective_and_batch(kind)

    def other(node):
        if isinstance(node, Sequences):
            return node._replace(tokens=jnp.where(node.valid, node.tokens, 7))
        return node

    changed = jax.tree.map(other, batch, is_leaf=lambda x: isinstance(x, Sequences))
    chex.assert_trees_all_close(
        gradients(objective, params, changed), gradients(objective, params, batch), atol=1e-6, rtol=1e-5
    )


def test_sft_loss_is_the_mean_over_real_tokens():
    objective, params, batch = objective_and_batch("sft")
    logits = np.asarray(language_model(CONFIG).logits(params, batch.tokens, batch.valid, P), np.float64)
    total = 0.0
    for b, t in zip(*np.nonzero(batch.mask), strict=True):
        total -= logits[b, t, batch.tokens[b, P + t]] - np.log(np.exp(logits[b, t]).sum())
    metrics, _ = gradients(objective, params, batch)
    np.testing.assert_allclose(metrics["loss"], total / batch.mask.sum(), rtol=1e-5)


def test_dpo_starts_at_log_two_with_no_reward():
    model = language_model(CONFIG)
    params = init("lm", 0)
    batch = S.PairsWithReference(pairs(0), *pair_logps(model.logps, params, pairs(0)))
    metrics, grads = gradients(S.dpo_objective(model.logps, beta=0.3), params, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)
    np.testing.assert_allclose([metrics["chosen_reward"], metrics["margin"]], 0, atol=1e-6)
    assert optax.tree.norm(grads) > 1e-3


MESHES = {"one device": None, "8x1x1": MeshConfig(8), "2x2x2": MeshConfig(2, 2, 2)}


def mesh_of(config):
    return make_mesh(MeshConfig(1), jax.devices()[:1]) if config is None else make_mesh(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_supervised_steps_are_the_same_on_every_mesh(kind):
    """Losses within 1e-5, parameters after two steps within 1e-4 (Adam divides by tiny second moments)."""
    head = "last" if kind == "reward" else "lm"
    options = (("beta", 0.3),) if kind == "dpo" else ()
    results = {}
    for name, config in MESHES.items():
        mesh = mesh_of(config)
        params = put_params(programs.init_fn(CONFIG, head)(jax.random.key(0)), mesh)
        state = programs.start(CONFIG, head, OPTIM, 10, mesh)(params)
        step = programs.supervised_step(kind, CONFIG, head, OPTIM, 10, 2, mesh, options)
        losses_seen = []
        for number in range(2):
            batch = put_batch(rows(number) if kind == "sft" else pairs(number), mesh)
            if kind == "dpo":
                batch = S.PairsWithReference(batch, *programs.pair_logps(CONFIG, mesh)(state.params, batch))
            state, metrics = step(state, batch)
            losses_seen.append(float(metrics["loss"]))
        assert step._cache_size() == 1
        params = jax.device_get(state.params)
        if kind == "reward":
            # A constant cancels in Bradley-Terry, so its gradient is rounding alone, which Adam scales up to a step.
            del params["head"]["bias"]
        results[name] = losses_seen, params
    for name in list(MESHES)[1:]:
        np.testing.assert_allclose(results[name][0], results["one device"][0], rtol=1e-5)
        chex.assert_trees_all_close(results[name][1], results["one device"][1], atol=1e-4)


def rl_pieces(mesh, *, beta1=0.3, with_dpo=True, dpo_clip=None):
    base = init("lm", 0)
    other = jax.tree.map(lambda x: x * 1.2, base)
    trunk = with_head(other, CONFIG, jax.random.key(2), "last")
    put = lambda tree: put_params(tree, mesh)  # noqa: E731
    ppo = S.PpoConfig(minibatches=2)
    state = S.ActorCritic(
        programs.start(CONFIG, "lm", OPTIM, 10, mesh)(put(base)),
        programs.start(CONFIG, "last", OPTIM, 10, mesh)(put(trunk)),
    )
    frozen = RolloutParams(None, None, put(base), put(trunk), put(other) if with_dpo else None)
    rollout = programs.rollout(CONFIG, CONFIG, CONFIG, "last", SamplingConfig(T), 0, 28, dpo_clip, None, mesh)
    update = programs.ppo_update(CONFIG, CONFIG, OPTIM, OPTIM, 10, ppo, 1.0, 2, mesh)
    scales = RewardScales(*(jnp.float32(x) for x in (beta1, 0.2, 1.0, 1.0, 0.95)))
    prompts = put_batch(Prompts(rows(5).tokens[:, :P] % 8 + 20, np.ones((16, P), bool)), mesh)
    return state, frozen, rollout, update, scales, prompts


@pytest.fixture(scope="module")
def two_iterations():
    """Mesh -> tokens of the second rollout, and all numbers after two iterations; each mesh once."""

    @functools.cache
    def of(name):
        state, frozen, rollout, update, scales, prompts = rl_pieces(mesh_of(MESHES[name]))
        for number in range(2):
            models = frozen._replace(policy=state.policy.params, critic=state.critic.params)
            experience, metrics, detail = rollout(models, prompts, jax.random.key(number), scales)
            state, updated = update(state, experience, jax.random.key(10 + number))
        assert rollout._cache_size() == update._cache_size() == 1
        return jax.device_get((experience.sequences.tokens, metrics, detail, updated, state))

    return of


@pytest.mark.parametrize("mesh", ["2x2x2", *slow("8x1x1")])
def test_rl_iterations_are_the_same_on_every_mesh(mesh, two_iterations):
    """Tokens are drawn alike; two rollouts and four updates later parameters agree within 2e-4."""
    (tokens, *numbers), (same_tokens, *same_numbers) = two_iterations("one device"), two_iterations(mesh)
    np.testing.assert_array_equal(same_tokens, tokens)
    chex.assert_trees_all_close(same_numbers, numbers, atol=2e-4, rtol=1e-3)


def test_first_update_starts_at_ratio_one():
    state, frozen, rollout, update, scales, prompts = rl_pieces(mesh_of(None))
    models = frozen._replace(policy=state.policy.params, critic=state.critic.params)
    experience, metrics, _ = rollout(models, prompts, jax.random.key(0), scales)
    _, updated = update(state, experience, jax.random.key(1))
    assert abs(float(updated["first_update_kl"])) < 1e-9
    assert float(metrics["sampler_gap"]) < 1e-5  # the decoder's log-probabilities are the training pass's
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-5)  # the policy is still its reference


def test_rollout_rewards_are_rto_eq_4_7():
    """Recomputed from the models, term by term; beta1 = 0 and no DPO model give PPO's reward exactly."""
    mesh = mesh_of(None)
    state, frozen, rollout, _, scales, prompts = rl_pieces(mesh)
    policy = jax.tree.map(lambda x: x * 0.9, state.policy.params)
    models = frozen._replace(policy=policy, critic=state.critic.params)
    experience, metrics, (rewards, _, _) = rollout(models, prompts, jax.random.key(0), scales)
    seqs, mask = experience.sequences, np.asarray(experience.sequences.mask)
    logps_fn = language_model(CONFIG).logps
    logp = {k: np.asarray(response_logps(logps_fn, w, seqs)) for k, w in
            (("pi", policy), ("ref", frozen.reference), ("dpo", frozen.dpo))}  # fmt: skip
    scores = np.asarray(programs.scores(CONFIG, "last", mesh)(frozen.reward, seqs))
    expected = 0.3 * (logp["dpo"] - logp["ref"]) - 0.2 * (logp["pi"] - logp["ref"])
    for b in range(len(mask)):
        expected[b, mask[b].nonzero()[0][-1]] += scores[b]
    expected = np.where(mask, expected, 0)
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    np.testing.assert_allclose(metrics["total_reward"], expected.sum(1).mean(), rtol=1e-5)
    advantages, returns = losses.gae(jnp.asarray(expected), experience.values, seqs.mask, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(experience.returns, returns, atol=1e-4)
    np.testing.assert_allclose(experience.advantages, losses.whiten(advantages, seqs.mask), atol=1e-4)

    plain = rollout(models._replace(dpo=None), prompts, jax.random.key(0), scales._replace(beta1=jnp.float32(0.3)))[2].rewards
    zero = rollout(models, prompts, jax.random.key(0), scales._replace(beta1=jnp.float32(0)))[2].rewards
    np.testing.assert_array_equal(plain, zero)


def test_ppo_update_uses_every_row_once_per_epoch():
    """With one epoch, the mean over minibatches of a row's index is the mean over all rows."""

    def count(state, batch):
        return state.at[batch.logps[:, 0].astype(int)].add(1), {"policy_update_kl": jnp.float32(0)}

    buffer = Experience(jax.tree.map(jnp.asarray, rows(0)), *(jnp.tile(jnp.arange(16.0)[:, None], (1, T)) for _ in range(4)))
    for epochs in (1, 3):
        update = S.make_ppo_update(count, epochs=epochs, minibatches=4)
        seen, _ = update(jnp.zeros(16, int), buffer, jax.random.key(0))
        np.testing.assert_array_equal(seen, np.full(16, epochs))


def test_bfloat16_compute_keeps_float32_masters():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    full, half = (language_model(c) for c in (CONFIG, config))
    params = init("lm", 0)
    loss = {}
    for name, model in (("full", full), ("half", half)):
        step = jax.jit(S.make_step(S.sft_objective(model.logps), make_optimizer(OPTIM, 10)))
        state, metrics = step(new_state(params, make_optimizer(OPTIM, 10)), rows(0))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        assert metrics["loss"].dtype == jnp.float32
        loss[name] = float(metrics["loss"])
    np.testing.assert_allclose(loss["half"], loss["full"], rtol=2e-2)
    assert loss["half"] != loss["full"]
