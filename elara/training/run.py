"""One training run from its configuration: data, model, trainer, report."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, ListConfig, OmegaConf

from elara import addresses
from elara import tokenizer as tokenizers
from elara.config import ElaraConfig
from elara.data.config import DataConfig
from elara.data.module import ElaraData
from elara.data.sources import CONVERSATIONS
from elara.device import processes
from elara.errors import ElaraError
from elara.launch import global_rank, local_ranks, nodes
from elara.model import ElaraLM
from elara.overrides import quoted
from elara.runs import Run, claim, project_root, python, shown, write_whole
from elara.tokenizer import Tokenizer, TokenizerConfig
from elara.training.beginning import Start, begin, note_changes
from elara.training.callbacks import Ending
from elara.training.callbacks.ending import is_finished
from elara.training.callbacks.samples import last_sample
from elara.training.config import DistillConfig
from elara.training.distributed import environment
from elara.training.module import ElaraModule
from elara.training.parts import Parts, elsewhere, say
from elara.training.precision import resolve
from elara.training.reading import stored_opinions
from elara.training.resume import absolute
from elara.training.sharding import FSDP
from elara.training.teaching import Teaching, open_teachers

GROUPS = ("model", "moe", "trm", "tidar")

# Arguments of lightning.Trainer that begin the data anew or end with it, and their values without effect
EPOCHS = {"max_epochs": -1, "min_epochs": 0, "limit_train_batches": 1.0, "overfit_batches": 0, "fast_dev_run": False}

# What Lightning and torch say that is no news here
HUSHED = (
    r".*does not have many workers.*",  # data.workers=0 is the fast choice for small batches
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r"FSDP2-wrapped module .* returned a view tensor.*",  # nothing is done in place with what a block returns
    r"The ``compute`` method of metric Means was called before.*",  # what nothing happened to has no figures
    r".*when logging on epoch level in distributed setting.*",  # what is logged is the same on every rank
)


def run(config: DictConfig) -> None:
    """Train as `config` (a TrainConfig) says, in Hydra's output folder, and tell the user what came out."""
    here = Run(Path(HydraConfig.get().runtime.output_dir))
    first = global_rank() == 0
    lock = claim(here.path) if first else None
    new = first and not here.overrides.exists()
    if new:
        here.record(HydraConfig.get())
    hush()
    lightning.seed_everything(config.seed, verbose=False)
    try:
        settings = resolved(config)
        parts = build(config, settings)
        start = begin(config, parts, here)
    except BaseException:
        if new:
            here.discard()  # nothing was trained: leave no empty run behind
        raise
    if first:
        here.remove_leftovers()
        note_changes(here, settings)
        here.record(HydraConfig.get())
        write_whole(here.config, OmegaConf.to_yaml(OmegaConf.create(settings)))
        for logger in parts.trainer.loggers:
            logger.log_hyperparams(settings)
        announce(parts, here, start)
    fit(parts, start)
    if parts.trainer.is_global_zero:
        report(parts, here)
    if lock is not None:
        lock.close()


def hush() -> None:
    """Silence what Lightning tells a newcomer that helps nobody; its errors stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in HUSHED:
        warnings.filterwarnings("ignore", message)


def resolved(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values that may be kept: addresses without credentials, and with
    `trainer.precision=auto` replaced by what it means here."""
    settings = cast(dict[str, Any], addresses.bare_values(OmegaConf.to_container(config, resolve=True)))
    if not re.fullmatch(r"[\w.-]+", settings["name"]):
        raise ElaraError(f"name={settings['name']} names a folder: use letters, digits, '.', '-' and '_' only")
    settings = cast(dict[str, Any], absolute(settings, Path.cwd()))  # the run may go on in another folder
    trainer = settings["trainer"]
    trainer["precision"] = resolve(trainer.get("precision", "auto"), str(trainer.get("accelerator", "auto")))
    if trainer.get("num_nodes", "auto") == "auto":
        trainer["num_nodes"] = nodes()
    if (count := local_ranks()) is not None:
        trainer["devices"] = count
    for key in ("max_steps", "val_check_interval", "accumulate_grad_batches", "num_nodes"):
        if not isinstance(trainer.get(key), int) or trainer[key] < 1:
            raise ElaraError(f"trainer.{key}={trainer.get(key)} must be a whole number of at least 1")
    if not isinstance(trainer.get("max_time"), (str, dict, type(None))):
        raise ElaraError(f"trainer.max_time={trainer['max_time']} must be a time as in '00:12:30:00' (days first)")
    for key, idle in EPOCHS.items():
        if trainer.get(key, idle) not in (None, idle):
            raise ElaraError(
                f"trainer.{key}={trainer[key]} counts by epochs, and the training text comes as one endless stream: "
                f"leave it out and give trainer.max_steps, the optimizer steps of the run"
            )
    return settings


