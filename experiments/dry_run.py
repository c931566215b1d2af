"""`--dry-run`: shapes and shardings for any mesh, without its devices, weights or data."""

import math
from collections import Counter

import jax
from jax.sharding import AbstractMesh, AxisType

from rto_jax.sharding import AXES, MeshConfig, blocks, per_device_bytes
from rto_jax.steps import Objective, cast_kernels
from rto_jax.train_state import TrainState, abstract_on
from rto_jax.types import Params


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The mesh of the flags; --mesh.data -1 takes the devices at hand, or 1."""
    rest = config.fsdp * config.tensor
    data = config.data if config.data > 0 else max(1, jax.device_count() // rest)
    return AbstractMesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def first_rows(batch, rows: int):
    """The shapes of a batch's first rows."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)


def kept_activations(objective: Objective, params: Params, batch, mesh) -> Counter:
    """Bytes that one device keeps of a forward pass over `batch` for its backward pass, as `per_device_bytes` has them.

    Read off the traced program, with this machine's attention back end: an estimate, since the compiler may compute a
    cheap array again or keep a copy more.
    """

    def residuals(params, batch):
        return jax.vjp(lambda p: objective(p, batch)["loss"][0], params)[1]

    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    found: Counter = Counter()
    for aval in jax.make_jaxpr(residuals)(params, batch).out_avals:
        if aval.shape not in weights:
            where = " on the host" if aval.memory_space == jax.memory.Space.Host else ""
            found[f"{aval.dtype}{where}"] += aval.size * aval.dtype.itemsize // blocks(mesh)
    return found


def report_shapes(name: str, mesh, trees: dict, metrics, gradients: dict[str, str], kept: Counter) -> None:
    """Prints each model's memory. `gradients` holds the dtype of the kernels' gradients of what is trained."""

    def size(found: Counter) -> str:
        parts = (f"{count / 2**30:.2f} {dtype}" for dtype, count in sorted(found.items()) if count >= 2**20)
        return " + ".join(parts) or "0.00"

    print(f"{name}: mesh " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()) + "; GiB per device:")
    for label, tree in trees.items():
        params = getattr(tree, "params", tree)
        line = f"  {label}: {sum(math.prod(x.shape) for x in jax.tree.leaves(params)):,} parameters, {size(per_device_bytes(params))}"
        if isinstance(tree, TrainState):
            narrow = jax.eval_shape(lambda p, dtype=gradients[label]: cast_kernels(p, dtype), params)
            narrow = abstract_on(narrow, mesh)
            line += f"; moments {size(per_device_bytes(tree.opt_state))}; gradients {size(per_device_bytes(narrow))}"
        print(line)
    print(f"  kept for the backward pass of a micro-batch: {size(kept)}")
    print(f"  metrics: {', '.join(sorted(metrics))}")
