"""Log-probabilities without logits: equal to those of whole logits, and nothing of size tokens × vocabulary anywhere.

`losses_cases.py` has the oracle and what every function of the losses keeps.
"""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rto_jax import losses
from rto_jax import steps as S
from rto_jax.losses import (
    entropy,
    linear_statistics,
    linear_token_logps,
    sequence_kl,
    token_kl,
    token_logps,
)
from rto_jax.models import LlamaConfig, language_model
from rto_jax.train_state import new_state
from rto_jax.types import Experience, Pairs, Sequences

B, T, D, V = 2, 6, 8, 24
RNG = np.random.default_rng(0)
MASK = RNG.random((B, T)) < 0.7


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def ids(*shape, below=V, seed=0):
    return np.random.default_rng((seed, *shape)).integers(0, below, shape).astype(np.int32)


def close(actual, desired, rtol=1e-5, atol=1e-5):
    chex.assert_trees_all_close(actual, desired, rtol=rtol, atol=atol)


def logits_of(hidden, unembedding):
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    return product("...td,vd->...tv", hidden, unembedding.astype(hidden.dtype))


def by_logits(hidden, unembedding, ref_hidden, ref_unembedding, tokens, mask, temperature):
    """What `linear_statistics` gives, from whole logits."""
    z, ref = logits_of(hidden, unembedding), jax.lax.stop_gradient(logits_of(ref_hidden, ref_unembedding))
    z, ref = (jnp.where(mask[..., None], x, 0) for x in (z, ref))
    logps = [jnp.where(mask, token_logps(x, tokens, temperature=temperature), 0) for x in (z, ref)]
    rest = entropy(z, mask, temperature=temperature), token_kl(z, ref, mask, temperature=temperature)
    return losses.LinearStatistics(logps[0], rest[0], logps[1], rest[1])


def weighted(out):
    """A number that all outputs have a say in."""
    return sum(jnp.sum(x * normal(*x.shape, seed=i)) for i, x in enumerate(jax.tree.leaves(out)))


def run(function, *arrays, **options):
    return jax.jit(functools.partial(function, **options))(*arrays)


def with_gradients(function, *models):
    (_, out), gradients = jax.value_and_grad(
        lambda *x: (weighted(out := function(*x)), out), tuple(range(len(models))), has_aux=True
    )(*models)
    return out, gradients


# ---- values ----------------------------------------------------------------------------------------------------------


def test_linear_token_logps_by_hand():
    hidden, unembedding = np.float32([[1], [2]]), np.log(np.float32([[1], [3]]))  # weights 1 : 3, then 1 : 9
    out = run(linear_token_logps, hidden, unembedding, np.array([1, 0]))
    close(out, np.log(np.float32([3 / 4, 1 / 10])))
    out = run(linear_token_logps, hidden, unembedding, np.array([1, 0]), np.array([False, True]), temperature=2)
    close(out, np.log(np.float32([1, 1 / 4])))  # weights 1 : √9; nothing where masked


def test_linear_statistics_by_hand():
    hidden, unembedding, ref_hidden = np.float32([[1]]), np.log(np.float32([[1], [3]])), np.float32([[0]])
    out = run(
        linear_statistics, hidden, unembedding, ref_hidden, unembedding, np.array([1])
    )  # (1/4, 3/4) and (1/2, 1/2)
    close(out.logps, np.log(np.float32([3 / 4])))
    close(out.ref_logps, np.log(np.float32([1 / 2])))
    close(out.entropy, np.float32([np.log(4) - 3 / 4 * np.log(3)]))
    close(out.kl, np.float32([np.log(4 / 3) / 2]))  # ½ log(½ / ¼) + ½ log(½ / ¾)


CUTS = [(24, 1), (5, 1), (1, 1), (6, 2), (3, 4), (100, 4)]  # chunk, shards


