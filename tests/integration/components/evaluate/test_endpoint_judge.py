"""The endpoint judge against a real OpenAI-compatible server (`transformers serve`) with replies kept on a real object store, and
against a server written here that fails as real ones do."""

from __future__ import annotations

import json
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from components.evaluate import stage
from components.evaluate.judges.endpoint import judge_by_endpoint, request_of
from components.evaluate.judges.humans import Labels
from components.evaluate.judges.judge import RECORDS, judge_all, position_bias
from components.evaluate.judges.pairs import SAME_TEXT, Intervals, Judgement, Pair, pairs_of
from components.evaluate.judges.report import judge_sections
from components.evaluate.measures import Answer
from components.rlhf.models import save_model
from components.rlhf.scratch_model import new_model, train_tokenizer
from components.rlhf.statistics import Estimate, as_json, wilson_interval
from components.services.exits import DoNotRetry, Retry
from components.services.launch import Context
from pipelines.local_services import free_ports

PAIRS = [Pair(i, "sft", f"What is {i} and {i}?", f"It is {2 * i}.", "I do not know.", -1) for i in range(4)]


def endpoint(url: str, **changes: Any) -> stage.Config:
    values = {"judges": ["endpoint"], "gate_judge": "endpoint", "endpoint_url": url, "endpoint_model": "judge", **changes}
    return stage.Config(**values)


def context_of(config: stage.Config, home: Path) -> Context:
    scratch = home / uuid.uuid4().hex
    scratch.mkdir()
    inputs = stage.Inputs(snapshot_uri="s", candidate_uri="c", sft_uri="f", reward_model_uri="r", judge_model_uri="j")
    return Context("evaluate", config, inputs, scratch)


# -- a real server -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def always_a(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and name of a small Llama that was taught to reply A, whatever it reads, behind `transformers serve`."""
    from transformers.cli.serve import Serve

    folder = tmp_path_factory.mktemp("judge")
    texts = [request_of(PAIRS[0], True, endpoint("http://x"))["messages"][0]["content"]]
    tokenizer = train_tokenizer(texts, 400, 2048)
    model = new_model(tokenizer, layers=1, hidden=16, heads=2, context_tokens=2048, seed=0)
    teach(model, tokenizer, "A")
    save_model(model, tokenizer, folder)
    (port,) = free_ports(1)
    server = Serve(force_model=str(folder), device="cpu", port=port, host="127.0.0.1", non_blocking=True)
    try:
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.kill_server()


def teach(model: Any, tokenizer: Any, word: str) -> None:
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    asked = [request_of(pair, True, endpoint("http://x"))["messages"] for pair in PAIRS[:2]]
    rows = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in asked]
    said = [*tokenizer.encode(word), tokenizer.eos_token_id]
    for step in range(60):
        ids = torch.tensor([[*rows[step % 2], *said]])
        labels = torch.full_like(ids, -100)
        labels[0, -len(said) :] = ids[0, -len(said) :]
        optimiser.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimiser.step()


def test_a_real_server_that_always_says_a_is_found_out_and_asked_once(
    services: Any, always_a: tuple[str, str], tmp_path: Path
) -> None:
    url, name = always_a
    config = endpoint(url, endpoint_model=name, endpoint_reply_tokens=4, endpoint_parallel=2)
    judgements, facts = judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
    assert [each.outcome for each in judgements] == [0.5] * 4, "each verdict changed with the order: ties"
    assert [each.details for each in judgements] == [{"ours_first": 1.0, "ours_second": 0.0}] * 4
    bias = position_bias(judgements)
    assert bias["order_changes_verdict_endpoint"].value == bias["first_shown_preferred_endpoint"].value == 1.0
    assert (facts["requests"], facts["kept_replies"], facts["budget_reached"]) == (8, 0, False)
    assert facts["tokens"] > 8 * 100, "the server's own count"

    again, facts = judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
    assert again == judgements
    assert facts == {"requests": 0, "tokens": 0, "kept_replies": 8, "budget_reached": False}


def test_a_real_server_refuses_another_path_in_one_line(services: Any, always_a: tuple[str, str], tmp_path: Path) -> None:
    url, name = always_a
    config = endpoint(url.removesuffix("/v1") + "/v2", endpoint_model=name)
    with pytest.raises(DoNotRetry, match=r"the judge .* at http://127\.0\.0\.1:\d+/v2 refuses with status 404"):
        judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))


# -- a server that fails, written here -----------------------------------------------------------------------------------


