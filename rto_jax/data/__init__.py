"""Files of records -> batches of static shape.

records       JSON Lines in the common shapes -> preferences, examples, prompts (chat messages)
tfds_builder  the same as prepared tensorflow-datasets (array_record, without tensorflow)
hub           data sets and models by their name on the Hugging Face hub
tokenizer     tokenizers and chat templates (transformers, without torch)
pipeline      encoding, padding, and batches through grain, with a state to save

Importing it imports none of tensorflow_datasets, transformers and grain; they load on first use.
"""

from rto_jax.data.hub import download
from rto_jax.data.pipeline import BatchIterator, Encoder, Lengths, Survey, batches, load
from rto_jax.data.records import (
    Example,
    Preference,
    PromptRecord,
    Report,
    held_out_splits,
    read_examples,
    read_preferences,
    read_prompts,
)
from rto_jax.data.tokenizer import Tokenizer, load_tokenizer, smollm2_tokenizer

__all__ = [
    "BatchIterator",
    "Encoder",
    "Example",
    "Lengths",
    "Preference",
    "PromptRecord",
    "Report",
    "Survey",
    "Tokenizer",
    "batches",
    "download",
    "held_out_splits",
    "load",
    "load_tokenizer",
    "read_examples",
    "read_preferences",
    "read_prompts",
    "smollm2_tokenizer",
]
