"""`rankloop models` on a real registry: two versions with their whole lineage, and every command as a person calls it."""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from components.ingest_rankings.snapshot import SnapshotWriter
from components.register_model import stage
from components.rlhf.gate import decide
from components.rlhf.models import new_scorer, save_model
from components.rlhf.records import Ranking
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.services.exits import EXIT_DO_NOT_RETRY, StageFailure
from components.services.launch import Context
from components.services.storage import MARKER, Storage, join
from components.services.tracking import client
from components.simulated_world.generate import simulate_rankings
from pipelines.cli import app
from pipelines.local_services import LocalServices
from tests.integration.components.register_model.test_stage import GOOD, THRESHOLDS


class Told(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    text: str


class Bench(NamedTuple):
    """A registered policy with two versions; `artifacts` are their URIs."""

    name: str
    artifacts: dict[str, str]

    def __call__(self, *arguments: str) -> Told:
        result = CliRunner().invoke(app, ["models", *arguments, "--name", self.name])
        if isinstance(result.exception, StageFailure):
            return Told(result.exception.exit_code, str(result.exception))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Told(result.exit_code, result.output)

    def aliases(self) -> dict[str, str]:
        return {alias: str(version) for alias, version in client().get_registered_model(self.name).aliases.items()}


@pytest.fixture(scope="module")
def make(services: LocalServices, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bench]:
    """Publishes artifacts once and registers them under a new name: version 1 passes, version 2 fails its gate."""
    home, storage = tmp_path_factory.mktemp("models"), Storage()
    empty = {"collected_at": None, "confidence": None, "policies": None, "criterion": None}
    records = [{**empty, **each, "ranking_id": str(i), "split": "test"} for i, each in enumerate(simulate_rankings(24, seed=0))]
    with SnapshotWriter(home / "scratch") as writer:
        for record in records:
            writer.add(Ranking(**record))
        snapshot = writer.write(writer.sorted_records(), home / "snapshot")
    artifacts = {"snapshot": f"s3://rankloop/rankings/{snapshot.digest}"}
    storage.publish_folder(home / "snapshot", artifacts["snapshot"], snapshot.marker)
    tokenizer = train_tokenizer((each["prompt"][0]["content"] for each in records), 300, 128)

    def publish(name: str, role: str, model: Any, **facts: Any) -> None:
        save_model(model, tokenizer, home / name)
        artifacts[name] = f"s3://rankloop/models-test/{uuid.uuid4().hex}"
        storage.publish_folder(home / name, artifacts[name], {"role": role, "stage": "a_test", "code": "c0de", **facts})

    for seed, name in enumerate(("sft", "policy", "other")):
        publish(name, "policy", new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=128, seed=seed))
    for seed, name in enumerate(("reward_model", "judge_model")):
        scorer = new_scorer(home / "sft", seed=seed)
        scorer.config.pad_token_id = tokenizer.pad_token_id
        publish(name, name, scorer, rankings=12, accuracy={"value": 0.75, "low": 0.5, "high": 0.9})

    def evaluate(candidate: str, champion: str, **measures: Any) -> str:
        numbers, thresholds = GOOD | measures, THRESHOLDS | ({"min_win_rate_over_champion": 0.5} if champion else {})
        rows, gate = decide(numbers, thresholds)
        uris = {f"{name}_uri": artifacts[name] for name in ("snapshot", "sft", "reward_model", "judge_model")}
        config = {"max_new_tokens": 12, "prompts": 8}
        document = {**uris, "candidate_uri": candidate, "champion_version": champion, "champion_uri": "", "measures": numbers}
        document |= {"thresholds": thresholds, "gate": gate, "gate_table": rows, "config": config, "simulated": True}
        folder, uri = home / uuid.uuid4().hex, f"s3://rankloop/models-test/{uuid.uuid4().hex}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(document), encoding="utf-8")
        storage.publish_folder(folder, uri, {"role": "evaluation", "gate": gate, "config": config})
        return uri

    def register(name: str, candidate: str, evaluation: str) -> None:
        scratch = home / uuid.uuid4().hex
        scratch.mkdir()
        config = stage.Config(policy_name=name, reward_model_name=f"{name}-reward", intended_use="Answers *support* requests.")
        inputs = stage.Inputs(
            candidate_uri=candidate, reward_model_uri=artifacts["reward_model"], evaluation_uri=evaluation, gate="pass"
        )
        context = Context("register_model", config, inputs, scratch)
        context.tracker.start(context.config, context.inputs)
        stage.run(config, inputs, context)

    def bench() -> Bench:
        name = f"policy-{uuid.uuid4().hex[:8]}"
        artifacts["evaluation"] = evaluate(artifacts["policy"], "")
        register(name, artifacts["policy"], artifacts["evaluation"])
        register(
            name, artifacts["other"], evaluate(artifacts["other"], "1", kl_reference={"value": 99.0, "low": 98.0, "high": 100.0})
        )
        return Bench(name, dict(artifacts))

    return bench


