"""SIGKILL at random steps, twenty times for each training stage: every run ends bit for bit as the one that nothing disturbed.

A run is killed, resumed from S3, killed again a few steps later, and so on until it ends. Each kill comes a random moment after a
random step, so it may hit a forward pass, the upload of a checkpoint or, after the last step, the publishing. The seed is fixed;
where exactly a kill lands depends on the machine.
"""

from __future__ import annotations

import random
import signal
import time

import pytest

from components.services.storage import Storage
from pipelines.local_services import LocalServices
from tests.stage_processes import OPTIONS, Ended, StageProcess, Undisturbed, contents, logged, run, train_undisturbed

KILLS, KILLS_PER_RUN = 20, 5
STEPS = {"train_sft": 27, "train_reward_model": 26, "ppo_finetune": 17, "dpo_finetune": 13}  # of a whole run
LATER_SECONDS = 0.1  # after a step; the next one takes about as long, with its checkpoint


@pytest.fixture(scope="module")
def undisturbed(services: LocalServices) -> Undisturbed:
    return train_undisturbed("s3://rankloop/undisturbed-system")


def killed_on_its_way(stage: str, root: str, inputs: dict[str, str], rng: random.Random) -> tuple[int, Ended]:
    """A run that is killed up to `KILLS_PER_RUN` times before it ends; how often it was."""
    steps = 0
    for kills in range(KILLS_PER_RUN):
        process = StageProcess(stage, root, inputs)
        process.wait_for(rng.randint(1, max(1, 2 * (STEPS[stage] - steps) // KILLS_PER_RUN)))
        time.sleep(rng.uniform(0, LATER_SECONDS))
        process.signal(signal.SIGKILL)
        steps += len(process.steps())
        ended = process.ended()
        if ended.returncode != -signal.SIGKILL:
            return kills, ended
    return KILLS_PER_RUN, run(stage, root, inputs)


@pytest.mark.parametrize("stage", list(OPTIONS))
def test_line_37_killed_at_random_steps_it_ends_with_the_same_bits(stage: str, undisturbed: Undisturbed) -> None:
    rng = random.Random(stage)
    kills = runs = 0
    while kills < KILLS:
        runs += 1
        root = f"s3://rankloop/killed-on-its-way/{stage}-{runs}"
        killed, ended = killed_on_its_way(stage, root, undisturbed.inputs[stage], rng)
        kills += killed
        for name, uri in ended.outputs.items():
            assert contents(uri) == contents(undisturbed.outputs[stage][name]), f"{name} after {killed} kills"
            if "published already" not in ended.stderr:  # otherwise a kill came between publishing and the last request to MLflow
                assert logged(uri) == logged(undisturbed.outputs[stage][name])
        assert not list(Storage().list(f"{root}/checkpoints/")), "finished work leaves no checkpoint"
    print(f"{stage}: {kills} kills in {runs} runs")
