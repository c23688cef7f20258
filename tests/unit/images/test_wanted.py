"""What an image installs: the requirements of its extras, from the same file as everybody's."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name: str) -> ModuleType:
    """A script of images/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"images_{name}", ROOT / "images" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_packages_own_requirements_come_first_and_each_once() -> None:
    project = {"dependencies": ["a", "b>=2,<3"], "optional-dependencies": {"x": ["c[s3]>=1", "b>=2,<3"], "y": ["Big_One-bin==1"]}}
    wanted = script("wanted").wanted
    assert wanted(project, ["x"], []) == ["a", "b>=2,<3", "c[s3]>=1"]
    assert wanted(project, ["x", "y"], ["big-one-bin"]) == ["a", "b>=2,<3", "c[s3]>=1"]
    with pytest.raises(SystemExit, match="no extra z; it has x, y"):
        wanted(project, ["z"], [])
    with pytest.raises(SystemExit, match="--without d: none of x requires it"):
        wanted(project, ["x"], ["d"])


@pytest.mark.parametrize(("image", "torch"), [("data", False), ("train", True)])
def test_what_the_containerfiles_ask_for(image: str, torch: bool) -> None:
    text = (ROOT / "images" / f"{image}.Containerfile").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "wanted.py /build/pyproject.toml" in line)
    extras, _, without = line.split("/build/pyproject.toml ")[1].split(" >")[0].partition(" --without ")
    lines = script("wanted").wanted(PROJECT, extras.split(), without.split())
    assert any(each.startswith("torch==") for each in lines) == torch
    assert any(each.startswith("kfp") for each in lines), "KFP's executor runs the stage"
    assert not any(each.startswith("seaweedfs") for each in lines)


def test_the_two_files_differ_only_where_the_images_do() -> None:
    data, train = ((ROOT / "images" / f"{image}.Containerfile").read_text().splitlines()[1:] for image in ("data", "train"))
    allowed = ("wanted.py /build/pyproject.toml", "check.py", "image.title", "NVIDIA", "TOKENIZERS_PARALLELISM")
    assert [line for line in set(data) ^ set(train) if not any(word in line for word in allowed)] == []


def test_the_check_finds_what_is_missing_or_not_locked() -> None:
    check = script("check")
    assert check.missing("validate_data", "data") == check.missing("ppo_finetune", "train") == set()
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not [each for each in check.unlocked(lock) if each.startswith("boto3 ")]
    assert [each for each in check.unlocked(lock.replace("boto3==", "boto3==0.")) if each.startswith("boto3 ")]
