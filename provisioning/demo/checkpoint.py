"""Where a training is, on disk: written whole or not at all, so that an interrupted training goes on from there.

A checkpoint holds weights, averages, optimizer states and the states of the random generators: a training that was
interrupted ends with the weights of one that was not. It is read with `weights_only`, never as code.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from appliance.errors import BadRequest


class Report(Protocol):
    """Told of every step: stage, steps done, steps in all, and the loss of this one."""

    def __call__(self, stage: str, done: int, total: int, loss: float, /) -> None: ...


class Checkpoint:
    """One file, replaced atomically every `every` seconds and when asked to."""

    def __init__(self, path: Path, *, every: float = 180.0) -> None:
        self._path = path
        self._every = every
        self._last = time.monotonic()

    def restore(self, **parts: Any) -> int:
        """Put the parts back as they were and return the steps done; 0 where there is no checkpoint.

        Modules and optimizers are loaded in place, a `random.Random` or `numpy.random.Generator` gets its state back, a
        list of tensors its values. Raises `BadRequest` for a file that is not a checkpoint of these parts.
        """
        if not self._path.exists():
            return 0
        try:
            held = torch.load(self._path, weights_only=True)
            for name, part in parts.items():
                _put(part, held[name])
            torch.set_rng_state(held["torch"])
            return int(held["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise BadRequest(
                "checkpoint", f"{self._path.name}: not a checkpoint of this recipe ({type(error).__name__})",
                hint="start in an empty folder",
            ) from None

    def save_if_due(self, step: int, **parts: Any) -> bool:
        """Save when `every` seconds have passed since the last time, and say whether it was."""
        due = time.monotonic() - self._last >= self._every
        if due:
            self.save(step, **parts)
        return due

    def save(self, step: int, **parts: Any) -> None:
        """Write everything to a new file and put it in the old one's place."""
        held = {"step": step, "torch": torch.get_rng_state(), **{name: _state(part) for name, part in parts.items()}}
        beside = self._path.with_suffix(".new")
        torch.save(held, beside)
        beside.replace(self._path)
        self._last = time.monotonic()


def _state(part: Any) -> Any:
    if isinstance(part, np.random.Generator):
        return json.dumps(part.bit_generator.state)
    if isinstance(part, list):
        return [tensor.clone() for tensor in part]
    if hasattr(part, "getstate"):
        return json.dumps(part.getstate())
    return part.state_dict()


def _put(part: Any, state: Any) -> None:
    if isinstance(part, np.random.Generator):
        part.bit_generator.state = json.loads(state)
    elif isinstance(part, list):
        for tensor, value in zip(part, state, strict=True):
            tensor.copy_(value)
    elif hasattr(part, "setstate"):
        version, numbers, gauss = json.loads(state)
        part.setstate((version, tuple(numbers), gauss))
    else:
        part.load_state_dict(state)
