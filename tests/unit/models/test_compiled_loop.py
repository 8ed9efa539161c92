"""Loops are compiled once a machine, and no code is run but what was compiled from them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import types

from model_foundry.models import compiled_loop
from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32, CompiledLoop
from model_foundry.models.primitives import read, write


def doubled(x: Any, first: int, last: int) -> None:
    for j in range(first, last):
        write(x, j, read(x, j) * np.float32(2.0))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path))
    return tmp_path / "loops"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """As a new process would: whether the loop had to be compiled. It has to work."""
    compiled: list[Any] = []
    make = CompiledLoop._compile
    monkeypatch.setattr(CompiledLoop, "_compile", lambda *given: compiled.append(given) or make(*given))

    def once(kind: Any = FLOAT32) -> bool:
        compiled.clear()
        x = np.array([1.5, -2.0, 3.0, 4.0], np.float32)
        if kind == BFLOAT16:
            x = (x.view(np.uint32) >> 16).astype(np.uint16)
        CompiledLoop(doubled, ("x*",), frozenset()).of(kind)(x.ctypes.data, 1, 3)
        wide = x if kind == FLOAT32 else (x.astype(np.uint32) << 16).view(np.float32)
        assert wide.tolist() == [1.5, -4.0, 6.0, 4.0]
        return bool(compiled)

    return once


def test_the_second_process_finds_what_the_first_has_made(home: Path, run: Callable[..., bool]) -> None:
    assert [run(), run(), run(BFLOAT16), run(BFLOAT16), run()] == [True, False, True, False, False]
    assert len(list(home.iterdir())) == 2
    assert home.stat().st_mode & 0o077 == 0


def test_one_code_is_loaded_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm of one type and a loop that has no second type had the same code in memory twice, or made twice."""
    loads: list[Any] = []
    load = CompiledLoop._load
    monkeypatch.setattr(CompiledLoop, "_load", lambda self, *kinds: loads.append(kinds) or load(self, *kinds))
    declared = CompiledLoop(doubled, ("x*",), frozenset())
    assert declared.of(FLOAT32) is declared.of(FLOAT32, FLOAT32) is declared.of(FLOAT32)
    assert len(loads) == 1


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty", "half", "a bit", "writable by others"])
def test_what_is_damaged_or_may_be_others_is_made_again(damage: str, home: Path, run: Callable[..., bool]) -> None:
    assert run()
    (kept,) = home.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(
        {"empty": b"", "half": whole[: len(whole) // 2], "a bit": whole[:-1] + bytes([whole[-1] ^ 1])}.get(
            damage, whole
        )
    )
    if damage == "writable by others":
        kept.chmod(0o622)
    assert [run(), run()] == [True, False]


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., bool]
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "a file"))
    assert [run(), run()] == [True, True]


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_it_is_found_whatever_the_umask(umask: int, home: Path, run: Callable[..., bool]) -> None:
    """A file that the group may write is nobody's in particular; made so by ourselves it was never taken."""
    before = os.umask(umask)
    try:
        assert [run(), run()] == [True, False]
    finally:
        os.umask(before)


def test_a_file_under_another_name_or_in_an_open_folder_is_not_taken(home: Path, run: Callable[..., bool]) -> None:
    assert [run(), run(BFLOAT16), run()] == [True, True, False]
    first, second = home.iterdir()
    second.write_bytes(first.read_bytes())
    assert sorted([run(), run(BFLOAT16)]) == [False, True]
    home.chmod(0o777)
    assert run()


def test_a_user_without_a_home_compiles(monkeypatch: pytest.MonkeyPatch, run: Callable[..., bool]) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", "~nobody-of-that-name/models")
    assert [run(), run()] == [True, True]


def test_another_source_is_another_loop(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an upgrade the old code must not be found under the new function's name, nor the new under the old's."""
    signature = types.void(types.float32)
    declared = CompiledLoop(doubled, ("x*",), frozenset())
    before = declared.kept_at(signature)
    other = tmp_path / "other.py"
    other.write_text(Path(__file__).read_text() + "# changed")
    monkeypatch.setattr(compiled_loop.inspect, "getfile", lambda function: str(other))
    assert declared.kept_at(signature) == before != CompiledLoop(doubled, ("x*",), frozenset()).kept_at(signature)
    monkeypatch.setattr(compiled_loop, "_ALL_LOOPS", "another version of what loops read and write by")
    assert declared.kept_at(signature) != before


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_mix_their_loops(tmp_path: Path) -> None:
    """In a store with an index one found the other's code, made for another type, under its own name, for ever."""
    code = """
import sys, numpy as np
from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32, CompiledLoop
from tests.unit.models.test_compiled_loop import doubled
kind = {"float32": FLOAT32, "bfloat16": BFLOAT16}[sys.argv[1]]
x = np.full(4, 0x40004000 if kind == FLOAT32 else 0x4000, np.uint32 if kind == FLOAT32 else np.uint16)
CompiledLoop(doubled, ("x*",), frozenset()).of(kind)(x.ctypes.data, 0, 4)
print(hex(x[3]))
"""
    environment = {**os.environ, "FOUNDRY_HOME": str(tmp_path)}

    def start(kind: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, kind]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    for _ in range(2):
        for process, wanted in [(start("float32"), "0x40804000"), (start("bfloat16"), "0x4080")]:
            out, error = process.communicate()
            assert (process.returncode, out.strip()) == (0, wanted), error


@pytest.mark.slow
def test_every_loop_of_the_decoder_is_found_by_a_process_that_compiles_nothing(tmp_path: Path) -> None:
    """Code that named what only a compiler sets up ended the process that loaded it."""
    code = """
from model_foundry.models import attention_loops, cpu_loops, prompt_loop
from model_foundry.models.compiled_loop import BFLOAT16, FLOAT32, CompiledLoop
from model_foundry.models.small_products import have_products
compiled, make = [], CompiledLoop._compile
CompiledLoop._compile = lambda *given: compiled.append(given) or make(*given)
loops = [loop for loop in vars(cpu_loops).values() if isinstance(loop, CompiledLoop)]
for loop in loops:
    for kind in (FLOAT32, BFLOAT16):
        loop.of(kind)
of_tiles = [attention_loops.attend, attention_loops.attend_backward, prompt_loop.attend_prompts]
of_tiles = of_tiles if have_products() else []
for loop in of_tiles:
    loop.of(BFLOAT16)
typed = [loop for loop in loops if {"x*", "w*"} & {*loop.kinds}]  # of the others the second type is the first
print(len(loops) > 10, len(compiled) - len(typed) - len(loops) - len(of_tiles), len(compiled))
"""
    for first in (True, False):
        environment = {**os.environ, "FOUNDRY_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        enough, missing, compiled = done.stdout.split()
        assert (enough, int(missing if first else compiled)) == ("True", 0)