@pytest.fixture(scope="module")
def bench(make: Callable[..., Bench]) -> Bench:
    return make()


def test_the_versions_are_listed_with_and_without_the_command(bench: Bench) -> None:
    for listed in (bench("list"), bench()):
        assert listed.code == 0
        first, second = (line for line in listed.text.splitlines() if line.startswith(("│ 1", "│ 2")))
        assert ["2", "challenger", "fail"] == [cell.strip() for cell in first.split("│")[1:4]]
        assert ["1", "champion", "pass"] == [cell.strip() for cell in second.split("│")[1:4]]


def test_a_version_is_shown_as_a_tree_from_its_data_to_its_evaluation_with_its_gate(bench: Bench) -> None:
    shown = bench("show")
    assert shown.code == 0
    lines = shown.text.splitlines()
    assert lines[0] == f"{bench.name} version 1 (champion), with {bench.name}-reward version 1, gate pass"
    depth = {}
    for name in ("data snapshot", "SFT policy", "reward model", "judge", "policy", "evaluation"):
        line = next(each for each in lines if f"── {name}  " in each)
        depth[name] = line.index("─")
    assert depth["reward model"] == depth["judge"]
    del depth["judge"]
    assert sorted(depth, key=lambda name: depth[name]) == list(depth), "each below what it was made from"
    assert "24 rankings" in shown.text
    assert "accuracy 0.75 (0.5 to 0.9)" in shown.text
    for uri in bench.artifacts.values():
        assert uri in shown.text or uri == bench.artifacts["other"]
    failing = bench("show", "challenger").text
    assert "fails: KL to SFT in nats per completion is 99; <= 25 is required." in failing
    assert bench("show", "9").text.startswith(
        f"{bench.name} has no version or alias '9'\n  remedy: there are: 2 (challenger), 1 (ch"
    )


def test_the_card_and_the_page_are_there(bench: Bench, tmp_path: Path) -> None:
    card = bench("show", "--card").text
    assert card.startswith(f"# {bench.name.replace('-', chr(92) + '-')}\n")
    assert "Answers *support* requests." in card
    assert "24 rankings" in card
    assert bench("show", "--page", str(tmp_path / "page.html")).code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for said in ("Lineage of version 1", "Gate of version 1", "Audit", bench.artifacts["judge_model"], "register_model"):
        assert said in page
    assert "<h1>" in Storage().get_bytes(f"s3://rankloop/registry/{bench.name}/models.html").decode()


def test_a_failed_gate_is_promoted_by_force_only_and_rolled_back_by_one_command(make: Callable[..., Bench]) -> None:
    bench = make()
    assert bench("rollback").text.startswith(f"{bench.name} has no previous_champion to go back to; the champion is version 1")
    assert bench("promote", "2", "--reason", " ").text.startswith("no reason was given")
    refused = bench("promote", "2", "--reason", "the boss wants it")
    assert refused.code == EXIT_DO_NOT_RETRY
    assert "KL to SFT in nats per completion is 99; <= 25 is required." in refused.text
    assert bench.aliases() == {"champion": "1", "challenger": "2"}

    forced = bench("promote", "challenger", "--reason", "the boss wants it", "--force")
    assert (forced.code, forced.text) == (0, f"champion of {bench.name}: version 1 → 2, record 7 of the audit\n")
    assert bench.aliases() == {"champion": "2", "previous_champion": "1", "challenger": "2"}
    assert bench("promote", "2", "--reason", "again").text == f"version 2 of {bench.name} is champion already\n"
    back = bench("rollback", "--reason", "it rambles")
    assert back.text == f"champion of {bench.name}: version 2 → 1, record 9 of the audit\n"
    assert bench.aliases() == {"champion": "1", "previous_champion": "2", "challenger": "2"}

    records = [json.loads(line) for line in bench("audit", "--json").text.splitlines()]
    assert [(each["action"], each["event"]) for each in records if each["action"] in ("promote", "rollback")] == [
        ("promote", "begun"),
        ("promote", "done"),
        ("promote", "begun"),
        ("promote", "done"),
        ("rollback", "begun"),
        ("rollback", "done"),
    ]
    assert records[6]["reason"] == "the boss wants it"
    assert records[6]["by"]["command"] == "rankloop models promote"
    assert records[6]["evidence"]["objections"] == ["KL to SFT in nats per completion is 99; <= 25 is required."]
    table = bench("audit").text
    assert "it rambles" in table
    assert "not ended" not in table


