"""MLflow's deployment, its users' job and its back-up, with the manifests' arguments and files, on PostgreSQL and SeaweedFS."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from botocore.config import Config

from components.services.storage import Storage
from tests.cluster_servers import mlflow, psql, seaweedfs, status
from tests.cluster_tools import INFRA, Secrets, containers, only, pod_spec, rendered, run_secrets_script, secrets_in
from tests.postgres import programs

FOLDER = INFRA / "components" / "mlflow"


class Server(NamedTuple):
    """A running MLflow and what it stands on."""

    address: str
    database_port: int
    endpoint: str
    secrets: Secrets

    def environment(self, s3: str = "") -> dict[str, str]:
        """The variables of a pod, with the S3 key of the named secret."""
        place = {"MLFLOW_TRACKING_URI": self.address, "AWS_ENDPOINT_URL_S3": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        return {**os.environ, **place, "RANKLOOP_STORAGE": "s3://rankloop", **(self.secrets[s3] if s3 else {})}

    def authorization(self, name: str, password: str) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}

    @property
    def stage(self) -> dict[str, str]:
        return self.authorization("rankloop-stage", self.secrets["rankloop-mlflow"]["MLFLOW_TRACKING_PASSWORD"])

    @property
    def admin(self) -> dict[str, str]:
        return self.authorization("admin", self.secrets["rankloop-mlflow-server"]["MLFLOW_AUTH_ADMIN_PASSWORD"])

    def make_users(self, password: str = "") -> str:
        """Runs the job's script as the job does."""
        users = self.secrets["rankloop-mlflow"]
        variables = {
            **self.secrets["rankloop-mlflow-server"],
            "STAGE_USERNAME": users["MLFLOW_TRACKING_USERNAME"],
            "STAGE_PASSWORD": password or users["MLFLOW_TRACKING_PASSWORD"],
        }
        return _script("users.py", {**self.environment(), **variables}).stdout


def _script(name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, FOLDER / name, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs as another user
        (folder / "secrets").mkdir()
        assert run_secrets_script(folder / "secrets").returncode == 0
        secrets = secrets_in(folder / "secrets")
        endpoint, _ = stack.enter_context(seaweedfs(folder / "s3", secrets["rankloop-seaweedfs"]["s3.json"]))
        _client(endpoint, secrets["rankloop-s3-admin"]).create_bucket(Bucket="rankloop")
        made = Server(*stack.enter_context(mlflow(folder, secrets, endpoint, workers=1)), endpoint, secrets)
        assert made.make_users() == "user rankloop-stage made\n"
        yield made


def _client(endpoint: str, key: dict[str, str]) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=key["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )


def test_who_gets_in(server: Server) -> None:
    search = f"{server.address}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(search) == 401
    assert status(search, server.authorization("rankloop-stage", "wrong")) == 401
    assert status(search, server.stage) == 200
    assert status(search, server.admin) == 200
    assert status(f"{server.address}/health") == 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("rankloop-mlflow:5000", 200),  # MLFLOW_TRACKING_URI of the config map
        ("rankloop-mlflow.team-a.svc:5000", 200),  # as the ServiceMonitor calls it
        ("rankloop-mlflow.rankloop.svc.cluster.local:5000", 200),
        ("localhost:5000", 200),  # kubectl port-forward
        ("10.1.2.3:5000", 403),
        ("rankloop-mlflow.example.org:5000", 403),
        ("rankloop-mlflow.svc.example.org:5000", 403),
    ],
)
def test_by_which_names_it_is_called(server: Server, host: str, expected: int) -> None:
    search = f"{server.address}/api/2.0/mlflow/experiments/search?max_results=1"
    assert status(search, {**server.stage, "Host": host}) == expected
    assert status(f"{server.address}/health", {"Host": "10.1.2.3:5000"}) == 200  # the kubelet's probes name the pod's address


