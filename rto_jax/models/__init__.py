"""A Llama-family decoder as pure functions over nested dicts of parameters, and ways to get its weights."""

from rto_jax.models.heads import HEADS, ScalarModel, fold_affine, scalar_model, with_head
from rto_jax.models.llama import Cache, LanguageModel, LlamaConfig, RopeScaling, language_model
from rto_jax.models.load import hf_config, load_hf, load_smollm2
from rto_jax.models.sizes import SIZES

__all__ = [
    "HEADS",
    "SIZES",
    "Cache",
    "LanguageModel",
    "LlamaConfig",
    "RopeScaling",
    "ScalarModel",
    "fold_affine",
    "hf_config",
    "language_model",
    "load_hf",
    "load_smollm2",
    "scalar_model",
    "with_head",
]
