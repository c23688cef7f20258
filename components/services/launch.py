"""Runs one stage: the same way from its KFP wrapper, from `python -m components.<stage>`, and from a test.

A stage is a module `components/<stage>/stage.py` with `Config` and `Inputs` (subclasses of `Settings`), `Outputs` (a NamedTuple)
and `run(config, inputs, context) -> Outputs`. The launcher builds the first two (unknown keys and wrong types are refused before
anything else happens), opens the stage's MLflow run, and turns the way it ends into an exit code:

    0    done
    65   do not retry (`DoNotRetry`); a retry of the same pipeline run ends at once with the same reason
    75   retry (`Retry`, SIGTERM, disk full)
    130  SIGINT

The reason of a failure goes to stderr, to the MLflow run, and to `RANKLOOP_FAILURE_FILE` or Kubernetes' termination log.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from components.services.attempts import wait_before_retry
from components.services.exits import EXIT_DO_NOT_RETRY, EXIT_INTERRUPTED, DoNotRetry, Retry, StageFailure, code_and_message
from components.services.final_failure import FinalFailure
from components.services.progress import Progress
from components.services.run_tree import join_run_tree
from components.services.stop import announce, withdraw
from components.services.storage import MARKER, Storage, join
from components.services.torch_environment import set_caches, set_waiting
from components.services.tracking import Tracker

STORAGE_VARIABLE = "RANKLOOP_STORAGE"  # s3://bucket[/prefix] below which every artifact lies
FAILURE_VARIABLE = "RANKLOOP_FAILURE_FILE"
TERMINATION_LOG = Path("/dev/termination-log")

_log = logging.getLogger(__name__)


class Settings(BaseModel):
    """A stage's configuration or inputs: frozen, typed, unknown keys refused.

    `RUNTIME_ONLY` names fields that change speed and memory, and a step's outcome by rounding at most. They are recorded with the
    result but are no part of its key: what ran out of memory goes on from its checkpoint under others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    RUNTIME_ONLY: ClassVar[frozenset[str]] = frozenset()


SettingsType = TypeVar("SettingsType", bound=Settings)


def parse_settings(kind: type[SettingsType], values: Mapping[str, Any], where: str) -> SettingsType:
    """Builds `kind` from plain values (KFP gives integers in dicts back as floats; whole ones are taken).

    Raises:
        DoNotRetry: an unknown key, a wrong type or a failed cross-check; the message names each `where.key` and its value.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = ".".join([where, *(str(part) for part in item["loc"])])
            if item["type"] == "extra_forbidden":
                lines.append(f"{name}: there is no such key; known keys: {', '.join(sorted(kind.model_fields))}")
            else:
                field = kind.model_fields.get(str(item["loc"][0])) if item["loc"] else None
                shown = f" = {item['input']!r}" if field is None or field.repr else ""  # somebody may have put a secret there
                lines.append(f"{name}{shown}: {item['msg']}")
        raise DoNotRetry("\n".join(lines), f"correct it; `python -m components.{where} --help` lists every key") from error


@cache
def code_digest() -> str:
    """SHA-256 over the source of every module of `components`: a result is only reused by the code that made it."""
    import components

    folder = Path(next(iter(components.__path__)))
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (sorted keys, no white space, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parameter_text(text: str) -> str:
    """A text that KFP's conditions and parameters survive: no quotes, no line breaks, no braces, 1000 characters at most."""
    return "".join(c if c.isprintable() and c not in "\"'\\`{}" else " " for c in text)[:1000]


def key_of(stage: str, config: Settings, inputs: Settings) -> str:
    """Digest of all that decides what a stage makes: its config but for what is `RUNTIME_ONLY`, its inputs, and the code."""
    decisive = config.model_dump(mode="json", exclude=set(config.RUNTIME_ONLY))
    return json_digest([stage, decisive, inputs.model_dump(mode="json"), code_digest()])[:32]


