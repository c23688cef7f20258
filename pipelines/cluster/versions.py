"""The compiled graph as a version of a KFP pipeline. Its name carries the digest of its content, so each content is there once."""

from __future__ import annotations

import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from pipelines.cluster.connection import Connection, Refused
from pipelines.package import write_package
from pipelines.resources import Resources

INGESTS = ("comp-ingest-rankings", "comp-ingest-shard")  # components that read what may have changed since


class Version(NamedTuple):
    """A version in KFP. `name` is `<graph>-<digest>`; `uploaded` whether it was not there before."""

    pipeline_id: str
    version_id: str
    name: str
    uploaded: bool


def upload(kfp: Connection, graph: str, resources: Resources, tags_allowed: bool, fresh_ingest: bool = False) -> Version:
    """Compiles the graph and has its version in KFP; of callers at the same time, all get the same one.

    Args:
        fresh_ingest: read the rankings in every run. A schedule's parameters are the same in every run, so KFP would take the first
            run's snapshot from its cache for ever.

    Raises:
        DoNotRetry, Retry: the graph breaks the policy, or KFP refuses or cannot be reached.
    """
    name, package = _named(graph, resources, tags_allowed, fresh_ingest)
    pipeline_id = _pipeline(kfp, _pipeline_name(graph))
    found = _version(kfp, pipeline_id, name)
    if found:
        return Version(pipeline_id, found, name, False)
    send = kfp.client.pipeline_uploads.upload_pipeline_version
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.yaml"
        path.write_bytes(package)
        try:
            made = kfp.ask(f"version {name}", send, str(path), name=name, pipelineid=pipeline_id, again=False)
        except Refused as error:
            found = _version(kfp, pipeline_id, name) if error.status in (400, 409) else ""
            if not found:
                raise
            return Version(pipeline_id, found, name, False)  # somebody else's upload of the same was faster
    return Version(pipeline_id, str(made.pipeline_version_id), name, True)


def find(kfp: Connection, graph: str, resources: Resources, tags_allowed: bool, fresh_ingest: bool = False) -> Version:
    """What `upload` would give, with "" for an id that is not there yet; it changes nothing."""
    name, _ = _named(graph, resources, tags_allowed, fresh_ingest)
    pipeline_id = _pipeline_named(kfp, _pipeline_name(graph))
    return Version(pipeline_id, _version(kfp, pipeline_id, name) if pipeline_id else "", name, False)


def _pipeline_name(graph: str) -> str:
    return graph.replace("_", "-")


def _named(graph: str, resources: Resources, tags_allowed: bool, fresh_ingest: bool) -> tuple[str, bytes]:
    """Name and content of the graph's version."""
    package = _package(graph, resources.model_dump_json(), tags_allowed, fresh_ingest)
    return f"{_pipeline_name(graph)}-{hashlib.sha256(package).hexdigest()[:12]}", package


@cache
def _package(graph: str, resources: str, tags_allowed: bool, fresh_ingest: bool) -> bytes:
    """The compiled graph; a receiver of events compiles it once, for it takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.yaml"
        table = Resources.model_validate_json(resources)
        # KFP looks at the whole stack at each setting of each task. In a thread the stack is short.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(write_package, graph, table, path, tags_allowed=tags_allowed).result()
        if fresh_ingest:
            read_anew(path)
        return path.read_bytes()


def read_anew(path: Path) -> None:
    """Switches KFP's cache off for the tasks that read rankings, in a compiled graph."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=loader))
    for component in (documents[0]["root"], *documents[0]["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            if task["componentRef"]["name"].startswith(INGESTS):
                task["cachingOptions"] = {}
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    path.write_text(yaml.dump_all(documents, Dumper=dumper), encoding="utf-8")


def _pipeline(kfp: Connection, name: str) -> str:
    import kfp_server_api

    body = kfp_server_api.V2beta1Pipeline(display_name=name, name=name, namespace=kfp.namespace or None)
    create = kfp.client.pipelines.pipeline_service_create_pipeline
    return kfp.made_once(f"pipeline {name}", lambda: _pipeline_named(kfp, name), create, body, "pipeline_id")


def _pipeline_named(kfp: Connection, name: str) -> str:
    call = kfp.client.pipelines.pipeline_service_list_pipelines
    # An empty namespace finds what every namespace shares, and a single user's.
    for each in kfp.pages("pipelines", call, "pipelines", namespace=kfp.namespace):
        if name in (each.name, each.display_name):
            return str(each.pipeline_id)
    return ""


def _version(kfp: Connection, pipeline_id: str, name: str) -> str:
    call = kfp.client.pipelines.pipeline_service_list_pipeline_versions
    for each in kfp.pages("versions", call, "pipeline_versions", pipeline_id=pipeline_id, sort_by="created_at desc"):
        if name in (each.name, each.display_name):
            return str(each.pipeline_version_id)
    return ""
