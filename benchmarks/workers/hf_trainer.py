"""TRL's SFTTrainer, or transformers' Trainer on packed rows, for one short run.

The loop is the peer's own. Callbacks only read the clock and the logs. `loss_before` and `loss_after` go through the
trainer's own collator and loss on the probe rows, which fit one batch; without a probe they are the first and the last
step's, whose rows are then the same.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.chat_rows import IGNORED, ChatRow, read_rows
from benchmarks.workers.process import StepLog, resident_bytes, run_worker, settle_memory

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


class Recorder(TrainerCallback):
    """Times optimizer steps and saves, and keeps what the trainer logs."""

    def __init__(self, log: StepLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.loaded_bytes = settle_memory()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.stop()
        # Wall-clock time, so that whoever started the process can subtract its own.
        self.log.notes.setdefault("first_step_ended", time.time())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.saved_after.append(len(self.log.ends))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.log.grad_norms.append(float(logs["grad_norm"]))
            self.log.losses.append(float(logs["loss"]))


class CountingLoader:
    """Counts the real tokens of each batch on its way to the trainer. The steps take the batches in order."""

    def __init__(self, collate: Any, log: StepLog) -> None:
        self.collate = collate
        self.log = log
        self.counting = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collate(rows)
        if self.counting:
            mask = batch.get("attention_mask")
            self.log.tokens.append(int(batch["input_ids"].numel() if mask is None else mask.sum()))
        return batch


def pack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rows of a step end to end in one row; positions that start again keep them apart in attention."""
    ids = [token for row in rows for token in row["input_ids"]]
    # The first token of a row must not be predicted from the row before it.
    labels = [label for row in rows for label in [IGNORED, *row["labels"][1:]]]
    positions = [position for row in rows for position in range(len(row["input_ids"]))]
    return {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length as one batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


def as_dataset(rows: list[ChatRow]) -> Dataset:
    return Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})


def common_arguments(spec: dict[str, Any]) -> dict[str, Any]:
    """What a comparison must fix: the task and the reporting. Everything else is the peer's default or `spec`."""
    return {
        "output_dir": f"{spec['scratch']}/out",
        "use_cpu": True,
        "num_train_epochs": 1,
        "per_device_train_batch_size": spec["rows_per_step"],
        "learning_rate": spec["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": spec["seed"],
        **spec.get("arguments", {}),
    }


def build(spec: dict[str, Any], log: StepLog) -> Trainer:
    """A trainer on the given rows; model loading and preparation are not timed."""
    lora = LoraConfig(task_type="CAUSAL_LM", **spec["lora"]) if spec.get("lora") else None
    rows = Dataset.from_json(spec["messages"]) if "messages" in spec else as_dataset(read_rows(spec["rows"]))
    dtype = getattr(torch, spec["dtype"]) if spec.get("dtype") else "auto"
    if spec["trainer"] == "trl":
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**common_arguments(spec), model_init_kwargs={"dtype": dtype})
        trainer: Trainer = SFTTrainer(model=spec["model"], args=arguments, train_dataset=rows, peft_config=lora)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
        # Rows packed by position are kept apart only without a cache.
        model.config.use_cache = False
        if lora:
            model = get_peft_model(model, lora)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common_arguments(spec), remove_unused_columns=False),
            train_dataset=rows,
            data_collator=stack if spec.get("equal_rows") else pack,
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
        )
    trainer.add_callback(Recorder(log))
    trainer.data_collator = CountingLoader(trainer.data_collator, log)
    return trainer


def probe_loss(trainer: Trainer, rows: list[ChatRow]) -> float:
    return float(trainer.evaluate(cast("Any", as_dataset(rows)))["eval_loss"])


def train(spec: dict[str, Any]) -> dict[str, Any]:
    transformers.set_seed(spec["seed"])
    torch.set_num_threads(spec["num_threads"])
    log = StepLog(versions={name: importlib.metadata.version(name) for name in PACKAGES})
    trainer = build(spec, log)
    model = trainer.model
    assert model is not None
    parameters = list(model.parameters())
    log.num_trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    log.num_parameters = sum(parameter.numel() for parameter in parameters)
    before = probe_loss(trainer, read_rows(spec["probe"])) if "probe" in spec else None
    gc.collect()
    counting = trainer.data_collator
    assert isinstance(counting, CountingLoader)
    counting.counting = True
    trainer.train()
    counting.counting = False
    log.peak_bytes = resident_bytes("VmHWM")
    log.loss_before, log.loss_after = log.losses[0], log.losses[-1]
    if before is not None:
        log.loss_before, log.loss_after = before, probe_loss(trainer, read_rows(spec["probe"]))
    # The loader reads one batch ahead, never past the end of the epoch.
    log.tokens = log.tokens[: len(log.seconds)]
    log.notes |= {"dtype": str(next(model.parameters()).dtype), "bf16_autocast": bool(trainer.args.bf16)}
    return log.as_dict()


if __name__ == "__main__":
    run_worker(train)