class Context:
    """What the outside world offers to a stage.

    Attributes:
        storage: the object store.
        root: the `s3://` URI below which every artifact lies.
        tracker: the stage's MLflow run.
        progress: what a person sees.
        scratch: an empty local folder, removed at the end.
        key: names what this very work makes (`key_of`, `depends_on`).
    """

    def __init__(self, stage: str, config: Settings, inputs: Settings, scratch: Path) -> None:
        self.stage = stage
        self.config = config.model_dump(mode="json")
        self.inputs = inputs.model_dump(mode="json")
        self.scratch = scratch
        self.root = os.environ.get(STORAGE_VARIABLE, "").rstrip("/")
        if not self.root.startswith("s3://"):
            raise DoNotRetry(
                f"{STORAGE_VARIABLE} = {self.root!r} is not an S3 URI",
                f"set {STORAGE_VARIABLE}=s3://bucket/prefix (and boto3's AWS_* variables); "
                "`rankloop services` starts a local store and prints them",
            )
        self.storage = Storage()
        self.tracker = Tracker(stage)
        self.progress = Progress(stage)
        self.key = key_of(stage, config, inputs)
        self.summary: dict[str, float | str] = {}  # shown in the stage's line and in KFP's metrics
        self.pages: list[Path] = []  # the stage's reports, for KFP; the first one is the main one
        self._stop = threading.Event()
        self._deferred = False

    def depends_on(self, content: Any) -> None:
        """Makes what the inputs only name, as JSON, part of `key`: with another content it is other work, checkpoints and all."""
        self.key = json_digest([self.key, content])[:32]

    def uri(self, kind: str, key: str = "") -> str:
        """`<root>/<kind>/<key>`; `key` defaults to this work's own."""
        return join(self.root, kind, key or self.key)

    def marker(self, role: str, **facts: Any) -> dict[str, Any]:
        """The content of `rankloop.json`: what the artifact is, and everything that it was made from."""
        return {
            "role": role,
            "stage": self.stage,
            "config": self.config,
            "inputs": self.inputs,
            "code": code_digest(),
            "mlflow_run_id": self.tracker.run_id,
            "summary": self.summary,
            **facts,
        }

    def published_before(self, *uris: str) -> bool:
        """Whether this very work is on S3 already, all of it; its summary then stands for this one, and its checkpoints go."""
        if not all(self.storage.is_published(uri) for uri in uris):
            return False
        for uri in uris:
            _log.info("published already: %s", uri)
            self.summary.update(self.storage.get_json(join(uri, MARKER))["summary"])
        for left in self.storage.list(self.uri("checkpoints") + "/"):  # by a kill between publishing and their removal
            self.storage.delete(left.uri)
        return True

    def publish_html(self, path: Path) -> None:
        """A report of the stage: a KFP HTML artifact, and a file of the MLflow run."""
        self.pages.append(path)
        self.tracker.artifact(path)

    # -- stopping ------------------------------------------------------------------------------------------------------

    @contextmanager
    def deferred_stop(self) -> Iterator[threading.Event]:
        """Within it SIGTERM and SIGINT only set the event: the loop sees it, saves a checkpoint and calls `leave`."""
        self._deferred = True
        try:
            yield self._stop
        finally:
            self._deferred = False

    def leave(self, saved: bool = True) -> NoReturn:
        """Ends a stage that was asked to stop.

        Args:
            saved: whether it has just saved its checkpoint; else what it did since the last one is done again.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        done = "; its checkpoint is saved" if saved else ""
        raise Retry(f"{self.stage} was asked to stop (SIGTERM){done}", "run again to continue")

    told_to_stop = False
    """Whether a signal has asked for the end."""
    _interrupted = False

    def on_signal(self, number: int, frame: types.FrameType | None) -> None:
        self.told_to_stop = True
        # Should this exception be lost, or a read begin just after the signal, it is raised again every second.
        if number != signal.SIGALRM:
            self._interrupted = number == signal.SIGINT
        if self._deferred and not self._stop.is_set():
            self._stop.set()
        else:
            signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
            self.leave(saved=False)


def launch(
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Any],
    metrics: Any = None,
    html: Any = None,
    pages: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Runs a stage and returns its outputs; a failure ends the process with its exit code.

    Args:
        stage: name of the package below `components`.
        config: values of the stage's `Config`; missing ones take their defaults.
        inputs: values of the stage's `Inputs`.
        metrics: KFP `Metrics` artifact that receives the stage's summary, or None.
        html: KFP `HTML` artifact that receives the stage's report (the first one), or None.
        pages: KFP `HTML` artifacts for further reports, by the names of their files.
    """
    set_waiting()
    set_caches()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    progress = Progress(stage)
    scratch = Path(tempfile.mkdtemp(prefix=f"rankloop-{stage}-"))
    context: Context | None = None
    started = time.monotonic()
    progress.event("start")
    asked = json_digest([stage, dict(config), dict(inputs), code_digest()])[:32]  # known even where the settings are wrong
    final = FinalFailure(os.environ.get(STORAGE_VARIABLE, ""), stage, asked)
    try:
        final.check()
        module = importlib.import_module(f"components.{stage}.stage")
        parsed_config = parse_settings(module.Config, config, stage)
        parsed_inputs = parse_settings(module.Inputs, inputs, stage)
        context = Context(stage, parsed_config, parsed_inputs, scratch)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, context.on_signal)
        announce()
        join_run_tree(context.storage, context.root)
        context.tracker.start(context.config, context.inputs)
        ready = time.monotonic()
        outputs: tuple[Any, ...] = _run(module, parsed_config, parsed_inputs, context)
        # A name of its own, because a stage's series may have the same names.
        context.tracker.metrics({f"summary/{k}": v for k, v in context.summary.items() if isinstance(v, (int, float))})
        context.tracker.finish("FINISHED")
        if metrics is not None:
            for key, value in context.summary.items():
                metrics.log_metric(key, value)
            # KFP's local cache takes a result without this file for lost and runs the stage again.
            Path(metrics.path).parent.mkdir(parents=True, exist_ok=True)
            Path(metrics.path).write_text(json.dumps(context.summary), encoding="utf-8")
        wanted = dict(pages or {})
        for place, page in enumerate(context.pages):
            artifact = html if place == 0 else wanted.get(page.name)
            if artifact is not None:
                Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(page, artifact.path)
        progress.event(
            "end",
            seconds=time.monotonic() - started,
            import_seconds=ready - started,
            storage_seconds=context.storage.seconds,
            tracking_seconds=context.tracker.seconds,
            summary=context.summary,
            inputs=context.inputs,
            outputs=outputs._asdict() if hasattr(outputs, "_asdict") else {},
        )
        return outputs
    except BaseException as error:
        _fail(stage, error, context, progress, final)
    finally:
        withdraw()
        shutil.rmtree(scratch, ignore_errors=True)


