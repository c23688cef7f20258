"""Recomputes every digest that a version of the registry rests on, from the bytes on S3.

The chain: a version's tags hold the digest of each artifact's `rankloop.json`; that file holds the digest of every file beside it.
A snapshot's name is the digest of its rankings, which is computed again from the rows. What MLflow serves is a copy of its own; the
digests of its files were taken when it was registered. The audit is a chain of its own, whose end the registry remembers.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from components.register_model.aliases import differences
from components.register_model.audit import faults
from components.register_model.lineage import DIGEST_TAG, Artifact, Version, pick, read_lineage, read_versions
from components.register_model.promotion import ANCHOR_TAG, Registry
from components.register_model.versions import SERVED_TAG, served_digests, served_place
from components.services.exits import DoNotRetry
from components.services.storage import FILES, MARKER, Storage, join
from components.services.tracking import mlflow_errors

CHUNK_BYTES = 2**20


class Checked(NamedTuple):
    """Something that was verified: what it is, how many files were read again, and what is wrong with it, in sentences."""

    what: str
    files: int
    wrong: list[str]


def verify_registry(console: Console, registry: Registry, wanted: str) -> bool:
    """Prints what was verified; whether everything is as it was registered.

    Args:
        wanted: version or alias; "": every version.
    """
    versions = read_versions(registry.client, registry.policy)
    chosen = [pick(versions, registry.policy, wanted)] if wanted else versions
    files = wrong = 0
    for checked in [check_audit(registry), *check_versions(registry, chosen)]:
        sign = "✗" if checked.wrong else "✓"
        console.print(f"{sign} {checked.what}", highlight=False, markup=False, soft_wrap=True)
        for each in checked.wrong:
            console.print(f"    {each}", highlight=False, markup=False, soft_wrap=True)
        files += checked.files
        wrong += len(checked.wrong)
    said = f"{wrong} differ{'s' if wrong == 1 else ''}" if wrong else "nothing differs"
    console.print(f"{len(chosen)} version(s), {files} files read again: {said}", highlight=False)
    return not wrong


def check_audit(registry: Registry) -> Checked:
    """The chain of the audit, its end, and whether MLflow's aliases are where it says."""
    wrong: list[str] = []
    records = []
    for number in registry.audit.numbers():
        try:
            records.append(registry.audit.read(number))
        except DoNotRetry as error:
            wrong.append(error.message)
    with mlflow_errors():
        registered = registry.client.search_registered_models(f"name = '{registry.policy}'")
    tags = registered[0].tags if registered else {}
    wrong += faults(records, tags.get(ANCHOR_TAG, ""))
    if records:
        head = records[-1]
        if head.content["event"] == "begun":
            wrong.append(f"record {head.number} began a {head.content['action']} that has not ended: the next run finishes it")
        expected = head.content["aliases"]
        for model, alias, before, found in differences(expected, registry.aliases(sorted(expected))):
            wrong.append(f"{alias} of {model} is version {found or 'none'}, but the audit's last record says {before or 'none'}")
    return Checked(f"audit: {len(records)} records", len(records), wrong)


def check_versions(registry: Registry, versions: list[Version]) -> Iterator[Checked]:
    """Every artifact of every version, each once, and every copy that MLflow serves."""
    seen: set[tuple[str, str]] = set()
    for version in versions:
        lineage = read_lineage(registry.storage, version.tags)
        yield _tags(version, lineage)
        for artifact in lineage.values():
            if artifact.marker and (artifact.uri, artifact.digest) not in seen:
                seen.add((artifact.uri, artifact.digest))
                yield check_artifact(registry.storage, artifact)
        pair = [(registry.policy, version.number)]
        if version.tags.get("reward_model_version"):
            pair.append((version.tags["reward_model_name"], version.tags["reward_model_version"]))
        for name, number in pair:
            if (name, number) not in seen:
                seen.add((name, number))
                yield check_served(registry, name, number)


