"""Step, parameters and optimiser state as one pytree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rto_jax.sharding import tree_shardings
from rto_jax.types import Params


class TrainState(NamedTuple):
    step: jax.Array  # int32, updates done
    params: Params
    opt_state: Any


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update (traceable; works on ShapeDtypeStructs under jax.eval_shape)."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def apply_gradients(state: TrainState, grads: Params, optimizer: optax.GradientTransformation) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def sharded_init(build: Callable, mesh, *args):
    """Run `build(*args)` with its results created in place on the mesh: nothing is ever whole on one device."""
    shardings = tree_shardings(jax.eval_shape(build, *args), mesh)
    return jax.jit(build, out_shardings=shardings)(*args)


def abstract_on(tree, mesh):
    """ShapeDtypeStructs with the table's shardings: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_shardings(tree, mesh)
    )
