"""Where a policy can start: a local folder or a GGUF file, and what is said of one that cannot be used."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.exits import DoNotRetry, Retry
from components.train_sft.pretrained import find_gguf, load_pretrained, model_digest

NO_STORE: Any = None


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    tokenizer = train_tokenizer(["my printer is slow and my phone is loud"], 300, 64)
    new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=64, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model folder that a test may spoil."""
    shutil.copytree(original, tmp_path / "model")
    return tmp_path / "model"


def load(base_model: Path | str, scratch: Path) -> tuple[Any, Any]:
    return load_pretrained(str(base_model), "float32", NO_STORE, scratch)


def test_a_local_folder_gives_its_weights_and_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder, tmp_path)
    again = new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=64, seed=3)
    for name, weight in again.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    assert not model.training
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_a_relative_folder_and_one_below_home_are_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("./model", "~/model"):
        assert load(name, tmp_path)[0].config.hidden_size == 16
        assert model_digest(name) == model_digest(str(folder))


@pytest.mark.parametrize("spoil", ["eos is padding", "no padding", "every end is padding"])
def test_padding_is_none_of_the_tokens_that_end_an_answer(spoil: str, folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary = len(tokenizer)
    tokenizer.pad_token = {"eos is padding": tokenizer.eos_token, "no padding": None, "every end is padding": "<|user|>"}[spoil]
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")] if spoil == "every end is padding" else 1
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    model, fixed = load(folder, tmp_path)
    assert fixed.pad_token_id not in (None, fixed.eos_token_id, fixed.convert_tokens_to_ids("<|user|>"))
    assert model.config.pad_token_id == model.generation_config.pad_token_id == fixed.pad_token_id
    assert len(fixed) <= model.get_input_embeddings().num_embeddings <= vocabulary + 1
    logits = model(torch.tensor([[fixed.pad_token_id, 5]])).logits
    assert logits.shape[-1] == model.get_output_embeddings().out_features > fixed.pad_token_id


def test_what_is_no_model_folder_is_named_with_a_remedy(tmp_path: Path) -> None:
    for name in (str(tmp_path), f"{tmp_path}/nowhere", "./nowhere"):
        with pytest.raises(DoNotRetry, match=r"is not a model folder: it has no config\.json") as failed:
            load(name, tmp_path)
        assert failed.value.message.startswith(name)
        assert failed.value.remedy == "correct train_sft.base_model"
        with pytest.raises(DoNotRetry, match=r"has no config\.json"):
            model_digest(name)


def _no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    _no_safetensors(folder)
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_shape(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 24}))


def _one_layer_too_few(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 2}))


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _no_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))


def _damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", ')


def _unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-type"}')


def _scaled_logits(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "final_logit_softcapping": 30.0}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_safetensors, "it needs safetensors and a tokenizer"),
        (_pickled, "it needs safetensors and a tokenizer"),
        (_cut_weights, "damaged"),
        (_other_shape, "do not fit its config.json"),
        (_one_layer_too_few, "model.layers.1"),
        (_no_tokenizer, ""),
        (_no_template, "no chat template"),
        (_no_eos, "no EOS token"),
        (_damaged_config, "config.json"),
        (_unknown_type, "no-such-type"),
        (_scaled_logits, "final_logit_softcapping"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_folder_that_cannot_be_used_is_named_and_not_retried(
    spoil: Callable[[Path], None], said: str, folder: Path, tmp_path: Path
) -> None:
    spoil(folder)
    with pytest.raises(DoNotRetry) as failed:
        load(folder, tmp_path)
    assert failed.value.message.startswith(str(folder))
    assert said in str(failed.value)


def test_a_name_that_the_hub_does_not_give_may_be_there_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Retry, match="'nobody/no-such-model' is neither a local folder nor to be had from the Hub") as failed:
        load("nobody/no-such-model", tmp_path)
    assert "HF_TOKEN" in failed.value.remedy


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package without any model yet."""
    folder = tmp_path / "packages" / "model_carrier_of_this_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    sys.modules.pop(folder.name, None)


def test_the_gguf_file_of_a_path_or_of_a_package_is_found(package: Path, tmp_path: Path) -> None:
    one = package / "tiny.gguf"
    one.write_bytes(b"GGUF")
    assert find_gguf(package.name) == find_gguf(str(one)) == one
    assert model_digest(f"gguf:{package.name}") == model_digest(f"gguf:{one}")
    (package / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(DoNotRetry, match="carries 2 GGUF files, not one") as failed:
        find_gguf(package.name)
    assert failed.value.remedy == "give the path of one"


@pytest.mark.parametrize("name", ["no_such_package", "json", "not a name", "no.such.package", ""])
def test_a_package_without_a_model_is_not_installed_or_carries_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"is not installed|carries 0 GGUF files") as failed:
        load(f"gguf:{name}", tmp_path)
    assert repr(name) in failed.value.message
    assert failed.value.remedy


def test_a_gguf_file_that_is_missing_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"there is no GGUF file \S+/missing\.gguf"):
        load(f"gguf:{tmp_path}/missing.gguf", tmp_path)
    (tmp_path / "damaged.gguf").write_bytes(b"this is no model" * 10)
    with pytest.raises(DoNotRetry, match=r"damaged\.gguf"):
        load(f"gguf:{tmp_path}/damaged.gguf", tmp_path)


def test_the_digest_follows_every_file_and_nothing_else(folder: Path, original: Path) -> None:
    assert model_digest(str(folder)) == model_digest(str(original)), "the place of a folder is no part of it"
    before = model_digest(str(folder))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert model_digest(str(folder)) != before
    shutil.copy(original / template.name, template)
    assert model_digest(str(folder)) == before
    template.rename(folder / "other.jinja")
    assert model_digest(str(folder)) != before
    assert [model_digest(name) for name in ("", "owner/name", "s3://bucket/folder")] == ["", "", ""]