def _run(module: types.ModuleType, config: Settings, inputs: Settings, context: Context) -> Any:
    """Runs the stage: here, or a training in as many processes as its config asks for."""
    from components.services.job import Distributed

    if not isinstance(config, Distributed) or config.processes * config.nodes == 1:
        return module.run(config, inputs, context)
    from components.services.processes import run_together

    return run_together(module, config, inputs, context)


def _fail(stage: str, error: BaseException, context: Context | None, progress: Progress, final: FinalFailure) -> NoReturn:
    """Records why the stage failed wherever somebody may look, and exits."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not cut the clean-up
    if isinstance(error, SystemExit):
        raise error
    code, message = code_and_message(error)
    if code == EXIT_DO_NOT_RETRY:
        final.keep(message)
    if context is not None:
        try:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            context.tracker.finish(status, {"rankloop.failure": message[:5000], "rankloop.exit_code": str(code)})
        except StageFailure as unreachable:
            _log.warning("the failure could not be recorded in MLflow: %s", unreachable.message)
    record = json.dumps({"stage": stage, "exit_code": code, "message": message})
    target = os.environ.get(FAILURE_VARIABLE, "")
    if target:
        Path(target).write_text(record, encoding="utf-8")
    elif TERMINATION_LOG.exists() and os.access(TERMINATION_LOG, os.W_OK):
        TERMINATION_LOG.write_text(record[:4096], encoding="utf-8")
    progress.event("failed", exit_code=code, message=message)
    print(f"{stage} failed: {message}", file=sys.stderr, flush=True)
    if code not in (EXIT_DO_NOT_RETRY, EXIT_INTERRUPTED) and not (context and context.told_to_stop):
        wait_before_retry()
    sys.exit(code)


def main(stage: str) -> None:
    """The command line of `python -m components.<stage>`: one option per field of `Inputs` and `Config`."""
    set_waiting()
    set_caches()
    module = importlib.import_module(f"components.{stage}.stage")
    parser = argparse.ArgumentParser(
        prog=f"python -m components.{stage}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Artifacts go to ${STORAGE_VARIABLE}; AWS_* and MLFLOW_TRACKING_URI name the servers.",
    )
    for kind, title in ((module.Inputs, "inputs"), (module.Config, "config")):
        group = parser.add_argument_group(title)
        for name, field in kind.model_fields.items():
            required = field.is_required()
            default = "" if required else f" (default: {field.get_default(call_default_factory=True)!r})"
            group.add_argument(
                f"--{name.replace('_', '-')}",
                dest=name,
                required=required,
                default=argparse.SUPPRESS,
                metavar=getattr(field.annotation, "__name__", str(field.annotation)).upper(),
                help=((field.description or "") + default).replace("%", "%%"),
            )
    values = vars(parser.parse_args())
    config = {name: from_text(module.Config, name, values[name]) for name in module.Config.model_fields if name in values}
    inputs = {name: from_text(module.Inputs, name, values[name]) for name in module.Inputs.model_fields if name in values}
    outputs = launch(stage, config, inputs)
    print(json.dumps(outputs._asdict() if hasattr(outputs, "_asdict") else list(outputs), indent=2))


def from_text(kind: type[Settings], name: str, text: str) -> Any:
    """An option's text as a plain value: text fields as they are, everything else as JSON where it is JSON."""
    field = kind.model_fields.get(name)
    if field is None or field.annotation is str:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets as deep
        return text
