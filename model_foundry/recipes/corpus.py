"""Pretraining prepared: text or shards, the model it starts from, and every batch as a function of the step.

Packs text into shards where that has not been done, and draws fresh weights; both are kept in the work folder under
names that their content decides, so that another run, or the same one resumed, finds them. Loads no weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model_foundry.checkpoint.lock import FileLock, LockHeldError
from model_foundry.config.pretrain import CorpusSection, ExperimentConfig
from model_foundry.config.section import asked_for
from model_foundry.data.files import local_path
from model_foundry.data.shards.build import PackProgress, build_shards
from model_foundry.data.shards.format import INDEX_NAME
from model_foundry.data.shards.loader import BinLoader
from model_foundry.data.shards.overlap import count_shared
from model_foundry.data.shards.plan import PackOptions, Part, RendererSource, list_inputs, make_plan
from model_foundry.data.shards.reader import PackedShards
from model_foundry.errors import ConfigError, DataError
from model_foundry.evals.generation import Question
from model_foundry.models.finder import ModelSource
from model_foundry.models.folder import fingerprint, read_config
from model_foundry.recipes.fresh import fresh_source, work_folder
from model_foundry.recipes.optimisation import adam_params, learning_rate, require_saves
from model_foundry.recipes.preparation import VALIDATION_BATCH_TOKENS, context_of, weighted
from model_foundry.recipes.schedule import LearningRate
from model_foundry.recipes.work import HeldOutText, TokenLosses
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum, LoraConfig, OptimParams, SamplingParams

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 10.0
PACKING_TIMEOUT_S = 6 * 3600.0
_READ_WHEN_PACKING = ("text_field", "separator", "bad_records")


@dataclass(frozen=True)
class PreparedCorpus(TokenLosses):
    """What pretraining is made of; a `Work`.

    Attributes:
        train: packed text; its chunks are the rows of a batch.
        validation: held-out text, or None.
        num_chunks: trained on in the whole run, over all epochs.
        num_shared: documents that are held out and trained on as well.
    """

    config: ExperimentConfig
    source: ModelSource
    model_fingerprint: str
    renderer: Renderer
    now: datetime
    train: PackedShards
    validation: PackedShards | None
    num_chunks: int
    num_shared: int
    learning_rate: LearningRate
    lora: LoraConfig | None = None
    gate: None = None
    questions: tuple[Question, ...] = ()

    @property
    def chunks_per_step(self) -> int:
        training = self.config.training
        return training.batch_size * training.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        return -(-self.num_chunks // self.chunks_per_step)

    @property
    def epochs(self) -> float:
        return self.num_chunks / self.train.num_bins

    @property
    def micro_batches_per_epoch(self) -> int:
        return -(-self.train.num_bins // self.config.training.batch_size)

    @property
    def tokens_per_epoch(self) -> int:
        return self.train.index.num_tokens

    def epoch_at(self, step: int) -> float:
        return min(step * self.chunks_per_step, self.num_chunks) / self.train.num_bins

    def micro_batches(self, step: int) -> list[list[Datum]]:
        """The chunks of a step, weighted so that the summed loss is the mean over its tokens."""
        first, size = (step - 1) * self.chunks_per_step, self.config.training.batch_size
        last = min(first + self.chunks_per_step, self.num_chunks)
        loader = self._loader
        batches = [
            [datum for place in range(start, min(start + size, last)) for datum in loader.datums(place)]
            for start in range(first, last, size)
        ]
        share = 1.0 / sum(datum.num_tokens for batch in batches for datum in batch)
        return [[weighted(datum, share) for datum in batch] for batch in batches if batch]

    @cached_property
    def _loader(self) -> BinLoader:
        data = self.config.data
        return BinLoader(
            self.train,
            seed=self.config.seed,
            shuffle=data.shuffle,
            mask_documents=data.mask_documents,
            num_processes=data.loader_processes,
        )

    def longest_batch(self) -> list[Datum]:
        return self.micro_batches(1)[0]

    def adam_params(self, step: int) -> OptimParams:
        return adam_params(self.config.training, self.learning_rate.at(step))

    @property
    def held_out(self) -> HeldOutText | None:
        return self._held_out

    @cached_property
    def _held_out(self) -> HeldOutText | None:
        if self.validation is None:
            return None
        text, num_targets = [], 0
        for number in range(self._num_measured):
            text += self.validation.bin(number).tokens.tolist()
            num_targets += sum(datum.num_tokens for datum in self._measured(number))
        return HeldOutText(num_targets, self.renderer.tokenizer.decode(text, skip_special=True))

    @property
    def _num_measured(self) -> int:
        """Chunks of the held-out text that are read in one measurement."""
        if self.validation is None:
            return 0
        limit = self.config.evaluation.max_tokens
        chunks = self.validation.num_bins
        return chunks if limit is None else min(chunks, max(1, limit // self.validation.max_length))

    def _measured(self, number: int) -> tuple[Datum, ...]:
        assert self.validation is not None
        return self.validation.datums(number, mask_documents=self.config.data.mask_documents)

    def validation_batches(self) -> Iterator[list[Datum]]:
        if self.held_out is None:
            return
        share, batch, num_tokens = 1.0 / self.held_out.num_tokens, [], 0
        for number in range(self._num_measured):
            for datum in self._measured(number):
                if batch and num_tokens + datum.num_tokens > VALIDATION_BATCH_TOKENS:
                    yield batch
                    batch, num_tokens = [], 0
                batch.append(weighted(datum, share))
                num_tokens += datum.num_tokens
        yield batch

    @property
    def prompts(self) -> tuple[tuple[str, np.ndarray], ...]:
        tokenizer = self.renderer.tokenizer
        return tuple(
            (text, np.array(tokenizer.encode(text, add_special=True) or [_first_id(tokenizer)], dtype=np.int32))
            for text in self.config.evaluation.prompts
        )

    @property
    def sampling(self) -> SamplingParams:
        evaluation = self.config.evaluation
        return SamplingParams(
            max_tokens=evaluation.max_new_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=self.config.seed,
            stop_token_ids=self.renderer.stop_token_ids,
        )

    def probe(self) -> np.ndarray:
        return self.train.bin(0).tokens[:64]

    def token_counts(self) -> np.ndarray:
        return self.train.token_counts(self.renderer.tokenizer.vocab_size)

    def data_files(self) -> dict[str, Path]:
        """The index of each set of shards: it holds the hash of every shard, and of the text that they were made of."""
        folders = {"train_file": self.train, "validation_file": self.validation}
        return {role: shards.folder / INDEX_NAME for role, shards in folders.items() if shards is not None}

    def data_summary(self) -> dict[str, Any]:
        parts = {"train": self.train, "validation": self.validation}
        summary = {role: _summary(self._named(role), shards) for role, shards in parts.items() if shards is not None}
        if self.validation is not None:
            measured = min(self._num_measured * self.validation.max_length, self.validation.index.num_tokens)
            summary["validation"]["measured_tokens"] = measured
        if self.num_shared:
            summary["validation"]["trained_on_too"] = self.num_shared
        return summary

    def _named(self, role: str) -> str:
        data = self.config.data
        return str((data.validation_file if role == "validation" else None) or data.train_file)

    def engine_options(self) -> Mapping[str, Any]:
        model, training = self.config.model, self.config.training
        return {
            "device": model.device,
            "dtype": model.dtype,
            "attention": model.attention,
            "num_threads": training.num_threads,
            "micro_batch_tokens": training.micro_batch_tokens,
            "gradient_checkpointing": training.gradient_checkpointing,
        }


def prepare_corpus(config: ExperimentConfig, *, now: datetime) -> PreparedCorpus:
    """Pack the text, draw the weights, count the steps.

    Raises:
        ConfigError: no text is named, or lengths do not go together. DataError, ModelError: as the parts raise them.
    """
    if config.data.train_file is None:
        raise ConfigError("no training text is named", where="data.train_file", hint="Set data.train_file=FILE|FOLDER.")
    source = fresh_source(config)
    tokenizer = Tokenizer.load(source.folder)
    max_length = _max_length(config, read_config(source.folder))
    corpus = _Corpus(config, source.folder, tokenizer, max_length)
    if corpus.is_packed(config.data.train_file):
        train, validation = corpus.open(config.data.train_file, "all"), None
        _require_unasked(config.data, corpus)
    else:
        shares = config.data.validation_file is None and config.data.validation_share > 0
        train = corpus.open(config.data.train_file, "train" if shares else "all")
        validation = corpus.open(config.data.train_file, "validation") if shares else None
    if config.data.validation_file is not None:
        validation = corpus.open(config.data.validation_file, "all")
    if validation is None:
        _require_unmeasured(config, is_packed=corpus.is_packed(config.data.train_file))
    num_chunks = _count_chunks(config, train)
    steps = -(-num_chunks // (config.training.batch_size * config.training.gradient_accumulation_steps))
    require_saves(config.training, steps)
    prepared = PreparedCorpus(
        config=config,
        source=source,
        model_fingerprint=fingerprint(source.folder),
        renderer=Renderer(tokenizer, now=now),
        now=now,
        train=train,
        validation=validation,
        num_chunks=num_chunks,
        num_shared=0 if config.data.validation_file is None else _count_shared(train, validation),
        learning_rate=learning_rate(config.training, steps),
    )
    _require_room(prepared, context_of(read_config(source.folder)))
    return prepared


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Finds or makes the shards of a text."""

    config: ExperimentConfig
    tokenizer_folder: Path
    tokenizer: Tokenizer
    max_length: int

    @staticmethod
    def is_packed(named: Path | str) -> bool:
        path = local_path(named)
        return path.is_dir() and (path / INDEX_NAME).is_file()

    def open(self, named: Path | str, part: Part) -> PackedShards:
        """The shards that `named` is, or those made of the text that it is.

        Raises:
            DataError: shards of rows, of another tokenizer, or damaged; text that cannot be packed.
        """
        folder = local_path(named) if self.is_packed(named) else self._packed(local_path(named), part)
        shards = PackedShards.open(folder, tokenizer=self.tokenizer.fingerprint, max_length=None)
        if shards.index.kind != "text":
            hint = "Pack text with: foundry data pack FILE --out FOLDER kind=text"
            raise DataError("the shards hold rows; pretraining reads a stream of text", where=str(folder), hint=hint)
        shards = PackedShards.open(folder, max_length=self.max_length, check_hashes=True)
        if shards.index.num_tokens < 2:
            raise DataError("one token is nothing to learn from", where=str(folder))
        return shards

    def _packed(self, source: Path, part: Part) -> Path:
        data = self.config.data
        options = PackOptions(
            kind="text", max_length=self.max_length, bad_records=data.bad_records, text_field=data.text_field,
            separator=data.separator, part=part,
            validation_share=data.validation_share if part != "all" else 0.0,
        )  # fmt: skip
        plan = make_plan(source, list_inputs(source), options, Renderer(self.tokenizer))
        digest = hashlib.sha256(json.dumps(plan.as_json(), sort_keys=True).encode()).hexdigest()
        out = work_folder(self.config) / "shards" / f"{part}-{digest[:16]}"
        with _alone(out):
            return self._pack_into(out, source, part, options)

    def _pack_into(self, out: Path, source: Path, part: Part, options: PackOptions) -> Path:
        data = self.config.data
        if not out.exists():
            logger.info("%s: packing the %s text into %s", source, part if part != "all" else "whole", out)
        report = build_shards(
            source, out, options, RendererSource(self.tokenizer_folder), num_processes=data.processes,
            on_progress=_progress(), say=logger.info,
        )  # fmt: skip
        for reason, count in report.index.counts.lost.items():
            logger.warning("%s: %s documents left out: %s", source, f"{count:,}", reason)
        return out


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One run packs a text; others that want the same wait for it, and say so.

    Raises:
        DataError: it takes another one too long.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = FileLock.acquire(path, wait_seconds=0.1)
    except LockHeldError as held:
        logger.info("%s is packing the same text; waiting for it", held.holder)
        try:
            lock = FileLock.acquire(path, wait_seconds=PACKING_TIMEOUT_S)
        except LockHeldError:
            what, hint = f"{held.holder} has been packing it for hours", "Stop that process, or set another work_dir."
            raise DataError(what, where=str(out), hint=hint) from None
    with lock:
        yield


