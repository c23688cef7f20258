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
ELSEWHERE = frozenset({"vllm", "google"})  # optional engines and services that a stage imports only where they are installed


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


def imports_of(module: str) -> tuple[set[str], set[str]]:
    """What a module of ours imports anywhere in its source: modules of ours, and top-level names of others."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return set(), set()
    ours, others = set(), set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("components", "pipelines"):
                ours.add(name)
            else:
                others.add(name.split(".")[0])
    return {name for name in ours if is_module(name)}, others


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False  # a name inside a module


def missing(stage: str) -> set[str]:
    """Packages that the stage may import and that are not here."""
    todo, done, others = [f"components.{stage}.stage"], set(), set()
    while todo:
        module = todo.pop()
        if module not in done:
            done.add(module)
            ours, more = imports_of(module)
            todo.extend(ours)
            others |= more
    return {name for name in others - ELSEWHERE if name not in sys.stdlib_module_names and not is_module(name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", choices=("data", "train"))
    parser.add_argument("lock", type=Path)
    options = parser.parse_args()
    faults = unlocked(options.lock.read_text(encoding="utf-8"))
    stages = stages_of(options.image)
    for stage in stages:
        importlib.import_module(f"components.{stage}.stage")
        faults += [f"{stage} imports {name}, which is not installed" for name in sorted(missing(stage))]
    if faults or not stages:
        raise SystemExit("\n".join(faults) or f"no stage asks for the image {options.image}")
    print(f"{options.image}: all packages as locked; imported {', '.join(stages)}")


if __name__ == "__main__":
    main()
