"""From a configuration to everything a run needs before its first step: model, renderer, rows, batches, step counts.

Reads files and a tokenizer; loads no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from model_foundry.config.schema import TrainConfig
from model_foundry.data.batches import BatchPlan
from model_foundry.data.files import input_files, local_path
from model_foundry.data.gate.judge import judge
from model_foundry.data.gate.reading import Reading, read_attentively
from model_foundry.data.gate.verdict import GateReport
from model_foundry.data.rows import RowSet
from model_foundry.data.tokenise import TokenisedSet, tokenise_rows
from model_foundry.errors import ConfigError, DataError, ModelError, RunError
from model_foundry.evals.generation import Question, read_questions
from model_foundry.models.finder import ModelSource, resolve_model
from model_foundry.models.folder import fingerprint, read_config
from model_foundry.recipes.gatekeeping import subject_of
from model_foundry.recipes.optimisation import adam_params, count_steps, learning_rate, require_saves
from model_foundry.recipes.schedule import LearningRate
from model_foundry.recipes.work import HeldOutText, TokenLosses
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Datum, LoraConfig, OptimParams, SamplingParams

logger = logging.getLogger(__name__)
VALIDATION_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Rows as they are trained on, and as the gate judges them: pairs are judged answer by answer."""

    data: TokenisedSet
    rendered: TokenisedSet


Tokenise = Callable[[TrainConfig, Reading, Renderer], Tokenised]


