"""A service for a client in the same process: no address, the same parts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from model_foundry.config.load import load_config
from model_foundry.config.service import ServiceConfig
from model_foundry.service.app import make_app
from model_foundry.service.running import running

DEFAULT_STATE_DIR = ServiceConfig().state_dir


@asynccontextmanager
async def embedded(
    base_model: str, *, state_dir: Path, options: Mapping[str, Any]
) -> AsyncIterator[httpx.AsyncBaseTransport]:
    """A transport for requests of this event loop to a service in it.

    Args:
        options: other fields of `foundry service`'s configuration.

    Raises:
        ConfigError: an option that is not known, or has no meaning.
        RunError, ModelError: as `running`.
    """
    given = {"base_model": base_model, "state_dir": str(state_dir), **options}
    config = load_config(
        ServiceConfig, path=None, overrides=[f"{key}={json.dumps(given[key])}" for key in given]
    ).config
    async with running(config, every_key=True) as front:
        yield httpx.ASGITransport(app=make_app(front))
