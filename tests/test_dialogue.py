"""Dialogues: the game's exact optimum, the user's turn in rollouts, and masks over the assistant's tokens only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dialogue
from experiments.dialogue import FIRST, GAME, SECOND, USER
from experiments.study import StudyConfig, make
from rto_jax import gold, losses
from rto_jax.gold import NEXT_Q
from rto_jax.models import LlamaConfig, language_model
from rto_jax.steps import PairsWithReference, dpo_objective, policy_objective, sft_objective, value_objective
from rto_jax.types import Experience, Pairs, Prompts, Sequences


@pytest.fixture(scope="module", params=["log_pi0", "optimum"])
def played(request):
    """(policy table, dialogues of it)."""
    policy = GAME.world.log_pi0 if request.param == "log_pi0" else GAME.optimum["log_pi"]
    rng = np.random.default_rng(1)
    return request.param, policy, GAME.sample(policy, GAME.world.prompts(rng, 20_000), rng)


# ---- the game


def test_the_user_is_a_distribution():
    np.testing.assert_allclose(GAME.user.sum(-1), 1.0)
    assert GAME.user[3, 2, 3] == 0.85 and GAME.user[3, 2, 16] == 0.05
    assert GAME.user[3, 2, 5] == pytest.approx(0.1 / 15)


def test_return_is_value_plus_advantages_plus_luck(played):
    """The identity that DPO rests on, for a random user: dialogue by dialogue, to rounding."""
    _, _, rows = played
    prompts = rows.tokens[:, : gold.PROMPT_LENGTH]
    value = GAME.optimum["V"][GAME.world.classes(prompts), 0, gold.SEP, 0]
    luck = GAME.luck(rows)
    total = value + GAME.along(GAME.optimum["A"], rows).sum(1) + luck
    np.testing.assert_allclose(GAME.returns(rows), total, atol=1e-9)
    assert luck.std() > 0.3 and abs(luck.mean()) < 4 * luck.std() / len(luck) ** 0.5


def test_values_are_what_sampling_finds(played):
    """J* and J(pi0) by dynamic programming against the mean over dialogues."""
    name, policy, rows = played
    drift = GAME.along(policy - GAME.world.log_pi0, rows).sum(1)
    objective = GAME.returns(rows) - GAME.world.beta * drift
    exact = GAME.optimum["J0" if name == "log_pi0" else "J"]
    assert abs(objective.mean() - exact) < 4 * objective.std() / len(objective) ** 0.5


def test_score_of_known_policies(played):
    name, policy, rows = played
    few = jax.tree.map(lambda x: x[:4_000], rows)
    states = GAME.states(few.tokens[:, :4], few.tokens[:, 4:], few.mask)
    logits = np.zeros((len(few.tokens), dialogue.LENGTH, gold.OUTPUTS))
    logits[:, dialogue.ACTIONS] = policy[states[:4]] + 3.0  # any shift
    found = GAME.score(logits, few)
    assert found["share"] == pytest.approx(0.0 if name == "log_pi0" else 1.0, abs=0.02)
    assert found["length"] == few.mask.sum(1).mean()


def test_a_state_s_value_by_enumeration():
    """Before the last token of the first turn: all answers of the user, one by one."""
    c, t, prev, q, action = 5, FIRST - 1, 7, 0, gold.OPEN
    next_q = NEXT_Q[c, q, action]
    ahead = sum(GAME.user[c, next_q, d] * GAME.optimum["V"][d, FIRST, action, next_q] for d in range(16))  # nothing if he leaves
    best = GAME.optimum
    expected = GAME.world.rewards[c, t, prev, q, action] + ahead - best["V"][c, t, prev, q]
    assert best["A"][c, t, prev, q, action] == pytest.approx(expected, abs=1e-12)


# ---- rollouts


@pytest.fixture(scope="module")
def conversed() -> Sequences:
    size = LlamaConfig(vocab_size=32, width=8, layers=1, heads=1, kv_heads=1, head_dim=8, mlp_width=8, tied_embeddings=False, output_size=20)
    model = language_model(size)
    prompts = GAME.world.prompts(np.random.default_rng(0), 1_500)
    rows = Prompts(jnp.asarray(prompts), jnp.ones(prompts.shape, bool))
    run = jax.jit(lambda *given: dialogue.converse(model, *given))
    return jax.device_get(run(model.init(jax.random.key(0)), rows, jax.random.key(1), dialogue.tables()))


def test_a_rollout_has_three_turns_or_ends_before(conversed):
    said, mask = conversed.tokens[:, 4:], conversed.mask
    user, second = said[:, FIRST:SECOND], mask[:, SECOND]
    assert not mask[:, FIRST:SECOND].any()
    ended = ((said == gold.EOS) & mask)[:, :FIRST].any(1)
    assert ended.any() and second.any() and not (ended & second).any()
    assert ((user[second] >= gold.OUTPUTS) & (user[second] < gold.PAD)).all() and (user[~second] == gold.PAD).all()
    np.testing.assert_array_equal(conversed.valid[:, 4:], said != gold.PAD)
    assert conversed.valid[second][:, 4 + FIRST : 4 + SECOND].all()
    for turn in (slice(0, FIRST), slice(SECOND, None)):  # the EOS is the last action of its turn
        actions, tokens = mask[:, turn], said[:, turn]
        assert not ((tokens == gold.EOS) & actions)[:, :-1][actions[:, 1:]].any()
        assert not (actions[:, 1:] & ~actions[:, :-1]).any()
    assert not np.array_equal(said[second][:, :4], said[second][:, SECOND : SECOND + 4])  # two turns, two noises


def test_the_rollout_s_user_is_the_game_s(conversed):
    """He leaves, stays or changes as often as his table says."""
    said, mask = conversed.tokens[:, 4:], conversed.mask
    asked = mask[:, FIRST - 1] & (said[:, FIRST - 1] != gold.EOS)
    cls, _, _, q, _ = GAME.states(conversed.tokens[:, :4], said, mask)
    before, q = GAME.world.classes(conversed.tokens[:, :4]), q[:, FIRST]
    left, same = asked & ~mask[:, SECOND], asked & mask[:, SECOND] & (cls[:, -1] == before)
    for found, chance in ((left, USER[:, 0]), (same, USER[:, 1])):
        p = chance[q[asked]]
        assert abs(found[asked].sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


# ---- masks


def test_what_stands_at_the_user_s_tokens_changes_no_loss():
    """NaN at his positions: SFT, DPO, PPO's policy and value loss are the same numbers, and no gradient goes there."""
    rng, shape = np.random.default_rng(0), (4, dialogue.LENGTH)
    mask = np.ones(shape, bool)
    mask[:, FIRST:SECOND] = False
    tokens = np.zeros((4, 4 + dialogue.LENGTH), np.int32)
    seqs = Sequences(tokens, np.ones(tokens.shape, bool), mask)
    numbers = [rng.normal(size=shape).astype(np.float32) for _ in range(5)]

    def poisoned(x):
        return jnp.asarray(np.where(mask, x, np.nan))

    def masked(params, tokens, valid, start, mask, temperature=1.0, branches=1):
        """As a model's: 0 where the mask is False."""
        rows = params if branches == 1 else jnp.concatenate([params, 2 * params], axis=1)
        return jnp.where(mask, rows, 0.0)

    def values(params, *_):
        return params

    for objective, batch in (
        (sft_objective(masked), lambda _: seqs),
        (dpo_objective(masked, beta=0.5, label_smoothing=0.0), lambda _: PairsWithReference(Pairs(seqs, seqs), jnp.zeros(4), jnp.ones(4))),
        (policy_objective(masked, clip=0.2), lambda f: Experience(seqs, *(f(x) for x in numbers[1:]))),
        (value_objective(values, clip=0.2), lambda f: Experience(seqs, *(f(x) for x in numbers[1:]))),
    ):
        loss = jax.value_and_grad(lambda params, rows, o=objective: o(params, rows)["loss"][0])
        plain, gradient = loss(jnp.asarray(numbers[0]), batch(jnp.asarray))
        bad, bad_gradient = loss(poisoned(numbers[0]), batch(poisoned))
        assert plain == bad and np.isfinite(plain)
        np.testing.assert_array_equal(gradient, bad_gradient)
        assert (np.asarray(gradient)[~mask] == 0).all() and (np.asarray(gradient)[mask] != 0).any()


