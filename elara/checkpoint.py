"""Checkpoints: the one way to save a model and the one way to load it.

A checkpoint is a folder: model.safetensors (float32), or shards/ where ranks that hold a part each wrote it,
config.json, tokenizer/, meta.json, and, for resuming only, the trainer's state beside them. It is written under a
temporary name and renamed, so that a folder with the right name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elara import shards
from elara import tokenizer as tokenizers
from elara.config import ElaraConfig
from elara.errors import ElaraError, NotFinite
from elara.model import ElaraLM, convert
from elara.runs import followed, step_of, write_whole
from elara.tokenizer import Tokenizer

FORMAT_VERSION = 1  # of the folder's layout; raised when an older reader would misunderstand it
WEIGHTS, CONFIG, META, TOKENIZER = "model.safetensors", "config.json", "meta.json", "tokenizer"
SHARDS = "shards"  # stands in for model.safetensors
TRAINER = "trainer.ckpt"  # optimizer, schedule, loop and random states; holds no weights
OPTIMIZER = "optimizer"  # the optimizer's part of it, where that is sharded too

# Settings of training that leave the function of the weights alone: a run may go on with others
TRAINING_ONLY = frozenset(
    [
        *("model.dropout", "model.init_std", "moe.bias_update_rate", "moe.balance_loss", "moe.z_loss"),
        *("trm.checkpoint", "trm.sample_depth", "tidar.block_fraction", "tidar.schedule", "tidar.loss_weight"),
    ]
)


@dataclass
class Loaded:
    """A checkpoint in memory. meta: format_version, saved (UTC), step, run, parent and what else `save` was given.

    path: its folder, for messages.
    """

    model: ElaraLM
    tokenizer: Tokenizer
    config: ElaraConfig
    meta: dict[str, Any]
    path: Path | None = None


def save(
    path: Path | str,
    model: ElaraLM,
    tokenizer: Tokenizer,
    *,
    meta: Mapping[str, Any],
    trainer_state: Callable[[Path], Mapping[str, Tensor]] | None = None,
    advice: str = "then continue with resume=auto",
) -> Path:
    """Write a checkpoint folder atomically and return it; an older folder of that name is replaced.

    meta: plain values for meta.json. trainer_state: writes the trainer's state to the path it is given and returns the
    weights to save in place of the model's own; none when it has written shards/ beside that path. Raises ElaraError
    when the disk is full or the folder cannot be written; it ends with "make room" and `advice`.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        state = trainer_state(temporary / TRAINER) if trainer_state is not None else model.state_dict()
        if not (temporary / SHARDS).exists():
            save_file({name: _plain(value) for name, value in state.items()}, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", "utf-8")
        tokenizer.save(temporary / TOKENIZER)
        files = {name: _checksum(temporary / name) for name in _guarded(temporary)}
        about = {"format_version": FORMAT_VERSION, "saved": datetime.now(UTC).isoformat(), **meta}
        write_json(temporary / META, {**about, "tokenizer": tokenizer.fingerprint, "crc32": files})
        for file in (p for p in temporary.rglob("*") if p.is_file()):
            _sync(file)
        _replace_folder(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, RuntimeError) and "write" not in str(error):
            raise  # not about the disk
        raise unwritable(path, error, advice) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def unwritable(path: Path, error: Exception, advice: str = "then continue with resume=auto") -> ElaraError:
    """What to tell the user when a checkpoint could not be written."""
    number = getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).splitlines()[0]
    return ElaraError(f"cannot write the checkpoint {path}: {reason}; make room, {advice}")


def load(path: Path | str, *, device: torch.device | str = "cpu", precision: str = "float32") -> Loaded:
    """Read a checkpoint folder.

    precision: of the weights, one of `elara.model.PRECISIONS`; all but float32 are for inference only. Raises
    ElaraError that names what is missing, truncated, newer than this program or does not fit.
    """
    path = Path(path)
    meta = read_meta(path)
    config = read_config(path)
    state = read_weights(path, meta)
    with torch.device("meta"):
        model = ElaraLM(config)
    fit(path, state, model)
    if precision == "float32":
        model.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
        model.eval()
    else:
        biases = {name: value.clone() for name, value in state.items() if name.endswith(".selection_bias")}
        del state  # a mapped file stays in memory as long as any of its tensors lives

        def fill(name: str, part: nn.Module) -> None:
            mapped = _read_tensors(path, lambda key: key.startswith(f"{name}.")) | biases
            mine = {key.removeprefix(f"{name}."): v for key, v in mapped.items() if key.startswith(f"{name}.")}
            part.load_state_dict({key: _apart(v.to(device)) for key, v in mine.items()}, assign=True)

        convert(model, precision, fill)
    return Loaded(model, read_tokenizer(path, meta), config, meta, path)