def test_the_stages_user_owns_what_it_makes_and_nothing_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Runs, artifacts through the server (the pod has no S3 right on mlflow/), and models."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    login = server.secrets["rankloop-mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", server.secrets["rankloop-mlflow-server"]["MLFLOW_AUTH_ADMIN_PASSWORD"])
    foreign = MlflowClient(server.address).create_experiment("of-somebody-else")
    for key, value in login.items():
        monkeypatch.setenv(key, value)
    client = MlflowClient(server.address)
    run = client.create_run(client.create_experiment("rankloop"))
    client.log_metric(run.info.run_id, "reward", 0.5)
    (tmp_path / "report.html").write_text("<p>all is well</p>", encoding="utf-8")
    client.log_artifact(run.info.run_id, str(tmp_path / "report.html"))
    assert client.get_run(run.info.run_id).data.metrics == {"reward": 0.5}
    assert {each.name for each in client.search_registered_models()} == {"rankloop-policy", "rankloop-reward-model"}
    version = client.create_model_version("rankloop-policy", f"runs:/{run.info.run_id}/policy", run.info.run_id)
    client.set_registered_model_alias("rankloop-policy", "champion", version.version)
    with pytest.raises(MlflowException, match=r"Permission denied|403"):
        client.create_run(foreign)
    stored = [
        each["Key"]
        for each in _client(server.endpoint, server.secrets["rankloop-s3-admin"]).list_objects_v2(Bucket="rankloop")["Contents"]
    ]
    assert [each for each in stored if each.endswith("report.html")]
    assert all(each.startswith("mlflow/") for each in stored)


def test_the_users_job_may_run_again_and_changes_a_password(server: Server) -> None:
    search = f"{server.address}/api/2.0/mlflow/experiments/search?max_results=1"
    assert "it has the password of the secret now" in server.make_users("another-password-1")
    assert status(search, server.authorization("rankloop-stage", "another-password-1")) == 200
    assert "it has the password of the secret now" in server.make_users()
    assert status(search, server.stage) == 200


def test_the_metrics_that_the_alerts_read_are_there(server: Server) -> None:
    import urllib.request

    assert status(f"{server.address}/metrics") == 401
    assert status(f"{server.address}/metrics", server.stage) == 403  # so the ServiceMonitor logs in as the administrator
    request = urllib.request.Request(f"{server.address}/metrics", headers=server.admin)
    with urllib.request.urlopen(request, timeout=20) as reply:
        text = reply.read().decode()
    (line, *_) = [line for line in text.splitlines() if line.startswith("mlflow_http_request_total{") and 'status="200"' in line]
    assert 'method="' in line


def test_the_backup_can_be_restored(server: Server, tmp_path: Path) -> None:
    """The cron job's two containers: the first one's command dumps, the second one's script uploads; and what is there restores."""
    job = pod_spec(only(rendered("overlays/kind"), "CronJob", "rankloop-postgres-backup")) or {}
    dump, upload = containers(job)
    psql(
        server.database_port,
        "mlflow",
        "INSERT INTO experiments (name, lifecycle_stage, workspace) VALUES ('kept', 'active', 'default')",
    )
    variables = {each["name"]: each["value"] for each in dump["env"] if "value" in each}
    variables |= {"PGHOST": "127.0.0.1", "PGPORT": str(server.database_port), "PATH": f"{programs()}:{os.environ['PATH']}"}
    command = [each.replace("/backup/", f"{tmp_path}/") for each in dump["command"]]
    subprocess.run(command, env={**os.environ, **variables}, check=True)
    assert upload["args"][:2] == ["python", "/etc/rankloop/upload_backup.py"]
    uri = _script("upload_backup.py", server.environment("rankloop-s3-backup"), str(tmp_path)).stdout.strip()
    assert uri.startswith("s3://rankloop/backups/postgres/20")

    back = tmp_path / "back"
    marker = Storage(_client(server.endpoint, server.secrets["rankloop-s3-admin"])).fetch_folder(uri, back)
    assert marker["databases"] == ["mlflow", "mlflow_auth"]
    psql(server.database_port, "mlflow", "CREATE DATABASE restored")
    restore = ["pg_restore", "--host=127.0.0.1", f"--port={server.database_port}", "--username=mlflow", "--dbname=restored"]
    subprocess.run([programs() / restore[0], *restore[1:], "--exit-on-error", back / "mlflow.dump"], check=True)
    assert psql(server.database_port, "restored", "SELECT count(*) FROM experiments WHERE name = 'kept'") == [(1,)]
    tables = "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
    assert psql(server.database_port, "restored", tables) == psql(server.database_port, "mlflow", tables)
    assert psql(server.database_port, "mlflow_auth", "SELECT username FROM users ORDER BY 1") == [("admin",), ("rankloop-stage",)]


@pytest.mark.parametrize(("content", "message"), [(None, "no *.dump"), (b"", "is no dump"), (b"-- SQL", "is no dump")])
def test_what_is_no_dump_is_not_uploaded(server: Server, tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mlflow.dump").write_bytes(content)
    environment = server.environment("rankloop-s3-backup")
    done = subprocess.run([sys.executable, FOLDER / "upload_backup.py", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 65
    assert message in done.stderr
