"""Files are dealt to shards: each to one, and always to the same."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from components.ingest_rankings.shards import files_of, shard_of
from components.ingest_rankings.sources import Source, SourceFile
from components.ingest_rankings.stage import Config


def names(source: Source) -> list[str]:
    return [file.uri for file in source.files]


def source(root: str, count: int) -> Source:
    return Source([SourceFile(f"{root}/{number}.jsonl", lambda: iter(())) for number in range(count)], [])


def test_each_file_is_in_one_shard_and_stays_there_when_others_arrive() -> None:
    root = "s3://bucket/data"
    few, many = ([files_of(source(root, count), root, shard_of(f"{i}/8")) for i in range(1, 9)] for count in (50, 400))
    assert sorted(name for part in many for name in names(part)) == sorted(names(source(root, 400)))
    for before, after in zip(few, many, strict=True):
        assert set(names(before)) <= set(names(after))
    assert min(len(part.files) for part in many) > 25
    elsewhere = files_of(source("/mnt/data", 400), "/mnt/data/", shard_of("3/8"))
    assert [name.removeprefix("/mnt/data") for name in names(elsewhere)] == [name.removeprefix(root) for name in names(many[2])]


def test_one_shard_is_everything() -> None:
    assert names(files_of(source("d", 9), "d", shard_of("1/1"))) == names(source("d", 9))


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "1.0/2"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="not a shard"):
        Config(shard=text)


def test_groups_are_not_cut_into_shards() -> None:
    with pytest.raises(ValidationError, match="rows of a group may lie in files of other shards"):
        Config(shard="1/2", group="prompt")
    assert Config(shard="1/1", group="prompt").shard == "1/1"
