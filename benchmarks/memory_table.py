"""Peak memory as the plan predicts it beside that of the whole run: two steps by `foundry train` in fresh processes.

Each configuration is a run as people start it, with what its row names: reading, the trial of the longest batch, held
out rows, answers, suites, the reference of pairs, two steps and the saves. The measured figure is the largest resident
set of the process, which the kernel counts to its end. Rows are made so long that they are cut to exactly `max_length`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import BenchmarkError, Options, environment, model_folder, parse, say, table
from model_foundry.models.architecture import Architecture, to_config
from model_foundry.models.initialise import write_fresh_model

AIM = 0.15
FULL, DORA, NF4 = {"lora.enabled": False}, {"lora.use_dora": True}, {"model.quantization": "nf4"}
FLOAT32, SHORT = {"model.dtype": "float32"}, {"training.batch_size": 1, "data.max_length": 64}
CHECKPOINTED = {"training.gradient_checkpointing": True}
DPO = {"method": "dpo", "data.max_length": 448, "training.batch_size": 2}


def rows_of(num: int, num_tokens: int) -> dict[str, Any]:
    return {"training.batch_size": num, "data.max_length": num_tokens}


CONFIGURATIONS: dict[str, Mapping[str, Any]] = {
    "LoRA, 4 rows of 256": rows_of(4, 256),
    "LoRA, 2 rows of 256, float32": rows_of(2, 256) | FLOAT32,
    "LoRA, 1 row of 1,024": rows_of(1, 1024),
    "LoRA, 16 rows of 64": rows_of(16, 64),
    "LoRA, packed to 1,024": rows_of(1, 1024) | {"data.packing": True, "rows": "mixed"},
    "LoRA, 8 rows of 256 in pieces of 512": rows_of(8, 256) | {"training.micro_batch_tokens": 512},
    "LoRA, checkpointing, 8 rows of 256": rows_of(8, 256) | CHECKPOINTED,
    "LoRA, checkpointing, 1 row of 2,048": rows_of(1, 2048) | CHECKPOINTED,
    "LoRA of rank 128, 4 rows of 256": rows_of(4, 256) | {"lora.r": 128},
    "LoRA, 4 rows of 256, 2 threads": rows_of(4, 256) | {"training.num_threads": 2},
    "DoRA, 4 rows of 256": rows_of(4, 256) | DORA,
    "DoRA, 2 rows of 256, float32": rows_of(2, 256) | DORA | FLOAT32,
    "nf4, 4 rows of 256": rows_of(4, 256) | NF4,
    "nf4, 1 row of 1,024": rows_of(1, 1024) | NF4,
    "every weight, 2 rows of 256": rows_of(2, 256) | FULL,
    "every weight, 2 rows of 256, float32": rows_of(2, 256) | FULL | FLOAT32,
    "every weight, checkpointing, 4 rows of 256": rows_of(4, 256) | FULL | CHECKPOINTED,
    "every weight, Muon, 2 rows of 256": rows_of(2, 256) | FULL | {"training.optimizer": "muon"},
    "DPO, LoRA, 2 pairs of 384 + 64": DPO,
    "DPO, every weight, 1 pair of 384 + 64": DPO | FULL | {"training.batch_size": 1},
    "held out: 4 rows of 512": SHORT | {"rows": "held-out", "data.max_length": 512, "training.batch_size": 4},
    "answers: 16 at once, 64 tokens": SHORT | {"rows": "questions"},
    "suites: general": SHORT | {"evaluation.suites": ["general"]},
    "suites: quality, 4 rows": SHORT | {"evaluation.suites": ["quality"], "evaluation.max_rows": 4},
    "saves: every weight, each step": SHORT | FULL | {"training.save_steps": 1},
    "small (19M), every weight, 8 rows of 256": rows_of(8, 256) | FULL | {"model": "small"},
    "small (19M), LoRA, 8 rows of 256": rows_of(8, 256) | {"model": "small"},
    "experts, LoRA, 4 rows of 256": rows_of(4, 256) | {"model": "experts"},
}
"""Fields that differ from the base by name; `rows` and `model` choose what `write_rows` and `write_models` made."""
BASE: Mapping[str, Any] = {
    "model.dtype": "bfloat16", "data.overlength": "truncate", "gate.action": "warn", "training.max_steps": 2,
    "training.num_threads": 1, "training.save_steps": 0, "evaluation.suites": [], "evaluation.max_new_tokens": 64,
    "criteria.loss_fall": None, "criteria.answers_improved": None, "criteria.memory_saving": None,
    "criteria.parameters_changed": None,
}  # fmt: skip


def write_models(folder: Path, *, tokenizer_from: Path) -> dict[str, Path]:
    """Two fresh models with the real one's vocabulary: a small one, and one of experts."""
    common: dict[str, Any] = {"vocab_size": 49_152, "max_position_embeddings": 2048}
    shapes = {
        "small": Architecture("llama", hidden_size=256, num_hidden_layers=8, num_attention_heads=8, **common),
        "experts": Architecture(
            "qwen3_moe", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
            head_dim=64, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=256, router_aux_loss_coef=0.0,
            **common,
        ),
    }  # fmt: skip
    for name, shape in shapes.items():
        write_fresh_model(folder / name, to_config(shape), seed=0, tokenizer_from=tokenizer_from)
    return {name: folder / name for name in shapes}


