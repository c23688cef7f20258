"""Stages as processes: run to the end, sent a signal on the way, run again; and what the training stages publish undisturbed.

A process that has imported everything is forked for each run, because importing costs seven seconds and a run one or two. What runs
in the fork is the stage's own command line.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import types
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from components.rlhf.records import SCHEMA
from components.services import processes, progress
from components.services.job import Job
from components.services.launch import Context, main
from components.services.progress import Progress
from components.services.storage import FILES, MARKER, Storage
from components.services.tracking import client
from components.simulated_world.generate import simulate_rankings
from pipelines.local_services import free_ports

OPTIONS = {
    "train_sft": {"layers": 1, "hidden": 32, "heads": 2, "vocabulary": 400, "epochs": 2, "test_examples": 16},
    "train_reward_model": {"batch_rankings": 4},
    "ppo_finetune": {"updates": 16, "batch_prompts": 8, "max_new_tokens": 8, "epochs": 2, "max_kl_reference": 1000},
    "dpo_finetune": {"batch_rankings": 4},
}
RUN_SECONDS = 300
GO_ON = "go-on"  # the file that ends a pause

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        *(f"components.{stage}.stage" for stage in OPTIONS),
        "components.rlhf.report_page",
        "mlflow",
        "peft",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        __name__,
    ]
)


class Ended(NamedTuple):
    """How a process ended: its exit code, or minus the number of the signal that killed it, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def outputs(self) -> dict[str, str]:
        """The stage's outputs, in their order."""
        assert self.returncode == 0, self.stderr
        found: dict[str, str] = json.loads(self.stdout[self.stdout.index("{") :])
        return found

    @property
    def uri(self) -> str:
        """The first output."""
        return next(iter(self.outputs.values()))


