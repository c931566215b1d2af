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
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), len(leaves))
    leaves = [_add(p, u, key) for p, u, key in zip(leaves, jax.tree.leaves(updates), keys, strict=True)]
    return TrainState(state.step + 1, jax.tree.unflatten(tree, leaves), opt_state)


def _add(param: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
    """param + update. A bfloat16 is rounded up or down at random, so that the mean is exact.

    Rounded to the nearest, an update below 2^-9 of the parameter is lost, at every step anew: with the papers' learning
    rates (5e-7) that is nearly all of them.
    """
    total = param.astype(jnp.float32) + update
    if param.dtype != jnp.bfloat16:
        return total.astype(param.dtype)
    noise = jax.random.bits(key, param.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def over(base: Params | None, params: Params | None) -> Params | None:
    """A model whose weights lie in two trees: those of `params` (trained, say) instead of the base's, or beside them."""
    return params if base is None else base | params


def sharded_init(build: Callable, mesh, *args):
    """Run `build(*args)` with its results created in place on the mesh: nothing is ever whole on one device."""
    shardings = tree_shardings(jax.eval_shape(build, *args), mesh)
    return jax.jit(build, out_shardings=shardings)(*args)


def abstract_on(tree, mesh):
    """ShapeDtypeStructs with the table's shardings: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, tree_shardings(tree, mesh)
    )
