"""--loss of experiments.dpo: each is the library's loss on log-probabilities of whole logits, in every form of a batch."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import dpo
from experiments.common import GoldData, main
from rto_jax import losses, programs
from rto_jax import steps as S
from rto_jax.models import SIZES, LlamaConfig, LoraConfig, init_adapters, language_model
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, make_mesh, put_batch, put_params
from rto_jax.train_state import new_state, over
from rto_jax.types import Pairs, Sequences
from tests.test_linear import largest
from tests.test_packing import CONFIG, MODEL, PAIRS, N, P, close, packed, params_of

BETA = 0.3
NUMBERS = {
    "dpo": {"label_smoothing": 0.1}, "ipo": {}, "hinge": {}, "kto": {}, "r_dpo": {"alpha": 0.2}, "tdpo1": {},
    "tdpo2": {"alpha": 0.7}, "simpo": {"gamma": 0.4}, "orpo": {}, "cpo": {"label_smoothing": 0.1, "alpha": 0.6},
}  # fmt: skip
SCORED = ("dpo", "ipo", "hinge", "kto", "r_dpo")  # whose reference a program of its own has read
EXPECTED = {
    "dpo": lambda own, ref, kl, size: losses.dpo_loss(*own, *ref, beta=BETA, label_smoothing=0.1),
    "ipo": lambda own, ref, kl, size: losses.ipo_loss(*own, *ref, beta=BETA),
    "hinge": lambda own, ref, kl, size: losses.hinge_loss(*own, *ref, beta=BETA),
    "kto": lambda own, ref, kl, size: losses.kto_pair_loss(*own, *ref, beta=BETA),
    "r_dpo": lambda own, ref, kl, size: losses.r_dpo_loss(*own, *ref, *size, beta=BETA, alpha=0.2),
    "tdpo1": lambda own, ref, kl, size: losses.tdpo_loss(*own, *ref, *kl, beta=BETA, variant=1),
    "tdpo2": lambda own, ref, kl, size: losses.tdpo_loss(*own, *ref, *kl, beta=BETA, alpha=0.7),
    "simpo": lambda own, ref, kl, size: losses.simpo_loss(*own, *size, beta=BETA, gamma=0.4),
    "orpo": lambda own, ref, kl, size: losses.orpo_loss(*own, *size, lam=BETA),
    "cpo": lambda own, ref, kl, size: losses.cpo_loss(
        *own, size[0], beta=BETA, label_smoothing=0.1, nll_weight=0.6
    ),
}


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def reference_of(params):
    return jax.tree.map(lambda x: np.float32(1.2) * np.asarray(x), params)


def noise_like(tree):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


logits = jax.jit(lambda model, params, rows: model.logits(params, rows.tokens, rows.valid, P), static_argnums=0)


def whole_logits(model, params, reference):
    """Sums over each answer of log pi, log pi_ref and KL(pi_ref, pi), and its tokens: NumPy, float64, a row an answer."""
    both = jax.tree.map(lambda *x: np.concatenate(x), *PAIRS)
    own, ref = (np.asarray(logits(*x, both), np.float64) for x in ((model, params), (MODEL, reference)))
    own, ref = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (own, ref))

    def sums(x):
        totals = np.where(both.mask, x, 0).sum(1).astype(np.float32)
        return totals[:N], totals[N:]

    def of_tokens(x):
        return np.take_along_axis(x, both.tokens[:, P:, None], 2)[..., 0]

    return sums(of_tokens(own)), sums(of_tokens(ref)), sums((np.exp(ref) * (ref - own)).sum(-1)), sums(1.0)


@functools.cache
def oracle():
    params = params_of("dpo")
    return whole_logits(MODEL, params, reference_of(params))


def objective_of(loss, logps=MODEL.logps, statistics=MODEL.statistics):
    model_fn = statistics if loss.startswith("tdpo") else logps
    return S.dpo_objective(model_fn, beta=BETA, loss=loss, **NUMBERS[loss])


@jax.jit
def every_loss(params, reference, pairs, reference_sums):
    """The metrics of all losses, of one pass of each model."""
    kept = {}

    def once(function):
        def call(*arguments, **more):
            if function not in kept:
                kept[function] = function(*arguments, **more)
            return kept[function]

        return call

    found = {}
    for loss in NUMBERS:
        batch = S.PairsWithReference(pairs, *reference_sums) if loss in SCORED else pairs
        weights = params | {"reference": reference} if loss.startswith("tdpo") else params
        objective = objective_of(loss, once(MODEL.logps), once(MODEL.statistics))
        found[loss] = {name: total / n for name, (total, n) in objective(weights, batch).items()}
    return found


def losses_of(params, pairs=PAIRS, reference_sums=None):
    sums = oracle()[1] if reference_sums is None else reference_sums
    return every_loss(params, reference_of(params_of("dpo")), pairs, sums)


@functools.cache
def found():
    return losses_of(params_of("dpo"))


@pytest.mark.parametrize("loss", NUMBERS)
def test_a_loss_is_the_librarys_on_whole_logits(loss):
    """Rows of unequal length, an answer without tokens, and tokens that are no actions."""
    np.testing.assert_allclose(found()[loss]["loss"], np.mean(EXPECTED[loss](*oracle())), rtol=2e-5)


def test_the_table_is_tested():
    assert set(NUMBERS) == set(S.PAIR_LOSSES)
    assert {name for name, loss in S.PAIR_LOSSES.items() if "reference" in loss.reads} == set(SCORED)
    assert len({float(metrics["loss"]) for metrics in found().values()}) == len(NUMBERS)


@pytest.mark.parametrize("loss", NUMBERS)
def test_logged_rewards(loss):
    """beta·log pi/pi_ref; without a reference beta·log pi, of the mean token for SimPO and ORPO."""
    own, ref, _, size = oracle()
    scale = [np.maximum(x, 1) for x in size] if loss in ("simpo", "orpo") else (1, 1)
    ref = (0, 0) if loss in ("simpo", "orpo", "cpo") else ref
    chosen, rejected = (BETA * (own[i] - ref[i]) / scale[i] for i in range(2))
    want = {"chosen_reward": chosen, "rejected_reward": rejected, "accuracy": chosen > rejected}
    for name, values in want.items():
        np.testing.assert_allclose(found()[loss][name], np.mean(values), rtol=2e-5, atol=1e-6)


def other_padding(pairs: Pairs) -> Pairs:
    return Pairs(*(x._replace(tokens=np.where(x.valid, x.tokens, 7)) for x in pairs))


def test_padding_changes_nothing():
    chex.assert_trees_all_close(losses_of(params_of("dpo"), other_padding(PAIRS)), found(), rtol=1e-6)


def test_packed_rows_are_one_pair_a_row():
    """For all but KTO, whose reference points are means over the batch; the stage refuses that one."""
    arrangement, batch = packed(PAIRS, 24)
    assert 1 < arrangement.count < N and arrangement.most > 1
    sums = np.zeros((2, *batch.chosen.shape), np.float32)
    for row, records in enumerate(arrangement.groups):
        sums[:, row, : len(records)] = np.stack(oracle()[1])[:, records]
    in_rows = losses_of(params_of("dpo"), batch, sums)
    for loss in set(NUMBERS) - {"kto"}:
        close(in_rows[loss], found()[loss])


def test_the_base_of_adapters_is_the_reference():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    model, base = language_model(config), params_of("dpo")
    adapters = noise_like(jax.eval_shape(lambda key: init_adapters(config, key), jax.random.key(0)))
    own, ref, kl, _ = whole_logits(model, over(base, adapters), base)
    assert np.min(np.concatenate(kl)[np.concatenate(kl) != 0]) > 1e-2
    options = (("loss", "tdpo2"), ("beta", BETA), ("alpha", 0.7))
    objective = jax.jit(programs.objective("dpo", config, "lm", options))
    total, count = objective(over(base, adapters), PAIRS)["loss"]
    np.testing.assert_allclose(total / count, np.mean(EXPECTED["tdpo2"](own, ref, kl, None)), rtol=2e-5)
    with pytest.raises(ValueError, match="there is no reference"):
        objective_of("tdpo2")(base, PAIRS)


gradients = jax.jit(S.value_and_grads, static_argnums=0, static_argnames="micro_batches")


def objective_and_batch(loss):
    inner, reference = objective_of(loss), {"reference": reference_of(params_of("dpo"))}
    objective = lambda params, batch: inner(over(reference if loss[0] == "t" else None, params), batch)  # noqa: E731
    return objective, S.PairsWithReference(PAIRS, *map(jnp.asarray, oracle()[1])) if loss in SCORED else PAIRS


@pytest.mark.slow
@pytest.mark.parametrize("loss", [name for name in NUMBERS if name != "kto"])
def test_micro_batches_are_one_batch(loss):
    objective, batch = objective_and_batch(loss)
    whole = gradients(objective, params_of("dpo"), batch)
    parts = gradients(objective, params_of("dpo"), batch, micro_batches=2)
    chex.assert_trees_all_close(parts, whole, rtol=2e-5, atol=1e-5)  # IPO's gradients are 3 and more


@pytest.mark.parametrize("loss", ["tdpo1", *slow("simpo", "r_dpo", "cpo", "orpo", "ipo")])
def test_gradients_are_slopes(loss):
    """In two micro-batches: the loss of one, and its difference quotient along a random direction."""
    params = params_of("dpo")
    objective, batch = objective_and_batch(loss)
    metrics, grads = gradients(objective, params, batch, micro_batches=2)
    close(metrics, found()[loss])
    params, grads = jax.device_get((params, grads))
    way = noise_like(params)
    high, low = (losses_of(jax.tree.map(lambda x, d, s=s: x + s * d, params, way)) for s in (2e-3, -2e-3))
    slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (grads, way)), strict=True))
    np.testing.assert_allclose((high[loss]["loss"] - low[loss]["loss"]) / np.float32(4e-3), slope, rtol=2e-2)


def test_a_step_of_tdpo_builds_no_logits():
    """Not of the policy, and not of the reference."""
    config = LlamaConfig(
        vocab_size=5 * 4096, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_width=8, attention="xla"
    )
    rows, answer = 4, 16
    whole = np.ones((rows, 3 + answer), bool)
    side = Sequences(whole.astype(np.int32), whole, whole[:, 3:])
    params = jax.eval_shape(language_model(config).init, jax.random.key(0))
    state = jax.eval_shape(lambda p: new_state(p, optax.sgd(1e-3)), params)
    objective = programs.objective("dpo", config, "lm", (("loss", "tdpo2"), ("beta", 0.1), ("alpha", 0.5)))
    step = jax.jit(S.make_step(objective, optax.sgd(1e-3)))
    program = step.lower(state, Pairs(side, side), {"reference": params}).compile()
    assert config.vocab_size * config.width < largest(program) < rows * answer * config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["tdpo2", "simpo", "kto"])
def test_steps_are_the_same_on_every_mesh(loss):
    options = (("loss", loss), ("beta", BETA), *NUMBERS[loss].items())
    optim, size, results = OptimConfig(learning_rate=1e-2, warmup=0.0), SIZES["gold"], []
    rng = np.random.default_rng(0)
    valid = np.arange(12) < rng.integers(5, 13, (16, 1))
    prompt = rng.integers(0, 20, (16, 4))
    sides = [np.concatenate([prompt, rng.integers(0, 20, (16, 8))], 1).astype(np.int32) for _ in range(2)]
    pairs = Pairs(*(Sequences(tokens, valid, valid[:, 4:]) for tokens in sides))
    for mesh in (make_mesh(MeshConfig(1), jax.devices()[:1]), make_mesh(MeshConfig(2, 2, 2))):
        params, reference = (put_params(language_model(size).init(jax.random.key(i)), mesh) for i in range(2))
        batch = put_batch(pairs, mesh)
        if loss == "kto":
            batch = S.PairsWithReference(batch, *programs.pair_logps(size, mesh)(reference, batch))
        state = programs.start(size, "lm", optim, 10, mesh)(params)
        step = programs.supervised_step("dpo", size, "lm", optim, 10, 1, mesh, options)
        base = {"reference": reference} if loss == "tdpo2" else None
        state, metrics = step(state, batch, base)
        results.append((jax.device_get(metrics), jax.device_get(state.params)))
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=2e-5, atol=1e-6)
    chex.assert_trees_all_close(results[0][1], results[1][1], atol=1e-3)  # Adam's first step is 1e-2 everywhere


# ------------------------------------------------------------------------------------------------ the stage

START = {"dpo": math.log(2), "ipo": 1.0, "hinge": 1.0, "kto": 0.5, "tdpo1": math.log(2), "tdpo2": math.log(2)}
KEYS = {"accuracy", "se", "n", "log_ratio_accuracy", "ceiling"}
FLAGS = {"alpha": 0.3, "gamma": 0.3, "label_smoothing": 0.0}


def config_of(loss: str, **changes) -> dpo.DpoConfig:
    numbers = {name: FLAGS[name] for name in S.PAIR_LOSSES[loss].takes}
    return dataclasses.replace(dpo.PRESETS["gold"][1], loss=loss, **numbers, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("loss", NUMBERS)
def test_the_stage_trains_it(loss, tmp_path, monkeypatch):
    """The first loss is known where policy and reference are one; every loss leaves the same figures."""
    out = tmp_path / loss
    small = GoldData(examples=512, pairs=256, test_pairs=64, rollouts=64)
    few = dict(steps=3, batch_size=32, eval_size=64, gold=small)
    monkeypatch.setattr(dpo, "make_mesh", lambda _: make_mesh(MeshConfig(1), jax.devices()[:1]))  # less to compile
    figures = dpo.run(config_of(loss, init="gold", out=str(out), **few))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(np.isfinite([line["loss"], line["grad_norm"]]).all() for line in lines)
    if loss in START:
        assert lines[0]["loss"] == pytest.approx(START[loss], rel=1e-4)
    assert figures["test"].keys() == KEYS and {"gold_return", "kl", "J", "share", "length"} <= figures.keys()
    if S.PAIR_LOSSES[loss].has_reference:
        assert figures["test"]["accuracy"] == figures["test"]["log_ratio_accuracy"]
    assert json.loads((out / "results.json").read_text()) == figures and (out / "heatmap.json").exists()


MANY = dict(pack=64, micro_batches=2, lora=LoraConfig(rank=2), frozen_dtype="int8")


@pytest.mark.parametrize(
    ("loss", "changes"),
    [("tdpo2", {}), ("simpo", {}), ("tdpo1", MANY)]
    + [pytest.param(name, {}, marks=pytest.mark.slow) for name in NUMBERS if name not in ("tdpo2", "simpo")]
    + [pytest.param(name, MANY, marks=pytest.mark.slow) for name in ("simpo", "r_dpo")],
)
def test_a_dry_run_holds_the_reference_that_the_loss_reads(loss, changes, capsys):
    dpo.run(config_of(loss, dry_run=True, **changes))
    printed = capsys.readouterr().out
    held = "base" if changes else None if loss in ("simpo", "orpo", "cpo") else "reference"
    assert [name for name in ("base", "reference") if f"  {name}: " in printed] == [held] * bool(held)
    assert "margin" in printed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss r_dpo", ["--loss r_dpo needs --alpha"]),
        ("--loss simpo", ["--loss simpo needs --gamma"]),
        ("--loss tdpo2 --alpha -1", ["--alpha must be at least 0"]),
        ("--alpha 0.1", ["--alpha 0.1 has no effect", "--loss dpo"]),
        ("--loss tdpo1 --alpha 0.1", ["--alpha 0.1 has no effect"]),
        ("--loss ipo --label-smoothing 0.1", ["--label-smoothing 0.1 has no effect"]),
        ("--label-smoothing 0.6", ["--label-smoothing must be at least 0 and at most 0.5, not 0.6"]),
        ("--loss kto --micro-batches 2", ["--micro-batches 1"]),
        ("--loss kto --pack 64", ["--pack 0"]),
        ("--beta 0", ["--beta must be positive"]),
    ],
)
def test_numbers_that_do_not_belong_to_the_loss_end_in_one_sentence(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(dpo.PRESETS, dpo.run, dpo.__doc__, ["--out", str(tmp_path / "new"), *flags.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
