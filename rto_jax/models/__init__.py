"""A Llama-family decoder as pure functions over nested dicts of parameters, and ways to get its weights."""

from rto_jax.models.frozen import FROZEN, freeze, init_adapters, merge, rescaled, thaw
from rto_jax.models.heads import HEADS, ScalarModel, fold_affine, scalar_model, with_head
from rto_jax.models.llama import REMAT, Cache, LanguageModel, LlamaConfig, LoraConfig, RopeScaling, language_model
from rto_jax.models.load import hf_config, load_hf, load_smollm2
from rto_jax.models.sizes import SIZES

__all__ = [
    "FROZEN",
    "HEADS",
    "REMAT",
    "SIZES",
    "Cache",
    "LanguageModel",
    "LlamaConfig",
    "LoraConfig",
    "RopeScaling",
    "ScalarModel",
    "fold_affine",
    "freeze",
    "hf_config",
    "init_adapters",
    "language_model",
    "load_hf",
    "load_smollm2",
    "merge",
    "rescaled",
    "scalar_model",
    "thaw",
    "with_head",
]
