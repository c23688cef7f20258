"""A container engine of a test's own, a base image, and both images of the product: what the system tests of containers run on.

No public image registry is needed: the base is made of Debian's packages by mmdebstrap and imported.
"""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_SECONDS, STOP_SECONDS = 60, 30
SUITE, PACKAGES = "bookworm", "python3,python3-venv,ca-certificates"  # Python 3.11, which the lock file is for
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rankloop-tests"


class NoEngineError(RuntimeError):
    """This machine's kernel, or whoever confines us, lets no dockerd or no container run; the message is Docker's own."""


@contextmanager
def engine() -> Iterator[str]:
    """Runs dockerd on a private socket and data folder; gives the socket's address, as `DOCKER_HOST` has it.

    Raises:
        NoEngineError: dockerd does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="rankloop-docker-"))  # a socket's path is at most 107 bytes long
    address = f"unix://{folder}/docker.sock"
    command = ["dockerd", "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"), "-H", address]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, "-p", str(folder / "pid")], stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while docker(address, "version", check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoEngineError((folder / "log").read_text(encoding="utf-8")[-2000:])
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()  # it stops its containers and containerd
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for mounted in (folder / "exec" / "netns").glob("*"):  # dockerd leaves the host's network mounted there
            subprocess.run(["umount", str(mounted)], check=False)
        shutil.rmtree(folder, ignore_errors=True)


def docker(address: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the docker client to its end."""
    done = subprocess.run(
        ["docker", *arguments], env={**os.environ, "DOCKER_HOST": address}, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done


def import_base(address: str) -> str:
    """The ID of a base image with Python; its archive is kept in a cache folder of this user for the next run.

    Raises:
        NoEngineError: no container of it can run.
    """
    archive = CACHE / f"{SUITE}-{PACKAGES.replace(',', '-')}.tar"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        made = archive.with_suffix(f".{os.getpid()}.tar")
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.rename(archive)
    base = docker(address, "import", str(archive)).stdout.strip()
    done = docker(address, "run", "--rm", "--network", "host", base, "true", check=False)
    if done.returncode:
        raise NoEngineError(done.stderr)
    return base


def build_images(address: str, base: str, **variables: str) -> str:
    """Runs `make images` and gives its output. pip's index and certificates are those of this machine."""
    certificates = os.environ.get("PIP_CERT") or ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    with tempfile.TemporaryDirectory() as wheels:
        # The build of torch that pip finds here, which on a machine without internet is a file.
        (torch,) = (line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch=="))
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, torch]
        subprocess.run(fetch, check=True)
        environment = {
            **{name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
            "DOCKER_HOST": address,
            "CA_BUNDLE": certificates if Path(certificates).exists() else "",
            "WHEELS": " ".join(str(path) for path in Path(wheels).iterdir()),
            "BUILD_OPTIONS": "--network host",
            "BASE_IMAGE": base,
            **variables,
        }
        command = ["make", "-s", "images"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    assert done.returncode == 0, done.stdout
    return done.stdout