def _apart(value: Tensor) -> Tensor:
    """A small tensor out of the mapped file: the router keeps its own as they are, and would keep the file."""
    return value.clone() if value.numel() < 1 << 20 else value


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json of a checkpoint folder, its files checked for presence and its version for being known."""
    if not path.is_dir():
        raise ElaraError(f"there is no checkpoint at {path}")
    for name in (META, CONFIG, WEIGHTS, TOKENIZER):
        if not (path / name).exists() and not (name == WEIGHTS and (path / SHARDS).is_dir()):
            raise ElaraError(f"{path} is not a whole checkpoint: {name} is missing")
    if (path / SHARDS).exists() and (path / WEIGHTS).exists():
        raise ElaraError(f"{path} holds both {WEIGHTS} and {SHARDS}/: remove the one that it was not saved with")
    meta = _read_json(path / META)
    version = meta.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ElaraError(
            f"{path} has format_version {version}, this program reads up to {FORMAT_VERSION}: use a newer elara"
        )
    return meta


def read_config(path: Path) -> ElaraConfig:
    """The architecture in a checkpoint's config.json."""
    return ElaraConfig.from_dict(_read_json(path / CONFIG))


def read_weights(path: Path, meta: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a checkpoint folder; raises ElaraError when a file is truncated or altered."""
    verify_weights(path, meta)
    return _read_tensors(path)


def _read_tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The weights whose names are `wanted`; from model.safetensors mapped, not read."""
    if (path / SHARDS).is_dir():
        return shards.read(path / SHARDS, wanted)
    try:
        return {name: value for name, value in load_file(path / WEIGHTS).items() if wanted(name)}
    except (SafetensorError, OSError) as error:
        raise ElaraError(f"{path / WEIGHTS} is damaged: {error}") from error


class Weights:
    """The weights of a checkpoint folder one by one, so that they need not fit into memory together.

    shapes: of all of them, by name. Checksums are compared once, at the start. Raises ElaraError as `read_weights`
    does, and when the weights are not those of `config`; NotFinite when one is read that is nan or infinite.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], config: ElaraConfig) -> None:
        verify_weights(path, meta)
        self._path, self._config, self._last = path, config, ("", torch.empty(0))
        self._mapped: Any = None
        self._finite: set[str] = set()  # names of those that were looked through
        if (path / SHARDS).is_dir():
            self.shapes = shards.shapes(path / SHARDS)
        else:
            try:
                self._mapped = safe_open(path / WEIGHTS, framework="pt")
                names = self._mapped.keys()
                self.shapes = {name: tuple(self._mapped.get_slice(name).get_shape()) for name in names}
            except (SafetensorError, OSError) as error:
                raise ElaraError(f"{path / WEIGHTS} is damaged: {error}") from error
        with torch.device("meta"):
            fit(path, {name: torch.empty(shape) for name, shape in self.shapes.items()}, ElaraLM(config))

    def read(self, name: str) -> Tensor:
        """One weight; of model.safetensors a view of the mapped file, of shards/ a copy, and the last one is kept."""
        value = self._read(name)
        if name not in self._finite:
            check_finite(self._path, {name: value})
            self._finite.add(name)
        return value

    def _read(self, name: str) -> Tensor:
        if self._mapped is not None:
            value: Tensor = self._mapped.get_tensor(name)
            return value
        if self._last[0] != name:
            self._last = ("", torch.empty(0))  # the one before goes first: they may be large
            self._last = (name, shards.read(self._path / SHARDS, lambda other: other == name)[name])
        return self._last[1]

    def model(self) -> ElaraLM:
        """The whole model in float32; of model.safetensors it lies in the mapped file."""
        with torch.device("meta"):
            model = ElaraLM(self._config)
        state = {name: self.read(name) for name in self.shapes}
        fit(self._path, state, model)
        model.load_state_dict(state, assign=True)
        return model.eval()


def read_tokenizer(path: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer saved with a checkpoint; raises ElaraError when it is not the one the weights were trained with."""
    tokenizer = tokenizers.load(path / TOKENIZER)
    if meta.get("tokenizer") not in (None, tokenizer.fingerprint):
        raise ElaraError(f"{path / TOKENIZER} is not the tokenizer of these weights (fingerprints differ)")
    return tokenizer


def verify_weights(path: Path, meta: Mapping[str, Any]) -> None:
    """Compare the weights' files with their checksums; raises ElaraError as `verify` does."""
    sharded = [name for name in meta.get("crc32", {}) if name.startswith(f"{SHARDS}/")]
    for name in sharded or [WEIGHTS]:
        verify(path, meta, name)


def verify_trainer(path: Path, meta: Mapping[str, Any]) -> None:
    """The same for what resuming needs beside the weights."""
    for name in [TRAINER, *(name for name in meta.get("crc32", {}) if name.startswith(f"{OPTIMIZER}/"))]:
        verify(path, meta, name)


def verify(path: Path, meta: Mapping[str, Any], name: str) -> None:
    """Compare one file with the checksum in meta.json; raises ElaraError when it is missing, truncated or altered."""
    if not (path / name).is_file():
        raise ElaraError(f"{path} is not a whole checkpoint: {name} is missing")
    expected = meta.get("crc32", {}).get(name)
    if expected is not None and _checksum(path / name) != expected:
        raise ElaraError(f"{path / name} is damaged: its checksum differs from the one in {META}")


def fit(path: Path, state: dict[str, Tensor], model: ElaraLM) -> None:
    """Raise ElaraError naming the first weight that `model` and a checkpoint's state dict do not share.

    Selection biases are cut or prolonged to the model's recursion passes: a deeper pass starts with the last one's.
    """
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in state:
            raise ElaraError(f"{path} does not fit this model: it has no weight '{name}'")
        if name.endswith(".selection_bias"):
            rows = torch.arange(len(value)).clamp(max=len(state[name]) - 1)
            state[name] = state[name][rows]
        if state[name].shape != value.shape:
            have, want = tuple(state[name].shape), tuple(value.shape)
            raise ElaraError(f"{path} does not fit this model: '{name}' is {have} there and {want} here")
    if extra := sorted(set(state) - set(wanted)):
        raise ElaraError(f"{path} does not fit this model: it also has '{extra[0]}'")


def is_finite(value: Tensor) -> Tensor:
    """Whether every number of a tensor is finite, as a boolean scalar on its device; makes no copy."""
    if not value.numel() or not value.is_floating_point():
        return torch.ones((), dtype=torch.bool, device=value.device)
    low, high = value.aminmax()
    return low.isfinite() & high.isfinite()


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise NotFinite naming the first weight of a checkpoint in which a number is nan or infinite."""
    for name, value in state.items():
        if not is_finite(value):
            raise NotFinite(f"{path}: '{name}' is nan or infinite in places: take an earlier checkpoint")


def same_architecture(path: Path, saved: ElaraConfig, wanted: ElaraConfig) -> None:
    """Raise ElaraError naming the first setting, training-only ones aside, in which two configurations differ."""
    have, want = saved.to_dict(), wanted.to_dict()
    for group, values in have.items():
        for key, value in values.items():
            if f"{group}.{key}" not in TRAINING_ONLY and value != want[group][key]:
                difference = f"{group}.{key} is {value} there and {want[group][key]} here"
                raise ElaraError(f"{path} has another architecture: {difference}")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_whole(path, json.dumps(data, indent=2) + "\n")


def link(target: Path, name: Path) -> None:
    """Point the symbolic link `name` at its sibling folder `target`, atomically.

    Where the disk has no links, `name` becomes a file that names the folder; `elara.runs.followed` reads either.
    """
    temporary = name.with_name(f".{name.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.symlink_to(target.name, target_is_directory=True)
    except OSError:
        temporary.write_text(f"{target.name}\n", "utf-8")
    if name.is_dir() and not name.is_symlink():
        _put_away(name)
    os.replace(temporary, name)


def _put_away(copied: Path) -> None:
    """Clear the place of a link that became a folder when its run was copied; what is there only once is kept."""
    step, chance = step_of(copied), uuid.uuid4().hex[:8]
    if followed(copied) != copied:
        doomed = copied.rename(copied.with_name(f".step-{step}-old-{chance}"))
        shutil.rmtree(doomed, ignore_errors=True)
    elif step >= 0 and not copied.with_name(f"step-{step}").exists():
        copied.rename(copied.with_name(f"step-{step}"))
    else:
        copied.rename(copied.with_name(f"{copied.name}-{chance}"))


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.float() if value.is_floating_point() else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ElaraError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ElaraError(f"{path} cannot be read: not a JSON object")
    return data


def _guarded(folder: Path) -> list[str]:
    """The large files of a checkpoint, as names in it: meta.json holds a checksum of each."""
    files = [folder / WEIGHTS, folder / TRAINER, *(folder / SHARDS).glob("*"), *(folder / OPTIMIZER).glob("*")]
    return [str(file.relative_to(folder)) for file in files if file.exists()]


def _checksum(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            total = zlib.crc32(chunk, total)
    return total


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a folder cannot be renamed onto a full one, so the old one steps aside first."""
    if path.exists():
        old = path.with_name(f".{path.name}-old-{uuid.uuid4().hex[:8]}")
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(new, path)
