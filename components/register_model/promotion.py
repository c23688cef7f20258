"""Promotion as a transaction: aliases move only while the champion is the one that the challenger was compared with.

MLflow's alias is last-writer-wins and keeps no history; several aliases of two models are several requests. What makes up for that:

1. A lock on S3 (`lease`), so that one process at a time works on the registry.
2. The audit as a journal (`audit`): the whole change is written down before the first alias moves. Of processes that saw the same
   last record one can write the next, so the decision is atomic whatever the lock does; a process that dies on the way is finished
   by the next (`settle`).
3. The lease is renewed by a conditional write right before each alias moves. What is left: a process that is paused for longer than
   the lease between that write and MLflow's doing, inside one request, overwrites one alias. It notices when it goes on, and if it
   dies first, the next process does: the log knows that the change was finished by another (`strays`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from components.register_model.aliases import (
    CHALLENGER,
    CHAMPION,
    OWNED,
    PREVIOUS,
    Aliases,
    applied,
    companion_of,
    differences,
    exchange,
    strays,
)
from components.register_model.audit import Audit, Overtaken, Record, anchor_of, moment
from components.register_model.lease import Lease, LeaseLost, lock
from components.services.exits import DoNotRetry
from components.services.storage import Storage, join
from components.services.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

ANCHOR_TAG = "rankloop.audit"
ROLLED_BACK_TAG = "rolled_back_at"

_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """What is to be done.

    Fields:
        action: "nominate", "promote", "rollback" or "restore".
        moves: (model, alias, version), in this order; "" takes the alias off.
        reason: a person's, or "".
        evidence: what it rests on, for the audit.
        tags: {version of the policy: {tag: value}}; an empty value takes the tag off.
    """

    action: str
    moves: Sequence[tuple[str, str, str]]
    reason: str = ""
    evidence: Mapping[str, Any] = {}
    tags: Mapping[str, Mapping[str, str]] = {}


class Registry:
    """The versions of one policy, with the reward models that belong to them.

    Args:
        uri: S3 folder of the lock and the audit.
        policy: name of the registered policy.
        lock_seconds: length of a lease.
        by: who acts, as `audit.acting` gives it.
    """

    def __init__(
        self, client: MlflowClient, storage: Storage, uri: str, policy: str, lock_seconds: float, by: Mapping[str, str]
    ) -> None:
        self.client = client
        self.policy = policy
        self.uri = uri
        self.audit = Audit(storage, join(uri, "audit"))
        self.storage, self._seconds, self._by = storage, lock_seconds, dict(by)
        self._session = uuid.uuid4().hex

    @contextmanager
    def lock(self) -> Iterator[Lease]:
        by = "{command} of {user} on {host}".format(**self._by)
        with lock(self.storage, join(self.uri, "lock.json"), self._seconds, by) as lease:
            yield lease

    def aliases(self, models: Sequence[str]) -> Aliases:
        """The aliases of ours that MLflow has now; none for a model that is not registered."""
        found: Aliases = {}
        with mlflow_errors():
            for model in models:
                registered = _asked(partial(self.client.get_registered_model, model))
                now = registered.aliases if registered else {}
                found[model] = {alias: str(now[alias]) for alias in OWNED if alias in now}
        return found

    # -- what a caller wants -------------------------------------------------------------------------------------------

    def nominate(self, version: str, companion: tuple[str, str], evidence: Mapping[str, Any]) -> Record | None:
        """Moves `challenger` to a version and its reward model (`companion`: name and version)."""
        moves = [(model, CHALLENGER, to) for model, to in (companion, (self.policy, version))]
        return self.change([companion[0]], lambda _: Change("nominate", moves, evidence=evidence))

    def promote(
        self,
        version: str,
        companion: tuple[str, str] | None,
        compared_with: str,
        evidence: Mapping[str, Any],
        reason: str = "",
        by_hand: bool = False,
    ) -> Record | None:
        """Moves `champion` to `version` and `previous_champion` to the old one; None if it is the champion already.

        The companion's aliases move first: whoever reads the policy's champion then finds its reward model in place.

        Args:
            companion: name and version of the reward model that moves with the policy; None: there is none.
            compared_with: the champion's version when it was decided that this one is better, "" if there was none.
            evidence: what it rests on, for the audit.
            reason: a person's.
            by_hand: a person decides, who may promote what was rolled back.

        Raises:
            DoNotRetry: the champion has changed since the evaluation, or the version was rolled back; nothing was moved.
        """

        def plan(aliases: Aliases) -> Change | None:
            now = aliases[self.policy].get(CHAMPION, "")
            if now == version:
                return None
            if now != compared_with:
                raise DoNotRetry(
                    f"the champion of {self.policy} is version {now or 'none'}, but the evaluation compared with "
                    f"{compared_with or 'none'}: version {version} stays {CHALLENGER}",
                    "run the pipeline again: it compares with the new champion",
                )
            if not by_hand and self.tags(version).get(ROLLED_BACK_TAG):
                raise DoNotRetry(
                    f"version {version} of {self.policy} was rolled back by a person",
                    f"promote it by hand: rankloop models promote {version} --force --reason …",
                )
            moves = exchange(aliases, [*([companion] if companion else []), (self.policy, version)])
            tags = {version: {"promoted_at": moment(), "promoted_over": now, ROLLED_BACK_TAG: ""}}
            return Change("promote", moves, reason, evidence, tags)

        return self.change([companion[0]] if companion else [], plan)

    def rollback(self, reason: str) -> Record | None:
        """Moves `champion` back to `previous_champion`, with its reward model; the two change places.

        Raises:
            DoNotRetry: there is no previous champion.
        """
        models = self._companion_models()

        def plan(aliases: Aliases) -> Change:
            now, before = (aliases[self.policy].get(alias, "") for alias in (CHAMPION, PREVIOUS))
            if not before or before == now:
                raise DoNotRetry(
                    f"{self.policy} has no {PREVIOUS} to go back to; the champion is version {now or 'none'}",
                    "name a version: rankloop models promote VERSION --reason …",
                )
            pair = [*filter(None, [companion_of(self.tags(before))]), (self.policy, before)]
            tags = {now: {ROLLED_BACK_TAG: moment()}, before: {ROLLED_BACK_TAG: ""}}
            return Change(
                "rollback", exchange(aliases, pair), reason, {"from": now, "to": before}, {k: v for k, v in tags.items() if k}
            )

        return self.change(models, plan)

    def _companion_models(self) -> list[str]:
        before = self.aliases([self.policy])[self.policy].get(PREVIOUS, "")
        companion = companion_of(self.tags(before)) if before else None
        return [companion[0]] if companion else []

    def settle(self) -> Aliases:
        """Finishes what a process that died had begun, and notes what something else has moved; the aliases afterwards."""
        with self.lock() as lease:
            return self._settle(lease, [])[0]

    def tags(self, version: str) -> dict[str, str]:
        """Raises `DoNotRetry` if there is no such version."""
        with mlflow_errors():
            return dict(self.client.get_model_version(self.policy, version).tags)

    # -- how it is done ------------------------------------------------------------------------------------------------

    def change(self, models: Sequence[str], plan: Callable[[Aliases], Change | None]) -> Record | None:
        """Carries out what `plan` makes of the aliases as they are; the record of its beginning, None if nothing is to be done.

        Args:
            models: names, besides the policy, whose aliases the plan looks at.
            plan: may raise to refuse; nothing has been moved then.
        """
        begun: Record | None = None
        try:
            with self.lock() as lease:
                aliases, head = self._settle(lease, models)
                wanted = plan(aliases)
                if wanted is None or all(aliases.get(model, {}).get(alias, "") == to for model, alias, to in wanted.moves):
                    return None
                begun = self._begin(head, aliases, wanted)
                if self._carry_out(begun, lease).content["event"] == "abandoned":
                    raise DoNotRetry(f"a version that was to get an alias has been deleted: {wanted.moves}", "register it again")
        except (LeaseLost, Overtaken):
            if begun is None:
                raise
            _log.warning("paused for longer than the lease while aliases moved: looking again")
            self.settle()
        return begun

    def _settle(self, lease: Lease, models: Sequence[str]) -> tuple[Aliases, Record | None]:
        head = self.audit.head()
        if head and head.content["event"] == "begun":
            _log.warning("finishing the %s that record %d began", head.content["action"], head.number)
            head = self._carry_out(head, lease)
        expected: Aliases = head.content["aliases"] if head else {}
        found = self.aliases(sorted({self.policy, *models, *expected}))
        moved = differences(expected, found)
        late = strays(self.audit.records(), moved, time.time()) if moved else []
        if others := [move for move in moved if move not in late]:
            _log.warning("not moved by rankloop, and noted in the audit: %s", others)
            seen = applied(expected, [(model, alias, to) for model, alias, _, to in others])
            head = self.audit.append(head, self._record("observed", "observe", others, seen))
        if late:
            _log.warning("putting back what a late request of another process moved: %s", late)
            head = self._begin(head, found, Change("restore", [(model, alias, before) for model, alias, before, _ in late]))
            head = self._carry_out(head, lease)
            found = applied(found, [(model, alias, before) for model, alias, before, _ in late])
        return found, head

    def _begin(self, head: Record | None, aliases: Aliases, wanted: Change) -> Record:
        moves = [(model, alias, aliases.get(model, {}).get(alias, ""), to) for model, alias, to in wanted.moves]
        more = {"reason": wanted.reason, "evidence": dict(wanted.evidence), "tags": {k: dict(v) for k, v in wanted.tags.items()}}
        after = applied(aliases, wanted.moves)
        return self.audit.append(head, self._record("begun", wanted.action, moves, after) | more)

    def _record(self, event: str, action: str, moves: Sequence[tuple[str, str, str, str]], aliases: Aliases) -> dict[str, Any]:
        return {
            "event": event,
            "action": action,
            "model": self.policy,
            "session": self._session,
            "by": self._by,
            "moves": [dict(zip(("model", "alias", "from", "to"), move, strict=True)) for move in moves],
            "aliases": aliases,
        }

    def _carry_out(self, begun: Record, lease: Lease) -> Record:
        """Makes the moves of a record, whoever began it, as far as they are not made, and writes the record of its end."""
        content = begun.content
        aliases: Aliases = content["aliases"]
        event = "done"
        with mlflow_errors():
            found = self.aliases(list(aliases))
            for move in content["moves"]:
                if found.get(move["model"], {}).get(move["alias"], "") != move["to"]:
                    lease.renew()
                    if not self._move(move["model"], move["alias"], move["to"]):
                        event, aliases = "abandoned", self.aliases(list(aliases))
                        break
            for version, tags in content.get("tags", {}).items() if event == "done" else ():
                for key, value in tags.items():
                    self._tag(version, key, value)
        end = self._record(event, content["action"], [], aliases) | {"of": begun.number}
        done = self.audit.append(begun, end)
        with mlflow_errors():
            self.client.set_registered_model_tag(self.policy, ANCHOR_TAG, anchor_of(done))
        return done

    def _move(self, model: str, alias: str, version: str) -> bool:
        """Moves an alias; False if there is no such version any more."""
        if not version:
            self.client.delete_registered_model_alias(model, alias)
            return True
        missing = object()
        return _asked(partial(self.client.set_registered_model_alias, model, alias, version), missing) is not missing

    def _tag(self, version: str, key: str, value: str) -> None:
        if value:
            self.client.set_model_version_tag(self.policy, version, key, value)
        else:
            _asked(partial(self.client.delete_model_version_tag, self.policy, version, key))


def _asked(request: Callable[[], Any], missing: Any = None) -> Any:
    """What MLflow answers, or `missing` if it says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return request()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return missing
