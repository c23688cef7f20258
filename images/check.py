"""Ends a build whose image could not run its stages: `python check.py data requirements.lock`, in the image's own environment.

1. Every installed package is at the version of the lock file.
2. Every stage whose wrapper names this image is imported, with all that it needs at once.
3. Every module that such a stage may import later, inside a function, can be found.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

# torch's CUDA build requires these, each at one exact version; the lock file is resolved with the CPU build, which has none.
BY_TORCH = re.compile(r"(nvidia-|cuda-|triton$)")
ELSEWHERE = frozenset(
    {
        "compression",  # of Python 3.14; a package is in its place before
        "vllm",  # an environment of its own
    }
)

# Starts a training in several processes, so no stage without torch comes to it; the launcher imports it where it is needed.
OF_TRAININGS = "components.services.processes"


def unlocked(lock: str) -> list[str]:
    """Installed packages that the lock file does not pin, or pins at another version."""
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;]+)", lock, re.M))
    pinned = {normal(name): version for name, version in pinned.items()}
    found = []
    for each in importlib.metadata.distributions():
        name, version = normal(each.metadata["Name"]), each.version.split("+")[0]
        if name != "rankloop" and not BY_TORCH.match(name) and pinned.get(name) != version:
            found.append(f"{name} {version}, locked: {pinned.get(name, 'not at all')}")
    return sorted(found)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def stages_of(image: str) -> list[str]:
    """Names of the stages whose KFP wrapper asks for this image."""
    os.environ.update(RANKLOOP_DATA_IMAGE="data", RANKLOOP_TRAIN_IMAGE="train")
    import components

    found = []
    for path in sorted(Path(next(iter(components.__path__))).glob("*/component.py")):
        stage = path.parent.name
        wrapper = getattr(importlib.import_module(f"components.{stage}.component"), stage)
        if wrapper.component_spec.implementation.container.image == image:
            found.append(stage)
    return found


def source_of(module: str) -> Path | None:
    """The file of a module of ours, or None if the name is no module's. Nothing is imported for it."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *rest)
        for file in (path / "__init__.py", path.with_name(path.name + ".py")):
            if file.exists():
                return file
    return None


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """What a file imports anywhere: names that may be modules of ours, and top-level names of others."""
    ours, others = set(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed_only = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in typed_only:
        node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("components", "pipelines"):
                ours.add(name)
            else:
                others.add(name.split(".")[0])
    return ours, others


def missing(stage: str, image: str) -> set[str]:
    """Packages that the stage may import, now or later, and that are not here."""
    todo, others = [f"components.{stage}.stage"], set()
    done = {OF_TRAININGS} if image == "data" else set()
    while todo:
        module = todo.pop()
        path = source_of(module)
        if module not in done and path is not None:
            done.add(module)
            ours, more = imports_of(path)
            todo.extend(ours)
            others |= more
    absent = {name for name in others - sys.stdlib_module_names if importlib.util.find_spec(name) is None}
    return absent - ELSEWHERE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", choices=("data", "train"))
    parser.add_argument("lock", type=Path)
    options = parser.parse_args()
    faults = unlocked(options.lock.read_text(encoding="utf-8"))
    stages = stages_of(options.image)
    for stage in stages:
        importlib.import_module(f"components.{stage}.stage")
        faults += [f"{stage} imports {name}, which is not installed" for name in sorted(missing(stage, options.image))]
    if faults or not stages:
        raise SystemExit("\n".join(faults) or f"no stage asks for the image {options.image}")
    print(f"{options.image}: all packages as locked; imported {', '.join(stages)}")


if __name__ == "__main__":
    main()
