"""What was accepted is there after any death of the process, and one failing work does not take others with it."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import wait
from pathlib import Path

import pytest
from sqlalchemy import Connection, insert, text

from model_foundry.errors import RunError, UsageError
from model_foundry.service import journal as tables
from model_foundry.service.books import Books, Checkpoint, Model, Operation, Session
from model_foundry.service.journal import FILE_NAME, Journal
from model_foundry.service.keys import Keys


def operation(number: int) -> Operation:
    return Operation(f"m:{number}", "m", "me", "optim_step", "json", b"{}", 2**62, seq=number, created=float(number))


def test_everything_comes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    books = Books(journal)
    session = Session("s", "me", 1.0, {"tags": ["a"]})
    model = Model("m", "s", "me", 1.0, 1.0, {"rank": 4})
    saved = Checkpoint("m", "training", "x", "me", 1.0, 5, {"lora": {"rank": 4}, "is_ephemeral": False}, expires=9.0)
    for item in (session, saved):
        journal.run(books.put(item)[0]).result()
    assert journal.run(books.accept(operation(0), model)).result()
    assert journal.run(books.accept(operation(1), None)).result()
    assert not journal.run(books.accept(operation(1), None)).result(), "a repeat"
    done = operation(0)
    done.reply_kind, done.reply = "json", b"1"
    journal.run(books.answer(done)).result()
    journal.close()
    again = Books(Journal(tmp_path), clock=lambda: 5.0)
    assert again.sessions == {"s": session}
    assert again.models == {"m": model}
    assert again.checkpoint_at("tinker://m/weights/x", "me") == saved
    assert again.checkpoint_at("tinker://m/weights/x", "another") is None
    assert [(found.request_id, found.seed) for found in again.unfinished()] == [("m:1", 2**62)]
    assert [found.seq for found in again.done_after("m", -1)] == [0]
    again.clock = lambda: 9.0
    assert again.checkpoint_at("tinker://m/weights/x", "me") is None, "it has expired"


def test_a_work_that_fails_fails_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)

    def put(name: str):
        return lambda connection: connection.execute(insert(tables.meta).values(key=name, value=""))

    futures = [journal.run(put(name)) for name in ("a", "b", "a", "c", "a")]
    wait(futures)
    failed = [future.exception() is not None for future in futures]
    assert sum(failed) == 2
    assert not failed[1]
    assert not failed[3]
    journal.close()
    rows = sqlite3.connect(tmp_path / FILE_NAME).execute("select key from meta where value = '' order by key")
    assert [row[0] for row in rows] == ["a", "b", "c"]


def test_work_that_is_not_waited_for_any_more_ends_nothing(tmp_path: Path) -> None:
    """A result for a future that was cancelled ended the thread that writes: nothing was accepted from then on."""
    journal = Journal(tmp_path)
    begun, goes_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> int:
        begun.set()
        assert goes_on.wait(30)
        return 1

    def fail(connection: Connection) -> None:
        raise AssertionError("nobody waits for this")

    running = journal.run(slow)
    assert begun.wait(30)
    queued = journal.run(fail)
    assert queued.cancel()
    assert not running.cancel(), "it is under way"
    goes_on.set()
    assert running.result(30) == 1
    assert journal.run(lambda connection: 2).result(30) == 2
    journal.close()


def test_a_journal_that_is_cut_off_or_foreign(tmp_path: Path) -> None:
    """Half a write at the end is forgotten; another version's file, or none at all, is a typed error."""
    journal = Journal(tmp_path)
    books = Books(journal)
    journal.run(books.accept(operation(0), None)).result()
    (tmp_path / "copy").mkdir()
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    wal = tmp_path / "copy" / f"{FILE_NAME}-wal"
    wal.write_bytes(wal.read_bytes() + b"\x00torn" * 100)
    assert len(Books(Journal(tmp_path / "copy")).unfinished()) == 1
    journal.run(lambda connection: connection.execute(tables.meta.update().values(value="99"))).result()
    journal.close()
    with pytest.raises(RunError, match="schema 99"):
        Journal(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / FILE_NAME).write_text("this is no database, however long it goes on " * 50)
    with pytest.raises(RunError, match="cannot be opened"):
        Journal(tmp_path / "text")


