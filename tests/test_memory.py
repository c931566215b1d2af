"""The memory levers change what is kept, not what is learnt: remat, dtypes, the host's memory, adapters, frozen weights."""

import dataclasses
import functools
import json
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments import dpo, reward_model, rto
from experiments import sft as sft_stage
from experiments.common import main, open_model
from experiments.dry_run import kept_activations
from experiments.rl import load_fixed
from rto_jax import programs
from rto_jax import steps as S
from rto_jax.errors import UserError
from rto_jax.models import (
    FROZEN,
    REMAT,
    SIZES,
    LlamaConfig,
    LoraConfig,
    freeze,
    init_adapters,
    language_model,
    merge,
    rescaled,
    thaw,
    with_head,
)
from rto_jax.optim import OptimConfig, make_optimizer
from rto_jax.sharding import HOST, MeshConfig, in_host_memory, make_mesh, put_batch, put_params, spec
from rto_jax.train_state import TrainState, apply_gradients, new_state, over
from rto_jax.types import Experience, Pairs, Sequences

CONFIG = LlamaConfig(
    vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=20, rope_base=100.0, init_std=0.3,
    tied_embeddings=False,
)  # fmt: skip
LORA = dataclasses.replace(CONFIG, lora=LoraConfig(rank=3, alpha=6.0))
OPTIM = OptimConfig(learning_rate=1e-2, warmup=0.0)
START, T, N = 5, 4, 8


def rows(seed=0) -> Sequences:
    rng = np.random.default_rng(seed)
    index = np.arange(START + T)
    left, right = rng.integers(1, START + 1, (N, 1)), rng.integers(1, T + 1, (N, 1))
    valid = (index >= START - left) & (index < START + right)
    return Sequences(rng.integers(0, 24, valid.shape).astype(np.int32), valid, valid[:, START:])


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def params_of(head="lm"):
    return jax.jit(programs.init_fn(CONFIG, head))(jax.random.key(0))


def sft(config):
    return S.sft_objective(language_model(config).logps)


gradients = jax.jit(S.value_and_grads, static_argnums=0)


# ------------------------------------------------------------------------------------------------ remat


@pytest.mark.parametrize("policy", [slow("full"), slow("attention"), slow("dots"), "offload"])
def test_remat_changes_no_number(policy):
    found = gradients(sft(dataclasses.replace(CONFIG, remat=policy)), params_of(), rows())
    chex.assert_trees_all_close(found, gradients(sft(CONFIG), params_of(), rows()), rtol=1e-5, atol=1e-6)


def test_what_each_policy_keeps():
    """Bytes kept for the backward pass, counted by hand where the policy names them."""
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    kept = {
        name: kept_activations(sft(dataclasses.replace(CONFIG, remat=name)), params_of(), rows(), mesh)
        for name in REMAT
    }
    device = {name: found["float32"] for name, found in kept.items()}
    assert device["offload"] < device["full"] < device["attention"] < device["dots"] < device["none"]
    tokens, layers = N * (START + T), CONFIG.layers
    residual, attended = (4 * layers * tokens * width for width in (CONFIG.width, CONFIG.heads * CONFIG.head_dim))
    assert device["attention"] - device["full"] == attended
    assert kept["offload"]["float32 on the host"] == residual + attended
    assert device["full"] - device["offload"] == residual
    assert not any("host" in dtype for name in REMAT if name != "offload" for dtype in kept[name])


@pytest.mark.slow
def test_full_takes_less_of_the_compiler_too():
    """Temporary bytes of a compiled step, with enough layers that activations count."""
    deep = dataclasses.replace(CONFIG, layers=24)
    params = jax.eval_shape(language_model(deep).init, jax.random.key(0))

    def temporaries(remat):
        step = functools.partial(S.value_and_grads, sft(dataclasses.replace(deep, remat=remat)))
        return jax.jit(step).lower(params, rows()).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.6 * temporaries("none")


