"""`rankloop run` and `rankloop watch`: a graph on this machine, with the local servers, to the table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from components.services.exits import DoNotRetry, StageFailure
from components.services.storage import MARKER, Storage, join
from components.services.tracking import PARENT_VARIABLE, client, experiment_id, mlflow_errors
from pipelines import METHODS, WATCH
from pipelines.arguments import Sources, arguments_of, fingerprints_of, upload_simulated
from pipelines.display import Display, estimate, table
from pipelines.local_services import LocalServices, environment_of
from pipelines.profile import Profile
from pipelines.supervisor import Result, Supervisor


def run(profile: Profile, sources: Sources, home: Path, fresh: bool, console: Console, graph: str = "rlhf") -> int:
    """Runs a graph once and shows it; gives the exit code.

    Args:
        fresh: use no cached result of KFP's.
        graph: "rlhf", or "drift_watch", which runs it only if the rankings drifted.
    """
    rankings = sources.rankings
    if not rankings and profile.simulated is None:
        raise DoNotRetry(f"profile {profile.name} brings no rankings", "give them with --rankings FILE, FOLDER, s3://… or hf://…")
    began = time.monotonic()
    with LocalServices(home) as services, environment_of(services):
        up_seconds = time.monotonic() - began
        storage = Storage()
        console.print(f"S3 and MLflow are up ({up_seconds:.1f} s); MLflow: {services.tracking_uri}", highlight=False)
        if not rankings:
            assert profile.simulated is not None
            console.print("The rankings are simulated: requests, replies and raters come from a grammar.", highlight=False)
            rankings = upload_simulated(storage, services.storage_root, profile.simulated.rankings, profile.simulated.seed)
        from components.ingest_rankings.raters import salt_of

        sources = sources._replace(rankings=rankings)
        reading = profile.stages["ingest_rankings"]
        salt = salt_of(reading["rater_ids"], reading["rater_salt_variable"])
        fingerprints = fingerprints_of(profile, sources, storage, salt)
        parent = open_parent(profile, rankings, graph)
        name = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-") + parent[:6]
        arguments = arguments_of(profile, sources, fingerprints, graph)
        request = {"graph": graph, "home": str(home.resolve()), "caching": not fresh, "arguments": arguments}
        with Display(console) as display:
            supervisor = Supervisor(home / "runs" / name, request, {PARENT_VARIABLE: parent}, display)
            result = supervisor.run()
        close_parent(parent, result, profile)
        if result.exit_code:
            console.print(f"\n{result.message}\n  log: {supervisor.log}", highlight=False, markup=False, style="red")
            return result.exit_code
        report = home / "runs" / name / "report.html"
        if WATCH in result.events:
            show_watch(console, storage, result, home / "runs" / name / "drift.html")
        if "register_model" in result.events:
            show_result(console, storage, services, result, report)
        overhead = up_seconds + infrastructure_seconds(result)
        total = time.monotonic() - began
        console.print(
            f"\n{total:.0f} s in all; KFP, S3 and MLflow took {overhead:.0f} s of them ({overhead / total:.0%}). "
            f"`rankloop services` opens MLflow again.",
            highlight=False,
        )
    return 0


def open_parent(profile: Profile, rankings: str, graph: str) -> str:
    """The MLflow run of this pipeline run, of which every stage's is a child."""
    with mlflow_errors():
        mlflow = client()
        tags = {"mlflow.runName": f"{graph}-{profile.name}", "rankloop.profile": profile.name, "rankloop.rankings": rankings}
        tags["rankloop.method"] = profile.method
        run_id: str = mlflow.create_run(experiment_id(mlflow), tags=tags).info.run_id
        mlflow.log_dict(run_id, profile.model_dump(mode="json"), "profile.json")
    return run_id


def close_parent(run_id: str, result: Result, profile: Profile) -> None:
    """Notes which stages were reused, and closes the run if the graph's exit handler could not."""
    try:
        with mlflow_errors():
            mlflow = client()
            if result.reused:
                mlflow.set_tag(run_id, "rankloop.reused", ",".join(result.reused))
            if result.exit_code:
                mlflow.set_tag(run_id, "rankloop.failure", result.message[:5000])
                mlflow.set_terminated(run_id, "KILLED" if result.message.startswith("interrupted") else "FAILED")
            elif mlflow.get_run(run_id).info.status == "RUNNING":
                mlflow.set_terminated(run_id, "FINISHED")
    except StageFailure:
        if not result.exit_code:
            raise


def infrastructure_seconds(result: Result) -> float:
    """Time that went to KFP, S3 and MLflow: whatever was not a stage's own work, and the requests within the stages."""
    ended = [event for event in result.events.values() if event["event"] == "end"]
    own = sum(e["seconds"] - e["storage_seconds"] - e["tracking_seconds"] for e in ended if e["stage"] != "close_run")
    return max(0.0, result.seconds - own)


