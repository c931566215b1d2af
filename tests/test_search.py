"""Search: against all answers of a shortened gold world, by hand, and on a small Llama with its cache."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.search import MIDDLE, WAYS, WIDTHS, best_path, claims, table_model
from rto_jax import gold
from rto_jax.errors import UserError
from rto_jax.models import LlamaConfig, language_model
from rto_jax.proxy_tuning import ProxyParams, ProxyTuned
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.search import BeamConfig, ChunkConfig, _spread, beam_search, best_of_n, chunk_beam_search, implicit_reward
from rto_jax.types import Prompts, Sequences

WORLD = gold.World(horizon=3)
TABLE, SOLUTION = table_model(WORLD), WORLD.solve()
PI, PI0 = (np.float32(x) for x in (SOLUTION.log_pistar, SOLUTION.log_pi0))
IDS = dict(eos_id=gold.EOS, pad_id=gold.PAD)
_beams = jax.jit(beam_search, static_argnums=0, static_argnames="config")
_chunks = jax.jit(chunk_beam_search, static_argnums=(0, 4), static_argnames="config")

LLAMA = LlamaConfig(vocab_size=12, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16, init_std=0.5)
LM = language_model(LLAMA)
EOS, PAD = 0, 11


@functools.cache
def llama(seed: int):
    return jax.jit(LM.init)(jax.random.key(seed))


def beams(models, params, prompts, weights=(1.0,), penalty=0.0, *, ids=IDS, **config):
    return jax.device_get(_beams(models, params, prompts, weights, length_penalty=penalty, config=BeamConfig(**config), **ids))


def gold_prompts(n: int) -> Prompts:
    tokens = WORLD.prompts(np.random.default_rng(0), n)
    return Prompts(tokens, np.ones(tokens.shape, bool))


def all_answers() -> tuple[np.ndarray, np.ndarray]:
    """Every answer of the shortened world, 1 + 19 + 19²·20 of them."""
    content = range(1, gold.OUTPUTS)
    answers = [(0,), *((a, 0) for a in content), *((a, b, c) for a in content for b in content for c in range(gold.OUTPUTS))]
    tokens = np.full((len(answers), 3), gold.PAD, np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        row[: len(answer)] = answer
    return tokens, tokens != gold.PAD


def sums(table: np.ndarray, prompt: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Of an action table along answers to one prompt, in float64: the oracle."""
    return WORLD._along(table, np.repeat(prompt[None], len(tokens), 0), tokens, mask).sum(1)


@pytest.mark.parametrize(("weights", "penalty"), [((1.0,), 0.0), ((0.5, -0.5), 1.0)], ids=["likelihood", "implicit reward, mean"])
def test_a_beam_as_wide_as_the_tree_is_exhaustive(weights, penalty):
    """381 prefixes of two tokens or fewer: a beam of 400 holds them all, so its answers are the best 400 of 7,240."""
    prompts, (tokens, mask) = gold_prompts(2), all_answers()
    assert len(tokens) == 7240
    models, params = (TABLE, TABLE)[: len(weights)], (PI, PI0)[: len(weights)]
    found = beams(models, params, prompts, weights, penalty, max_new_tokens=3, beams=400)
    table = sum(w * t for w, t in zip(weights, (SOLUTION.log_pistar, SOLUTION.log_pi0), strict=False))
    for row, prompt in enumerate(prompts.tokens):
        scores = sums(table, prompt, tokens, mask) / mask.sum(1) ** penalty
        np.testing.assert_allclose(found.scores[row], -np.sort(-scores)[:400], atol=1e-5)
        theirs = found.sequences.tokens[row, :, 4:], found.sequences.mask[row]
        assert len(np.unique(theirs[0], axis=0)) == 400
        np.testing.assert_allclose(found.scores[row], sums(table, prompt, *theirs) / theirs[1].sum(1) ** penalty, atol=1e-5)
    np.testing.assert_array_equal(found.sequences.tokens[:, :, :4], np.repeat(prompts.tokens[:, None], 400, 1))
    np.testing.assert_array_equal(found.sequences.valid[:, :, 4:], found.sequences.mask)


