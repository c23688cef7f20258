"""What every pod of the overlays keeps to. Each rule returns what it finds wrong, and is shown an object that breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.cluster_tools import OVERLAYS, containers, only, pod_spec, rendered

Thing = dict[str, Any]
Rule = Callable[[Thing], list[str]]
SERVERS = ("Deployment", "StatefulSet")


def privileges(thing: Thing) -> list[str]:
    """Not root, nothing of the host, no capability, nothing to write to but volumes, no token that it does not use."""
    spec = pod_spec(thing)
    if spec is None:
        return []
    wrong = [f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    wrong += [f"volume {volume['name']} is of the host" for volume in spec.get("volumes", []) if "hostPath" in volume]
    pod = spec.get("securityContext", {})
    if not pod.get("runAsNonRoot") or pod.get("runAsUser", 0) == 0:
        wrong.append("may run as root")
    if pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        wrong.append("no seccomp profile")
    if spec.get("automountServiceAccountToken") is not False:
        wrong.append("has a token of the Kubernetes API")
    if spec.get("enableServiceLinks") is not False:
        wrong.append("gets RANKLOOP_*_PORT variables of every service, which may hide a setting of ours")
    for each in containers(spec):
        own = each.get("securityContext", {})
        if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
            wrong.append(f"{each['name']} may gain privileges")
        if own.get("readOnlyRootFilesystem") is not True:
            wrong.append(f"{each['name']} may write to its image")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            wrong.append(f"{each['name']} keeps capabilities")
    return wrong


def images(thing: Thing) -> list[str]:
    """Each from a named registry, by version (a digest may follow), never `latest`."""
    pattern = r"[a-z0-9.-]+\.[a-z]+(/[a-z0-9._-]+)+:(?!latest)[A-Za-z0-9_.-]*[0-9][A-Za-z0-9_.-]*(@sha256:[0-9a-f]{64})?"
    return [
        f"{each['name']}: image {each['image']}"
        for each in containers(pod_spec(thing) or {})
        if not re.fullmatch(pattern, each["image"])
    ]


def resources(thing: Thing) -> list[str]:
    """Requests and limits of processor and memory for each container, a size for each emptyDir."""
    spec = pod_spec(thing) or {}
    wrong = [
        f"{each['name']}: no {kind} of {what}"
        for each in containers(spec)
        for kind in ("requests", "limits")
        for what in ("cpu", "memory")
        if what not in each.get("resources", {}).get(kind, {})
    ]
    return wrong + [
        f"emptyDir {volume['name']} may fill the node"
        for volume in spec.get("volumes", [])
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]
    ]


def probes(thing: Thing) -> list[str]:
    """Servers say when they have started, when they can answer, and when they should be restarted."""
    if thing["kind"] not in SERVERS:
        return []
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    return [f"{each['name']}: no {kind}" for each in (pod_spec(thing) or {})["containers"] for kind in kinds if kind not in each]


def state(thing: Thing) -> list[str]:
    """What a server keeps is on a claim that outlives it, and each mounted folder has its volume."""
    spec = pod_spec(thing)
    if spec is None:
        return []
    claims = {claim["metadata"]["name"] for claim in thing["spec"].get("volumeClaimTemplates", [])}
    volumes = claims | {volume["name"] for volume in spec.get("volumes", [])}
    wrong = [
        f"{each['name']}: no volume {mount['name']}"
        for each in containers(spec)
        for mount in each.get("volumeMounts", [])
        if mount["name"] not in volumes
    ]
    if thing["kind"] == "StatefulSet":
        if not claims:
            wrong.append("keeps its data in the pod")
        if set(thing["spec"].get("persistentVolumeClaimRetentionPolicy", {}).values()) != {"Retain"}:
            wrong.append("its data goes with it")
    return wrong


def rights(thing: Thing) -> list[str]:
    """No rule allows everything, nobody may read all secrets, run in another's pod, or change who may do what."""
    wrong = []
    for rule in thing.get("rules", []) if thing["kind"] in ("Role", "ClusterRole") else []:
        for key in ("apiGroups", "resources", "verbs"):
            if "*" in rule[key]:
                wrong.append(f"{key} has *")
        if "secrets" in rule["resources"] and ("resourceNames" not in rule or set(rule["verbs"]) != {"get"}):
            wrong.append("reads secrets that it does not name")
        forbidden = {"pods/exec", "pods/attach", "serviceaccounts/token", "roles", "rolebindings"} & set(rule["resources"])
        wrong += [f"may touch {each}" for each in sorted(forbidden)]
        if "pods" in rule["resources"] and set(rule["verbs"]) - {"get", "list", "watch"}:
            wrong.append("may change pods")
    return wrong


