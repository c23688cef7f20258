"""infra/README.md says what the manifests say, and the script for AWS asks for what its documents hold."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster_tools import INFRA, containers, pod_spec, rendered, run_secrets_script, secrets_in

README = (INFRA / "README.md").read_text(encoding="utf-8")
# Stands in for the aws command line: it answers two questions, refuses to make a role that is there, and notes every call.
AWS = """#!/usr/bin/env bash
printf '%s\\0' "$@" $'\\n' >>"$CALLS"
case $2 in
get-caller-identity) echo 123456789012 ;;
describe-cluster) echo https://oidc.example.org/id/ABC ;;
create-role) [ "$4" != rankloop-stage ] ;;
esac
"""


def test_the_table_of_costs_is_that_of_the_manifests() -> None:
    rows = []
    for thing in rendered("overlays/on-prem"):
        if thing["kind"] in ("Deployment", "StatefulSet"):
            (container,) = containers(pod_spec(thing) or {})
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            disk = [claim["spec"]["resources"]["requests"]["storage"] for claim in thing["spec"].get("volumeClaimTemplates", [])]
            cells = [f"{asked['cpu']} to {most['cpu']}", f"{asked['memory']} to {most['memory']}", *(disk or ["–"])]
            rows.append(f"| `{thing['metadata']['name']}` | {' | '.join(cells)} |")
    assert sorted(rows) == sorted(re.findall(r"^\| `rankloop-\w+` \| .* to .*$", README, re.M))


def test_the_quota_is_that_of_the_base() -> None:
    (hard,) = (each["spec"]["hard"] for each in rendered("base") if each["kind"] == "ResourceQuota")
    told = (
        f"{hard['requests.nvidia.com/gpu']} GPUs, {hard['requests.cpu']} cores and {hard['requests.memory'].removesuffix('Gi')} GiB"
    )
    assert told in " ".join(README.split())


def test_every_folder_is_in_the_table_and_the_first_run_takes_ten_commands() -> None:
    folders = {f"{kind}/{path.name}" for kind in ("components", "overlays") for path in (INFRA / kind).iterdir()}
    assert folders == {name.rstrip("/") for name in re.findall(r"^\| `((?:components|overlays)/[\w-]+/?)` \|", README, re.M)}
    section = README.split("ten commands\n")[1].split("**On AWS**")[0]
    block = re.search(r"(?:^    .*\n)+", section, re.M)
    assert block
    assert len(re.sub(r"\\\n", "", block[0]).strip().splitlines()) == 10
    (rule,) = (each for each in rendered("overlays/aws") if each["kind"] == "PrometheusRule")
    alerts = sum(len(group["rules"]) for group in rule["spec"]["groups"])
    assert {"eleven": 11}[re.findall(r"ServiceMonitors, and (\w+) alerts", README)[0]] == alerts


def test_every_secret_that_the_script_makes_is_in_the_table(tmp_path: Path) -> None:
    assert run_secrets_script(tmp_path).returncode == 0
    table = [line for line in README.split("## Secrets")[1].splitlines() if line.startswith("| `")]
    for name, keys in secrets_in(tmp_path).items():
        names = (f"`{name}`", f"`{name.removeprefix('rankloop')}`")
        (row,) = (line for line in table if any(each in line.split("|")[1] for each in names))
        for key in keys:
            assert key in row
        assert "`infra/secrets.sh`" in row


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What overlays/aws/roles.sh asks of aws."""
    tmp_path = tmp_path_factory.mktemp("aws")
    (tmp_path / "aws").write_text(AWS, encoding="utf-8")
    (tmp_path / "aws").chmod(0o755)
    environment = {**os.environ, "AWS": str(tmp_path / "aws"), "CALLS": str(tmp_path / "calls")}
    done = subprocess.run([INFRA / "overlays/aws/roles.sh", "prod"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [call.split("\0")[:-1] for call in (tmp_path / "calls").read_text(encoding="utf-8").split("\n\0") if call]


def test_the_roles_are_made_or_brought_up_to_date(calls: list[list[str]]) -> None:
    made = [each[each.index("--role-name") + 1] for each in calls if each[1] == "create-role"]
    annotated = {
        each["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].rpartition("/")[2]
        for each in rendered("overlays/aws")
        if each["kind"] == "ServiceAccount" and "annotations" in each["metadata"]
    }
    assert set(made) == {*annotated, "rankloop-reader"}
    assert [each[each.index("--role-name") + 1] for each in calls if each[1] == "update-assume-role-policy"] == ["rankloop-stage"]
    for call in [each for each in calls if each[1] == "create-role"]:
        (statement,) = json.loads(call[-1])["Statement"]
        name = call[call.index("--role-name") + 1]
        if name == "rankloop-reader":
            assert statement["Principal"] == {"AWS": "arn:aws:iam::123456789012:root"}
            continue
        assert statement["Principal"] == {"Federated": "arn:aws:iam::123456789012:oidc-provider/oidc.example.org/id/ABC"}
        assert statement["Condition"]["StringEquals"] == {
            "oidc.example.org/id/ABC:aud": "sts.amazonaws.com",
            "oidc.example.org/id/ABC:sub": f"system:serviceaccount:rankloop:{name}",
        }


def test_the_roles_may_touch_their_part_of_the_bucket_alone(calls: list[list[str]]) -> None:
    bucket = "arn:aws:s3:::rankloop-123456789012"
    places = {"rankloop-stage": f"{bucket}/*", "rankloop-mlflow": f"{bucket}/mlflow/*", "rankloop-backup": f"{bucket}/backups/*"}
    places["rankloop-reader"] = f"{bucket}/*"
    granted = {each[each.index("--role-name") + 1]: json.loads(each[-1]) for each in calls if each[1] == "put-role-policy"}
    assert set(granted) == set(places)
    for name, document in granted.items():
        for statement in document["Statement"]:
            actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
            assert statement["Resource"] in (places[name], bucket)
            assert not [
                each for each in actions if "*" in each or ("Bucket" in each and each != "s3:ListBucket") or "Version" in each
            ]
