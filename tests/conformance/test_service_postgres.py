"""The journal in PostgreSQL: the same service, the same bits, and one service a database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from model_foundry.errors import RunError, UsageError
from model_foundry.service.books import Books, Operation
from model_foundry.service.importing import import_checkpoint
from model_foundry.service.journal import Journal
from model_foundry.service.keys import Keys
from tests.conformance.test_service_by_hand import new_model, one_step
from tests.service_rig import Service, files_of, finish

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pgserver", reason="pgserver has no wheel for this Python on this machine")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


def test_a_killed_service_goes_on_from_postgres_to_the_bits_of_one_on_sqlite(
    tiny_folder: Callable[[str], Path], tmp_path: Path, url: str
) -> None:
    ends = []
    for name, options in (("sqlite", []), ("postgres", [f"journal_url={url}"])):
        service = Service(tiny_folder("llama-tied"), tmp_path / name, "snapshot_seconds=0.05", *options)
        with service, service.api() as api:
            model = new_model(api, service)
            for seq in range(1, 17, 2):
                one_step(api, model, seq)
                if options and seq in (5, 11):
                    service.kill()
                    service.start()
            done = finish(api, api.post("save_weights", json={"model_id": model, "path": "end", "seq_id": 17}))
            saved = service.state / "runs" / done["path"].removeprefix("tinker://").replace(":", "-")
            ends.append(files_of(saved))
            if options:
                assert not (service.state / "journal.sqlite").exists()
                with pytest.raises(RunError, match="another service is at work"):
                    Journal(tmp_path, url=url, exclusive=True)
                beside = Journal(tmp_path, url=url)
                assert Keys(beside, is_open=False).list() == []
                beside.close()
                with pytest.raises(RunError, match="another service is at work"):
                    import_checkpoint(str(saved), state_dir=tmp_path / "other", name="x", key=None, journal_url=url)
    path = import_checkpoint(str(saved), state_dir=tmp_path / "postgres", name="x", key=None, journal_url=url)
    journal = Journal(tmp_path, url=url)
    assert Books(journal).checkpoint_at(path, "anybody") is not None
    journal.close()
    assert ends[0] == ends[1]
    assert len(ends[0]) == 2


def test_postgres_too_forgets_what_was_done_on_unloaded_models(
    tiny_folder: Callable[[str], Path], tmp_path: Path, url: str
) -> None:
    """Its partial index and its deletions are written for another dialect than those of every other test."""
    options = ("result_hours=0.0005", f"journal_url={url}")
    with Service(tiny_folder("llama-tied"), tmp_path / "state", *options) as service, service.api() as api:
        model = new_model(api, service)
        one_step(api, model, 1)
        finish(api, api.post("unload_model", json={"model_id": model, "seq_id": 3}))
        beside, wanted = Journal(tmp_path, url=url), text("select count(*) from operations where lane = :lane")

        def rows() -> int:
            return beside.read(lambda connection: connection.execute(wanted, {"lane": model}).scalar_one())

        deadline = time.monotonic() + 20
        while rows() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert rows() == 0
        beside.close()
        for seq in range(4):
            assert api.post("retrieve_future", json={"request_id": f"{model}:{seq}"}).status_code == 410


def test_numbers_beyond_32_bits_are_kept_also_where_the_tables_are_older(tmp_path: Path, url: str) -> None:
    """A client that joins a sampling session counts from a multiple of 1e9."""
    journal = Journal(tmp_path, url=url)
    for change in (
        "DROP INDEX by_finished_kept",
        "ALTER TABLE operations ALTER COLUMN seq TYPE INTEGER",
        "ALTER TABLE models ALTER COLUMN done_seq TYPE INTEGER",
        "UPDATE meta SET value = '2' WHERE key = 'schema'",
    ):
        journal.run(lambda connection, change=change: connection.execute(text(change))).result()
    journal.close()
    journal = Journal(tmp_path, url=url)
    books = Books(journal)
    asked = Operation("far", "far", "me", "asample", "json", b"{}", 1, seq=3_000_000_000, created=1.0)
    assert journal.run(books.accept(asked, None)).result()
    assert [found.seq for found in books.unfinished() if found.request_id == "far"] == [3_000_000_000]
    journal.close()


@pytest.mark.parametrize("wrong", ["mysql://me@host/db", "not a url"])
def test_other_databases_are_refused_by_name(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="journal_url"):
        Journal(tmp_path, url=wrong)


def test_a_server_that_does_not_answer_is_an_error_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be opened") as caught:
        Journal(tmp_path, url="postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)
