"""The decoder and its heads: properties, hand values and a slow NumPy oracle."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax.errors import UserError
from rto_jax.models import (
    HEADS,
    SIZES,
    LlamaConfig,
    RopeScaling,
    fold_affine,
    language_model,
    scalar_model,
    with_head,
)
from rto_jax.models.attention import attend
from rto_jax.models.llama import rope_frequencies, rotate, turns

TINY = LlamaConfig(
    vocab_size=23,
    width=12,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=20,
    rope_base=100.0,
    rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64),
    tied_embeddings=False,
)
# Prompts of 5, 3 and 1 tokens and answers of 4, 2 and 3: row = 5 + 4 slots.
PROMPTS, ANSWERS, P, S = (5, 3, 1), (4, 2, 3), 5, 9


@pytest.fixture(scope="module")
def params():
    return _params(TINY)


# One compiled program per function and shape: eager, these tests would take minutes.
@functools.lru_cache
def _lm(config):
    model = language_model(config)
    return model._replace(
        init=jax.jit(model.init),
        logits=jax.jit(model.logits, static_argnums=3),
        prefill=jax.jit(model.prefill, static_argnums=3),
        decode=jax.jit(model.decode),
    )


@functools.lru_cache
def _scalar(config, head="last"):
    model = scalar_model(config, head)
    return model._replace(values=jax.jit(model.values, static_argnums=3), scores=jax.jit(model.scores))


def _params(config, seed=0):
    """Random parameters, the norms' scales off 1 so that they count."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = "scale" in jax.tree_util.keystr(path)
        return jnp.asarray(scale + rng.normal(0, 0.3, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(language_model(config).init, jax.random.key(0)))


def _batch():
    rng = np.random.default_rng(1)
    tokens, valid = rng.integers(0, 20, (3, S)), np.zeros((3, S), bool)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        valid[row, P - prompt : P + answer] = True
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


def _oracle(params, config, tokens):
    """(logits, hidden states) of one unpadded row: float64 NumPy, a loop over positions and heads."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    frequency = []
    for i in range(config.head_dim // 2):
        f = config.rope_base ** (-2 * i / config.head_dim)
        if (r := config.rope_scaling) is not None:
            wavelength = 2 * np.pi / f
            if wavelength > r.original_context / r.low_freq_factor:
                f /= r.factor
            elif wavelength > r.original_context / r.high_freq_factor:
                smooth = r.original_context / wavelength - r.low_freq_factor
                smooth /= r.high_freq_factor - r.low_freq_factor
                f = (1 - smooth) * f / r.factor + smooth * f
        frequency.append(f)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + config.norm_eps) * scale

    def turn(x, position):
        out, half = np.zeros_like(x), len(x) // 2
        for i, f in enumerate(frequency):
            c, s = np.cos(position * f), np.sin(position * f)
            out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i] * s + x[i + half] * c
        return out

    x = [p["embed"]["embedding"][t] for t in tokens]
    for l in range(config.layers):
        w = jax.tree.map(lambda a, l=l: a[l], p["layers"])
        h = [norm(a, w["attn_norm"]["scale"]) for a in x]
        for t in reversed(range(len(x))):
            out = np.zeros(config.width)
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                q = turn(h[t] @ w["attn"]["q"]["kernel"][:, head], t)
                ks = [turn(h[u] @ w["attn"]["k"]["kernel"][:, group], u) for u in range(t + 1)]
                a = np.exp([q @ k / np.sqrt(config.head_dim) for k in ks])
                a /= a.sum()
                v = sum(a[u] * (h[u] @ w["attn"]["v"]["kernel"][:, group]) for u in range(t + 1))
                out += v @ w["attn"]["o"]["kernel"][head]
            x[t] = x[t] + out
        for t in range(len(x)):
            h = norm(x[t], w["mlp_norm"]["scale"])
            gate = h @ w["mlp"]["gate"]["kernel"]
            x[t] = x[t] + (gate / (1 + np.exp(-gate)) * (h @ w["mlp"]["up"]["kernel"])) @ w["mlp"]["down"]["kernel"]
    hidden = np.stack([norm(a, p["norm"]["scale"]) for a in x])
    unembedding = p["lm_head"]["kernel"] if "lm_head" in p else p["embed"]["embedding"].T
    return hidden @ unembedding, hidden


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_logits_are_the_numpy_oracles(tied, scaled):
    config = dataclasses.replace(TINY, tied_embeddings=tied, rope_scaling=TINY.rope_scaling if scaled else None)
    params = _params(config)
    tokens, valid = _batch()
    logits = _lm(config).logits(params, tokens, valid, P)
    chex.assert_shape(logits, (3, S - P, 23))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        want, _ = _oracle(params, config, np.asarray(tokens[row])[np.asarray(valid[row])])
        # tokens[:, P:] were drawn from what stands one position earlier.
        np.testing.assert_allclose(logits[row, :answer], want[prompt - 1 : prompt - 1 + answer], atol=2e-5)


def test_the_last_head_reads_before_each_token_and_at_the_last(params):
    tokens, valid = _batch()
    params = with_head(params, TINY, jax.random.key(3), "last")
    params["head"]["bias"] = jnp.array([0.7])
    model = _scalar(TINY)
    values = model.values(params, tokens, valid, P)
    scores = model.scores(params, tokens, valid, valid[:, P:])
    chex.assert_shape([values, scores], [(3, S - P), (3,)])
    kernel = np.asarray(params["head"]["kernel"])[:, 0]
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        _, hidden = _oracle(params, TINY, np.asarray(tokens[row])[np.asarray(valid[row])])
        want = hidden @ kernel + 0.7
        np.testing.assert_allclose(values[row, :answer], want[prompt - 1 : prompt + answer - 1], atol=2e-5)
        np.testing.assert_allclose(scores[row], want[prompt + answer - 1], atol=2e-5)


def test_the_token_head_sums_the_actions(params):
    tokens, valid = _batch()
    mask = valid[:, P:].at[0, 1].set(False)  # another party's token in the middle
    params = with_head(params, TINY, jax.random.key(3), "token")
    params["head"]["bias"] = jnp.array([0.7])
    scores = _scalar(TINY, "token").scores(params, tokens, valid, mask)
    kernel = np.asarray(params["head"]["kernel"])
    for row, prompt in enumerate(PROMPTS):
        _, hidden = _oracle(params, TINY, np.asarray(tokens[row])[np.asarray(valid[row])])
        want = 0.7
        for t in range(S - P):
            if mask[row, t]:
                want += kernel[int(tokens[row, P + t])] @ hidden[prompt - 1 + t]
        np.testing.assert_allclose(scores[row], want, atol=5e-5)
    empty = _scalar(TINY, "token").scores(params, tokens, valid, jnp.zeros_like(mask))
    np.testing.assert_array_equal(empty, np.full(3, 0.7, np.float32))


def test_causal_by_gradients(params):
    """Rows hold each id once, and the embedding only enters as input: logits at t depend on exactly rows 0..t of it."""
    tokens = jnp.arange(8, dtype=jnp.int32)[None] + 4
    logits = _lm(TINY).logits

    def read(embedding):
        tree = params | {"embed": {"embedding": embedding}}
        return jnp.sum(logits(tree, tokens, jnp.ones((1, 8), bool), 1) ** 2, axis=-1)[0]

    touched = np.abs(jax.jit(jax.jacrev(read))(params["embed"]["embedding"])).sum(-1) > 0
    want = np.zeros((7, 23), bool)
    for t in range(7):
        want[t, 4 : 4 + t + 1] = True
    np.testing.assert_array_equal(touched, want)


@jax.jit
def _outputs(params, tokens, valid):
    """Logits, values and scores of a decoder with both heads."""
    lm, scalar = ({k: v for k, v in params.items() if k != drop} for drop in ("head", "lm_head"))
    model = scalar_model(TINY)
    return (
        language_model(TINY).logits(lm, tokens, valid, 1),
        model.values(scalar, tokens, valid, 1),
        model.scores(scalar, tokens, valid, valid[:, 1:]),
    )


@jax.jit
@jax.grad
def _gradient(params, tokens, valid):
    """Of a sum of all outputs over real tokens."""
    logits, values, scores = _outputs(params, tokens, valid)
    real = valid[:, 1:] & valid[:, :-1]
    return jnp.sum(jnp.where(real, jnp.sum(jnp.sin(logits), -1) + values**2, 0)) + scores.sum()


def test_padding_changes_nothing(params):
    """Rows of 6 and 3 tokens in 8 slots, padded on either side with junk: each gives what it gives alone, and both
    sides give one gradient."""
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.integers(0, 23, (1, n)), jnp.int32) for n in (6, 3)]
    params = with_head(params, TINY, jax.random.key(1), "last") | {"lm_head": params["lm_head"]}
    alone = [_outputs(params, row, jnp.ones_like(row, bool)) for row in rows]
    grads = []
    for left in (True, False):
        tokens = np.array(rng.choice([-1, 5, 22, 10**6], (2, 8)), np.int32)
        valid = np.zeros((2, 8), bool)
        for i, row in enumerate(rows):
            place = slice(8 - row.shape[1], None) if left else slice(row.shape[1])
            tokens[i, place], valid[i, place] = row[0], True
        tokens, valid = jnp.asarray(tokens), jnp.asarray(valid)
        logits, values, scores = _outputs(params, tokens, valid)
        chex.assert_tree_all_finite((logits, values, scores))
        for i, (row, out) in enumerate(zip(rows, alone, strict=True)):
            place = slice(8 - row.shape[1], None) if left else slice(row.shape[1] - 1)
            mine = (logits[i, place], values[i, place], scores[i])
            chex.assert_trees_all_close(mine, jax.tree.map(lambda x: x[0], out), atol=1e-5)
        grads += [_gradient(params, tokens, valid)]
    chex.assert_trees_all_close(*grads, atol=1e-4)


def test_a_row_of_padding_is_finite(params):
    tokens, valid = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 8), bool).at[1].set(True)
    model, tree = _lm(TINY), with_head(params, TINY, jax.random.key(0), "last")
    logits, cache = model.prefill(params, tokens, valid, 9)
    chex.assert_tree_all_finite((logits, cache, model.decode(params, tokens[:, 0], cache)))
    np.testing.assert_array_equal(cache.position, [0, 8])
    tree |= {"lm_head": params["lm_head"]}
    chex.assert_tree_all_finite((_outputs(tree, tokens, valid), _gradient(tree, tokens, valid)))


@pytest.mark.parametrize("spare", [0, 3])
def test_cached_decode_is_the_full_forward(params, spare):
    """Prompts of mixed length: prefill and every decode give the logits of the whole row; decode compiles once."""
    rng = np.random.default_rng(5)
    tokens = jnp.asarray(rng.integers(0, 23, (3, S)), jnp.int32)
    valid = jnp.asarray([[t >= P - n for t in range(S)] for n in PROMPTS])
    model = _lm(TINY)
    full = model.logits(params, tokens, valid, P)
    decode, compiled = model.decode, model.decode._cache_size()
    logits, cache = model.prefill(params, tokens[:, :P], valid[:, :P], S + spare)
    chex.assert_shape([cache.k, cache.v], (3, 3, S + spare, 2, 6))
    for t in range(S - P):
        chex.assert_trees_all_close(logits, full[:, t], atol=1e-5)
        logits, cache = decode(params, tokens[:, P + t], cache)
    np.testing.assert_array_equal(cache.position, [n + S - P for n in PROMPTS])
    np.testing.assert_array_equal(cache.valid[:, :S], valid)
    assert not cache.valid[:, S:].any() and int(cache.slot) == S and decode._cache_size() == compiled + 1


def test_prefill_needs_room(params):
    with pytest.raises(ValueError, match="cache_length 4 is shorter"):
        _lm(TINY).prefill(params, *_batch(), 4)


@pytest.mark.parametrize("start", [0, S])
def test_start_is_checked(params, start):
    with pytest.raises(ValueError, match="start must lie in 1..8"):
        _lm(TINY).logits(params, *_batch(), start)
    with pytest.raises(ValueError, match="start must lie in 1..8"):
        _scalar(TINY).values(with_head(params, TINY, jax.random.key(0), "last"), *_batch(), start)


def test_rope_by_hand():
    """d = 4, base 10,000: number 0 turns with 2 at 1 rad a position, 1 with 3 at 0.01."""
    config = dataclasses.replace(TINY, head_dim=4, rope_base=1e4, rope_scaling=None)
    np.testing.assert_allclose(rope_frequencies(config), [1.0, 0.01])
    angles = jnp.array([[3.0, 0.03]])[:, None]
    out = rotate(jnp.array([[[[1.0, 2.0, 0.0, 0.0]]]]), jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(out[0, 0, 0], [-0.9899925, 1.9991001, 0.1411200, 0.0599910], atol=1e-6)


def test_rope_is_looked_up_on_cpus():
    """Else XLA's CPU compiler computes the cosines again in every unrolled block, for every head."""
    where = jnp.array([[0, 1, 2, 63], [5, 5, 0, 7]])
    angles = np.asarray(where, np.float64)[..., None] * rope_frequencies(TINY).astype(np.float64)
    for found, exact in zip(turns(TINY, where, 64, None), (np.cos(angles), np.sin(angles)), strict=True):
        assert found.shape == (2, 4, TINY.head_dim // 2) and found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, atol=4e-6)  # float32's angles, up to 63 rad
    tokens, valid = _batch()
    text = jax.jit(_lm(TINY).logits, static_argnums=3).lower(_lm(TINY).init(jax.random.key(0)), tokens, valid, 1).compile().as_text()
    assert "cosine(" not in text and "sine(" not in text


def test_llama3_scaling_by_hand():
    """Turns per 64 tokens at base 10, d = 6: 10.19, 4.73, 2.19. Above 4 kept; 2.19 lies 0.398 of the way from 1 to 4;
    at base 1000 the last (0.1019 turns) is divided by the factor."""
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
    config = dataclasses.replace(TINY, rope_base=10.0, rope_scaling=scaling)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(plain, [1.0, 0.4641589, 0.2154435], rtol=1e-6)
    smooth = (64 * 0.2154435 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(smooth, 0.39816, atol=1e-5)
    np.testing.assert_allclose(
        rope_frequencies(config), [1.0, 0.4641589, 0.2154435 * (smooth + (1 - smooth) / 4)], rtol=1e-5
    )
    np.testing.assert_allclose(rope_frequencies(dataclasses.replace(config, rope_base=1000.0))[2], 0.01 / 4, rtol=1e-6)


def test_grouped_attention_is_attention_with_repeated_heads(params):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, n, 6)), jnp.float32) for n in (4, 2, 2))
    seen = jnp.asarray(rng.random((2, 5, 5)) < 0.6).at[:, :, 0].set(True)
    out = attend(q, [k], [v], [seen])
    for head in range(4):
        scores = np.einsum("bsd,btd->bst", q[:, :, head], k[:, :, head // 2]) / np.sqrt(6)
        weights = np.where(seen, np.exp(scores), 0)
        want = np.einsum("bst,btd->bsd", weights / weights.sum(-1, keepdims=True), v[:, :, head // 2])
        np.testing.assert_allclose(out[:, :, head], want, atol=1e-5)
    # The same in two pieces, and the whole model with its key/value heads written out.
    pieces = attend(q, [k[:, :2], k[:, 2:]], [v[:, :2], v[:, 2:]], [seen[:, :, :2], seen[:, :, 2:]])
    chex.assert_trees_all_close(out, pieces, atol=1e-6)
    wide = dataclasses.replace(TINY, kv_heads=4)
    tree = jax.tree.map(lambda x: x, params)
    for name in ("k", "v"):
        tree["layers"]["attn"][name] = {"kernel": jnp.repeat(params["layers"]["attn"][name]["kernel"], 2, axis=2)}
    chex.assert_trees_all_close(_lm(TINY).logits(params, *_batch(), P), _lm(wide).logits(tree, *_batch(), P), atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_near_float32(params, dtype):
    config = dataclasses.replace(TINY, dtype=dtype)
    tokens, valid = _batch()
    exact = _lm(TINY).logits(params, tokens, valid, P)
    half = _lm(config).logits(params, tokens, valid, P)
    chex.assert_type([exact, half], jnp.float32)
    real = valid[:, P:]
    error = np.abs(exact - half)[np.asarray(real)]
    # Eight bits of mantissa on logits of size one; not zero, or the dtype was ignored.
    assert 0 < error.max() < (0.1 if dtype == "bfloat16" else 0.02), error.max()
    logits, cache = jax.eval_shape(lambda p: language_model(config).prefill(p, tokens, valid, S), params)
    chex.assert_type([cache.k, cache.v], jnp.dtype(dtype))
    tree = with_head(params, config, jax.random.key(0), "last")
    decoded, _ = jax.eval_shape(language_model(config).decode, params, tokens[:, 0], cache)
    scores = jax.eval_shape(scalar_model(config).scores, tree, tokens, valid, real)
    chex.assert_type([logits, decoded, scores], jnp.float32)
    grads = jax.eval_shape(jax.grad(lambda p: language_model(config).logits(p, tokens, valid, P).sum()), params)
    chex.assert_trees_all_equal_dtypes(grads, params)


def test_parameters_in_bfloat16():
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    params = jax.eval_shape(scalar_model(config).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    tokens, valid = _batch()
    scores = jax.eval_shape(scalar_model(config).scores, params, tokens, valid, valid[:, P:])
    chex.assert_type(scores, jnp.float32)


def test_remat_and_unrolling_give_the_same_and_remat_keeps_no_activations(params):
    tokens, valid = _batch()

    def step(config):
        def loss(params):
            return jnp.sum(jnp.sin(language_model(config).logits(params, tokens, valid, P)))

        return jax.jit(jax.value_and_grad(loss))

    again, unrolled = dataclasses.replace(TINY, remat="full"), dataclasses.replace(TINY, unroll=3)
    for other in (again, unrolled):
        chex.assert_trees_all_close(step(TINY)(params), step(other)(params), rtol=1e-5, atol=1e-5)
    kept = "f32[3,3,9,20]"  # an MLP's hidden numbers [B, S, F], stacked over the layers for the backward pass
    assert kept in str(jax.make_jaxpr(step(TINY))(params))
    assert kept not in str(jax.make_jaxpr(step(again))(params))


def test_the_prompt_is_not_unembedded(params):
    """No array of S x V (or S - 1 x V) numbers per row anywhere in the program."""
    tokens, valid = _batch()
    text = str(jax.make_jaxpr(lambda p: _lm(TINY).logits(p, tokens, valid, P))(params))
    assert "3,4,23]" in text
    assert "3,9,23]" not in text and "3,8,23]" not in text


def test_output_size_is_the_first_logits(params):
    tokens, valid = _batch()
    cut = dataclasses.replace(TINY, output_size=7)
    small = params | {"lm_head": {"kernel": params["lm_head"]["kernel"][:, :7]}}
    logits = _lm(cut).logits(small, tokens, valid, P)
    chex.assert_trees_all_close(logits, _lm(TINY).logits(params, tokens, valid, P)[..., :7], atol=1e-6)
    shapes = jax.eval_shape(language_model(cut).init, jax.random.key(0))
    chex.assert_shape(shapes["lm_head"]["kernel"], (12, 7))


def test_the_parameter_tree():
    """Names and shapes are a public format: checkpoints, sharding rules and exports read them."""

    def shapes(model):
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(model.init, jax.random.key(0)))

    want = {
        "embed": {"embedding": (23, 12)},
        "layers": {
            "attn_norm": {"scale": (3, 12)},
            "attn": {
                "q": {"kernel": (3, 12, 4, 6)},
                "k": {"kernel": (3, 12, 2, 6)},
                "v": {"kernel": (3, 12, 2, 6)},
                "o": {"kernel": (3, 4, 6, 12)},
            },
            "mlp_norm": {"scale": (3, 12)},
            "mlp": {"gate": {"kernel": (3, 12, 20)}, "up": {"kernel": (3, 12, 20)}, "down": {"kernel": (3, 20, 12)}},
        },
        "norm": {"scale": (12,)},
        "lm_head": {"kernel": (12, 23)},
    }
    assert shapes(language_model(TINY)) == want
    del want["lm_head"]
    assert shapes(language_model(dataclasses.replace(TINY, tied_embeddings=True))) == want
    for head, kernel in (("last", (12, 1)), ("token", (23, 12))):
        assert shapes(scalar_model(TINY, head)) == want | {"head": {"kernel": kernel, "bias": (1,)}}


def test_init_is_a_plain_dict_that_draws_every_layer_anew():
    params = _lm(TINY).init(jax.random.key(0))

    def plain(tree):
        return type(tree) is dict and all(plain(v) or isinstance(v, jax.Array) for v in tree.values())

    assert plain(params)
    chex.assert_trees_all_equal(params["layers"]["attn_norm"]["scale"], jnp.ones((3, 12)))
    for leaf in jax.tree.leaves(params["layers"]["mlp"]):
        assert not np.allclose(leaf[0], leaf[1])
        np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.15)
    np.testing.assert_allclose(params["embed"]["embedding"].std(), 0.02, rtol=0.15)


@pytest.mark.parametrize(
    ("name", "count"),
    [("gold", 28448), ("smollm2-135m", 134_515_008), ("llama3-8b", 8_030_261_248), ("llama3.2-1b", 1_235_814_400)],
)
def test_sizes_count_exactly_and_init_is_abstract(name, count):
    shapes = jax.eval_shape(language_model(SIZES[name]).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert hash(SIZES[name]) == hash(dataclasses.replace(SIZES[name]))


def test_an_8b_step_traces_abstractly():
    config = dataclasses.replace(SIZES["llama3-8b"], dtype="bfloat16", remat="full")
    model = _lm(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, valid = jax.ShapeDtypeStruct((2, 64), jnp.int32), jax.ShapeDtypeStruct((2, 64), bool)
    grads = jax.eval_shape(jax.grad(lambda p, t, v: model.logits(p, t, v, 32).sum()), params, tokens, valid)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)


def test_equal_configs_share_their_functions():
    """jit caches by function: a new one per call would compile again."""
    assert language_model(TINY).logits is language_model(dataclasses.replace(TINY)).logits
    assert scalar_model(TINY, "token").scores is scalar_model(dataclasses.replace(TINY), "token").scores


def test_with_head_keeps_the_trunk(params):
    for head in HEADS:
        tree = with_head(params, TINY, jax.random.key(0), head)
        assert set(tree) == {"embed", "layers", "norm", "head"} and "lm_head" in params
        assert tree["layers"] is params["layers"]
        again = with_head(tree, TINY, jax.random.key(0), head, zero=True)  # from a reward model to a critic
        assert not np.any(again["head"]["kernel"]) and not np.any(again["head"]["bias"])
    wide = dataclasses.replace(TINY, vocab_size=300, width=99)
    kernel = with_head({}, wide, jax.random.key(0), "token")["head"]["kernel"]
    np.testing.assert_allclose(kernel.std(), 0.1, rtol=0.02)  # 1 / sqrt(99 + 1)


@pytest.mark.parametrize("head", HEADS)
def test_fold_affine_is_the_affine_map(params, head):
    tokens, valid = _batch()
    model = _scalar(TINY, head)
    tree = with_head(params, TINY, jax.random.key(0), head)
    tree["head"]["bias"] = jnp.array([0.3])
    folded = fold_affine(tree, 1.7, 2.5)
    scores = model.scores(tree, tokens, valid, valid[:, P:])
    np.testing.assert_allclose(
        model.scores(folded, tokens, valid, valid[:, P:]), (scores - 1.7) / 2.5, rtol=1e-5, atol=1e-6
    )
    # Powers of two lose nothing.
    same = fold_affine(fold_affine(tree, 0.25, 4.0), -0.0625, 0.25)
    chex.assert_trees_all_equal(same["head"]["kernel"], tree["head"]["kernel"])
    np.testing.assert_allclose(same["head"]["bias"], tree["head"]["bias"], rtol=1e-6)
    if head == "last":
        values = model.values(tree, tokens, valid, P)
        np.testing.assert_allclose(model.values(folded, tokens, valid, P), (values - 1.7) / 2.5, rtol=1e-5, atol=1e-6)


def test_a_token_head_is_no_critic(params):
    with pytest.raises(UserError, match='needs head="last"'):
        _scalar(TINY, "token").values(with_head(params, TINY, jax.random.key(0), "token"), *_batch(), P)
    with pytest.raises(UserError, match="one of last, token, not 'mean'"):
        _scalar(TINY, "mean")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, r"heads \(3\) must be a multiple of kv_heads \(2\)"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"unroll": 2}, r"unroll \(2\) must divide layers \(3\)"),
        ({"norm_eps": 0.0}, "norm_eps and init_std > 0, not 100.0, 0.0, 0.02"),
        ({"output_size": 24}, r"output_size \(24\) must lie in 1..vocab_size \(23\)"),
        ({"output_size": 7, "tied_embeddings": True}, "needs tied_embeddings=False"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_bad_sizes(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)


def test_bad_rope_scaling():
    with pytest.raises(UserError, match="low_freq_factor < high_freq_factor"):
        RopeScaling(factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0)
