"""Whose turn it is: ids in order whatever order they come in, and time shared between tenants."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.service.books import Operation
from model_foundry.service.lanes import Lanes


def operation(lane: str, seq: int | None, owner: str = "me") -> Operation:
    name = f"{lane}:{seq}"
    return Operation(
        request_id=name, lane=lane, owner=owner, kind="forward", encoding="json", body=b"", seed=0, seq=seq
    )


@settings(deadline=None)
@given(st.permutations(range(1, 9)), st.integers(0, 8))
def test_ids_are_done_in_order_whatever_order_they_come_in(order: list[int], taken_between: int) -> None:
    """The official client posts the first part of a split batch last."""
    lanes, done = Lanes(), []
    for place, seq in enumerate(order):
        lanes.add(operation("m", seq), next_seq=1)
        if place >= taken_between and (found := lanes.take()) is not None:
            done.append(found.seq)
    while (found := lanes.take()) is not None:
        done.append(found.seq)
    assert done == list(range(1, 9))


def test_a_hole_is_waited_for_and_said() -> None:
    lanes = Lanes()
    late = operation("m", 3)
    lanes.add(late, next_seq=2)
    assert lanes.take() is None
    assert "seq_id 2" in str(lanes.waiting_for(late))


def test_tenants_get_the_same_time_however_much_they_ask_for() -> None:
    """One with a thousand operations must not make another wait for them all: Jain's index of the shares is near 1."""
    lanes = Lanes()
    seconds = {"a": 0.2, "b": 1.0, "c": 0.5, "d": 0.05}
    for owner in seconds:
        for model in range(1 + (owner == "a") * 5):
            for seq in range(400):
                lanes.add(operation(f"{owner}{model}", seq, owner), next_seq=0)
    used = dict.fromkeys(seconds, 0.0)
    while sum(used.values()) < 60:
        taken = lanes.take()
        assert taken is not None
        used[taken.owner] += seconds[taken.owner]
        lanes.charge(taken, seconds[taken.owner])
    shares = list(used.values())
    assert sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) > 0.99


def test_time_that_nobody_wanted_is_not_saved_up() -> None:
    lanes = Lanes()
    for seq in range(100):
        lanes.add(operation("busy", seq, "busy"), next_seq=0)
    for _ in range(50):
        taken = lanes.take()
        assert taken is not None
        lanes.charge(taken, 1.0)
    for seq in range(50):
        lanes.add(operation("new", seq, "new"), next_seq=0)
    owners = []
    for _ in range(20):
        taken = lanes.take()
        assert taken is not None
        owners.append(taken.owner)
        lanes.charge(taken, 1.0)
    assert 8 <= owners.count("new") <= 12


def test_samplers_come_and_go_without_a_trace() -> None:
    lanes = Lanes()
    for number in range(3):
        lanes.add(operation("s:sample:0", number), next_seq=None)
    for number in range(3):
        taken = lanes.take()
        assert taken is not None
        assert taken.seq == number
        lanes.charge(taken, 0.1)
        lanes.settle(taken)
    assert lanes.num_waiting("me") == 0
    assert not lanes._lanes


def test_a_step_goes_before_a_pass_but_not_for_ever() -> None:
    """Who has stepped can share the next pass; one who only ever steps must not keep the others from theirs."""
    lanes = Lanes()
    for seq in range(40):
        step = operation("steps", seq, "steps")
        step.kind = "optim_step"
        lanes.add(step, next_seq=0)
        lanes.add(operation("passes", seq, "passes"), next_seq=0)
    owners = []
    for _ in range(20):
        taken = lanes.take()
        assert taken is not None
        owners.append(taken.owner)
        lanes.charge(taken, 0.2)
    assert owners[:2] == ["steps", "steps"]
    assert 8 <= owners.count("passes") <= 11


def test_what_is_put_back_is_next_and_only_other_models_are_joined() -> None:
    lanes = Lanes()
    for name in ("a", "b"):
        for seq in (3, 4):
            lanes.add(operation(name, seq, name), next_seq=3)
    first = lanes.take()
    assert first is not None
    found = lanes.take_like("forward", lambda lane: lane != first.lane)
    assert found is not None
    assert found.lane != first.lane
    assert lanes.take_like("forward", lambda lane: False) is None
    assert lanes.take_like("optim_step", lambda lane: True) is None
    lanes.put_back(found)
    again = lanes.take_like("forward", lambda lane: lane != first.lane)
    assert again is found


def test_samples_are_taken_beside_the_line_and_only_of_those_who_are_welcome() -> None:
    lanes = Lanes()
    lanes.add(operation("m", 0, "a"), next_seq=0)
    for owner in ("a", "b"):
        lanes.add(operation(f"{owner}:sample", None, owner), next_seq=None)
    taken = lanes.take_sample(lambda owner: owner == "b")
    assert taken is not None
    assert taken.owner == "b"
    assert lanes.take_sample(lambda owner: owner == "b") is None
    model = lanes.take(samples=False)
    assert model is not None
    assert model.lane == "m"
    assert lanes.take(samples=False) is None
