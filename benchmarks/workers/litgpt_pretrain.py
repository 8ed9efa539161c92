"""litgpt's `pretrain` for one short run, in an environment of its own; `benchmarks.b4_pretraining` says how to make it.

The loop is litgpt's: `litgpt.pretrain.main` compiles the model, clips, steps, logs and saves. Around it the rows are
handed over, a logger reads its times and losses, and what its own clipping and validation compute is noted. Weights go
through its own conversion. Nothing here imports what that environment lacks.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import lightning  # pyright: ignore[reportMissingImports]
import torch
from lightning.fabric.loggers import Logger  # pyright: ignore[reportMissingImports]
from litgpt import Config, pretrain  # pyright: ignore[reportMissingImports]
from litgpt.args import EvalArgs, TrainArgs  # pyright: ignore[reportMissingImports]
from litgpt.data import DataModule  # pyright: ignore[reportMissingImports]
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from benchmarks.workers.process import StepLog, resident_bytes, run_worker, settle_memory

PACKAGES = ("torch", "litgpt", "lightning")
# What HF Trainer clips at and ours is told to.
MAX_GRAD_NORM = 1.0


class Recorder(Logger):
    """Takes each step's time and loss from what the loop logs."""

    def __init__(self, log: StepLog, *, tokens_per_step: int) -> None:
        self.log, self.tokens_per_step = log, tokens_per_step

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "iter_time" in metrics:
            self.log.seconds.append(metrics["iter_time"])
            self.log.losses.append(metrics["loss"])
            self.log.tokens.append(self.tokens_per_step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class NotingFabric(lightning.Fabric):
    """Notes the norms that clipping computes."""

    step_log: StepLog

    def clip_gradients(self, *args: Any, **kwargs: Any) -> Any:
        norm = super().clip_gradients(*args, **kwargs)
        assert norm is not None
        self.step_log.grad_norms.append(float(norm))
        return norm


class Rows(DataModule):
    """Rows of one length in their order; the probe rows as one batch of validation."""

    def __init__(self, rows: list[list[int]], probe: list[list[int]], batch_size: int) -> None:
        super().__init__()
        self.rows, self.probe, self.batch_size = rows, probe, batch_size

    def connect(self, *args: Any, **kwargs: Any) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.tensor(self.rows), batch_size=self.batch_size)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.tensor(self.probe), batch_size=len(self.probe))  # pyright: ignore[reportArgumentType]


def read_ids(path: str) -> list[list[int]]:
    return [json.loads(line)["input_ids"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def convert(model: Path, folder: Path) -> tuple[Config, int]:
    """A Hugging Face Llama as litgpt's configuration and `lit_model.pth`; and how many parameters it has."""
    facts = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = Config(
        name="b4", block_size=facts["max_position_embeddings"], vocab_size=facts["vocab_size"],
        padded_vocab_size=facts["vocab_size"], n_layer=facts["num_hidden_layers"], n_embd=facts["hidden_size"],
        n_head=facts["num_attention_heads"], n_query_groups=facts["num_key_value_heads"], head_size=facts["head_dim"],
        intermediate_size=facts["intermediate_size"], norm_eps=facts["rms_norm_eps"],
        rope_base=int(facts["rope_theta"]), rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    weights: dict[str, torch.Tensor] = {}
    stored = load_file(model / "model.safetensors")
    copy_weights_hf_llama(config, {}, weights, stored)
    torch.save(weights, folder / "lit_model.pth")
    return config, sum(tensor.numel() for tensor in stored.values())


def train(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["num_threads"])
    rows, probe, scratch = read_ids(spec["rows"]), read_ids(spec["probe"]), Path(spec["scratch"])
    size, length = spec["rows_per_step"], len(rows[0])
    log = StepLog(versions={name: importlib.metadata.version(name) for name in PACKAGES})
    config, log.num_parameters = convert(Path(spec["model"]), scratch)
    log.num_trainable = log.num_parameters
    fabric = NotingFabric(
        accelerator="cpu", devices=1, precision="bf16-mixed", loggers=[Recorder(log, tokens_per_step=size * length)]
    )
    fabric.step_log = log
    probe_losses: list[float] = []
    validate = pretrain.validate

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = validate(*args, **kwargs)
        probe_losses.append(float(loss))
        return loss

    pretrain.validate = noted
    pretrain.save_checkpoint = lambda *args, **kwargs: None  # it is outside the steps, and reads the command line
    rate, num_steps = spec["learning_rate"], len(rows) // size
    log.loaded_bytes = settle_memory()
    pretrain.main(
        fabric=fabric, devices=1, seed=spec["seed"], initial_checkpoint_dir=scratch, resume=False, config=config,
        data=Rows(rows, probe, size), out_dir=scratch / "out", tokenizer_dir=None, tokenizer=None,
        train=TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=size, micro_batch_size=size, lr_warmup_steps=0,
            max_tokens=num_steps * size * (length - 1), max_seq_length=length - 1, max_norm=MAX_GRAD_NORM, min_lr=rate,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=True, final_validation=True),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": rate, "weight_decay": 0.0}},
    )  # fmt: skip
    log.peak_bytes = resident_bytes("VmHWM")
    log.loss_before, log.loss_after = probe_losses[0], probe_losses[-1]
    log.notes |= {"precision": "bf16-mixed", "compiled": True}
    return log.as_dict()


if __name__ == "__main__":
    run_worker(train)