def _progress() -> Any:
    """Logs how far the packing is, every few seconds."""
    said = 0.0

    def progress(now: PackProgress) -> None:
        nonlocal said
        if now.seconds - said < SECONDS_BETWEEN_LINES:
            return
        said = now.seconds
        rate = now.num_tokens / now.seconds
        done = f"{now.num_bytes / 1e6:,.1f} of {now.total_bytes / 1e6:,.1f} MB"
        logger.info("packing: %s, %s tokens, %s tokens/s", done, f"{now.num_tokens:,}", f"{rate:,.0f}")

    return progress


def _first_id(tokenizer: Tokenizer) -> int:
    return tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id or 0


def _max_length(config: ExperimentConfig, model: Mapping[str, Any]) -> int:
    context, wanted = context_of(model), config.data.max_length
    if wanted is None and context is None:
        raise ConfigError("the model names no context", where="data.max_length", hint="Say how long a chunk is.")
    if wanted is not None and context is not None and wanted > context:
        what = f"{wanted:,} is more than the model's context of {context:,} tokens"
        raise ConfigError(what, where="data.max_length", hint=f"Set data.max_length={context}.")
    return wanted or context or 0


def _require_room(prepared: PreparedCorpus, context: int | None) -> None:
    """Samples that would run out of the model's context are refused now rather than at the first measurement."""
    new = prepared.config.evaluation.max_new_tokens
    longest = max((len(tokens) for _, tokens in prepared.prompts), default=0)
    if longest and context is not None and longest + new > context:
        what = f"a prompt of {longest} tokens and {new} new ones exceed the model's context of {context:,}"
        raise ConfigError(what, where="evaluation.max_new_tokens", hint="Lower it, or shorten the prompts.")