class Asked:
    """What came in: times, bodies, keys."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


@contextmanager
def failing_server(
    answer: Callable[[int, dict[str, Any]], tuple[int, dict[str, str], bytes] | None],
) -> Iterator[tuple[str, Asked]]:
    """A small HTTP server, no model: `answer(number of the request, body)` gives status, headers and body; None cuts the line."""
    asked, lock = Asked(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked.times)
                asked.times.append(time.monotonic())
                asked.bodies.append(body)
                asked.keys.append(self.headers["Authorization"])
            reply = answer(number, body)
            if reply is None:
                self.connection.close()
                return
            status, headers, data = reply
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # the client did not wait
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def said(text: str | None, tokens: int | None = 10) -> tuple[int, dict[str, str], bytes]:
    usage = {"usage": {"prompt_tokens": tokens - 1, "completion_tokens": 1, "total_tokens": tokens}} if tokens else {}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], **usage}).encode()


def honest(body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """Prefers the answer that says a number, wherever it stands."""
    text = body["messages"][0]["content"]
    return said("A" if text.index("It is") < text.index("I do not know.") else "B")


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "1"}, b"{}"), (500, {}, b"oops"), None], ids=["429", "500", "cut"])
def test_a_fault_is_tried_again(services: Any, fault: Any, tmp_path: Path) -> None:
    with failing_server(lambda number, body: fault if number == 0 else honest(body)) as (url, asked):
        config = endpoint(url, endpoint_parallel=1)
        judgements, facts = judge_by_endpoint(PAIRS[:1], config, context_of(config, tmp_path))
    assert [each.outcome for each in judgements] == [1.0]
    assert facts["requests"] == len(asked.times) == 3, "the failed one counts"
    if fault and fault[0] == 429:
        assert asked.times[1] - asked.times[0] >= 0.95, "as long as the server asked for"


def test_a_slow_server_is_given_up_and_what_it_had_said_is_kept(services: Any, tmp_path: Path) -> None:
    def slow(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if number == 1:
            time.sleep(1.5)
        return honest(body)

    with failing_server(slow) as (url, asked):
        config = endpoint(url, endpoint_parallel=1, endpoint_retries=0, endpoint_timeout_seconds=0.5)
        with pytest.raises(Retry, match=r"cannot be reached after 0 retries: Request timed out"):
            judge_by_endpoint(PAIRS[:1], config, context_of(config, tmp_path))
        judgements, facts = judge_by_endpoint(PAIRS[:1], config, context_of(config, tmp_path))
    assert [each.outcome for each in judgements] == [1.0]
    assert (facts["requests"], facts["kept_replies"], len(asked.times)) == (1, 1, 3)


def test_a_stop_does_not_wait_for_the_server(services: Any, tmp_path: Path) -> None:
    def stop(number: int, frame: Any) -> None:
        raise Retry("asked to stop")  # as the launcher does

    before = signal.signal(signal.SIGALRM, stop)
    answered = threading.Event()
    try:
        with failing_server(lambda number, body: None if answered.wait(20) else honest(body)) as (url, asked):
            config = endpoint(url)
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 1.5)
            with pytest.raises(Retry, match="asked to stop"):
                judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
            assert time.monotonic() - started < 10
            answered.set()
            assert asked.times
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_server_that_is_not_there_is_for_a_retry(services: Any, tmp_path: Path) -> None:
    config = endpoint(f"http://127.0.0.1:{free_ports(1)[0]}/v1", endpoint_retries=1)
    with pytest.raises(Retry, match="cannot be reached after 1 retries"):
        judge_by_endpoint(PAIRS[:1], config, context_of(config, tmp_path))


def test_the_key_is_sent_from_the_environment_and_a_wrong_one_ends_it(
    services: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing_server(lambda number, body: (401, {}, b'{"error": {"message": "no such key"}}')) as (url, asked):
        config = endpoint(url, endpoint_key_variable="TEST_JUDGE_KEY")
        context = context_of(config, tmp_path)
        with pytest.raises(DoNotRetry, match=r"variable TEST_JUDGE_KEY.*is not set"):
            judge_by_endpoint(PAIRS, config, context)
        assert not asked.times
        monkeypatch.setenv("TEST_JUDGE_KEY", "sesame")
        with pytest.raises(DoNotRetry, match=r"refuses with status 401.*no such key") as caught:
            judge_by_endpoint(PAIRS, config, context)
    assert "TEST_JUDGE_KEY" in caught.value.remedy
    assert "sesame" not in str(caught.value)
    assert "sesame" not in json.dumps(context.config)
    assert asked.keys[0] == "Bearer sesame"


def test_something_else_than_a_completion_ends_it(services: Any, tmp_path: Path) -> None:
    for data in (b"<html>hello</html>", b'{"choices": []}', b"[1]", b'{"choices": [{"message": {"content": 3}}]}'):
        with failing_server(lambda number, body, data=data: (200, {}, data)) as (url, _):
            config = endpoint(url)
            with pytest.raises(DoNotRetry, match="replies with something else than a chat completion"):
                judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))


def test_words_that_are_no_verdict_and_refused_pairs_are_silence(services: Any, tmp_path: Path) -> None:
    def reply(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        text = body["messages"][0]["content"]
        if "What is 0" in text:
            return said("A, because it is longer")
        if "What is 1" in text:
            return 400, {}, b'{"error": {"message": "filtered"}}'
        return said(None if text.index("It is") < text.index("I do") else "\ud800") if "What is 2" in text else honest(body)

    with failing_server(reply) as (url, _):
        config = endpoint(url)
        judgements, facts = judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
    assert [(each.outcome, each.asked) for each in judgements] == [(None, True), (None, True), (None, True), (1.0, True)]
    assert judgements[0].details["replies"] == ["A, because it is longer"] * 2
    assert "filtered" in judgements[1].details["replies"][0]
    assert facts["requests"] == 8


@pytest.mark.parametrize("budget", [{"endpoint_max_requests": 5}, {"endpoint_max_tokens": 40}])
def test_a_budget_ends_the_asking_and_more_of_it_goes_on(services: Any, budget: dict[str, int], tmp_path: Path) -> None:
    with failing_server(lambda number, body: honest(body)) as (url, asked):
        config = endpoint(url, endpoint_parallel=1, **budget)
        judgements, facts = judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
        assert [each.outcome for each in judgements] == [1.0, 1.0, None, None], "the first ones, in the order of the prompts"
        assert not any(each.asked for each in judgements[2:])
        assert (facts["requests"], facts["tokens"], facts["budget_reached"]) == (4, 40, True)
        config = endpoint(url)
        judgements, facts = judge_by_endpoint(PAIRS, config, context_of(config, tmp_path))
    assert [each.outcome for each in judgements] == [1.0] * 4
    assert (facts["requests"], facts["kept_replies"], len(asked.times)) == (4, 4, 8)


def test_equal_texts_and_a_server_that_counts_no_tokens(services: Any, tmp_path: Path) -> None:
    same = PAIRS[1]._replace(theirs=PAIRS[1].ours)
    with failing_server(lambda number, body: said("tie.", None)) as (url, asked):
        config = endpoint(url)
        judgements, facts = judge_by_endpoint([PAIRS[0], same], config, context_of(config, tmp_path))
    assert [each.outcome for each in judgements] == [0.5, 0.5]
    assert len(asked.bodies) == 2, "equal texts tie without being asked"
    assert facts["tokens"] == sum(len(body["messages"][0]["content"].encode()) + 4 for body in asked.bodies)
    assert asked.bodies[0]["temperature"] == 0


def test_the_win_rates_of_the_endpoint_are_read_by_the_gate_and_shown(services: Any, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": pair.question}] for pair in PAIRS]
    answers = {
        "candidate": [Answer(pair.ours, 5, True, {}) for pair in PAIRS],
        "sft": [Answer(pair.theirs, 6, True, {}) for pair in PAIRS],
        "champion": [Answer(pair.ours if pair.row else pair.theirs, 5, True, {}) for pair in PAIRS],
    }
    by_reward_model = {f"win_rate_over_{over}": as_json(Estimate(0.6, 0.5, 0.7)) for over in ("sft", "champion")}
    by_reward_model |= {f"{name}_length_controlled": rate for name, rate in by_reward_model.items()}
    with failing_server(lambda number, body: honest(body)) as (url, asked):
        config = endpoint(url, judges=["reward_model", "endpoint"])
        context = context_of(config, tmp_path)
        folder = context.scratch / "evaluation"
        intervals = Intervals(0, 100, of_gate=lambda outcomes: wilson_interval(sum(outcomes), len(outcomes)))
        pairs = pairs_of(prompts, answers)
        scored = [Judgement(0.0, True, {})] * len(pairs)
        measures, facts, judgements = judge_all(
            config, context, folder, "s3://b/e", pairs, scored, Labels({}, 0), by_reward_model, intervals
        )
        assert [each.outcome for each in judgements if each is not SAME_TEXT] == [1.0] * 5, "the gate's judge's, not the scores'"
    assert measures["win_rate_over_sft"]["value"] == 1.0
    assert measures["win_rate_over_champion"]["value"] == 5 / 8, "one won, three of equal text"
    assert measures["win_rate_over_sft_reward_model"]["value"] == 0.6
    assert 0 < measures["win_rate_over_sft_length_controlled"]["low"] <= measures["win_rate_over_sft_length_controlled"]["value"]
    assert measures["order_changes_verdict_endpoint"]["value"] == 0.0
    assert facts["endpoint"]["over"]["champion"] == {"pairs": 4, "judged": 4, "silent": 0}
    assert len(asked.times) == 8, "the same pair over SFT and champion is asked once"
    lines = [json.loads(line) for line in (folder / RECORDS).read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["over"], line["outcome"]) for line in lines[:3]] == [
        (0, "sft", 1.0),
        (0, "champion", 1.0),
        (1, "sft", 1.0),
    ]
    (section,) = judge_sections({"config": context.config, "measures": measures, "judges": facts})
    rates = [row for row in section.tables[0].rows if row[:3] == ["SFT", "endpoint", True]]
    assert rates[0][3] == "1 (0.51 to 1)"
