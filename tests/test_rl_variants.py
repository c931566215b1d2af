"""RTO's ablations and critic-free advantages: the shipped rollout around bigram models, so that loops can check it."""

import dataclasses
import functools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import ppo, rto
from experiments.rl import dry_run
from experiments.tasks import GoldTask, TextTask
from rto_jax import gold, losses
from rto_jax import steps as S
from rto_jax.data import load_tokenizer
from rto_jax.errors import UserError
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.rollout import RewardScales, RolloutParams, make_rollout
from rto_jax.sampling import SamplingConfig
from rto_jax.train_state import new_state
from rto_jax.types import Experience, Prompts, Sequences
from tests.test_text import write_model

V, B, K, P, T, EOS, PAD, DELIMITERS = 8, 12, 3, 2, 7, 0, 7, (1, 2)
SCALES = RewardScales(*(jnp.float32(x) for x in (0.3, 0.2, 1.5, 0.9, 0.8)))


def bigram_logps(table, tokens, valid, start, mask, temperature):
    logits = table[tokens[:, start - 1 : -1]]
    return jnp.where(mask, losses.token_logps(logits, tokens[:, start:], temperature=temperature), 0.0)


POLICY = SimpleNamespace(
    prefill=lambda table, tokens, valid, length: (table[tokens[:, -1]], ()),
    decode=lambda table, token, cache: (table[token], cache),
    logps=bigram_logps,
)
CRITIC = SimpleNamespace(values=lambda weights, tokens, valid, start: weights[tokens[:, start - 1 : -1]])
REWARD = SimpleNamespace(
    scores=lambda weights, tokens, valid, mask: jnp.sum(weights[tokens[:, -T:]] * mask, axis=-1),
)
TABLES = [jnp.asarray(np.random.default_rng(i).normal(size=(V, V)), jnp.float32) for i in range(3)]
VECTORS = [jnp.asarray(np.random.default_rng(i).normal(size=V), jnp.float32) for i in (4, 5)]
PROMPTS = Prompts(
    jnp.asarray(np.repeat(np.random.default_rng(6).integers(3, 7, (B // K, P)), K, axis=0), jnp.int32),
    jnp.ones((B, P), bool),
)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def program(placement, advantage, dpo_clip):
    return jax.jit(
        make_rollout(
            POLICY, CRITIC if advantage == "gae" else None, REWARD, sampling=SamplingConfig(T), eos_id=EOS, pad_id=PAD,
            dpo_clip=dpo_clip, placement=placement, delimiters=DELIMITERS, advantage=advantage, group_size=K,
        )
    )  # fmt: skip


@functools.cache
def rolled(placement="token", advantage="gae", dpo=True, beta1=0.3, dpo_clip=None):
    policy, reference, other = TABLES
    critic = VECTORS[0] if advantage == "gae" else None
    params = RolloutParams(policy, critic, reference, VECTORS[1], other if dpo else None)
    run, scales = program(placement, advantage, dpo_clip), SCALES._replace(beta1=jnp.float32(beta1))
    return jax.device_get(run(params, PROMPTS, jax.random.key(1), scales))


def pieces(seqs: Sequences):
    """Float64: the DPO term, the KL term and the scores, from the tables; and the mask."""
    logps = [np.asarray(jax.nn.log_softmax(table), np.float64) for table in TABLES]
    before, after = seqs.tokens[:, P - 1 : -1], seqs.tokens[:, P:]
    policy, reference, dpo = (table[before, after] for table in logps)
    mask = seqs.mask
    scores = (np.asarray(VECTORS[1], np.float64)[after] * mask).sum(1)
    return 0.3 * (dpo - reference) * mask, 0.2 * (reference - policy) * mask, 1.5 * scores, mask


def placed(dense, tokens, mask, placement):
    """Token by token."""
    out = np.zeros(dense.shape)
    for b in range(len(dense)):
        real = mask[b].nonzero()[0]
        last, since = real[-1], 0.0
        for t in real:
            since += dense[b, t]
            if placement in ("token", "shaping"):
                out[b, t] = dense[b, t]
            elif t == last or (placement == "segment" and tokens[b, t] in DELIMITERS):
                out[b, t], since = since, 0.0
        if placement == "shaping":
            out[b, last] -= dense[b].sum()
    return out


def close(actual, desired):
    np.testing.assert_allclose(actual, desired, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("placement", ["token", "segment", slow("last"), "shaping"])
def test_placements_of_the_dpo_term(placement):
    """Semi-RTO, DDPO and RS-PPO differ from RTO in where the DPO term is paid; what is logged of it does not change."""
    experience, metrics, detail = rolled(placement)
    seqs = experience.sequences
    dense, kl, scores, mask = pieces(seqs)
    assert len(set(mask.sum(1))) > 2 and np.isin(seqs.tokens[:, P:-1][mask[:, 1:]], DELIMITERS).any()
    expected = placed(dense, seqs.tokens[:, P:], mask, placement) + kl
    expected[np.arange(B), mask.sum(1) - 1] += scores
    close(detail.rewards, expected)
    close(detail.scores, scores / 1.5)
    close([metrics["implicit_reward"], metrics["score"]], [dense.sum(1).mean(), scores.mean() / 1.5])
    chex.assert_trees_all_equal(seqs, rolled()[0].sequences)


@pytest.mark.parametrize("dpo_clip", [None, slow(0.1)])
def test_shaping_leaves_the_score_as_an_answers_whole_reward(dpo_clip):
    """RS-PPO: without KL an answer earns beta3·r_MLE, clipped or not; RTO does not."""
    detail = rolled("shaping", dpo_clip=dpo_clip)[2]
    close(detail.rewards.sum(1) + 0.2 * detail.kl, 1.5 * detail.scores)
    dense = rolled()[2]
    assert np.abs(dense.rewards.sum(1) + 0.2 * dense.kl - 1.5 * dense.scores).max() > 0.1


def to_go(x, mask, gamma=0.9):
    out = np.zeros(x.shape)
    for b in range(len(x)):
        ahead = 0.0
        for t in reversed(mask[b].nonzero()[0]):
            ahead = out[b, t] = x[b, t] + gamma * ahead
    return out


def test_reinforce_pp_is_whitened_returns_to_go():
    experience, metrics, detail = rolled(advantage="reinforce_pp")
    returns, mask = to_go(detail.rewards, experience.sequences.mask), experience.sequences.mask
    real = returns[mask]
    close(experience.advantages, np.where(mask, (returns - real.mean()) / real.std(), 0))
    assert not experience.values.any() and not experience.returns.any() and "explained_variance" not in metrics
    chex.assert_trees_all_equal(detail, rolled()[2])  # the same answers and rewards as with a critic


@pytest.mark.parametrize(("advantage", "placement"), [("rloo", "token"), slow("grpo", "segment")])
def test_groups_compare_answers_to_one_prompt(advantage, placement):
    """Whole answers by beta3·score - beta2·KL, and the placed DPO term token by token: the published formulas, in loops."""
    experience, _, _ = rolled(placement, advantage)
    seqs = experience.sequences
    assert all(len(np.unique(seqs.tokens[i : i + K, :P], axis=0)) == 1 for i in range(0, B, K))
    dense, kl, scores, mask = pieces(seqs)
    dense, whole = placed(dense, seqs.tokens[:, P:], mask, placement), scores + kl.sum(1)
    expected = np.zeros((B, T))
    for i in range(0, B, K):
        group = range(i, i + K)
        inside = dense[i : i + K][mask[i : i + K]]
        for b in group:
            rest = [j for j in group if j != b]
            if advantage == "rloo":
                centred = dense[b] - np.mean([dense[j][mask[j]].mean() for j in rest])
                base = whole[b] - whole[rest].mean()
            else:
                centred = (dense[b] - inside.mean()) / (inside.std(ddof=1) + 1e-4)
                base = (whole[b] - whole[group].mean()) / (whole[group].std(ddof=1) + 1e-4)
            expected[b] = np.where(mask[b], to_go(centred[None], mask[b : b + 1])[0] + base, 0)
    np.testing.assert_allclose(experience.advantages, expected, rtol=2e-4, atol=2e-4)


def test_beta1_zero_is_ppo_to_the_bit_whatever_the_placement():
    ppo_rollout = rolled(dpo=False)
    for placement in ("token", "segment", "shaping"):
        chex.assert_trees_all_equal(rolled(placement, beta1=0.0), ppo_rollout)


@pytest.mark.slow
@pytest.mark.parametrize(("advantage", "placement"), [("reinforce_pp", "token"), ("rloo", "token"), ("grpo", "segment")])
def test_beta1_zero_is_ppo_to_the_bit_without_a_critic(advantage, placement):
    chex.assert_trees_all_equal(rolled(placement, advantage, beta1=0.0), rolled(placement, advantage, dpo=False))


def test_without_a_critic_the_policy_moves_as_with_one():
    """The step of a bare TrainState is the policy's part of an ActorCritic's."""
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-2, warmup=0.0), 8)
    policy_step = S.make_step(S.policy_objective(lambda params, *rest: bigram_logps(params["w"], *rest), clip=0.2), optimizer)
    value_step = S.make_step(S.value_objective(lambda params, *rest: CRITIC.values(params["w"], *rest), clip=0.2), optimizer)
    experience = Experience(*rolled()[0])
    policy, critic = (new_state({"w": x}, optimizer) for x in (TABLES[0], VECTORS[0]))

    both, alone = S.make_ppo_step(policy_step, value_step), S.make_ppo_step(policy_step)
    step = jax.jit(lambda state, batch: (both(state, batch), alone(state.policy, batch)))
    ((found, _), metrics), (state, own) = step(S.ActorCritic(policy, critic), experience)
    chex.assert_trees_all_close(state, found, rtol=1e-6)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, state.params, policy.params)) > 0.01
    assert own.keys() == {name for name in metrics if not name.startswith("value_")}


def test_delimiters_end_sentences_and_lines(tmp_path):
    assert GoldTask.delimiters == (gold.SEP,)
    tokenizer = load_tokenizer(write_model(tmp_path / "model"))
    task = TextTask(SimpleNamespace(data=str(tmp_path)), None, tokenizer)
    assert sorted(task.delimiters) == sorted(tokenizer.encode(".!?\n"))


def test_a_dry_run_without_a_critic_has_none(capsys):
    dry_run(dataclasses.replace(rto.PRESETS["gold"][1], advantage="grpo", group_size=4, placement="segment"))
    printed = capsys.readouterr().out
    assert "policy, trained" in printed and "policy_loss" in printed
    assert "critic" not in printed and "value_loss" not in printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(advantage="rloo"), "--advantage rloo needs a --group-size of 2 or more, not 1"),
        (dict(advantage="grpo", group_size=1), "--advantage grpo"),
        (dict(group_size=3), "--batch-size 256 is not divisible by --group-size 3"),
        (dict(group_size=0), "--group-size 0"),
    ],
)
def test_groups_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(ppo.PRESETS["gold"][1], **changes)
