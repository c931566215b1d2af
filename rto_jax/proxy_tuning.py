"""Proxy tuning (From r to Q*, arXiv 2404.12358, section 5.3): a small tuned pair steers a model that is never trained.

    π(a|s) ∝ π_base(a|s) · (π_proxy(a|s)/π_ref(a|s))^α      (eq. 14)

With a DPO model as the proxy and its reference as π_ref the factor is exp(α A*(s, a)/β) (eq. 10 and 15): decoding guided
by the value function that the pair holds.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rto_jax.losses import proxy_logits, token_logps
from rto_jax.types import Params


class ProxyParams(NamedTuple):
    """Three models' parameters and the strength, all traced: one compiled program serves every α."""

    base: Params
    proxy: Params
    reference: Params
    alpha: jax.Array | float
    """α, at least 0: 0 is the base alone, 1 emulates the tuning of the base"""


class ProxyCache(NamedTuple):
    """A cache of each model."""

    base: Any
    proxy: Any
    reference: Any


@dataclasses.dataclass(frozen=True)
class ProxyTuned:
    """The steered policy as a model: `sample` and searches take it, with `ProxyParams` for parameters.

    Its functions are those of `models.LanguageModel` of the same names, but logits are unnormalised whatever the models'
    are. The vocabularies must be the same: other sizes of logits raise ValueError. A step costs a step of the base and
    two of the pair.
    """

    base: Any
    """the functions of the model that is steered, such as a `models.LanguageModel`"""
    proxy: Any
    """those of the pair: π_proxy and π_ref have one architecture"""

    def prefill(self, params: ProxyParams, tokens: jax.Array, valid: jax.Array, cache_length: int):
        """(z of the next token, float32 [B, V]; a ProxyCache of cache_length slots)."""
        return self._steer(params, lambda model, weights: model.prefill(weights, tokens, valid, cache_length))

    def decode(self, params: ProxyParams, token: jax.Array, cache: ProxyCache):
        """(z of the next token, float32 [B, V]; the cache with `token` [B] read)."""
        return self._steer(params, lambda model, weights, own: model.decode(weights, token, own), cache)

    def logits(self, params: ProxyParams, tokens: jax.Array, valid: jax.Array, start: int) -> jax.Array:
        """z of the distributions that tokens[:, start:] are drawn from, float32 [B, S − start, V]; start is static."""
        return self._steer(params, lambda model, weights: (model.logits(weights, tokens, valid, start), None))[0]

    def logps(self, params: ProxyParams, tokens: jax.Array, valid: jax.Array, start: int, mask=None, temperature=1.0):
        """Log-probabilities of tokens[:, start:], float32 [B, S − start], nats, 0 where mask is False; by whole logits."""
        chosen = tokens[:, start:]
        mask = jnp.ones(chosen.shape, bool) if mask is None else mask
        logps = token_logps(self.logits(params, tokens, valid, start), jnp.where(mask, chosen, 0), temperature=temperature)
        return jnp.where(mask, logps, 0.0)

    def _steer(self, params: ProxyParams, run, *caches: ProxyCache) -> tuple[jax.Array, ProxyCache]:
        """`run` takes a model, its parameters and, where caches are given, its own, and gives logits and a cache."""
        models = (self.base, self.proxy, self.proxy)
        logits, after = zip(*(run(*each) for each in zip(models, params[:3], *caches, strict=True)), strict=True)
        return proxy_logits(*logits, alpha=params.alpha), ProxyCache(*after)
