"""`foundry doctor` reports what it finds and never fails for what it doesn't."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest

from model_foundry.cli.doctor import (
    CORE,
    DISTRIBUTIONS,
    GIB,
    describe,
    diagnose,
    disk_facts,
    installed_version,
    usable_cores,
)
from model_foundry.cli.extras import EXTRAS, extra_of
from model_foundry.run.machine import memory_facts

ROOT = Path(__file__).parents[3]


@pytest.fixture
def facts() -> dict[str, Any]:
    """A machine that can train."""
    return {
        "version": "0.1.0",
        "python": {"version": "3.12.1", "executable": "/usr/bin/python"},
        "platform": "Linux",
        "cpu": {"name": "a processor", "cores": 2},
        "memory": {"total_bytes": 16 * GIB, "available_bytes": 8 * GIB},
        "disk": {
            "working directory": {"path": "/x", "free_bytes": 50 * GIB, "total_bytes": 99 * GIB, "writable": True}
        },
        "torch": {"version": "2.9", "threads": 2, "device": "cpu", "devices": ["cpu"], "bfloat16": False},
        "packages": dict.fromkeys(CORE, "1.0"),
        "extras": {extra: dict.fromkeys(names, "1.0") for extra, names in EXTRAS.items()},
        "models": [],
    }


def lines(facts: dict[str, Any]) -> str:
    return "\n".join(f"{label} {text}" for label, text in describe(facts))


def test_a_good_machine_has_no_complaints(facts: dict[str, Any]) -> None:
    assert diagnose(facts) == ([], [])
    assert "bfloat16 emulated" in lines(facts)
    assert "none cached" in lines(facts)


def test_what_is_missing_is_named_with_the_command_that_brings_it(facts: dict[str, Any]) -> None:
    bare = copy.deepcopy(facts)
    bare["extras"]["train"]["torch"] = None
    bare["torch"] = {"error": "ModuleNotFoundError: No module named 'torch'"}
    (missing,), _ = diagnose(bare)
    assert missing == "torch. Install with: pip install 'model-foundry[train]'"
    assert "torch not usable" in lines(bare)


def test_a_torch_that_is_there_but_broken_is_missing(facts: dict[str, Any]) -> None:
    facts["torch"] = {"error": "OSError: libcudart.so.12: cannot open"}
    (missing,), _ = diagnose(facts)
    assert "libcudart" in missing


def test_absent_trackers_are_no_hindrance(facts: dict[str, Any]) -> None:
    facts["extras"]["track"]["wandb"] = None
    assert diagnose(facts) == ([], [])
    assert "wandb missing" in lines(facts)


def test_little_memory_little_disk_and_no_rights_are_warned_of(facts: dict[str, Any]) -> None:
    facts["memory"]["available_bytes"] = GIB
    facts["disk"]["working directory"] |= {"free_bytes": GIB, "writable": False}
    missing, warnings = diagnose(facts)
    assert missing == []
    assert [word in warning for word, warning in zip(["memory", "disk", "written"], warnings, strict=True)] == [
        True
    ] * 3


def test_an_unknown_amount_of_memory_is_said_to_be_unknown(facts: dict[str, Any]) -> None:
    facts["memory"] = {"total_bytes": None, "available_bytes": None}
    assert diagnose(facts) == ([], [])
    assert "unknown free of unknown" in lines(facts)


def test_the_probes_answer_on_this_machine(tmp_path: Path) -> None:
    memory = memory_facts()
    assert memory["total_bytes"] is None or memory["total_bytes"] > 2**28
    assert usable_cores() >= 1
    absent = disk_facts(tmp_path / "not" / "there")["working directory"]
    assert absent["free_bytes"] > 0
    assert absent["writable"] is True


def declared(section: list[str]) -> set[str]:
    return {line.split(">")[0].split("=")[0].split("[")[0].strip().lower() for line in section}


def test_the_extras_are_those_that_are_declared() -> None:
    """Or the error for a missing package names an extra that does not bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(CORE) == declared(project["dependencies"])
    for extra, modules in EXTRAS.items():
        names = {DISTRIBUTIONS.get(module, (module,))[0] for module in modules}
        assert names == declared(project["optional-dependencies"][extra])


def test_versions_are_read_without_importing() -> None:
    assert installed_version("pyyaml")
    assert installed_version("no-such-package-anywhere") is None
    assert extra_of("torch.nn") == "train"
    assert extra_of("numpy") is None
    assert extra_of(None) is None
