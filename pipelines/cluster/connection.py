"""A connection to Kubeflow Pipelines: where it is, who asks, and errors that are one line for a person.

    kfp = Connection.of(Address())
    run = kfp.ask("run abc", kfp.client.runs.run_service_get_run, "abc")

`kfp.Client` prints links, warns, retries a dead server for 25 s with tracebacks and writes `~/.config/kfp`; here it is used for its
credentials and its generated calls, and does none of that.

The token, the first of these that there is: RANKLOOP_KFP_TOKEN; the file RANKLOOP_KFP_TOKEN_FILE; in a cluster the service
account's projected token, read anew for each call; none, as on a port-forward.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from components.services.exits import DoNotRetry, Retry, StageFailure

HOST_VARIABLE, NAMESPACE_VARIABLE = "RANKLOOP_KFP_HOST", "RANKLOOP_KFP_NAMESPACE"
TOKEN_VARIABLE, TOKEN_FILE_VARIABLE = "RANKLOOP_KFP_TOKEN", "RANKLOOP_KFP_TOKEN_FILE"
CA_VARIABLE, UI_VARIABLE = "RANKLOOP_KFP_CA", "RANKLOOP_KFP_UI"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # in every pod
IN_CLUSTER, PORT_FORWARD = "http://ml-pipeline.kubeflow.svc.cluster.local:8888", "http://localhost:8888"
NAMESPACE = "rankloop"
TIMEOUT = (5, 60)  # seconds to connect, and to wait for a reply
ATTEMPTS, WAIT_SECONDS = 3, 1.0
PAGE = 100
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Address(NamedTuple):
    """Where KFP is; what is empty comes from the environment (RANKLOOP_KFP_HOST, ..._NAMESPACE, ..._CA, ..._UI) or its default."""

    host: str = ""
    namespace: str = ""


class Refused(DoNotRetry):
    """KFP understood the request and refuses it.

    Attributes:
        status: HTTP's code.
    """

    def __init__(self, status: int, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.status = status


class Connection:
    """A `kfp.Client` that says nothing, with its calls made through `ask`.

    Attributes:
        client: its generated calls are `client.runs`, `.recurring_runs`, `.pipelines`, `.pipeline_uploads`, `.experiments`.
        host: of the API.
        ui: of the pages; "" if it is not known.
    """

    def __init__(self, client: Any, host: str, namespace: str, ui: str, token: str) -> None:
        self.client = client
        self.host = host
        self.ui = ui
        self._wanted_namespace = namespace
        self._namespace: str | None = None
        self._token = token

    @classmethod
    def of(cls, address: Address) -> Connection:
        """A connection; nothing is sent yet.

        Raises:
            DoNotRetry: the address or the token is none.
        """
        in_cluster = SERVICE_ACCOUNT.is_file()
        host = address.host or os.environ.get(HOST_VARIABLE, "") or (IN_CLUSTER if in_cluster else PORT_FORWARD)
        host = host.rstrip("/")
        parts = urlsplit(host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DoNotRetry(
                f"{host!r} is no address of KFP", f"give it as https://HOST[/pipeline], with --host or {HOST_VARIABLE}"
            )
        token, credentials = _token()
        if token and parts.scheme == "http" and parts.hostname not in _LOCAL:
            raise DoNotRetry(f"the token would travel to {host} in clear text", "use https, or a port-forward to localhost")
        ca = os.environ.get(CA_VARIABLE, "")
        if ca and not Path(ca).is_file():
            raise DoNotRetry(f"{CA_VARIABLE} = {ca!r}: no such file", "give the path of a PEM file of certificates")
        namespace = address.namespace or os.environ.get(NAMESPACE_VARIABLE, "")
        if not namespace and in_cluster:
            namespace = SERVICE_ACCOUNT.read_text(encoding="utf-8").strip()
        ui = os.environ.get(UI_VARIABLE, "").rstrip("/")
        return cls(_quiet_client(host, token, credentials, ca), host, namespace or NAMESPACE, ui, token)

    @property
    def namespace(self) -> str:
        """The namespace to name in calls; "" where KFP serves a single user, which refuses any."""
        if self._namespace is None:
            reply = self.ask("its health", self.client.healthzs.healthz_service_get_healthz)
            self._namespace = self._wanted_namespace if reply.multi_user else ""
        return self._namespace

    def page_of(self, run_id: str) -> str:
        """Where a person sees the run; KFP's API and pages have the same address unless RANKLOOP_KFP_UI says otherwise."""
        return f"{self.ui or self.host}/#/runs/details/{run_id}"

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any, again: bool = True, **options: Any) -> Any:
        """The reply to a call.

        Args:
            what: what is asked for, as a message names it.
            again: whether it may be sent again after a reply of the server's that it failed (5xx, 429); not for what creates.

        Raises:
            Refused: 4xx.
            Retry: the server cannot be reached, or fails.
            DoNotRetry: TLS fails, or what answers is not KFP.
        """
        for attempt in range(ATTEMPTS if again else 1):
            if attempt:
                time.sleep(WAIT_SECONDS * attempt)
            try:
                with self.errors(what):
                    return call(*arguments, _request_timeout=TIMEOUT, **options)
            except Unreachable:
                raise
            except Retry as error:
                failure = error
        raise failure

    def made_once(self, what: str, find: Callable[[], str], create: Callable[..., Any], body: Any, field: str) -> str:
        """The id of a thing that has a name of its own: the one that is there, or a new one; of two who make it, one does.

        Args:
            find: gives the id of the one that is there, or "".
            create: KFP's call, which takes `body` and gives a thing with its id in `field`.
        """
        found = find()
        if found:
            return found
        try:
            return str(getattr(self.ask(what, create, body, again=False), field))
        except Refused as error:
            found = find() if error.status in (400, 409) else ""
            if not found:
                raise
            return found

    def pages(self, what: str, call: Callable[..., Any], field: str, **options: Any) -> Iterator[Any]:
        """Every item of a listing, page by page."""
        token = ""
        while True:
            reply = self.ask(what, call, page_size=PAGE, page_token=token, **options)
            yield from getattr(reply, field) or ()
            following = reply.next_page_token or ""
            if not following:
                return
            if following == token:
                raise Retry(f"KFP at {self.host} gives the same page of {what} again and again", "see the log of ml-pipeline")
            token = following

    @contextlib.contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Turns what `kfp.Client` raises into a failure with a message of one line."""
        import kfp_server_api
        import urllib3

        try:
            yield
        except StageFailure:
            raise
        except kfp_server_api.ApiException as error:
            if not error.status:
                raise self._tls(str(error.reason)) from error
            raise self._refusal(what, int(error.status), error) from error
        except urllib3.exceptions.MaxRetryError as error:
            if isinstance(error.reason, urllib3.exceptions.SSLError):
                raise self._tls(str(error.reason)) from error
            raise self._unreachable(error.reason or error) from error
        except urllib3.exceptions.SSLError as error:
            raise self._tls(str(error)) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise DoNotRetry(
                f"what answers at {self.host} is not KFP's API: its reply about {what} cannot be read ({_line(str(error))})",
                "a page to log in? give a token; a path missing? KFP behind Kubeflow's gateway is at https://HOST/pipeline",
            ) from error

    def _tls(self, reason: str) -> DoNotRetry:
        return DoNotRetry(
            f"no trusted connection to KFP at {self.host}: {_line(reason)}", f"name its authority's PEM in {CA_VARIABLE}"
        )

    def _unreachable(self, error: BaseException) -> Retry:
        remedy = f"is it running, is the port-forward up, is {HOST_VARIABLE} right?"
        return Unreachable(f"KFP at {self.host} cannot be reached: {_line(str(error))}", remedy)

    def _refusal(self, what: str, status: int, error: Any) -> StageFailure:
        said = _said(error.body)
        if status == 401:
            return Refused(401, f"KFP at {self.host} does not know who asks (401): {self._token_fault()}", TOKEN_REMEDY)
        if status == 403:
            who = "" if self._token else " (no token was sent)" if not _projected().is_file() else " (the service account's token)"
            return Refused(
                403, f"KFP at {self.host} refuses {what}{who} (403): {said}", "ask for the role rankloop-client in that namespace"
            )
        if status == 404:
            return Refused(404, f"KFP at {self.host} has no {what} (404): {said}", "check the name and the namespace")
        if status >= 500 or status in (408, 429):
            return Retry(f"KFP at {self.host} failed on {what} ({status}): {said}", "run again; see the log of ml-pipeline")
        return Refused(status, f"KFP at {self.host} refuses {what} ({status}): {said}")

    def _token_fault(self) -> str:
        if not self._token:
            return "no token was sent" if not _projected().is_file() else "the service account's token is refused"
        ended = expiry_of(self._token)
        if ended is not None and ended <= time.time():
            return f"the token expired at {datetime.fromtimestamp(ended, UTC):%Y-%m-%d %H:%M} UTC"
        return "the token is wrong, or has expired"


class Unreachable(Retry):
    """Nothing answers; the client's own attempts to connect are over."""


