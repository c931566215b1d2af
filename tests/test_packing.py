"""No wasted tokens: shared prompts, packed rows and buckets give what one example per row gives."""

import functools
import itertools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import dpo, reward_model, sft, tasks
from experiments.common import main
from rto_jax import loops, losses, scoring
from rto_jax import steps as S
from rto_jax.checkpoint import Checkpointer
from rto_jax.data import batches, packing
from rto_jax.errors import UserError
from rto_jax.metrics import MetricsLog
from rto_jax.models import LlamaConfig, language_model, scalar_model
from rto_jax.types import Experience, Pairs, Sequences, prompt_length

CONFIG = LlamaConfig(
    vocab_size=23, width=12, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=20, rope_base=100.0, init_std=0.3
)
MODEL = language_model(CONFIG)
P, T, N = 5, 4, 6
# Tokens of the prompts and of the answers. An answer may be empty: all of it was cut, say.
PROMPTS, CHOSEN, REJECTED = (5, 3, 1, 2, 4, 1), (4, 2, 3, 1, 0, 2), (1, 4, 2, 3, 2, 4)


def rows(prompts, answers, seed=0, start=P, room=T) -> Sequences:
    """Rows padded on the left to `start` and on the right by `room`, with anything under the padding."""
    rng = np.random.default_rng(seed)
    index = np.arange(start + room)
    left, right = (np.asarray(x)[:, None] for x in (prompts, answers))
    valid = (index >= start - left) & (index < start + right)
    mask = valid[:, start:] & (rng.random((len(valid), room)) < 0.8)  # another party's tokens are no actions
    return Sequences(rng.integers(0, 23, valid.shape).astype(np.int32), valid, mask)


def pairs_of(prompts=PROMPTS, chosen=CHOSEN, rejected=REJECTED, seed=0, start=P, room=T) -> Pairs:
    first, second = (rows(prompts, x, seed + i, start, room) for i, x in enumerate((chosen, rejected)))
    second.tokens[:, :start] = first.tokens[:, :start]
    return Pairs(first, second)


PAIRS = pairs_of()


@functools.cache
def params_of(kind: str):
    if kind in ("sft", "dpo", "policy"):
        return jax.jit(MODEL.init)(jax.random.key(0))
    params = jax.jit(scalar(kind).init)(jax.random.key(1))
    return params | {"head": params["head"] | {"bias": jnp.array([0.7])}}


def scalar(kind: str):
    return scalar_model(CONFIG, "token" if kind == "token" else "last")


def objective_of(kind: str):
    if kind == "sft":
        return S.sft_objective(MODEL.logps)
    if kind == "dpo":
        return S.dpo_objective(MODEL.logps, beta=0.3, label_smoothing=0.1)
    if kind in ("last", "token"):
        return S.reward_objective(scalar(kind).scores, margin=0.2)
    if kind == "policy":
        return S.policy_objective(MODEL.logps, clip=0.2, temperature=0.7)
    return S.value_objective(scalar(kind).values, clip=0.2)


REFERENCE = np.random.default_rng(9).normal(-6, 1, (2, N)).astype(np.float32)  # as if a reference had scored them


