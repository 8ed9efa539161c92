"""`foundry generate` as real processes against the loopback server: kills, Ctrl-C, two at once, and mistakes."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.message_batches_server import KEY, MODEL, Fault, Server, TestClock
from tests.tiny_runs import assert_one_paragraph, environment, foundry, foundry_here, start, unmeasured

pytestmark = pytest.mark.slow

CODE = Path(__file__).parents[2] / "examples" / "code" / "lua"


class WallClock(TestClock):
    """The world's time: these processes have no other."""

    def now(self) -> float:
        return time.time()


@dataclass
class Project:
    """A configuration in a folder, and the server that its command speaks to."""

    folder: Path
    server: Server
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path = self.folder / "generate.yaml"
        self.config = {
            "corpus": {"language": "lua", "roots": [str(CODE)]},
            "prompt": {"voices": {"developer": "precisely"}},
            "generation": {
                "model": MODEL, "max_tokens": 400, "effort": "default", "batch_requests": 8, "poll_seconds": 0.05,
                "settle_seconds": 0.6, "timeout_seconds": 20, "max_wait_seconds": 0.2, "count_sample": 2,
            },
            "output": {"file": str(self.folder / "rows.jsonl")},
            "max_cost": 10,
        }  # fmt: skip
        self.path.write_text(yaml.safe_dump(self.config))

    @property
    def env(self) -> dict[str, str]:
        return environment(ANTHROPIC_API_KEY=KEY, ANTHROPIC_BASE_URL=self.server.url)

    @property
    def ledger(self) -> Path:
        return self.folder / "rows.ledger.sqlite"

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return foundry("generate", self.path, *arguments, env=self.env | env)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return start("generate", self.path, *arguments, env=self.env)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]

    def assert_balanced(self) -> dict[str, Any]:
        """Everything is done, once, and both books name the same sum."""
        done = self.run("--json")
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["done"]
        assert self.server.paid_twice() == []
        assert report["requests"]["succeeded"] == len(self.server.bills) == len(self.rows())
        assert round(report["spent_usd"] * 1e9) == self.server.billed_nano
        return report


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    with Server(clock=WallClock(), batch_seconds=0.2) as server:
        yield Project(tmp_path, server)


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_domain_becomes_a_data_set(project: Project) -> None:
    dry = project.run("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "24 to send as batches" in dry.stdout
    assert "the API's counter for 2 of them" in dry.stdout
    assert project.server.bills == []
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert "24 succeeded" in done.stdout
    assert "requests answered" in done.stderr
    code = {path.relative_to(CODE).as_posix(): path.read_text(encoding="utf-8") for path in CODE.rglob("*.lua")}
    for row in project.rows():
        assert row["messages"][1]["content"] in code[row["meta"]["source"]]
    project.assert_balanced()


def kill_at(project: Project, call: str, fault: Fault) -> subprocess.Popen[str]:
    """Start the command; the server kills it in the middle of its first such call."""
    process = project.start()

    def strike(name: str) -> Fault | None:
        if name != call:
            return None
        project.server.fault = lambda name: None
        process.kill()
        return fault

    project.server.fault = strike
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return process


@pytest.mark.parametrize(
    "call, fault",
    [
        ("list", Fault("drop_after")), ("create", Fault("drop_before")), ("create", Fault("drop_after")),
        ("create", Fault("done_later", seconds=0.3)), ("retrieve", Fault("drop_after")), ("results", Fault("cut")),
    ],
)  # fmt: skip
def test_a_kill_at_any_call_costs_nothing(call: str, fault: Fault, project: Project) -> None:
    """Prevents a power cut from paying for anything twice."""
    kill_at(project, call, fault)
    project.assert_balanced()


def test_kills_at_any_moment_cost_nothing(project: Project) -> None:
    project.server.batch_seconds = 0.5
    for delay in (0.6, 0.9, 1.1, 1.3, 1.5, 1.0):
        process = project.start()
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=60)
    uncertain = json.loads(project.run("--json").stdout)["requests"]["uncertain"]
    if uncertain:  # the probe's answer may have been lost; it is not sent again unasked
        assert uncertain <= 6
        assert project.server.paid_twice() == []
    else:
        project.assert_balanced()


