"""People judge pairs of answers in Label Studio: tasks go out, its JSON export comes back.

Out: `label_studio/tasks.json` and `label_studio/config.xml` to import, and beside that folder `human_key.json`, which says whose
answer stood left. The raters see a conversation and two answers; which side is the candidate's is tossed by a coin of the seed and
of the pair itself, and no task names a policy. A task is known again by the digest of what it shows, so that labels can only count
for the very answers that were read.

Back: the project's export (Label Studio: Export, JSON). A rater's later annotation replaces an earlier one; a cancelled one is no
verdict.

https://labelstud.io/tags/pairwise, https://labelstud.io/guide/export
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from components.evaluate.judges.pairs import SAME_TEXT, Judgement, Pair
from components.rlhf.agreement import Votes
from components.rlhf.label_studio import rater_of, results_of, side_of
from components.services.exits import DoNotRetry
from components.services.launch import json_digest
from components.services.storage import Storage

FOLDER, KEY = "label_studio", "human_key.json"
TIE = "equally good"
CONFIG_XML = f"""\
<View>
  <Header value="Which answer is better for the person who asked?"/>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="better" toName="answer1,answer2"/>
  <Text name="answer1" value="$answer1"/>
  <Text name="answer2" value="$answer2"/>
  <Choices name="tie" toName="prompt" choice="single" showInline="true">
    <Choice value="{TIE}"/>
  </Choices>
</View>
"""


class Label(NamedTuple):
    """One rater's verdict on a task: 1 the left answer is better, -1 the right one, 0 a tie; None if it was passed over.

    `rater` is the number of a user; "" where the export does not say.
    """

    rater: str
    verdict: int | None


class Labels(NamedTuple):
    """{digest of what a task shows: its labels, one of each rater}, and how many annotations said nothing that can be read."""

    by_task: dict[str, list[Label]]
    unreadable: int


def task_of(pair: Pair, seed: int) -> tuple[dict[str, str], bool]:
    """What a rater is shown, and whether the candidate's answer is the left one."""
    ours_left = json_digest([seed, pair.question, pair.ours, pair.theirs])[0] in "01234567"
    left, right = (pair.ours, pair.theirs) if ours_left else (pair.theirs, pair.ours)
    return {"prompt": pair.question, "answer1": left, "answer2": right}, ours_left


def digest_of(shown: Mapping[str, Any]) -> str:
    """The name of a task: the digest of what it shows."""
    return json_digest([shown.get(name) for name in ("prompt", "answer1", "answer2")])[:32]


def write_tasks(folder: Path, pairs: Sequence[Pair], seed: int) -> int:
    """Writes the tasks, their configuration and the key below `folder`; gives the number of tasks. Equal texts need none."""
    tasks: dict[str, dict[str, str]] = {}
    key: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in pairs:
        if pair.ours != pair.theirs:
            shown, ours_left = task_of(pair, seed)
            name = digest_of(shown)
            tasks[name] = {"task": name, **shown}
            key[name].append({"prompt": pair.row, "candidate": "left" if ours_left else "right", "over": pair.over})
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    text = json.dumps([{"data": each} for each in tasks.values()], indent=1, ensure_ascii=False)
    (folder / FOLDER / "tasks.json").write_text(text, encoding="utf-8")
    (folder / FOLDER / "config.xml").write_text(CONFIG_XML, encoding="utf-8")
    (folder / KEY).write_text(json.dumps(key, indent=1), encoding="utf-8")
    return len(tasks)


