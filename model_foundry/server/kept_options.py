"""What each back end keeps to of a configuration. The rest is refused where it was set, rather than left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from model_foundry.config.section import Section
from model_foundry.config.serve import ServeConfig
from model_foundry.errors import UsageError

_EVERYWHERE = frozenset({"model.name", "model.template", "backend", "host", "port"})
KEPT: Mapping[str, frozenset[str]] = {
    "llama.cpp": _EVERYWHERE
    | {"served_name", "default_max_tokens", "batch.max_sequences", "batch.max_cache_tokens", "limits"}
    | {f"access.{name}" for name in ("keys_file", "requests_per_minute", "burst", "cors_origins", "allowed_hosts")},
    "vllm": _EVERYWHERE | {"engine_python", "served_name", "adapters", "model.dtype", "batch.max_sequences"},
    "mlx": _EVERYWHERE | {"engine_python", "default_max_tokens"},
}
"""Back end -> fields, or whole sections; torch, which is not here, keeps to all of them."""


def refuse_others(config: ServeConfig, backend: str) -> None:
    """Raises: UsageError: a field that is not as it is by default, and that this back end does not keep to."""
    for name in _changed(config):
        if not {name, name.partition(".")[0]} & KEPT[backend]:
            what = f"{backend} does not keep to this option"
            raise UsageError(what, where=name, hint="Leave it out, or use backend=torch.")


def _changed(section: Section, prefix: str = "") -> Iterator[str]:
    default = type(section)()
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _changed(value, f"{prefix}{name}.")
        elif value != getattr(default, name):
            yield f"{prefix}{name}"
