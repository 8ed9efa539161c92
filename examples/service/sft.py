"""The demo's fine-tuning through a training service: in this process, or behind a URL. The losses are the same bits.

    .venv/bin/python examples/service/sft.py                                   # no socket; state in runs/service
    .venv/bin/foundry service base_model=smollm2-135m-instruct &               # or: a service,
    .venv/bin/python examples/service/sft.py --url http://127.0.0.1:8000       # and the same through it

What is read and how it is batched is the recipe's own (any configuration of `foundry train` will do, as long as its
adapter is one that the service has: alpha 32, every linear layer); what computes is the service. With
co_batching=off the losses are those of `foundry train` to the bit; where passes may be shared the last bits differ.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from model_foundry import FoundryError, ServiceClient, load_config
from model_foundry.config.schema import TrainConfig
from model_foundry.recipes.preparation import prepare
from model_foundry.run.directory import utc_now
from model_foundry.service.importing import service_shape

CONFIG = Path(__file__).parents[1] / "demo" / "demo.yaml"


def train(client: ServiceClient, config: TrainConfig, *, log_steps: int = 10) -> tuple[list[float], str]:
    """The loss of every step, and the path of the last checkpoint."""
    work = prepare(config, now=utc_now())
    assert work.lora is not None
    service_shape(work.lora, where="lora")
    model = client.create_lora_training_client(
        config.model.name, rank=work.lora.r, seed=config.seed, train_unembed=False
    ).result()
    losses = []
    for step in range(1, work.total_steps + 1):
        passes = [model.forward_backward(batch) for batch in work.micro_batches(step)]
        update = model.optim_step(work.adam_params(step))
        losses.append(math.fsum(done.result().loss_sum for done in passes))
        norm = update.result().grad_norm
        if step % log_steps == 0 or step == work.total_steps:
            print(f"step {step} of {work.total_steps}: loss {losses[-1]:.4f}, gradient {norm:.3f}")
    held_out = [model.forward(batch) for batch in work.validation_batches()]
    if held_out:
        print(f"held-out loss {math.fsum(done.result().loss_sum for done in held_out):.4f}")
    return losses, model.save_state("sft", overwrite=True).result().path


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune through a training service.")
    parser.add_argument("config", nargs="?", type=Path, default=CONFIG)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--url", help="of a service; default: one in this process")
    given = parser.parse_args()
    config = load_config(TrainConfig, path=given.config, overrides=given.overrides).config
    with ServiceClient(base_url=given.url, base_model=None if given.url else config.model.name) as client:
        _, path = train(client, config)
    print(f"saved as {path}")
    print(f"talk to it: foundry chat {path}")


if __name__ == "__main__":
    try:
        main()
    except FoundryError as error:
        raise SystemExit(str(error)) from None
