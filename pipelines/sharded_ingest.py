"""Rankings in by many pods: each reads its shard of the files, one merges what they made. The snapshot is that of a single ingest.

For sources that one machine reads too slowly. The graph `rlhf` reads the merged snapshot as it reads any source, given as
`rankings` with `rater_ids: kept`.
"""

from typing import NamedTuple

from kfp import dsl

from components.ingest_rankings.component import ingest_shard, merge_shards


class Ingested(NamedTuple):
    """URIs of the merged snapshot and of its report."""

    snapshot_uri: str
    ingest_uri: str


@dsl.pipeline(name="sharded-ingest", description="Human rankings to one immutable snapshot, read by several pods.")
def sharded_ingest(
    rankings: str,
    shards: list,
    rankings_fingerprint: str = "",
    ingest_rankings_config: dict = {},  # noqa: B006 - KFP stores the default, nobody can change it
) -> Ingested:
    """Builds the graph.

    Args:
        rankings: folder, s3:// prefix or hf:// name of the rankings; files, or splits, are dealt to the shards.
        shards: ["1/n", ..., "n/n"]: KFP fans out over a list.
        rankings_fingerprint: changes whenever their content does; KFP's cache key knows parameters, not contents.
        ingest_rankings_config: values of the stage's settings, without `shard`; missing ones take their defaults.
    """
    with dsl.ParallelFor(items=shards) as shard:
        part = ingest_shard(config=ingest_rankings_config, shard=shard, rankings=rankings, fingerprint=rankings_fingerprint)
    merged = merge_shards(config=ingest_rankings_config, rankings=rankings, shard_reports=dsl.Collected(part.outputs["ingest_uri"]))
    return Ingested(snapshot_uri=merged.outputs["snapshot_uri"], ingest_uri=merged.outputs["ingest_uri"])
