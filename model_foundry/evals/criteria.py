"""The success criteria of a run as checks: a measured value, the bound it must meet, and the evidence in words.

Each function takes what was measured and judges it; none measures anything, and none is skipped in silence: what could
not be measured fails, and the evidence says why. Knows numbers and names; nothing of models, files or configurations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from model_foundry.evals.before_after import Comparison
from model_foundry.evals.statistics import why_none
from model_foundry.types import Check

MAX_WINDOW_STEPS = 20
_MEBIBYTE = 2**20


def loss_fall(losses: Sequence[float | None], *, bound: float) -> Check:
    """The training loss must fall by more than the share `bound`.

    Compares the mean over the first and the last steps: a fifth of the run, at most 20 steps, so that one lucky batch
    decides nothing. Losses that are not finite (written as null) are left out and counted.
    """
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    num_left_out = len(losses) - len(finite)
    window = max(1, min(MAX_WINDOW_STEPS, len(finite) // 5))
    first, last = (float(np.mean(part)) if part else math.nan for part in (finite[:window], finite[-window:]))
    left_out = f"; {num_left_out} steps had no finite loss" if num_left_out else ""
    if len(finite) < 2 or first <= 0:
        why = f"{len(finite)} finite losses" if len(finite) < 2 else f"the loss began at {first:.4f}"
        return _failed("loss_fall", f"> {_percent(bound)}", f"Cannot be measured: {why}{left_out}.")
    fall = (first - last) / first
    return Check(
        name="loss_fall",
        passed=fall > bound,
        value=fall,
        bound=f"> {_percent(bound)}",
        evidence=f"Training loss {first:.4f} → {last:.4f}, each the mean of {_count(window, 'step')}{left_out}.",
    )


def answers_improved(comparison: Comparison, *, bound: float) -> Check:
    """More than the share `bound` of the answers must improve, and the gain must lie beyond the noise floor.

    Beyond means: over resampled question sets, improved minus what luck improves stays above 0, and so does the mean
    change in score, both in 95 % of them. Fewer than six questions show nothing beyond it.
    """
    passed = comparison.improved > bound and comparison.verdict == "improved"
    low, high = comparison.interval
    noise = ", ".join(f"{name} {_percent(share)}" for name, share in comparison.noise.items())
    total = len(comparison.cases)
    exact_before, exact_after = _percent(comparison.before["exact"]), _percent(comparison.after["exact"])
    if comparison.margin_interval is None:
        margin = f"Whether it is more than that cannot be told: {why_none(total)}"
    else:
        margin = f"Above that by {' to '.join(_percent(end, signed=True) for end in comparison.margin_interval)}"
    return Check(
        name="answers_improved",
        passed=passed,
        value=comparison.improved,
        bound=f"> {_percent(bound)}, and beyond the noise floor of {_percent(comparison.noise_floor)}",
        evidence=(
            f"{comparison.count('improved')} of {total} held-out answers score higher by {comparison.metric}, "
            f"{comparison.count('worse')} lower (95 % interval of the improved {_percent(low)} to {_percent(high)}). "
            f"Luck would improve: {noise}. {margin}. Exact answers {exact_before} → {exact_after}."
        ),
    )


def memory_saving(*, lora_bytes: int | None, full_bytes: int | None, bound: float, how: str) -> Check:
    """LoRA must use this share less memory than full fine-tuning.

    Args:
        lora_bytes, full_bytes: measured peaks; None where a measurement failed.
        how: how they were measured, for the evidence.
    """
    limit = f"> {_percent(bound)} less"
    if not lora_bytes or not full_bytes:
        missing = "LoRA" if not lora_bytes else "full fine-tuning"
        return _failed("memory_saving", limit, f"Cannot be judged: there is no measured peak for {missing} ({how}).")
    saving = 1 - lora_bytes / full_bytes
    return Check(
        name="memory_saving",
        passed=saving > bound,
        value=saving,
        bound=limit,
        evidence=f"Peak {_mebibytes(lora_bytes)} with LoRA, {_mebibytes(full_bytes)} with full fine-tuning; {how}.",
    )


def parameters_changed(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], *, bound: float, weight_decay: float = 0.0
) -> Check:
    """More than the share `bound` of the trained elements must differ from where they started.

    With weight decay every element that is not 0 shrinks without any gradient, so only those that began at 0 (LoRA's B)
    are counted then.

    Args:
        before, after: the trained tensors by name, any shapes, equal dtypes.
    """
    limit = f"> {_percent(bound)}"
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        return _failed("parameters_changed", limit, f"{len(odd)} tensors are on one side only, {odd[0]} first.")
    reshaped = [name for name in before if before[name].shape != after[name].shape]
    if reshaped:
        return _failed("parameters_changed", limit, f"{reshaped[0]} changed its shape.")
    not_finite = [name for name in after if not np.isfinite(after[name]).all()]
    if not_finite:
        return _failed("parameters_changed", limit, f"{not_finite[0]} holds NaN or infinity after training.")
    num_counted = num_changed = 0
    for name, start in before.items():
        counted = start == 0 if weight_decay > 0 else np.ones(start.shape, dtype=bool)
        num_counted += int(counted.sum())
        num_changed += int(((after[name] != start) & counted).sum())
    if num_counted == 0:
        why = "none began at 0, and weight decay moves all others" if weight_decay > 0 else "there are none"
        return _failed("parameters_changed", limit, f"No element can be counted: {why}.")
    counting = "weight decay 0" if weight_decay == 0 else f"weight decay {weight_decay:g}: only those that began at 0"
    untouched = sum(bool((after[name] == start).all()) for name, start in before.items())
    return Check(
        name="parameters_changed",
        passed=num_changed / num_counted > bound,
        value=num_changed / num_counted,
        bound=limit,
        evidence=(
            f"{num_changed:,} of {num_counted:,} elements differ from their start ({counting}); "
            f"{untouched} of {len(before)} tensors did not move at all."
        ),
    )


def artefacts_load(problems: Mapping[str, str | None]) -> Check:
    """Everything the run left must exist and load.

    Args:
        problems: what was loaded, each with what went wrong, or None.
    """
    bad = {name: problem for name, problem in problems.items() if problem is not None}
    evidence = "; ".join(f"{name}: {problem}" for name, problem in bad.items()) or f"Loaded: {', '.join(problems)}."
    return Check(
        name="artefacts_load",
        passed=bool(problems) and not bad,
        value=f"{len(problems) - len(bad)} of {len(problems)}",
        bound="all",
        evidence=evidence if problems else "Nothing was there to load.",
    )


def replay_identical(*, from_step: int, num_steps: int, compared: Sequence[str], differences: Sequence[str]) -> Check:
    """The last steps, repeated from a checkpoint, must give the same bits.

    Args:
        from_step: the checkpoint's step.
        num_steps: steps repeated.
        compared: what was compared ("adapter weights", "optimizer state", "metrics").
        differences: what differed, named; empty when nothing did.
    """
    repeated = (
        f"{_count(num_steps, 'step')} repeated from step {from_step}, {', '.join(compared) or 'nothing'} compared"
    )
    found = f"{len(differences)} differ, first: {differences[0]}" if differences else "every bit equal"
    return Check(
        name="replay_identical",
        passed=num_steps > 0 and bool(compared) and not differences,
        value="differs" if differences else "identical" if num_steps > 0 and compared else "not compared",
        bound="identical",
        evidence=f"{repeated}: {found}." if num_steps > 0 and compared else f"{repeated}.",
    )


def _failed(name: str, bound: str, evidence: str) -> Check:
    return Check(name=name, passed=False, value=None, bound=bound, evidence=evidence)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / _MEBIBYTE:,.0f} MiB"


def _percent(share: float, *, signed: bool = False) -> str:
    return f"{share * 100:+.3g} %" if signed else f"{share * 100:.3g} %"
