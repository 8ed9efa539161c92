"""The memory that is free, as the kernel's files have it. The files are those of a container that just read a model."""

from __future__ import annotations

import pytest

from model_foundry.run import machine

GIB = 2**30
MEMINFO = [f"MemTotal: {64 * GIB // 1024} kB", f"MemAvailable: {60 * GIB // 1024} kB"]
V2 = {
    "/sys/fs/cgroup/memory.max": [str(16 * GIB)],
    "/sys/fs/cgroup/memory.current": [str(14 * GIB)],
    "/sys/fs/cgroup/memory.stat": [f"anon {2 * GIB}", f"file {12 * GIB}", f"inactive_file {11 * GIB}"],
}
V1 = {
    "/sys/fs/cgroup/memory/memory.limit_in_bytes": [str(16 * GIB)],
    "/sys/fs/cgroup/memory/memory.usage_in_bytes": [str(14 * GIB)],
    "/sys/fs/cgroup/memory/memory.stat": [f"inactive_file {GIB}", f"total_inactive_file {11 * GIB}"],
}


@pytest.mark.parametrize("files, free", [(V2, 13), (V1, 13), ({"/sys/fs/cgroup/memory.max": ["max"]}, 60)])
def test_files_in_the_cache_are_free_memory(
    files: dict[str, list[str]], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents batches that are split in a container because its cache is full of the files that were just read."""
    found = {"/proc/meminfo": MEMINFO, **files}
    monkeypatch.setattr(machine, "read_lines", lambda name: found.get(name, []))
    assert machine.memory_facts()["available_bytes"] == free * GIB
