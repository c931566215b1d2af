"""Every back end of attention gives a slow NumPy oracle's answer: segments, grouped heads, shared prompts, padding."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rto_jax.errors import UserError
from rto_jax.models import LlamaConfig, language_model
from rto_jax.models.attention import BACKENDS, attention, by_causal_rows, choose, positions, row_layout, visible
from rto_jax.sharding import MeshConfig, make_mesh

B, S, H, K, SIZE = 4, 14, 4, 2, 6
START = 6  # the prompt's slots where several answers follow it
GPU = any(device.platform == "gpu" for device in jax.devices())


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, S, heads, SIZE)), dtype) for heads in (H, K, K)]


def segments(kind: str) -> np.ndarray:
    """int32 [B, S]: rows of one example padded on both sides, or of several; the last row is one example, full."""
    out = np.ones((B, S), np.int32)
    if kind == "one":
        out[0, :3], out[1, 10:], out[2, :2], out[2, 12:] = 0, 0, 0, 0
    else:  # as packing has them: each part of the row begins with example 1, its end is padding
        out[0] = [1, 1, 2, 2, 2, 0, 1, 1, 2, 0, 1, 2, 2, 2]
        out[1] = [1, 2, 3, 0, 0, 0, 1, 2, 2, 3, 2, 2, 3, 0]
        out[2, 3:6] = 2
    return out


LAYOUTS = {"one answer": row_layout(S), "two answers": row_layout(S, START, 2), "four answers": row_layout(S, START, 4)}
CASES = [(layout, kind) for layout in LAYOUTS for kind in ("one", "several")]


def sees(layout: str, own: np.ndarray, query: int, key: int) -> bool:
    """By the words: same example, at its slot or before, and the key in the prompt or in the query's own answer."""
    answers = {"one answer": 1, "two answers": 2, "four answers": 4}[layout]
    part = [-1 if slot < START or answers == 1 else (slot - START) * answers // (S - START) for slot in (query, key)]
    return own[query] == own[key] and key <= query and part[1] in (-1, part[0])


def oracle(q, k, v, ids, layout):
    """float64, a loop over rows, heads and queries; 0 at padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, s, head in np.ndindex(q.shape[:3]):
        if ids[b, s]:
            keys = [t for t in range(S) if sees(layout, ids[b], s, t)]
            weights = np.exp([q[b, s, head] @ k[b, t, head // (H // K)] / np.sqrt(SIZE) for t in keys])
            out[b, s, head] = weights @ v[b, keys, head // (H // K)] / weights.sum()
    return out


def both_ways(backend: str, ids, layout: str, mesh=None):
    """Function of q, k, v: attention's output at real tokens, and the gradients of a sum over it."""

    def total(q, k, v):
        out = attention(q, k, v, jnp.asarray(ids), LAYOUTS[layout], backend=backend, mesh=mesh)
        out = jnp.where((ids > 0)[:, :, None, None], out, 0)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_xla_is_the_oracle(layout, kind):
    ids = segments(kind)
    out = attention(*arrays(), jnp.asarray(ids), LAYOUTS[layout], backend="xla")
    chex.assert_tree_all_finite(out)
    np.testing.assert_allclose(
        jnp.where((ids > 0)[:, :, None, None], out, 0), oracle(*arrays(), ids, layout), atol=2e-6
    )


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_positions_count_what_a_token_sees(layout, kind):
    ids = segments(kind)
    found = np.asarray(positions(jnp.asarray(ids), LAYOUTS[layout]))
    for b, s in np.ndindex(ids.shape):
        assert found[b, s] == (sum(sees(layout, ids[b], s, t) for t in range(S)) - 1 if ids[b, s] else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_mask_is_the_layout(layout):
    """And slots behind the layout, which a kernel's blocks fill up, see themselves: no query is left without a key."""
    mask = visible(LAYOUTS[layout], S + 2)
    want = [[sees(layout, np.ones(S), query, key) for key in range(S)] for query in range(S)]
    np.testing.assert_array_equal(mask[:S, :S], want)
    np.testing.assert_array_equal(mask[S:], np.eye(S + 2)[S:])
    assert not mask[:S, S:].any()


@pytest.mark.parametrize("mesh", [None, MeshConfig(2, 2, 2)], ids=["one device", "2x2x2"])
@pytest.mark.parametrize(("layout", "kind"), [("one answer", "one"), ("two answers", "several")])
def test_splash_is_xla(layout, kind, mesh):
    """The TPU's kernel, interpreted: outputs and gradients within 1e-5 in float32."""
    ids = segments(kind)
    found = both_ways("splash", ids, layout, mesh and make_mesh(mesh))(*arrays())
    chex.assert_trees_all_close(found, both_ways("xla", ids, layout)(*arrays()), atol=1e-5)


TINY = LlamaConfig(vocab_size=24, width=12, layers=2, heads=H, kv_heads=K, head_dim=SIZE, mlp_width=20, init_std=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_the_same_under_splash(dtype):
    """Two answers to one prompt, log-probabilities and gradients: within 1e-4 of each leaf's largest, 4e-2 in bfloat16."""
    rng = np.random.default_rng(3)
    tokens, valid = jnp.asarray(rng.integers(0, 24, (B, S)), jnp.int32), jnp.asarray(segments("one") > 0)
    params = language_model(TINY).init(jax.random.key(0))

    def both(backend):
        model = language_model(dataclasses.replace(TINY, attention=backend, dtype=dtype))

        def total(params):
            logps = model.logps(params, tokens, valid, START, valid[:, START:], branches=2)
            return jnp.sum(jnp.sin(logps)), logps

        return jax.jit(jax.grad(total, has_aux=True))(params)

    def check(found, want):
        np.testing.assert_allclose(found, want, atol=(1e-4 if dtype == "float32" else 4e-2) * np.abs(want).max())

    jax.tree.map(check, both("splash"), both("xla"))


@pytest.mark.skipif(not GPU, reason="cuDNN needs an NVIDIA GPU (run with JAX_PLATFORMS=cuda)")
@pytest.mark.parametrize(("layout", "kind"), [("one answer", "one"), ("two answers", "several")])
def test_cudnn_is_xla(layout, kind):
    """bfloat16: within 3e-2 of outputs and gradients of size one."""
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(rng.normal(size=(B, S, heads, 64)), jnp.bfloat16) for heads in (H, K, K)]
    found, want = (both_ways(backend, segments(kind), layout)(*inputs) for backend in ("cudnn", "xla"))
    chex.assert_trees_all_close(*jax.tree.map(lambda x: x.astype(jnp.float32), (found, want)), atol=3e-2)


def test_auto_is_the_fastest_that_the_device_has():
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    for dtype in ("float32", "bfloat16"):
        want = "cudnn" if GPU and dtype == "bfloat16" else "xla"
        assert choose("auto", dtype) == choose("auto", dtype, mesh) == want
    assert [choose(name, "float32") for name in ("xla", "splash")] == ["xla", "splash"]


@pytest.mark.skipif(GPU, reason="needs a machine without an NVIDIA GPU")
def test_cudnn_without_a_gpu_is_refused():
    with pytest.raises(UserError, match=r"attention cudnn needs an NVIDIA GPU, but this runs on cpu\."):
        attention(*arrays(jnp.bfloat16), jnp.asarray(segments("one")), LAYOUTS["one answer"], backend="cudnn")


def test_back_ends_that_cannot_be():
    with pytest.raises(UserError, match="attention cudnn needs a 16-bit compute dtype, not float32"):
        choose("cudnn", "float32")
    for wrong in (lambda: choose("flash", "float32"), lambda: dataclasses.replace(TINY, attention="flash")):
        with pytest.raises(UserError, match=f"attention must be one of {', '.join(BACKENDS)}, not 'flash'"):
            wrong()
    for length, start, branches in ((9, 4, 2), (9, 0, 3), (4, 4, 2)):
        with pytest.raises(ValueError, match=f"a row of {length} slots is no prompt of {start} and {branches} answers"):
            row_layout(length, start, branches)


@pytest.mark.parametrize("layout", [row_layout(13), row_layout(14, 4, 2)], ids=["one answer", "two answers"])
def test_causal_rows_equal_masks(layout):
    """The way to a kernel that masks causally only, here with XLA's; padding anywhere, also between tokens."""
    rng, length = np.random.default_rng(0), layout[-1][0][1]
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    valid = jnp.asarray(rng.random((3, length)) > 0.3)
    run = functools.partial(jax.nn.dot_product_attention, implementation="xla")

    def outputs_and_gradients(function):
        seen = lambda q, k, v: jnp.where(valid[:, :, None, None], function(q, k, v), 0.0)  # noqa: E731
        return jax.jit(seen)(q, k, v), jax.jit(jax.grad(lambda *x: jnp.sum(seen(*x) ** 2), argnums=(0, 1, 2)))(q, k, v)

    chex.assert_trees_all_close(
        outputs_and_gradients(lambda q, k, v: by_causal_rows(q, k, v, valid, layout=layout, attend=run)),
        outputs_and_gradients(lambda q, k, v: attention(q, k, v, valid.astype(jnp.int32), layout)),
        atol=1e-5,
    )