def secrets(thing: Thing) -> list[str]:
    """No secret value: neither a Secret, nor an environment variable or argument that looks like one."""
    wrong = ["is a Secret"] if thing["kind"] == "Secret" else []
    for each in containers(pod_spec(thing) or {}):
        for variable in each.get("env", []):
            if re.search(r"PASSWORD|SECRET|TOKEN|SALT|ACCESS_KEY", variable["name"]) and "value" in variable:
                wrong.append(f"{each['name']}: {variable['name']} has its value here")
        for argument in [*each.get("command", []), *each.get("args", [])]:
            if re.search(r"://[^/\s]*:[^/\s]*@", argument):
                wrong.append(f"{each['name']}: a password in {argument!r}")
    return wrong


RULES: tuple[Rule, ...] = (privileges, images, resources, probes, state, rights, secrets)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_keep_to_it(overlay: str, rule: Rule) -> None:
    wrong = {f"{each['kind']} {each['metadata']['name']}": rule(each) for each in rendered(f"overlays/{overlay}")}
    assert not {name: found for name, found in wrong.items() if found}


def _pod(change: Callable[[Thing, Thing], object]) -> Callable[[Thing], object]:
    """A change to the pod and its first container."""
    return lambda thing: change(pod_spec(thing), containers(pod_spec(thing))[0])  # type: ignore[arg-type]