def test_advantages_bridge_the_user_s_turn():
    """By hand: three actions that earn 1, 2 and 4, a user's token that says 99 between the second and the third."""
    mask = np.zeros((1, dialogue.LENGTH), bool)
    mask[0, [0, 1, SECOND]] = True
    rewards = np.full(mask.shape, 99.0, np.float32)
    rewards[mask] = 1, 2, 4
    values = np.where(mask, 1.0, np.nan).astype(np.float32)
    numbers = dict(gamma=1.0, lam=1.0)
    bridged, returns = (np.asarray(x)[mask] for x in dialogue.dialogue_gae(rewards, values, mask, True, **numbers))
    np.testing.assert_allclose(returns, [7, 6, 4])
    np.testing.assert_allclose(bridged, [6, 5, 3])
    apart, returns = (np.asarray(x)[mask] for x in dialogue.dialogue_gae(rewards, values, mask, False, **numbers))
    np.testing.assert_allclose(returns, [3, 2, 4])
    np.testing.assert_allclose(apart, [2, 1, 3])
    half, _ = dialogue.dialogue_gae(rewards, values, mask, True, gamma=1.0, lam=0.5)
    assert np.asarray(half)[0, 1] == pytest.approx(2 + 0.5 * 3)  # delta 2 + 1 - 1, then half of the third's 4 - 1


