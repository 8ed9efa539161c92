"""The frozen schema of every command's configuration. The text under a field is its help everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from model_foundry.config.gate import GateSection
from model_foundry.config.section import (
    EngineName,
    Fraction,
    InputPath,
    NonNegativeInt,
    PositiveInt,
    RowsPath,
    Section,
    TemplateName,
    asked_for,
    broken_rule,
)


class ModelSection(Section):
    name: str = "smollm2-135m-instruct"
    """A known name, a Hugging Face folder, a GGUF file, a run directory or a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type. auto: bfloat16 where it is multiplied natively, else float32. float16 trains with a loss scale."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to run. auto: CUDA, then MPS, then the CPU."""
    implementation: Literal["auto", "native", "transformers"] = "auto"
    """auto: our decoder where it knows the architecture, transformers elsewhere."""
    attention: Literal["auto", "flash", "sdpa", "eager"] = "auto"
    """Attention by eager blocks, torch's sdpa or flash; auto: eager on a CPU, else sdpa. A replacement is said."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4: the frozen linear layers in four bits, under adapters (QLoRA). Needs the extra quant, and a CPU or CUDA."""
    template: TemplateName = "auto"
    """Chat template: auto (the model's own), chatml, llama3, alpaca, or the path of a .jinja file."""


class LoraSection(Section):
    enabled: bool = True
    """Train a low-rank adapter; false trains every weight."""
    r: PositiveInt = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Module name endings, a regular expression over full names, or all-linear (every linear layer but the head)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adaptation (Liu et al. 2024)."""


class DataSection(Section):
    train_file: RowsPath | None = None
    """Training rows: JSONL, JSON, CSV, Parquet or text, a folder of these, or hf://datasets/ORG/NAME. Required."""
    validation_file: RowsPath | None = None
    """Validation rows for the loss during training."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "input_output", "prompt_completion", "text", "preference", "kto"
    ] = "auto"
    """Row format; auto detects it from the first row and says which it was."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest row in tokens."""
    overlength: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer row. Every case is counted and reported."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Whose tokens carry the loss; an assistant turn includes its end-of-turn token."""
    packing: bool = False
    """Fill batches by tokens instead of rows: each batch holds batch_size bins of max_length tokens."""
    shuffle: bool = True
    """Shuffle every epoch by seed."""
    allow_control_tokens: bool = False
    """Let rows through whose text spells control tokens, as plain text. Without it the gate refuses them."""


class TrainingSection(Section):
    alternatives: ClassVar[tuple[str, ...]] = ("epochs", "max_steps")

    epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the training rows; a max_steps beside it, or given later, goes before it."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, in place of epochs."""
    batch_size: PositiveInt = 8
    """Rows (bins with packing) a forward and backward pass."""
    gradient_accumulation_steps: PositiveInt = 1
    """Passes an optimizer step. 1 × 8 equals 8 × 1 up to rounding."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 2e-4
    """Peak learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after warm-up. wsd: warm-up, stable, linear decay over the last decay_ratio."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; default warmup_ratio of all steps."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps that warm up when warmup_steps is not given."""
    decay_ratio: Fraction = 0.2
    """Share of the steps that decay under wsd."""
    min_lr_ratio: Fraction = 0.0
    """The schedule ends at this share of learning_rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices take orthogonal momentum steps, the rest AdamW's, at AdamW's rates. Not for adapters."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's momentum; read with optimizer muon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices, embeddings included; norms and biases have none."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's first-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's second-moment decay."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm here; 0 switches clipping off."""
    max_skipped_steps: NonNegativeInt = 5
    """Stop after more steps in a row with NaN or infinite gradients; not counted are those a loss scale may mend."""
    micro_batch_tokens: PositiveInt | None = None
    """Split a pass into pieces of at most this many tokens (same gradients up to rounding); default: the whole
    batch, or what the plan finds to fit the memory that is free when the run begins."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, a third more arithmetic."""
    num_threads: PositiveInt | None = None
    """CPU threads; default every core. Part of what makes a CPU run bit-reproducible."""
    save_steps: NonNegativeInt = 50
    """Save a checkpoint every so many steps; 0 saves only the end."""
    save_schedule: Literal["linear", "log", "explicit"] = "linear"
    """linear: every save_steps. log: at powers of two. explicit: at save_at."""
    save_at: tuple[PositiveInt, ...] = ()
    """Steps to save at under the explicit schedule."""
    save_total_limit: PositiveInt | None = 2
    """Keep this many newest checkpoints beside final; null keeps all."""
    eval_steps: NonNegativeInt = 0
    """Measure the validation loss every so many steps; 0 only at the start and the end."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.save_schedule == "explicit" and not self.save_at:
            raise broken_rule("save_schedule", "training.save_schedule explicit needs training.save_at")
        if self.save_at and self.save_schedule != "explicit":
            raise broken_rule("save_at", "training.save_at is read only with training.save_schedule explicit")
        if self.max_steps is not None and (self.warmup_steps or 0) > self.max_steps:
            raise broken_rule(
                "warmup_steps", f"training.warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}"
            )
        if self.lr_scheduler == "wsd" and self.warmup_steps is None and self.warmup_ratio + self.decay_ratio > 1:
            raise broken_rule("decay_ratio", "training.warmup_ratio and training.decay_ratio add up to more than 1")
        return self


DEFAULT_SUITES = ("general",)


class EvaluationSection(Section):
    file: InputPath | None = None
    """Held-out questions with expected answers (JSONL, prompt/answer); asked before and after training."""
    max_new_tokens: PositiveInt = 64
    """Longest answer in tokens."""
    batch_size: PositiveInt = 16
    """Questions answered at once."""
    system: str | None = None
    """System message put before every question."""
    suites: tuple[str, ...] = DEFAULT_SUITES
    """Suites asked before and after as well, by name or as paths of YAML files; [] asks none (docs/evaluation.md)."""
    max_rows: PositiveInt | None = None
    """Rows of a suite at most: the first ones. How many are left out is said. Questions of `file` are all asked."""
    noise: bool = True
    """Ask the questions, and suites that are answered in words, a second time: what moves then is noise."""


class CriteriaSection(Section):
    loss_fall: Annotated[float, Field(ge=0, lt=1)] | None = 0.05
    """The training loss must fall by more than this share; null does not check."""
    answers_improved: Fraction | None = 0.30
    """More than this share of held-out answers must improve, beyond the noise floor; null does not check."""
    memory_saving: Fraction | None = 0.30
    """LoRA must use this share less memory than full fine-tuning, both measured; null does not check."""
    parameters_changed: Fraction | None = 0.80
    """More than this share of LoRA parameters must change; null does not check."""
    replay_steps: NonNegativeInt = 0
    """Repeat up to this many last steps from a saved checkpoint and require the same bits; 0 does not check."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """Bounds with units on what suites measure, by suite.metric: {general.accuracy: "> 60 %"}. docs/evaluation.md."""


class MetricCriteriaSection(Section):
    metrics: dict[str, str] = Field(default_factory=dict)
    """Bounds with units on what suites measure, by suite.metric: {general.accuracy: "> 60 %"}. docs/evaluation.md."""


class LoggingSection(Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Console level; the run's own log always holds everything."""
    log_steps: PositiveInt = 1
    """Print a plain progress line every so many steps where there is no terminal; metrics.jsonl has every step."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers beside metrics.jsonl."""
    project: str = "model-foundry"
    """Project or experiment name for the trackers."""


