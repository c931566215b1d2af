"""Sampling, against a Markov table whose distributions are known and a small Llama."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from rto_jax.errors import UserError
from rto_jax.losses import token_logps
from rto_jax.models import LlamaConfig, language_model
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.types import Prompts, Sequences

EOS, PAD = 0, 9
_sample = jax.jit(sample, static_argnums=0, static_argnames="config")
_logits = jax.jit(lambda *args: LLAMA.logits(*args), static_argnums=3)


class Markov(NamedTuple):
    """A language model whose parameters are a table: logits after token s = table[s]."""

    prefill: object
    decode: object


def markov(on_prefill=lambda length: None, on_decode=lambda: None):
    def prefill(table, tokens, valid, cache_length):
        on_prefill(cache_length)
        return table[tokens[:, -1]], jnp.int32(tokens.shape[1])

    def decode(table, token, cache):
        jax.debug.callback(on_decode)
        return table[token], cache + 1

    return Markov(prefill, decode)


MARKOV = Markov(
    lambda table, tokens, valid, cache_length: (table[tokens[:, -1]], jnp.int32(0)),
    lambda table, token, cache: (table[token], cache),
)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def ending_in(states):
    """Prompts of width 2, the last token given."""
    last = np.asarray(states, np.int32)
    return Prompts(np.stack([np.full_like(last, 5), last], 1), np.ones((len(last), 2), bool))


def random_table(size, seed=0, scale=1.5):
    return (np.random.default_rng(seed).normal(size=(size, size)) * scale).astype(np.float32)


def draw(table, states, config, seed=0, eos_id=-1, model=MARKOV):
    """NumPy results: to index a jax array outside jit compiles a program per shape."""
    row_keys = keys(len(states), seed)
    return jax.device_get(_sample(model, table, ending_in(states), row_keys, config=config, eos_id=eos_id, pad_id=PAD))


def kept_tokens(logits, config):
    """Oracle: (tokens, their probabilities) after temperature, top-k and top-p, one row, in float64."""
    logits = np.asarray(logits, np.float64) / config.temperature
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: config.top_k or None]
    p = np.exp(logits[order] - logits[order].max())
    p /= p.sum()
    mass, n = 0.0, 0
    while n < len(order) and mass < config.top_p:
        mass, n = mass + p[n], n + 1
    return order[:n], p[:n] / p[:n].sum()


def test_a_row_worked_by_hand():
    """1 -> 2 -> 3 -> EOS surely, 4 -> 4 for ever; the other tokens are as likely as e^-2 to 1."""
    after = {1: 2, 2: 3, 3: EOS, 4: 4}
    table = np.zeros((10, 10), np.float32)
    for state, token in after.items():
        table[state, token] = 2.0
    lengths = []
    prompts = Prompts(np.array([[8, 1], [PAD, 4], [6, 3]]), np.array([[True, True], [False, True], [True, True]]))
    sequences, logps = _sample(
        markov(on_prefill=lengths.append),
        table,
        prompts,
        keys(3),
        config=SamplingConfig(max_new_tokens=4, temperature=0.0),
        eos_id=EOS,
        pad_id=PAD,
    )
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    chex.assert_trees_all_equal(
        sequences,
        Sequences(
            tokens=np.array([[8, 1, 2, 3, EOS, PAD], [PAD, 4, 4, 4, 4, 4], [6, 3, EOS, PAD, PAD, PAD]], np.int32),
            valid=np.concatenate([prompts.valid, mask], 1),
            mask=mask,
        ),
    )
    logp = 2.0 - np.log(np.exp(2.0) + 9.0)
    chex.assert_trees_all_close(logps, np.where(mask, logp, 0.0).astype(np.float32), atol=1e-6)
    assert logps.dtype == jnp.float32
    assert lengths == [2 + 4]  # traced once, the cache as long as the finished row


def test_nothing_follows_the_end():
    table = random_table(9) + 0.5 * (np.arange(9) == EOS)[None, :].astype(np.float32)
    config = SamplingConfig(max_new_tokens=6, temperature=1.3, top_k=6)
    states = [1 + i % 8 for i in range(256)]
    sequences, logps = draw(table, states, config, eos_id=EOS)
    tokens, mask, logps = sequences.tokens[:, 2:], sequences.mask, logps
    chex.assert_trees_all_equal(sequences.valid, np.concatenate([np.ones((256, 2), bool), mask], 1))
    lengths = mask.sum(1)
    for row, length in enumerate(lengths):
        assert mask[row, :length].all() and not mask[row, length:].any()
        assert (tokens[row, : length - 1] != EOS).all() and (tokens[row, length:] == PAD).all()
        assert length == 6 or tokens[row, length - 1] == EOS
        assert (logps[row, :length] < 0).all() and (logps[row, length:] == 0).all()
    ended = tokens[np.arange(256), lengths - 1] == EOS
    assert set(lengths[ended]) == {1, 2, 3, 4, 5, 6} and (~ended).any()  # every case occurred
    endless, _ = draw(table, states, config, eos_id=-1)
    assert endless.mask.all() and (endless.tokens == EOS).any()


def test_decoding_stops_with_the_longest_row():
    """1 -> 2 -> 3 -> EOS and 4 -> EOS; 5 -> 5 never ends. One decode step per token, less the first."""
    table = np.zeros((10, 10), np.float32)
    table[[1, 2, 3, 4, 5], [2, 3, EOS, EOS, 5]] = 100.0
    count = []
    model = markov(on_decode=lambda: count.append(1))
    for starts, steps in (([3, 4], 0), ([3, 1], 2), ([5, 3], 9)):
        count.clear()
        sequences, _ = draw(table, starts, SamplingConfig(max_new_tokens=10), eos_id=EOS, model=model)
        jax.effects_barrier()
        assert len(count) == steps == int(sequences.mask.sum(1).max()) - 1


def test_a_row_of_padding_gets_an_empty_response_and_holds_nobody_up():
    table = np.zeros((10, 10), np.float32)
    table[[1, PAD], [EOS, 5]] = 100.0
    count = []
    prompts = Prompts(np.array([[PAD, PAD], [6, 1]]), np.array([[False, False], [True, True]]))
    (tokens, valid, mask), logps = _sample(
        markov(on_decode=lambda: count.append(1)), table, prompts, keys(2),
        config=SamplingConfig(max_new_tokens=3), eos_id=EOS, pad_id=PAD,
    )  # fmt: skip
    jax.block_until_ready(logps)
    jax.effects_barrier()
    chex.assert_trees_all_equal(tokens, np.array([[PAD] * 5, [6, 1, EOS, PAD, PAD]], np.int32))
    chex.assert_trees_all_equal(mask, np.array([[False] * 3, [True, False, False]]))
    chex.assert_trees_all_equal(valid, np.array([[False] * 5, [True] * 3 + [False] * 2]))
    assert not count and (logps[0] == 0).all()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(2),
        SamplingConfig(2, temperature=0.7),
        SamplingConfig(2, temperature=1.5, top_k=5, top_p=0.8),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(config):
    """Chi-square over the pairs of two consecutive tokens: each step's distribution, and their independence."""
    size, n, start = 7, 40_000, 1
    table = random_table(size, seed=1, scale=0.7)
    sequences, _ = draw(table, [start] * n, config, seed=3)
    counts = np.zeros((size, size))
    np.add.at(counts, tuple(sequences.tokens[:, 2:].T), 1)
    expected = np.zeros((size, size))
    for a, p_a in zip(*kept_tokens(table[start], config), strict=True):
        for b, p_b in zip(*kept_tokens(table[a], config), strict=True):
            expected[a, b] = n * p_a * p_b
    assert (counts[expected == 0] == 0).all()
    seen = expected > 0
    assert expected[seen].min() > 5  # where the chi-square approximation holds
    chi_square = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi_square < stats.chi2.ppf(0.999, seen.sum() - 1)
    assert chi_square > stats.chi2.ppf(0.001, seen.sum() - 1)  # nor closer than chance: draws are not shared


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.8), (4, 1.0), (4, 0.8)])
def test_top_k_and_top_p_keep_exactly_the_right_tokens(top_k, top_p):
    """Every kept token is drawn and no other, for ten distributions."""
    size, n = 10, 1500
    table = random_table(size, seed=2, scale=0.7)
    config = SamplingConfig(1, temperature=1.2, top_k=top_k, top_p=top_p)
    sequences, _ = draw(table, np.repeat(np.arange(size), n), config)
    drawn = sequences.tokens[:, -1].reshape(size, n)
    for state in range(size):
        tokens, p = kept_tokens(table[state], config)
        assert min(p) * n > 10  # a kept token can hardly be missed
        assert set(drawn[state]) == set(tokens)


