"""Finds a pretrained model: a local folder, an S3 folder, a GGUF file, or a name on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from components.services.exits import DoNotRetry, Retry
from components.services.storage import Storage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from components.rlhf.models import Precision

GGUF = "gguf:"

_log = logging.getLogger(__name__)


def load_pretrained(
    base_model: str, precision: Precision, storage: Storage, scratch: Path, place: torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that `base_model` names, with its tokenizer, ready to be trained.

    Args:
        base_model: `s3://...` (a folder of ours), a local folder, `gguf:FILE.gguf`, `gguf:PACKAGE` (the one GGUF file that an
            installed Python package carries), or a name on the Hub.
        scratch: where S3 folders and converted files are put.
        place: where its weights are put; default: this process's device.

    Raises:
        DoNotRetry: there is no such model, or it cannot be used.
        Retry: the Hub cannot be reached.
    """
    from components.rlhf.models import load_policy

    folder: Path | str = base_model
    if base_model.startswith("s3://"):
        folder = scratch / "base"
        storage.fetch_folder(base_model, folder)
    elif base_model.startswith(GGUF):
        file = find_gguf(base_model.removeprefix(GGUF))
        try:
            folder = convert_gguf(file, scratch / "base")
        except (ValueError, OSError, EOFError) as error:
            raise DoNotRetry(f"{file} cannot be converted: {error}", "download it again") from error
    elif _is_local(base_model):
        folder = _local_folder(base_model)
    try:
        return load_policy(folder, precision, place)
    except ValueError as error:
        raise DoNotRetry(f"{base_model} cannot be used: {error}") from error
    except OSError as error:
        if isinstance(folder, Path):
            raise DoNotRetry(f"{base_model} cannot be loaded: {error}", "it needs safetensors and a tokenizer") from error
        raise Retry(
            f"{base_model!r} is neither a local folder nor to be had from the Hub: {error}",
            "check the name and the network, and HF_TOKEN for a gated model; a local folder begins with ./ or /",
        ) from error


def model_digest(base_model: str) -> str:
    """SHA-256 over a local model's files; "" for one that a name or an S3 URI already identifies, and from scratch.

    Raises:
        DoNotRetry: there is no such model.
    """
    if base_model.startswith(GGUF):
        files = [find_gguf(base_model.removeprefix(GGUF))]
    elif _is_local(base_model):
        files = sorted(path for path in _local_folder(base_model).iterdir() if path.is_file())
    else:
        return ""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_local(base_model: str) -> bool:
    return base_model.startswith((".", "/", "~"))


def _local_folder(base_model: str) -> Path:
    folder = Path(os.path.expanduser(base_model))
    if not os.path.isfile(folder / "config.json"):
        raise DoNotRetry(f"{base_model} is not a model folder: it has no config.json", "correct train_sft.base_model")
    return folder


def find_gguf(where: str) -> Path:
    """The GGUF file at a path, or in an installed package.

    Raises:
        DoNotRetry: there is none, or the package carries several.
    """
    path = Path(os.path.expanduser(where))
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise DoNotRetry(f"there is no GGUF file {path}")
        return path
    spec = importlib.util.find_spec(where) if where.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DoNotRetry(
            f"the package {where!r}, which carries the model, is not installed",
            "for the profile smollm2 run `make smollm2` first",
        )
    found = sorted(p for place in spec.submodule_search_locations for p in Path(place).glob("*.gguf"))
    if len(found) != 1:
        raise DoNotRetry(f"the package {where!r} carries {len(found)} GGUF files, not one", "give the path of one")
    return found[0]


def convert_gguf(file: Path, folder: Path) -> Path:
    """Writes the model of a GGUF file as an ordinary folder, its weights dequantised to float32, and returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _log.info("converting %s to an ordinary model folder", file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder
