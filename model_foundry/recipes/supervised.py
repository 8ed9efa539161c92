"""The loop of every method: fine-tuning, preferences, pretraining. Reads top to bottom: batches, forward and backward,
a step, a record, evaluate, save.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from itertools import takewhile
from typing import Any, Protocol

from model_foundry.checkpoint.schedule import should_save
from model_foundry.client.local import TrainingClient
from model_foundry.engine.loss_scale import LEAST_SCALE
from model_foundry.errors import EngineError
from model_foundry.evals.compression import bits_per_byte
from model_foundry.recipes.work import Work
from model_foundry.run.progress import Progress
from model_foundry.run.spikes import is_spike
from model_foundry.types import Datum, OptimStepOutput

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Where the loop's records and checkpoints go."""

    def append(self, record: dict[str, Any]) -> None: ...

    def save(self, step: int) -> None: ...

    def before_update(self) -> None:
        """The weights are about to change; called before every optimizer step."""
        ...


def train(
    client: TrainingClient,
    work: Work,
    recorder: Recorder,
    progress: Progress,
    *,
    first_step: int = 1,
    skipped_in_a_row: int = 0,
    losses: Sequence[float] = (),
    stop: Callable[[], bool] = lambda: False,
    memory_bytes: Callable[[], int] = lambda: 0,
) -> int:
    """Train from `first_step` to the end, or until `stop` becomes true; what was done until then is being saved.

    Args:
        skipped_in_a_row: steps right before `first_step` that were skipped.
        losses: of the steps before `first_step`, to tell a spike by.

    Returns:
        The last step done.

    Raises:
        EngineError: too many steps in a row without finite gradients.
    """
    config, before, objective = work.config.training, list(losses), work.objective
    if first_step == 1:
        measure(client, work, recorder, step=0)
    for step in range(first_step, work.total_steps + 1):
        started = time.perf_counter()
        batches = work.micro_batches(step)
        passed = [
            client.forward_backward(batch, objective.loss_fn, objective.loss_config).result() for batch in batches
        ]
        loss = math.fsum(each.loss_sum for each in passed)
        params = work.adam_params(step)
        recorder.before_update()
        update = client.optim_step(params).result()
        seconds = time.perf_counter() - started
        data = [datum for batch in batches for datum in batch]
        num_tokens = sum(datum.num_tokens for datum in data)
        recorder.append(
            {
                "kind": "step",
                "step": step,
                "epoch": round(work.epoch_at(step), 6),
                "loss": loss,
                "learning_rate": params.learning_rate,
                "grad_norm": update.grad_norm,
                "tokens": num_tokens,
                "trained_tokens": sum(map(_num_trained, data)),
                "skipped": update.skipped,
                **({} if update.loss_scale is None else {"loss_scale": update.loss_scale}),
                **work.measures(data, [logprobs for each in passed for logprobs in each.logprobs]),
                "clock": _clock(seconds, num_tokens) | {"memory_bytes": memory_bytes()},
            }
        )
        progress.advance(step, loss=loss, tokens_per_second=num_tokens / seconds)
        if is_spike(loss, before):
            logger.warning("step %s: the loss spikes, %.4f after %.4f", step, loss, before[-1])
        before.append(loss)
        skipped_in_a_row = 0 if not update.skipped else skipped_in_a_row + (not _is_mended(loss, update.loss_scale))
        _judge_skip(update, skipped_in_a_row, step, config.max_skipped_steps)
        if step == work.total_steps or (config.eval_steps and step % config.eval_steps == 0):
            measure(client, work, recorder, step=step)
        interrupted = stop() and step < work.total_steps
        if interrupted or is_save_due(work, step):
            recorder.save(step)
        if interrupted:
            logger.warning("interrupted: saving at step %s of %s", step, work.total_steps)
            return step
    return work.total_steps


