"""The alerts, by Prometheus' own checker: each is a valid rule, fires on what it is for, and is silent on what is well."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_tools import only, promtool, rendered

N = 'namespace="rankloop"'
GPU = f'{N}, resource="requests.nvidia.com/gpu", resourcequota="rankloop"'
FAILED = 'resource_manager_workflow_runs_failed{profile="rankloop", workflow='
USED = f'kubelet_volume_stats_used_bytes{{{N}, persistentvolumeclaim="data-rankloop-seaweedfs-0"}}'
CAPACITY = f'kubelet_volume_stats_capacity_bytes{{{N}, persistentvolumeclaim="data-rankloop-seaweedfs-0"}}'
REPLICAS = f"kube_statefulset_status_replicas_ready{{{N}, statefulset="
BACKUP = f'kube_cronjob_status_last_successful_time{{{N}, cronjob="rankloop-postgres-backup"}}'
REQUESTS = f'mlflow_http_request_total{{{N}, method="GET", status='

# alert: (series that make it fire, minutes after which it fires, series with which it must not)
Series = dict[str, str]
CASES: dict[str, tuple[Series, int, Series]] = {
    "RankloopRunFailed": (
        {FAILED + '"nightly"}': "1x20 2x60"},  # it has failed once, long ago, and fails again after 21 minutes
        25,
        {FAILED + '"nightly"}': "1x80"},
    ),
    "RankloopStageOutOfMemory": (
        {f'kube_pod_container_status_terminated_reason{{{N}, pod="p", container="main", reason="OOMKilled"}}': "1x80"},
        5,
        {f'kube_pod_container_status_terminated_reason{{{N}, pod="p", container="main", reason="Error"}}': "1x80"},
    ),
    "RankloopStageWaits": (
        {f'kube_pod_status_phase{{{N}, pod="p", phase="Pending"}}': "1x80"},
        35,
        {f'kube_pod_status_phase{{{N}, pod="p", phase="Pending"}}': "1x20 0x60"},
    ),
    "RankloopGpuQuotaUsedUp": (
        {f'kube_resourcequota{{{GPU}, type="used"}}': "8x150", f'kube_resourcequota{{{GPU}, type="hard"}}': "8x150"},
        125,
        {
            f'kube_resourcequota{{{GPU}, type="used"}}': "0x150",
            f'kube_resourcequota{{{GPU}, type="hard"}}': "0x150",
        },  # overlay kind
    ),
    "RankloopGpuIdle": (
        {'DCGM_FI_DEV_GPU_UTIL{exported_namespace="rankloop", exported_pod="p", gpu="0"}': "0x150"},
        80,
        {'DCGM_FI_DEV_GPU_UTIL{exported_namespace="rankloop", exported_pod="p", gpu="0"}': "0x50 90 0x99"},
    ),
    "RankloopMlflowDown": (
        {f'up{{{N}, service="rankloop-mlflow"}}': "0x80"},
        10,
        {f'up{{{N}, service="rankloop-mlflow"}}': "1x80"},
    ),
    "RankloopMlflowErrors": (
        {REQUESTS + '"200"}': "0+9x80", REQUESTS + '"500"}': "0+1x80"},
        25,
        {REQUESTS + '"200"}': "0+99x80", REQUESTS + '"500"}': "0+1x80"},
    ),
    "RankloopDatabaseDown": ({REPLICAS + '"rankloop-postgres"}': "0x80"}, 10, {REPLICAS + '"rankloop-postgres"}': "1x80"}),
    "RankloopStoreDown": ({REPLICAS + '"rankloop-seaweedfs"}': "0x80"}, 10, {REPLICAS + '"rankloop-seaweedfs"}': "1x80"}),
    "RankloopBackupOld": ({BACKUP: "0x2400"}, 37 * 60, {BACKUP: "0x1440 86400x960"}),
    "RankloopVolumeNearlyFull": ({USED: "90x80", CAPACITY: "100x80"}, 20, {USED: "80x80", CAPACITY: "100x80"}),
}


@pytest.fixture(scope="module")
def groups() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = only(rendered("overlays/on-prem"), "PrometheusRule", "rankloop")["spec"]["groups"]
    return found


def _labels(text: str) -> dict[str, str]:
    """The labels of the only series that the alert keeps: those of `by (...)` with the values of the input series."""
    return dict(re.findall(r'(\w+)="([^"]*)"', text))


def test_each_alert_fires_when_it_should_and_not_before(groups: list[dict[str, Any]], tmp_path: Path) -> None:
    rules = {rule["alert"]: rule for group in groups for rule in group["rules"]}
    assert set(CASES) == set(rules)
    (tmp_path / "rules.json").write_text(json.dumps({"groups": groups}), encoding="utf-8")
    done = subprocess.run([promtool(), "check", "rules", "rules.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    tests = []
    for name, (bad, minutes, good) in CASES.items():
        labels = {**_labels(next(iter(bad))), "severity": rules[name]["labels"]["severity"]}
        by = re.search(r"by \(([^)]*)\)", rules[name]["expr"])
        kept = re.findall(r"\w+", by[1]) if by else ["namespace", "service"] if name == "RankloopMlflowDown" else []
        expected = {"exp_labels": {key: labels[key] for key in [*kept, "severity"]}, "exp_annotations": rules[name]["annotations"]}
        expected["exp_annotations"] = {
            key: re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels[match[1]], text)  # noqa: B023
            for key, text in rules[name]["annotations"].items()
        }
        for series, at, alerts in ((bad, minutes, [expected]), (good, minutes, [])):
            tests.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": key, "values": values} for key, values in series.items()],
                    "alert_rule_test": [{"eval_time": f"{at}m", "alertname": name, "exp_alerts": alerts}],
                }
            )
    (tmp_path / "tests.json").write_text(
        json.dumps({"rule_files": ["rules.json"], "evaluation_interval": "5m", "tests": tests}), encoding="utf-8"
    )
    done = subprocess.run([promtool(), "test", "rules", "tests.json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_one_that_its_exporter_has(groups: list[dict[str, Any]]) -> None:
    """Names and labels as their sources have them; tests/system/test_mlflow_server.py looks for MLflow's in a running server."""
    exporters = {
        "kube_": {  # kube-state-metrics 2.x, docs/metrics
            "kube_pod_container_status_terminated_reason": {"namespace", "pod", "container", "reason"},
            "kube_pod_status_phase": {"namespace", "pod", "phase"},
            "kube_resourcequota": {"namespace", "resourcequota", "resource", "type"},
            "kube_statefulset_status_replicas_ready": {"namespace", "statefulset"},
            "kube_cronjob_status_last_successful_time": {"namespace", "cronjob"},
        },
        "kubelet_": {  # Kubernetes, pkg/kubelet/metrics
            "kubelet_volume_stats_used_bytes": {"namespace", "persistentvolumeclaim"},
            "kubelet_volume_stats_capacity_bytes": {"namespace", "persistentvolumeclaim"},
        },
        # KFP, backend/src/apiserver/resource/resource_manager.go
        "resource_manager_": {"resource_manager_workflow_runs_failed": {"profile", "workflow"}},
        # NVIDIA's DCGM exporter, etc/default-counters.csv; exported_ is Prometheus' own, where the target has such a label, too
        "DCGM_": {"DCGM_FI_DEV_GPU_UTIL": {"exported_namespace", "exported_pod"}},
        # prometheus-flask-exporter with MLflow's prefix, and namespace and service of the scrape
        "mlflow_": {"mlflow_http_request_total": {"namespace", "method", "status"}},
        "up": {"up": {"namespace", "service"}},
    }
    known = {name: labels for each in exporters.values() for name, labels in each.items()}
    used: set[str] = set()
    for rule in [rule for group in groups for rule in group["rules"]]:
        for name, labels in re.findall(r"(\w+){([^}]*)}", rule["expr"]):
            used.add(name)
            assert set(re.findall(r"(\w+)=", labels)) <= known[name], f"{rule['alert']}: {name} has no such label"
        for grouping in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            assert set(re.findall(r"\w+", grouping)) <= set().union(*(known[n] for n in used))
    assert used == set(known)


def test_alerts_say_what_to_do(groups: list[dict[str, Any]]) -> None:
    for rule in [rule for group in groups for rule in group["rules"]]:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_time_slicing_is_a_configuration_of_nvidias_plugin() -> None:
    """Its two configurations are YAML of the plugin's version v1, and only the shared one shares."""
    data = rendered("components/gpu-time-slicing")[0]["data"]
    configurations = {name: yaml.safe_load(text) for name, text in data.items()}
    assert {each["version"] for each in configurations.values()} == {"v1"}
    assert "sharing" not in configurations["whole"]
    (resource,) = configurations["shared"]["sharing"]["timeSlicing"]["resources"]
    assert resource == {"name": "nvidia.com/gpu", "replicas": 4}