def test_the_dynamic_programme_finds_what_all_answers_hold():
    tokens, mask = all_answers()
    prompts = gold_prompts(64).tokens
    for table in (SOLUTION.log_pistar, WORLD.rewards):
        best = best_path(WORLD, table)
        for cls in range(16):
            prompt = prompts[WORLD.classes(prompts) == cls][0]
            (found,) = sums(table, prompt, best[0][[cls]], best[1][[cls]])
            assert found == pytest.approx(sums(table, prompt, tokens, mask).max(), abs=1e-9)


def test_verdicts_by_hand():
    """Five beams win against one on both seeds, twenty lose to five on one of two, and answers are shorter."""

    def run(width, seed):
        more = {"over_1": 0.6 + 0.1 * seed, "over_5": 0.4 if seed else 0.6} if width >= 5 else {"over_1": 0.5, "over_5": 0.5}
        return more | {"gold_return": float(width >= 5) * (1 + seed), "length": 20.0 - width}

    policy = {WAYS[way].format(width): [run(width, 0), run(width, 1)] for way in WAYS for width in WIDTHS}
    worse = {label: [figures | {"gold_return": 0.0} for figures in runs] for label, runs in policy.items() if "beam" in label}
    table, control = claims({MIDDLE: policy, "PPO": worse})
    first = next(line for line in table.splitlines() if line.startswith(f"| {MIDDLE}, by log π |"))
    cells = [cell.strip() for cell in first.split("|")[2:-1]]
    assert cells[0] == "yes: 0.650 [0.600, 0.700]" and cells[1] == "1.50 [1.00, 2.00]"
    assert cells[2].startswith("undecided: 0.500") and cells[4] == "no: −15.0 [−15.0, −15.0]"
    assert control.endswith(f"smaller for PPO than for {MIDDLE}: yes, by 1.50 [1.00, 2.00].")


class Markov(NamedTuple):
    """Logits after token s are table[s]."""

    prefill: object
    decode: object


def markov(on_decode=lambda: None):
    def decode(table, token, cache):
        jax.debug.callback(on_decode)
        return table[token], cache

    return Markov(lambda table, tokens, valid, length: (table[tokens[:, -1]], jnp.int32(0)), decode)


START, A, B = 3, 1, 2
# Answers: EOS 0.5, A EOS 0.3, B EOS 0.1, B A EOS 0.1.
CHAIN = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.3, 0.2, 0]])
with np.errstate(divide="ignore"):
    CHAIN = np.log(CHAIN).astype(np.float32)
FROM_START = Prompts(np.full((1, 2), START, np.int32), np.ones((1, 2), bool))


@pytest.mark.parametrize(
    ("width", "penalty", "answers", "scores"),
    [
        (2, 0.0, [[], [A]], [np.log(0.5), np.log(0.3)]),
        (3, 0.0, [[], [A], [B]], np.log([0.5, 0.3, 0.1])),  # B EOS and B A are equally likely: the lower id
        # Of ended answers the first stays while A EOS passes it: log 0.3 / 2 = -0.60 > log 0.5 = -0.69.
        (5, 1.0, [[A], [], [B, A], [B], None], [np.log(0.3) / 2, np.log(0.5), np.log(0.1) / 3, np.log(0.1) / 2, -np.inf]),
    ],
)
def test_ended_answers_and_length_by_hand(width, penalty, answers, scores):
    steps = []
    model = markov(lambda: steps.append(0))
    found = beams((model,), (CHAIN,), FROM_START, (1.0,), penalty, ids=dict(eos_id=EOS, pad_id=PAD), max_new_tokens=9, beams=width)
    jax.effects_barrier()
    said = [list(t[m]) for t, m in zip(found.sequences.tokens[0, :, 2:], found.sequences.mask[0], strict=True)]
    assert said == [[] if answer is None else [*answer, EOS] for answer in answers]
    np.testing.assert_allclose(found.scores[0], scores, atol=1e-6)
    assert (found.sequences.tokens[0, :, 2:] == PAD)[~found.sequences.mask[0]].all()
    assert len(steps) == {2: 1, 3: 1, 5: 2}[width]  # then all have ended


