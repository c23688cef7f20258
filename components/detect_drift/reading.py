"""Reads what a watch compares: the champion's snapshot, the rankings since, and the champion's models."""

from __future__ import annotations

import heapq
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.detect_drift.champion import Champion
from components.detect_drift.channels import Eyes, Known
from components.detect_drift.features import Judgement, TextFeatures, judge, mean_judgement, text_features
from components.detect_drift.units import Dated, digest_of, rater_day
from components.detect_drift.watch import chance
from components.rlhf.models import Precision, load_policy, load_scorer, member_folders
from components.rlhf.records import Ranking, iterate_snapshot, prompt_key
from components.rlhf.spread import load_spread
from components.services.exits import DoNotRetry
from components.services.launch import Context

SALT = "rater_salt_fingerprint"  # in a snapshot's manifest


def read_reference(folder: Path, most: int) -> tuple[Known, list[Dated]]:
    """Keys of all that is in the champion's snapshot, and the rankings of the units that may be chosen as reference.

    Two passes, so that memory holds the keys and a few thousand rankings, whatever the size of the snapshot. A unit is chosen by
    the hash of its key, and with it come all of its rankings: which of them is the first is seen only then.
    """
    known = Known(set(), set(), set())
    counts: Counter[str] = Counter()
    held_out: set[str] = set()
    for ranking in iterate_snapshot(folder):
        key = prompt_key(ranking.prompt)
        digest = digest_of(ranking)
        known.rankings.add(digest)
        known.rater_days.add(rater_day(ranking, digest))
        counts[key] += 1
        if ranking.split == "test":
            held_out.add(key)
    known.prompts.update(counts)

    def chosen(keys: Iterable[str]) -> set[str]:
        return set(heapq.nsmallest(most, keys, key=lambda key: chance("sample", key)))

    prompts = chosen(known.prompts) | chosen(held_out) | chosen(key for key, count in counts.items() if count > 1)
    days = chosen(known.rater_days)
    kept: dict[str, Dated] = {}
    for ranking in iterate_snapshot(folder):
        digest = digest_of(ranking)
        if prompt_key(ranking.prompt) in prompts or rater_day(ranking, digest) in days:
            kept[digest] = Dated(digest, ranking)
    return known, list(kept.values())


def read_since(folder: Path, known: Known) -> list[Dated]:
    """The rankings that are not in the champion's snapshot, each once."""
    found: dict[str, Dated] = {}
    for ranking in iterate_snapshot(folder):
        digest = digest_of(ranking)
        if digest not in known.rankings:
            found[digest] = Dated(digest, ranking)
    return list(found.values())


def check_salts(markers: Mapping[str, Mapping[str, Any]]) -> None:
    """Two snapshots, by their URIs, can be compared only if their raters' pseudonyms were made with the same salt.

    Under another salt every rater is somebody else, and with the rater every ranking: all of them would look new. A snapshot whose
    manifest tells no fingerprint (made before there was one, or not by `ingest_rankings`) is taken as it is; "" is one of kept ids.

    Raises:
        DoNotRetry: they were not.
    """
    told = {uri: marker[SALT] for uri, marker in markers.items() if SALT in marker}
    if len(set(told.values())) > 1:
        which = " and ".join(f"{uri} ({salt or 'ids were kept'})" for uri, salt in told.items())
        raise DoNotRetry(
            f"the raters of these snapshots were hashed with different salts, by their fingerprints: {which}; "
            "all raters and all rankings would look new",
            "ingest both with the same RANKLOOP_RATER_SALT and ingest_rankings.rater_ids, or train a champion on the new snapshot",
        )


class Models:
    """The champion's models, each loaded when it is needed, and one at a time in memory."""

    def __init__(self, context: Context, champion: Champion, precision: Precision, batch_tokens: int) -> None:
        self._context, self._champion = context, champion
        self._precision, self._batch_tokens = precision, batch_tokens
        self._folder = Path()
        self._loaded: Any = None

    @property
    def eyes(self) -> Eyes:
        return Eyes(self._read, self._judge)

    def _read(self, rankings: Sequence[Ranking]) -> TextFeatures:
        uri = self._champion.policy_uri
        model, tokenizer = self._load(self._fetched(uri, "policy"), uri, load_policy)
        return text_features(self._context, model, tokenizer, rankings, self._batch_tokens)

    def _judge(self, rankings: Sequence[Ranking]) -> list[Judgement]:
        uri = self._champion.reward_model_uri
        by_member = []
        for folder in member_folders(self._fetched(uri, "reward_model")):
            model, tokenizer = self._load(folder, uri, load_scorer)
            by_member.append(judge(model, tokenizer, rankings, self._batch_tokens))
            del model  # before the next one is loaded
        return [mean_judgement(each) for each in zip(*by_member, strict=True)]

    def _fetched(self, uri: str, role: str) -> Path:
        folder = self._context.scratch / "models" / role
        if not folder.exists():
            marker = self._context.storage.fetch_folder(uri, folder)
            if marker.get("role") != role:
                shutil.rmtree(folder)
                raise DoNotRetry(f"{uri} is a {marker.get('role')!r}, not a {role!r}", "correct the tags of the champion's version")
        return folder

    def _load(self, folder: Path, uri: str, load: Callable[..., Any]) -> Any:
        if self._folder != folder:
            self._folder, self._loaded = Path(), None
            try:
                self._loaded = load_spread(lambda place: load(folder, self._precision, place))
            except (ValueError, OSError) as error:
                raise DoNotRetry(f"{uri} cannot be loaded: {error}", "promote a champion whose artifacts are whole") from error
            self._folder = folder
        return self._loaded
