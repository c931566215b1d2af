"""Beyond one turn ("From r to Q*", discussion): dialogues, where rewards and advantages are of the assistant's tokens only.

    python -m experiments.dialogue                  5 seeds, 5 minutes on 2 cores
    python -m experiments.dialogue --cheap          one seed, hardly any steps
    python -m experiments.dialogue --draw           from results/dialogue/gold.json alone

The paper proposes DPO's token view for several turns; it has no numbers. Here the answer of the embedded world
(rto_jax/gold.py) is written in two turns, of 8 and of 16 tokens. Between them the user leaves or asks again, in two tokens,
for the same or for something else, with probabilities that depend on the segment that he finds (`USER`). A segment that the
first turn opens is paid for when the second one closes it, and who finds nothing begun is likely to leave. Such a user is an
exact Markov chain, so soft dynamic programming over the same states with his turn in between gives the optimum:

    Q*(c, 7, s, a) = r + Σ_c' user(c' | c, q') V*(c', 8, s'),     Σ_t r_t = V*(s_0) + Σ_t A*_t + luck,

where t runs over the assistant's tokens and luck = V*(after the user's turn) − its expectation, of mean 0. With a text's
deterministic transitions it is absent, and DPO's identity (eq. 8) exact; here it is noise in the preferences that no
token of the assistant's can explain. SFT, DPO, reward model, PPO and RTO take the same steps as everywhere, with masks that
leave the user's tokens out; only the rollout knows of him. The control ends GAE at the user's turn, as if each turn were an
episode: then a first turn that has a second one earns PPO nothing but the KL penalty, while RTO's has DPO's reward, which is
an advantage and looks ahead.
What would reproduce: all methods learn, and bridging his turn helps PPO more than RTO.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import study
from experiments.common import Stage, numpy_rng, write_json
from experiments.study import (
    COLOURS,
    MARKERS,
    Arm,
    StudyConfig,
    Table,
    base_arms,
    column,
    drawing,
    interval,
    markdown,
    numbers,
    over_seeds,
    shown,
)
from experiments.tasks import in_batches, map_rows, repeat
from rto_jax import gold, losses, programs
from rto_jax.gold import NEXT_Q as NEXT_Q
from rto_jax.metrics import progress
from rto_jax.models import SIZES, language_model, scalar_model, with_head
from rto_jax.rng import stream
from rto_jax.rollout import RewardScales, RolloutParams
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.scoring import response_logps
from rto_jax.sharding import batch_sharding, make_mesh, put_batch, put_whole, to_host
from rto_jax.steps import ActorCritic, PairsWithReference
from rto_jax.train_state import sharded_init
from rto_jax.types import Experience, Pairs, Prompts, Sequences, prompt_length

FIRST, HORIZON = 8, 24  # the assistant's tokens before the user's turn, and in all
SAYS = 2  # tokens of the user's turn
SECOND = FIRST + SAYS  # where the assistant's second turn begins
LENGTH = HORIZON + SAYS  # T: what stands behind the prompt
ACTIONS = np.r_[:FIRST, SECOND:LENGTH]  # the assistant's positions in T
# (he leaves, he stays and wants the same), by the segment's state: none, open, open with on-topic content, done
USER = np.array([(0.6, 0.2), (0.3, 0.5), (0.05, 0.85), (0.3, 0.1)])
LEAVES = 16


# ---------------------------------------------------------------------------------------------- the game, exactly


class Game:
    """The world with a user's turn in the middle. NumPy, float64; tables are the world's, [16, 24, 20, 4, 20].

    A dialogue is tokens and mask [n, 26]: 8 of the assistant, 2 of the user, 16 of the assistant. An EOS in the first turn
    ends it all, and so does a user who leaves; padding stands for what would follow.
    """

    world = gold.World(horizon=HORIZON)

    @cached_property
    def user(self) -> np.ndarray:
        """P(next class | class, q), or (index 16) that he leaves, [16, 4, 17]."""
        leaves, same = USER.T[:, None, :, None]
        stays = same * np.eye(16)[:, None] + (1 - leaves - same) * (1 - np.eye(16)[:, None]) / 15
        return np.concatenate([stays, np.broadcast_to(leaves, (16, 4, 1))], axis=-1)

    @cached_property
    def class_of(self) -> np.ndarray:
        """Class of the two ids that say it, less 20: [8, 8]."""
        ids = np.stack(np.meshgrid(range(8), range(8), indexing="ij"), -1).reshape(-1, 2) + gold.OUTPUTS
        return self.world.classes(np.concatenate([ids, ids], axis=1).astype(np.int32)).reshape(8, 8)

    @cached_property
    def words(self) -> np.ndarray:
        """The four ways to say each class, ids [16, 4, 2]."""
        return np.stack([np.argwhere(self.class_of == c) for c in range(16)]).astype(np.int32) + gold.OUTPUTS

    @cached_property
    def optimum(self) -> dict[str, Any]:
        """V* and A* = r* + V*(s') − V*(s) of the maximiser of J = E[R*] − beta·KL(π ‖ π0), log π*, J* and J(π0)."""
        beta, log_pi0 = self.world.beta, self.world.log_pi0
        values, q_values = self._backwards(lambda t, q: beta * np.log(np.exp(q / beta + log_pi0[:, t]).sum(-1)))
        plain, _ = self._backwards(lambda t, q: (np.exp(log_pi0[:, t]) * q).sum(-1))
        advantages = q_values - values[..., None]
        start = lambda v: float(v[:, 0, gold.SEP, 0].mean())  # noqa: E731
        return {"V": values, "A": advantages, "log_pi": log_pi0 + advantages / beta, "J": start(values), "J0": start(plain)}

    def _backwards(self, value: Callable[[int, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(V, Q) by dynamic programming; `value`: t, Q [16, 20, 4, 20] -> V."""
        rewards, classes = self.world.rewards, np.arange(16)[:, None, None]
        q_values, values = np.empty_like(rewards), np.empty(rewards.shape[:-1])
        future = np.zeros((16, 4, gold.OUTPUTS))  # [class, q, action]
        for t in reversed(range(HORIZON)):
            q_values[:, t] = rewards[:, t] + future[:, None]
            values[:, t] = value(t, q_values[:, t])
            ahead = np.einsum("cqd,dpq->cpq", self.user[..., :LEAVES], values[:, t]) if t == FIRST else values[:, t]
            future = ahead[classes, np.arange(gold.OUTPUTS), NEXT_Q]
            future[..., gold.EOS] = 0.0
        return values, q_values

    def states(self, prompts: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, ...]:
        """(class, t, prev, q, action) of the assistant's tokens, int [n, 24]; without meaning outside the mask."""
        action = np.where(mask, tokens, gold.EOS)[:, ACTIONS]
        asked = np.where(mask[:, SECOND, None], tokens[:, FIRST:SECOND], gold.OUTPUTS) - gold.OUTPUTS
        turns = self.world.classes(prompts), self.class_of[asked[:, 0], asked[:, 1]]
        cls = np.repeat(np.stack(turns, axis=1), [FIRST, HORIZON - FIRST], axis=1)
        prev = np.concatenate([np.full_like(action[:, :1], gold.SEP), action[:, :-1]], axis=1)
        q = np.zeros_like(action)
        for i in range(1, HORIZON):
            q[:, i] = NEXT_Q[cls[:, i - 1], q[:, i - 1], action[:, i - 1]]
        return cls, np.broadcast_to(np.arange(HORIZON), action.shape), prev, q, action

    def along(self, table: np.ndarray, rows: Sequences) -> np.ndarray:
        """Entries of an action table along dialogues, [n, 24], 0 where the assistant says nothing."""
        prompts, tokens = rows.tokens[:, : gold.PROMPT_LENGTH], rows.tokens[:, gold.PROMPT_LENGTH :]
        return np.where(rows.mask[:, ACTIONS], table[self.states(prompts, tokens, rows.mask)], 0.0)

    def returns(self, rows: Sequences) -> np.ndarray:
        """Gold return of each dialogue, [n]."""
        return self.along(self.world.rewards, rows).sum(1)

    def luck(self, rows: Sequences) -> np.ndarray:
        """V* after the user's turn (0 if he leaves) less its expectation before, [n]; 0 where he has none."""
        prompts, tokens = rows.tokens[:, : gold.PROMPT_LENGTH], rows.tokens[:, gold.PROMPT_LENGTH :]
        cls, _, prev, q, _ = (x[:, FIRST] for x in self.states(prompts, tokens, rows.mask))
        after = self.optimum["V"][:, FIRST, prev, q]  # [class, n]
        expected = (self.user[self.world.classes(prompts), q, :LEAVES].T * after).sum(0)
        found = np.where(rows.mask[:, SECOND], after[cls, np.arange(len(cls))], 0.0)
        return np.where(rows.mask[:, FIRST - 1] & (tokens[:, FIRST - 1] != gold.EOS), found - expected, 0.0)

    def sample(self, log_policy: np.ndarray, prompts: np.ndarray, rng: np.random.Generator) -> Sequences:
        """Dialogues of a policy table [16, 24, 20, 4, 20] with the user."""
        n, cls, policy = len(prompts), self.world.classes(prompts), np.exp(log_policy)
        prev, q, going = np.full(n, gold.SEP), np.zeros(n, int), np.ones(n, bool)
        parts = []
        draw = lambda p: (rng.random(n)[:, None] >= np.cumsum(p, 1)[:, :-1]).sum(1)  # noqa: E731
        for t in range(HORIZON):
            if t == FIRST:
                wants = draw(self.user[cls, q])
                going, cls = going & (wants != LEAVES), wants % LEAVES
                said = self.words[cls, rng.integers(0, 4, n)]
                parts += [np.where(going, said[:, i], gold.PAD) for i in range(SAYS)]
            action = draw(policy[cls, t, prev, q])
            parts.append(np.where(going, action, gold.PAD))
            q, prev, going = NEXT_Q[cls, q, action], action, going & (action != gold.EOS)
        tokens = np.stack(parts, axis=1)
        mask = tokens != gold.PAD
        whole = np.concatenate([prompts, tokens], axis=1).astype(np.int32)
        valid = np.concatenate([np.ones(prompts.shape, bool), mask], axis=1)
        mask[:, FIRST:SECOND] = False
        return Sequences(whole, valid, mask)

    def score(self, logits: np.ndarray, rows: Sequences) -> dict[str, float]:
        """Of the policy that drew the rows, from its logits [n, 26, 20]: as `gold.World.score`, J* − J by the exact KL to π*.

        The performance-difference identity holds with the user's random turn too: J* − J = beta·E Σ_t KL(π ‖ π*).
        """
        prompts, tokens = rows.tokens[:, : gold.PROMPT_LENGTH], rows.tokens[:, gold.PROMPT_LENGTH :]
        mask = rows.mask[:, ACTIONS]
        at = tuple(x[mask] for x in self.states(prompts, tokens, rows.mask)[:4])
        log_pi = logits[:, ACTIONS][mask].astype(float)
        log_pi -= np.log(np.exp(log_pi - log_pi.max(1, keepdims=True)).sum(1, keepdims=True)) + log_pi.max(1, keepdims=True)

        def divergence(table):
            total = np.zeros(mask.shape)
            total[mask] = (np.exp(log_pi) * (log_pi - table[at])).sum(1)
            return total.sum(1)

        best = self.optimum
        regret, kl = self.world.beta * divergence(best["log_pi"]), divergence(self.world.log_pi0)
        columns = {"gold_return": self.returns(rows), "kl": kl, "J": best["J"] - regret, "share": 1 - regret / (best["J"] - best["J0"])}
        return {name: float(x.mean()) for name, x in columns.items()} | {"length": float(mask.sum(1).mean())}


GAME = Game()


# ---------------------------------------------------------------------------------------------- dialogues of a network


class Tables(NamedTuple):
    """The game as arrays of a program."""

    class_of: jax.Array
    next_q: jax.Array
    user: jax.Array
    words: jax.Array


def tables() -> Tables:
    return Tables(*(jnp.asarray(x, dtype) for x, dtype in ((GAME.class_of, int), (NEXT_Q, int), (GAME.user, float), (GAME.words, jnp.int32))))


def converse(policy, params, prompts: Prompts, key: jax.Array, game: Tables) -> Sequences:
    """One dialogue for each prompt: the policy's turn, the user's, the policy's. Pure; the mask leaves the user's tokens out."""
    rows = prompts.tokens.shape[0]
    first, user, way, second = jax.random.split(key, 4)
    draw = functools.partial(sample, policy, params, eos_id=gold.EOS, pad_id=gold.PAD)
    one, _ = draw(prompts, jax.random.split(first, rows), config=SamplingConfig(FIRST))
    said = one.tokens[:, -FIRST:]
    cls = game.class_of[prompts.tokens[:, 0] - gold.OUTPUTS, prompts.tokens[:, 1] - gold.OUTPUTS]
    q, _ = jax.lax.scan(lambda q, token: (game.next_q[cls, q, token], None), jnp.zeros_like(cls), jnp.where(one.mask, said, gold.EOS).T)
    cls = jax.random.categorical(user, jnp.log(game.user[cls, q]))
    going = (jnp.all(one.mask & (said != gold.EOS), axis=1) & (cls != LEAVES))[:, None]
    reply = jnp.where(going, game.words[cls % LEAVES, jax.random.randint(way, (rows,), 0, 4)], gold.PAD)
    there = jnp.broadcast_to(going, reply.shape)
    context = jnp.concatenate([one.tokens, reply], axis=1)
    # A dialogue that is over is a row without a token, whose answer is empty.
    listening = Prompts(context, jnp.concatenate([one.valid, there], axis=1) & going)
    two, _ = draw(listening, jax.random.split(second, rows), config=SamplingConfig(HORIZON - FIRST))
    return Sequences(
        jnp.concatenate([context, two.tokens[:, FIRST - HORIZON :]], axis=1),
        jnp.concatenate([one.valid, there, two.mask], axis=1),
        jnp.concatenate([one.mask, jnp.zeros_like(there), two.mask], axis=1),
    )


@functools.cache
def conversation(config, mesh):
    """Program: parameters, Prompts, key, Tables -> Sequences."""
    model = language_model(config, mesh)
    return jax.jit(lambda *given: converse(model, *given), out_shardings=batch_sharding(mesh))


@functools.cache
def rollout(config, mesh, bridge: bool):
    """Program: RolloutParams, Prompts, key, RewardScales, Tables -> Experience; as rto_jax/rollout.py, on dialogues.

    Without `bridge` each of the assistant's turns is an episode: no value and no advantage passes the user's turn.
    """
    policy, critic, reward = language_model(config, mesh), scalar_model(config, "last", mesh), scalar_model(config, "token", mesh)

    def run(params: RolloutParams, prompts: Prompts, key: jax.Array, scales: RewardScales, game: Tables) -> Experience:
        seqs = converse(policy, params.policy, prompts, key, game)
        mask = seqs.mask
        logps, ref_logps = (response_logps(policy.logps, x, seqs) for x in (params.policy, params.reference))
        dpo_logps = ref_logps if params.dpo is None else response_logps(policy.logps, params.dpo, seqs)
        values = jnp.where(mask, critic.values(params.critic, seqs.tokens, seqs.valid, prompt_length(seqs)), 0.0)
        scores = reward.scores(params.reward, seqs.tokens, seqs.valid, mask)
        rewards = losses.rto_token_rewards(
            dpo_logps, ref_logps, logps, scores, mask, beta1=scales.beta1, beta2=scales.beta2, beta3=scales.beta3
        )
        advantages, returns = dialogue_gae(rewards, values, mask, bridge, gamma=scales.gamma, lam=scales.lam)
        return Experience(seqs, logps, values, losses.whiten(advantages, mask), returns)

    return jax.jit(run, out_shardings=batch_sharding(mesh))


def dialogue_gae(rewards, values, mask, bridge: bool, **numbers) -> tuple[jax.Array, jax.Array]:
    """GAE of dialogues [B, 26]: over the user's turn (`losses.gae` passes over what is masked), or of each turn alone."""
    if bridge:
        return losses.gae_associative(rewards, values, mask, **numbers)
    first = (jnp.arange(mask.shape[1], dtype=jnp.int32) < FIRST)[None, :]
    turns = (losses.gae_associative(rewards, values, mask & turn, **numbers) for turn in (first, ~first))
    return jax.tree.map(jnp.add, *turns)


# ---------------------------------------------------------------------------------------------- one seed


@dataclass(frozen=True, kw_only=True)
class DialogueConfig(Stage):
    iterations: int = 40
    """rollout buffers of PPO and RTO; SFT takes ten steps for each, reward model and DPO eight"""
    eval_every: int = 10
    """iterations between evaluations"""


RL = {
    "PPO": (False, True), "RTO": (True, True),
    "PPO, each turn an episode": (False, False), "RTO, each turn an episode": (True, False),
}  # fmt: skip


def run(config: DialogueConfig) -> dict:
    """All methods of one seed; the settings are the embedded world's presets. Writes results.json."""
    mesh, size, out = make_mesh(config.mesh), SIZES["gold"], Path(config.out)
    presets = {name: arm.config for name, arm in base_arms("gold").items()}
    game, sizes = tables(), config.gold

    def prompts(purpose: str, n: int) -> Prompts:
        tokens = GAME.world.prompts(numpy_rng(config.seed, f"dialogue-{purpose}"), n)
        return Prompts(tokens, np.ones(tokens.shape, bool))

    def dialogues(params, purpose: str, rows: Prompts) -> Sequences:
        parts = []
        for number, (batch, count) in enumerate(in_batches(rows, 1_024)):
            drawn = to_host(conversation(size, mesh)(params, put_whole(batch, mesh), stream(config.seed, purpose, number), game))
            parts.append(jax.tree.map(lambda x, n=count: x[:n], drawn))
        return jax.tree.map(lambda *x: np.concatenate(x), *parts)

    def fit(kind: str, head: str, steps: int, batch: Callable[[np.ndarray], Any], rows: int, params, options=()) -> Any:
        """Parameters after so many steps on random rows."""
        optim, count = presets[kind].optim, presets[kind].batch_size
        name = {"SFT": "sft", "reward model": "reward", "DPO": "dpo"}[kind]
        step = programs.supervised_step(name, size, head, optim, steps, 1, mesh, options)
        state, rng = programs.start(size, head, optim, steps, mesh)(_copy(params)), numpy_rng(config.seed, kind)
        with progress(steps, kind) as bar:
            for _ in range(steps):
                state, _ = step(state, batch(rng.integers(0, rows, count)), None)
                bar.update()
        return state.params

    def score(params) -> dict[str, float]:
        rows = dialogues(params, "held-out", prompts("test", sizes.rollouts))
        logits = map_rows(lambda x: programs.response_logits(size, mesh)(params, x), rows, 1_024, mesh)
        return GAME.score(logits, rows)

    imitated = GAME.sample(GAME.world.log_pi0, prompts("examples", sizes.examples).tokens, numpy_rng(config.seed, "dialogue-sft"))
    at = lambda rows, index: jax.tree.map(lambda x: x[index], rows)  # noqa: E731
    fresh = sharded_init(programs.init_fn(size, "lm"), mesh, stream(config.seed, "init"))
    sft = fit("SFT", "lm", 10 * config.iterations, lambda index: put_batch(at(imitated, index), mesh), sizes.examples, fresh)

    def pairs(split: str, n: int) -> Pairs:
        rows = dialogues(sft, f"pairs-{split}", repeat(prompts(f"pairs-{split}", n), 2))
        returns = GAME.returns(rows)
        first = gold.World.label(returns[0::2], returns[1::2], numpy_rng(config.seed, f"dialogue-labels-{split}"))
        chosen = np.arange(0, 2 * n, 2) + ~first
        return Pairs(at(rows, chosen), at(rows, chosen ^ 1))

    train, test = pairs("train", sizes.pairs), pairs("test", sizes.test_pairs)
    steps, sums = 8 * config.iterations, programs.pair_logps(size, mesh)
    scalar = sharded_init(lambda p, k: with_head(p, size, k, "token", zero=True), mesh, sft, stream(config.seed, "head"))
    reward = fit("reward model", "token", steps, lambda index: put_batch(at(train, index), mesh), sizes.pairs, scalar)

    def with_reference(index) -> PairsWithReference:
        rows = put_batch(at(train, index), mesh)
        return PairsWithReference(rows, *sums(sft, rows))

    beta = presets["DPO"].beta
    dpo = fit("DPO", "lm", steps, with_reference, sizes.pairs, sft, (("loss", "dpo"), ("beta", beta), ("label_smoothing", 0.0)))

    figures = {"SFT": score(sft), "DPO": score(dpo)}
    curves = {}
    for name, (dense, bridge) in RL.items():
        params, curves[name] = optimise(config, size, mesh, RolloutParams(sft, None, sft, reward, dpo if dense else None), bridge, prompts, score)
        figures[name] = score(params)
    ours, theirs = (map_rows(lambda rows, p=p: sums(p, rows), test, 256, mesh) for p in (dpo, sft))
    scored = [map_rows(lambda rows: programs.scores(size, "token", mesh)(reward, rows), rows, 256, mesh) for rows in test]
    best, worst = (GAME.returns(rows) for rows in test)
    accuracy = {
        "DPO": np.mean(ours[0] - theirs[0] > ours[1] - theirs[1]), "reward model": np.mean(scored[0] > scored[1]),
        "gold reward": np.mean(best > worst),
    }  # fmt: skip
    rows = GAME.sample(GAME.optimum["log_pi"], prompts("optimum", 4_096).tokens, numpy_rng(config.seed, "dialogue-optimum"))
    luck = {"optimum": GAME.luck(rows), "SFT": np.concatenate([GAME.luck(x) for x in test])}
    found = {
        "figures": figures, "curves": curves, "accuracy": {key: float(x) for key, x in accuracy.items()},
        "luck": {key: float(x.std()) for key, x in luck.items()},
        "spread": float(np.concatenate([best, worst]).std()),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", found)
    return found


def _copy(params):
    """What `programs.start` may take over: the parameters themselves are used again."""
    return jax.tree.map(jnp.copy, params)


def optimise(config: DialogueConfig, size, mesh, models: RolloutParams, bridge: bool, prompts, score) -> tuple[Any, dict]:
    """PPO on dialogues, or RTO where there is a DPO model: the policy's parameters, and its share along the way."""
    arm, beta1 = base_arms("gold")["PPO"].config, base_arms("gold")["RTO"].config.beta1
    updates = config.iterations * arm.ppo.minibatches
    trained = size, size, arm.policy_optim, arm.critic_optim, updates
    ppo = dataclasses.replace(arm.ppo, gamma=1.0, lam=1.0)  # these two are the rollout's
    update, collect_rows = programs.ppo_update(*trained, ppo, 1.0, 1, mesh), rollout(size, mesh, bridge)
    scales = RewardScales(*(jnp.float32(x) for x in (beta1 if models.dpo else 0.0, arm.beta2, arm.beta3, arm.ppo.gamma, arm.ppo.lam)))
    critic = sharded_init(lambda p, k: with_head(p, size, k, "last", zero=True), mesh, models.reward, stream(config.seed, "critic"))
    state = ActorCritic(
        programs.start(size, "lm", arm.policy_optim, updates, mesh)(_copy(models.policy)),
        programs.start(size, "last", arm.critic_optim, updates, mesh)(_copy(critic)),
    )
    game, curve = tables(), {"iteration": [], "share": []}
    with progress(config.iterations, "RTO" if models.dpo else "PPO") as bar:
        for number in range(config.iterations):
            if number % config.eval_every == 0:
                curve["iteration"].append(number)
                curve["share"].append(score(state.policy.params)["share"])
            rows = put_batch(prompts(f"rollout-{number}", config.batch_size), mesh)
            now = models._replace(policy=state.policy.params, critic=state.critic.params)
            experience = collect_rows(now, rows, stream(config.seed, "rollout", number), scales, game)
            state, _ = update(state, experience, stream(config.seed, "shuffle", number))
            bar.update()
    return state.policy.params, curve


# ---------------------------------------------------------------------------------------------- table and figure


def arms(preset: str) -> dict[str, Arm]:
    sizes = dataclasses.replace(Stage(out="").gold, pairs=8_192)
    return {"dialogue": Arm("experiments.dialogue", DialogueConfig(out="", batch_size=256, gold=sizes))}


def collect(arms: dict[str, Arm], base: Path, seeds: int) -> dict:
    found = [json.loads((base / f"seed{seed}" / arms["dialogue"].folder / "results.json").read_text()) for seed in numbers(seeds)]
    policy = GAME.optimum["log_pi"]
    rows = GAME.sample(policy, GAME.world.prompts(np.random.default_rng(0), 65_536), np.random.default_rng(1))
    gold_return = float(GAME.returns(rows).mean())
    best = {"gold_return": gold_return, "kl": (gold_return - GAME.optimum["J"]) / GAME.world.beta, "J": GAME.optimum["J"], "share": 1.0}
    names = found[0]["figures"]
    return {
        "arms": {name: [run["figures"][name] for run in found] for name in names},
        "curves": {name: [run["curves"][name] for run in found] for name in RL}, "optimum": best, "J0": GAME.optimum["J0"],
        **{key: [run[key] for run in found] for key in ("accuracy", "luck", "spread")},
    }  # fmt: skip


def draw(found: dict, folder: Path) -> str:
    table = found["arms"]
    of = functools.partial(column, table)
    with drawing(folder / "gold.svg", 2, 4.2) as (left, right):
        for number, name in enumerate(table):
            style = dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)])
            left.plot(of(name, "share"), [number] * len(table[name]), ls="", ms=3, alpha=0.5, **style)
            left.plot([np.mean(of(name, "share"))], [number], ls="", ms=7, **style)
            if name in found["curves"]:
                runs = found["curves"][name]
                right.plot(runs[0]["iteration"], np.mean([run["share"] for run in runs], axis=0), label=name, **style)
        left.set(xlabel="share of the exact optimum", yticks=range(len(table)), yticklabels=list(table))
        left.invert_yaxis()
        right.set(xlabel="iterations", ylabel="share of the exact optimum")
        right.legend()
    columns = {"gold_return": 2, "kl": 2, "J": 2, "share": 3, "length": 1}
    rows = [[name, *(shown(interval(of(name, key)), places) for key, places in columns.items())] for name in table]
    rows.append(["exact optimum", *(f"{found['optimum'][key]:.{places}f}" if key in found["optimum"] else "" for key, places in columns.items())])
    mean = lambda key, name: np.mean([run[name] for run in found[key]])  # noqa: E731
    gaps = [
        f"{name} {shown(interval(of(name, 'share'), of(f'{name}, each turn an episode', 'share')), 3)}" for name in ("PPO", "RTO")
    ] + [f"RTO less PPO {shown(interval(of('RTO', 'share'), of('PPO', 'share')), 3)}"]
    text = markdown(("method", "gold return", "KL, nats", "objective J", "share of the optimum", "assistant's tokens"), rows)
    text += over_seeds(len(of("SFT", "share")))
    text += f" Share with GAE over the user's turn less that without: {'; '.join(gaps)}.\n\nAccuracy on held-out pairs of dialogues: "
    text += "; ".join(f"{name} {mean('accuracy', name):.3f}" for name in ("reward model", "DPO", "gold reward"))
    text += f". Standard deviation of the user's luck: {mean('luck', 'SFT'):.2f} in SFT's dialogues (of {np.mean(found['spread']):.2f} of "
    return text + f"their gold returns), {mean('luck', 'optimum'):.2f} in the optimum's."


TABLE = Table("dialogue", arms, collect, draw)
PRESETS = {"gold": ("the embedded world, with a user's turn in the middle", StudyConfig(runs="runs/study-dialogue"))}

if __name__ == "__main__":
    study.command(TABLE, __doc__, PRESETS)