def test_the_score_is_paid_after_the_user_s_turn():
    mask = np.zeros((1, dialogue.LENGTH), bool)
    mask[0, [0, SECOND]] = True
    zeros = jnp.zeros(mask.shape)
    rewards = losses.rto_token_rewards(zeros, zeros, zeros, jnp.ones(1), mask, beta1=0.0, beta2=0.5)
    assert np.flatnonzero(rewards[0]).tolist() == [SECOND]


def test_what_is_drawn_comes_from_the_json(tmp_path):
    names = ["SFT", "DPO", *dialogue.RL]
    row = {"gold_return": 1.0, "kl": 2.0, "J": 0.0, "share": 0.5, "length": 17.0}
    found = {
        "arms": {name: [row | {"share": 0.1 * i}, row] for i, name in enumerate(names)}, "J0": -1.6,
        "curves": {name: [{"iteration": [0, 10], "share": [0.0, 0.4]}] * 2 for name in dialogue.RL},
        "optimum": {"gold_return": 5.0, "kl": 5.8, "J": 2.1, "share": 1.0}, "spread": [2.0, 2.0],
        "accuracy": [{"reward model": 0.7, "DPO": 0.71, "gold reward": 0.8}] * 2, "luck": [{"optimum": 0.56, "SFT": 0.86}] * 2,
    }  # fmt: skip
    text = dialogue.draw(found, tmp_path)
    assert (tmp_path / "gold.svg").exists() and text.count("\n| ") == len(names) + 2
    assert "PPO −0.100" in text and "0.86 in SFT's dialogues (of 2.00" in text


@pytest.mark.slow
def test_a_cheap_run_from_start_to_end(tmp_path):
    config = StudyConfig(runs=str(tmp_path / "runs"), results=str(tmp_path / "results"), cheap=True, jobs=1)
    text = make(dialogue.TABLE, "gold", config)
    assert "nothing can be concluded" in text and (tmp_path / "results/dialogue/gold.svg").exists()
    assert make(dialogue.TABLE, "gold", StudyConfig(draw=True, results=config.results)).splitlines()[:9] == text.splitlines()[:9]