def write_rows(folder: Path) -> dict[str, dict[str, str]]:
    """Files of rows by the name that a configuration asks for them by, each as fields of `data` or `evaluation`."""
    chance = random.Random(0)
    words = [str(number) for number in range(1000)]

    def text(num_words: int) -> str:
        return " ".join(chance.choices(words, k=num_words))

    def chat(num_words: int) -> dict[str, Any]:
        turns = (("user", text(4)), ("assistant", text(num_words)))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def pair() -> dict[str, Any]:
        # A digit is a token here: 100 words of three and a blank each make 384 tokens, with what the template adds.
        return {"prompt": text(88), "chosen": text(40), "rejected": text(40)}

    files = {
        "long": [chat(1000) for _ in range(16)],
        "mixed": [chat(chance.randint(4, 100)) for _ in range(200)],
        "short": [chat(4) for _ in range(16)],
        "pairs": [pair() for _ in range(8)],
        "questions": [{"prompt": text(4), "answer": text(2)} for _ in range(16)],
    }
    paths = {}
    for name, rows in files.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "long": {"data.train_file": paths["long"]},
        "mixed": {"data.train_file": paths["mixed"]},
        "pairs": {"data.train_file": paths["pairs"]},
        "held-out": {"data.train_file": paths["short"], "data.validation_file": paths["long"]},
        "questions": {"data.train_file": paths["long"], "evaluation.file": paths["questions"]},
    }


def run(fields: Mapping[str, Any], *, folder: Path) -> dict[str, Any]:
    """Train, and return bytes predicted (with the parts), and the peak of the process."""
    method = {"method": fields["method"]} if "method" in fields else {}
    if method:
        method["criteria.pairs_preferred"] = None
    given = {**fields, **method, "run_dir": str(folder / "run")}
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    command = [sys.executable, "-m", "model_foundry", "train", *overrides]
    log = folder / "log"
    with log.open("w") as file, subprocess.Popen(
        command, env=environment(1), stdin=subprocess.DEVNULL, stdout=file, stderr=file
    ) as process:  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    report = folder / "run" / "report.json"
    if not report.is_file():
        raise BenchmarkError(f"the run failed:\n{log.read_text()[-2000:]}")
    memory = json.loads(report.read_bytes())["memory"]
    return {"predicted": memory["predicted_bytes"], "parts": memory["parts"], "measured": usage.ru_maxrss * 1024}


def main(arguments: Sequence[str]) -> int:
    options: Options = parse(arguments, about=__doc__)
    chosen = [name for name in CONFIGURATIONS if not options.only or any(part in name for part in options.only)]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        models = write_models(folder, tokenizer_from=model_folder(options)) | {"real": model_folder(options)}
        rows = write_rows(folder)
        for number, name in enumerate(chosen):
            fields = dict(CONFIGURATIONS[name])
            kind = fields.pop("rows", "pairs" if "method" in fields else "long")
            fields = {**BASE, **rows[kind], "model.name": str(models[fields.pop("model", "real")]), **fields}
            place = folder / str(number)
            place.mkdir()
            found[name] = each = run(fields, folder=place)
            megabytes = " and ".join(f"{each[key] / 1e6:,.0f} MB {key}" for key in ("predicted", "measured"))
            say(f"{number + 1} of {len(chosen)}: {name}: {megabytes}; {each['parts']}")
    errors = {name: each["predicted"] / each["measured"] - 1 for name, each in found.items()}
    line = json.dumps({"benchmark": "memory", "figures": found, "command": "make bench NAME=memory"})
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
    cells = [
        [name, f"{each['predicted'] / 1e6:,.0f}", f"{each['measured'] / 1e6:,.0f}", f"{errors[name]:+.1%}"]
        for name, each in found.items()
    ]
    table(["run", "predicted, MB", "measured, MB", "off by"], cells)
    middle, worst = (choose(abs(each) for each in errors.values()) for choose in (median, max))
    print(f"median {middle:.1%}, worst {worst:.1%}; aim: {AIM:.0%} in the median")
    return 0 if middle <= AIM else 1
