"""The documents of the bucket's settings: what they say, and that a second look finds nothing to change."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

from components.services.exits import DoNotRetry
from pipelines.cli import app
from pipelines.cluster.bucket_rules import KEPT, OTHERS, Days, Principals, canonical, difference, merged, wanted

STAGE, READER = "arn:aws:iam::000000000000:user/rankloop-stage", "arn:aws:iam::000000000000:user/rankloop-reader"
WHO = Principals((STAGE,), (READER,))
NOTHING: dict[str, Any] = {"versioning": "Disabled", "lifecycle": [], "policy": []}
COMPONENTS = Path(__file__).parents[3] / "components"


def denied(rules: dict[str, Any], who: str, action: str, key: str, bucket: str = "b") -> bool:
    """Whether the policy denies this, by S3's rule: a statement of that principal and action, whose resource matches."""
    resource = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"

    def all_of(value: Any) -> list[str]:
        return [value] if isinstance(value, str) else value

    return any(
        who in all_of(each["Principal"]["AWS"])
        and action in all_of(each["Action"])
        and any(re.fullmatch(re.escape(one).replace(r"\*", ".*"), resource) for one in all_of(each["Resource"]))
        for each in rules["policy"]
    )


@pytest.mark.parametrize(("storage", "below"), [("s3://b", ""), ("s3://b/", ""), ("s3://b/team/a", "team/a/")])
def test_what_is_denied(storage: str, below: str) -> None:
    rules = wanted(storage, WHO, Days(), tls=False)
    for name in KEPT:
        assert denied(rules, STAGE, "s3:DeleteObject", f"{below}{name}/x/y")
        assert not denied(rules, STAGE, "s3:PutObject", f"{below}{name}/x/y")
    for name in OTHERS:
        assert denied(rules, STAGE, "s3:PutObject", f"{below}{name}/x")
    assert not denied(rules, STAGE, "s3:DeleteObject", f"{below}checkpoints/k/policy.safetensors")
    assert not denied(rules, STAGE, "s3:DeleteObject", f"{below}ingests/k/rankloop.json")
    for action in ("s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion"):
        assert denied(rules, READER, action, f"{below}anything")
    assert not denied(rules, READER, "s3:GetObject", f"{below}anything")
    assert denied(rules, STAGE, "s3:DeleteObjectVersion", f"{below}checkpoints/x")
    for who in (STAGE, READER):
        for action in ("s3:PutBucketVersioning", "s3:PutLifecycleConfiguration", "s3:PutBucketPolicy", "s3:DeleteBucket"):
            assert denied(rules, who, action, "")
    assert not denied(rules, "arn:aws:iam::000000000000:user/rankloop-admin", "s3:DeleteObject", f"{below}rankings/x")


def test_every_kind_of_artifact_is_known() -> None:
    """A new `context.uri("kind")` of a stage is either kept, or named here as what stages may delete."""
    stages_may_delete = {"checkpoints", "ingests", "watermarks", "drift", "drifts"}
    found = {
        kind
        for path in COMPONENTS.rglob("*.py")
        for kind in re.findall(r'context\.uri\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert len(found) > 8
    assert found <= {*KEPT, *stages_may_delete}


def test_tls_is_asked_of_all_but_plain_servers() -> None:
    (statement,) = [each for each in wanted("s3://b", WHO, Days(), tls=True)["policy"] if "Condition" in each]
    assert statement["Principal"] == {"AWS": "*"}
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert not [each for each in wanted("s3://b", WHO, Days(), tls=False)["policy"] if "Condition" in each]


def test_lifecycle() -> None:
    rules = {each["ID"]: each for each in wanted("s3://b/p", WHO, Days(3, 4, 5, 6, 7), tls=False)["lifecycle"]}
    assert rules["rankloop-checkpoints"]["Filter"] == {"Prefix": "p/checkpoints/"}
    assert rules["rankloop-checkpoints"]["Expiration"] == {"Days": 3}
    assert rules["rankloop-old-versions"]["Filter"] == {"Prefix": "p/"}
    assert rules["rankloop-old-versions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 4}
    assert rules["rankloop-backups"]["Expiration"] == {"Days": 5}
    assert rules["rankloop-old-versions"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 6}
    expiring = [each["Filter"]["Prefix"] for each in rules.values() if "Days" in each.get("Expiration", {})]
    assert sorted(expiring) == [
        "p/backups/",
        "p/checkpoints/",
        "p/final-failures/",
        "p/pipeline-runs/",
    ]  # no artifact ever expires by itself


def test_others_rules_stay_and_ours_are_replaced() -> None:
    theirs = {"Sid": "Audit", "Effect": "Deny", "Principal": "*", "Action": "s3:PutBucketLogging", "Resource": "arn:aws:s3:::b"}
    rule = {"ID": "logs", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 1}}
    old = wanted("s3://b", Principals(("arn:aws:iam::1:role/gone",), (READER,)), Days(checkpoints=1), tls=True)
    found = {"versioning": "Suspended", "lifecycle": [rule, *old["lifecycle"]], "policy": [theirs, *old["policy"]]}
    ours = wanted("s3://b", WHO, Days(), tls=False)
    to_be = merged(found, ours)
    assert rule in to_be["lifecycle"]
    assert {**theirs, "Principal": {"AWS": "*"}} in to_be["policy"]
    assert "gone" not in json.dumps(to_be)
    assert len(to_be["policy"]) == len(ours["policy"]) + 1
    assert difference(canonical(found), to_be)
    assert difference(to_be, merged(to_be, ours)) == []


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_the_form_that_a_store_returns_makes_no_difference(random: Any, tls: bool) -> None:
    """Order of lists, a list of one as a text, and a principal as `*`."""
    ours = wanted("s3://b/p", WHO, Days(), tls)

    def returned(value: Any) -> Any:
        if isinstance(value, dict):
            keys = list(value)
            random.shuffle(keys)
            return {key: returned(value[key]) for key in keys}
        if isinstance(value, list):
            return random.sample([returned(each) for each in value], len(value))
        return value

    found = returned(ours)
    for each in found["policy"]:
        if each["Principal"] == {"AWS": "*"}:
            each["Principal"] = "*"
        if isinstance(each["Action"], str):
            each["Action"] = [each["Action"]]
    assert difference(canonical(found), ours) == []


def test_the_difference_is_a_diff() -> None:
    lines = difference(canonical(NOTHING), wanted("s3://b", WHO, Days(), tls=False))
    assert lines[:2] == ["--- bucket", "+++ wanted"]
    assert '-  "versioning": "Disabled"' in lines
    assert '+  "versioning": "Enabled"' in lines


def test_a_place_that_is_no_s3_uri_is_refused() -> None:
    with pytest.raises(DoNotRetry, match="'/data' is not an S3 URI"):
        wanted("/data", WHO, Days(), tls=False)


def test_the_command_explains_itself_and_its_options() -> None:
    (told,) = get_command(app).commands["bucket"].commands.values()  # type: ignore[attr-defined]
    assert told.name == "apply"
    assert told.help
    for parameter in told.params:
        assert parameter.help, f"{parameter.name} says nothing of itself"
