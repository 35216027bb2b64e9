"""Step costs of a model on this machine, measured once and kept in data/calibration for the decoding controller."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from elara.checkpoint import Loaded, write_json
from elara.decoding import Controller, Costs, calibrate, writable
from elara.decoding.controller import candidates
from elara.device import device_name
from elara.runs import project_root

VERSION = 2  # raised when what is measured changes


def controller_for(loaded: Loaded, *, precision: str, batch: int = 1, depth: int | None = None) -> Controller | None:
    """The controller of this model here, its costs read from disk or measured now (seconds; minutes for billions of
    weights); None for a model that cannot draft.

    The costs belong to the architecture, not to the weights, and to precision, batch, depth, processor and threads.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    if not model.config.tidar.block_length:
        return None
    device = model.embed.weight.device
    about = {
        "version": VERSION,
        "config": loaded.config.to_dict(),
        "precision": precision,
        "batch": batch,
        "depth": depth,
        "hardware": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = project_root() / "data" / "calibration" / f"{digest}.json"
    if (costs := _read(path, model.config.tidar.block_length)) is None:
        allowed = writable(tokenizer, model.config.vocab_size)
        costs = calibrate(model, tokenizer.mask_id, allowed=allowed, batch=batch, depth=depth)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {**about, "seconds": costs.to_list()})
        except OSError:
            pass  # a folder that cannot be written to costs the next start a calibration, nothing else
    return Controller(costs)


def _read(path: Path, longest: int) -> Costs | None:
    """The costs in a file; None when there is none or it is not whole, which a new calibration mends."""
    try:
        costs = Costs.from_list(json.loads(path.read_text("utf-8"))["seconds"])
        return costs if all(costs.of(plan) > 0 for plan in candidates(longest)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