def test_a_damaged_page_is_a_typed_error(tmp_path: Path) -> None:
    """The database's own error, with a trace of calls, says nothing about what to do."""
    journal = Journal(tmp_path)
    books = Books(journal)
    for number in range(50):
        journal.run(books.accept(operation(number), None)).result()
    journal.close()
    data = bytearray((tmp_path / FILE_NAME).read_bytes())
    # All but the first page, which holds the schema, and that of `meta`, which is read when it is opened.
    page = sqlite3.connect(tmp_path / FILE_NAME).execute("select rootpage from sqlite_master where name = 'meta'")
    kept = int(page.fetchone()[0])
    for number in range(1, len(data) // 4096):
        if number != kept - 1:
            data[4096 * number : 4096 * (number + 1)] = b"\x07" * 4096
    (tmp_path / FILE_NAME).write_bytes(data)
    with pytest.raises(RunError, match="malformed"):
        Books(Journal(tmp_path)).unfinished()


def test_keys_are_kept_as_hashes_and_can_be_taken_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    keys = Keys(journal, is_open=True)
    stranger = keys.tenant("tml-anything")
    assert stranger is not None
    assert keys.tenant("sk-anything") is None
    _, secret = keys.mint("ada", "user")
    assert keys.tenant("tml-anything") is None, "with the first key the door is shut"
    tenant = Keys(journal, is_open=True).tenant(secret)
    assert tenant is not None
    assert tenant.sees == tenant.owner
    with pytest.raises(UsageError, match="exists"):
        keys.mint("ada", "user")
    _, master = keys.mint("root", "admin")
    everything = keys.tenant(master)
    assert everything is not None
    assert everything.sees is None
    keys.revoke("ada")
    assert keys.tenant(secret) is None
    journal.close()
    assert secret.encode() not in (tmp_path / FILE_NAME).read_bytes()


def test_only_what_may_be_done_again_keeps_its_body(tmp_path: Path) -> None:
    """Rows that were only looked at stayed in the journal for ever, megabytes each."""
    journal = Journal(tmp_path)
    books = Books(journal)
    kinds = [
        ("create_model", None, False), ("forward_backward", 1.5, False), ("forward_backward", None, False),
        ("forward", None, False), ("optim_step", None, True), ("optim_step", None, False),
        ("save_weights", None, False), ("load_weights", None, False),
    ]  # fmt: skip
    for seq, (kind, loss, failed) in enumerate(kinds):
        asked = Operation(f"m:{seq}", "m", "me", kind, "json", b"rows", 1, seq=seq)
        assert journal.run(books.accept(asked, None)).result()
        asked.loss, asked.failed = loss, failed
        journal.run(books.answer(asked)).result()
    assert [(found.seq, found.body) for found in books.done_after("m", -1)] == [
        (1, b"rows"), (5, b"rows"), (7, b"rows")
    ]  # fmt: skip
    journal.run(books.accept(operation(8), None)).result()
    journal.run(books.drop_bodies("m", 5)).result()
    assert [(found.seq, found.body) for found in books.done_after("m", 0)] == [(1, b""), (5, b""), (7, b"rows")]
    journal.run(books.drop_operations("m")).result()
    assert [found.body for found in books.done_after("m", 0)] == [b""] * 3
    assert [found.body for found in books.unfinished()] == [b"{}"], "it is still to be done"
    journal.close()


def test_a_journal_of_the_first_version_is_brought_up_to_date(tmp_path: Path) -> None:
    """Its operations had no losses; one of a newer version is left as it is."""
    journal = Journal(tmp_path)
    assert journal.run(Books(journal).accept(operation(0), None)).result()
    journal.close()
    raw = sqlite3.connect(tmp_path / FILE_NAME)
    for change in (
        "drop index by_finished_kept",
        "alter table operations drop column loss",
        "alter table operations drop column num_tokens",
        "update meta set value = '1' where key = 'schema'",
    ):
        raw.execute(change)
    raw.commit()
    journal = Journal(tmp_path)
    books = Books(journal)
    (found,) = books.unfinished()
    found.kind, found.reply_kind, found.loss, found.num_tokens = "forward_backward", "pass", 2.5, 5
    journal.run(books.answer(found)).result()
    assert books.training_so_far() == [("m", "optim_step", 2.5, 5)]
    journal.close()
    assert raw.execute("select name from sqlite_master where name = 'by_finished_kept'").fetchone()
    raw.execute(f"update meta set value = '{tables.SCHEMA_VERSION + 1}' where key = 'schema'")
    raw.commit()
    with pytest.raises(RunError, match="reads up to"):
        Journal(tmp_path)


def test_an_older_journal_lets_go_what_was_done_on_models_that_are_unloaded(tmp_path: Path) -> None:
    """Those rows stayed for ever; what can still be asked for, or is a live model's, stays now too."""
    journal = Journal(tmp_path)
    books = Books(journal)
    for name, state in (("over", "unloaded"), ("live", "live")):
        for seq, reply_kind in enumerate(("gone", "json", None)):
            asked = Operation(f"{name}:{seq}", name, "me", "optim_step", "json", b"{}", 1, seq=seq)
            made = Model(name, "s", "me", 0.0, 0.0, {}, state=state, done_seq=1) if seq == 0 else None
            assert journal.run(books.accept(asked, made)).result()
            if reply_kind:
                asked.reply_kind = reply_kind
                journal.run(books.answer(asked)).result()
    journal.run(
        lambda connection: connection.execute(text("update meta set value = '4' where key = 'schema'"))
    ).result()
    journal.close()
    journal = Journal(tmp_path)
    rows = journal.read(lambda connection: connection.execute(text("select request_id from operations")).all())
    journal.close()
    assert sorted(row.request_id for row in rows) == ["live:0", "live:1", "live:2", "over:1", "over:2"]