def test_an_unknown_policy():
    with pytest.raises(UserError, match="remat must be one of none, full, attention, dots, offload, not 'half'"):
        dataclasses.replace(CONFIG, remat="half")


# ------------------------------------------------------------------------------------------------ dtypes of the state


def moments_of(state):
    return [x for x in jax.tree.leaves(state) if x.ndim]


def test_bfloat16_moments_are_near_float32s():
    """Half the bytes; ten updates differ by a few times bfloat16's rounding of each, and the arithmetic is float32."""
    params = {"norm": {"scale": jnp.linspace(0.5, 1.5, 64)}}
    grads = jax.random.normal(jax.random.key(0), (10, 64)) + 0.5
    ends = {}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(dataclasses.replace(OPTIM, moments=dtype), 10)
        turn = lambda state, g, optimizer=optimizer: (apply_gradients(state, {"norm": {"scale": g}}, optimizer), None)  # noqa: E731
        state = jax.lax.scan(turn, new_state(params, optimizer), grads)[0]
        assert {x.dtype for x in moments_of(state.opt_state)} == {jnp.dtype(dtype)}
        ends[dtype] = np.asarray(state.params["norm"]["scale"] - params["norm"]["scale"])
    assert state.params["norm"]["scale"].dtype == jnp.float32
    gap = np.abs(ends["bfloat16"] - ends["float32"]).max() / np.abs(ends["float32"]).max()
    assert 0 < gap < 10 * 2**-8
    with pytest.raises(
        UserError, match=r"moments bfloat16 cannot decay by b1 0.9 and b2 0.999: both must be at most 0.996"
    ):
        OptimConfig(moments="bfloat16", b2=0.999)


def test_bfloat16_moments_can_fall():
    """At the largest b2 that is allowed the second moment of gradients that end falls to nearly nothing."""
    optimizer = make_optimizer(OptimConfig(moments="bfloat16", b2=0.996, max_grad_norm=1e9), 10)
    params = {"norm": {"scale": jnp.ones(256)}}
    state = optimizer.init(params)

    def turn(state, size):
        return optimizer.update({"norm": {"scale": jnp.linspace(1.0, 2.0, 256) * size}}, state, params)[1], None

    full = jax.lax.scan(turn, state, jnp.ones(400))[0]
    second = lambda x: next(a.nu for a in jax.tree.leaves(x, is_leaf=lambda n: hasattr(n, "nu")) if hasattr(a, "nu"))  # noqa: E731
    after = second(jax.lax.scan(turn, full, jnp.zeros(1500))[0])["norm"]["scale"].astype(jnp.float32)
    before = second(full)["norm"]["scale"].astype(jnp.float32)
    assert (before > 0.5).all() and (after < 0.1 * before).all()


def sgd(update):
    """An optimiser whose every update is `update`."""
    return optax.GradientTransformation(lambda params: (), lambda grads, state, params: (update, state))


def test_bfloat16_parameters_are_rounded_at_random_with_the_right_mean():
    """An update of 5 % of a step between neighbours, lost by rounding to the nearest, is there on average over steps."""
    values = jnp.array([1.0, -1.0, 0.011, -7.3, 300.0], jnp.bfloat16)
    exact = values.astype(jnp.float32)
    size = exact * 2**-8 / 20 * jnp.array([1, -1, 1, 1, -1.0])
    nearest = (exact + size).astype(jnp.bfloat16)
    np.testing.assert_array_equal(nearest, values)  # what would be lost

    def after(number):
        return apply_gradients(TrainState(number, {"w": values}, ()), {"w": size}, sgd({"w": size})).params["w"]

    draws = jax.jit(jax.vmap(after))(jnp.arange(20_000))
    assert draws.dtype == jnp.bfloat16
    draws = np.asarray(draws, np.float64)
    for column, value, want in zip(draws.T, np.asarray(exact), np.asarray(exact + size, np.float64), strict=True):
        assert set(map(float, np.unique(column))) - {float(value)} and len(np.unique(column)) == 2
        np.testing.assert_allclose(column.mean(), want, atol=4.5 * column.std() / len(column) ** 0.5)
    still = apply_gradients(TrainState(jnp.int32(3), {"w": values}, ()), {"w": size}, sgd({"w": jnp.zeros(5)}))
    np.testing.assert_array_equal(still.params["w"], values)  # no update, no change
    # Two parameters of one step are rounded by numbers of their own.
    twin = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    half = {name: jnp.full(4096, 2**-8) for name in twin}
    both = apply_gradients(TrainState(jnp.int32(0), twin, ()), half, sgd(half)).params
    assert 0.45 < (both["a"] == both["b"]).mean() < 0.55


