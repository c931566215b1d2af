"""Proxy tuning: eq. 14 by hand and against NumPy, as a model that is sampled, and the experiment's arms."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import proxy_tuning, study
from experiments.common import GoldData
from rto_jax.models import LlamaConfig, language_model
from rto_jax.proxy_tuning import ProxyParams, ProxyTuned
from rto_jax.sampling import SamplingConfig, sample
from rto_jax.scoring import response_logps
from rto_jax.types import Prompts

SMALL = LlamaConfig(vocab_size=11, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16, init_std=0.5)
LARGE = dataclasses.replace(SMALL, width=24, layers=2, heads=3)
P, T = 3, 6
draw = jax.jit(sample, static_argnums=0, static_argnames="config")


class Table(NamedTuple):
    """A model whose parameters are logits by the last token; it notes in its cache how many it has read."""

    prefill: object
    decode: object
    logits: object


TABLE = Table(
    lambda table, tokens, valid, cache_length: (table[tokens[:, -1]], jnp.int32(0)),
    lambda table, token, cache: (table[token], cache + 1),
    lambda table, tokens, valid, start: table[tokens[:, start - 1 : -1]],
)
TABLES = ProxyTuned(TABLE, TABLE)


def tables(*rows):
    """Log-probabilities after any token: the same row."""
    return [jnp.log(jnp.tile(jnp.asarray(row, jnp.float32), (len(row), 1))) for row in rows]


def test_the_steered_policy_by_hand():
    """π_base (½, ¼, ¼), π_proxy/π_ref = (½, 1, 4) and α = ½: weights ½/√2, ¼, ½."""
    params = ProxyParams(*tables((0.5, 0.25, 0.25), (0.2, 0.4, 0.4), (0.4, 0.4, 0.1)), 0.5)
    weights = np.array([0.5 / 2**0.5, 0.25, 0.5])
    one, valid = np.zeros((1, 2), np.int32), np.ones((1, 2), bool)
    logits, cache = TABLES.prefill(params, one, valid, 4)
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], weights / weights.sum(), rtol=1e-6)
    logits, cache = TABLES.decode(params, np.array([2], np.int32), cache)
    np.testing.assert_allclose(jax.nn.softmax(logits)[0], weights / weights.sum(), rtol=1e-6)
    assert jax.tree.leaves(cache) == [1, 1, 1]
    np.testing.assert_allclose(TABLES.logps(params, one, valid, 1), [[np.log(weights[0] / weights.sum())]], rtol=1e-5)


def drawn(model, params, seed=0, rows=64):
    prompts = Prompts(np.random.default_rng(seed).integers(1, 3, (rows, P), dtype=np.int32), np.ones((rows, P), bool))
    keys = jax.random.split(jax.random.key(seed), rows)
    return jax.device_get(draw(model, params, prompts, keys, config=SamplingConfig(T), eos_id=0, pad_id=9))


def test_alpha_0_is_the_base_and_on_its_own_reference_1_is_the_proxy():
    rng = np.random.default_rng(0)
    base, proxy, other = (jnp.asarray(rng.normal(size=(3, 3)), jnp.float32) for _ in range(3))
    for params, alone in ((ProxyParams(base, proxy, other, 0.0), base), (ProxyParams(other, proxy, other, 1.0), proxy)):
        (seqs, logps), (own, own_logps) = drawn(TABLES, params), drawn(TABLE, alone)
        np.testing.assert_array_equal(seqs.tokens, own.tokens)
        np.testing.assert_allclose(logps, own_logps, atol=1e-5)
    assert np.any(seqs.tokens != drawn(TABLES, ProxyParams(other, proxy, other, 2.0))[0].tokens)


@functools.cache
def steered():
    """Two architectures, and three sets of weights."""
    small, large = language_model(SMALL), language_model(LARGE)
    keys = jax.random.split(jax.random.key(0), 3)
    weights = [jax.jit(m.init)(key) for m, key in zip((large, small, small), keys, strict=True)]
    return ProxyTuned(large, small), (large, small, small), ProxyParams(*weights, np.float32(0.7))


def test_decoding_with_caches_is_reading_whole_rows_and_eq_14():
    model, parts, params = steered()
    (seqs, logps) = drawn(model, params, rows=8)
    assert len(set(seqs.mask.sum(1))) > 1  # answers of several lengths
    found = jax.device_get(jax.jit(lambda p, s: response_logps(lambda *x: model.logps(*x), p, s))(params, seqs))
    np.testing.assert_allclose(found, logps, atol=2e-5)

    read = [jax.jit(m.logits, static_argnums=3) for m in parts]
    each = [np.asarray(f(w, seqs.tokens, seqs.valid, P), np.float64) for f, w in zip(read, params[:3], strict=True)]
    base, proxy, ref = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in each)
    policy = base * (proxy / ref) ** 0.7
    policy /= policy.sum(-1, keepdims=True)
    chosen = np.take_along_axis(policy, np.where(seqs.mask, seqs.tokens[:, P:], 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, np.where(seqs.mask, np.log(chosen), 0), atol=2e-5)


def test_one_program_serves_every_alpha():
    """And the sampled tokens follow it."""
    model, _, params = steered()
    before = draw._cache_size()
    rows = [drawn(model, params._replace(alpha=np.float32(alpha)), rows=8)[0].tokens for alpha in (0.0, 0.7, 3.0)]
    assert draw._cache_size() <= before + 1
    assert np.any(rows[0] != rows[1]) and np.any(rows[1] != rows[2])


def test_bad_arguments():
    params = ProxyParams(jnp.zeros((4, 4)), jnp.zeros((3, 3)), jnp.zeros((3, 3)), 1.0)
    one, valid = np.zeros((1, 2), np.int32), np.ones((1, 2), bool)
    with pytest.raises(ValueError, match="proxy_logits has shape"):
        TABLES.prefill(params, one, valid, 4)
    with pytest.raises(ValueError, match="alpha must be at least 0, but it is -1"):
        TABLES.logits(ProxyParams(*[jnp.zeros((3, 3))] * 3, -1), one, valid, 1)


# ---------------------------------------------------------------------------------------------- the experiment


def test_arms():
    """The small models are those of every table; the large one's DPO differs from the small one's in its start alone."""
    arms, base = proxy_tuning.arms("gold"), study.base_arms("gold")
    assert arms["small DPO"].folder == base["DPO"].folder and arms["small SFT"].folder == base["SFT"].folder
    assert arms["large DPO"].config == base["DPO"].config and arms["large DPO"].upstream == {"init": arms["large SFT"]}
    assert vars(arms["large SFT"].config) == vars(base["SFT"].config)


def fixture(shares: dict[str, float], steer: float) -> dict:
    row = lambda share: {"gold_return": 4 * share, "kl": 2.0, "J": share, "share": share, "length": 18.0}  # noqa: E731
    sweep = [[row(steer + 0.1 * seed + alpha) for alpha in proxy_tuning.ALPHAS] for seed in range(2)]
    arms = {name: [row(share + 0.1 * seed) for seed in range(2)] for name, share in shares.items()}
    return {"alphas": list(proxy_tuning.ALPHAS), "arms": arms, "steered": {name: sweep for name in proxy_tuning.BASES}}


def test_drawing_says_who_is_ahead(tmp_path):
    """Steered at α = 1: 0.5, 0.6; the large model 0 to 1: half of the gain is emulated."""
    found = fixture({"small SFT": 0.0, "small DPO": 0.3, "large SFT": 0.0, "large DPO": 1.0}, -0.5)
    text = proxy_tuning.draw(found, tmp_path)
    assert "- below large DPO: −0.500" in text and "- above small DPO: 0.200" in text and "has 0.50 [0.50, 0.50] of" in text
    assert "| small pair on large SFT, α = 0.25 |" in text and (tmp_path / "gold.svg").exists()


@pytest.mark.slow
def test_steering_trained_models(tmp_path):
    """α = 0 is the large SFT model and, on the small one, α = 1 the small DPO model: the stages' own figures."""
    tiny = dict(gold=GoldData(examples=512, pairs=256, test_pairs=64, rollouts=64), batch_size=32, eval_size=64, steps=6)
    arms = {name: arm.changed(**tiny) for name, arm in proxy_tuning.arms("gold").items()}
    arms["small DPO"] = arms["small DPO"].after(init=arms["small SFT"])
    arms["large DPO"] = arms["large DPO"].after(init=arms["large SFT"])
    for arm in study.in_order(arms.values()):
        study.run_arm(arm, tmp_path, 1, "")
    found = study.runs(arms, tmp_path, 1)
    for name, alpha, same in (("large SFT", 0.0, "large SFT"), ("small SFT", 1.0, "small DPO")):
        (row,) = proxy_tuning.steered(arms, tmp_path, 1, name, (alpha,))
        assert row == pytest.approx(found[same][0], abs=1e-4)
