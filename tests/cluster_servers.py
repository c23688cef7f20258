"""The servers of infra/ on loopback, with the arguments and files of their manifests; only addresses and folders differ."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.local_services import free_ports
from tests.cluster_tools import Secrets, containers, only, pod_spec, rendered
from tests.postgres import postgres

START_SECONDS = 120
OVERLAY = "overlays/kind"


def container_of(kind: str, name: str) -> dict[str, Any]:
    """The first container of an object of the overlay."""
    return containers(pod_spec(only(rendered(OVERLAY), kind, name)) or {})[0]


@contextlib.contextmanager
def seaweedfs(folder: Path, identities: str) -> Iterator[tuple[str, str]]:
    """Runs the stateful set's command; gives the addresses of S3 and of its metrics.

    Args:
        identities: content of the secret's `s3.json`.
    """
    (folder / "data").mkdir(parents=True)
    (folder / "s3.json").write_text(identities, encoding="utf-8")
    names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
    s3, metrics, *ports = free_ports(11)
    here = {
        "-dir=": folder / "data",
        "-ip.bind=": "127.0.0.1",  # 0.0.0.0 in the pod, whose network policy opens one port
        "-s3.port=": s3,
        "-s3.config=": folder / "s3.json",
        "-metricsPort=": metrics,
    }
    command = [_moved(each, here) for each in container_of("StatefulSet", "rankloop-seaweedfs")["command"]]
    command[0] = str(Path(sys.executable).parent / "weed")
    names += ["s3.port.grpc", "admin.port", "admin.port.grpc"]
    command += [
        f"-{name}={port}" for name, port in zip(names, ports, strict=True)
    ]  # fixed ones in the pod, which has its own network
    with running(command, folder / "seaweedfs.log", f"http://127.0.0.1:{s3}/healthz", {}, signal.SIGINT):
        yield f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{metrics}/metrics"


@contextlib.contextmanager
def mlflow(folder: Path, secrets: Secrets, endpoint: str, workers: int) -> Iterator[tuple[str, int]]:
    """Runs the deployment's arguments on a PostgreSQL with its databases; gives MLflow's address and PostgreSQL's port."""
    container = container_of("Deployment", "rankloop-mlflow")
    files = {key: text for each in rendered(OVERLAY) if each["kind"] == "ConfigMap" for key, text in each["data"].items()}
    with postgres(folder / "postgres") as uri:
        (port,), database_port = free_ports(1), int(re.search(r":(\d+)/", uri)[1])  # type: ignore[index]
        for statement in (
            "CREATE ROLE mlflow SUPERUSER LOGIN",
            *files["auth_database.sql"].split("\n"),
        ):  # as the image's POSTGRES_USER
            if statement and not statement.startswith("--"):
                psql(database_port, "rankloop", statement)
        (folder / "basic_auth.ini").write_text(_here(files["basic_auth.ini"], database_port), encoding="utf-8")
        environment = _environment(container, secrets, endpoint)
        environment["MLFLOW_AUTH_CONFIG_PATH"] = str(folder / "basic_auth.ini")
        here = {"--host=": "127.0.0.1", "--port=": port, "--workers=": workers, "--expose-prometheus=": folder / "metrics"}
        command = [_here(_moved(each, here), database_port) for each in container["args"]]
        command = [re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], each) for each in command]
        command[0] = sys.executable
        address = f"http://localhost:{port}"  # a name that --allowed-hosts has
        path = container["readinessProbe"]["httpGet"]["path"]
        with running(command, folder / "mlflow.log", address + path, environment, signal.SIGTERM):
            yield address, database_port


def psql(port: int, database: str, statement: str) -> list[tuple[Any, ...]]:
    """What a statement returns, run by the cluster's administrator outside of a transaction."""
    import psycopg2

    connection = psycopg2.connect(
        host="127.0.0.1", port=port, user="rankloop", dbname=database if database != "rankloop" else "postgres"
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def _environment(container: dict[str, Any], secrets: Secrets, endpoint: str) -> dict[str, str]:
    """The container's variables, those of config maps and secrets included."""
    found = {}
    for each in container.get("envFrom", []):
        if "configMapRef" in each:
            found.update(only(rendered(OVERLAY), "ConfigMap", each["configMapRef"]["name"])["data"])
        else:
            found.update(secrets[each["secretRef"]["name"]])
    for each in container.get("env", []):
        reference = each.get("valueFrom", {}).get("secretKeyRef")
        found[each["name"]] = secrets[reference["name"]][reference["key"]] if reference else each["value"]
    return {**found, "AWS_ENDPOINT_URL_S3": endpoint}


def _moved(argument: str, here: dict[str, Any]) -> str:
    for start, value in here.items():
        if argument.startswith(start):
            return f"{start}{value}"
    return argument


def _here(text: str, database_port: int) -> str:
    return text.replace("rankloop-postgres:5432", f"127.0.0.1:{database_port}")


@contextlib.contextmanager
def running(command: list[str], log: Path, ready: str, environment: dict[str, str], stop: signal.Signals) -> Iterator[None]:
    """The process from when it answers `ready` until the context ends."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while status(ready) != 200:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, f"{command[0]} did not come up:\n{log.read_text(encoding='utf-8')}"
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop)
        process.wait(30)


def status(url: str, headers: dict[str, str] | None = None) -> int:
    """The HTTP status of a GET, 0 if nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=20) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
