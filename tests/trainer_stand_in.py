"""A stand-in for a cluster with Kubeflow Trainer: what the SDK asks of the Kubernetes API; pods are processes of this machine.

It is no cluster: it has one runtime and checks nothing. Of the controller it does what the torch plugin of Trainer 2 does: it gives
each node's command the variables `PET_*` that torchrun reads. The commands are those of the TrainJob, unchanged.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipelines.local_services import free_ports

RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "rankloop-torch", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                            "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "stand-in"}]}}},
                        },
                    }
                ]
            }
        },
    },
}


class Cluster:
    """TrainJobs as they were made, those that are there by name, and their nodes as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[dict[str, Any]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, list[subprocess.Popen[bytes]]] = {}

    def make(self, job: dict[str, Any]) -> dict[str, Any]:
        name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
        job["metadata"] |= {"namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
        (port,) = free_ports(1)
        self.made.append(job)
        self.jobs[name], self.nodes[name] = job, []
        for number in range(trainer["numNodes"]):
            home = self.folder / f"{name}-{number}"
            home.mkdir(exist_ok=True)
            variables = {each["name"]: each["value"] for each in trainer["env"]}
            variables |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": str(number), "PET_MASTER_PORT": str(port)}
            variables |= {"PET_NPROC_PER_NODE": trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]}
            variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            with open(home / "log", "wb") as log:
                pod = subprocess.Popen(
                    trainer["command"], env={**os.environ, **variables}, cwd=home, stdout=log, stderr=subprocess.STDOUT
                )
            self.nodes[name].append(pod)
        return job

    def status(self, name: str) -> dict[str, Any]:
        codes = [pod.poll() for pod in self.nodes[name]]
        if any(codes):
            return {"conditions": [condition("Failed")]}
        return {} if None in codes else {"conditions": [condition("Complete")]}

    def pods(self, name: str) -> list[dict[str, Any]]:
        phases = {None: "Running", 0: "Succeeded"}
        return [
            {
                "metadata": {
                    "name": f"{name}-node-0-{number}",
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                    "labels": {
                        "jobset.sigs.k8s.io/replicatedjob-name": "node",
                        "batch.kubernetes.io/job-completion-index": str(number),
                    },
                },
                "spec": {"containers": [{"name": "node", "image": "stand-in"}]},
                "status": {"phase": phases.get(pod.poll(), "Failed")},
            }
            for number, pod in enumerate(self.nodes[name])
        ]

    def log(self, pod: str) -> Iterator[bytes]:
        """What a pod has written, until it ends."""
        name, _, number = pod.partition("-node-0-")
        with open(self.folder / f"{name}-{number}" / "log", "rb") as log:
            while True:
                ended = self.nodes[name][int(number)].poll() is not None
                yield log.read()
                if ended:
                    return
                time.sleep(0.1)

    def delete(self, name: str) -> None:
        self.jobs.pop(name, None)
        for pod in self.nodes[name]:
            if pod.poll() is None:
                pod.terminate()


def condition(kind: str) -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}


class Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def do_GET(self) -> None:
        if self.path.endswith("/trainingruntimes/rankloop-torch"):
            self._answer(RUNTIME)
        elif (found := re.search(r"/trainjobs/([\w-]+)$", self.path)) and (job := self.cluster.jobs.get(found[1])):
            self._answer(job | {"status": self.cluster.status(found[1])})
        elif found := re.search(r"/pods/([\w-]+)/log", self.path):
            self.send_response(200)
            self.end_headers()
            for part in self.cluster.log(found[1]):
                self.wfile.write(part)
                self.wfile.flush()
        elif found := re.search(r"/pods\?labelSelector=jobset.sigs.k8s.io%2Fjobset-name%3D([\w-]+)", self.path):
            self._answer({"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": self.cluster.pods(found[1])})
        else:
            self._answer({"kind": "Status", "status": "Failure", "code": 404}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        job = json.loads(body)
        if job["metadata"]["name"] in self.cluster.jobs:
            self._answer({"kind": "Status", "status": "Failure", "reason": "AlreadyExists", "code": 409}, 409)
        else:
            self._answer(self.cluster.make(job), 201)

    def do_DELETE(self) -> None:
        self.cluster.delete(self.path.rpartition("/")[2])
        self._answer({"kind": "Status", "status": "Success"})

    def _answer(self, value: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def cluster() -> Iterator[tuple[Cluster, Path]]:
    """A running stand-in, and a kubeconfig that leads to it."""
    with tempfile.TemporaryDirectory() as folder:
        found = Cluster(Path(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": found}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}],
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "me", "user": {"token": "x"}}],
        }
        path = Path(folder) / "kubeconfig"
        path.write_text(json.dumps(config), encoding="utf-8")
        try:
            yield found, path
        finally:
            for name in found.nodes:
                found.delete(name)
            server.shutdown()
            server.server_close()
