"""A graph as a file for a cluster: KFP's YAML, or the Kubernetes objects Pipeline and PipelineVersion for GitOps.

rankloop compile --graph rlhf --resources lean --format kubernetes
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from components.images import DATA, TRAIN
from components.services.exits import DoNotRetry
from pipelines.policy import DIGEST, Graph, check
from pipelines.resources import Resources

FORMATS = ("kfp", "kubernetes")
NAMESPACE = "rankloop"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML has it, is ten times as fast


def build(graph: str, resources: Resources) -> Any:
    """The graph as a KFP pipeline, placed by the table.

    Raises:
        DoNotRetry: there is no such graph.
    """
    from pipelines.local_run import GRAPHS

    if graph not in GRAPHS:
        raise DoNotRetry(f"unknown graph {graph!r}; known: {', '.join(GRAPHS)}")
    return GRAPHS[graph](resources)


def compiled(pipeline: Any, path: Path) -> Graph:
    """Writes KFP's YAML to the path and reads it back."""
    from kfp import compiler

    compiler.Compiler().compile(pipeline, str(path))
    return Graph(*yaml.load_all(path.read_text(encoding="utf-8"), Loader=_LOADER))


def write_package(
    graph: str,
    resources: Resources,
    output: Path,
    form: str = "kfp",
    tags_allowed: bool = False,
    namespace: str = NAMESPACE,
) -> Graph:
    """Compiles a graph, checks it against the policy, and writes it; nothing is written if it breaks a rule.

    Args:
        graph: "rlhf", "drift_watch" or "sharded_ingest".
        output: the file, .yaml.
        form: "kfp", to be uploaded; "kubernetes", objects to be applied.
        tags_allowed: whether images may be named by a tag, which can be moved.
        namespace: of the Kubernetes objects.

    Raises:
        DoNotRetry: unknown graph or form, an image without digest, or a breach of the policy.
    """
    if form not in FORMATS:
        raise DoNotRetry(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    if output.suffix not in (".yaml", ".yml"):
        raise DoNotRetry(f"{output}: the file's name must end in .yaml")
    if not tags_allowed:
        _refuse_tags()
    pipeline = build(graph, resources)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.yaml"
        found = compiled(pipeline, path)
        check(found, resources, tags_allowed)
        if form == "kubernetes":
            _write_objects(pipeline, path, namespace)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output)
    return found


def _write_objects(pipeline: Any, path: Path, namespace: str) -> None:
    """Replaces KFP's YAML by the objects. A version cannot be changed, so each content has a name of its own."""
    from kfp import compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    name = f"{pipeline.name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    options = KubernetesManifestOptions(
        pipeline_name=pipeline.name,
        pipeline_version_name=name,
        pipeline_version_display_name=name,
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    compiler.Compiler().compile(pipeline, str(path), kubernetes_manifest_format=True, kubernetes_manifest_options=options)


def _refuse_tags() -> None:
    for variable, image in (("RANKLOOP_DATA_IMAGE", DATA), ("RANKLOOP_TRAIN_IMAGE", TRAIN)):
        if not DIGEST.search(image):
            raise DoNotRetry(
                f"{variable} = {image!r} names no digest: what a tag names can change between two attempts of a stage",
                f"set {variable}=REGISTRY/NAME@sha256:… as the push printed it, or give --allow-tags to try something out",
            )