def test_a_kill_during_the_probe_leaves_it_uncertain(project: Project) -> None:
    """Prevents sending again unasked what may have been billed and has no list to look in."""
    kill_at(project, "message", Fault("drop_after"))
    again = project.run("--json")
    report = json.loads(again.stdout)
    assert (again.returncode, report["requests"]["uncertain"], report["requests"]["succeeded"]) == (1, 1, 23)
    assert "count at the worst case" in again.stderr
    assert project.server.paid_twice() == []
    asked = json.loads(project.run("--json", "--resend-uncertain").stdout)
    assert asked["requests"]["succeeded"] == 24
    assert asked["lost_at_most_usd"] > 0
    assert len(project.server.paid_twice()) == 1


def interrupted(project: Project, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    project.server.batch_seconds = 60.0
    process = project.start()
    wait_until(lambda: len(project.server.batches) == 3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_what_is_under_way_goes_on(number: signal.Signals, project: Project) -> None:
    """Prevents a batch job's end from canceling what was nearly paid for."""
    done = interrupted(project, number)
    assert_one_paragraph(done, code=3, words=("23 requests under way in 3 batches", "--cancel", "Run the same command"))
    assert all(batch.canceled is None for batch in project.server.batches)
    for batch in project.server.batches:
        batch.seconds = 0.0
    project.assert_balanced()


def test_cancel_stops_what_is_under_way(project: Project) -> None:
    interrupted(project, signal.SIGTERM)
    project.server.cancel_seconds = 0.1
    done = project.run("--cancel", "--json")
    report = json.loads(done.stdout)
    assert report["requests"]["submitted"] == report["reserved_usd"] == 0
    assert report["requests"]["canceled"] > 0
    assert report["requests"]["succeeded"] == len(project.server.bills)
    assert "3 batches were asked to stop" in done.stderr
    project.server.batch_seconds = 0.1
    project.assert_balanced()


@pytest.mark.parametrize("answer, canceled", [("y", True), ("n", False)])
def test_on_a_terminal_ctrl_c_asks(answer: str, canceled: bool, project: Project) -> None:
    project.server.batch_seconds = 60.0
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "model_foundry", "generate", str(project.path)]
    with subprocess.Popen(
        command, env=project.env, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True
    ) as process:
        os.close(terminal)
        wait_until(lambda: len(project.server.batches) == 3)
        process.send_signal(signal.SIGINT)
        said = b""
        while b"Cancel them?" not in said:
            said += os.read(main, 1000)
        os.write(main, f"{answer}\n".encode())
        assert process.wait(timeout=60) == 3
    os.close(main)
    assert all((batch.canceled is not None) == canceled for batch in project.server.batches)


def test_ctrl_c_during_a_creation_waits_for_its_answer(project: Project) -> None:
    """Prevents an impatient key from turning a paid batch into one that has to be looked for."""
    process = project.start()

    def press(name: str) -> Fault | None:
        if name == "create":
            project.server.fault = lambda name: None
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        return None

    project.server.fault = press
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "waiting for the answer that is on its way" in stderr
    assert "in 1 batches" in stderr
    lists = project.server.calls["list"]
    status = json.loads(project.run("--status", "--json").stdout)
    assert status["batches"] == {"submitted": 1}
    assert project.server.calls["list"] == lists
    project.assert_balanced()


def test_two_at_once_are_one_and_an_onlooker(project: Project) -> None:
    """Prevents two processes that send the same requests."""
    project.server.batch_seconds = 60.0
    with project.start() as first:
        wait_until(lambda: len(project.server.batches) == 3)
        assert_one_paragraph(project.run(), code=2, words=("in use by process", "--status"))
        status = project.run("--status")
        assert (status.returncode, "23 submitted" in status.stdout) == (0, True)
        assert project.run("--dry-run").returncode == 0
        first.kill()
    assert len(project.server.batches) == 3


def test_what_people_get_wrong_is_said_in_one_paragraph_and_sends_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]] = [
        ((), {"ANTHROPIC_API_KEY": ""}, ("ANTHROPIC_API_KEY", "no API key")),
        ((), {"ANTHROPIC_API_KEY": "sk-wrong"}, ("does not accept the key",)),
        (("generation.model=claude-x", "price.input=1", "price.output=2"), {}, ("no such model", "claude-x")),
        (("generation.model=claude-x",), {}, ("price.input", "not in the table")),
        (("max_cost=null",), {}, ("no ceiling", "--max-cost")),
        (("--max-cost", "0.0001"), {}, ("does not allow even one request",)),
        (("--max-cost", "-1"), {}, ("allows nothing",)),
        (("--max-cost", "nan"), {}, ("is no ceiling",)),
        (("corpus.roots=[]",), {}, ("no folder of code",)),
        (("corpus.roots=[/nowhere]",), {}, ("/nowhere",)),
        (("corpus.kinds=[method]", "corpus.min_lines=200", "corpus.max_lines=201"), {}, ("no code",)),
        (("prompt.template=Ask.",), {}, ("{code}",)),
        (("prompt.version=reverse-9",), {}, ("reverse-9", "reverse-1")),
        (("generation.max_tokns=5",), {}, ("max_tokns", "max_tokens")),
        (("--dry-run", "--status"), {}, ("one at a time",)),
        (("--status",), {}, ("no ledger yet",)),
        (("--cancel",), {}, ("nothing is in flight",)),
    ]
    for arguments, env, words in cases:
        for name, value in {"ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": project.server.url, **env}.items():
            monkeypatch.setenv(name, value)
        assert_one_paragraph(foundry_here("generate", project.path, *arguments), code=2, words=words)
        project.ledger.unlink(missing_ok=True)
    assert project.server.bills == []
    assert project.server.calls["create"] == 0


