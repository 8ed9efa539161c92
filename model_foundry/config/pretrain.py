"""The schema of `foundry train` with `method: pretrain`: a model from nothing, or one trained on, on packed text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.architecture import ArchitectureSection
from model_foundry.config.schema import LoggingSection, TrainingSection
from model_foundry.config.section import (
    EngineName,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    RowsPath,
    Section,
    broken_rule,
)

_SHAPE = tuple(ArchitectureSection.model_fields)


class PretrainModelSection(ArchitectureSection):
    name: str | None = None
    """A model to train on, as everywhere else, in place of one from nothing; its shape is its own."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; weights and moments stay float32. auto: bfloat16 where native. float16 trains with a loss scale."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run. auto: CUDA, then MPS, then the CPU."""
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    """Attention by eager blocks, torch's sdpa or flash; auto: eager on a CPU, else sdpa. A replacement is said."""

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        given = [field for field in _SHAPE if field in self.model_fields_set]
        if self.name is not None and given:
            raise broken_rule(given[0], f"model.{given[0]} describes a model from nothing, and model.name names one")
        return self


class TokenizerSection(Section):
    name: str | None = None
    """A folder of `foundry tokenizer train`, a SentencePiece .model file, or a model whose tokenizer to take."""


class CorpusSection(Section):
    train_file: RowsPath | None = None
    """Text: .txt, .md, JSONL, CSV or Parquet, a folder of these, or a folder of packed shards. Required."""
    validation_file: RowsPath | None = None
    """Held-out text of its own, or packed shards; default a share of train_file."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Share of the documents held out by content hash when validation_file is not given; 0 holds nothing out."""
    max_length: Annotated[int, Field(ge=8)] | None = None
    """Tokens of a chunk; default the model's context."""
    mask_documents: bool = False
    """Keep the documents of a chunk apart: no token sees another document."""
    text_field: str = "text"
    """The field that holds a document's text, in JSON Lines, CSV or Parquet."""
    separator: str | None = None
    """The special token that ends each document; default the tokenizer's end-of-text token."""
    bad_records: Literal["error", "drop"] = "error"
    """Whether records that cannot be used stop the run, or are left out and counted."""
    shuffle: bool = True
    """Shuffle the chunks of every epoch by seed."""
    processes: NonNegativeInt = 0
    """Processes that pack the text; 0 chooses by its size. The result is the same."""
    loader_processes: NonNegativeInt = 0
    """Processes that read chunks ahead of the loop; 0 reads in the loop. The result is the same."""


class PretrainTrainingSection(TrainingSection):
    alternatives: ClassVar[tuple[str, ...]] = ("epochs", "max_steps", "max_tokens")

    epochs: Annotated[float, Field(gt=0)] | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    """Passes over the training text; one where max_steps and max_tokens are not given either."""
    max_tokens: PositiveInt | None = None
    """Tokens to train on in all, instead of epochs or max_steps: steps are what they come to, rounded up."""
    batch_size: PositiveInt = 16
    """Chunks a forward and backward pass."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-3
    """Peak learning rate. 2e-3 suits models of some ten million parameters; larger ones want less."""
    warmup_ratio: Fraction = 0.05
    """Share of the steps that warm up when warmup_steps is not given."""
    min_lr_ratio: Fraction = 0.1
    """The schedule ends at this share of learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's second-moment decay."""
    save_steps: NonNegativeInt = 200
    """Save a checkpoint every so many steps; 0 saves only the end."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the layers by torch.compile. auto: where a few measured passes of a run above ten minutes say it pays."""
    eval_steps: NonNegativeInt = 100
    """Measure the held-out loss and write samples every so many steps; 0 only at the start and the end."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        given = [name for name in self.alternatives if getattr(self, name) is not None]
        if len(given) > 1:
            raise broken_rule(given[-1], f"training.{given[0]} and training.{given[-1]} both say how long to train")
        return self


class SamplesSection(Section):
    prompts: tuple[str, ...] = ()
    """Beginnings that the model goes on with whenever the held-out loss is measured."""
    max_new_tokens: PositiveInt = 48
    """Longest continuation in tokens."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.8
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus of the distribution to sample from."""
    max_tokens: PositiveInt | None = 1_000_000
    """Held-out tokens read in one measurement, from the beginning; null reads all."""


class PretrainCriteriaSection(Section):
    loss_fall: Annotated[float, Field(ge=0, lt=1)] | None = 0.05
    """The training loss must fall by more than this share; null does not check."""
    bits_per_byte: Annotated[float, Field(gt=0)] | None = None
    """Bits per byte of the held-out text at the end, at most; null does not check."""
    below_unigram: Annotated[float, Field(ge=0, lt=1)] | None = 0.05
    """Bits per byte must be this share below what token frequencies alone give; null, or no held-out text: no check."""
    replay_steps: NonNegativeInt = 0
    """Repeat up to this many last steps from a saved checkpoint and require the same bits; 0 does not check."""


class ExperimentConfig(Section):
    """Everything `foundry train` reads with `method: pretrain`."""

    method: Literal["pretrain"] = "pretrain"
    """Training method. pretrain: next-token prediction on text, every weight."""
    run_dir: Path = Path("runs/run")
    """Where the run lives."""
    work_dir: Path | None = None
    """Where packed text and fresh weights are kept, to be used again; default `work` beside run_dir."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds initialisation, order and sampling."""
    engine: EngineName = "auto"
    """auto: MLX on Apple silicon where it is installed and computes the model, else torch. mlx: on any machine."""
    model: PretrainModelSection = PretrainModelSection()
    """The shape of the model, or the model to train on."""
    tokenizer: TokenizerSection = TokenizerSection()
    """The vocabulary."""
    data: CorpusSection = CorpusSection()
    """Training and held-out text."""
    training: PretrainTrainingSection = PretrainTrainingSection()
    """Optimisation, schedule and checkpoints."""
    evaluation: SamplesSection = SamplesSection()
    """What is measured and written while training."""
    criteria: PretrainCriteriaSection = PretrainCriteriaSection()
    """What counts as success; a criterion that fails makes the exit code 1."""
    logging: LoggingSection = LoggingSection()
    """Console, log files and trackers."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.model.name is None and self.tokenizer.name is None:
            raise broken_rule("tokenizer.name", "a model from nothing needs a tokenizer: tokenizer.name=FOLDER")
        context = self.model.max_position_embeddings
        if self.model.name is None and (self.data.max_length or 0) > context:
            what = f"data.max_length {self.data.max_length} is more than model.max_position_embeddings {context}"
            raise broken_rule("data.max_length", what)
        if self.model.name is not None and self.tokenizer.name is not None:
            raise broken_rule("tokenizer.name", "model.name brings its own tokenizer; leave tokenizer.name out")
        return self
