"""How much of a training each of its checkpoints stands for: the learning rates of the steps since the one before it.

TracIn (arXiv 2002.08484) sums the influences at checkpoints, each times the learning rate. With a constant rate and
checkpoints at equal distances this is that; a finished model, whose own rate has fallen to 0, stands for the steps
before it. Reads the Trainer's `trainer_state.json`, or what `finetune` recorded.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rapidindex.model.files import FINETUNE_RECORD, read_json

Rates = dict[int, float]
"""The learning rate after a number of steps."""


def weights_of(places: Sequence[str]) -> tuple[list[float], bool]:
    """Return the weight of each checkpoint, which add up to 1, and whether they are of learning rates.

    They are equal where a step or the learning rates are not on record, or two checkpoints are of the same step.
    """
    found = [_of_trainer(Path(place)) or _of_finetune(Path(place)) for place in places]
    steps = [one[0] for one in found if one]
    equal = [1 / len(places)] * len(places), False
    if len(set(steps)) < len(places):
        return equal
    known: Rates = {step: rate for one in found if one for step, rate in one[1].items()}
    at = sorted(known)
    weights, before = dict.fromkeys(steps, 0.0), 0
    for step in sorted(steps):
        weights[step] = float(np.interp(np.arange(before, step), at, [known[one] for one in at]).sum())
        before = step
    total = sum(weights.values())
    return ([weights[step] / total for step in steps], True) if total > 0 else equal


def _of_trainer(place: Path) -> tuple[int, Rates] | None:
    """Return a checkpoint's step and the learning rates that were logged until then; None where they are not known."""
    state = read_json(place / "trainer_state.json") if (place / "trainer_state.json").is_file() else {}
    entries = [entry for entry in state.get("log_history") or () if isinstance(entry, dict)]
    rates = {
        int(one["step"]): float(one["learning_rate"]) for one in entries if {"step", "learning_rate"} <= one.keys()
    }
    step = state.get("global_step")
    return (step, rates) if rates and isinstance(step, int) and step > 0 else None


def _of_finetune(place: Path) -> tuple[int, Rates] | None:
    """Return the same of a finished or early model that `finetune` made: a warm-up, then half a cosine."""
    for folder, early in ((place, False), (place.parent, place.name == "early")):
        if not (folder / FINETUNE_RECORD).is_file() or folder != place and not early:
            continue
        record: dict[str, Any] = read_json(folder / FINETUNE_RECORD)
        settings, summary = record.get("settings") or {}, record.get("summary") or {}
        steps, peak = summary.get("steps"), settings.get("learning_rate")
        step = summary.get("early_step") if early else steps
        if steps and peak and step:
            warm = math.ceil(steps * settings.get("warmup_ratio", 0.0))
            return step, {one: peak * _share(one, warm, steps) for one in range(steps + 1)}
    return None


def _share(step: int, warm: int, steps: int) -> float:
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
