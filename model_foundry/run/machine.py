"""What the machine has and what of it is free, from the kernel's own files; the container's limits included."""

from __future__ import annotations

import os
from pathlib import Path

from model_foundry.config.yaml_text import resolve_plain


def memory_facts() -> dict[str, int | None]:
    """Total and available bytes, the limit of the container included."""
    fields = {}
    for line in read_lines("/proc/meminfo"):
        name, _, text = line.partition(":")
        fields[name] = int(text.split()[0]) * 1024
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    used = _number("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")
    used = max(0, (used or 0) - _reclaimable_bytes())
    if limit is not None and (total is None or limit < total):
        total = limit
        free = limit - used
        available = free if available is None else min(available, free)
    return {"total_bytes": total, "available_bytes": available}


def _reclaimable_bytes() -> int:
    """Of what the container uses, the files' cache that goes when anyone needs the memory."""
    places = {"/sys/fs/cgroup/memory.stat": "inactive_file", "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file"}
    for path, wanted in places.items():
        for name, _, text in (line.partition(" ") for line in read_lines(path)):
            if name == wanted:
                return int(text)
    return 0


def _number(*names: str) -> int | None:
    for name in names:
        for line in read_lines(name):
            value = resolve_plain(line.strip())
            return value if isinstance(value, int) else None
    return None


def read_lines(name: str) -> list[str]:
    """The lines of a file, none where it cannot be read."""
    try:
        return Path(name).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
