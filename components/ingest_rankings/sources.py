"""Where rankings come from: a local file or folder, an S3 prefix, or a dataset of the Hugging Face hub.

    rankings.jsonl.gz, data/              a file; or a folder with its sub-folders, or one that `Dataset.save_to_disk` wrote
    s3://bucket/key, s3://bucket/prefix   an object, or every object below `prefix/`, listed page by page
    hf://name[@revision][:split]          read as a stream through the `datasets` library; all splits where none is named

In a folder or below a prefix only names that end in a data suffix are read; a licence or a README beside them is listed as
skipped. A file that is named itself is always read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from components.ingest_rankings.rows import DELIMITERS, PACKED, READ_BYTES, TABLE_ROWS, Block, Row, batched, read_blocks, table_rows
from components.services.exits import DoNotRetry, Retry
from components.services.storage import MARKER, Storage, StoredObject

_PACKABLE = (".jsonl", ".ndjson", ".json", *DELIMITERS)
SUFFIXES = (*_PACKABLE, *(suffix + packed for suffix in _PACKABLE for packed in PACKED), ".parquet", ".arrow", ".feather")
SAVED_DATASET = "dataset_info.json"  # what marks a folder of `Dataset.save_to_disk`
SAVED_DATASETS = "dataset_dict.json"  # and one of `DatasetDict.save_to_disk`
_ABOUT_DATA = {MARKER, SAVED_DATASET, SAVED_DATASETS, "dataset_infos.json", "state.json"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceFile:
    """One file (or one split of a dataset). `blocks` opens it and yields its rows.

    Of an S3 object, `stored` is what the listing said; once the rows have been read to their end, `sha256` has seen every byte.
    """

    uri: str
    blocks: Callable[[], Iterator[Block]]
    stored: StoredObject | None = None
    sha256: Any = None


class Source(NamedTuple):
    """What will be read, in order of name, and what lies beside it and will not."""

    files: list[SourceFile]
    skipped: list[str]


class _HubName(NamedTuple):
    name: str
    revision: str | None
    split: str | None


def find_source(uri: str, storage: Storage, scratch: Path, max_row_bytes: int) -> Source:
    """The files of a source; none of them is opened yet.

    Raises:
        DoNotRetry: there is nothing at `uri`, or no data file in it.
        Retry: the object store or the hub cannot be reached.
    """
    if uri.startswith("s3://"):
        objects, skipped = _objects(uri, storage)
        files = [_object_file(each, storage, scratch, max_row_bytes) for each in objects]
    elif uri.startswith("hf://"):
        files, skipped = _hub_files(_hub_name(uri)), []
    else:
        folder = _local_path(uri)
        if _is_saved_dataset(folder):
            files, skipped = _saved_files(folder), []
        else:
            paths, skipped = _paths(folder)
            files = [SourceFile(str(p), partial(_local_blocks, p, scratch, max_row_bytes)) for p in paths]
    if not files:
        beside = f"; skipped: {', '.join(skipped[:5])}" if skipped else ""
        raise DoNotRetry(f"rankings = {uri!r}: no data file there{beside}", f"give files that end in {', '.join(SUFFIXES)}")
    return Source(files, skipped)


def source_fingerprint(uri: str) -> str:
    """A digest that changes whenever the content of a source does, for the orchestrator's cache key.

    S3: names, sizes and ETags; local files: names and SHA-256 of the content; hub: the revision's commit, and the revision as
    it is written where the hub does not answer.

    Raises:
        DoNotRetry, Retry: as `find_source`.
    """
    digest = hashlib.sha256()
    if uri.startswith("s3://"):
        for item in _objects(uri, Storage())[0]:
            digest.update(f"{item.uri}\0{item.size_bytes}\0{item.etag}\n".encode())
    elif uri.startswith("hf://"):
        hub = _hub_name(uri)
        if os.path.exists(hub.name):
            return source_fingerprint(hub.name)
        digest.update(f"{hub.name}\0{_hub_commit(hub)}\0{hub.split}".encode())
    else:
        folder = _local_path(uri)
        paths = sorted(p for p in folder.rglob("*") if p.is_file()) if _is_saved_dataset(folder) else _paths(folder)[0]
        for path in paths:
            name = path.name if path == folder else path.relative_to(folder).as_posix()
            with _opened(path) as file:
                digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _is_data(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and name not in _ABOUT_DATA


# -- local -----------------------------------------------------------------------------------------------------------------


def _local_path(uri: str) -> Path:
    if "://" in uri:
        raise DoNotRetry(f"rankings = {uri!r}: unknown scheme", "give a local path, s3://bucket/prefix or hf://name")
    path = Path(os.path.expanduser(uri))
    if not uri or not os.path.exists(path):  # pathlib's own raise on a name that is too long, or a user who is not there
        raise DoNotRetry(f"rankings = {uri!r}: no such file or folder", f"check the path; it is taken from {Path.cwd()}")
    return path


def _paths(path: Path) -> tuple[list[Path], list[str]]:
    """Data files and the others; hidden files and folders (`.git`, `.cache`) count as neither."""
    if not path.is_dir():
        return [path], []
    seen = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    inside = sorted(p for p in seen if p.is_file())
    return [p for p in inside if _is_data(p.name)], [str(p) for p in inside if not _is_data(p.name)]


def _opened(path: Path) -> Any:
    """The file unbuffered: `read_blocks` buffers, and Python's own buffer would not mind a signal while it reads a slow pipe."""
    try:
        return open(path, "rb", buffering=0)
    except PermissionError as error:
        raise DoNotRetry(f"{path} cannot be read: {error.strerror}", "give this user the right to read it") from error


