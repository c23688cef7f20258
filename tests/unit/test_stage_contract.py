"""What every stage keeps: README and Config agree, `--help` works, the resolved profile is complete, maths knows no service."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import components
from components.services.launch import Settings, key_of
from pipelines.profile import CONFIGURED as STAGES

FOLDER = Path(components.__file__).parent
EVERY = (*STAGES, "close_run", "stop_run")
EDGES = {"kfp", "mlflow", "boto3", "botocore", "kubernetes"}


@pytest.mark.parametrize("stage", EVERY)
def test_config_and_inputs_are_frozen_and_documented(stage: str) -> None:
    module = importlib.import_module(f"components.{stage}.stage")
    for kind in (module.Config, module.Inputs):
        assert issubclass(kind, Settings)
        assert kind.model_config["frozen"] is True
        assert kind.model_config["extra"] == "forbid"
        for name, field in kind.model_fields.items():
            assert field.description, f"{stage}.{name} says nothing of itself"
            assert field.is_required() or field.get_default(call_default_factory=True) is not None, (
                f"{stage}.{name} defaults to None"
            )


@pytest.mark.parametrize("stage", STAGES)
def test_the_readme_lists_every_knob_with_its_default(stage: str) -> None:
    config = importlib.import_module(f"components.{stage}.stage").Config
    rows = {}
    for line in (FOLDER / stage / "README.md").read_text(encoding="utf-8").partition("## Configuration")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = (json.loads(cells[1].strip("`")), cells[2])
    assert rows == {
        name: (field.get_default(call_default_factory=True), field.description) for name, field in config.model_fields.items()
    }


@pytest.mark.parametrize("stage", EVERY)
def test_the_stage_runs_alone_and_explains_itself(stage: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"components.{stage}", "--help"], capture_output=True, text=True, check=True)
    module = importlib.import_module(f"components.{stage}.stage")
    for name in (*module.Inputs.model_fields, *module.Config.model_fields):
        assert f"--{name.replace('_', '-')} " in done.stdout


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", sorted((FOLDER / "rlhf").glob("*.py")), ids=lambda p: p.name)
def test_the_learning_code_imports_no_service(path: Path) -> None:
    names = imports(path)
    assert not EDGES & {name.partition(".")[0] for name in names}
    assert not [name for name in names if name.startswith("components.services") and name != "components.services.exits"]


@pytest.mark.parametrize("stage", EVERY)
def test_a_stage_never_imports_another(stage: str) -> None:
    for path in (FOLDER / stage).glob("*.py"):
        others = {name for name in imports(path) for each in EVERY if each != stage and name.startswith(f"components.{each}")}
        assert not others, path


def test_no_python_file_trusts_remote_code_or_reads_a_pickle() -> None:
    for path in [*FOLDER.rglob("*.py"), *FOLDER.parent.joinpath("pipelines").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & imports(path), path
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                raise AssertionError(f"{path}: torch.load reads pickles")


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("stage", STAGES)
def test_what_only_changes_speed_and_memory_is_no_part_of_the_key(stage: str) -> None:
    config, inputs = importlib.import_module(f"components.{stage}.stage").Config(), Settings()
    assert set(type(config).model_fields) > config.RUNTIME_ONLY
    for name, value in config:
        other = config.model_copy(update={name: _another(value)})
        same = key_of(stage, other, inputs) == key_of(stage, config, inputs)
        assert same == (name in config.RUNTIME_ONLY), name


def _another(value: Any) -> Any:
    """A value that differs from a setting's default."""
    match value:
        case str():
            return f"{value}x"
        case dict():
            return {**value, "x": "x"}
        case list() | tuple():
            return [*value, "x"]
    return value + 1