def show_result(console: Console, storage: Storage, services: LocalServices, result: Result, report: Path) -> None:
    """The table at the end, from what the stages published; a copy of the report is kept beside the run's log."""
    verdict, registered = result.events["evaluate"], result.events["register_model"]
    evaluation_uri = verdict["outputs"]["evaluation_uri"]
    evaluation = storage.get_json(join(evaluation_uri, "evaluation.json"))
    storage.download_file(join(evaluation_uri, "report.html"), report)
    models = report.with_name("models.html")
    storage.download_file(join(services.storage_root, "registry", services_name(registered), "models.html"), models)
    reward = storage.get_json(join(evaluation["reward_model_uri"], MARKER))
    judge = storage.get_json(join(evaluation["judge_model_uri"], MARKER))
    ingest = ingest_report(storage, services.storage_root, evaluation["snapshot_uri"])
    measures = evaluation["measures"]
    version, alias = registered["outputs"]["version"], registered["outputs"]["alias"]
    if alias == "unchanged":
        alias += " (it is the champion)"
    rows = [
        ("method", made_by(storage, evaluation)),
        ("rankings", "{read} read, {accepted} kept, {duplicates} duplicates, {quarantined} quarantined".format(**ingest)),
        ("reward model", f"{estimate(reward['accuracy'])} of held-out pairs (judge {estimate(judge['accuracy'])})"),
        ("win rate over SFT", estimate(measures.get("win_rate_over_sft")) + " by the judge"),
    ]
    if "true_win_rate_over_sft" in measures:
        rows.append(("", estimate(measures["true_win_rate_over_sft"]) + " by the simulated truth"))
    if evaluation["champion_version"]:
        over = f"{estimate(measures.get('win_rate_over_champion'))} over version {evaluation['champion_version']}"
        rows.append(("over the champion", over))
    rows += [
        ("KL to SFT", estimate(measures.get("kl_reference")) + " nats per answer"),
        ("gate", evaluation["gate"] + failed_rows(evaluation)),
        ("registry", f"{services_name(registered)} version {version}, {alias}"),
        ("report", shown(report)),
        ("versions", shown(models)),
        ("MLflow", services.tracking_uri),
        ("artifacts", evaluation_uri),
    ]
    console.print()
    console.print(table("Result", rows), highlight=False)


def shown(path: Path) -> str:
    """A path from the current folder where it is below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def show_watch(console: Console, storage: Storage, result: Result, report: Path) -> None:
    """What the watch says; a copy of its report is kept beside the run's log."""
    said = result.events[WATCH]["outputs"]
    storage.download_file(join(said["drift_uri"], "report.html"), report)
    rows = [
        ("decision", said["decision"]),
        ("reason", said["reason"]),
        ("report", shown(report)),
        ("artifacts", said["drift_uri"]),
    ]
    console.print()
    console.print(table("Watch", rows), highlight=False)


def made_by(storage: Storage, evaluation: Mapping[str, Any]) -> str:
    """What fine-tuned the registered policy; of two, also why it was chosen."""
    names = {stage: method for method, stages in METHODS.items() if len(stages) == 1 for stage in stages}
    marker = storage.get_json(join(evaluation["candidate_uri"], MARKER))
    if not evaluation["choice"]:
        return names[marker["stage"]]
    chosen, other = evaluation["choice"]["candidates"]
    broken = (
        f"; {names[other['stage']]} breaks {', '.join(other['broken'])}" if len(other["broken"]) > len(chosen["broken"]) else ""
    )
    return (
        f"{names[chosen['stage']]}: judge score {estimate(chosen['judge_score'])}, and {estimate(other['judge_score'])} of "
        f"{names[other['stage']]}, on {evaluation['choice']['prompts']} other prompts{broken}"
    )


def services_name(registered: Mapping[str, Any]) -> str:
    return str(registered["summary"].get("policy_name", "rankloop-policy"))


def failed_rows(evaluation: Mapping[str, Any]) -> str:
    failed = [row["sentence"] for row in evaluation["gate_table"] if row["verdict"] == "fail"]
    return ": " + "; ".join(failed) if failed else ""


def ingest_report(storage: Storage, root: str, snapshot_uri: str) -> dict[str, int]:
    """Counts of the newest ingest of this snapshot. A reused ingest says nothing itself, but its report is on S3."""
    found: dict[str, int] = dict.fromkeys(("read", "accepted", "duplicates", "quarantined"), 0)
    for item in storage.list(join(root, "ingests") + "/"):
        if item.uri.endswith("/" + MARKER):
            report = storage.get_json(item.uri)
            if report["snapshot_uri"] == snapshot_uri:
                found = {key: report[key] for key in found}
    return found