def test_small_learning_rates_train_bfloat16_parameters():
    """200 updates of 1e-4 on weights of one: each below half a step (2^-9), together 0.02, found within 10 %."""
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-4, warmup=0.0, final=1.0), 200)
    state = new_state({"w": jnp.ones(4096, jnp.bfloat16)}, optimizer)
    turn = lambda state, _: (apply_gradients(state, {"w": jnp.ones(4096, jnp.bfloat16)}, optimizer), None)  # noqa: E731
    end = jax.lax.scan(turn, state, None, length=200)[0]
    assert end.params["w"].dtype == jnp.bfloat16 and {x.dtype for x in moments_of(end.opt_state)} == {
        jnp.dtype("float32")
    }
    np.testing.assert_allclose(1 - end.params["w"].astype(jnp.float32).mean(), 0.02, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_bfloat16_gradients(micro_batches):
    """In a bfloat16 model the kernels' gradients were bfloat16 inside anyway: equal to float32 ones, rounded once."""
    objective = sft(dataclasses.replace(CONFIG, dtype="bfloat16"))
    run = jax.jit(functools.partial(S.value_and_grads, objective, micro_batches=micro_batches))
    loss, found = run(S.cast_kernels(params_of(), "bfloat16"), rows())
    plain, want = run(params_of(), rows())
    np.testing.assert_allclose(loss["loss"], plain["loss"], rtol=1e-6)
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    chex.assert_trees_all_close(found, want, rtol=2**-7, atol=2**-8 * 0.02)


def test_gradients_dtype_is_the_kernels_alone():
    """Embeddings, norms and what is trained stay float32."""
    objective = sft(dataclasses.replace(CONFIG, dtype="bfloat16"))
    run = functools.partial(S.value_and_grads, objective)
    _, found = jax.eval_shape(
        run, jax.eval_shape(lambda params: S.cast_kernels(params, "bfloat16"), params_of()), rows()
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        inside = name.startswith("layers/") and name.endswith("kernel")
        assert leaf.dtype == (jnp.bfloat16 if inside else jnp.float32), name
    optimizer = make_optimizer(OPTIM, 10)
    state = jax.eval_shape(lambda params: new_state(params, optimizer), params_of())
    state, _ = jax.eval_shape(S.make_step(objective, optimizer, gradients="bfloat16"), state, rows())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


# ------------------------------------------------------------------------------------------------ the host's memory


@pytest.mark.parametrize("shape", [(1, 1, 1), slow((2, 2, 2))])
def test_moments_in_the_hosts_memory_train_the_same(shape):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    ends = {}
    for offload in (False, True):
        optim = dataclasses.replace(OPTIM, offload=offload)
        state = programs.start(CONFIG, "lm", optim, 10, mesh)(put_params(params_of(), mesh))
        step = programs.supervised_step("sft", CONFIG, "lm", optim, 10, 1, mesh)
        for number in range(2):
            state, _ = step(state, put_batch(rows(number), mesh))
        kinds = {x.sharding.memory_kind for x in moments_of(state.opt_state)}
        assert kinds == ({HOST} if offload else {"device"})
        assert {x.sharding.memory_kind for x in jax.tree.leaves(state.params)} == {"device"}
        ends[offload] = jax.device_get((state.params, moments_of(state.opt_state)))
    chex.assert_trees_all_close(ends[True], ends[False], rtol=1e-6, atol=1e-7)


def test_counters_stay_on_the_device():
    optim = OptimConfig(offload=True)
    state = programs.abstract_state(CONFIG, "lm", optim, 10, make_mesh(MeshConfig(2, 2, 2)))
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.sharding.memory_kind == (HOST if leaf.ndim else "device")
    assert in_host_memory(state.step).sharding.memory_kind == "device"


# ------------------------------------------------------------------------------------------------ adapters


def adapters_of(config=LORA, seed=1):
    """Adapters as after some training: B is not 0."""
    made = jax.jit(functools.partial(init_adapters, config))(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x if x.any() else jnp.asarray(noise.normal(0, 0.3, x.shape), x.dtype), made)


_logps = jax.jit(lambda config, *args: language_model(config).logps(*args), static_argnums=(0, 4))
_merge = jax.jit(merge, static_argnums=0)
_freeze = jax.jit(freeze, static_argnums=1)


def logps(config, params):
    seqs = rows()
    return _logps(config, params, seqs.tokens, seqs.valid, START, seqs.mask)


def test_new_adapters_change_nothing():
    made = jax.jit(functools.partial(init_adapters, LORA))(jax.random.key(1))
    np.testing.assert_array_equal(logps(LORA, over(params_of(), made)), logps(CONFIG, params_of()))
    assert not np.allclose(logps(LORA, over(params_of(), adapters_of())), logps(CONFIG, params_of()), atol=0.1)


def test_adapters_are_their_sum_with_the_weights():
    """Log-probabilities of `base | adapters` are those of `merge`, and by hand W + alpha/rank · A·B; gradients likewise."""
    adapters = adapters_of()
    both = over(params_of(), adapters)
    merged = _merge(LORA, both)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, params_of())
    a, b = (np.asarray(adapters["lora"]["layers"]["attn"]["o"][x], np.float64) for x in "ab")
    want = np.asarray(params_of()["layers"]["attn"]["o"]["kernel"]) + 2.0 * np.einsum("lhdr,lrw->lhdw", a, b)
    np.testing.assert_allclose(merged["layers"]["attn"]["o"]["kernel"], want, atol=1e-5)
    np.testing.assert_allclose(logps(LORA, both), logps(CONFIG, merged), atol=2e-5)
    found = gradients(lora_sft, adapters, rows())
    chex.assert_trees_all_close(found, gradients(merged_sft, adapters, rows()), rtol=2e-4, atol=2e-6)
    assert set(found[1]) == {"lora"}


def lora_sft(adapters, batch):
    return sft(LORA)(over(params_of(), adapters), batch)


def merged_sft(adapters, batch):
    return sft(CONFIG)(merge(LORA, over(params_of(), adapters)), batch)


def test_some_projections_only():
    config = dataclasses.replace(LORA, lora=LoraConfig(rank=2, targets=("q", "down")))
    made = init_adapters(config, jax.random.key(0))["lora"]["layers"]
    assert {(group, name) for group in made for name in made[group]} == {("attn", "q"), ("mlp", "down")}
    shapes = jax.tree.map(lambda x: x.shape, made)
    assert shapes["attn"]["q"] == {"a": (2, 16, 2), "b": (2, 2, 4, 6)} and shapes["mlp"]["down"]["a"] == (2, 20, 2)
    both = over(params_of(), adapters_of(config))
    np.testing.assert_allclose(logps(config, both), logps(CONFIG, _merge(config, both)), atol=2e-5)


def test_another_alpha_is_another_scale():
    adapters = adapters_of()
    other = dataclasses.replace(LORA, lora=LoraConfig(rank=3, alpha=1.5))
    ratio = other.lora.scale / LORA.lora.scale
    again = rescaled(adapters, ratio)
    np.testing.assert_allclose(
        logps(other, over(params_of(), again)), logps(LORA, over(params_of(), adapters)), atol=2e-5
    )
    assert rescaled(adapters, 1) is adapters
    head = with_head(adapters, LORA, jax.random.key(0), "last")
    assert rescaled(head, 4.0)["head"] == head["head"]  # the unit of scores stays


def batch_of(kind):
    first, second = rows(0), rows(1)
    second = Sequences(np.concatenate([first.tokens[:, :START], second.tokens[:, START:]], 1),
                       np.concatenate([first.valid[:, :START], second.valid[:, START:]], 1), second.mask)  # fmt: skip
    rng = np.random.default_rng(0)
    sums, numbers = rng.normal(-9, 1, (2, N)), rng.normal(size=(4, N, T))
    return {
        "sft": first,
        "reward": Pairs(first, second),
        "dpo": S.PairsWithReference(Pairs(first, second), *jnp.asarray(sums, jnp.float32)),
    }.get(kind, Experience(first, *jnp.asarray(numbers, jnp.float32)))


OPTIONS = {"dpo": (("beta", 0.1),), "policy": (("clip", 0.2),), "value": (("clip", 0.2),)}


@pytest.mark.parametrize("kind", [slow("sft"), slow("reward"), slow("dpo"), slow("policy"), slow("value")])
def test_every_stage_trains_adapters_over_a_frozen_base(kind):
    """In 8 bits: the adapters and a scalar head move, nothing else is in the state, and the loss is that of the whole."""
    head = "last" if kind in ("reward", "value") else "lm"
    base = _freeze({name: tree for name, tree in params_of(head).items() if name != "head"}, "int8")
    trained = jax.jit(programs.trained_fn(LORA, head))(jax.random.key(2))
    assert set(trained) == ({"lora"} if head == "lm" else {"lora", "head"})
    step = programs.pure_step(kind, LORA, head, OPTIM, 10, 1, OPTIONS.get(kind, ()))
    objective = programs.objective(kind, LORA, head, OPTIONS.get(kind, ()))

    @jax.jit
    def both(trained, batch, base):
        found = step(new_state(trained, make_optimizer(OPTIM, 10)), batch, base)
        return *found, objective(merge(LORA, over(base, trained)), batch)

    state, metrics, sums = both(trained, batch_of(kind), base)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, trained)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state.params["lora"], trained["lora"])
    assert all(pair["b"] for pair in (*moved["layers"]["attn"].values(), *moved["layers"]["mlp"].values()))
    np.testing.assert_allclose(metrics["loss"], sums["loss"][0] / sums["loss"][1], rtol=1e-4)