def build(config: DictConfig, settings: Mapping[str, Any]) -> Parts:
    """Make data, model and trainer; raises ElaraError for settings that do not go together."""
    data_config, token_config = OmegaConf.to_object(config.data), OmegaConf.to_object(config.tokenizer)
    assert isinstance(data_config, DataConfig) and isinstance(token_config, TokenizerConfig)
    context = config.model.context_length
    if data_config.seq is not None and data_config.seq > context:
        raise ElaraError(f"data.seq={data_config.seq} is longer than model.context_length={context}")
    trainer = make_trainer(config, settings)
    data = ElaraData(data_config, token_config, project_root() / "data", seed=config.seed, seq=context)
    prepared = data.prepared
    teaching = learn_from(config, data, trainer)
    with torch.device("meta") if elsewhere(trainer) else nullcontext():
        model = ElaraLM(architecture(config, prepared.tokenizer))
    if config.compile:
        for block in model.blocks:
            block.compile()
    val = prepared.manifest["val"]
    module = ElaraModule(
        model,
        prepared.tokenizer,
        seed=config.seed,
        optimizer=factory(config.optimizer, "optimizer"),
        schedule=factory(config.schedule, "schedule")(config.trainer.max_steps),
        chars_per_token=None if prepared.val.weights is not None else val["characters"] / val["tokens"],
        uneven=data.uneven,
        teaching=teaching,
    )
    return Parts(trainer, module, data)


def learn_from(config: DictConfig, data: ElaraData, trainer: lightning.Trainer) -> Teaching | None:
    """The teachers of a configuration, and what they say of the training text where that is kept; None without any."""
    if not config.teachers:
        return None
    settings = OmegaConf.to_object(config.distill)
    assert isinstance(settings, DistillConfig)
    sources = [data.data.source] + [data.data.replay.source] * bool(data.data.replay.share)
    conversations = any(source in CONVERSATIONS for source in sources)
    teachers = open_teachers(config.teachers, data.prepared.tokenizer, conversations=conversations)
    teaching = Teaching(teachers, settings)
    for teacher in teaching.teachers:
        if note := teacher.note(conversations):
            say(note)
    if settings.on_policy and isinstance(trainer.strategy, FSDP):
        raise ElaraError("distill.on_policy needs a whole model on every rank: take another trainer than fsdp")
    if settings.opinions == "stored" and settings.on_policy < 1:
        data.train_batches()  # what is wrong with them shows before hours of asking
        data.opinions = [
            [stored_opinions(teacher, corpus, settings) for teacher in teaching.teachers] for corpus in data.corpora
        ]
        for teacher in teaching.teachers:
            teacher.backend.close()  # its memory is the student's; when it is asked again, it loads again
    return teaching


def factory(config: DictConfig, group: str) -> Any:
    """The function that an option of `group` stands for, its arguments checked now rather than at the first step."""
    built = instantiate(config)
    hints = get_type_hints(built.func)
    for key, value in built.keywords.items():
        if key not in hints:
            raise ElaraError(f"unknown key '{group}.{key}': {config._target_} takes no such argument")
        if get_origin(hints[key]) is tuple and not _fits(value, hints[key]):
            raise ElaraError(f"{group}.{key}={value} must be a list of {len(get_args(hints[key]))} numbers")
        if hints[key] in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ElaraError(f"{group}.{key}={value} must be a number")
    return built


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is a list of as many numbers as a tuple's hint names."""
    numbers = list(value) if isinstance(value, (Sequence, ListConfig)) and not isinstance(value, str) else []
    plain = all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers)
    return plain and len(numbers) == len(get_args(hint))


def architecture(config: DictConfig, tokenizer: Tokenizer) -> ElaraConfig:
    """The model's configuration; a vocabulary that is not given is the tokenizer's, padded."""
    values: dict[str, Any] = {group: OmegaConf.to_object(config[group]) for group in GROUPS}
    wanted = ElaraConfig(**values)
    if wanted.model.vocab_size is None:
        wanted.model.vocab_size = tokenizers.padded_vocab(tokenizer.vocab_size)
    elif wanted.model.vocab_size < tokenizer.vocab_size:
        raise ElaraError(
            f"model.vocab_size={wanted.model.vocab_size} is too small: the tokenizer has {tokenizer.vocab_size} ids"
        )
    return wanted