def read_labels(uri: str, storage: Storage) -> tuple[Labels, str]:
    """The labels of an export, and the SHA-256 of its bytes.

    Raises:
        DoNotRetry: the file is missing, or is no JSON export of Label Studio.
    """
    if uri.startswith("s3://"):
        data = storage.get_bytes(uri)
    else:
        try:
            data = Path(uri).read_bytes()
        except OSError as error:
            raise DoNotRetry(f"human_labels {uri} cannot be read: {error.strerror}", "give a file or an s3:// object") from error
    remedy = "export the project from Label Studio as JSON (not JSON-MIN or CSV)"
    try:
        tasks = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DoNotRetry(f"human_labels {uri} is not JSON: {error}", remedy) from error
    if not isinstance(tasks, list) or not tasks:
        raise DoNotRetry(f"human_labels {uri} is not a list of tasks", remedy)
    by_task: dict[str, list[Any]] = defaultdict(list)  # a project may hold a task twice
    for number, task in enumerate(tasks, 1):
        shown, annotations = (task.get("data"), task.get("annotations")) if isinstance(task, dict) else (None, None)
        if not isinstance(shown, dict) or not isinstance(annotations, list):
            raise DoNotRetry(f"human_labels {uri}, task {number}: expected an object with data and annotations", remedy)
        try:
            by_task[digest_of(shown)] += annotations
        except UnicodeEncodeError as error:  # JSON can hold half of a character
            raise DoNotRetry(f"human_labels {uri}, task {number}: its text is not Unicode ({error})", remedy) from error
    found = {name: _labels(annotations) for name, annotations in by_task.items()}
    unreadable = sum(bad for _, bad in found.values())
    return Labels({name: labels for name, (labels, _) in found.items()}, unreadable), hashlib.sha256(data).hexdigest()


def _labels(annotations: Sequence[Any]) -> tuple[list[Label], int]:
    """The last label of each rater, and how many annotations cannot be read."""
    last: dict[str, tuple[str, Label]] = {}
    bad = 0
    for number, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            bad += 1
            continue
        rater = rater_of(annotation.get("completed_by"))
        name = "" if rater is None else str(rater)
        place = name or f"nobody-{number}"
        if annotation.get("was_cancelled"):
            label = Label(name, None)
        elif (verdict := _verdict(annotation)) is None:
            bad += 1
            continue
        else:
            label = Label(name, verdict)
        when = str(annotation.get("updated_at") or annotation.get("created_at") or "")
        if place not in last or last[place][0] <= when:
            last[place] = (when, label)
    return [label for _, label in last.values()], bad


def _verdict(annotation: Mapping[str, Any]) -> int | None:
    """None unless there is either one chosen side or one tie."""
    sides, ties = results_of(annotation, "pairwise"), results_of(annotation, "choices")
    if sides is None or ties is None or len(sides) + len(ties) != 1:
        return None
    if sides:
        return {"left": 1, "right": -1, None: None}[side_of(sides[0])]
    value = ties[0].get("value")
    return 0 if isinstance(value, dict) and value.get("choices") == [TIE] else None


def judge_by_humans(pairs: Sequence[Pair], labels: Labels, seed: int) -> tuple[list[Judgement], Votes, dict[str, int]]:
    """A judgement of every pair in their order, all votes for the raters' agreement, and counts.

    Args:
        labels: of no task where nobody has labelled anything yet.

    Raises:
        DoNotRetry: there are labels, and none of them is for one of these pairs.
    """
    raters: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    items: dict[str, int] = {}
    judgements = []
    for pair in pairs:
        if pair.ours == pair.theirs:
            judgements.append(SAME_TEXT)
            continue
        shown, ours_left = task_of(pair, seed)
        name = digest_of(shown)
        given = labels.by_task.get(name, [])
        verdicts = [label.verdict for label in given if label.verdict is not None]
        details = {"task": name, "raters": len(given), "passed_over": len(given) - len(verdicts)}
        balance = sum(verdicts) if ours_left else -sum(verdicts)
        outcome = (1 + (balance > 0) - (balance < 0)) / 2  # what most raters prefer
        judgements.append(Judgement(outcome if verdicts else None, bool(given), details))
        if name not in items:  # another policy's same answer is the same task: its votes are counted once
            items[name] = len(items)
            for label in given:
                if label.verdict is not None:
                    rater = raters.setdefault(label.rater, len(raters)) if label.rater else -1
                    rows.append((items[name], pair.row, rater, label.verdict))
    foreign = len(labels.by_task.keys() - items.keys())
    if labels.by_task and foreign == len(labels.by_task):
        raise DoNotRetry(
            f"none of the {foreign} labelled tasks shows answers of this evaluation",
            f"give the export of the tasks of this evaluation's {FOLDER}/tasks.json: same policies, prompts, seed and machine",
        )
    counts = {"raters": len(raters), "labels": len(rows), "foreign_tasks": foreign, "unreadable_annotations": labels.unreadable}
    return judgements, Votes(*np.array(rows, dtype=np.int64).reshape(-1, 4).T), counts
