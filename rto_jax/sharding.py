"""The mesh, and the one table that says where every parameter lives on it.

Mesh axes: `data` (batch), `fsdp` (batch, and parameters split over it), `tensor` (heads, MLP and vocabulary).
Optimiser states follow their parameter, since their paths end in the parameter's path.
"""

import re
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rto_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (pattern of the end of the path, one entry per dimension). Stacked layers have a leading layer dimension.
TABLE: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"layers/(attn_norm|mlp_norm)/scale", P(None, None)),
    (r"layers/attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"layers/attn/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"norm/scale", P(None)),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"head/kernel", P(None, None)),
    (r"head/bias", P(None)),
)


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1
    """devices along the batch; -1 takes all that the other two leave"""
    fsdp: int = 1
    """devices over which parameters and batch are both split"""
    tensor: int = 1
    """devices over which heads, MLP and vocabulary are split"""

    def __post_init__(self):
        for name in ("fsdp", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"--mesh.{name} must be at least 1, not {getattr(self, name)}.")
        if self.data < 1 and self.data != -1:
            raise UserError(f"--mesh.data must be at least 1, or -1 for all that remain, not {self.data}.")

    def shape(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) for so many devices. Raises UserError where they do not multiply up."""
        rest = self.fsdp * self.tensor
        data = self.data if self.data > 0 else devices // rest
        if data * rest != devices:
            flags = f"--mesh.data {self.data} --mesh.fsdp {self.fsdp} --mesh.tensor {self.tensor}"
            raise UserError(f"{flags} does not fit {devices} device(s): the three must multiply to {devices}.")
        return data, self.fsdp, self.tensor


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh over all devices (or those given), every axis Auto: the compiler places what the table leaves open."""
    devices = jax.devices() if devices is None else devices
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(config.shape(len(devices)), AXES, axis_types=types, devices=devices)


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The table's entry for a parameter. Raises UserError for a path that no rule matches or a size that does not divide."""
    if not shape:
        return P()  # counters
    found = next((axes for pattern, axes in TABLE if re.search(rf"(^|/){pattern}$", path)), None)
    if found is None:
        raise UserError(f"No rule of the sharding table (rto_jax/sharding.py) matches the parameter {path}.")
    if len(found) != len(shape):
        raise UserError(f"The sharding rule of {path} names {len(found)} dimensions; the parameter has {len(shape)}.")
    for size, axis in zip(shape, found, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(f"--mesh.{axis} {mesh.shape[axis]} does not divide {size}, a dimension of {path} {list(shape)}.")
    return found


def tree_shardings(tree, mesh: Mesh | AbstractMesh):
    """A tree of NamedSharding for parameters, optimiser state or a whole train state (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_path(path), tuple(leaf.shape), mesh)), tree
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading dimension over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check_batch(size: int, mesh: Mesh | AbstractMesh, flag: str, micro_batches: int = 1) -> None:
    """Raises UserError unless `size` rows divide into micro-batches over the mesh's batch axes."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if size < 1 or size % (ways * micro_batches):
        parts = f"{ways} (mesh data x fsdp)" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(f"{flag} {size} is not divisible by {parts}.")


def put_batch(batch, mesh: Mesh):
    """Host arrays onto the mesh, rows split; with several processes each gives its own part of the rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def put_params(params, mesh: Mesh):
    """A parameter tree (host or device) onto the mesh, as the table says. Always a copy, so donation is safe."""
    shardings = tree_shardings(params, mesh)
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i, x=x: np.array(x[i])), params, shardings)
