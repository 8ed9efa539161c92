"""Schemathesis: requests made from the OpenAPI description, valid and not, find no 5xx and no answer left out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import serving

KEY = "a-long-enough-key-of-my-own"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection",
)  # fmt: skip


@pytest.mark.slow
def test_no_request_of_the_description_breaks_the_server(tiny: Path, tmp_path: Path) -> None:
    with serving(
        tiny / "final" / "adapter",
        environ={"FOUNDRY_API_KEY": KEY},
        access__adapter_folder=tmp_path,
        limits__max_tokens=4,
        default_max_tokens=4,
    ) as served:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json",
            "--header", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS), "--max-examples", "20",
            "--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--no-color", "--seed", "1",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "test cases" in done.stdout.lower()
