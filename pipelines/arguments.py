"""What a run is given: a profile and its sources as the parameters of a graph, with digests that make KFP's cache right.

KFP's cache key holds parameters and no content, so for every source whose content can change there is a fingerprint beside it.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from components.services.launch import json_digest
from components.services.storage import Storage, join
from pipelines import STAGES, WATCH
from pipelines.profile import Profile


class Sources(NamedTuple):
    """What a run reads, each a path or URI: rankings ("" for the profile's simulated ones), and optional texts for SFT and PPO."""

    rankings: str
    demonstrations: str
    pretraining: str


class Fingerprints(NamedTuple):
    """Digests that change whenever the content of a source does."""

    rankings: str
    sft: str
    pretraining: str


def fingerprints_of(profile: Profile, sources: Sources, storage: Storage, salt: str) -> Fingerprints:
    """The digests; local files are read, of S3 objects below a prefix the names, sizes and ETags.

    Args:
        salt: what makes the raters' pseudonyms; "" where ids are kept, or where it is not known here.
    """
    from components.ingest_rankings.raters import salt_fingerprint
    from components.ingest_rankings.sources import source_fingerprint
    from components.ppo_finetune.pretraining import read_texts
    from components.train_sft.stage import fingerprint_of

    found, salted = source_fingerprint(sources.rankings), salt_fingerprint(salt)
    return Fingerprints(
        json_digest([found, salted]) if salted else found,
        fingerprint_of(sources.demonstrations, profile.stages["train_sft"]["base_model"], storage),
        json_digest(read_texts(sources.pretraining, storage)) if sources.pretraining else "",
    )


def arguments_of(profile: Profile, sources: Sources, fingerprints: Fingerprints, graph: str) -> dict[str, Any]:
    """The parameters of the graph `rlhf` or `drift_watch`."""
    arguments: dict[str, Any] = {
        "rankings": sources.rankings,
        "method": profile.method,
        "rater_study": "on" if profile.stages["rater_study"]["folds"] else "off",
        "rankings_fingerprint": fingerprints.rankings,
        "demonstrations": sources.demonstrations,
        "sft_fingerprint": fingerprints.sft,
        "pretraining": sources.pretraining,
        "pretraining_fingerprint": fingerprints.pretraining,
        **{f"{stage}_config": profile.stages[stage] for stage in STAGES},
    }
    if graph == "drift_watch":
        arguments[f"{WATCH}_config"] = profile.stages[WATCH]
    return arguments


def upload_simulated(storage: Storage, root: str, rankings: int, seed: int) -> str:
    """Makes simulated rankings and puts them where a rater's tool would: an object on S3, named by its content."""
    from components.simulated_world.generate import write_rankings

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rankings.jsonl.gz"
        write_rankings(path, rankings, seed)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        uri = join(root, "incoming", f"simulated-{rankings}-{seed}-{digest}.jsonl.gz")
        storage.upload_file(path, uri)
    return uri
