"""tunix's DPO step of Llama-3-8B, compiled for TPUs as `benchmarks.plan --tunix PYTHON` compiles ours, which runs this.

Its model, its loss and the body of its `PeftTrainer._train_step` (0.1.7), 64 pairs of 512 + 512 tokens on a v5e 8x8, FSDP,
parameters and Adam's moments in bfloat16, every decoder layer computed again in the backward pass. Neither the reference's
log-probabilities nor clipping are in it: to clip by the norm of all gradients the compiler keeps each at full size, which
takes 15 GiB; the norm alone, a metric, does not make it do so.
"""

import json
import os
import sys
import time
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.models.llama3 import model as llama
from tunix.sft.dpo.dpo_trainer import TrainExample, dpo_loss_fn

from rto_jax import hlo
from rto_jax.metrics import git_commit

PAIRS, PROMPT, ANSWER = 64, 512, 512
GIB = 2**30


def main(file: str, layers: int = 32) -> None:
    """Writes the figures of a model with so many layers to a JSON file."""
    devices = topologies.get_topology_desc("v5e:8x8", platform="tpu").devices
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    config = replace(llama.ModelConfig.llama3p1_8b(), num_layers=layers, remat_config=llama.RematConfig.DECODER)
    jax.devices = lambda *_: list(devices)  # its activations are left unsharded where the first device is a CPU

    def make():
        model = llama.Llama3(config, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        return model, nnx.Optimizer(model, optax.adamw(1e-6), wrt=nnx.Param)

    def on(x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    graph, state = nnx.split(nnx.eval_shape(make))
    state = jax.tree.map(on, state, nnx.get_partition_spec(state))
    tokens, answers, length = (2 * PAIRS, PROMPT + ANSWER), (2 * PAIRS, ANSWER), PROMPT + ANSWER
    shapes = {
        "input_ids": (tokens, jnp.int32), "positions": (tokens, jnp.int32), "attention_mask": ((*tokens, length), jnp.bool_),
        "ref_chosen_logps": ((PAIRS,), jnp.float32), "ref_rejected_logps": ((PAIRS,), jnp.float32),
        "completion_mask": (answers, jnp.int32),
    }  # fmt: skip
    batch = {name: on(jax.ShapeDtypeStruct(*x), P("fsdp")) for name, x in shapes.items()}

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        example = TrainExample(**batch, logits_to_keep=ANSWER)
        (loss, aux), grads = nnx.value_and_grad(dpo_loss_fn, has_aux=True)(model, example)
        norm = optax.global_norm(grads)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss, aux, norm

    with warnings.catch_warnings(), mesh:  # its code asks this context for the mesh
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        ended = time.perf_counter()
    cost, sizes = hlo.program_cost(compiled.as_text()), compiled.memory_analysis()
    found = {
        "git": git_commit(), "cores": len(os.sched_getaffinity(0)),
        "versions": {name: metadata.version(name) for name in ("google-tunix", "jax", "libtpu", "flax")}, "layers": layers,
        "trace_seconds": traced - began, "compile_seconds": ended - traced, "peak_gib": sizes.peak_memory_in_bytes / GIB,
        "cycles": cost.cycles, "flops": cost.flops, "wire_gib": cost.wire_bytes / GIB,
    }  # fmt: skip
    Path(file).write_text(json.dumps(found, indent=1) + "\n")
    print(f"tunix: {found['cycles'] / 1e6:.0f} Mcycles, {found['peak_gib']:.2f} GiB, sends {found['wire_gib']:.1f} GiB, "
          f"compiled in {found['compile_seconds']:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