def _local_blocks(path: Path, scratch: Path, max_row_bytes: int) -> Iterator[Block]:
    with _opened(path) as stream:
        yield from read_blocks(stream, str(path), scratch, max_row_bytes)


# -- S3 --------------------------------------------------------------------------------------------------------------------


def _objects(uri: str, storage: Storage) -> tuple[list[StoredObject], list[str]]:
    """The object of that very name, or the data files below `uri/`; `data` never means `data-old/`."""
    prefix = uri.rstrip("/") + "/"
    below: list[StoredObject] = []
    for item in storage.list(uri if uri.endswith("/") else uri.rstrip("/")):
        if item.uri == uri and not uri.endswith("/"):
            return [item], []
        if item.uri.startswith(prefix) and not item.uri.endswith("/"):
            below.append(item)
    if not below:
        raise DoNotRetry(f"rankings = {uri!r}: no such object, and none below {prefix}", "check the bucket and the key")
    names = {item.uri: PurePosixPath(item.uri).name for item in below}
    return [o for o in below if _is_data(names[o.uri])], [o.uri for o in below if not _is_data(names[o.uri])]


def _object_file(item: StoredObject, storage: Storage, scratch: Path, max_row_bytes: int) -> SourceFile:
    sha256 = hashlib.sha256()
    return SourceFile(item.uri, partial(_object_blocks, item, sha256, storage, scratch, max_row_bytes), item, sha256)


def _object_blocks(item: StoredObject, sha256: Any, storage: Storage, scratch: Path, max_row_bytes: int) -> Iterator[Block]:
    with storage.open_read(item.uri, item.etag) as stream:
        seen = _Hashed(stream, sha256)
        yield from read_blocks(cast(BinaryIO, seen), item.uri, scratch, max_row_bytes)
        while seen.read(READ_BYTES):  # what stands behind the rows
            pass


class _Hashed:
    """A stream whose bytes a digest sees as they are read."""

    def __init__(self, stream: BinaryIO, sha256: Any) -> None:
        self._stream = stream
        self._sha256 = sha256

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._sha256.update(data)
        return data


# -- datasets --------------------------------------------------------------------------------------------------------------


def _is_saved_dataset(folder: Path) -> bool:
    if (folder / SAVED_DATASETS).is_file():
        return True
    return (folder / SAVED_DATASET).is_file() and (folder / "state.json").is_file()


def _saved_files(folder: Path) -> list[SourceFile]:
    """The dataset of a folder, or its splits; the files are mapped into memory, not read into it."""
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise DoNotRetry(f"{folder} is not a complete folder of Dataset.save_to_disk: {error}", "save it again") from error
    splits = dict(loaded) if isinstance(loaded, DatasetDict) else {"": loaded}
    return [
        SourceFile(f"{folder}:{name}" if name else str(folder), partial(_saved_blocks, split))
        for name, split in sorted(splits.items())
    ]


def _saved_blocks(dataset: Any) -> Iterator[Block]:
    tables = dataset.with_format("arrow").iter(batch_size=TABLE_ROWS)
    batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
    return batched(table_rows(batches, as_stored=True))


def _hub_name(uri: str) -> _HubName:
    name, _, split = uri.removeprefix("hf://").partition(":")
    name, _, revision = name.partition("@")
    if not name:
        raise DoNotRetry(f"rankings = {uri!r} names no dataset", "give it as hf://name[@revision][:split]")
    return _HubName(name, revision or None, split or None)


def _hub_files(hub: _HubName) -> list[SourceFile]:
    from datasets import IterableDatasetDict, load_dataset

    with _HubErrors(hub):
        loaded = load_dataset(hub.name, revision=hub.revision, split=hub.split, streaming=True)
    splits = dict(loaded) if isinstance(loaded, IterableDatasetDict) else {hub.split: loaded}
    revision = f"@{hub.revision}" if hub.revision else ""
    return [
        SourceFile(f"hf://{hub.name}{revision}:{name}", partial(_hub_blocks, hub, split)) for name, split in sorted(splits.items())
    ]


def _hub_blocks(hub: _HubName, dataset: Any) -> Iterator[Block]:
    with _HubErrors(hub):
        yield from batched(Row(number, value, value) for number, value in enumerate(dataset, 1))


def _hub_commit(hub: _HubName) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(hub.name, revision=hub.revision, timeout=10).sha)
    except Exception as error:
        if not _is_network(error) and not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        _log.warning("the hub does not tell the revision of %s (%s): a cached result may be older than it", hub.name, error)
        return str(hub.revision)


def _is_network(error: BaseException) -> bool:
    """By module for the HTTP libraries, of which the hub's client has used three and does not export the errors."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (ConnectionError, TimeoutError)) or library in ("httpx", "httpx2", "requests", "aiohttp", "fsspec")


class _HubErrors:
    """Turns what the hub and its libraries raise into `Retry` (network) or `DoNotRetry` (no such dataset, split or revision)."""

    def __init__(self, hub: _HubName) -> None:
        self._hub = hub

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        from datasets.exceptions import DatasetsError

        named = f"hf://{self._hub.name}"
        remedy = "check name, revision and split; a private dataset needs HF_TOKEN"
        if isinstance(error, (DatasetsError, FileNotFoundError, ValueError, KeyError)):
            raise DoNotRetry(f"{named} cannot be read: {error}", remedy) from error
        if error is not None and _is_network(error):
            raise Retry(f"the hub cannot be reached for {named}: {error}", "check the network, HF_ENDPOINT and proxies") from error
        if isinstance(error, RuntimeError):
            raise DoNotRetry(f"{named} cannot be read: {error}", remedy) from error
