"""Data sets and models of the Hugging Face hub."""

from pathlib import Path
from typing import Literal

from rto_jax.errors import UserError

# No pickled weights, no code.
PATTERNS = {
    "model": ["*.json", "*.safetensors", "*.jinja"],
    "dataset": ["*.jsonl", "*.jsonl.gz", "*.parquet"],
}


def download(name: str, kind: Literal["model", "dataset"]) -> Path:
    """The local folder of the hub's `owner/name`, fetched on first use into huggingface_hub's own cache ($HF_HOME).

    Raises UserError if it can't be fetched: no such name, no permission, no network.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type=kind, allow_patterns=PATTERNS[kind]))
    except Exception as error:  # its own classes, httpx's and OSError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such file or folder, and the hub does not give the {kind} ({reason})") from None
