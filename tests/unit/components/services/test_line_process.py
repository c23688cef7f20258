"""The line to a process of ours: answers, refusals, and every way in which it or we may end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.rlhf.vllm_sampler import WORKER, worker_command
from components.services.exits import DoNotRetry, Retry
from components.services.line_process import LineProcess

LOOP = """
import json, os, signal, socket, sys, time
line = socket.socket(fileno=int(sys.argv[-1]))
print("hello from the process", flush=True)
for text in line.makefile("r"):
    request = json.loads(text)
    answer = {"got": request, "environment": dict(os.environ)}
    if request["do"] == "exit":
        print("about to end", flush=True); os._exit(3)
    if request["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if request["do"] == "hang":
        time.sleep(1000)
    if request["do"] == "refuse":
        answer = {"error": "no such model", "again": False, "remedy": "name another"}
    if request["do"] == "fail":
        answer = {"error": "no memory now", "again": True}
    line.sendall(json.dumps(answer).encode() + b"\\n")
"""


def started(tmp_path: Path, **environment: str) -> LineProcess:
    return LineProcess([sys.executable, "-I", "-c", LOOP], "the process", tmp_path / "log", environment)


def gone(pid: int, seconds: float = 5.0) -> bool:
    """Whether a process that may not be our child ends within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_each_request_has_its_answer_however_long_they_are(tmp_path: Path) -> None:
    with started(tmp_path) as line:
        for number in range(3):
            request = {"do": "echo", "number": number, "tokens": list(range(100_000)), "text": 'line\nbreak "é"'}
            assert line.ask(request, 10)["got"] == request
    assert gone(line.pid)


def test_credentials_and_the_place_in_our_own_job_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RANKLOOP_RATER_SALT", "HF_TOKEN", "RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "ours")
    with started(tmp_path, OMP_NUM_THREADS="1") as line:
        seen = line.ask({"do": "echo"}, 10)["environment"]
    assert "ours" not in seen.values()
    assert seen["OMP_NUM_THREADS"] == "1"
    assert seen["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(("how", "told"), [("exit", "ended with code 3"), ("kill", "was killed by signal 9")])
def test_when_it_dies_another_try_may_help_and_its_last_words_are_told(tmp_path: Path, how: str, told: str) -> None:
    with started(tmp_path) as line:
        with pytest.raises(Retry, match=told) as failure:
            line.ask({"do": how}, 10)
        with pytest.raises(Retry, match=told):
            line.ask({"do": "echo"}, 10)
    assert "hello from the process" in str(failure.value)


def test_when_it_hangs_it_is_ended_in_time(tmp_path: Path) -> None:
    with started(tmp_path) as line:
        before = time.monotonic()
        with pytest.raises(Retry, match=r"gave no answer within 0.3 seconds(?s:.*)hello from the process"):
            line.ask({"do": "hang"}, 0.3)
        assert time.monotonic() - before < 5
        assert gone(line.pid)


def test_a_refusal_says_whether_another_try_may_help_and_the_line_goes_on(tmp_path: Path) -> None:
    with started(tmp_path) as line:
        with pytest.raises(DoNotRetry, match=r"no such model(?s:.*)name another"):
            line.ask({"do": "refuse"}, 10)
        with pytest.raises(Retry, match="no memory now"):
            line.ask({"do": "fail"}, 10)
        assert line.ask({"do": "echo"}, 10)["got"] == {"do": "echo"}


def test_an_interpreter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match="/no/such/python: No such file"):
        LineProcess(["/no/such/python"], "the process", tmp_path / "log", {})


def test_it_is_gone_when_an_error_ends_us_though_it_is_busy(tmp_path: Path) -> None:
    line = started(tmp_path)

    def fail() -> None:
        with line:
            line._socket.sendall(json.dumps({"do": "hang"}).encode() + b"\n")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gone(line.pid)


def test_vllms_worker_says_that_vllm_is_missing(tmp_path: Path) -> None:
    """This interpreter has none: the tests' environment excludes it."""
    with (
        LineProcess(worker_command("", os.getpid()), "vLLM", tmp_path / "log", {}) as line,
        pytest.raises(DoNotRetry, match=r"No module named 'vllm'(?s:.*)ppo_finetune.vllm_python"),
    ):
        line.ask({"do": "start", "model": "nowhere", "options": {}, "sleeps": False}, 60)


def test_vllms_worker_ends_when_we_are_killed(tmp_path: Path) -> None:
    parent = f"""
import os, time
from pathlib import Path
from components.services.line_process import LineProcess
line = LineProcess([{sys.executable!r}, "-I", {str(WORKER)!r}, str(os.getpid())], "vLLM", Path({str(tmp_path / "log")!r}), {{}})
print(line.pid, flush=True)
time.sleep(1000)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert gone(pid)


def test_vllms_worker_does_not_stay_for_a_parent_that_is_gone(tmp_path: Path) -> None:
    with LineProcess(worker_command("", os.getpid() + 1), "vLLM", tmp_path / "log", {}) as line:
        with pytest.raises(Retry, match="ended with code 0"):
            line.ask({"do": "start"}, 60)
