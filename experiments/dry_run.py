"""`--dry-run`: shapes and shardings for any mesh, without its devices, weights or data."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType

from rto_jax.sharding import AXES, MeshConfig


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of the flags; --mesh.data -1 takes the devices at hand, or 1."""
    rest = config.fsdp * config.tensor
    data = config.data if config.data > 0 else max(1, jax.device_count() // rest)
    return AbstractMesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def per_device_bytes(tree) -> int:
    """Bytes of one device's shards."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def report_shapes(name: str, mesh, trees: dict, metrics) -> None:
    print(f"{name}: mesh " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()))
    for label, tree in trees.items():
        params = getattr(tree, "params", tree)
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        print(f"  {label}: {count:,} parameters, {per_device_bytes(tree) / 2**30:.2f} GiB per device")
    print(f"  metrics: {', '.join(sorted(metrics))}")