def test_a_token_that_the_proposal_forbids_is_never_taken():
    """By the second model alone (weight 0 on the first): it wants B for ever, the first lets it have one."""
    wants_b = np.where(np.arange(4) == B, 5.0, 0.0).astype(np.float32)[None].repeat(4, 0)
    model = markov()
    found = beams((model, model), (CHAIN, wants_b), FROM_START, (0.0, 1.0), ids=dict(eos_id=EOS, pad_id=PAD), max_new_tokens=5, beams=2)
    tokens, mask = found.sequences.tokens[0, :, 2:], found.sequences.mask[0]
    assert [list(t[m]) for t, m in zip(tokens, mask, strict=True)] == [[EOS], [B, EOS]]
    rest = np.log(np.exp(5.0) + 3)
    np.testing.assert_allclose(found.scores[0], [-rest, 5 - 2 * rest], rtol=1e-5)


def test_top_k_keeps_to_the_first_models_likeliest_tokens():
    """π0 proposes its three likeliest tokens, π* ranks: as exhaustive among 3 + 9 prefixes as a beam of 15 can be."""
    prompts, (tokens, mask) = gold_prompts(2), all_answers()
    found = beams((TABLE, TABLE), (PI0, PI), prompts, (0.0, 1.0), max_new_tokens=3, beams=15, top_k=3)
    for row, prompt in enumerate(prompts.tokens):
        at = np.repeat(prompt[None], len(tokens), 0), tokens, mask
        logits = WORLD.policy_logps(SOLUTION.log_pi0, *at)
        rank = (logits > np.take_along_axis(logits, np.where(mask, tokens, 0)[..., None], 2)).sum(2)
        allowed = (~mask | (rank < 3)).all(1)
        scores = np.sort(sums(SOLUTION.log_pistar, prompt, tokens[allowed], mask[allowed]))[::-1]
        np.testing.assert_allclose(found.scores[row], scores[:15], atol=1e-5)


# ---------------------------------------------------------------------------------------------- a small Llama


def llama_prompts() -> Prompts:
    """Of 6, 4, 3, 1 and no tokens."""
    tokens = np.random.default_rng(1).integers(1, 11, (5, 6)).astype(np.int32)
    return Prompts(tokens, np.arange(6)[None, :] >= np.array([0, 2, 3, 5, 6])[:, None])


@pytest.fixture(scope="module")
def five_beams():
    return beams((LM,), (llama(0),), llama_prompts(), ids=dict(eos_id=EOS, pad_id=PAD), max_new_tokens=6, beams=5)


def flat(rows: Sequences) -> Sequences:
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)


@functools.partial(jax.jit, static_argnums=0)
def logps_of(model, params, rows):
    return model.logps(params, rows.tokens, rows.valid, 6, rows.mask).sum(1)


def test_scores_are_the_likelihoods_of_whole_rows(five_beams):
    """The caches moved with their answers."""
    scores = np.asarray(logps_of(LM, llama(0), flat(five_beams.sequences))).reshape(5, 5)
    np.testing.assert_allclose(five_beams.scores[:4], scores[:4], atol=1e-5)
    assert len({tuple(row) for row in five_beams.sequences.tokens[0, :, 6:]}) == 5
    assert (np.diff(five_beams.scores[:4]) <= 0).all()


def test_a_filler_row_has_no_answer(five_beams):
    assert not five_beams.sequences.mask[4].any()
    np.testing.assert_array_equal(five_beams.scores[4], [0, *[-np.inf] * 4])


