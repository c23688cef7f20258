"""A real S3 server (SeaweedFS) and a real MLflow server on loopback: the embedded default, and what the integration tests run on.

Both listen on free ports of 127.0.0.1, with credentials made for this start, and keep their data in one folder. They are stopped by
their process ids when the context ends and no other process uses them any more, and by the kernel if this process is killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from components.services.exits import DoNotRetry, Retry
from components.services.tracking import PATIENCE_VARIABLE
from pipelines.watchdog import Watchdog

BUCKET = "rankloop"
SALT_VARIABLE = "RANKLOOP_RATER_SALT"  # of the raters' pseudonyms; `ingest_rankings.rater_salt_variable` names another one
START_SECONDS = 60.0
STOP_SECONDS = 10.0
MINIMUM_FREE_BYTES = 512 * 2**20  # SeaweedFS goes read-only on a full disk, and then every write fails in its own way
QUIET = {  # nothing of ours, and nothing of theirs, reports to anybody
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def default_home() -> Path:
    """`RANKLOOP_HOME`, or `.rankloop` in the current folder."""
    return Path(os.environ.get("RANKLOOP_HOME", ".rankloop")).resolve()


class LocalServices:
    """Starts both servers, or attaches to those that another process keeps up on the same folder.

    Attributes:
        home: folder of all data.
        environment: variables by which a stage finds the servers, and the salt of the raters' pseudonyms, kept in the folder.
        storage_root: S3 URI below which artifacts go.
        tracking_uri: address of the MLflow server, also of its web pages.
        attached: whether the servers belong to somebody else and are left running.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.resolve()
        self.storage_root = f"s3://{BUCKET}"
        self.tracking_uri = ""
        self.environment: dict[str, str] = {}
        self.attached = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchdog: Watchdog | None = None
        self._lock: IO[str] | None = None  # held alone by who starts the servers
        self._users: IO[str] | None = None  # shared by those who attached; held alone by who stops the servers

    def __enter__(self) -> LocalServices:
        self.home.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.home / "lock", "w", encoding="utf-8")
        self._users = open(self.home / "users", "w", encoding="utf-8")
        try:
            self._start() if _locked(self._lock) else self._attach()
            salt = os.environ.get(SALT_VARIABLE) or _kept_secret(self.home / "rater-salt")
            self.environment = {**self.environment, SALT_VARIABLE: salt}
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or issubclass(kind, Exception):  # not a KeyboardInterrupt
                self._wait_for_users()
        finally:
            self.stop()

    def _wait_for_users(self) -> None:
        """Keeps the servers of this process up while others work with them: two runs on one folder each get to their end."""

        def used() -> bool:
            assert self._users is not None
            return all(each.poll() is None for each in self._processes) and not _locked(self._users)

        if self._processes and used():
            print("Another process uses these servers; they stop when it ends, or now with Ctrl-C.", file=sys.stderr, flush=True)
            while used():
                time.sleep(0.2)

    @property
    def _state_file(self) -> Path:
        return self.home / "services.json"

    def _attach(self) -> None:
        """Uses the servers of the process that holds the folder, waiting for them to come up."""
        assert self._lock is not None
        assert self._users is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if _locked(self._users, fcntl.LOCK_SH):  # else they are being stopped
                with contextlib.suppress(OSError, ValueError):
                    state = json.loads(self._state_file.read_text(encoding="utf-8"))
                    if psutil.pid_exists(state["owner"]) and _answers(state["environment"]["MLFLOW_TRACKING_URI"] + "/health"):
                        self.environment, self.attached = state["environment"], True
                        self.tracking_uri = self.environment["MLFLOW_TRACKING_URI"]
                        return
                fcntl.flock(self._users, fcntl.LOCK_UN)
            if _locked(self._lock):  # its owner ended meanwhile
                self._start()
                return
            time.sleep(0.2)
        raise Retry(
            f"another process holds {self.home}, but its servers do not answer", "stop it, or set RANKLOOP_HOME to another folder"
        )

    def _start(self) -> None:
        if shutil.disk_usage(self.home).free < MINIMUM_FREE_BYTES:
            raise Retry(
                f"less than {MINIMUM_FREE_BYTES >> 20} MiB are free on the disk of {self.home}", "free space, or set RANKLOOP_HOME"
            )
        self._state_file.unlink(missing_ok=True)
        (self.home / "logs").mkdir(exist_ok=True)
        ports = free_ports(11)
        self.tracking_uri = f"http://127.0.0.1:{ports[1]}"
        self.environment = {
            **QUIET,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports[0]}",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            "RANKLOOP_STORAGE": self.storage_root,
            PATIENCE_VARIABLE: os.environ.get(PATIENCE_VARIABLE, "20"),  # a local server that is gone is not started again
        }
        self._watchdog = Watchdog()
        seaweed = self._spawn("seaweedfs", self._seaweed_command(ports), {})
        mlflow = self._spawn("mlflow", self._mlflow_command(ports[1]), {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
        self._wait("seaweedfs", seaweed, lambda: _answers(self.environment["AWS_ENDPOINT_URL_S3"], expected=403))
        self._create_bucket()
        self._wait("mlflow", mlflow, lambda: _answers(self.tracking_uri + "/health"))
        state = {"owner": os.getpid(), "processes": [p.pid for p in self._processes], "environment": self.environment}
        _write_private(self._state_file, json.dumps(state))

    def _seaweed_command(self, ports: list[int]) -> list[str]:
        data = self.home / "s3"
        data.mkdir(exist_ok=True)
        identity = {
            "name": "rankloop",
            "credentials": [
                {
                    "accessKey": self.environment["AWS_ACCESS_KEY_ID"],
                    "secretKey": self.environment["AWS_SECRET_ACCESS_KEY"],
                }
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        config = self.home / "s3.json"
        _write_private(config, json.dumps({"identities": [identity]}))
        names = ["master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"]
        names += ["s3.port.grpc", "admin.port", "admin.port.grpc"]
        weed = Path(sys.executable).parent / "weed"
        return [
            str(weed if weed.exists() else "weed"),
            "-logtostderr=true",
            "mini",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.port={ports[0]}",
            f"-s3.config={config}",
            *(f"-{name}={port}" for name, port in zip(names, ports[2:], strict=True)),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
            "-s3.autoCreateBucket=false",
        ]

    def _mlflow_command(self, port: int) -> list[str]:
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--backend-store-uri", f"sqlite:///{self.home / 'mlflow.db'}"),
            *("--serve-artifacts", "--artifacts-destination", f"{self.storage_root}/mlflow"),
            *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        ]

    def _spawn(self, name: str, command: list[str], extra: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self.home / "logs" / f"{name}.log", "wb") as log:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **self.environment, **extra},
                    cwd=self.home,
                    start_new_session=True,  # Ctrl-C of the terminal is ours to handle
                )
            except FileNotFoundError as error:
                raise DoNotRetry(f"{command[0]} is not installed", "install rankloop with its `client` extra") from error
        self._processes.append(process)
        if self._watchdog is not None:
            self._watchdog.guard(process.pid)
        return process

    def _wait(self, name: str, process: subprocess.Popen[bytes], ready: Any) -> None:
        deadline = time.monotonic() + START_SECONDS
        log = self.home / "logs" / f"{name}.log"
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:])
                what = "did not answer in time" if process.poll() is None else f"ended with code {process.returncode}"
                raise Retry(f"{name} {what}; the end of {log}:\n    {tail}", "correct what it says, then run again")
            time.sleep(0.05)

    def _create_bucket(self) -> None:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            config=Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1}),
        )
        deadline = time.monotonic() + START_SECONDS
        while True:  # it answers before its volume server has joined
            try:
                if BUCKET not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
                return
            except (ClientError, BotoCoreError) as error:
                if time.monotonic() > deadline:
                    log = self.home / "logs" / "seaweedfs.log"
                    raise Retry(f"the object store takes no data: {error}", f"see {log}; is the disk full?") from error
                time.sleep(0.1)

    def check(self) -> None:
        """Raises `Retry` if a server that was started here has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise Retry(f"a server ended with code {process.returncode}", f"see {self.home / 'logs'}")

    def stop(self) -> None:
        """Stops what was started here, SeaweedFS by SIGINT (SIGTERM takes it five times as long), and frees the folder."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if self._processes:
            self._state_file.unlink(missing_ok=True)
        self._processes = []
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        for held in (self._users, self._lock):
            if held is not None:
                held.close()
        self._users = self._lock = None


@contextlib.contextmanager
def environment_of(services: LocalServices) -> Iterator[None]:
    """Puts the services' variables into this process's environment, and takes them out again."""
    before = {key: os.environ.get(key) for key in services.environment}
    os.environ.update(services.environment)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now, all different, below those that the kernel hands out to clients."""
    sockets: list[socket.socket] = []
    try:
        while len(sockets) < count:
            candidate = socket.socket()
            try:
                candidate.bind(("127.0.0.1", 10000 + secrets.randbelow(20000)))
            except OSError as error:
                candidate.close()
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            sockets.append(candidate)
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _answers(url: str, expected: int = 200) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == expected)
    except urllib.error.HTTPError as error:
        return error.code == expected
    except OSError:
        return False


def _locked(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Whether this process now holds the file's lock, alone or shared; closing the file, or the process's end, lets it go."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kept_secret(path: Path) -> str:
    """A random text that only this user can read, made by whoever comes first and the same ever after."""
    if not path.exists():
        made = path.with_name(f"{path.name}-{os.getpid()}")
        _write_private(made, secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):
            os.link(made, path)
        made.unlink()
    return path.read_text(encoding="utf-8")


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
