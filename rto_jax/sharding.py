"""The mesh, and the one table that says where every parameter lives on it.

Mesh axes: `data` (batch), `fsdp` (batch, and parameters split over it), `tensor` (heads, MLP and vocabulary).
Optimiser states follow their parameter, since their paths end in the parameter's path.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rto_jax.errors import UserError
from rto_jax.types import AXES, BATCH

# (pattern of the end of the path, one entry per dimension). Stacked layers have a leading layer dimension.
TABLE: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"layers/(attn_norm|mlp_norm)/scale", P(None, None)),
    (r"layers/attn/[qkv]/kernel", P(None, "fsdp", "tensor", None)),
    (r"layers/attn/o/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/mlp/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/mlp/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/attn/[qkv]/scale", P(None, "tensor", None)),  # of kernels in 8 bits
    (r"layers/attn/o/scale", P(None, "fsdp")),
    (r"layers/mlp/(gate|up)/scale", P(None, "tensor")),
    (r"layers/mlp/down/scale", P(None, "fsdp")),
    (r"lora/layers/(attn/[qkv]|mlp/(gate|up))/a", P(None, "fsdp", None)),
    (r"lora/layers/attn/[qkv]/b", P(None, None, "tensor", "fsdp")),
    (r"lora/layers/mlp/(gate|up)/b", P(None, None, ("tensor", "fsdp"))),
    (r"lora/layers/attn/o/a", P(None, "tensor", "fsdp", None)),
    (r"lora/layers/mlp/down/a", P(None, ("tensor", "fsdp"), None)),
    (r"lora/layers/(attn/o|mlp/down)/b", P(None, None, "fsdp")),
    (r"norm/scale", P(None)),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"head/kernel", P(None, None)),
    (r"head/bias", P(None)),
)


HOST = "pinned_host"  # JAX's name of the host's memory that devices read and write


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
    """The mesh over all devices (or those given), every axis Auto: the compiler places what the table leaves open.

    Of several TPU slices `data` goes over the slices first: between them only gradients of whole copies are summed.
    """
    devices = jax.devices() if devices is None else devices
    types, shape = (AxisType.Auto,) * len(AXES), config.shape(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    if shape[0] % slices:
        raise UserError(f"--mesh.data {shape[0]} must be a multiple of the {slices} slices: only the batch is split between them.")
    within, split = (shape[0] // slices, *shape[1:]), "v5 lite" in devices[0].device_kind.lower()  # as jax.make_mesh has it
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=split)
    return Mesh(grid, AXES, axis_types=types)


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
    out = []
    for size, axis in zip(shape, found, strict=True):
        axes = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        if size % math.prod(mesh.shape[name] for name in axes) == 0:
            out.append(axis)
        elif "fsdp" in axes and re.search("(^|/)lora/", path):  # small enough to be whole on every device
            out.append("tensor" if "tensor" in axes else None)
        else:
            raise UserError(f"--mesh.{axis} {mesh.shape[axis]} does not divide {size}, a dimension of {path} {list(shape)}.")
    return P(*out)


def tree_shardings(tree, mesh: Mesh | AbstractMesh):
    """A tree of NamedSharding for parameters, optimiser state or a whole train state (arrays or ShapeDtypeStructs)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(_path(path), tuple(leaf.shape), mesh)), tree
    )


def in_host_memory(tree):
    """The ShapeDtypeStructs, but the arrays among them (not the counters) in the host's memory, split as before.

    Raises UserError where the devices cannot reach it.
    """

    def move(leaf):
        mesh = leaf.sharding.mesh
        kinds = {m.kind for m in mesh.devices.flat[0].addressable_memories()} if isinstance(mesh, Mesh) else {HOST}
        if HOST not in kinds:
            raise UserError(f"--*optim.offload: {mesh.devices.flat[0].platform} devices have no memory of the kind {HOST}.")
        return leaf.update(sharding=leaf.sharding.with_memory_kind(HOST)) if leaf.ndim else leaf

    return jax.tree.map(move, tree)


def per_device_bytes(tree) -> Counter:
    """Bytes of one device's shards, by dtype; what lies in the host's memory under "DTYPE on the host"."""
    found: Counter = Counter()
    for leaf in jax.tree.leaves(tree):
        where = " on the host" if leaf.sharding.memory_kind == HOST else ""
        found[f"{leaf.dtype}{where}"] += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return found


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading dimension over data and fsdp."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def check_batch(size: int, mesh: Mesh | AbstractMesh, flag: str, micro_batches: int = 1) -> None:
    """Raises UserError unless `size` rows divide into micro-batches over the mesh's batch axes."""
    ways = blocks(mesh)
    if size < 1 or size % (ways * micro_batches):
        parts = f"{ways} (mesh data x fsdp)" + (f" x {micro_batches} micro-batches" if micro_batches > 1 else "")
        raise UserError(f"{flag} {size} is not divisible by {parts}.")


def blocks(mesh: Mesh | AbstractMesh) -> int:
    """Into how many equal parts the mesh cuts a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def own_blocks(mesh: Mesh) -> list[int]:
    """Which of these parts this process's devices hold: all of them if it is alone.

    Not always neighbours (a mesh follows the chips' wiring), and not its own alone where `tensor` spans processes.
    """
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices).reshape(blocks(mesh), -1)
    return np.flatnonzero((owners == jax.process_index()).any(axis=1)).tolist()


def put_batch(batch, mesh: Mesh):
    """Host arrays onto the mesh, rows split; of several processes each gives the rows of `own_blocks`, in order."""
    own, sharding = own_blocks(mesh), batch_sharding(mesh)

    def put(x):
        x = np.asarray(x)
        each = len(x) // len(own)

        def shard(index):
            begin = own.index((index[0].start or 0) // each) * each
            return x[begin : begin + each]

        return jax.make_array_from_callback((each * blocks(mesh), *x.shape[1:]), sharding, shard)

    return jax.tree.map(put, batch)


def put_whole(batch, mesh: Mesh):
    """Host arrays onto the mesh, rows split; every process gives all rows."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: _put(np.asarray(x), sharding), batch)


def to_host(tree):
    """Whole arrays as NumPy, on every process; all processes must call it."""

    def whole(x):
        shared = not (x.is_fully_addressable or x.is_fully_replicated)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True) if shared else x)

    return jax.tree.map(whole, tree)


def put_params(params, mesh: Mesh):
    """A parameter tree (host or device) onto the mesh, as the table says. Always a copy, so donation is safe."""
    shardings = tree_shardings(params, mesh)
    return jax.tree.map(_put, params, shardings)


def _put(x, sharding: NamedSharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))
