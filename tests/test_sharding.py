"""The mesh and the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rto_jax import programs
from rto_jax.errors import UserError
from rto_jax.models import SIZES
from rto_jax.optim import OptimConfig
from rto_jax.sharding import MeshConfig, check_batch, make_mesh, put_batch, put_params, spec, tree_shardings


def test_mesh_axes_are_auto():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == (2, 2, 2)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(MeshConfig(fsdp=4)).devices.shape == (2, 4, 1)


@pytest.mark.parametrize("config", [MeshConfig(3), MeshConfig(fsdp=3), MeshConfig(8, 2)])
def test_mesh_that_does_not_fit_the_devices(config):
    with pytest.raises(UserError, match="must multiply to 8"):
        make_mesh(config)


def test_every_parameter_and_moment_has_its_place():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    state = programs.abstract_state(SIZES["gold"], "lm", OptimConfig(), 10, mesh)
    shardings = tree_shardings(state, mesh)
    expected = P(None, "fsdp", "tensor", None)
    assert shardings.params["layers"]["attn"]["q"]["kernel"].spec == expected
    moments = [
        s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings.opt_state)
        if "q/kernel" in jax.tree_util.keystr(path, simple=True, separator="/")
    ]  # fmt: skip
    assert moments == [expected, expected]
    assert shardings.params["embed"]["embedding"].spec == P("tensor", "fsdp")
    assert shardings.params["lm_head"]["kernel"].spec == P("fsdp", "tensor")
    assert shardings.step.spec == P()


def test_an_unmatched_parameter_is_an_error():
    mesh = make_mesh(MeshConfig(8))
    with pytest.raises(UserError, match=r"No rule of .* layers/adapter/kernel"):
        spec("layers/adapter/kernel", (2, 4, 4), mesh)
    with pytest.raises(UserError, match="names 4 dimensions; the parameter has 3"):
        spec("layers/attn/q/kernel", (2, 4, 4), mesh)


def test_a_size_that_does_not_divide_names_flag_and_parameter():
    with pytest.raises(UserError, match=r"--mesh.tensor 4 does not divide 9, a dimension of layers/attn/q/kernel"):
        spec("layers/attn/q/kernel", (30, 576, 9, 64), make_mesh(MeshConfig(1, 2, 4)))


def test_check_batch():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    check_batch(8, mesh, "--batch-size", 2)
    with pytest.raises(UserError, match="--batch-size 6 is not divisible by 4"):
        check_batch(6, mesh, "--batch-size")
    with pytest.raises(UserError, match="2 micro-batches"):
        check_batch(12, mesh, "--batch-size", 2)


def test_put_params_copies():
    """Donating the placed tree must not touch the source, on one device either."""
    mesh = make_mesh(MeshConfig(1), jax.devices()[:1])
    source = {"norm": {"scale": jnp.arange(4.0)}}
    placed = put_params(source, mesh)
    jax.block_until_ready(jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)(placed))
    np.testing.assert_array_equal(source["norm"]["scale"], np.arange(4.0))


def test_put_batch_splits_rows():
    batch = put_batch({"x": np.arange(16).reshape(8, 2)}, make_mesh(MeshConfig(2, 2, 2)))
    assert batch["x"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(batch["x"], np.arange(16).reshape(8, 2))