def test_flags_of_adapters_that_cannot_be():
    with pytest.raises(UserError, match=r"--lora.rank must not be negative and --lora.alpha positive, not -1, 16.0"):
        LoraConfig(rank=-1)
    with pytest.raises(UserError, match=r"--lora.targets takes some of q, k, v, o, gate, up, down, not none"):
        LoraConfig(rank=1, targets=())
    with pytest.raises(ValueError, match=r"hold adapters \(lora\), but LlamaConfig.lora.rank is 0"):
        logps(CONFIG, over(params_of(), adapters_of()))
    with pytest.raises(ValueError, match="there are no adapters"):
        init_adapters(CONFIG, jax.random.key(0))


# ------------------------------------------------------------------------------------------------ frozen weights


def test_eight_bits_are_within_half_a_step():
    """|w - thaw(freeze(w))| <= scale / 2 of its output and layer; everything beside the kernels is rounded to bfloat16."""
    params = jax.tree.map(lambda x: x, params_of()) | {"head": params_of("last")["head"]}
    params["layers"]["mlp"]["up"] = {"kernel": params["layers"]["mlp"]["up"]["kernel"].at[1, :, 3].set(0)}
    found = _freeze(params, "int8")
    back = jax.jit(thaw)(found)
    for group, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for name in names:
            kernel = np.asarray(params["layers"][group][name]["kernel"])
            small = found["layers"][group][name]
            axes = (1, 2) if name == "o" else (1,)
            assert small["kernel"].dtype == jnp.int8 and small["scale"].dtype == jnp.float32
            assert small["scale"].shape == tuple(n for i, n in enumerate(kernel.shape) if i not in axes)
            scale = np.expand_dims(np.asarray(small["scale"]), axes)
            assert (np.abs(kernel - back["layers"][group][name]["kernel"]) <= scale / 2 * (1 + 1e-5)).all(), name
            largest = np.abs(kernel).max(axes)
            np.testing.assert_allclose(small["scale"], np.where(largest == 0, 1, largest) / 127, rtol=1e-6)
            assert int(jnp.max(jnp.abs(small["kernel"]))) == 127
    for name in ("embed", "lm_head", "norm"):
        assert {x.dtype for x in jax.tree.leaves(found[name])} == {jnp.dtype("bfloat16")}
        chex.assert_trees_all_close(back[name], params[name], rtol=2**-8)
    chex.assert_trees_all_equal(found["head"], params["head"])


