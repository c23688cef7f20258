"""What the objects name is there: secrets and their keys, service accounts, the pods of services and policies, the token's file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_tools import OVERLAYS, containers, only, pod_spec, pod_template, rendered, run_secrets_script, secrets_in

S3_SECRETS = ("rankloop-s3", "rankloop-s3-mlflow", "rankloop-s3-backup")
NAMES = {"rankloop-stage", "admin"}  # of MLflow's users: all else is random


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    done = run_secrets_script(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def made_on_aws(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets-aws")
    done = run_secrets_script(folder, "--aws")
    assert done.returncode == 0, done.stderr
    return folder


def wanted_of(objects: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Secrets and keys that pods and monitors cannot do without; the key is empty where all of a secret is taken."""
    found = set()
    for thing in objects:
        for each in containers(pod_spec(thing) or {}):
            for variable in each.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    found.add((reference["name"], reference["key"]))
            found |= {(one["secretRef"]["name"], "") for one in each.get("envFrom", []) if "secretRef" in one}
        for volume in (pod_spec(thing) or {}).get("volumes", []):
            if "secret" in volume:
                found.add((volume["secret"]["secretName"], ""))
        for endpoint in thing["spec"]["endpoints"] if thing["kind"] == "ServiceMonitor" else []:
            found |= {(each["name"], each["key"]) for each in endpoint.get("basicAuth", {}).values()}
    return found


@pytest.mark.parametrize("overlay", ["kind", "on-prem"])
def test_the_script_makes_every_secret_that_is_named(overlay: str, made: Path) -> None:
    secrets = secrets_in(made)
    wanted = wanted_of(rendered(f"overlays/{overlay}")) - {("rankloop-hub", "")}  # a person's own
    assert len(wanted) >= 8
    for name, key in wanted:
        assert not key or secrets[name][key]
        assert secrets[name]


def test_on_aws_there_is_no_s3_secret(made_on_aws: Path) -> None:
    """And the pods do not need one: the references are optional, the service accounts have roles."""
    assert set(secrets_in(made_on_aws)) == {"rankloop-postgres", "rankloop-mlflow-server", "rankloop-mlflow", "rankloop-raters"}
    objects = rendered("overlays/aws")
    optional = [
        each["secretRef"]
        for thing in objects
        for container in containers(pod_spec(thing) or {})
        for each in container.get("envFrom", [])
        if "secretRef" in each
    ]
    assert {each["name"] for each in optional if each.get("optional")} == {*S3_SECRETS, "rankloop-hub"}
    assert not [each for each in optional if "s3" in each["name"] and not each.get("optional")]
    roles = {
        each["metadata"]["name"]: each["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn")
        for each in objects
        if each["kind"] == "ServiceAccount"
    }
    assert {name for name, arn in roles.items() if arn} == {"rankloop-stage", "rankloop-mlflow", "rankloop-backup"}
    assert "AWS_ENDPOINT_URL_S3" not in only(objects, "ConfigMap", "rankloop-endpoints")["data"]


def test_a_second_run_replaces_nothing(made: Path) -> None:
    before = secrets_in(made)
    done = run_secrets_script(made)
    assert done.returncode == 0, done.stderr
    assert secrets_in(made) == before
    assert not set(done.stdout.split()) & {value for each in before.values() for value in each.values()}


def test_values_are_random_and_belong_together(made: Path, made_on_aws: Path) -> None:
    secrets = secrets_in(made)
    values = [value for name, each in secrets.items() if name != "rankloop-seaweedfs" for value in each.values()]
    assert len(values) == len(set(values)) == 17
    assert all(len(value) >= 20 for value in values if value not in NAMES)
    identities = yaml.safe_load(secrets["rankloop-seaweedfs"]["s3.json"])["identities"]
    known = {each["credentials"][0]["accessKey"]: each["credentials"][0]["secretKey"] for each in identities}
    given = {each["AWS_ACCESS_KEY_ID"]: each["AWS_SECRET_ACCESS_KEY"] for each in secrets.values() if "AWS_ACCESS_KEY_ID" in each}
    assert known == given
    others = {value for each in secrets_in(made_on_aws).values() for value in each.values()}
    assert set(values) & others == NAMES