class StageProcess:
    """One run of a stage, under way from the start.

    Args:
        root: the S3 URI below which it publishes.
        options: of its command line, on top of `OPTIONS`.
        pause_after: so many steps are shown, and then the stage (of several processes the first) waits for `signal` or
            `go_on`; 0: it never does.
        forked: with several `processes` these are forked, too, where torchrun would start them.
    """

    def __init__(
        self, stage: str, root: str, inputs: dict[str, str], *, pause_after: int = 0, forked: bool = True, **options: Any
    ) -> None:
        values = {"threads": 1, "checkpoint_seconds": 0, **OPTIONS[stage], **options, **inputs}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        self._folder = tempfile.TemporaryDirectory()
        self._events = Path(self._folder.name) / "events"
        environment = {**os.environ, "RANKLOOP_STORAGE": root, progress.EVENTS_VARIABLE: str(self._events)}
        self._pause_after = pause_after
        self._process: ForkServerProcess = _forks.Process(
            target=_run, args=(stage, arguments, environment, self._folder.name, pause_after, forked), daemon=True
        )
        self._process.start()

    def steps(self) -> list[tuple[str, int]]:
        """(what, how many are done) of every step that was shown so far."""
        lines = self._events.read_text(encoding="utf-8").splitlines() if self._events.exists() else []
        shown = [json.loads(line) for line in lines if line.endswith("}")]
        return [(each["what"], each["done"]) for each in shown if each["event"] == "progress"]

    def wait_for(self, steps: int = 0) -> None:
        """Returns as soon as this process has shown that many steps (where it pauses, if 0), or has ended."""
        deadline = time.monotonic() + RUN_SECONDS
        while len(self.steps()) < (steps or self._pause_after) and self._process.is_alive():
            assert time.monotonic() < deadline, "it never came so far"
            time.sleep(0.002)

    def go_on(self) -> None:
        """Ends the pause."""
        Path(self._folder.name, GO_ON).touch()

    def signal(self, number: int) -> None:
        """Sends a signal as soon as it pauses, which ends the pause, too; not if the process has ended."""
        self.wait_for()
        if self._process.is_alive() and self._process.pid:
            os.kill(self._process.pid, number)

    def ended(self) -> Ended:
        """Waits for the end."""
        self._process.join(RUN_SECONDS)
        code = self._process.exitcode
        assert code is not None, "it does not end"
        written = [(Path(self._folder.name) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        self._folder.cleanup()
        return Ended(code, *written)


def _run(stage: str, arguments: list[str], environment: dict[str, str], folder: str, pause_after: int, forked: bool) -> None:
    """What the forked process does."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may have changed
    progress.SECONDS_BETWEEN_EVENTS = 0.0
    sys.argv = [stage, *arguments]
    if forked:
        processes.Node = ForkedNode  # type: ignore[assignment, misc]
    if pause_after:
        _pause_after(pause_after, Path(folder, GO_ON))
    main(stage)


def _pause_after(steps: int, go_on: Path) -> None:
    """Lets this process, and those that it forks, wait after so many steps until that file is there or a signal comes."""
    show, on_signal = Progress.event, Context.on_signal
    shown = 0
    told = False

    def show_and_wait(self: Progress, event: str, **fields: Any) -> None:
        nonlocal shown
        show(self, event, **fields)
        if event == "progress" and os.environ[progress.EVENTS_VARIABLE] != os.devnull:  # the others wait for the first as it is
            shown += 1
            while shown == steps and not told and not go_on.exists():
                time.sleep(0.002)

    def note_signal(self: Context, number: int, frame: types.FrameType | None) -> None:
        nonlocal told
        told = True
        on_signal(self, number, frame)

    Progress.event = show_and_wait  # type: ignore[method-assign]
    Context.on_signal = note_signal  # type: ignore[method-assign]


class ForkedNode:
    """Does what `processes.Node` does, but forks the processes: importing takes each of them seven seconds."""

    def __init__(self, job: Job) -> None:
        from components.services import rank

        (port,) = free_ports(1)
        count = int(job.config["processes"])
        self._pids: list[int] = []
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANKLOOP_JOB=job.model_dump_json())
                code = 1
                try:
                    rank.main()
                    code = 0
                finally:
                    os._exit(code)
            self._pids.append(pid)

    def running(self) -> bool:
        self._pids = [pid for pid in self._pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
        return bool(self._pids)

    def stop(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)

    def said(self) -> str:
        return "all forks ended"

    def close(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)


def run(stage: str, root: str, inputs: dict[str, str], **options: Any) -> Ended:
    return StageProcess(stage, root, inputs, **options).ended()


class Undisturbed(NamedTuple):
    """Inputs of each training stage, and its outputs without interruption."""

    inputs: dict[str, dict[str, str]]
    outputs: dict[str, dict[str, str]]

    def uri(self, stage: str) -> str:
        """The first thing that the stage published."""
        return next(iter(self.outputs[stage].values()))


def publish_snapshot(root: str) -> dict[str, str]:
    """120 simulated rankings below `root`, as an input of a stage."""
    empty = {"confidence": None}
    rows = [{**empty, **record, "ranking_id": str(i)} for i, record in enumerate(simulate_rankings(120, seed=0))]
    snapshot = {"snapshot_uri": root + "/snapshot"}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), Path(folder) / "part-00000.parquet")
        Storage().publish_folder(Path(folder), snapshot["snapshot_uri"], {"role": "rankings"})
    return snapshot


def train_undisturbed(root: str) -> Undisturbed:
    """Runs the training stages one after the other on 120 simulated rankings; everything is below `root`."""
    snapshot = publish_snapshot(root)
    sft = run("train_sft", root, snapshot).outputs
    scorers = run("train_reward_model", root, {**snapshot, **sft}).outputs
    ppo = {**snapshot, "sft_uri": sft["policy_uri"], **scorers}
    policy = run("ppo_finetune", root, ppo).outputs
    dpo = {key: value for key, value in ppo.items() if key != "reward_model_uri"}
    learned = run("dpo_finetune", root, dpo).outputs
    return Undisturbed(
        {"train_sft": snapshot, "train_reward_model": {**snapshot, **sft}, "ppo_finetune": ppo, "dpo_finetune": dpo},
        {"train_sft": sft, "train_reward_model": scorers, "ppo_finetune": policy, "dpo_finetune": learned},
    )


def fetched(uri: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a published model; its files are in `folder` then."""
    Storage().fetch_folder(uri, folder)
    return load_file(folder / "model.safetensors")


def contents(uri: str) -> dict[str, Any]:
    """Every file of a published folder: its bytes, or of the two that hold measurements of the machine what they say besides."""
    files: dict[str, Any] = {}
    for item in Storage().list(uri + "/"):
        name, data = item.uri.removeprefix(uri + "/"), Storage().get_bytes(item.uri)
        if name in (MARKER, "training.jsonl"):
            lines = [data] if name == MARKER else data.splitlines()
            files[name] = [unmeasured(json.loads(line)) for line in lines]
            if name == MARKER:
                files[name][0][FILES].pop("training.jsonl", None)  # it holds measurements
        else:
            files[name] = data
    return files


def logged(uri: str) -> dict[str, Any]:
    """The curves that MLflow has of the run that published a folder, but for measurements of the machine."""
    run_id = Storage().get_json(f"{uri}/{MARKER}")["mlflow_run_id"]
    names = [name for name in client().get_run(run_id).data.metrics if not is_measured(name)]
    return {name: [(point.step, point.value) for point in client().get_metric_history(run_id, name)] for name in names}


def kinds(root: str) -> set[str]:
    """What there is below a root, by its first folder."""
    return {item.uri.split("/")[4] for item in Storage().list(root + "/")}


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The same weights but for rounding."""
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        torch.testing.assert_close(ours[name], values, atol=2e-5, rtol=2e-5)


def is_measured(name: str) -> bool:
    """Whether a number is a time, a speed or an amount of memory: what differs from run to run."""
    return "second" in name or "memory_" in name


def unmeasured(value: Any) -> Any:
    """A JSON value without measurements of the machine, and without the name of an MLflow run."""
    if isinstance(value, dict):
        return {key: unmeasured(each) for key, each in value.items() if not is_measured(key) and key != "mlflow_run_id"}
    return value