def test_frozen_models_say_nearly_the_same():
    """Log-probabilities: bfloat16 within 0.05 nats, 8 bits within 0.25 (0.05 on average) of a model of 16 numbers' width;
    and exactly those of the weights that they stand for."""
    exact = logps(CONFIG, params_of())
    for dtype, limit in (("bfloat16", 0.05), ("int8", 0.25)):
        small = _freeze(params_of(), dtype)
        found = logps(CONFIG, small)
        gap = np.abs(found - exact)
        assert 0 < gap.max() < limit and gap.mean() < 0.05, dtype
        np.testing.assert_allclose(found, logps(CONFIG, jax.jit(thaw)(small)), atol=2e-5)
    assert freeze(params_of(), "float32") is params_of()
    with pytest.raises(UserError, match=f"--frozen-dtype must be one of {', '.join(FROZEN)}, not int4"):
        freeze(params_of(), "int4")


# ------------------------------------------------------------------------------------------------ on a mesh


def test_adapters_and_scales_have_their_places():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    lora = programs.abstract_trained(LORA, "lm", mesh)["lora"]["layers"]
    places = jax.tree.map(lambda x: x.sharding.spec, lora)
    assert places["attn"]["q"] == {"a": P(None, "fsdp", None), "b": P(None, None, "tensor", "fsdp")}
    assert places["attn"]["o"] == {"a": P(None, "tensor", "fsdp", None), "b": P(None, None, "fsdp")}
    assert places["mlp"]["down"]["a"] == P(None, ("tensor", "fsdp"), None)
    small = programs.abstract_params(CONFIG, "lm", mesh, "int8")["layers"]
    assert small["attn"]["q"]["scale"].sharding.spec == P(None, "tensor", None)
    assert small["mlp"]["down"]["scale"].sharding.spec == P(None, "fsdp")
    assert small["attn"]["q"]["kernel"].dtype == jnp.int8
    # What fsdp does not divide is whole there, of adapters alone.
    assert spec("lora/layers/attn/q/b", (2, 3, 4, 5), mesh) == P(None, None, "tensor", None)
    with pytest.raises(UserError, match="does not divide 5, a dimension of layers/attn/o/scale"):
        spec("layers/attn/o/scale", (2, 5), mesh)
    with pytest.raises(UserError, match=r"No rule of .* lora/layers/attn/q/c"):
        spec("lora/layers/attn/q/c", (2, 4, 4), mesh)


