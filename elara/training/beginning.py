"""Where training begins: with new weights, with those of a checkpoint, or where a run was left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from elara import addresses, checkpoint
from elara import tokenizer as tokenizers
from elara.data.batches import NOTHING, Consumed
from elara.data.identity import check_identity, identity
from elara.data.module import ElaraData
from elara.errors import ElaraError, NotFinite
from elara.runs import Run, find_checkpoint, shown
from elara.training.callbacks.checkpoint import saver_of
from elara.training.parts import Parts, elsewhere, say
from elara.training.sharding import FSDP


@dataclass
class Start:
    """Where training begins: at step 0, or behind `trainer_state` of a checkpoint."""

    step: int = 0
    trainer_state: Path | None = None
    validation_due: bool = False


def begin(config: DictConfig, parts: Parts, here: Run) -> Start:
    """Put the weights of `resume` or `init_from` into the model and say where training goes on."""
    if found := here.checkpoints():
        if not config.resume:
            raise ElaraError(f"{here.path} holds a run already: go on with resume={here.path}, or take another folder")
        same_optimizer(config, here)
        return restore(parts, found)
    if config.init_from:
        path = find_checkpoint(config.init_from).resolve()
        load_weights(path, parts)
        note_parent(parts.trainer, str(path))
        say(f"weights from {shown(path)}")
    return Start()


def restore(parts: Parts, found: list[Path]) -> Start:
    """Load the newest checkpoint that is whole; older ones stand in for it with a note.

    Raises ElaraError when none is, and when the newest one does not go with the configuration or its text: an older one
    that does would be a run of long ago.
    """
    errors: list[ElaraError] = []
    for path in found:
        try:
            meta, saved = checkpoint.read_meta(path), checkpoint.read_config(path)
            if meta.get("finite") is False:
                raise NotFinite(f"{path}: its held-out loss is nan or infinite")
        except ElaraError as error:
            errors.append(error)
            continue
        checkpoint.same_architecture(path, saved, parts.module.model.config)
        same_kind(path, parts)
        same_text(path, meta, parts.data)
        try:
            checkpoint.verify_trainer(path, meta)
            load_weights(path, parts)
        except ElaraError as error:
            errors.append(error)
            continue
        for problem in errors:
            say(f"note: {problem}; going back to {path.name}")
        parts.module.resumed_step = meta["step"]
        parts.data.start = read_before(meta, parts)
        note_parent(parts.trainer, meta.get("parent"))
        return Start(meta["step"], path / checkpoint.TRAINER, meta["validation_due"])
    raise errors[0]


def same_kind(path: Path, parts: Parts) -> None:
    """Raise ElaraError where a checkpoint's optimizer state is sharded and this trainer's is not, or the other way."""
    if (path / checkpoint.OPTIMIZER).is_dir() != isinstance(parts.trainer.strategy, FSDP):
        saved = "fsdp" if (path / checkpoint.OPTIMIZER).is_dir() else "another trainer than fsdp"
        raise ElaraError(f"{path} was saved by trainer={saved}: resume with that, or start anew with init_from")


def same_optimizer(config: DictConfig, here: Run) -> None:
    """Raise ElaraError when a run would go on with another optimizer, which cannot use the state of the first."""
    if not here.config.exists():
        return
    optimizer = saved_settings(here).get("optimizer")
    before = optimizer.get("_target_") if isinstance(optimizer, dict) else None
    if before != config.optimizer._target_:
        names = [str(target).rpartition(".")[2] for target in (before, config.optimizer._target_)]
        raise ElaraError(
            f"this run has optimizer={names[0]}, whose state {names[1]} cannot go on with: "
            "leave it, or begin a new run with init_from"
        )


def same_text(path: Path, meta: Mapping[str, Any], data: ElaraData) -> None:
    """Raise ElaraError when the run would read another text than before, or in another order, without being told to."""
    if data.data.changed not in ("refuse", "accept"):
        raise ElaraError(f"data.changed={data.data.changed} is unknown: use refuse or accept")
    if "text" not in meta:
        say(f"note: {path.name} is from before checkpoints knew their text: whether it has changed cannot be checked")
    elif data.data.changed == "refuse":
        check_identity(meta["text"], identity(data))


def read_before(meta: Mapping[str, Any], parts: Parts) -> list[Consumed]:
    """How far each corpus had been read when a checkpoint was saved."""
    if "read" in meta:
        read = [Consumed(part["epoch"], part["windows"]) for part in meta["read"]]
        return [*read, *[NOTHING] * len(parts.data.corpora)][: len(parts.data.corpora)]
    # from before: one number for all epochs, right as long as batches had one size
    parts.data.trainer = parts.trainer
    return parts.data.consumed(meta["windows"] // (parts.data.data.batch_size * parts.trainer.world_size))


def load_weights(path: Path, parts: Parts) -> dict[str, Any]:
    """Copy a checkpoint's weights into the module's model; returns its meta. Raises ElaraError when they do not fit."""
    meta, module = checkpoint.read_meta(path), parts.module
    tokenizers.check_fingerprint(module.tokenizer.fingerprint, meta["tokenizer"], "the data's tokenizer")
    if elsewhere(parts.trainer):
        weights = checkpoint.Weights(path, meta, module.model.config)  # as rank 0 does: all must agree where to go on
        for name in weights.shapes:
            weights.read(name)
        return meta
    state: dict[str, Tensor] = checkpoint.read_weights(path, meta)
    checkpoint.check_finite(path, state)
    checkpoint.fit(path, state, module.model)
    module.model.load_state_dict(state)
    return meta


def note_parent(trainer: lightning.Trainer, parent: str | None) -> None:
    """Tell the checkpoint callback where the weights came from."""
    if (saver := saver_of(trainer)) is not None:
        saver.parent = parent


def saved_settings(here: Run) -> dict[str, Any]:
    """A run's config.yaml, references as they stand there; raises ElaraError when it cannot be read."""
    try:
        found: Any = OmegaConf.to_container(OmegaConf.load(here.config))
        if not isinstance(found, dict):
            raise ValueError("no settings")
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        advice = "put it back as it was, or begin a new run with init_from"
        raise ElaraError(f"{here.config} cannot be read: {advice}") from error
    return found


def note_changes(here: Run, settings: Mapping[str, Any]) -> None:
    """Say which settings of a resumed run are not what they were."""
    if not here.config.exists():
        return
    before = flat(addresses.bare_values(saved_settings(here)))
    now = flat(settings)
    for key in sorted(before.keys() | now.keys()):
        if key != "resume" and before.get(key) != now.get(key):
            say(f"note: {key} was {before.get(key)} and is {now.get(key)} from here on")


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    return {k: v for key, value in settings.items() for k, v in flat(value, f"{prefix}.{key}".lstrip(".")).items()}
