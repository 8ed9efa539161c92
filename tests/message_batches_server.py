"""A server on this machine that speaks the Message Batches API as the SDK sees it, breaks as told, and keeps its books.

It never deduplicates: what is created twice is done twice and billed twice. Time is the test's clock. Its prices are
written here, apart from the product's, so that a wrong formula can't balance itself.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-loopback"
MODEL = "claude-haiku-4-5"
NANO_INPUT, NANO_OUTPUT = 1000, 5000  # $1 and $5 a million tokens; batches cost half
MAX_BODY_BYTES = 256_000_000
DAY = 86_400.0
SOMEBODY_ELSE = "other-"
_CUSTOM_ID = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")


class TestClock:
    """Seconds that pass only when somebody sleeps."""

    __test__ = False

    def __init__(self, start: float = 1_790_000_000.0) -> None:
        self.time = start

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.time += seconds


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call.

    kind: drop_before (nothing is done), drop_after (all is done, no answer), done_later (no answer; done after
    `seconds`), status (nothing is done), status_after (all is done), malformed, html, truncated (done, the answer is
    spoilt), cut, bad_line, repeated_line, unknown_line, missing_line (results), hidden (a list without the newest
    batch).
    """

    kind: str
    status: int = 500
    error: str = "api_error"
    retry_after: str | None = None
    seconds: float = 0.0
    code: str | None = None