def _tags(version: Version, lineage: dict[str, Artifact]) -> Checked:
    """Whether the digests in a version's tags are those of the artifacts' markers."""
    wrong = []
    for name, artifact in lineage.items():
        noted = version.tags.get(DIGEST_TAG.format(name), "")
        place = join(artifact.uri, MARKER)
        if not artifact.digest:
            wrong.append(f"{place} is gone")
        elif not noted:
            wrong.append(f"{place}: no digest was registered (tag {DIGEST_TAG.format(name)})")
        elif noted != artifact.digest:
            wrong.append(f"{place} differs: {artifact.digest}, but {noted} was registered")
    return Checked(f"version {version.number}: lineage of {len(lineage)} artifacts", len(lineage), wrong)


def check_artifact(storage: Storage, artifact: Artifact) -> Checked:
    """Every file of a folder against the digests in its marker; a snapshot's rankings against its name, too."""
    wrong = []
    noted: dict[str, str] = artifact.marker.get(FILES, {})
    prefix = artifact.uri.rstrip("/") + "/"
    there = {item.uri.removeprefix(prefix) for item in storage.list(prefix)} - {MARKER}
    if FILES not in artifact.marker:
        wrong.append(f"{prefix}{MARKER} holds no digests of files: an earlier version of rankloop wrote it")
    for name in sorted({*noted, *there} if noted else ()):
        if name not in there:
            wrong.append(f"{prefix}{name} is gone")
        elif name not in noted:
            wrong.append(f"{prefix}{name} was not there when the folder was published")
        elif (found := _digest(storage, prefix + name)) != noted[name]:
            wrong.append(f"{prefix}{name} differs: {found}, but {noted[name]} was published")
    if artifact.name == "snapshot":
        wrong += _check_rankings(storage, artifact)
    return Checked(f"{artifact.name} {artifact.uri}", len(noted), wrong)


def _digest(storage: Storage, uri: str) -> str:
    digest = hashlib.sha256()
    with storage.open_read(uri) as body:
        while chunk := body.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_rankings(storage: Storage, artifact: Artifact) -> list[str]:
    """A snapshot's digest, computed again from its rows, against its marker and its name."""
    from components.ingest_rankings.formats import canonical
    from components.rlhf.records import iterate_snapshot

    whole = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        try:
            storage.fetch_folder(artifact.uri, Path(folder))
            for ranking in iterate_snapshot(Path(folder)):
                whole.update(hashlib.sha256(canonical(ranking._asdict())).digest())
        except (ValueError, OSError) as error:
            return [f"{artifact.uri}: its rankings cannot be read: {error}"]
    found = whole.hexdigest()
    places = {MARKER: artifact.marker.get("digest"), "its name": artifact.uri.rstrip("/").rpartition("/")[2]}
    wrong = [f"{where} says {said}" for where, said in places.items() if said != found]
    return [f"{artifact.uri}: its rankings have digest {found}, but {each}" for each in wrong]


def check_served(registry: Registry, name: str, number: str) -> Checked:
    """The files that MLflow keeps and serves for a version, against the digests that were taken when it was registered."""
    with mlflow_errors():
        version = registry.client.get_model_version(name, number)
    what, noted = f"MLflow's copy of {name} version {number}", version.tags.get(SERVED_TAG, "")
    place = join(registry.uri, served_place(version.source))
    if not noted or not registry.storage.exists(place):
        return Checked(what, 0, [f"no digests of its files were registered (tag {SERVED_TAG} and {place})"])
    listed = registry.storage.get_bytes(place)
    if hashlib.sha256(listed).hexdigest() != noted:
        return Checked(what, 0, [f"{place} differs from what was registered"])
    expected = json.loads(listed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = served_digests(version.source, Path(folder) / "served")
        except DoNotRetry as error:
            return Checked(what, 0, [f"it cannot be fetched: {error.message}"])
    both = sorted({*expected, *found})
    wrong = [
        f"{version.source}/{each} is {_state(expected, found, each)}" for each in both if expected.get(each) != found.get(each)
    ]
    return Checked(what, len(found), wrong)


def _state(expected: dict[str, str], found: dict[str, str], name: str) -> str:
    if name not in found:
        return "gone"
    return "new" if name not in expected else f"different: {found[name]}, but {expected[name]} was registered"