@functools.partial(jax.jit, static_argnums=(0, 3))
def measured(objective, params, batch, grads=True):
    """What a step sees: metrics and gradients; or, at a third of the compiler's time, the metrics."""
    if grads:
        return S.value_and_grads(objective, params, batch)
    return {name: total / count for name, (total, count) in objective(params, batch).items()}, None


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def close(found, want):
    """Metrics and gradients within float32 rounding."""
    chex.assert_trees_all_close(found, want, rtol=2e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------ shared prompts


def in_two_rows(kind: str, grads: bool):
    """The mean loss from each answer's own row, by the losses alone."""
    params = params_of(kind)

    def answers(params, side):
        if kind == "dpo":
            return jnp.sum(scoring.response_logps(MODEL.logps, params, side), axis=-1)
        return scalar(kind).scores(params, side.tokens, side.valid, side.mask)

    def loss(params):
        chosen, rejected = (answers(params, side) for side in PAIRS)
        if kind == "dpo":
            return jnp.mean(losses.dpo_loss(chosen, rejected, *REFERENCE, beta=0.3, label_smoothing=0.1))
        return jnp.mean(losses.bradley_terry_loss(chosen, rejected, margin=0.2))

    return jax.jit(jax.value_and_grad(loss) if grads else lambda params: (loss(params), None))(params)


@functools.cache
def in_one_row(kind: str, grads: bool):
    """The objective of one example, or pair, a row."""
    batch = {"sft": PAIRS.chosen, "dpo": S.PairsWithReference(PAIRS, *REFERENCE)}.get(kind, PAIRS)
    return measured(objective_of(kind), params_of(kind), batch, grads)


HEADS = [("last", False), ("token", False), slow("last", True), slow("token", True)]


@pytest.mark.parametrize(("kind", "grads"), [("dpo", True), *HEADS[1:], slow("last", False)])
def test_a_pair_in_one_row_is_two_rows(kind, grads):
    metrics, found = in_one_row(kind, grads)
    close((metrics["loss"], found), in_two_rows(kind, grads))
    assert not grads or jnp.max(jnp.abs(found["layers"]["attn"]["q"]["kernel"])) > 1e-3


def three_answers():
    """Three answers to each prompt, one row each, and side by side in one row."""
    sides = [rows(PROMPTS, answers, seed) for seed, answers in enumerate((CHOSEN, REJECTED, (2, 1, 4, 3, 4, 1)))]
    for side in sides[1:]:
        side.tokens[:, :P] = sides[0].tokens[:, :P]
    join = lambda pick: np.concatenate([pick(sides[0])[:, :P], *(pick(x)[:, P:] for x in sides)], 1)  # noqa: E731
    mask = np.concatenate([x.mask for x in sides], 1)
    return sides, Sequences(join(lambda x: x.tokens), join(lambda x: x.valid), mask)


@pytest.mark.parametrize("head", [slow("last"), "token"])
def test_a_groups_scores_in_one_row(head):
    sides, group = three_answers()
    params, scores = params_of(head), jax.jit(scalar(head).scores, static_argnums=4)
    found = scores(params, group.tokens, group.valid, group.mask, 3)
    chex.assert_shape(found, (N, 3))
    want = [scores(params, x.tokens, x.valid, x.mask, 1) for x in sides]
    np.testing.assert_allclose(found, np.stack(want, 1), atol=1e-5)


def test_an_answer_sees_neither_the_others_nor_the_padding():
    """Log-probabilities to the bit, whatever the other answers are; and with more padding, within rounding."""
    _, group = three_answers()
    logps = jax.jit(MODEL.logps, static_argnums=(3, 6))
    params, rng = params_of("sft"), np.random.default_rng(1)
    whole = np.asarray(logps(params, group.tokens, group.valid, P, group.mask, 1.0, 3)).reshape(N, 3, T)
    assert (whole[group.mask.reshape(N, 3, T)] < 0).all()
    for own in range(3):
        other = np.ones(P + 3 * T, bool)
        other[:P] = other[P + own * T : P + (own + 1) * T] = False
        tokens = np.where(other, rng.integers(0, 23, group.tokens.shape), group.tokens).astype(np.int32)
        valid = np.where(other, rng.random(group.valid.shape) < 0.5, group.valid)
        changed = np.asarray(logps(params, tokens, valid, P, group.mask, 1.0, 3)).reshape(N, 3, T)
        np.testing.assert_array_equal(changed[:, own], whole[:, own])
        others = np.arange(3) != own
        assert (changed[:, others] != whole[:, others]).any()

    def wider(x, left):
        parts = np.asarray(x[:, x.shape[1] - 3 * T :]).reshape(N, 3, T)
        padded = np.pad(parts, ((0, 0), (0, 0), (0, 2))).reshape(N, -1)
        return np.concatenate([np.pad(x[:, : x.shape[1] - 3 * T], ((0, 0), (left, 0))), padded], 1)

    tokens, valid, mask = wider(group.tokens, 3), wider(group.valid, 3), wider(group.mask, 0)
    found = np.asarray(logps(params, tokens, valid, P + 3, mask, 1.0, 3)).reshape(N, 3, T + 2)
    np.testing.assert_allclose(found[:, :, :T], whole, atol=1e-5)


def test_the_prompt_is_computed_once():
    """A row of 30 + 2·5 slots instead of two of 30 + 5: the work of forward and backward pass is in proportion."""
    pairs = pairs_of(start=30, room=5)
    params = params_of("last")

    def work(function) -> float:
        return jax.jit(jax.grad(function)).lower(params).cost_analysis()["flops"]

    def two_rows(params):
        both = [scalar("last").scores(params, x.tokens, x.valid, x.mask) for x in pairs]
        return jnp.sum(both[0] - both[1])

    shared = work(lambda params: objective_of("last")(params, pairs)["loss"][0])
    assert shared < 1.1 * 40 / 70 * work(two_rows)
    text = str(jax.make_jaxpr(lambda p: objective_of("last")(p, pairs)["loss"][0])(params))
    assert "f32[6,40,12]" in text and "f32[6,35,12]" not in text and "f32[12,35,12]" not in text


def test_unequal_prompts_are_no_pair():
    chosen, rejected = PAIRS
    with pytest.raises(ValueError, match="the prompts have 5 and 4 slots"):
        scoring.side_by_side(Pairs(chosen, jax.tree.map(lambda x: x[:, -8:] if x.shape[1] == P + T else x, rejected)))


# ------------------------------------------------------------------------------------------------ packed rows


def packed(data, slots: int, seed: int = 0):
    """All examples in packed rows, as `data.batches` makes them."""
    lengths = packing.lengths_of(data)
    arrangement = packing.pack(lengths, slots, seed, (P, T))
    take = lambda index: jax.tree.map(lambda x: x[index], data)  # noqa: E731
    return arrangement, arrangement.batch(take, np.arange(arrangement.count), np.arange(arrangement.count))


@pytest.mark.parametrize(("kind", "grads"), [slow("sft", True), ("dpo", True), *HEADS])
def test_packed_rows_are_one_example_a_row(kind, grads):
    data = PAIRS.chosen if kind == "sft" else PAIRS
    arrangement, batch = packed(data, 18 if kind == "sft" else 24)
    assert 1 < arrangement.count < N and arrangement.most > 1
    if kind == "dpo":
        reference = np.zeros((2, *batch.chosen.shape), np.float32)
        for row, records in enumerate(arrangement.groups):
            reference[:, row, : len(records)] = REFERENCE[:, records]
        batch = S.PairsWithReference(batch, *reference)
    close(measured(objective_of(kind), params_of(kind), batch, grads), in_one_row(kind, grads))


def test_packed_pairs_are_swapped_and_found_again():
    """Each answer's log-probability is its own row's, whichever part of the row it is in."""
    lengths = packing.lengths_of(PAIRS)
    take = lambda index: jax.tree.map(lambda x: x[index], PAIRS)  # noqa: E731
    sums = jax.jit(scoring.pair_logps, static_argnums=0)
    plain = sums(MODEL.logps, params_of("dpo"), PAIRS)
    swapped = np.array([True, False, True, True, False, False])
    batch = packing.assemble(take(np.arange(N)), [4, 2], (12, 16), swapped, 5)
    np.testing.assert_array_equal(batch.chosen, [[1, 0, 1, 1, -1], [0, 0, -1, -1, -1]])
    assert batch.rows.valid.max() == 4 and lengths.sum() + N == (batch.rows.valid > 0).sum()
    for found, want in zip(sums(MODEL.logps, params_of("dpo"), batch), plain, strict=True):
        np.testing.assert_allclose(np.asarray(found)[batch.chosen >= 0], want, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(found)[batch.chosen < 0], 0)


def random_pairs(count: int, seed: int = 0) -> Pairs:
    """Pairs that know their number: the tokens of a record's prompt and answers are all it."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, P + 1, count)
    out = pairs_of(prompts, rng.integers(0, T + 1, count), rng.integers(0, T + 1, count), seed)
    for side in out:
        side.tokens[:] = np.arange(count)[:, None]
    return out


@pytest.mark.parametrize("sides", [1, 2])
def test_every_record_once_per_epoch(sides):
    """Whole, in a row of its own number, of the size that was asked for; and the note says what is used."""
    data = random_pairs(64)
    data = data if sides == 2 else data.chosen
    slots = 20 * sides
    iterator = batches(data, batch_size=1, seed=0, epochs=2, pack=slots)
    assert iterator.shapes == 1
    epochs = [[], []]
    for number in range(2 * iterator.batches_per_epoch):
        batch = next(iterator)
        batch, chosen = (batch.rows, batch.chosen[0]) if sides == 2 else (batch, None)
        chex.assert_shape(batch.tokens, (1, slots))
        tokens, valid, start = batch.tokens[0], batch.valid[0], prompt_length(batch)
        for own in range(1, valid.max() + 1):
            (record,) = set(tokens[valid == own])
            epochs[number // iterator.batches_per_epoch].append(record)
            parts = np.split(valid[start:] == own, sides)
            counts = packing.lengths_of(data)[record]
            assert (valid[:start] == own).sum() == counts[0] - 1
            order = [1, 2] if sides == 1 or chosen[own - 1] == 0 else [2, 1]
            assert [part.sum() for part in parts] == [1 + counts[i] for i in order[:sides]]
            masks = np.split(batch.mask[0] & (valid[start:] == own), sides)
            wanted = [side.mask[record].sum() for side in ([data] if sides == 1 else data)]
            assert [x.sum() for x in masks] == [wanted[i - 1] for i in order[:sides]]
        if sides == 2:
            assert ((chosen >= 0).sum(), chosen.dtype) == (valid.max(), np.int32)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(64)) and epochs[0] != epochs[1]
    share = packing.lengths_of(data).sum() / (iterator.batches_per_epoch * slots)
    pattern = rf"packed: 64 examples in {iterator.batches_per_epoch} rows of \d+(\+\d+){{{sides}}} slots, "
    assert re.match(pattern + rf"at most \d+ in one; {share:.1%} of the slots are used, ", iterator.note), iterator.note
    assert share > (0.85 if sides == 1 else 0.78)  # rows of three or four examples: with longer ones it is more


@pytest.mark.parametrize("options", [{"pack": 24}, {"buckets": 3}], ids=["packed", "buckets"])
def test_two_hosts_share_each_batch_and_resume_anywhere(options):
    data, size = random_pairs(40, 1), 4
    whole = batches(data, batch_size=size, seed=3, **options)
    straight = [next(whole) for _ in range(12)]
    halves = [batches(data, batch_size=size, seed=3, parts=2, own=[i], **options) for i in range(2)]
    for want in straight[:5]:
        parts = [next(half) for half in halves]
        chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), want)
    saved = json.loads(json.dumps(halves[0].state()))
    again = batches(data, batch_size=size, seed=3, **options)
    again.restore(saved)
    for want in straight[5:]:
        chex.assert_trees_all_equal(next(again), want)
    with pytest.raises(UserError, match=r"belongs to rows \d+.*but this run has None"):
        batches(data, batch_size=size, seed=3).restore(saved)
    plain = batches(data, batch_size=size, seed=3).state()
    with pytest.raises(UserError, match=r"belongs to rows None, but this run has \d+"):
        again.restore(plain)


def test_rows_too_short_and_other_impossible_flags():
    with pytest.raises(UserError, match=r"--pack 8 is too short a row: the longest prompt \(5 tokens\) .* take 9"):
        batches(PAIRS.chosen, batch_size=1, seed=0, pack=8)
    assert next(batches(PAIRS.chosen, batch_size=1, seed=0, pack=9)).tokens.shape == (1, 9)
    with pytest.raises(UserError, match=r"--pack 13 is too short .* longest answers \(4\) take 14"):
        batches(PAIRS, batch_size=1, seed=0, pack=13)
    with pytest.raises(UserError, match=r"batch size 5 is larger than the data set, 6 records in \d packed rows"):
        batches(PAIRS, batch_size=5, seed=0, pack=30)
    with pytest.raises(UserError, match="--pack 9 and --buckets 2 exclude each other"):
        batches(PAIRS, batch_size=1, seed=0, pack=9, buckets=2)
    with pytest.raises(UserError, match="--buckets must be at least 1, not 0"):
        batches(PAIRS, batch_size=1, seed=0, buckets=0)
    with pytest.raises(UserError, match="--pack must be a number of slots, or 0 .* not -1"):
        batches(PAIRS, batch_size=1, seed=0, pack=-1)
    with pytest.raises(UserError, match="an example without a prompt can't be packed"):
        batches(rows((0, 2), (1, 1)), batch_size=1, seed=0, pack=20)


# ------------------------------------------------------------------------------------------------ the PPO update


def experience(answers=CHOSEN, seed=0) -> Experience:
    rng = np.random.default_rng((seed, 7))
    seqs = rows(PROMPTS, answers, seed)
    numbers = [rng.normal(size=seqs.mask.shape).astype(np.float32) for _ in range(4)]
    return jax.tree.map(jnp.asarray, Experience(seqs, numbers[0] * 0.3 - 3, *numbers[1:]))


repack = jax.jit(S.repack, static_argnums=(1, 2))


@pytest.mark.parametrize("kind", ["policy", slow("value")])
def test_a_repacked_mini_batch_is_the_mini_batch(kind):
    """Losses, metrics and gradients; micro-batches behind the used ones are not even read."""
    batch = experience()
    parts = repack(batch, (8, 10), 1)
    assert 1 < int(parts.used) < N == len(parts.batch.logps)
    want = measured(objective_of(kind), params_of(kind), batch)
    close(measured(objective_of(kind), params_of(kind), parts), want)

    def poisoned(x):
        bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 1
        return x.at[int(parts.used) :].set(jnp.asarray(bad, x.dtype))

    poison = jax.tree.map(poisoned, parts.batch)
    chex.assert_trees_all_equal(
        measured(objective_of(kind), params_of(kind), S.Parts(poison, parts.used)),
        measured(objective_of(kind), params_of(kind), parts),
    )
    metrics, _ = measured(objective_of(kind), params_of(kind), S.Parts(poison, parts.used + 1))
    assert np.isnan(metrics["loss"])


@pytest.mark.parametrize("seed", range(6))
def test_repacking_moves_every_token_and_number_once(seed):
    """Found by their numbers in the row; the rows used are those that first-fit needs, worked out by hand."""
    rng = np.random.default_rng(seed)
    prompts, answers = rng.integers(1, P + 1, N), rng.integers(0, T + 1, N)
    seqs = rows(prompts, answers, seed)
    seqs = seqs._replace(tokens=np.broadcast_to(np.arange(N)[:, None] * 100 + np.arange(P + T), seqs.tokens.shape))
    numbers = [np.asarray(seqs.tokens[:, P:], np.float32) + k / 8 for k in range(4)]
    shape = (7, 9)
    parts = repack(jax.tree.map(jnp.asarray, Experience(seqs, *numbers)), shape, 2)
    chex.assert_shape(parts.batch.logps, (3, 2, 9))
    packed, *moved = (np.asarray(x).reshape(-1, x.shape[-1]) for x in jax.tree.leaves(parts.batch)[:2])
    valid = moved[0]
    mask, *moved = (np.asarray(x).reshape(-1, 9) for x in jax.tree.leaves(parts.batch)[2:])

    taken = []  # rows: [slots of prompts, slots of answers, members]
    need = np.stack([prompts - 1, answers + 1], 1)
    for one in np.argsort(-(need / np.float32(shape)).astype(np.float32).sum(1), kind="stable"):
        row = next((i for i, x in enumerate(taken) if (x[:2] + need[one] <= shape).all()), len(taken))
        if row == len(taken):
            taken.append(np.zeros(3, int))
        taken[row] += [*need[one], 1]
        here = valid[row] == taken[row][2]
        want = seqs.tokens[one][seqs.valid[one]]
        np.testing.assert_array_equal(packed[row][here], want)
        behind = here[7:].copy()
        behind[np.argmax(behind)] = False  # the prompt's last token
        np.testing.assert_array_equal(mask[row][behind], seqs.mask[one, : answers[one]])
        for number, found in zip(numbers, moved, strict=True):
            np.testing.assert_array_equal(found[row][behind], number[one, : answers[one]])
    assert (valid > 0).sum() == seqs.valid.sum() and mask.sum() == seqs.mask.sum()
    assert int(parts.used) == -(-len(taken) // 2)


def test_full_rows_stay_alone_and_short_packed_rows_are_refused():
    batch = experience(answers=(4,) * 6)
    assert int(repack(batch, (4, 5), 1).used) == N
    assert int(repack(batch, (4 * N, 5 * N), 1).used) == 1
    for shape in ((3, 5), (4, 4)):
        with pytest.raises(
            ValueError, match=rf"a packed row of {shape[0]}\+{shape[1]} slots is too short for 5\+4 tokens"
        ):
            S.repack(batch, shape, 1)


def test_the_update_packs_each_mini_batch():
    """`used_slots` of the metrics is real tokens over the slots of used micro-batches."""

    def step(state, batch):
        shares = jnp.sum(batch.batch.sequences.valid > 0) / (batch.used * 2 * 18)
        return state, {"policy_update_kl": jnp.float32(0), "share": shares}

    update = jax.jit(S.make_ppo_update(step, epochs=2, minibatches=1, pack=lambda x: S.repack(x, (8, 10), 2)))
    _, metrics = update(jnp.zeros(()), experience(), jax.random.key(0))
    np.testing.assert_allclose(metrics["used_slots"], metrics["share"], rtol=1e-6)
    assert 0.5 < metrics["used_slots"] < 1


# ------------------------------------------------------------------------------------------------ buckets


def slots_of(sizes, lengths, answers: int) -> int:
    """Slots where each record takes the first of the shapes that holds it."""
    return sum(
        next(prompt + answers * answer for prompt, answer in sizes if p <= prompt and a <= answer) for p, a in lengths
    )


@pytest.mark.parametrize("answers", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_bucket_shapes_are_the_best_there_are(seed, count, answers):
    """Against every chain of nested shapes whose sides occur in the data."""
    rng, limit = np.random.default_rng(seed), (9, 7)
    lengths = np.stack([rng.integers(1, limit[0] + 1, 12), rng.integers(1, limit[1] + 1, 12)], 1)
    lengths = np.minimum(lengths, rng.choice(lengths.ravel(), (12, 2)))
    found = packing.bucket_shapes(lengths, limit, count, answers)
    assert found[-1] == limit and len(found) <= count
    assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(found))
    sides = [sorted({*column.tolist(), last}) for column, last in zip(lengths.T, limit, strict=True)]
    shapes = sorted(set(itertools.product(*sides)) - {limit})
    chains = [
        (*chain, limit) for n in range(count) for chain in itertools.combinations(shapes, n)
        if all(a[1] <= b[1] for a, b in itertools.pairwise(chain))
    ]  # fmt: skip
    best = min(slots_of(chain, lengths.tolist(), answers) for chain in chains)
    assert slots_of(found, lengths.tolist(), answers) == best


def test_many_lengths_are_chosen_from_quantiles():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 1000, (3000, 2))
    found = packing.bucket_shapes(lengths, (1024, 1024), 4)
    assert len(found) == 4 and found[-1] == (1024, 1024)
    # Uniform lengths: shapes of the shares c, the largest of two uniform numbers below it with probability c²; the best
    # three below 1 leave 0.73 of the slots (by search over c), and 1024 instead of 999 costs 2.5 % of the last one.
    assert slots_of(found, lengths.tolist(), 1) < 0.77 * 3000 * 2048


@pytest.mark.parametrize("sides", [1, 2])
def test_bucketed_batches_fit_and_hold_every_record(sides):
    data = random_pairs(60, 2)
    data = data if sides == 2 else data.chosen
    counts = packing.lengths_of(data)
    iterator = batches(data, batch_size=4, seed=0, epochs=2, buckets=3)
    assert 1 < iterator.shapes <= 3 and iterator.batches_per_epoch == 15
    met, seen, slots = set(), [], 0
    for batch in iterator:
        first = batch if sides == 1 else batch.chosen
        records = np.max(np.where(first.valid, first.tokens, 0), axis=1)
        np.testing.assert_array_equal(packing.lengths_of(batch), counts[records])  # nothing is cut off
        for side, whole in [(batch, data)] if sides == 1 else zip(batch, data, strict=True):
            assert side.mask.sum() == whole.mask[records].sum() and side.tokens.shape == first.tokens.shape
        met.add((prompt_length(first), first.mask.shape[1]))
        seen.extend(records.tolist())
        slots += 4 * (prompt_length(first) + sides * first.mask.shape[1])
    assert met <= set(packing.bucket_shapes(np.stack([counts[:, 0], counts[:, 1:].max(1)], 1), (P, T), 3, sides))
    assert sorted(seen[:60]) == sorted(seen[60:]) == list(range(60)) and seen[:60] != seen[60:]
    assert slots < 0.9 * 120 * (P + sides * T)
    assert iterator.note.startswith("buckets: 60 examples in rows of ")


def test_a_loop_compiles_once_per_bucket(tmp_path):
    """The outer loop of every stage, over two epochs: as many programs as shapes, and no word of another."""

    @jax.jit
    def program(state, batch):
        return state, {"loss": jnp.sum(batch.mask) / batch.tokens.size}

    iterator = batches(random_pairs(40, 3).chosen, batch_size=2, seed=0, buckets=4)
    state = S.TrainState(jnp.int32(0), {"norm": {"scale": jnp.zeros(2)}}, ())
    with MetricsLog(tmp_path, "toy") as log, Checkpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
        loop = functools.partial(
            loops.train, lambda state, batch, number: program(state, batch), state,
            loops.python_iterator(iterator, lambda batch: jax.tree.map(jnp.asarray, batch)), start=0, name="toy",
            steps=2 * iterator.batches_per_epoch, log=log, checkpointer=checkpointer, save_every=0, programs=(program,),
        )  # fmt: skip
        loop(shapes=iterator.shapes)
        assert 2 < program._cache_size() == iterator.shapes <= 4
        program.clear_cache()
        with pytest.raises(RuntimeError, match="program 0 compiled again"):
            loop(shapes=iterator.shapes - 1)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        ("sft", "--pack 84"),
        ("sft", "--buckets 3"),
        ("reward_model", "--pack 120"),
        ("dpo", "--pack 120"),
        ("dpo", "--buckets 3"),
    ],
)
def test_stages_train_on_packed_rows_and_buckets(stage, flags, tmp_path, capsys):
    module = {"sft": sft, "reward_model": reward_model, "dpo": dpo}[stage]
    tasks.say.cache_clear()  # it says a line once
    small = (
        "--gold.examples 512 --gold.pairs 512 --gold.test-pairs 64 --gold.rollouts 64 --batch-size 16 --eval-size 64"
    )
    start = "" if stage == "sft" else "--init gold"
    argv = f"{small} {flags} {start} --steps 30 --out {tmp_path / 'run'}".split()
    main(module.PRESETS, module.run, module.__doc__, argv)
    printed = capsys.readouterr()
    assert ("packed: 512 examples in " if "pack" in flags else "buckets: 512 examples in ") in printed.out + printed.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert np.mean([line["loss"] for line in lines[-5:]]) < np.mean([line["loss"] for line in lines[:5]])