def is_save_due(work: Work, step: int) -> bool:
    """On schedule, and where the replay of the last steps is to start; the end is saved as `final` by the caller."""
    config = work.config.training
    if step == work.total_steps:
        return False
    replay = work.config.criteria.replay_steps
    if replay and step == max(1, work.total_steps - replay):
        return True
    return should_save(
        step,
        total_steps=work.total_steps,
        schedule=config.save_schedule,
        every=config.save_steps,
        at=config.save_at,
    )


def measure(client: TrainingClient, work: Work, recorder: Recorder, *, step: int) -> None:
    """The held-out loss, and samples where there are prompts for them."""
    validate(client, work, recorder, step=step)
    if work.prompts:
        texts, prompts = zip(*work.prompts, strict=True)
        for text, sampled in zip(texts, client.sample(prompts, work.sampling).result(), strict=True):
            written = work.renderer.tokenizer.decode(sampled.tokens.tolist(), skip_special=True)
            recorder.append({"kind": "sample", "step": step, "prompt": text, "text": written})
            logger.info("step %s: %s", step, (text + written).replace("\n", "⏎"))


def validate(client: TrainingClient, work: Work, recorder: Recorder, *, step: int) -> None:
    """Mean loss over the held-out tokens (or pairs) that count, in nats; of text also in bits per byte."""
    held_out, objective = work.held_out, work.objective
    if held_out is None:
        return
    started = time.perf_counter()
    losses, data, logprobs = [], [], []
    for batch in work.validation_batches():
        output = client.forward(batch, objective.loss_fn, objective.loss_config).result()
        losses.append(output.loss_sum)
        data += batch
        logprobs += output.logprobs
    loss = math.fsum(losses)
    clock = _clock(time.perf_counter() - started, held_out.num_tokens)
    record: dict[str, Any] = {"kind": "validation", "step": step, "loss": loss, "tokens": held_out.num_tokens}
    record |= work.measures(data, logprobs)
    said = f"validation loss {loss:.4f}"
    if held_out.num_bytes:
        record["bits_per_byte"] = bits_per_byte(loss, num_tokens=held_out.num_tokens, num_bytes=held_out.num_bytes)
        said += f", {record['bits_per_byte']:.4f} bits per byte"
    recorder.append(record | {"clock": clock})
    logger.info("step %s: %s", step, said)


def _is_mended(loss: float | None, loss_scale: float | None) -> bool:
    """Whether a smaller loss scale may mend a skipped step: the loss was a number, and the scale can still fall."""
    return loss is not None and math.isfinite(loss) and (loss_scale or LEAST_SCALE) > LEAST_SCALE


def _judge_skip(update: OptimStepOutput, in_a_row: int, step: int, limit: int) -> None:
    if not update.skipped:
        return
    if update.loss_scale is None:
        logger.warning("step %s skipped: the gradient norm is %s", step, update.grad_norm)
    else:
        said = "step %s skipped: gradients overflow float16 at a loss scale of %g; from now on it is %g"
        logger.warning(said, step, update.loss_scale, update.next_loss_scale)
    if in_a_row > limit:
        raise EngineError(
            f"{in_a_row} steps in a row had NaN or infinite gradients",
            where=f"step {step}",
            hint="Lower training.learning_rate or use model.dtype=float32; "
            "training.max_skipped_steps says how many are borne.",
        )


def trailing_skips(records: Sequence[Mapping[str, Any]]) -> int:
    """How many of the last steps in a run's records were skipped, up to the first that was not, without those that a
    smaller loss scale may have mended."""
    steps = [record for record in records if record["kind"] == "step"]
    last = takewhile(lambda record: record["skipped"], reversed(steps))
    return sum(not _is_mended(record["loss"], record.get("loss_scale")) for record in last)


def _num_trained(datum: Datum) -> int:
    return int((datum.loss_inputs["weights"] != 0).sum())


def _clock(seconds: float, num_tokens: int) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")  # noqa: UP017
    return {"time": now, "seconds": round(seconds, 6), "tokens_per_second": round(num_tokens / seconds, 2)}
