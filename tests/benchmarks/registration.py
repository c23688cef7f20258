"""A registration is killed before each of its writes in turn, and the same run again ends with a consistent registry.

    python -m tests.benchmarks.registration

The whole stage `register_model`, on a real MLflow server and a real S3 server, both started here. In each round a new policy
with a new reward model is better than the champion. The process that registers it gets SIGKILL right before its n-th request
that writes, to either server; for every n until there is no such write left. Only those requests change anything that anybody
else can see, so that is every instruction there is: what is killed after a write is killed before the next one. Then the stage
runs again. Afterwards both models must have exactly one version more, champion, challenger and previous_champion must be right
on both, and the audit whole.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import uuid
from functools import partial
from pathlib import Path

from components.register_model.audit import Audit, faults
from components.register_model.promotion import ANCHOR_TAG
from components.services.storage import Storage, join
from components.services.tracking import client
from pipelines.local_services import LocalServices, environment_of
from tests.integration.components.register_model.test_stage import World, aliases, new_world, register
from tests.promotion_processes import killed

LOCK_SECONDS = 1.0  # of a lease whose holder is killed


def copied(uri: str, folder: Path) -> str:
    """The same artifact at another place, which makes it another model for the registry."""
    marker = Storage().fetch_folder(uri, folder)
    (folder / "rankloop.json").unlink()
    place = join("s3://rankloop/fixtures", uuid.uuid4().hex)
    Storage().publish_folder(folder, place, marker)
    return place


def newcomer(world: World, number: int) -> World:
    """The world with a policy and a reward model that nobody has registered."""
    folder = world.home / f"new-{number}"
    return world._replace(policies=[copied(world.policies[1], folder / "p")], reward=copied(world.reward, folder / "r"))


def wrong_after(name: str, versions: int) -> list[str]:
    """What is wrong with a registry in which the last of so many versions of both models must be champion."""
    found = []
    right = {"champion": str(versions), "challenger": str(versions), "previous_champion": str(versions - 1)}
    for model in (name, f"{name}-reward"):
        there = len(client().search_model_versions(f"name = '{model}'"))
        found += [] if there == versions else [f"{model} has {there} versions, not {versions}"]
        found += [] if aliases(model) == right else [f"{model} has the aliases {aliases(model)}"]
    records = Audit(Storage(), join("s3://rankloop/registry", name, "audit")).records()
    return found + faults(records, client().get_registered_model(name).tags.get(ANCHOR_TAG, ""))


def sweep(home: Path, first: int, last: int) -> tuple[int, list[str]]:
    """Kills before the writes `first` to `last` (0: all there are) and gives how many there were, and what went wrong."""
    world, name, wrong = new_world(home), f"policy-{uuid.uuid4().hex[:8]}", []
    register(world, name, world.policies[0], world.evaluation(world.policies[0]))
    request, versions = first, 1
    while not last or request <= last:
        began = time.monotonic()
        new = newcomer(world, request)
        candidate = new.policies[0]
        evaluation = world.evaluation(candidate, str(versions), reward=new.reward)
        work = partial(register, new, name, candidate, evaluation, lock_seconds=LOCK_SECONDS)
        dead = killed(work, request)
        if dead:
            work()
        versions += 1
        found = wrong_after(name, versions)
        wrong += [f"killed before write {request}: {each}" for each in found]
        print(
            f"write {request}: {'killed' if dead else 'there is none'}, {found or 'right'}, {time.monotonic() - began:.1f} s",
            flush=True,
        )
        if not dead:
            break
        request += 1
    return request - first, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=0, help="0: all that there are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, LocalServices(Path(home) / "home") as services, environment_of(services):
        (Path(home) / "world").mkdir()
        writes, wrong = sweep(Path(home) / "world", arguments.first, arguments.last)
    print(f"{writes} writes, {len(wrong)} registries that were not right")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