TOKEN_REMEDY = (
    f"put a fresh token into {TOKEN_VARIABLE} or the file {TOKEN_FILE_VARIABLE}; in a cluster label the pod access-ml-pipeline"
)


def expiry_of(token: str) -> float | None:
    """When a JSON web token expires, in seconds since 1970; None if it is none or does not say. Nothing is verified."""
    try:
        body = token.split(".")[1]
        return float(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["exp"])
    except (IndexError, ValueError, KeyError, TypeError):
        return None


def _projected() -> Path:
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH

    return Path(os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)


def _token() -> tuple[str, Any]:
    """A token from the environment or its file, or the credentials that read the service account's."""
    token, file = os.environ.get(TOKEN_VARIABLE, ""), os.environ.get(TOKEN_FILE_VARIABLE, "")
    if not token and file:
        try:
            token = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise DoNotRetry(f"{TOKEN_FILE_VARIABLE} = {file!r} cannot be read: {_line(str(error))}") from error
    token = token.strip()
    if any(character.isspace() or not character.isprintable() or ord(character) > 126 for character in token):
        raise DoNotRetry("the token for KFP is none: it has characters that no token has", TOKEN_REMEDY)
    if token:
        return token, None
    if file:
        raise DoNotRetry(f"{TOKEN_FILE_VARIABLE} = {file!r} is empty", TOKEN_REMEDY)
    if not _projected().is_file():
        return "", None
    from kfp.client import ServiceAccountTokenVolumeCredentials

    return "", ServiceAccountTokenVolumeCredentials(str(_projected()))