def test_rows_and_padding_do_not_matter_and_nothing_compiles_again(five_beams):
    """The same rows elsewhere in another batch, with other ids as padding."""
    tokens, valid = llama_prompts()
    before = _beams._cache_size()
    other = Prompts(np.where(valid, tokens, 7)[[2, 4, 0, 2, 1]], valid[[2, 4, 0, 2, 1]])
    found = beams((LM,), (llama(0),), other, (2.0,), ids=dict(eos_id=EOS, pad_id=PAD), max_new_tokens=6, beams=5)
    for row, same in ((0, 2), (2, 0), (3, 2), (4, 1)):
        np.testing.assert_array_equal(found.sequences.tokens[row, :, 6:], five_beams.sequences.tokens[same, :, 6:])
        np.testing.assert_allclose(found.scores[row], 2 * five_beams.scores[same], rtol=1e-5)
    assert _beams._cache_size() == before


def test_width_one_is_greedy():
    prompts, ids = llama_prompts(), dict(eos_id=EOS, pad_id=PAD)
    found = beams((LM,), (llama(0),), prompts, ids=ids, max_new_tokens=6, beams=1)
    draw = jax.jit(lambda params: sample(LM, params, prompts, jax.random.split(jax.random.key(0), 5), config=SamplingConfig(6, 0.0), **ids))
    greedy, logps = draw(llama(0))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, 0], y), found.sequences, greedy)
    np.testing.assert_allclose(found.scores[:, 0], logps.sum(1), atol=1e-5)


def test_beams_of_a_proxy_tuned_policy():
    """Three caches move together."""
    tuned, params = ProxyTuned(LM, LM), ProxyParams(llama(0), llama(1), llama(2), 0.7)
    found = beams((tuned,), (params,), llama_prompts(), ids=dict(eos_id=EOS, pad_id=PAD), max_new_tokens=4, beams=3)
    scores = np.asarray(logps_of(tuned, params, flat(found.sequences))).reshape(5, 3)
    np.testing.assert_allclose(found.scores[:4], scores[:4], atol=1e-4)


# ---------------------------------------------------------------------------------------------- best of n and chunks


def keys(n: int) -> jax.Array:
    return jax.random.split(jax.random.key(4), n)


def token_sum(values, rows: Sequences):
    """A value of every token, summed."""
    tokens = rows.tokens[:, -rows.mask.shape[1] :]
    return jnp.sum(jnp.where(rows.mask, values[jnp.where(rows.mask, tokens, 0)], 0.0), axis=1)


VALUES = np.random.default_rng(2).normal(size=gold.OUTPUTS).astype(np.float32)


def test_best_of_n_by_a_python_function():
    prompts, seen = gold_prompts(3), []

    def largest_sum(rows):
        seen.append(np.asarray(rows.tokens))
        return np.where(rows.mask, rows.tokens[:, 4:], 0).sum(1)

    found = best_of_n(TABLE, PI0, prompts, keys(3), largest_sum, n=4, config=SamplingConfig(3), **IDS)
    rows = seen[0].reshape(3, 4, -1)
    scores = np.where(rows[:, :, 4:] == gold.PAD, 0, rows[:, :, 4:]).sum(2)
    assert (scores.max(1) > scores.min(1)).all()
    np.testing.assert_array_equal(found.scores, scores)
    np.testing.assert_array_equal(found.chosen, scores.argmax(1))
    np.testing.assert_array_equal(found.sequences.tokens, rows[np.arange(3), scores.argmax(1)])
    assert float(found.kl_bound) == pytest.approx(np.log(4) - 3 / 4)
    more, fewer = (jax.random.key_data(_spread(keys(3), n)).reshape(3, n, -1) for n in (4, 2))
    np.testing.assert_array_equal(more[:, :2], fewer)  # more answers change none


def test_one_beam_of_whole_answers_is_the_best_of_n():
    prompts = gold_prompts(3)
    best = best_of_n(TABLE, PI0, prompts, keys(3), lambda rows: token_sum(VALUES, rows), n=4, config=SamplingConfig(3), **IDS)
    config = ChunkConfig(SamplingConfig(3), beams=1, samples=4, chunk=8)
    found = _chunks(TABLE, PI0, prompts, keys(3), token_sum, VALUES, config=config, **IDS)
    np.testing.assert_array_equal(found.sequences.tokens[:, 0], best.sequences.tokens)
    np.testing.assert_array_equal(found.sequences.mask[:, 0], best.sequences.mask)
    np.testing.assert_allclose(found.scores[:, 0], best.scores.max(1))


