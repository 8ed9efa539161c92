"""`foundry service keys`: who may use a service. A secret is shown once, and kept as a hash."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import click

from model_foundry.config.service import ServiceConfig

if TYPE_CHECKING:
    from model_foundry.service.keys import Keys

_STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=ServiceConfig().state_dir,
    show_default=True,
    help="The service's state; it may be running.",
)
_JOURNAL_URL = click.option(
    "--journal-url",
    envvar="FOUNDRY_JOURNAL_URL",
    help="The service's journal_url, where it keeps its journal in PostgreSQL.",
)


@click.group(name="keys")
def command() -> None:
    """Mint, list and revoke API keys. With the first one, keys that were not minted stop being taken."""


@contextmanager
def _keys(state_dir: Path, journal_url: str | None) -> Iterator[Keys]:
    from model_foundry.service.journal import Journal
    from model_foundry.service.keys import Keys

    state_dir.mkdir(parents=True, exist_ok=True)
    journal = Journal(state_dir, url=journal_url)
    try:
        yield Keys(journal, is_open=False)
    finally:
        journal.close()


@command.command()
@click.argument("name")
@click.option("--role", default="user", show_default=True, help="user, or admin, who sees everybody's models.")
@_STATE_DIR
@_JOURNAL_URL
def mint(name: str, role: str, state_dir: Path, journal_url: str | None) -> None:
    """Make a key, and print it: it cannot be shown again."""
    with _keys(state_dir, journal_url) as keys:
        key, secret = keys.mint(name, role)
    click.echo(secret)
    click.echo(f"{key.role} key {name!r}; a running service takes it within seconds", err=True)


@command.command(name="list")
@click.option("--json", "as_json", is_flag=True, help="Print what a program would read.")
@_STATE_DIR
@_JOURNAL_URL
def list_keys(as_json: bool, state_dir: Path, journal_url: str | None) -> None:
    """Names, roles and dates; never the keys."""
    with _keys(state_dir, journal_url) as keys:
        found = keys.list()
    rows = [
        {
            "name": key.name,
            "role": key.role,
            "created": _date(key.created),
            "revoked": key.revoked and _date(key.revoked),
        }
        for key in found
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(
            f"{row['name']}  {row['role']}  made {row['created']}"
            + (f"  revoked {row['revoked']}" if row["revoked"] else "")
        )
    if not rows:
        click.echo("no key was minted; on a loopback address every tml- key is taken")


@command.command()
@click.argument("name")
@_STATE_DIR
@_JOURNAL_URL
def revoke(name: str, state_dir: Path, journal_url: str | None) -> None:
    """Take a key back; what was trained with it stays."""
    with _keys(state_dir, journal_url) as keys:
        keys.revoke(name)
    click.echo(f"revoked {name!r}")


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")  # noqa: UP017
