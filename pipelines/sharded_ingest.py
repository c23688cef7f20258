"""Rankings in by many pods: each reads its shard of the files, one merges what they made. The snapshot is that of a single ingest.

For sources that one machine reads too slowly. The graph `rlhf` reads the merged snapshot as it reads any source, given as
`rankings` with `rater_ids: kept`.
"""

from typing import Any, NamedTuple

from kfp import dsl

from components.ingest_rankings.component import ingest_shard, merge_shards
from pipelines.placement import Gpus, default_gpus, placed_by
from pipelines.resources import Resources


class Ingested(NamedTuple):
    """URIs of the merged snapshot and of its report."""

    snapshot_uri: str
    ingest_uri: str


def sharded_ingest_graph(resources: Resources | None = None) -> Any:
    """The graph as a KFP pipeline, its tasks placed by the table of resources; without one, as a machine alone runs it."""
    gpus = default_gpus(resources)

    @dsl.pipeline(name="sharded-ingest", description="Human rankings to one immutable snapshot, read by several pods.")
    def sharded_ingest(
        rankings: str,
        shards: list,
        rankings_fingerprint: str = "",
        small_gpu: str = gpus.small_gpu,
        small_gpu_nodes: dict = gpus.small_gpu_nodes,
        gpu_tolerations: list = gpus.gpu_tolerations,
        ingest_rankings_config: dict = {},  # noqa: B006 - KFP stores the default, nobody can change it
    ) -> Ingested:
        """Builds the graph.

        Args:
            rankings: folder, s3:// prefix or hf:// name of the rankings; files, or splits, are dealt to the shards.
            shards: ["1/n", ..., "n/n"]: KFP fans out over a list.
            rankings_fingerprint: changes whenever their content does; KFP's cache key knows parameters, not contents.
            small_gpu, small_gpu_nodes, gpu_tolerations: the GPUs of a cluster (`placement.Gpus`); large ones are not used.
            ingest_rankings_config: values of the stage's settings, without `shard`; missing ones take their defaults.
        """
        placed = placed_by(resources, Gpus(small_gpu, small_gpu_nodes, small_gpu, small_gpu_nodes, gpu_tolerations))
        with dsl.ParallelFor(items=shards) as shard:
            # KFP 2.17 ignores a retry policy within ParallelFor (kubeflow/pipelines#12389): a shard that fails ends the run, and
            # the next run has the others from KFP's cache.
            part = placed(
                ingest_shard(config=ingest_rankings_config, shard=shard, rankings=rankings, fingerprint=rankings_fingerprint)
            )
        reports = dsl.Collected(part.outputs["ingest_uri"])
        merged = placed(merge_shards(config=ingest_rankings_config, rankings=rankings, shard_reports=reports))
        return Ingested(snapshot_uri=merged.outputs["snapshot_uri"], ingest_uri=merged.outputs["ingest_uri"])

    return sharded_ingest