def _require_unasked(named: CorpusSection, corpus: _Corpus) -> None:
    """Refuse what is read when text is packed where all of it is packed already."""
    if named.validation_file is not None and not corpus.is_packed(named.validation_file):
        return
    for name in _READ_WHEN_PACKING:
        if getattr(named, name) != CorpusSection.model_fields[name].default:
            what = f"{name} is read when text is packed, and {named.train_file} is packed already"
            raise ConfigError(what, where=f"data.{name}", hint="Leave it out, or name the text itself.")


def _require_unmeasured(config: ExperimentConfig, *, is_packed: bool) -> None:
    """A bound on held-out text is refused where there is none, before the run rather than after."""
    for name in ("bits_per_byte", "below_unigram"):
        if asked_for(config.criteria, name):
            raise ConfigError(
                "there is no held-out text to measure it on", where=f"criteria.{name}",
                hint="Set data.validation_file or data.validation_share (packed shards are not split), or it to null.",
            )  # fmt: skip
    why = "packed shards are not split, and " if is_packed and config.data.validation_share else ""
    logger.warning("%sno text is held out: the loss on text that is not trained on will not be known", why)


def _count_shared(train: PackedShards, validation: PackedShards | None) -> int:
    """A file of its own may be a copy of what is trained on; a split by content shares nothing, and is not searched."""
    if validation is None:
        return 0
    shared = count_shared(train, validation)
    if shared:
        words = "%s of %s held-out documents are trained on too: what is measured on them is memory"
        logger.warning(words, f"{shared:,}", f"{validation.index.counts.num_rows:,}")
    return shared