def test_keys_that_the_store_would_not_know_are_refused(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    (folder / "rankloop-seaweedfs.yaml").unlink()
    done = run_secrets_script(folder)
    assert done.returncode == 65
    assert "secret/rankloop-s3 is there, but rankloop-seaweedfs" in done.stderr


def test_the_secrets_have_the_keys_that_stages_read(made: Path) -> None:
    secrets = secrets_in(made)
    assert set(secrets["rankloop-s3"]) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert set(secrets["rankloop-mlflow"]) == {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    assert set(secrets["rankloop-raters"]) == {"RANKLOOP_RATER_SALT"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_lead_somewhere(overlay: str) -> None:
    """Service accounts, config maps, the pods behind each service, and the servers that the endpoints name."""
    objects = rendered(f"overlays/{overlay}")
    names = {
        kind: {each["metadata"]["name"] for each in objects if each["kind"] == kind} for kind in ("ServiceAccount", "ConfigMap")
    }
    templates = []
    for thing in objects:
        spec = pod_spec(thing)
        if spec is None:
            continue
        assert spec.get("serviceAccountName", "default") in names["ServiceAccount"] | {"default"}
        maps = [
            each["configMapRef"]["name"] for one in containers(spec) for each in one.get("envFrom", []) if "configMapRef" in each
        ]
        maps += [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
        assert set(maps) <= names["ConfigMap"]
        templates.append(((pod_template(thing) or {})["metadata"]["labels"], spec))
    services = [each for each in objects if each["kind"] == "Service"]
    assert services
    for service in services:
        (spec,) = (spec for labels, spec in templates if service["spec"]["selector"].items() <= labels.items())
        ports = {port["name"]: port["containerPort"] for each in spec["containers"] for port in each["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    addresses = {f"{each['metadata']['name']}:{port['port']}" for each in services for port in each["spec"]["ports"]}
    endpoints = only(objects, "ConfigMap", "rankloop-endpoints")["data"]
    for url in [value for value in endpoints.values() if value.startswith("http")]:
        assert url.removeprefix("http://") in addresses
    assert {"RANKLOOP_STORAGE", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI"} <= set(endpoints)
    for subject in [subject for each in objects for subject in each.get("subjects", [])]:
        assert subject["name"] in names["ServiceAccount"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_network_policies_name_components_that_exist(overlay: str) -> None:
    """A misspelt component would open or close the network in silence."""
    known = set()
    for thing in [each for name in OVERLAYS for each in rendered(f"overlays/{name}")]:
        if template := pod_template(thing):
            known.add(template["metadata"]["labels"]["app.kubernetes.io/component"])
    text = "\n".join(str(each) for each in rendered(f"overlays/{overlay}") if each["kind"] == "NetworkPolicy")
    named = set(re.findall(r"'app.kubernetes.io/component': '([\w-]+)'", text))
    for values in re.findall(r"'key': 'app.kubernetes.io/component', 'operator': '\w+', 'values': \[([^]]*)\]", text):
        named |= set(re.findall(r"[\w-]+", values))
    assert named
    assert named <= known


def test_the_client_has_what_kfp_asks_for_and_the_token_it_reads() -> None:
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    objects = rendered("base")
    default = only(objects, "PodDefault", "rankloop-pipelines-token")["spec"]
    (variable,) = default["env"]
    (mount,) = default["volumeMounts"]
    (source,) = default["volumes"][0]["projected"]["sources"]
    token = source["serviceAccountToken"]
    assert variable["name"] == KF_PIPELINES_SA_TOKEN_ENV
    assert variable["value"] == KF_PIPELINES_SA_TOKEN_PATH == f"{mount['mountPath']}/{token['path']}"
    assert token["audience"] == "pipelines.kubeflow.org"
    assert default["serviceAccountName"] in {each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"}