def chain_logps(table, rows: Sequences):
    """Σ log π of the chain."""
    tokens = jnp.where(rows.valid, rows.tokens, 0)
    logps = jax.nn.log_softmax(table)[tokens[:, 1:-1], tokens[:, 2:]]
    return jnp.sum(jnp.where(rows.mask, logps, 0.0), axis=1)


def test_chunks_of_one_token_drawn_often_are_a_beam_search():
    """Every token is among 64 draws of a uniform proposal, and copies don't fill the beam."""
    smooth = np.float32([[9, 9, 9, 9], [2, 1.2, 0, -1], [0, 1.1, -1, 0.2], [0.3, 1.3, 1, -2]])
    model, ids = markov(), dict(eos_id=EOS, pad_id=PAD)
    wide = beams((model,), (smooth,), FROM_START, ids=ids, max_new_tokens=4, beams=3)
    config = ChunkConfig(SamplingConfig(4), beams=3, samples=64, chunk=1)
    found = _chunks(model, np.zeros((4, 4), np.float32), FROM_START, keys(1), chain_logps, smooth, config=config, **ids)
    assert len(wide.sequences.mask[0].sum(1)) == 3 and wide.sequences.mask[0].sum() > 3
    jax.tree.map(np.testing.assert_array_equal, found.sequences, wide.sequences)
    np.testing.assert_allclose(found.scores, wide.scores, rtol=1e-5)


def test_chunks_on_a_cache():
    """A prompt's search does not depend on the other rows; T that is no multiple of L; scores are of what came out."""
    config, ids = ChunkConfig(SamplingConfig(5), beams=2, samples=2, chunk=2), dict(eos_id=EOS, pad_id=PAD)
    (tokens, valid), order = llama_prompts(), np.array([3, 0, 4, 1, 1])
    run = lambda prompts, keys: jax.device_get(_chunks(LM, llama(0), prompts, keys, token_sum, VALUES[:12], config=config, **ids))  # noqa: E731
    found, other = run(Prompts(tokens, valid), keys(5)), run(Prompts(tokens[order], valid[order]), keys(5)[order])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[order], y, rtol=1e-4, atol=1e-5), found, other)
    rows = found.sequences
    np.testing.assert_allclose(found.scores, np.where(rows.mask, VALUES[rows.tokens[:, :, 6:]], 0).sum(2), atol=1e-5)
    assert rows.mask.shape == (5, 2, 5) and rows.mask[:4].any(2).all() and not rows.mask[4].any()


def test_implicit_reward_by_hand():
    """0.5·((-1 + 2) + (-3 + 1)) = -0.5; the masked token counts nothing."""
    logps = lambda params, tokens, valid, start, mask, temperature: jnp.where(mask, params[None, :], 0.0)  # noqa: E731
    rows = Sequences(np.ones((1, 5), np.int32), np.ones((1, 5), bool), np.array([[True, True, False]]))
    ours, theirs = np.float32([-1, -3, -7]), np.float32([-2, -1, -9])
    (found,) = implicit_reward(logps, logps, beta=0.5)((ours, theirs), rows)
    assert float(found) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BeamConfig(0), "max_new_tokens must be at least 1, not 0"),
        (lambda: BeamConfig(1, beams=0), "beams must be at least 1, not 0"),
        (lambda: BeamConfig(1, top_k=-1), "top_k must be 0"),
        (lambda: ChunkConfig(SamplingConfig(1), chunk=0), "chunk must be at least 1, not 0"),
    ],
)
def test_bad_configurations(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_weight_for_every_model():
    with pytest.raises(ValueError, match="2 models, 2 parameters, weights"):
        beam_search((TABLE, TABLE), (PI, PI0), gold_prompts(1), (1.0,), config=BeamConfig(3), **IDS)