@pytest.mark.parametrize(("vocabulary", "cuts"), [(V, CUTS), (23, [(100, 1), (4, 1), (22, 1)])], ids=["24", "a prime"])
def test_linear_statistics_are_those_of_the_logits(vocabulary, cuts):
    """Values, and the gradients of hidden states and unembedding, however the vocabulary is cut; none of the reference's."""
    tokens = ids(B, T, below=vocabulary)
    models = normal(B, T, D), normal(vocabulary, D), normal(B, T, D + 1), normal(vocabulary, D + 1)

    @jax.jit
    def everything(*models):
        expected = with_gradients(lambda *x: by_logits(*x, tokens, MASK, 0.7), *models)
        logps = with_gradients(lambda *x: by_logits(*x, *models[2:], tokens, MASK, 0.7).logps, *models[:2])
        out = {}
        for chunk, shards in cuts:
            options = dict(temperature=0.7, chunk=chunk, shards=shards)
            out[chunk, shards] = (
                with_gradients(lambda *x, o=options: linear_statistics(*x, tokens, MASK, **o), *models),
                with_gradients(lambda *x, o=options: linear_token_logps(*x, tokens, MASK, **o), *models[:2]),
            )
        return (expected, logps), out

    expected, found = everything(*models)
    assert not any(np.any(g) for g in expected[0][1][2:]) and all(np.abs(g).max() > 0.1 for g in expected[0][1][:2])
    for out in found.values():
        close(out, expected, atol=5e-5)  # gradients are sums of numbers up to 20


def test_the_kl_of_linear_statistics_sums_to_the_sequence_kl():
    hidden, ref = normal(B, T, D), normal(B, T, D, seed=1)
    kl = run(linear_statistics, hidden, W, ref, REF_W, ids(B, T), MASK, chunk=7).kl
    expected = run(lambda h, r: sequence_kl(logits_of(h, W), logits_of(r, REF_W), MASK), hidden, ref)
    close(kl.sum(-1), expected)


