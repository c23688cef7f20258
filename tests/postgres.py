"""A PostgreSQL server on loopback for the time of a test, from Debian's package, and an MLflow server that keeps its data there."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.local_services import LocalServices, free_ports

START_SECONDS = 120


class Unavailable(Exception):
    """Why there can be no PostgreSQL here."""


def programs() -> Path:
    """The folder of PostgreSQL's programs; installs Debian's package as root if there is none.

    Raises:
        Unavailable: it is not installed and cannot be.
    """
    if not (found := _installed()) and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (("update", "-qq"), ("install", "-y", "-qq", "--no-install-recommends", "postgresql")):
            subprocess.run(["apt-get", *command], env=environment, capture_output=True, check=False)
        found = _installed()
    if not found:
        raise Unavailable("PostgreSQL is not installed, and this user cannot install it: apt-get install postgresql")
    return found[-1]


def _installed() -> list[Path]:
    return sorted(path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """Runs a server with a new database; gives its SQLAlchemy URI.

    Args:
        folder: a new one, below folders that any user may enter: PostgreSQL does not run as root.
    """
    bin_folder, (port,) = programs(), free_ports(1)
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    data = folder / "data"
    _call(folder, str(bin_folder / "initdb"), "-D", str(data), "-U", "rankloop", "--auth=trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    _call(folder, str(bin_folder / "pg_ctl"), "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        _call(folder, str(bin_folder / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "rankloop", "mlflow")
        yield f"postgresql+psycopg2://rankloop@127.0.0.1:{port}/mlflow"
    finally:
        _call(folder, str(bin_folder / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")


def restart_postgres(folder: Path) -> None:
    """Ends the server of `postgres(folder)` as a crash would, and starts it again with the same options."""
    _call(
        folder,
        str(programs() / "pg_ctl"),
        "-D",
        str(folder / "data"),
        "-m",
        "immediate",
        "-l",
        str(folder / "log"),
        "-w",
        "restart",
    )


def _call(folder: Path, *command: str) -> None:
    """Runs a program of PostgreSQL's, as its own user where this one is root."""
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    subprocess.run([*as_user, *command], check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=START_SECONDS)


@contextmanager
def mlflow_on_postgres(services: LocalServices, folder: Path, workers: int = 2, admin_password: str = "") -> Iterator[str]:
    """An MLflow server with its data in PostgreSQL and its artifacts on the store of `services`; gives its address.

    Args:
        admin_password: if given, nobody gets in without a name and a password, and a new user may do nothing; the first is `admin`.
    """
    (port,) = free_ports(1)
    with postgres(folder / "postgres") as database, open(folder / "mlflow.log", "wb") as log:
        options, authentication = [], dict[str, str]()
        if admin_password:
            settings = folder / "authentication.ini"
            settings.write_text(
                f"[mlflow]\ndefault_permission = NO_PERMISSIONS\ndatabase_uri = {database}\nadmin_username = admin\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            options = ["--app-name", "basic-auth"]
            authentication = {
                "MLFLOW_AUTH_CONFIG_PATH": str(settings),
                "MLFLOW_AUTH_ADMIN_PASSWORD": admin_password,
                "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            }
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database),
                *("--serve-artifacts", "--artifacts-destination", f"{services.storage_root}/mlflow-postgres"),
                *("--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)),
                *options,
            ],
            env={**os.environ, **services.environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **authentication},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while not _answers(address + "/health"):
                assert process.poll() is None, (folder / "mlflow.log").read_text()
                assert time.monotonic() < deadline, "MLflow did not come up"
                time.sleep(0.1)
            yield address
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
