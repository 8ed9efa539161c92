"""TRL's DPOTrainer for one short run, on ids that are given.

The loop, the collator and the loss are the peer's own; callbacks read the clock and the logs. `loss_after` is the loss
of the first step's pairs at the end, through the trainer's own evaluation.
"""

from __future__ import annotations

import gc
import importlib.metadata
import time
from typing import Any, cast

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from benchmarks.workers.hf_trainer import PACKAGES, CountingLoader, Recorder, common_arguments
from benchmarks.workers.process import StepLog, resident_bytes, run_worker


class FirstLogps(Recorder):
    """Keeps what the first step found of the better answers."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs, **kwargs)
        if logs and "logps/chosen" in logs:
            self.log.notes.setdefault("first_logps", float(logs["logps/chosen"]))


def build(spec: dict[str, Any], log: StepLog) -> DPOTrainer:
    """A trainer made on a row of text, whose data is then replaced by the ids that everybody gets."""
    arguments = DPOConfig(
        **common_arguments(spec), max_length=None, train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": getattr(torch, spec["dtype"])},
    )  # fmt: skip
    text = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
    lora = LoraConfig(task_type="CAUSAL_LM", **spec["lora"])
    trainer = DPOTrainer(model=spec["model"], args=arguments, train_dataset=text, peft_config=lora)
    trainer.add_callback(FirstLogps(log))
    return trainer


def train(spec: dict[str, Any]) -> dict[str, Any]:
    transformers.set_seed(spec["seed"])
    torch.set_num_threads(spec["num_threads"])
    log = StepLog(versions={name: importlib.metadata.version(name) for name in PACKAGES})
    trainer = build(spec, log)
    size = spec["rows_per_step"]
    ids = cast("Dataset", Dataset.from_json(spec["pairs"]))
    log.notes["num_pairs"], log.notes["reference_seconds"] = len(ids), 0.0
    if trainer.precompute_ref_logps:
        started = time.perf_counter()
        ids = trainer._precompute_ref_logps(ids, "train", size)
        log.notes["reference_seconds"] = time.perf_counter() - started
    trainer.train_dataset = ids
    counting = CountingLoader(trainer.data_collator, log)
    trainer.data_collator = cast("Any", counting)
    parameters = list(cast("torch.nn.Module", trainer.model).parameters())
    log.num_trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    log.num_parameters = sum(parameter.numel() for parameter in parameters)
    gc.collect()
    counting.counting = True
    trainer.train()
    counting.counting = False
    log.peak_bytes = resident_bytes("VmHWM")
    log.loss_before = log.losses[0]
    first = ids.select(range(size))
    # DPOTrainer's own `evaluate` would tokenise them first.
    log.loss_after = float(transformers.Trainer.evaluate(trainer, cast("Any", first))["eval_loss"])
    log.tokens = log.tokens[: len(log.seconds)]
    return log.as_dict()


if __name__ == "__main__":
    run_worker(train)
