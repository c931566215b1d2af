"""The arrays that every part of the project passes around, and the one alignment convention.

Names: B batch, S sequence (prompt and response), T the trailing positions that can hold actions,
P = S - T the prompt's positions, V vocabulary. A row is a prompt, padded on the left to P, then a response,
padded on the right to T; the prompt of a training pair and of a rollout are laid out alike.

Alignment, everywhere: index t of a [B, T] array speaks of the token at position P + t of the row:
`logps[t]` is its log-probability, `values[t]` the value of the state *before* it, `rewards[t]` what it earns.
`mask[t]` says that the token is an action (the EOS is one; padding and other people's turns are not).
Log-probabilities, KL and token rewards are float32, in nats.
"""

from typing import Any, NamedTuple

import jax

AXES = ("data", "fsdp", "tensor")  # of the mesh: batch; batch and parameters; heads, MLP and vocabulary
BATCH, TENSOR = ("data", "fsdp"), "tensor"

Params = Any  # a nested dict of arrays
Metrics = dict[str, jax.Array]


class Sequences(NamedTuple):
    """Prompts with responses. P is not stored: it is tokens.shape[1] - mask.shape[1], at least 1."""

    tokens: jax.Array  # int32 [B, S]
    valid: jax.Array  # bool [B, S]: a real token; of packed rows int32: its example's number in the row, 0 for padding
    mask: jax.Array  # bool [B, T]: an action


class Pairs(NamedTuple):
    """Row i of `chosen` was preferred to row i of `rejected`, both answers to one prompt."""

    chosen: Sequences
    rejected: Sequences


class PackedPairs(NamedTuple):
    """Up to n pairs in a row [prompts | answers | answers] (rto_jax/data/packing.py); its T is that of both answers."""

    rows: Sequences
    chosen: jax.Array  # int32 [B, n]: in which part of the answers the chosen one of a pair is, 0 or 1; -1: no pair


class Prompts(NamedTuple):
    """Prompts, padded on the left."""

    tokens: jax.Array  # int32 [B, P]
    valid: jax.Array  # bool [B, P]


class Experience(NamedTuple):
    """What a rollout leaves for the PPO update. Arrays are [B, T], aligned as in `types`."""

    sequences: Sequences
    logps: jax.Array
    values: jax.Array
    advantages: jax.Array
    returns: jax.Array


def prompt_length(sequences: Sequences) -> int:
    """P, static."""
    return sequences.tokens.shape[-1] - sequences.mask.shape[-1]