def test_a_network_that_is_not_there_ends_in_words(project: Project) -> None:
    done = project.run("generation.max_failures=2", ANTHROPIC_BASE_URL="http://127.0.0.1:9")
    assert_one_paragraph(done, code=3, words=("failed 2 times in a row", "nothing is paid for twice"))


def test_a_ledger_of_another_configuration_is_refused(project: Project) -> None:
    assert project.run().returncode == 0
    rows = project.rows()
    done = project.run("generation.max_tokens=500")
    assert_one_paragraph(done, code=2, words=("another configuration", "generation.max_tokens: 400 there, 500 here"))
    elsewhere = project.run(ANTHROPIC_BASE_URL=project.server.url.replace("127.0.0.1", "localhost"))
    assert_one_paragraph(elsewhere, code=2, words=("ANTHROPIC_BASE_URL",))
    assert project.rows() == rows


def test_a_damaged_ledger_is_refused_and_left_alone(project: Project) -> None:
    assert project.run().returncode == 0
    data = project.ledger.read_bytes()
    project.ledger.write_bytes(data[: len(data) // 2])
    assert_one_paragraph(project.run(), code=2, words=("damaged", "rows.ledger.sqlite"))
    assert project.ledger.read_bytes() == data[: len(data) // 2]


@pytest.mark.parametrize("num_bytes", [20_000, 60_000])
def test_a_full_disk_stops_before_what_it_could_not_write_down(num_bytes: int, project: Project) -> None:
    """Prevents a paid request that no ledger knows."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))  # noqa: E731
    command = [sys.executable, "-m", "model_foundry", "generate", str(project.path)]
    env = unmeasured(project.env)
    done = subprocess.run(command, env=env, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert_one_paragraph(done, code=3, words=("could not be written", "nothing is paid for twice"))
    project.assert_balanced()