@pytest.mark.parametrize("name", ["smollm2-135m", "llama3-8b", "llama3.2-1b"])
def test_real_sizes_divide(name):
    """Adapters and 8 bits, on the meshes that their weights divide over."""
    config = dataclasses.replace(SIZES[name], lora=LoraConfig(rank=16))
    tensor = 1 if name == "smollm2-135m" else 2
    mesh = make_mesh(MeshConfig(1, 8 // tensor, tensor))
    adapters = programs.abstract_trained(config, "lm", mesh)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))
    whole = programs.abstract_params(dataclasses.replace(config, lora=LoraConfig()), "lm", mesh, "int8")
    total = sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(whole) if "layers" in jax.tree_util.keystr(path)
    )
    assert 0 < count < 0.05 * total


@pytest.mark.slow
def test_adapters_over_eight_bits_train_alike_on_every_mesh():
    ends = {}
    for name, mesh in (("one", make_mesh(MeshConfig(1), jax.devices()[:1])), ("2x2x2", make_mesh(MeshConfig(2, 2, 2)))):
        base = put_params(freeze(params_of(), "int8"), mesh)
        state = programs.start(LORA, "lm", OPTIM, 10, mesh)(put_params(adapters_of(), mesh))
        step = programs.supervised_step("sft", LORA, "lm", OPTIM, 10, 2, mesh)
        for number in range(2):
            state, metrics = step(state, put_batch(rows(number), mesh), base)
        ends[name] = jax.device_get((metrics["loss"], state.params))
    chex.assert_trees_all_close(ends["one"], ends["2x2x2"], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ the command line

MODULES = {"sft": sft_stage, "reward_model": reward_model, "dpo": dpo, "rto": rto}
SMALL = (
    "--gold.examples 512 --gold.pairs 256 --gold.test-pairs 64 --gold.rollouts 64 --batch-size 32 --eval-size 64 "
    "--lora.rank 4 --frozen-dtype bfloat16"
)


def command(stage: str, flags: str) -> None:
    module = MODULES[stage]
    main(module.PRESETS, module.run, module.__doc__, flags.split())


@pytest.mark.slow
def test_one_base_through_the_recipe(tmp_path):
    """SFT, then reward model, DPO and RTO as adapters over it: the last holds one set of weights, and adapters of four."""
    out = {name: tmp_path / name for name in MODULES}
    command("sft", f"{SMALL} --out {out['sft']} --steps 4")
    for stage in ("reward_model", "dpo"):
        command(stage, f"{SMALL} --out {out[stage]} --init {out['sft']} --steps 4")
    links = f"--sft {out['sft']} --reward-model {out['reward_model']} --dpo {out['dpo']}"
    command("rto", f"{SMALL} --out {out['rto']} {links} --iterations 2 --eval-every 0")
    lines = [json.loads(line) for line in (out["rto"] / "metrics.jsonl").read_text().splitlines()]
    assert all(abs(line["first_update_kl"]) < 1e-8 for line in lines if "first_update_kl" in line)
    assert any(line.get("implicit_reward", 0) != 0 for line in lines)

    config = dataclasses.replace(
        rto.PRESETS["gold"][1],
        sft=str(out["sft"]),
        lora=LoraConfig(rank=4),
        frozen_dtype="bfloat16",
        out=str(out["rto"]),
    )
    mesh = make_mesh(config.mesh)
    models = [open_model(str(out[name]), config, "--x") for name in ("sft", "reward_model", "dpo")]
    fixed = load_fixed(config, mesh, *models)
    assert fixed["reference"] == {} and set(fixed["dpo"]) == {"lora"} and set(fixed["reward"]) == {"lora", "head"}
    # What is read back is the model that was trained: the base in bfloat16 with the adapters.
    trained = open_model(str(out["rto"]), config, "--x")
    assert trained.base == models[0].identity
    by_parts = over(fixed["base"], trained.own(mesh))
    lora = dataclasses.replace(models[0].config, lora=config.lora)
    chex.assert_trees_all_close(merge(lora, by_parts), trained.load(mesh), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", MODULES)
def test_the_papers_recipe_with_adapters_builds(stage, capsys):
    command(stage, "--preset paper --dry-run --lora.rank 16 --frozen-dtype int8 --remat full")
    printed = capsys.readouterr().out
    assert re.search(r"base( of all)?: [\d,]+ parameters, .* int8\n", printed), printed
    counts = {
        "sft": ["41,943,040"],
        "dpo": ["41,943,040"],
        "reward_model": ["11,274,241"],
        "rto": ["41,943,040", "11,274,241"],
    }
    for count in counts[stage]:  # 16 · (inputs + outputs) of seven projections a block; and the head's 2,049
        assert f"trained: {count} parameters" in printed