def make_trainer(config: DictConfig, settings: Mapping[str, Any]) -> lightning.Trainer:
    """lightning.Trainer from the groups trainer, logger and callbacks."""
    processes(settings["trainer"])  # raises when the devices are not there
    micro = settings["trainer"]["accumulate_grad_batches"]
    given = [callback for callback in (*config.callbacks.values(), config.profiler) if callback]
    wanted = [callback for callback in given if "_target_" in callback]  # an experiment may set one that was left out
    trainer: lightning.Trainer = instantiate(
        config.trainer,
        precision=settings["trainer"]["precision"],
        val_check_interval=settings["trainer"]["val_check_interval"] * micro,  # Lightning counts micro-batches
        logger=[instantiate(logger) for logger in config.logger.values()],
        callbacks=[instantiate(callback) for callback in wanted],
        plugins=environment(),
        num_nodes=settings["trainer"]["num_nodes"],
        min_epochs=0,  # beside min_steps Lightning would take 1, of which the first one never ends
        devices=settings["trainer"].get("devices", "auto"),
        default_root_dir=HydraConfig.get().runtime.output_dir,
        _convert_="all",  # Lightning knows no DictConfig, as of max_time={hours: 2}
    )
    trainer.callbacks.append(Ending())  # type: ignore[attr-defined]
    return trainer


def fit(parts: Parts, start: Start) -> None:
    """Train to the last step; a validation that the run was killed in is made up for first."""
    trainer, module, data = parts.trainer, parts.module, parts.data
    if start.validation_due:
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=start.trainer_state, weights_only=True)


def announce(parts: Parts, here: Run, start: Start) -> None:
    """Two lines about what is about to happen."""
    trainer, model, data = parts.trainer, parts.module.model, parts.data
    config = model.config
    ideas = [
        f"{config.moe.num_experts} experts" if config.moe.num_experts else "",
        f"depth {config.trm.depth}" if config.trm.depth > 1 or config.trm.sample_depth else "",
        f"TiDAR blocks of {config.tidar.block_length}" if config.tidar.block_length else "",
    ]
    size = sum(p.numel() for p in model.parameters())
    count = f"{size / 1e6:.1f} M" if size >= 1e6 else f"{size / 1e3:.0f} k"
    what = ", ".join(["model of " + count + " parameters", *(idea for idea in ideas if idea)])
    tokens = data.data.batch_size * data.seq * trainer.accumulate_grad_batches * trainer.world_size
    say(f"{what}; {data.data.name}, {tokens:,} tokens per step, {trainer.max_steps:,} steps, {trainer.precision}")
    say(f"{'going on at step ' + str(start.step) + ' in' if start.step else 'run folder'} {shown(here.path)}")


def report(parts: Parts, here: Run) -> None:
    """What came out, where it lies, what to do next."""
    figures, step, last = parts.module.latest, parts.module.step, parts.trainer.max_steps
    finished = is_finished(parts.trainer, step)
    lines = [f"done: {step} steps" if finished else f"stopped at step {step} of {last}"]
    if "val/loss_ar" in figures:
        line = f"held-out loss {figures['val/loss_ar']:.3f} nats/token"
        if "val/bits_per_char" in figures:
            line += f" = {figures['val/bits_per_char']:.3f} bits/character"
        lines[0] += f", {line}"
    for what, path in (
        ("pictures", here.plots), ("figures", here.metrics), ("samples", here.samples), ("checkpoint", here.best)
    ):  # fmt: skip
        if path.exists():
            lines.append(f"  {what + ':':<11} {shown(path)}")
    if text := last_sample(here.samples):
        lines += ["", "a sample, the prompt in brackets:", "", text.strip(), ""]
    if here.last.exists():
        prompt = "ROMEO:" if parts.data.data.source == "shakespeare" else ""
        prompt = "What is 37 times 48?" if parts.data.chat else prompt
        lines.append(f'next: {python()} -m elara.sample checkpoint={shell(shown(here.path))} prompt="{prompt}"')
    if not finished and here.last.exists():
        lines.append(f"or go on: {python()} -m elara.train resume={shell(shown(here.path))}{_more_time(parts.trainer)}")
    print("\n".join(lines), flush=True)


def _more_time(trainer: lightning.Trainer) -> str:
    """What a command that goes on needs beside resume, when the time of trainer.max_time is up."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [seconds for timer in timers if (seconds := timer.time_remaining()) is not None]
    return " trainer.max_time=... (more, it counts from the run's beginning)" if left and min(left) <= 0 else ""


def shell(text: str) -> str:
    return text if re.fullmatch(r"[\w./-]+", text) else f'"{quoted(text)}"'