def test_two_versions_answer_the_same_prompts(bench: Bench, tmp_path: Path) -> None:
    done = bench("compare", "1", "challenger", "--count", "6", "--show", "1", "--output", str(tmp_path / "both.jsonl"))
    assert done.code == 0
    assert "6 answered of 6" in done.text
    lines = [json.loads(line) for line in (tmp_path / "both.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 6
    won = {side: sum(line["won_by"] == side for line in lines) for side in ("A", "tie", "B")}
    assert f"{won['A']}, {won['tie']}, {won['B']}" in done.text
    assert f"{(won['A'] + won['tie'] / 2) / 6:.3f} [" in done.text

    same = bench("compare", "1", "champion", "--count", "4", "--show", "0").text
    assert "0.500 [" in same
    assert "0, 4, 0" in same, "the same policy with the same random numbers says the same"
    (tmp_path / "own.jsonl").write_text('{"prompt": "my printer is slow ."}\n{"prompt": "my phone is hot ."}\n', encoding="utf-8")
    own = bench("compare", "1", "2", "--prompts", str(tmp_path / "own.jsonl")).text
    assert "2 answered of 2" in own
    assert "my phone is hot ." in own


def test_verify_reads_everything_again_and_names_what_differs(bench: Bench) -> None:
    """Data, models, evaluation, what MLflow serves, and the audit: everything is damaged at once, named, and put back."""
    storage = Storage()
    whole = bench("verify")
    assert (whole.code, whole.text.splitlines()[-1][-15:]) == (0, "nothing differs")

    model = client().get_model_version(bench.name, "1").source.removeprefix("models:/")
    stored = (item.uri for item in storage.list("s3://rankloop/mlflow/"))
    served = next(uri for uri in stored if model in uri and uri.endswith(".safetensors"))
    audit = f"s3://rankloop/registry/{bench.name}/audit"
    artifacts = bench.artifacts
    damage: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
        join(artifacts["policy"], "model.safetensors"): (flipped, "{} differs: "),
        join(artifacts["judge_model"], "config.json"): (lambda _: None, "{} is gone"),
        join(artifacts["sft"], MARKER): (lambda data: data.replace(b"c0de", b"c0da"), "{} differs: "),
        join(artifacts["evaluation"], "evaluation.json"): (lambda data: data.replace(b'"pass"', b'"PASS"'), "{} differs: "),
        join(artifacts["snapshot"], "part-00000.parquet"): (another_ranking, "{} differs: "),
        served: (flipped, f"models:/{model}/model/model.safetensors is different"),
        f"{audit}/00000003.json": (
            lambda data: data.replace(b'"pass"', b'"fail"'),
            "record 4 does not follow from the one before it",
        ),
        f"{audit}/00000006.json": (lambda _: None, "record 6 is gone, though the registry remembers it"),
    }
    before = {uri: storage.get_bytes(uri) for uri in damage}
    for uri, (change, _) in damage.items():
        after = change(before[uri])
        assert after != before[uri]
        storage.delete(uri) if after is None else storage.put_bytes(uri, after)
    client().set_registered_model_alias(bench.name, "champion", "2")

    told = bench("verify")
    assert told.code == EXIT_DO_NOT_RETRY
    for uri, (_, said) in damage.items():
        assert said.format(uri) in told.text
    assert f"champion of {bench.name} is version 2, but the audit's last record says 1" in told.text
    assert f"{artifacts['snapshot']}: its rankings have digest " in told.text
    assert f"✓ reward_model {artifacts['reward_model']}" in told.text, "what is whole is not blamed"

    for uri, data in before.items():
        storage.put_bytes(uri, data)
    client().set_registered_model_alias(bench.name, "champion", "1")
    assert bench("verify").code == 0


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def another_ranking(data: bytes) -> bytes:
    """The same Parquet file with one rank changed."""
    table = pq.read_table(io.BytesIO(data))
    rows = table.to_pylist()
    rows[5]["ranks"] = rows[5]["ranks"][::-1]
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, table.schema), written)
    return written.getvalue()


def test_what_is_missing_is_said(services: LocalServices, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = Bench("nobody", {})
    assert nobody("list").text == "nobody has no versions yet; `rankloop run` makes one\n"
    assert nobody("show").text.startswith("nobody has no versions yet")
    assert nobody("rollback").code == EXIT_DO_NOT_RETRY
    assert nobody("audit").text == "no alias of nobody has been moved yet\n"
    monkeypatch.delenv("RANKLOOP_STORAGE")
    assert nobody("list").text.startswith("RANKLOOP_STORAGE is not set, but MLFLOW_TRACKING_URI is")
