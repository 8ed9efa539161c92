"""One export, or only its writing, in a process of its own: seconds, bytes read and written, peak memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.workers.process import resident_bytes, run_worker, settle_memory

QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "Count from one to five.")


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    from model_foundry.export.certificate import Origin
    from model_foundry.export.gguf import write_gguf
    from model_foundry.export.hand_over import export
    from model_foundry.export.measure import Subject
    from model_foundry.export.merge import fill_merged_folder, plan_merge
    from model_foundry.rendering import Renderer
    from model_foundry.tokenizer import Tokenizer
    from model_foundry.types import Message

    torch.set_num_threads(spec["num_threads"])
    base, adapter, target = Path(spec["model"]), Path(spec["adapter"]), Path(spec["scratch"], "out")
    renderer = Renderer(Tokenizer.load(base))
    merge = plan_merge(base, adapter)
    before, io = settle_memory(), io_bytes()
    started = time.perf_counter()
    if spec["what"] == "write-merged":
        target.mkdir()
        fill_merged_folder(target, merge, dtype="bfloat16", base_name="base", max_shard_bytes=spec["shard_bytes"])
    elif spec["what"] == "write-gguf":
        target.mkdir()
        write_gguf(
            target / "m.gguf", merge, format=spec["format"], tokenizer=renderer.tokenizer, name="m",
            chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids,
        )  # fmt: skip
    else:
        prompts = tuple((Message("user", question),) for question in QUESTIONS)
        origin = Origin("bench", "base", "0" * 64, None, renderer.name, "the benchmark")
        subject = Subject(base, adapter, renderer, prompts, origin)
        kind = spec["what"].removeprefix("export-")
        export(subject, target, kind=kind, dtype="bfloat16" if kind == "merged" else None, quants=(spec["format"],))
    seconds = time.perf_counter() - started
    read, written = (after - start for after, start in zip(io_bytes(), io, strict=True))
    return {
        "seconds": seconds,
        "read_bytes": read,
        "written_bytes": written,
        "needed_bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
        "base_bytes": sum(entry.end - entry.start for entry in merge.tensors.values()),
        "peak_bytes": resident_bytes("VmHWM") - before,
    }


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has asked the system to read and to write so far (Linux)."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    numbers = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return numbers["rchar"], numbers["wchar"]


if __name__ == "__main__":
    run_worker(measure)
