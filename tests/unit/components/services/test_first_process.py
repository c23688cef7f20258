"""What an image runs first: exit codes, signals to a stage below a shell, and the words for an out-of-memory kill."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.services.first_process import memory_limit, oom_kills, run

# What KFP's executor is to its shell: a child that the shell waits for. It saves for longer than the shell lives.
STAGE = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit({code})
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(30)
"""
KFP_SHELL = ["sh", "-ec", 'X=1 "$0" -S -c "$1"\n:\n', sys.executable]


def start(code: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "components.services.first_process", *KFP_SHELL, STAGE.format(code=code)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("code", [75, 0])
def test_a_stage_below_a_shell_hears_the_signal_and_is_waited_for(code: int) -> None:
    process = start(code)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert output == "saved\n"
    assert process.returncode == code, "the stage's exit code, not that of the shell, which the signal ended"


def test_without_a_signal_the_exit_code_is_the_commands() -> None:
    for code in (0, 3, 65):
        assert run(["sh", "-c", f"exit {code}"]) == code
    assert run(["sh", "-c", "kill -USR1 $$"]) == 128 + signal.SIGUSR1


def test_a_command_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["no-such-command"]) == 127
    assert "cannot run no-such-command: No such file or directory" in capsys.readouterr().err


def version_1(folder: Path, kills: int) -> None:
    (folder / "memory").mkdir(exist_ok=True)
    (folder / "memory" / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")
    (folder / "memory" / "memory.limit_in_bytes").write_text(f"{300 * 2**20}\n")


def version_2(folder: Path, kills: int) -> None:
    (folder / "memory.events").write_text(f"low 0\nhigh 0\nmax 12\noom 1\noom_kill {kills}\noom_group_kill 0\n")
    (folder / "memory.max").write_text(f"{300 * 2**20}\n")


@pytest.mark.parametrize("write", [version_1, version_2])
def test_both_versions_of_control_groups_are_read(write: object, tmp_path: Path) -> None:
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (0, "unknown")
    write(tmp_path, 2)  # type: ignore[operator]
    assert (oom_kills(tmp_path), memory_limit(tmp_path)) == (2, "300 MiB")


def test_an_unlimited_container(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) == "unknown"


def test_the_words_for_a_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version_2(tmp_path, 1)
    # The kernel's count grows while the command runs.
    counted = f"sed -i 's/^oom_kill 1/oom_kill 2/' {tmp_path}/memory.events; kill -9 $$"
    assert run(["sh", "-c", counted], tmp_path) == 137
    assert "OOMKilled" in (said := capsys.readouterr().err)
    assert "memory limit of 300 MiB" in said
    assert run(["sh", "-c", "kill -9 $$"], tmp_path) == 137
    assert "from outside" in capsys.readouterr().err
