"""One flow of an SDK, whichever version is on the path; prints what it measured as JSON. Run by `test_sdk_versions`.

python sdk_flow.py URL BASE OUT
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TINKER_TELEMETRY"] = "0"
os.environ.setdefault("TINKER_API_KEY", "tml-versions")
warnings.simplefilter("ignore")

import tinker  # noqa: E402 - reads the environment
from tinker import types  # noqa: E402


def value(found: Any) -> Any:
    """Older versions return clients and values where newer ones return futures."""
    return found.result() if hasattr(found, "result") else found


def row(number: int) -> Any:
    tokens = [3 + (7 * number + 5 * place) % 200 for place in range(9)]
    given: Any = {"target_tokens": tokens[1:], "weights": [1.0] * 8}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)


ROWS = [row(number) for number in range(3)]
STEP = types.AdamParams(learning_rate=1e-2)


def train(model: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        done, stepped = model.forward_backward(ROWS, "cross_entropy"), model.optim_step(STEP)
        losses.append(done.result().metrics["loss:sum"])
        stepped.result()
    return losses


def losses_on_samples(model: Any) -> dict[str, float]:
    out = {}
    for name in ("importance_sampling", "ppo", "cispo", "dro"):
        data = []
        for given in ROWS:
            inputs: Any = {"target_tokens": given.loss_fn_inputs["target_tokens"], "logprobs": [-3.0] * 8,
                           "advantages": [0.5] * 8}  # fmt: skip
            data.append(types.Datum(model_input=given.model_input, loss_fn_inputs=inputs))
        try:
            out[name] = model.forward_backward(data, name).result().metrics["loss:sum"]
        except ValueError as error:
            # Losses that this version does not know: it does not let them out.
            out[name] = f"not in this SDK ({type(error).__name__})"
    return out


def custom(model: Any) -> float:
    def loss(data: Any, logprobs: Any) -> Any:
        total = sum((part * part).sum() for part in logprobs)
        return total, {"mine": float(total)}

    return model.forward_backward_custom(ROWS, loss).result().metrics["mine"]


def sampling(client: Any, model: Any) -> dict[str, Any]:
    prompt = types.ModelInput.from_ints([10, 11, 12])
    params = types.SamplingParams(max_tokens=5, temperature=1.0, seed=3, stop=[250])
    sampler = value(model.save_weights_and_get_sampling_client(name="latest"))
    sequences = sampler.sample(prompt, 2, params).result().sequences
    path = value(model.save_weights_for_sampler("served")).path
    named = value(client.create_sampling_client(model_path=path))
    again = named.sample(prompt, 2, params).result().sequences
    assert [s.tokens for s in again] == [s.tokens for s in sequences]
    return {
        "tokens": [list(sequence.tokens) for sequence in sequences],
        "logprobs": [list(sequence.logprobs) for sequence in sequences],
        "prompt": sampler.compute_logprobs(prompt).result()[1:],
    }


def resuming(client: Any, path: str) -> dict[str, Any]:
    out: dict[str, Any] = {"weights": train(value(client.create_training_client_from_state(path)), 2)}
    if hasattr(client, "create_training_client_from_state_with_optimizer"):
        out["optimizer"] = train(value(client.create_training_client_from_state_with_optimizer(path)), 2)
    return out


def listing(client: Any, model: Any, path: str) -> dict[str, Any]:
    rest = client.create_rest_client()
    run = path.split("/")[2]
    out = {
        "runs": run in [item.training_run_id for item in rest.list_training_runs().result().training_runs],
        "rank": rest.get_training_run(run).result().lora_rank,
        "checkpoints": sorted(item.checkpoint_id for item in rest.list_checkpoints(run).result().checkpoints),
    }
    if hasattr(rest, "set_checkpoint_ttl_from_tinker_path"):
        value(rest.set_checkpoint_ttl_from_tinker_path(path, 7200))
        out["ttl"] = rest.list_checkpoints(run).result().checkpoints[0].expires_at is not None
    value(rest.delete_checkpoint_from_tinker_path(path))
    out["deleted"] = sorted(item.checkpoint_id for item in rest.list_checkpoints(run).result().checkpoints)
    return out


def refusal(model: Any) -> str:
    bad: Any = {"target_tokens": [5], "weights": [1.0]}
    data = [types.Datum(model_input=types.ModelInput.from_ints([10**6]), loss_fn_inputs=bad)]
    try:
        model.forward_backward(data, "cross_entropy").result()
    except tinker.RequestFailedError as error:
        return str(error.category.value)
    return "accepted"


def main(url: str, base: str) -> dict[str, Any]:
    client = tinker.ServiceClient(base_url=url)
    model = value(client.create_lora_training_client(base_model=base, rank=4, seed=11))
    out: dict[str, Any] = {"info": value(model.get_info()).model_data.model_name == base}
    out["first"] = train(model, 3)
    out["forward"] = model.forward(ROWS, "cross_entropy").result().metrics["loss:sum"]
    path = value(model.save_state("kept")).path
    out["straight"] = train(model, 2)
    out["resumed"] = resuming(client, path)
    steps: dict[str, Callable[[], Any]] = {
        "sampling": lambda: sampling(client, model),
        "losses": lambda: losses_on_samples(model),
        "custom": lambda: custom(model),
        "listing": lambda: listing(client, model, path),
        "refusal": lambda: refusal(model),
    }
    for name, do in steps.items():
        out[name] = do()
    return out


if __name__ == "__main__":
    measured = main(sys.argv[1], sys.argv[2])
    Path(sys.argv[3]).write_text(json.dumps(measured, indent=1))
    # Threads of older versions outlive the work.
    os._exit(0)
