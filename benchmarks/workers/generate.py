"""Answers from one peer: ours (all at once, or one request after another), HF `generate`, or llama.cpp's server.

Every answer is as long as was asked for: end tokens are switched off. The model is loaded and asked once before the
clock starts. Processor time is told beside the clock on the wall, for busy machines.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.workers.process import run_worker

WARM_TOKENS = 4
Answers = list[list[int]]
Ask = Callable[[list[list[int]], int], Answers]


def ours(spec: dict[str, Any]) -> Ask:
    from model_foundry.engine.continuous import ContinuousBatch
    from model_foundry.engine.platform import keep_freed_memory
    from model_foundry.models.language_model import load_language_model
    from model_foundry.types import SamplingParams

    keep_freed_memory()
    model = load_language_model(Path(spec["model"]), dtype=torch.bfloat16)
    batch = ContinuousBatch(
        model, device=torch.device("cpu"), invariant=spec["invariant"],
        max_sequences=spec.get("max_sequences", 64), max_cache_tokens=32768,
    )  # fmt: skip

    def ask(prompts: list[list[int]], max_tokens: int) -> Answers:
        numbers = [
            batch.add(
                np.array(prompt, dtype=np.int32),
                SamplingParams(max_tokens=max_tokens, temperature=spec["temperature"], seed=seed),
            )
            for seed, prompt in enumerate(prompts)
        ]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while batch.num_running or batch.num_waiting:
            for event in batch.step():
                answers[event.number].append(event.token)
        return [answers[number] for number in numbers]

    return ask


def hugging_face(spec: dict[str, Any]) -> Ask:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16)
    samples, draws = spec["samples"], spec["temperature"] > 0
    drawing = {"do_sample": True, "temperature": spec["temperature"], "top_k": 0} if draws else {"do_sample": False}

    def ask(prompts: list[list[int]], max_tokens: int) -> Answers:
        rows = prompts[:1] if samples > 1 else prompts
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=seen, max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0,
                num_return_sequences=samples, **drawing,
            )  # fmt: skip
        return made[:, width:].tolist()

    return ask


def llama_cpp(spec: dict[str, Any]) -> Ask:
    library: Any = import_module("xllamacpp")  # compiled, so no type is known
    parameters = library.CommonParams()
    parameters.model.path = spec["gguf"]
    parameters.n_parallel = spec["num_requests"]
    parameters.n_ctx = spec["num_requests"] * 1024
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = spec["num_threads"]
    parameters.verbosity = -1
    server = library.Server(parameters)

    def ask(prompts: list[list[int]], max_tokens: int) -> Answers:
        def one(numbered: tuple[int, list[int]]) -> list[int]:
            seed, prompt = numbered
            asked = {"prompt": prompt, "max_tokens": max_tokens, "temperature": spec["temperature"], "seed": seed}
            asked |= {"ignore_eos": True, "return_tokens": True}
            answer = server.handle_completions(asked)
            return [0] * int(answer["usage"]["completion_tokens"])  # it keeps the ids to itself

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(one, enumerate(prompts)))

    return ask


PEERS: dict[str, tuple[Callable[[dict[str, Any]], Ask], str]] = {
    "ours": (ours, "torch"),
    "hf": (hugging_face, "transformers"),
    "llama.cpp": (llama_cpp, "xllamacpp"),
}


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(spec["num_threads"])
    torch.manual_seed(spec["seed"])
    make, package = PEERS[spec["peer"]]
    ask, prompts = make(spec), spec["prompts"]
    # Other tokens of the same lengths: nothing that is asked later may lie in a cache.
    ask([[token + 1 for token in prompt] for prompt in prompts], WARM_TOKENS)
    wall, processor = time.perf_counter(), time.process_time()
    answers = ask(prompts, spec["max_tokens"])
    return {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - processor,
        "num_tokens": sum(map(len, answers)),
        "answers": answers,
        "versions": {package: importlib.metadata.version(package)},
    }


if __name__ == "__main__":
    run_worker(generate)
