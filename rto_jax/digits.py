"""Handwritten digits as tokens: a picture is written pixel by pixel, and a classifier is the gold reward.

The data are scikit-learn's 1,797 digits of 8 x 8 pixels in 17 grey levels. A prompt is one token, the digit that is asked
for; a response is 64 tokens, a grey level each, row by row from the top left, and has no EOS: every picture has 64 pixels.
The gold return of a picture is log p(asked digit | picture) <= 0, in nats, of a neural network trained on the real
digits. As it is never above 0, the optimum of J(pi) = E[R] - beta KL(pi || pi_ref) is a sample of pi_ref that is kept
with probability exp(R/beta), and J* = beta log E_ref[exp(R/beta)]: both can be had from samples alone.
NumPy and scikit-learn only; ids fit the embedded world's vocabulary of 32.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from rto_jax.errors import UserError

SIDE = 8
PIXELS = SIDE * SIDE  # tokens of a response
GREYS = 17  # ids 0 (blank) to 16 (ink) of the grey levels
ASK = 20  # ids 20..29 ask for the digits 0..9
PROMPT_LENGTH = 1
PAD = 31
HELD_OUT = 400  # real digits that neither the policy nor a judge is trained on


class Judges(NamedTuple):
    """Two classifiers of other kinds, trained on the same real digits."""

    gold: Any  # a neural network: its log-probability is the reward
    other: Any  # a support vector machine: it is asked at the end, and never by anything that is trained


@dataclass(frozen=True)
class Digits:
    """The world: real digits cut into two splits, and the judges trained on the first."""

    seed: int = 0
    """draws the splits, and where the neural network starts"""

    def real(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(pictures int32 [n, 64] of 0..16, digits int [n]) of "train" (1,397) or "test" (400)."""
        if split not in ("train", "test"):
            raise UserError(f'the digits have the splits "train" and "test", not {split!r}.')
        pictures, digits = _load()
        order = np.random.default_rng(self.seed).permutation(len(digits))
        index = order[:HELD_OUT] if split == "test" else order[HELD_OUT:]
        return pictures[index], digits[index]

    @property
    def judges(self) -> Judges:
        """Trained at the first call (a few seconds) and kept."""
        return _judges(self)

    def returns(self, prompts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Gold return log p(asked digit | picture), float32 [n], in nats, of prompts [n, 1] and pictures [n, 64]."""
        asked = self.asked(prompts)
        return self.log_probabilities(tokens)[np.arange(len(asked)), asked].astype(np.float32)

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """The gold judge's log p(digit | picture), float64 [n, 10], of pictures [n, 64]."""
        network = self.judges.gold
        with np.errstate(divide="ignore"):
            # A probability that rounds to 0 would make a return infinite.
            return np.maximum(np.log(network.predict_proba(ink(tokens))), -50.0)

    def recognised(self, prompts: np.ndarray, tokens: np.ndarray, judge: str) -> np.ndarray:
        """Whether judge "gold" or "other" sees the digit that was asked for, bool [n]."""
        return getattr(self.judges, judge).predict(ink(tokens)) == self.asked(prompts)

    @staticmethod
    def asked(prompts: np.ndarray) -> np.ndarray:
        """The digits that prompts [n, 1] ask for. UserError for other ids."""
        prompts = np.asarray(prompts)
        if prompts.ndim != 2 or prompts.shape[1] != PROMPT_LENGTH or np.any((prompts < ASK) | (prompts >= ASK + 10)):
            raise UserError(f"prompts of digits are rows of one id, {ASK}..{ASK + 9}.")
        return prompts[:, 0] - ASK


def ink(tokens: np.ndarray) -> np.ndarray:
    """Pictures [n, 64] as numbers 0 (blank) to 1 (ink), float64; an id that is no grey level is blank."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.shape[1] != PIXELS:
        raise UserError(f"pictures are rows of {PIXELS} ids, not an array of shape {list(tokens.shape)}.")
    return np.where((tokens >= 0) & (tokens < GREYS), tokens, 0) / (GREYS - 1)


@lru_cache(maxsize=1)
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from None
    found = load_digits()
    return found.data.astype(np.int32), found.target.astype(int)


@lru_cache(maxsize=8)
def _judges(world: Digits) -> Judges:
    from sklearn.neural_network import MLPClassifier
    from sklearn.svm import SVC

    pictures, digits = world.real("train")
    network = MLPClassifier((64,), alpha=1.0, max_iter=1_000, random_state=world.seed)
    return Judges(network.fit(ink(pictures), digits), SVC(C=4.0, gamma=1.0 / 50).fit(ink(pictures), digits))
