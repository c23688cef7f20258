"""Profiles: YAML files of values for the stages' settings, checked before anything starts."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from components.services.exits import DoNotRetry
from components.services.launch import Settings, from_text, parse_settings
from pipelines import METHODS, STAGES, WATCH
from pipelines.yaml_file import read_yaml

CONFIGURED = (*STAGES, WATCH)
FOLDER = Path(__file__).parent / "profiles"


class Simulated(Settings):
    """Rankings of the simulated world, made by the client when no others are given."""

    rankings: int = Field(3000, ge=1)
    """How many rankings, of four replies each."""
    seed: int = 0
    """The same seed makes the same rankings."""


class Profile(Settings):
    """A resolved profile.

    Fields:
        name, description: which, and for what.
        method: what fine-tunes the policy: "ppo", "dpo" or "both".
        simulated: what to simulate, or None if rankings must be given.
        stages: the complete settings of each stage, defaults included.
    """

    name: str
    description: str = ""
    method: str = "ppo"
    simulated: Simulated | None = None
    stages: dict[str, dict[str, Any]]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(
    profile: str, assignments: Sequence[str] = (), seed: int | None = None, method: str = "", own_rankings: bool = False
) -> Profile:
    """The profile with `stage.key=value` assignments on top, every value checked against its stage's `Config`.

    Args:
        profile: a name of ours, or a path to a YAML file.
        assignments: as given with `--set`.
        seed: for every stage that has one, and for the simulation; None leaves the profile's.
        method: what fine-tunes the policy; "" leaves the profile's.
        own_rankings: rankings are given, and what the profile's `simulated` says of the stages is not for them.

    Raises:
        DoNotRetry: unknown profile, method, stage or key, or a wrong value; it names the nearest known name.
    """
    values = _read(profile)
    described = {key: values.pop(key) for key in ("description", "method", "simulated") if key in values}
    method = method or described.get("method", "ppo")
    if method not in METHODS:
        raise DoNotRetry(_unknown("method", method, METHODS))
    of_simulated = _stages_of_simulated(profile, described.get("simulated") or {})
    if not own_rankings:
        values |= {stage: (values.get(stage) or {}) | given for stage, given in of_simulated.items()}
    for assignment in assignments:
        _assign(assignment, values, described)
    stages = {}
    for stage in CONFIGURED:
        config = importlib.import_module(f"components.{stage}.stage").Config
        given = dict(values.pop(stage, None) or {})
        if seed is not None and "seed" in config.model_fields:
            given["seed"] = seed
        stages[stage] = parse_settings(config, given, stage).model_dump(mode="json")
    if values:
        raise DoNotRetry(f"profile {profile}: {_unknown('stage', str(next(iter(values))), CONFIGURED)}")
    simulated = described.get("simulated")
    if simulated is not None:
        simulated = parse_settings(Simulated, simulated | ({} if seed is None else {"seed": seed}), "simulated")
    return Profile(name=profile, description=described.get("description", ""), method=method, simulated=simulated, stages=stages)


def _stages_of_simulated(profile: str, simulated: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Takes the settings of stages out of a profile's `simulated`."""
    found = {stage: simulated.pop(stage) for stage in CONFIGURED if stage in simulated}
    for stage, given in found.items():
        if not isinstance(given, dict):
            raise DoNotRetry(f"profile {profile}: simulated.{stage} = {given!r}: no settings", "see pipelines/profiles/tiny.yaml")
    return found


def _read(profile: str) -> dict[str, Any]:
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else FOLDER / f"{profile}.yaml"
    if not os.path.isfile(path):
        raise DoNotRetry(_unknown("profile", profile, names()), "or give the path of a YAML file")
    values = read_yaml(path)
    if not isinstance(values, dict) or not all(
        isinstance(value, str if key in ("description", "method") else dict) for key, value in values.items()
    ):
        raise DoNotRetry(f"{path} is not a profile", "it maps each stage to its settings; see pipelines/profiles/tiny.yaml")
    return values


def _assign(assignment: str, values: dict[str, Any], described: dict[Any, Any]) -> None:
    name, equals, text = assignment.partition("=")
    stage, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise DoNotRetry(f"--set {assignment}: not an assignment", "write --set stage.key=value")
    if stage == "simulated":
        if described.get("simulated") is None:
            raise DoNotRetry(f"--set {assignment}: this profile simulates nothing")
        described["simulated"][key] = from_text(Simulated, key, text)
        return
    if stage not in CONFIGURED:
        raise DoNotRetry(f"--set {assignment}: {_unknown('stage', stage, CONFIGURED)}")
    config = importlib.import_module(f"components.{stage}.stage").Config
    if key not in config.model_fields:
        raise DoNotRetry(f"--set {assignment}: {_unknown(f'key of {stage}', key, config.model_fields)}")
    values.setdefault(stage, {})[key] = from_text(config, key, text)


def _unknown(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"unknown {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(known)}"