@dataclass(frozen=True)
class Bill:
    """One request that was done. `content` names what was asked, whatever it was called."""

    content: str
    custom_id: str | None
    batch: str | None
    input_tokens: int
    output_tokens: int

    @property
    def is_ours(self) -> bool:
        return not (self.custom_id or "").startswith(SOMEBODY_ELSE)

    @property
    def nano(self) -> int:
        full = self.input_tokens * NANO_INPUT + self.output_tokens * NANO_OUTPUT
        return full if self.batch is None else -(-full // 2)


@dataclass
class StoredBatch:
    id: str
    requests: list[dict[str, Any]]
    created: float
    seconds: float
    visible_from: float
    canceled: float | None = None
    results: list[dict[str, Any]] | None = None
    deleted: bool = False


def content_of(params: Mapping[str, Any]) -> str:
    return sha256(json.dumps(params["messages"]).encode()).hexdigest()


def text_of(params: Mapping[str, Any]) -> str:
    schema = params.get("output_config", {}).get("format", {})
    return str(params.get("system", "")) + str(params["messages"]) + (json.dumps(schema) if schema else "")


def tokens_of(params: Mapping[str, Any]) -> int:
    return len(text_of(params).encode()) // 3 + 12


def good_reply(params: Mapping[str, Any]) -> str:
    """Two questions that no other request has."""
    name = content_of(params)
    voices = re.findall(r"^- (\w+):", params["messages"][0]["content"], re.MULTILINE) or ["developer"]
    questions = [
        {"voice": voice, "question": f"How do I do {' '.join(re.findall('.{4}', name[:40]))} as a {voice}?"}
        for voice in voices
    ]
    return json.dumps({"questions": questions})


@dataclass
class Server:
    """The API and its books.

    Attributes:
        reply: the text of a reply. outcome: what becomes of a request of a batch (succeeded, expired, or the type of an
            error). fault: what goes wrong with a call, by name (count, message, create, retrieve, list, results,
            cancel); `faults` are taken first.
        batch_seconds: how long a batch takes. hidden_seconds: how long a new batch stays out of lists.
    """

    clock: TestClock = field(default_factory=TestClock)
    reply: Callable[[Mapping[str, Any]], str] = good_reply
    outcome: Callable[[Mapping[str, Any]], str] = lambda request: "succeeded"
    fault: Callable[[str], Fault | None] = lambda call: None
    stop_reason: str = "end_turn"
    models: frozenset[str] = frozenset({MODEL})
    batch_seconds: float = 600.0
    hidden_seconds: float = 0.0
    cancel_seconds: float = 5.0
    page: int = 20
    seed: int = 0
    faults: dict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    bills: list[Bill] = field(default_factory=list)
    batches: list[StoredBatch] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    create_bytes: list[int] = field(default_factory=list)
    scheduled: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lock = threading.RLock()
        self.headers: list[Mapping[str, str]] = []

    # running

    def __enter__(self) -> Server:
        server = self

        class Handler(_Handler):
            api = server

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    # what happens behind the calls

    def tick(self) -> None:
        """Do what is due by now."""
        now = self.clock.now()
        for item in sorted(self.scheduled, key=lambda item: item[0]):
            if item[0] <= now:
                self.scheduled.remove(item)
                item[1]()
        for batch in self.batches:
            if batch.results is None and now >= self.end_of(batch):
                self._finish(batch)

    def end_of(self, batch: StoredBatch) -> float:
        ends = [batch.created + batch.seconds, batch.created + DAY]
        return min(ends if batch.canceled is None else [*ends, batch.canceled + self.cancel_seconds])

    def _finish(self, batch: StoredBatch) -> None:
        batch.results = []
        took = self.end_of(batch) - batch.created
        is_canceled = batch.canceled is not None and took < batch.seconds
        is_expired = not is_canceled and batch.seconds > DAY
        for request in batch.requests:
            outcome = self.outcome(request)
            if is_canceled and self.random.random() < 0.5:
                outcome = "canceled"
            elif is_expired and self.random.random() < 0.5:
                outcome = "expired"
            batch.results.append({"custom_id": request["custom_id"], "result": self._result(batch, request, outcome)})
        self.random.shuffle(batch.results)

    def _result(self, batch: StoredBatch, request: Mapping[str, Any], outcome: str) -> dict[str, Any]:
        if outcome in ("canceled", "expired"):
            return {"type": outcome}
        if outcome != "succeeded":
            error = {"type": "error", "error": {"type": outcome, "message": f"a {outcome} for the test"}}
            return {"type": "errored", "error": error}
        message = self.do_message(request["params"], custom_id=request["custom_id"], batch=batch.id)
        return {"type": "succeeded", "message": message}

    def do_message(self, params: Mapping[str, Any], *, custom_id: str | None, batch: str | None) -> dict[str, Any]:
        """Do a request, and bill it."""
        text = self.reply(params)
        output_tokens = min(params["max_tokens"], max(1, len(text) // 3))
        bill = Bill(content_of(params), custom_id, batch, tokens_of(params), output_tokens)
        self.bills.append(bill)
        return {
            "id": f"msg_{len(self.bills)}",
            "type": "message",
            "role": "assistant",
            "model": params["model"],
            "content": [{"type": "text", "text": text}],
            "stop_reason": self.stop_reason,
            "stop_sequence": None,
            "usage": {"input_tokens": bill.input_tokens, "output_tokens": output_tokens, "service_tier": "standard"},
        }

    def do_create(self, requests: list[dict[str, Any]]) -> dict[str, Any]:
        now = self.clock.now()
        batch = StoredBatch(
            f"msgbatch_{len(self.batches):04d}", requests, now, self.batch_seconds, now + self.hidden_seconds
        )
        self.batches.append(batch)
        return self.describe(batch)

    def describe(self, batch: StoredBatch) -> dict[str, Any]:
        kinds = Counter(result["result"]["type"] for result in batch.results or ())
        counts = {kind: kinds[kind] for kind in ("succeeded", "errored", "canceled", "expired")}
        ended = batch.results is not None
        return {
            "id": batch.id,
            "type": "message_batch",
            "processing_status": "ended" if ended else "in_progress" if batch.canceled is None else "canceling",
            "request_counts": {"processing": 0 if ended else len(batch.requests), **counts},
            "created_at": _time(batch.created),
            "expires_at": _time(batch.created + DAY),
            "ended_at": _time(self.end_of(batch)) if ended else None,
            "cancel_initiated_at": None if batch.canceled is None else _time(batch.canceled),
            "archived_at": None,
            "results_url": f"{self.url}/v1/messages/batches/{batch.id}/results" if ended else None,
        }

    # the books

    @property
    def our_bills(self) -> list[Bill]:
        return [bill for bill in self.bills if bill.is_ours]

    @property
    def billed_nano(self) -> int:
        return sum(bill.nano for bill in self.our_bills)

    def paid_twice(self) -> list[str]:
        return [content for content, times in Counter(bill.content for bill in self.our_bills).items() if times > 1]

    def somebody_else_creates(self, count: int) -> None:
        """Another user of the workspace sends a batch of as many requests."""
        number = len(self.batches)
        messages = [[{"role": "user", "content": f"other {number} {index}"}] for index in range(count)]
        self.do_create(
            [
                {
                    "custom_id": f"{SOMEBODY_ELSE}{number}-{index}",
                    "params": {"model": MODEL, "max_tokens": 10, "messages": message},
                }
                for index, message in enumerate(messages)
            ]
        )


class _ApiError(Exception):
    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.message = status, kind, message


class _Handler(BaseHTTPRequestHandler):
    """Routes, faults and bodies. The work itself is the server's."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise every answer takes 40 ms
    api: Server

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve("GET", b"")

    def do_POST(self) -> None:
        self._serve("POST", self.rfile.read(int(self.headers.get("content-length") or 0)))

    def _serve(self, method: str, body: bytes) -> None:
        with self.api.lock:
            call, id = self._route(method)
            self.api.calls[call] += 1
            self.api.headers.append(dict(self.headers.items()))
            self.api.tick()
            queue = self.api.faults[call]
            fault = queue.popleft() if queue else self.api.fault(call)
            kind = fault.kind if fault else ""
            if fault is not None and kind == "drop_before":
                self._drop()
            elif fault is not None and kind == "status":
                self._error(fault.status, fault.error, "as the test wants it", fault)
            elif fault is not None and kind == "done_later":
                due = self.api.clock.now() + fault.seconds
                self.api.scheduled.append((due, lambda: self._do(call, id, body)))  # type: ignore[arg-type]
                self._drop()
            else:
                try:
                    answer = self._do(call, id, body)
                except _ApiError as error:
                    self._error(error.status, error.kind, error.message, None)
                    return
                self._answer(call, answer, fault)

    def _route(self, method: str) -> tuple[str, str]:
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"/v1/messages(?:/(count_tokens|batches)(?:/([^/]+)(?:/(results|cancel))?)?)?", path)
        assert found is not None, path
        if found[1] == "count_tokens":
            return "count", ""
        if found[1] is None:
            return "message", ""
        if found[2] is None:
            return ("create" if method == "POST" else "list"), ""
        return (found[3] or "retrieve"), found[2]

    def _do(self, call: str, id: str, body: bytes) -> Any:
        key = self.headers.get("x-api-key") or (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if key != KEY:
            raise _ApiError(401, "authentication_error", "invalid x-api-key")
        if call in ("count", "message"):
            params = json.loads(body)
            self._validate(params)
            return {"input_tokens": tokens_of(params)} if call == "count" else self._message(params)
        if call == "create":
            return self._create(body)
        if call == "list":
            return self._list()
        batch = next((batch for batch in self.api.batches if batch.id == id and not batch.deleted), None)
        if batch is None:
            raise _ApiError(404, "not_found_error", f"no batch {id}")
        if call == "cancel":
            if batch.results is not None:
                raise _ApiError(400, "invalid_request_error", "the batch has ended")
            batch.canceled = batch.canceled or self.api.clock.now()
        if call == "results":
            assert batch.results is not None
            return list(batch.results)
        return self.api.describe(batch)

    def _message(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self.api.do_message(params, custom_id=None, batch=None)

    def _validate(self, params: Mapping[str, Any]) -> None:
        if params["model"] not in self.api.models:
            raise _ApiError(404, "not_found_error", f"model: {params['model']}")
        if params.get("max_tokens", 1) > 64_000:
            raise _ApiError(400, "invalid_request_error", "max_tokens: greater than 64000")
        if "temperature" in params:
            raise _ApiError(400, "invalid_request_error", "temperature: not supported")

    def _create(self, body: bytes) -> dict[str, Any]:
        self.api.create_bytes.append(len(body))
        if len(body) > MAX_BODY_BYTES:
            raise _ApiError(413, "request_too_large", "larger than 256 MB")
        requests = json.loads(body)["requests"]
        ids = [request["custom_id"] for request in requests]
        if len(ids) != len(set(ids)) or not all(_CUSTOM_ID.match(id) for id in ids) or not 0 < len(ids) <= 100_000:
            raise _ApiError(400, "invalid_request_error", "requests: custom_ids")
        return self.api.do_create(requests)

    def _list(self) -> dict[str, Any]:
        query = dict(pair.split("=") for pair in self.path.partition("?")[2].split("&") if "=" in pair)
        now = self.api.clock.now()
        shown = [batch for batch in reversed(self.api.batches) if batch.visible_from <= now and not batch.deleted]
        ids = [batch.id for batch in shown]
        start = ids.index(query["after_id"]) + 1 if "after_id" in query else 0
        page = shown[start : start + min(self.api.page, int(query.get("limit", 20)))]
        return {
            "data": [self.api.describe(batch) for batch in page],
            "has_more": start + len(page) < len(shown),
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }

    # answers

    def _answer(self, call: str, answer: Any, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        if kind == "drop_after":
            return self._drop()
        if fault is not None and kind == "status_after":
            return self._error(fault.status, fault.error, "done all the same", fault)
        if kind == "hidden":
            answer = {**answer, "data": answer["data"][1:]}
        if call == "results":
            return self._send_lines(answer, kind)
        data = json.dumps(answer).encode()
        if kind == "malformed":
            data = data[: len(data) // 2]
        elif kind == "html":
            data = b"<html><body>Bad gateway</body></html>"
        if kind == "truncated":
            self._head(200, "application/json", length=len(data) + 100)
            self.wfile.write(data[: len(data) // 2])
            return self._drop()
        self._head(200, "text/html" if kind == "html" else "application/json", length=len(data))
        self.wfile.write(data)
        return None

    def _send_lines(self, results: list[dict[str, Any]], kind: str) -> None:
        lines = [json.dumps(result, ensure_ascii=False).encode() + b"\n" for result in results]
        middle = len(lines) // 2
        if kind in ("malformed", "bad_line"):
            lines.insert(middle, b'{"custom_id": "half a li\n')
        elif kind == "html":
            lines = [b"<html>\n"]
        elif kind == "repeated_line":
            lines.append(lines[middle])
        elif kind == "unknown_line":
            lines.append(b'{"custom_id": "somebody-else", "result": {"type": "expired"}}\n')
        elif kind == "missing_line":
            del lines[middle]
        self.send_response(200)
        self.send_header("content-type", "application/x-jsonl")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        data = b"".join(lines)
        if kind in ("cut", "truncated"):
            data = data[: len(data) * 2 // 3]
        for start in range(0, len(data), 3000):
            piece = data[start : start + 3000]
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if kind in ("cut", "truncated"):
            return self._drop()
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _error(self, status: int, kind: str, message: str, fault: Fault | None) -> None:
        details = {"details": {"error_code": fault.code}} if fault is not None and fault.code else {}
        error = {"type": "error", "error": {"type": kind, "message": message, **details}, "request_id": "req_1"}
        data = b"<html>proxy</html>" if kind == "html" else json.dumps(error).encode()
        self._head(status, "application/json", length=len(data), retry_after=fault.retry_after if fault else None)
        self.wfile.write(data)

    def _head(self, status: int, kind: str, *, length: int, retry_after: str | None = None) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length))
        self.send_header("request-id", "req_1")
        if retry_after is not None:
            self.send_header("retry-after", retry_after)
        self.end_headers()

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