BREAKS: tuple[tuple[Rule, str, str, Callable[[Thing], object]], ...] = (
    (privileges, "StatefulSet", "rankloop-postgres", _pod(lambda pod, _: pod.update(hostNetwork=True))),
    (privileges, "StatefulSet", "rankloop-postgres", _pod(lambda pod, _: pod["securityContext"].update(runAsUser=0))),
    (privileges, "StatefulSet", "rankloop-postgres", _pod(lambda pod, _: pod["securityContext"].pop("seccompProfile"))),
    (
        privileges,
        "StatefulSet",
        "rankloop-postgres",
        _pod(lambda pod, _: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    ),
    (privileges, "StatefulSet", "rankloop-postgres", _pod(lambda pod, _: pod.pop("automountServiceAccountToken"))),
    (privileges, "Deployment", "rankloop-mlflow", _pod(lambda pod, _: pod.pop("enableServiceLinks"))),
    (privileges, "Deployment", "rankloop-mlflow", _pod(lambda _, one: one["securityContext"].update(privileged=True))),
    (privileges, "Deployment", "rankloop-mlflow", _pod(lambda _, one: one["securityContext"].update(readOnlyRootFilesystem=False))),
    (privileges, "CronJob", "rankloop-postgres-backup", _pod(lambda _, one: one["securityContext"].pop("capabilities"))),
    (images, "CronJob", "rankloop-postgres-backup", _pod(lambda _, one: one.update(image="docker.io/library/postgres:latest"))),
    (images, "CronJob", "rankloop-postgres-backup", _pod(lambda _, one: one.update(image="postgres:15.18"))),
    (images, "CronJob", "rankloop-postgres-backup", _pod(lambda _, one: one.update(image="docker.io/library/postgres"))),
    (resources, "CronJob", "rankloop-postgres-backup", _pod(lambda _, one: one["resources"]["limits"].pop("memory"))),
    (resources, "Job", "rankloop-mlflow-users", _pod(lambda pod, _: pod["volumes"].append({"name": "x", "emptyDir": {}}))),
    (probes, "Deployment", "rankloop-mlflow", _pod(lambda _, one: one.pop("readinessProbe"))),
    (state, "StatefulSet", "rankloop-seaweedfs", lambda thing: thing["spec"].pop("volumeClaimTemplates")),
    (state, "StatefulSet", "rankloop-seaweedfs", lambda thing: thing["spec"].pop("persistentVolumeClaimRetentionPolicy")),
    (state, "Deployment", "rankloop-mlflow", _pod(lambda pod, _: pod["volumes"].pop())),
    (rights, "Role", "rankloop-stage", lambda thing: thing["rules"][0].update(verbs=["*"])),
    (
        rights,
        "Role",
        "rankloop-stage",
        lambda thing: thing["rules"].append({"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}),
    ),
    (rights, "Role", "rankloop-stage", lambda thing: thing["rules"][5]["verbs"].append("delete")),
    (rights, "Role", "rankloop-client", lambda thing: thing["rules"][-1]["resources"].append("pods/exec")),
    (secrets, "ConfigMap", "rankloop-endpoints", lambda thing: thing.update(kind="Secret")),
    (secrets, "Deployment", "rankloop-mlflow", _pod(lambda _, one: one["env"].append({"name": "PGPASSWORD", "value": "x"}))),
    (secrets, "Deployment", "rankloop-mlflow", _pod(lambda _, one: one["args"].append("--x=postgresql://a:b@c/d"))),
)


@pytest.mark.parametrize(("rule", "kind", "name", "change"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_a_rule_finds_what_breaks_it(rule: Rule, kind: str, name: str, change: Callable[[Thing], object]) -> None:
    thing = only(rendered("overlays/on-prem"), kind, name)
    assert not rule(thing)
    change(thing)
    assert rule(thing)


def test_a_digest_may_pin_an_image() -> None:
    thing = only(rendered("overlays/kind"), "StatefulSet", "rankloop-postgres")
    containers(pod_spec(thing) or {})[0]["image"] = "docker.io/library/postgres:15.18-bookworm@sha256:" + "0" * 64
    assert not images(thing)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_postgresql_is_backed_up(overlay: str) -> None:
    """Every database of MLflow's arguments and settings is dumped, every night, and one run at a time."""
    objects = rendered(f"overlays/{overlay}")
    job = only(objects, "CronJob", "rankloop-postgres-backup")
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    assert re.fullmatch(r"\d+ \d+ \* \* \*", job["spec"]["schedule"])
    dumped = set(re.findall(r"\w+", containers(pod_spec(job) or {})[0]["command"][-1].split(";")[0])) - {"for", "database", "in"}
    server = containers(pod_spec(only(objects, "Deployment", "rankloop-mlflow")) or {})[0]
    (uri,) = (each for each in server["args"] if each.startswith("--backend-store-uri="))
    settings = next(each for each in objects if "basic_auth.ini" in each.get("data", {}))["data"]["basic_auth.ini"]
    used = {uri.rpartition("/")[2], *re.findall(r"database_uri = .*/(\w+)", settings)}
    assert dumped == used == {"mlflow", "mlflow_auth"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_lets_nothing_in_or_out_by_default(overlay: str) -> None:
    objects = rendered(f"overlays/{overlay}")
    assert only(objects, "NetworkPolicy", "default-deny")["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for each in objects:
        if each["kind"] == "NetworkPolicy":
            for peer in [peer for rule in each["spec"].get("egress", []) for peer in rule["to"]]:
                block = peer.get("ipBlock", {})
                assert block.get("cidr") != "0.0.0.0/0" or block["except"] == ["169.254.0.0/16"], each["metadata"]["name"]


def test_a_stage_starts_and_deletes_no_run_and_the_client_touches_no_task() -> None:
    """Verbs of KFP's API, by role."""
    verbs = {
        name: {
            each: set(rule["verbs"])
            for rule in role["rules"]
            if "pipelines.kubeflow.org" in rule["apiGroups"]
            for each in rule["resources"]
        }
        for name in ("rankloop-stage", "rankloop-client")
        for role in [only(rendered("base"), "Role", name)]
    }
    assert not verbs["rankloop-stage"]["runs"] & {"create", "delete", "retry", "terminate"}
    assert not verbs["rankloop-client"]["runs"] & {"delete", "update", "createTask"}
    assert "delete" in verbs["rankloop-client"]["jobs"]  # recurring runs: KFP has no call that changes one