def _quiet_client(host: str, token: str, credentials: Any, ca: str) -> Any:
    from kfp import Client
    from kfp_server_api import V2beta1GetHealthzResponse

    class QuietClient(Client):
        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            """Its constructor would ask five times, with a traceback each, and write what it learns to the user's home."""
            return V2beta1GetHealthzResponse(multi_user=False)

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        client = QuietClient(
            host=host, existing_token=token or None, credentials=credentials, ssl_ca_cert=ca or None, namespace="kubeflow"
        )
    rest = client.runs.run_service_get_run.__self__.api_client.rest_client
    rest.request = _only_json(rest.request)
    return client


def _only_json(request: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses a good reply that is no JSON, as a proxy's page to log in: the generated code would make an empty object of it."""

    def asked(*arguments: Any, _preload_content: bool = True, **options: Any) -> Any:
        reply = request(*arguments, _preload_content=_preload_content, **options)
        if _preload_content:
            kind = str(reply.getheader("Content-Type") or "")
            if "json" not in kind:
                raise ValueError(f"it is {kind.partition(';')[0] or 'of no type'}")
        return reply

    return asked


def _said(body: Any) -> str:
    """The server's own message, of a reply that failed."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        found = json.loads(text)
        text = str(found.get("message") or found.get("error_message") or found.get("error") or text)
    except (ValueError, AttributeError):
        pass
    return _line(text) or "it does not say why"


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