class TrainConfig(Section):
    """Everything `foundry train` reads."""

    method: Literal["sft"] = "sft"
    """Training method. sft: supervised fine-tuning."""
    run_dir: Path = Path("runs/run")
    """Where the run lives."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds initialisation, order and sampling."""
    engine: EngineName = "auto"
    """auto: MLX on Apple silicon where it is installed and computes the model, else torch. mlx: on any machine."""
    model: ModelSection = ModelSection()
    """The model to start from."""
    lora: LoraSection = LoraSection()
    """Low-rank adaptation."""
    data: DataSection = DataSection()
    """Training and validation rows."""
    gate: GateSection = GateSection()
    """What data may hold before it is trained on."""
    training: TrainingSection = TrainingSection()
    """Optimisation, schedule and checkpoints."""
    evaluation: EvaluationSection = EvaluationSection()
    """Questions asked before and after."""
    criteria: CriteriaSection = CriteriaSection()
    """What counts as success; a criterion that fails makes the exit code 1."""
    logging: LoggingSection = LoggingSection()
    """Console, log files and trackers."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.training.optimizer == "muon" and self.lora.enabled:
            raise broken_rule("training.optimizer", "muon trains whole matrices, and lora.enabled is true")
        if self.training.eval_steps and self.data.validation_file is None:
            raise broken_rule("training.eval_steps", "training.eval_steps needs data.validation_file")
        for name, needed in self.unmeasured_criteria().items():
            if asked_for(self.criteria, name):
                raise broken_rule(f"criteria.{name}", f"criteria.{name} needs {needed}; null does not check it")
        return self

    def unmeasured_criteria(self) -> dict[str, str]:
        """Criteria that nothing in this run can measure, each with what it needs."""
        needs = {} if self.evaluation.file is not None else {"answers_improved": "evaluation.file"}
        if not self.lora.enabled:
            needs |= dict.fromkeys(("memory_saving", "parameters_changed"), "lora.enabled: true")
        return {name: needed for name, needed in needs.items() if getattr(self.criteria, name) is not None}


class EvaluateConfig(Section):
    """Everything `foundry evaluate` reads."""

    model: ModelSection = ModelSection()
    """The model, run, adapter, GGUF file or server's URL to ask."""
    against: str = "base"
    """What it is compared with, of the same kinds; base: what it was trained from, where that is known; none."""
    evaluation: EvaluationSection = EvaluationSection()
    """The questions and suites; a run brings its own."""
    criteria: MetricCriteriaSection = MetricCriteriaSection()
    """What counts as success beside the suites' own bounds; what fails makes the exit code 1."""
    out: Path | None = None
    """Folder for evaluation.json and .html; default: evaluation/ in the run, or runs/evaluation/NAME, by suite."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the resampling, and decoding above temperature 0, in place of the suites' own seeds."""
    engine: EngineName = "auto"
    """auto: MLX on Apple silicon where it is installed and computes the model, else torch. mlx: on any machine."""


class ChatConfig(Section):
    """Everything `foundry chat` reads."""

    model: ModelSection = ModelSection()
    """The model, run or checkpoint to talk to."""
    prompt: str | None = None
    """Ask this once, print the answer and exit."""
    system: str | None = None
    """System message."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; default 256, or what the model's context has left."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the distribution to sample from."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the sampling."""
    engine: EngineName = "auto"
    """auto: MLX on Apple silicon where it is installed and computes the model, else torch. mlx: on any machine."""