W, REF_W = normal(V, D), normal(V, D, seed=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_hidden_states(dtype):
    """All sums are float32, so values are those of the rounded arrays; gradients lose what their products' bfloat16 does."""
    hidden, unembedding = jnp.asarray(normal(B, T, D), "bfloat16"), jnp.asarray(W, dtype)
    tokens, options = ids(B, T), dict(chunk=5)

    @jax.jit
    def both(hidden, unembedding):
        return with_gradients(lambda *x: linear_token_logps(*x, tokens, MASK, **options), hidden, unembedding)

    out, gradients = both(hidden, unembedding)
    rounded = hidden.astype(jnp.float32), unembedding.astype("bfloat16").astype(jnp.float32)
    expected, exact = both(*rounded)
    assert out.dtype == jnp.float32 and [g.dtype for g in gradients] == ["bfloat16", dtype]
    close(out, expected)
    for mine, gradient in zip(gradients, exact, strict=True):
        # A few of bfloat16's steps (2^-8) of the largest gradient: each is a sum of rounded numbers.
        close(mine.astype(jnp.float32), gradient, rtol=0, atol=2**-7 * float(np.abs(gradient).max()))


def test_leading_dimensions_and_several_models_in_one_pass():
    """One pass over two models' hidden states, [model, B, T, D], against the same tokens: each as alone."""
    hidden, unembeddings, tokens = normal(2, B, T, D), normal(2, V, D), ids(B, T)

    def both(hidden, unembeddings):
        models = jax.vmap(lambda h, w: linear_token_logps(h, w, tokens, MASK, chunk=7))
        return models(hidden, unembeddings)

    def alone(hidden, unembedding):
        return linear_token_logps(hidden, unembedding, tokens, MASK)

    @jax.jit
    def everything():
        out, gradients = with_gradients(both, hidden, unembeddings)
        expected = [jax.vjp(alone, hidden[i], unembeddings[i]) for i in range(2)]
        pulled = [pullback(normal(2, B, T)[i]) for i, (_, pullback) in enumerate(expected)]
        reshaped = [
            linear_token_logps(hidden[0].reshape(*s, D), unembeddings[0], tokens.reshape(s), MASK.reshape(s)).reshape(
                B, T
            )
            for s in ((B * T,), (1, B, T), (B, 2, T // 2))
        ]
        return (out, gradients), ([value for value, _ in expected], pulled), reshaped

    (out, gradients), (expected, pulled), reshaped = everything()
    close(list(out), expected)
    close([[g[i] for g in gradients] for i in range(2)], [list(x) for x in pulled])
    close(reshaped, [out[0]] * 3, 1e-6, 1e-6)


# ---- masks, ids, shapes ----------------------------------------------------------------------------------------------


@jax.jit
def masked_statistics(hidden, unembedding, ref_hidden, tokens):
    return with_gradients(
        lambda h, w: linear_statistics(h, w, ref_hidden, REF_W, tokens, MASK, chunk=7), hidden, unembedding
    )


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_stands_in_masked_hidden_states_changes_nothing(junk):
    hidden, ref, tokens = normal(B, T, D), normal(B, T, D, seed=1), ids(B, T)
    clean = masked_statistics(hidden, W, ref, tokens)
    dirty = [np.where(MASK[..., None], x, np.float32(junk)) for x in (hidden, ref)]
    found = masked_statistics(dirty[0], W, dirty[1], np.where(MASK, tokens, -100))
    chex.assert_trees_all_equal(found, clean)
    assert not any(np.any(np.asarray(x)[~MASK]) for x in (*clean[0], clean[1][0]))


@pytest.mark.parametrize("token", [-1, -100, V, 2**31 - 1])
def test_a_token_outside_the_vocabulary_has_no_log_probability_and_no_gradient(token):
    hidden, tokens = normal(B, T, D), ids(B, T)
    outside = np.arange(B * T).reshape(B, T) == np.flatnonzero(MASK)[1]

    @jax.jit
    def both(tokens, mask):
        gradients = jax.grad(lambda h, w: jnp.nansum(linear_token_logps(h, w, tokens, mask, chunk=7, shards=2)), (0, 1))
        return linear_token_logps(hidden, W, tokens, mask, chunk=7), gradients(hidden, W)

    clean = both(tokens, MASK & ~outside)
    out, gradients = both(np.where(outside, token, tokens), MASK)
    assert np.isnan(out).tolist() == outside.tolist()
    np.testing.assert_array_equal(np.where(outside, 0, out), clean[0])
    chex.assert_trees_all_equal(gradients, clean[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32])
def test_ids_of_other_types(dtype):
    tokens, unembedding = ids(B, T, below=255), normal(300, D)
    expected, found = (run(linear_token_logps, H, unembedding, x) for x in (tokens, tokens.astype(dtype)))
    np.testing.assert_array_equal(found, expected)


def test_no_tokens():
    gradient = run(jax.grad(lambda w: jnp.sum(linear_token_logps(normal(B, 0, D), w, ids(B, 0), chunk=7))), W)
    assert gradient.shape == W.shape and not gradient.any()
    out = run(linear_statistics, normal(B, 0, D), W, normal(B, 0, D), REF_W, ids(B, 0))
    chex.assert_shape(list(out), (B, 0))


H, TOKENS = normal(B, T, D), ids(B, T)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"^unembedding has shape \(24, 7\), but hidden has shape \(2, 6, 8\)", lambda: linear_token_logps(H, W[:, 1:], TOKENS)),
        (r"^unembedding has shape \(24,\)", lambda: linear_token_logps(H, W[:, 0], TOKENS)),
        (r"^unembedding has shape .*hidden has shape \(8,\): want", lambda: linear_token_logps(H[0, 0], W, TOKENS[0, 0])),
        (r"^tokens has shape \(2, 5\), but hidden has shape \(2, 6, 8\)", lambda: linear_token_logps(H, W, TOKENS[:, 1:])),
        (r"^tokens must be integers, but their dtype is float32", lambda: linear_token_logps(H, W, np.float32(TOKENS))),
        (r"^mask must be boolean", lambda: linear_token_logps(H, W, TOKENS, TOKENS)),
        (r"^mask has shape \(1, 6\)", lambda: linear_token_logps(H, W, TOKENS, MASK[:1])),
        (r"^hidden has shape \(0, 6, 8\): it is empty", lambda: linear_token_logps(H[:0], W, TOKENS[:0])),
        (r"^unembedding has shape \(0, 8\): it is empty", lambda: linear_token_logps(H, W[:0], TOKENS)),
        (r"^chunk must be at least 1, but it is 0", lambda: linear_token_logps(H, W, TOKENS, chunk=0)),
        (r"^shards must divide the vocabulary of 24, but it is 5", lambda: linear_token_logps(H, W, TOKENS, shards=5)),
        (r"^shards must divide the vocabulary of 24, but it is 0", lambda: linear_token_logps(H, W, TOKENS, shards=0)),
        (r"^temperature must be above 0", lambda: linear_token_logps(H, W, TOKENS, temperature=0)),
        (r"^ref_unembedding has shape \(23, 8\), but unembedding has", lambda: linear_statistics(H, W, H, W[1:], TOKENS)),
        (r"^ref_unembedding has shape .*ref_hidden has", lambda: linear_statistics(H, W, H[..., 1:], W, TOKENS)),
        (r"^tokens has shape .*ref_hidden has shape \(1, 6, 8\)", lambda: linear_statistics(H, W, H[:1], W, TOKENS)),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()


# ---- what is never built ---------------------------------------------------------------------------------------------

WIDE = LlamaConfig(
    vocab_size=5 * 4096, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp_width=8, attention="xla"
)  # fmt: skip
ROWS, PROMPT, ANSWER = 4, 3, 16


def shapes(text: str) -> list[tuple[int, ...]]:
    """Of every array in a program's text."""
    found = re.findall(r"\b(?:pred|[a-z]+\d\w*)\[([\d,]+)\]", text)
    return [tuple(map(int, shape.split(","))) for shape in set(found)]


def largest(program) -> int:
    """Numbers in the largest array of a compiled program, forward, backward and update."""
    return max(map(math.prod, shapes(program.as_text())))


def sequences(rows=ROWS):
    whole = np.ones((rows, PROMPT + ANSWER), bool)
    return Sequences(ids(*whole.shape, below=WIDE.vocab_size), whole, whole[:, PROMPT:])


def batch_of(kind: str):
    numbers = [normal(ROWS, ANSWER, seed=i) for i in range(4)]
    pairs = Pairs(sequences(), sequences())
    return S.PairsWithReference(pairs, *normal(2, ROWS)) if kind == "dpo" else Experience(sequences(), *numbers)


def step_of(kind: str, logps):
    objective = S.dpo_objective(logps, beta=0.1) if kind == "dpo" else S.policy_objective(logps, clip=0.2)
    return S.make_step(objective, optax.adam(1e-3))


def logps_of_logits(params, tokens, valid, start, mask=None, temperature=1.0, branches=1):
    """The plain way: whole logits, one row for each answer."""
    model, size = language_model(WIDE), (tokens.shape[1] - start) // branches
    spans = [list(range(start)) + list(range(start + i * size, start + (i + 1) * size)) for i in range(branches)]
    out = [
        token_logps(
            model.logits(params, tokens[:, s], valid[:, s], start), tokens[:, s[start:]], temperature=temperature
        )
        for s in map(np.array, spans)
    ]
    return jnp.where(mask, jnp.concatenate(out, axis=1), 0)


@pytest.mark.parametrize("kind", ["dpo", "policy"])
def test_no_array_of_a_step_is_as_large_as_the_logits(kind):
    params = jax.eval_shape(language_model(WIDE).init, jax.random.key(0))
    state = jax.eval_shape(lambda p: new_state(p, optax.adam(1e-3)), params)
    logits = ROWS * ANSWER * WIDE.vocab_size  # of one answer to each prompt
    program = jax.jit(step_of(kind, language_model(WIDE).logps)).lower(state, batch_of(kind)).compile()
    assert WIDE.vocab_size * WIDE.width < largest(program) < logits
    if kind == "dpo":
        naive = jax.jit(step_of(kind, logps_of_logits)).lower(state, batch_of(kind)).compile()
        assert largest(naive) >= logits


# ---- several devices -------------------------------------------------------------------------------------------------


def mesh_of(*shape, devices=None):
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def test_shard_map_with_one_unembedding_for_all():
    """Each of 8 devices has its rows; the gradient of the unembedding is the sum of theirs."""
    hidden, ref, tokens = normal(8, T, D), normal(8, T, D, seed=1), ids(8, T)
    mask = np.tile(MASK, (4, 1))

    def local(h, w, r, t, m):
        return linear_statistics(h, w, r, REF_W, t, m, chunk=7)

    rows = P("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, P(), rows, rows, rows), out_specs=rows)

    @jax.jit
    def both(hidden, unembedding):
        return [
            with_gradients(lambda h, w, f=f: f(h, w, ref, tokens, mask), hidden, unembedding) for f in (local, sharded)
        ]

    whole, split = both(hidden, W)
    close(split, whole)


def over_mesh(mesh, chunk: int, shards: int):
    """(the gradient of a sum of log-probabilities, its arguments' shardings): rows over data and fsdp, V over tensor."""
    batch, embedding = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P("tensor", "fsdp"))

    def total(hidden, unembedding, tokens):
        out = linear_token_logps(hidden, unembedding, tokens, chunk=chunk, shards=shards)
        return weighted(out), out

    both = jax.value_and_grad(total, (0, 1), has_aux=True)
    return jax.jit(both, out_shardings=((None, batch), (batch, embedding))), (batch, embedding, batch)


COLLECTIVE = re.compile(
    r" = (\(?[^=]*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\((.*)"
)


def collectives(text: str) -> list[tuple[str, list[tuple[int, ...]], str]]:
    """(operation, shapes, line) of each."""
    return [(found[2], shapes(found[1]), found[0]) for line in text.splitlines() if (found := COLLECTIVE.search(line))]


def check_exchange(text: str, tokens: int, width: int, columns: int):
    """Forward, devices exchange a few numbers per token; backward, the hidden states' gradient once, and never rows of
    the unembedding or logits. tokens: of one device. columns: of its part of a chunk."""
    found = collectives(text)
    assert found
    for operation, arrays, line in found:
        for shape in arrays:
            size = math.prod(shape)
            assert size <= tokens or (operation == "all-reduce" and size == tokens * width), line
            assert columns not in shape, line
    of_hidden = [line for _, arrays, line in found if tokens * width in map(math.prod, arrays)]
    assert len(of_hidden) == 1, of_hidden
    in_loop = [line for _, _, line in found if "while/body" in line]
    assert not in_loop, in_loop


SPREAD = normal(8, T, D), normal(96, D), ids(8, T, below=96)


@functools.cache
def on_one_device():
    return jax.device_get(over_mesh(mesh_of(1, 1, 1, devices=jax.devices()[:1]), 100, 1)[0](*SPREAD))


def on_mesh(shape, shards):
    """(values and gradients, the program's text)"""
    program, shardings = over_mesh(mesh_of(*shape, devices=jax.devices()[: math.prod(shape)]), 48, shards)
    arrays = jax.device_put(SPREAD, shardings)
    compiled = program.lower(*arrays).compile()
    return jax.device_get(compiled(*arrays)), compiled.as_text()


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2)], ids=str)
def test_a_vocabulary_over_tensor_is_one_device(shape):
    out, text = on_mesh(shape, shards=shape[2])
    close(out, on_one_device())
    if shape[:2] == (1, 1):  # else batch and fsdp exchange parts of the unembedding and of its gradient, as they must
        check_exchange(text, tokens=8 * T, width=D, columns=48 // 4)


def test_an_exchange_of_the_unembedding_is_seen():
    """Without `shards` the numbers are the same, but chunks lie on one device each."""
    out, text = on_mesh((1, 1, 4), shards=1)
    close(out, on_one_device())
    with pytest.raises(AssertionError):
        check_exchange(text, tokens=8 * T, width=D, columns=48)


# ---- programs for a TPU ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chips():
    """Four chips of a TPU that is not here: its compiler is."""
    pytest.importorskip("libtpu", reason="compiles for a TPU: needs libtpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield topologies.get_topology_desc("v5e:2x2", platform="tpu").devices


def test_a_vocabulary_over_the_tensor_axis_of_a_tpu(chips):
    mesh = mesh_of(1, 1, 4, devices=chips)
    program, shardings = over_mesh(mesh, 2048, 4)
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=s)
        for shape, dtype, s in zip(
            [(8, 128, 256), (8192, 256), (8, 128)], ["bfloat16", "float32", "int32"], shardings, strict=True
        )
    ]
    check_exchange(program.lower(*arrays).compile().as_text(), tokens=8 * 128, width=256, columns=512)


def test_the_ppo_loss_is_one_pass_over_memory_on_a_tpu(chips):
    from benchmarks.losses import ppo_loss_on_tpu

    passes = {name: row["passes"] for name, row in ppo_loss_on_tpu("v5e:2x2").items()}
    assert passes["policy and value: ours"] == passes["policy: ours"] == 1
    assert passes["policy and value: masked means"] > 4  # the counter can count