def _count_chunks(config: ExperimentConfig, train: PackedShards) -> int:
    """Chunks of the whole run, from whichever of steps, tokens or epochs is given."""
    training = config.training
    per_step = training.batch_size * training.gradient_accumulation_steps
    if train.index.num_tokens % train.max_length == 1 and per_step == 1:
        what = f"the last chunk of {train.index.num_tokens:,} tokens is one token, which is a step without a target"
        raise ConfigError(what, where="data.max_length", hint="Choose another length, or a larger batch.")
    if training.max_steps is not None:
        return training.max_steps * per_step
    if training.max_tokens is not None:
        return -(-training.max_tokens // train.max_length)
    return max(1, round((training.epochs or 1.0) * train.num_bins))


def _summary(name: str, shards: PackedShards) -> dict[str, Any]:
    stats, counts = shards.stats(), shards.index.counts
    return {
        "file": name,
        "shards": str(shards.folder),
        "kind": "text",
        "documents": stats.num_rows,
        "tokens": stats.num_tokens,
        "chunks": stats.num_bins,
        "chunk_tokens": shards.max_length,
        "longest_document_tokens": stats.lengths[-1],
        "median_document_tokens": stats.lengths[3],
        "lost": dict(counts.lost),
        "first_lost": list(counts.first_lost),
    }
