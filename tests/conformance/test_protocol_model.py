"""A service against a model of the protocol in plain Python: operations late, out of order, repeated, and the service
killed in between.

The model knows no arithmetic. It knows what an answer may depend on: the steps that a model has made, by their batches
and learning rates. So the same history must always have the same loss, whoever asks, in whatever order it arrived, and
however often the service died.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.service_rig import Service, finish

pytestmark = pytest.mark.slow
NAMES = ("a", "b")


@dataclass(frozen=True)
class State:
    """What a model is made of: steps done, each (batches, rate), and batches that wait for a step."""

    steps: tuple[Any, ...] = ()
    pending: tuple[int, ...] = ()


@dataclass
class Planned:
    """An operation that its client has numbered. `after` and `answer` are what the model says of it."""

    seq: int
    kind: str
    body: dict[str, Any]
    check: Callable[[dict[str, Any]], None]
    request_id: str | None = None


@dataclass
class Run:
    """One model of the service."""

    model_id: str
    state: State = State()
    planned: list[Planned] = field(default_factory=list)
    saved: dict[str, State] = field(default_factory=dict)

    @property
    def collectable(self) -> list[Planned]:
        """Those before which nothing is missing."""
        found = []
        for operation in self.planned:
            if operation.request_id is None:
                break
            found.append(operation)
        return found


def row(batch: int) -> dict[str, Any]:
    tokens = [3 + (batch * 7 + place * 5) % 200 for place in range(6)]
    return {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": [5]},
            "weights": {"data": [1.0] * 5, "dtype": "float32", "shape": [5]},
        },
    }


class Clients(RuleBasedStateMachine):
    """One client with several models; `service` and `known` are shared by all examples."""

    service: Service
    known: dict[Any, Any]
    kills_left: int

    @initialize()
    def begin(self) -> None:
        self.api = self.service.api()
        self.session = self.api.post("create_session", json={}).json()["session_id"]
        self.runs: list[Run] = []
        self.kills = 0
        self.create()

    def teardown(self) -> None:
        if hasattr(self, "runs"):
            for run in self.runs:
                for operation in run.planned:
                    self.send(run, operation)
                for operation in run.planned:
                    operation.check(self.result(operation))
            self.api.post(f"sessions/{self.session}/finish", json={"reason": {"type": "success"}})
            self.api.close()

    # -- what a client does --------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.runs) < 3)
    @rule()
    def create(self) -> None:
        body = {"session_id": self.session, "model_seq_id": len(self.runs), "base_model": str(self.service.base),
                "lora_config": {"rank": 2, "seed": 1}}  # fmt: skip
        first = self.api.post("create_model", json=body)
        assert self.api.post("create_model", json=body).json() == first.json()
        self.runs.append(Run(finish(self.api, first)["model_id"]))

    @rule(data=st.data(), batch=st.integers(0, 2), only=st.booleans())
    def plan_pass(self, data: st.DataObject, batch: int, only: bool) -> None:
        run = self.choose(data)
        key = ("loss", run.state.steps, batch)
        if not only:
            run.state = State(run.state.steps, (*run.state.pending, batch))
        body = {"forward_backward_input": {"data": [row(batch)], "loss_fn": "cross_entropy"}, "forward_only": only}
        self.plan(run, "forward_backward", body, lambda answer: self.same(key, answer["metrics"]["loss:sum"]))

    @rule(data=st.data(), rate=st.sampled_from([0.01, 0.05]))
    def plan_step(self, data: st.DataObject, rate: float) -> None:
        run = self.choose(data)
        key, number = ("norm", run.state.steps, run.state.pending), len(run.state.steps) + 1
        run.state = State((*run.state.steps, (run.state.pending, rate)))

        def check(answer: dict[str, Any]) -> None:
            assert answer["metrics"]["step"] == number
            self.same(key, answer["metrics"]["grad_norm"])

        self.plan(run, "optim_step", {"adam_params": {"learning_rate": rate}}, check)

    @rule(data=st.data())
    def plan_nonsense(self, data: st.DataObject) -> None:
        """It fails, and what comes after goes on from the state before."""
        body = {"forward_backward_input": {"data": [], "loss_fn": "cross_entropy"}}
        self.plan(self.choose(data), "forward_backward", body, _is_refused)

    @rule(data=st.data(), name=st.sampled_from(NAMES), overwrite=st.booleans())
    def plan_save(self, data: st.DataObject, name: str, overwrite: bool) -> None:
        run = self.choose(data)
        check: Callable[[dict[str, Any]], None] = _is_refused
        if overwrite or name not in run.saved:
            run.saved[name] = run.state
            check = _names(f"tinker://{run.model_id}/weights/{name}")
        self.plan(run, "save_weights", {"path": name, "overwrite": overwrite}, check)

    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def plan_load(self, data: st.DataObject, name: str) -> None:
        """Of its own checkpoints: another model's may not be there yet when this comes to be done."""
        run = self.choose(data)
        path = f"tinker://{run.model_id}/weights/{name}"
        check: Callable[[dict[str, Any]], None] = _is_refused
        if name in run.saved:
            run.state = State(run.saved[name].steps)
            check = _names(path)
        self.plan(run, "load_weights", {"path": path, "optimizer": True}, check)

    # -- how it arrives --------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def deliver_some(self, data: st.DataObject) -> None:
        for run in self.runs:
            if waiting := [one for one in run.planned if one.request_id is None]:
                for operation in data.draw(st.lists(st.sampled_from(waiting), max_size=4, unique_by=id)):
                    self.send(run, operation)

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        run = self.choose(data)
        if sent := [one for one in run.planned if one.request_id is not None]:
            operation = data.draw(st.sampled_from(sent))
            before = operation.request_id
            self.send(run, operation)
            assert operation.request_id == before

    @rule(data=st.data())
    def collect(self, data: st.DataObject) -> None:
        run = self.choose(data)
        if ready := run.collectable:
            operation = data.draw(st.sampled_from(ready))
            operation.check(self.result(operation))
            operation.check(self.result(operation))

    @precondition(lambda self: self.kills < self.kills_left)
    @rule()
    def kill(self) -> None:
        self.kills += 1
        self.service.kill()
        self.service.start()

    # -- of use to them --------------------------------------------------------------------------------------------

    def choose(self, data: st.DataObject) -> Run:
        return data.draw(st.sampled_from(self.runs))

    def plan(self, run: Run, kind: str, body: dict[str, Any], check: Callable[[dict[str, Any]], None]) -> None:
        run.planned.append(Planned(len(run.planned) + 1, kind, body, check))

    def send(self, run: Run, operation: Planned) -> None:
        body = {"model_id": run.model_id, "seq_id": operation.seq, **operation.body}
        answer = self.api.post(operation.kind, json=body)
        assert answer.status_code == 200, answer.text
        operation.request_id = answer.json()["request_id"]

    def result(self, operation: Planned) -> dict[str, Any]:
        while True:
            answer = self.api.post("retrieve_future", json={"request_id": operation.request_id})
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()

    def same(self, key: Any, value: Any) -> None:
        assert self.known.setdefault(key, value) == value, key


def _is_refused(answer: dict[str, Any]) -> None:
    assert answer.get("category") == "user", answer


def _names(path: str) -> Callable[[dict[str, Any]], None]:
    def check(answer: dict[str, Any]) -> None:
        assert answer["path"] == path

    return check


def check_against_model(base: Path, state: Path, *, examples: int, steps: int, kills: int) -> None:
    with Service(base, state, "dtype=float32", "snapshot_seconds=0.2", "max_models_per_key=100000") as service:
        # One table for all examples: what was measured in one history holds in every other.
        machine = type("OfThisService", (Clients,), {"service": service, "known": {}, "kills_left": kills})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=steps, deadline=None, database=None, print_blob=True,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            ),
        )  # fmt: skip


def test_a_few_histories(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    check_against_model(tiny_folder("llama-tied"), tmp_path / "state", examples=6, steps=25, kills=1)


@pytest.mark.prove
@pytest.mark.timeout(7200)
def test_many_histories(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    examples = int(os.environ.get("FOUNDRY_HISTORIES", "60"))
    check_against_model(tiny_folder("llama-tied"), tmp_path / "state", examples=examples, steps=50, kills=3)