def test_of_equal_tokens_the_lower_ids_are_kept():
    """p = 1/2 takes one of two equal tokens, two of three (1/3 is too little) and two of four."""
    never = -1e9
    table = np.array([[0, 0, never, never], [never, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    for config, kept in (
        (SamplingConfig(1, top_p=0.5), [{0}, {1, 2}, {0, 1}]),
        (SamplingConfig(1, top_k=3), [{0, 1}, {1, 2, 3}, {0, 1, 2}]),
    ):
        drawn = draw(table, np.repeat(np.arange(3), 200), config)[0].tokens[:, -1].reshape(3, 200)
        assert [set(row) for row in drawn] == kept


def test_one_token_left_is_greedy():
    table = random_table(9)
    table[2, [3, 6]] = 50.0  # a tie too
    states = np.arange(1, 9)
    greedy, _ = draw(table, states, SamplingConfig(8, temperature=0.0), eos_id=EOS)
    for row, state in zip(greedy.tokens, states, strict=True):
        expected = [5, state]
        while len(expected) < 10:
            expected.append(PAD if EOS in expected else int(np.argmax(table[expected[-1]])))
        assert row.tolist() == expected
    for config in (SamplingConfig(8, top_k=1), SamplingConfig(8, temperature=2.0, top_p=1e-9)):
        chex.assert_trees_all_equal(draw(table, states, config, eos_id=EOS)[0], greedy)


def test_filters_move_no_noise():
    """The draw without a filter, where that one is kept, is the draw with it."""
    table, states = random_table(9), np.arange(1, 9).repeat(50)
    plain = draw(table, states, SamplingConfig(1))[0].tokens[:, -1]
    everything = draw(table, states, SamplingConfig(1, top_k=99))[0].tokens[:, -1]
    np.testing.assert_array_equal(plain, everything)
    config = SamplingConfig(1, top_k=4, top_p=0.9)
    cut = draw(table, states, config)[0].tokens[:, -1]
    kept = np.array([token in kept_tokens(table[s], config)[0] for s, token in zip(states, plain, strict=True)])
    assert kept.any() and not kept.all()
    np.testing.assert_array_equal(plain[kept], cut[kept])


def test_a_row_owes_its_draws_to_its_key_alone():
    table, states, config = random_table(9), np.array([1, 2, 3, 4, 5, 6]), SamplingConfig(7, top_p=0.95)

    def run(rows, row_keys):
        rows = np.array(rows)
        out = _sample(MARKOV, table, ending_in(states[rows]), row_keys[rows], config=config, eos_id=EOS, pad_id=PAD)
        return jax.device_get(out)

    whole = run([0, 1, 2, 3, 4, 5], keys(6))
    for rows in ([5, 3, 1, 0, 2, 4], [2, 4]):
        chex.assert_trees_all_close(run(rows, keys(6)), jax.tree.map(lambda x, r=rows: x[r], whole))
    twins, _ = run([3, 3, 1, 0, 2, 4], keys(6))
    chex.assert_trees_all_equal(twins.tokens[0], twins.tokens[1])
    other, _ = run([0, 1, 2, 3, 4, 5], keys(6, seed=1))
    assert (other.tokens != whole[0].tokens).any()


def test_logps_ignore_the_filters_and_use_the_temperature():
    table, states = random_table(9), np.arange(1, 9)
    for temperature in (0.0, 0.6):
        config = SamplingConfig(5, temperature=temperature, top_k=2, top_p=0.5)
        sequences, logps = draw(table, states, config)
        tokens = sequences.tokens
        logits = np.asarray(table, np.float64)[tokens[:, 1:-1]] / (temperature or 1.0)
        expected = np.take_along_axis(logits, tokens[:, 2:, None], -1)[..., 0] - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(logps, expected, atol=1e-5)


def test_one_program_for_all_prompts_of_a_shape():
    traces = []
    model = markov(on_prefill=traces.append)
    for seed in range(3):
        config = SamplingConfig(3, temperature=0.9, top_k=3)  # equal, not the same object
        draw(random_table(9, seed), [seed, 1], config, seed=seed, eos_id=seed, model=model)
    assert traces == [2 + 3]


@pytest.mark.parametrize(
    "field",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_a_bad_field_is_named(field):
    with pytest.raises(UserError, match=next(iter(field))):
        SamplingConfig(**{"max_new_tokens": 4, **field})


def test_config_is_frozen_and_hashable():
    assert hash(SamplingConfig(4)) == hash(SamplingConfig(max_new_tokens=4, temperature=1.0, top_k=0, top_p=1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig(4).top_k = 3


@pytest.mark.parametrize(
    "bad",
    [jax.random.key(0), keys(3), jnp.zeros((2, 2), jnp.uint32), jax.random.split(jax.random.key(0, impl="rbg"), 2)],
    ids=["one", "three", "raw", "rbg"],
)
def test_keys_must_be_one_per_row(bad):
    with pytest.raises(ValueError, match="one threefry key per row"):
        sample(MARKOV, random_table(9), ending_in([1, 2]), bad, config=SamplingConfig(2), eos_id=EOS, pad_id=PAD)


LLAMA = language_model(
    LlamaConfig(vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp_width=24, init_std=0.25,
                tied_embeddings=False, output_size=20)
)  # fmt: skip
P, T = 6, 8
CONFIGS = [SamplingConfig(T, temperature=0.0), SamplingConfig(T, temperature=1.3, top_k=12, top_p=0.9)]


@pytest.fixture(scope="module")
def params():
    """Larger than at initialisation, so that the distributions are far from uniform and depend on what was read."""
    tree = jax.jit(LLAMA.init)(jax.random.key(4))
    tree["lm_head"]["kernel"] *= 4.0
    tree["embed"]["embedding"] *= 4.0
    return tree


def mixed(width=P, pad_id=PAD):
    """Eight prompts of 1 to 6 tokens, left-padded to `width`."""
    rng = np.random.default_rng(7)
    rows = [rng.integers(1, 24, size=1 + i % 6) for i in range(8)]
    tokens = np.full((8, width), pad_id, np.int32)
    valid = np.zeros((8, width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], valid[i, width - len(row) :] = row, True
    return Prompts(tokens, valid), rows


def respond(params, prompts, row_keys, config, eos_id=17, pad_id=PAD):
    return jax.device_get(_sample(LLAMA, params, prompts, row_keys, config=config, eos_id=eos_id, pad_id=pad_id))


def test_greedy_decoding_with_the_cache_is_the_full_forward_pass(params):
    """Step by step: each token is the argmax of a forward pass over the row so far, without padding or cache."""
    prompts, rows = mixed()
    sequences, _ = respond(params, prompts, keys(8), CONFIGS[0], eos_id=-1)
    seen = set()
    for row, response in zip(rows, sequences.tokens[:, P:], strict=True):
        text = np.zeros((1, P + T), np.int32)
        text[0, : len(row)] = row
        for t in range(T):
            n = len(row) + t
            logits = np.asarray(_logits(params, text, np.arange(P + T)[None] < n, 1))[0]
            assert response[t] == np.argmax(logits[n - 1])  # index n - 1: what the token at n is drawn from
            text[0, n] = response[t]
        seen.update(response)
    assert len(seen) > 5  # no fixed point, which any cache would pass


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_row_among_others_is_the_row_alone(params, config):
    """Mixed lengths in one batch, each alone without padding, and all of them padded further with another id."""
    prompts, rows = mixed()
    (tokens, _, mask), logps = respond(params, prompts, keys(8), config)
    assert len(set(mask.sum(1).tolist())) > 2  # responses of many lengths
    for i in (1, 7):
        lone = Prompts(rows[i].astype(np.int32)[None], np.ones((1, len(rows[i])), bool))
        (lone_tokens, _, lone_mask), lone_logps = respond(params, lone, keys(8)[i : i + 1], config)
        chex.assert_trees_all_equal(lone_tokens[0, len(rows[i]) :], tokens[i, P:])
        chex.assert_trees_all_equal(lone_mask[0], mask[i])
        chex.assert_trees_all_close(lone_logps[0], logps[i], atol=1e-5)
    wide, _ = mixed(width=P + 3, pad_id=-100)
    (wide_tokens, wide_valid, wide_mask), wide_logps = respond(params, wide, keys(8), config, pad_id=-100)
    chex.assert_trees_all_equal(wide_tokens[:, P + 3 :], np.where(mask, tokens[:, P:], -100))
    chex.assert_trees_all_equal(wide_mask, mask)
    chex.assert_trees_all_equal(wide_valid, np.concatenate([wide.valid, mask], 1))
    chex.assert_trees_all_close(wide_logps, logps, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logps_are_those_of_the_full_forward_pass(params, config):
    """What an update recomputes is what the sampler stored: the first ratio of PPO is 1."""
    prompts, _ = mixed()
    sequences, logps = respond(params, prompts, keys(8), config)
    logits = _logits(params, sequences.tokens, sequences.valid, P)
    again = token_logps(logits, sequences.tokens[:, P:], temperature=config.temperature or 1.0)
    chex.assert_trees_all_close(logps, np.where(sequences.mask, again, 0.0), atol=1e-5)
    assert float(logps.min()) < -0.5


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_eight_devices_draw_what_one_draws(params, config):
    prompts, _ = mixed()
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
    expected, expected_logps = respond(params, prompts, keys(8), config)
    placed = jax.device_put((params, prompts, keys(8)), (everywhere, rows, rows))
    sequences, logps = _sample(LLAMA, *placed, config=config, eos_id=17, pad_id=PAD)
    for x in (*sequences, logps):
        assert x.sharding.is_equivalent_to(rows, 2)  # each device has drawn its own row
    chex.assert_trees_all_equal(jax.device_get(sequences), jax.device_get(expected))
    chex.assert_trees_all_close(jax.device_get(logps), jax.device_get(expected_logps), atol=1e-5)