@dataclass(frozen=True)
class Prepared(TokenLosses):
    """What fine-tuning on rows is made of; a `Work`.

    `now` is the day its template may print, the same on every resume; `gate` is what the gate found in the rows.
    """

    config: TrainConfig
    source: ModelSource
    model_fingerprint: str
    renderer: Renderer
    now: datetime
    train: TokenisedSet
    validation: TokenisedSet | None
    questions: tuple[Question, ...]
    batches: BatchPlan
    num_micro_batches: int
    total_steps: int
    learning_rate: LearningRate
    gate: GateReport
    data_formats: Mapping[str, str]
    data_paths: Mapping[str, Path]

    @property
    def lora(self) -> LoraConfig | None:
        """The adapter to train as a value, or None for full fine-tuning."""
        section = self.config.lora
        if not section.enabled:
            return None
        return LoraConfig(
            r=section.r,
            lora_alpha=section.lora_alpha,
            lora_dropout=section.lora_dropout,
            target_modules=section.target_modules,
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
        )

    def positions(self, step: int) -> range:
        """The micro-batches of step 1, 2, …; the last step of a whole number of epochs may have fewer."""
        per_step = self.config.training.gradient_accumulation_steps
        return range((step - 1) * per_step, min(step * per_step, self.num_micro_batches))

    def micro_batches(self, step: int) -> list[list[Datum]]:
        """The rows of a step, weighted so that the summed loss is the mean over its trained tokens."""
        batches = [[self.train.datums[row] for row in self.batches.rows(p)] for p in self.positions(step)]
        total = self.weight_of([datum for batch in batches for datum in batch])
        return [[weighted(datum, 1.0 / total) for datum in batch] for batch in batches]

    def weight_of(self, data: Sequence[Datum]) -> float:
        """What a step's loss is divided by."""
        return sum(float(datum.loss_inputs["weights"].sum()) for datum in data)

    def longest_batch(self) -> list[Datum]:
        """The rows of the batch with the most tokens in the whole run: a later epoch may put longer ones together."""
        position = self.batches.longest_batch_position(num_batches=self.num_micro_batches)
        batch = [self.train.datums[row] for row in self.batches.rows(position)]
        return [weighted(datum, 1.0 / self.weight_of(batch)) for datum in batch]

    def adam_params(self, step: int) -> OptimParams:
        return adam_params(self.config.training, self.learning_rate.at(step))

    @property
    def epochs(self) -> float:
        return self.num_micro_batches / self.batches.num_batches_per_epoch

    @property
    def micro_batches_per_epoch(self) -> int:
        return self.batches.num_batches_per_epoch

    @property
    def tokens_per_epoch(self) -> int:
        return self.train.num_tokens

    def epoch_at(self, step: int) -> float:
        return self.positions(step).stop / self.batches.num_batches_per_epoch

    @property
    def held_out(self) -> HeldOutText | None:
        return None if self.validation is None else HeldOutText(self.validation.num_tokens)

    def validation_batches(self) -> Iterator[list[Datum]]:
        """The validation rows in order, in batches of at most VALIDATION_BATCH_TOKENS tokens."""
        if self.validation is None:
            return
        share, batch = 1.0 / self.weight_of(self.validation.datums), []
        for datum in self.validation.datums:
            if batch and sum(d.num_tokens for d in batch) + datum.num_tokens > VALIDATION_BATCH_TOKENS:
                yield batch
                batch = []
            batch.append(weighted(datum, share))
        yield batch

    @property
    def prompts(self) -> tuple[tuple[str, np.ndarray], ...]:
        return ()

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(stop_token_ids=self.renderer.stop_token_ids)

    def probe(self) -> np.ndarray:
        tokens = self.train.datums[0].tokens
        return tokens[: max(1, len(tokens) // 2)]

    def token_counts(self) -> np.ndarray:
        counts = np.zeros(self.renderer.tokenizer.vocab_size, dtype=np.int64)
        for datum in self.train.datums:
            np.add.at(counts, datum.loss_inputs["target_tokens"], 1)
        return counts

    def engine_options(self) -> Mapping[str, Any]:
        model, training = self.config.model, self.config.training
        return {
            "device": model.device,
            "dtype": model.dtype,
            "implementation": model.implementation,
            "attention": model.attention,
            "quantization": model.quantization,
            "num_threads": training.num_threads,
            "micro_batch_tokens": training.micro_batch_tokens,
            "gradient_checkpointing": training.gradient_checkpointing,
        }

    def data_files(self) -> dict[str, Path]:
        """Every file that decides the outcome, by its field; the files of a folder by field and name."""
        files: dict[str, Path | None] = {"questions": self.config.evaluation.file}
        for role, path in self.data_paths.items():
            below = path.is_dir()
            files |= {f"{role} {file.relative_to(path)}" if below else role: file for file in input_files(path)}
        template = Path(self.config.model.template)
        files["template"] = template if template.suffix == ".jinja" else None
        adapter = self.source.adapter
        files["adapter"] = None if adapter is None else adapter / "adapter_model.safetensors"
        return {role: path for role, path in files.items() if path is not None}

    def data_summary(self) -> dict[str, Any]:
        """Counts of each file, for plans and reports."""
        files = {"train": (self.config.data.train_file, self.train)}
        if self.validation is not None:
            files["validation"] = (self.config.data.validation_file, self.validation)
        summary: dict[str, Any] = {
            role: {
                "file": str(path),
                "format": self.data_formats[role],
                "rows": data.num_rows,
                "kept": len(data.datums),
                "dropped": data.num_dropped,
                "truncated": data.num_truncated,
                "escaped": data.num_escaped,
                "tokens": data.num_tokens,
                "trained_tokens": data.num_trained_tokens,
                "longest_row_tokens": int(data.lengths.max()),
                "reasons": dict(data.reasons),
                "first_dropped": list(data.first_dropped),
            }
            for role, (path, data) in files.items()
        }
        if self.questions:
            summary["heldout"] = {"file": str(self.config.evaluation.file), "rows": len(self.questions)}
        return summary


def weighted(datum: Datum, factor: float) -> Datum:
    weights = datum.loss_inputs["weights"] * factor
    return replace(datum, loss_inputs={**datum.loss_inputs, "weights": weights.astype("float32")})


def tokenised_rows(config: TrainConfig, reading: Reading, renderer: Renderer) -> Tokenised:
    """Rows to imitate.

    Raises:
        DataError: as `tokenise_rows`.
    """
    rows, data = reading.require(), config.data
    made = tokenise_rows(rows, renderer, max_length=data.max_length, overlength=data.overlength, train_on=data.train_on)
    say_what_became(rows, made, max_length=data.max_length)
    return Tokenised(made, made)


P = TypeVar("P", bound=Prepared)


def prepare(config: TrainConfig, *, now: datetime) -> Prepared:
    """Everything that fine-tuning on rows needs before its first step; errors as for `prepare_as`."""
    return prepare_as(Prepared, config, now=now, tokenise=tokenised_rows)


def prepare_as(kind: type[P], config: TrainConfig, *, now: datetime, tokenise: Tokenise) -> P:
    """Find the model, read and render the rows, judge them, and count the steps.

    Args:
        kind: the method's work.
        tokenise: makes its datums out of rows.

    Raises:
        ConfigError: no training file. DataError, ModelError, TemplateError: as the parts raise them.
    """
    if config.data.train_file is None:
        raise ConfigError("no training rows are named", where="data.train_file", hint="Set data.train_file=FILE.jsonl.")
    source = resolve_model(config.model.name, say=logger.info)
    if source.adapter is not None and not config.lora.enabled:
        raise ConfigError(
            f"{config.model.name} is an adapter, and every weight is to be trained", where="lora.enabled",
            hint="Train the adapter on with lora.enabled=true, or start from a model.",
        )  # fmt: skip
    renderer = Renderer(Tokenizer.load(source.folder), config.model.template, now=now)
    formats: dict[str, str] = {}
    paths: dict[str, Path] = {}

    def read(role: str, named: Path | str) -> tuple[Reading, Tokenised]:
        path = paths[f"{role}_file"] = local_path(named)
        try:
            reading = read_attentively(path, format=config.data.format)
        except DataError as error:
            if path.exists():
                raise
            raise DataError(error.what, where=error.where, hint=f"Check data.{role}_file.") from error
        formats[role] = reading.rows.format
        return reading, tokenise(config, reading, renderer)

    reading, train = read("train", config.data.train_file)
    validation, validation_reading = None, None
    if config.data.validation_file is not None:
        validation_reading, validation = read("validation", config.data.validation_file)
    model = read_config(source.folder)
    for tokenised in (train, validation):
        if tokenised is not None:
            _require_fit(tokenised.rendered, model, max_length=config.data.max_length)
    questions: tuple[Question, ...] = ()
    if config.evaluation.file is not None:
        questions = read_questions(config.evaluation.file, system=config.evaluation.system)
        _require_room(questions, renderer, context_of(model), max_new_tokens=config.evaluation.max_new_tokens)
    batches = BatchPlan(
        train.data.lengths,
        batch_size=config.training.batch_size,
        max_length=config.data.max_length,
        packing=config.data.packing,
        shuffle=config.data.shuffle,
        seed=config.seed,
    )
    num_micro_batches, total_steps = count_steps(config.training, batches.num_batches_per_epoch)
    require_saves(config.training, total_steps)
    gate = judge(
        subject_of(config, reading, renderer, validation=validation_reading, questions=questions, data=train.rendered)
    )
    return kind(
        config=config,
        source=source,
        model_fingerprint=fingerprint(source.folder),
        renderer=renderer,
        now=now,
        train=train.data,
        validation=None if validation is None else validation.data,
        questions=questions,
        batches=batches,
        num_micro_batches=num_micro_batches,
        total_steps=total_steps,
        learning_rate=learning_rate(config.training, total_steps),
        gate=gate,
        data_formats=formats,
        data_paths=paths,
    )


def say_what_became(rows: RowSet, tokenised: TokenisedSet, *, max_length: int, noun: str = "rows") -> None:
    """Rows kept and lost, and why, to the log."""
    path = rows.path
    logger.info(
        "%s: %s %s of format %s, %s kept, %s tokens, %s trained",
        path, f"{tokenised.num_rows:,}", noun, rows.format, f"{len(tokenised.datums):,}",
        f"{tokenised.num_tokens:,}", f"{tokenised.num_trained_tokens:,}",
    )  # fmt: skip
    for reason, count in tokenised.reasons.items():
        logger.warning("%s: %s %s left out: %s", path, f"{count:,}", noun, reason)
    if tokenised.num_truncated:
        logger.warning("%s: %s %s truncated to %s tokens", path, f"{tokenised.num_truncated:,}", noun, max_length)
    if tokenised.num_escaped:
        logger.warning("%s: control tokens in %s %s encoded as plain text", path, f"{tokenised.num_escaped:,}", noun)
    for reason, count in rows.skipped_files.items():
        logger.warning("%s: files not read: %s %s", path, f"{count:,}", reason)
    if rows.ignored_fields:
        logger.warning("%s: fields that are not read: %s", path, ", ".join(sorted(rows.ignored_fields)))


def _require_fit(data: TokenisedSet, model: Mapping[str, Any], *, max_length: int) -> None:
    """Refuse rows that the model cannot read, before hours are spent on those that it can.

    Raises:
        ConfigError: a row is longer than the model's context. ModelError: a token is not in its vocabulary.
    """
    context = context_of(model)
    longest = int(data.lengths.argmax())
    if context is not None and data.datums[longest].num_tokens > context:
        raise ConfigError(
            f"{max_length:,} is more than the model's context of {context:,} tokens, and {data.sources[longest]} has "
            f"{data.datums[longest].num_tokens:,}", where="data.max_length", hint=f"Set data.max_length={context}.",
        )  # fmt: skip
    vocabulary = model.get("vocab_size")
    for source, datum in zip(data.sources, data.datums, strict=True):
        highest = int(max(datum.tokens.max(), datum.loss_inputs["target_tokens"].max()))
        if isinstance(vocabulary, int) and highest >= vocabulary:
            raise ModelError(
                f"the tokenizer gives token {highest}, and the model knows {vocabulary:,} tokens", where=source,
                hint="Use the tokenizer that the model was trained with.",
            )  # fmt: skip


def _require_room(
    questions: Sequence[Question], renderer: Renderer, context: int | None, *, max_new_tokens: int
) -> None:
    """Refuse questions whose answers would run out of the model's context, before training rather than after.

    Raises:
        ConfigError: naming the longest question.
    """
    if context is None:
        return
    length, source = max((len(renderer.prompt(question.messages)), question.source) for question in questions)
    if length + max_new_tokens > context:
        raise ConfigError(
            f"{length} tokens of {source} and {max_new_tokens} new ones exceed the model's context of {context:,}",
            where="evaluation.max_new_tokens", hint="Lower it, or shorten the question.",
        )  # fmt: skip


def context_of(model: Mapping[str, Any]) -> int | None:
    """The longest row that a model reads, by its config.json, where that says so."""
    context = model.get("max_position_embeddings") or model.get("n_positions")
    return context if isinstance(context, int) else None


def require_same_data(receipt: Mapping[str, Any], current: Mapping[str, Any], *, where: str) -> None:
    """Refuse to go on when a file or the model changed since the run was started.

    Raises:
        RunError: naming what changed.
    """
    then, now = receipt.get("data", {}), current.get("data", {})
    for role in sorted(then.keys() | now.keys()):
        before, after = then.get(role, {}).get("sha256"), now.get(role, {}).get("sha256")
        if before != after:
            path = (now.get(role) or then[role])["path"]
            hint = "Bring the file back, or start a new run: run_dir=…"
            raise RunError(f"{role} ({path}) has changed since the run was started", where=where, hint=hint)
    if receipt.get("model_fingerprint") != current.get("model_fingerprint"):
        raise RunError("the base model has changed since the run was started", where=where, hint="Start a new run.")
