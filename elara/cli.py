"""How every entry point meets Hydra: one-line errors, help, the resolvers the config uses.

A traceback is shown only with HYDRA_FULL_ERROR=1; an unexpected one is also written to error.log in the run folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import pickle
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elara import addresses, launch, runs
from elara.configuration import compose, conf_folder, config_path, places
from elara.effect import CHOICES, Idle, find_idle, value_at
from elara.errors import EXIT_ERROR, EXIT_INTERRUPTED, EXIT_UNREAD, ElaraError, Interrupted
from elara.help import help_text
from elara.output import OutputClosedError, shield
from elara.overrides import is_override, key_of, quoted, readable
from elara.ranges import check_ranges

Task = Callable[[DictConfig], None]
PLUGINS = ("joblib", "submitit_local", "submitit_slurm")  # launchers that Hydra does not bring along
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def register_resolvers() -> None:
    """`${elara_root:}` in the config is `runs.project_root()`, `${elara_new:train,bee}` what `runs.new_folder` makes.

    The latter is cached: one command means one folder, however often it is read; one that only shows the configuration
    makes none.
    """
    shows = {"--cfg", "-c", "--info", "-i", "--help"} & set(sys.argv)

    def new(*parts: object) -> str:
        names = [str(part) for part in parts]
        return "/".join(["outputs", *names, "..."]) if shows else str(runs.new_folder(*names))

    OmegaConf.register_new_resolver("elara_root", lambda: str(runs.project_root()), replace=True)
    OmegaConf.register_new_resolver("elara_new", new, use_cache=True, replace=True)


def hydra_main(
    config_name: str, task: Task, rewrite: Callable[[list[str]], list[str]] | None = None, *, only_prints: bool = False
) -> None:
    """Compose `config_name` from the command line and run `task` on it.

    rewrite: changes the arguments before Hydra sees them. only_prints: the command has nothing to do when nobody reads
    what it prints; others go on in silence. A mistake of the user ends the process with exit code 1 and
    one line on stderr that begins with `error:`; an interrupt ends it with 75 if a checkpoint was saved, else with 130.
    """
    shield(ends=only_prints)
    launch.watch_parent()
    for number in launch.signals():  # until training takes over, which saves first
        signal.signal(number, signal.default_int_handler)
    register_resolvers()
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @functools.wraps(task)
    def guarded(config: DictConfig) -> None:
        if not full_error:
            os.environ.pop("HYDRA_FULL_ERROR", None)
        hydra = HydraConfig.get()
        if hydra.output_subdir is not None:
            addresses.bare_files(Path(hydra.runtime.output_dir, hydra.output_subdir))
        try:
            if config_name != "train":  # that one checks inside, where what is refused leaves no trace
                check_numbers(config)
                check_effect(config)
            task(config)
        except (Exception, KeyboardInterrupt) as error:
            if full_error:
                raise
            try:
                fail(error)
            finally:
                _remove_empty(Path(HydraConfig.get().runtime.output_dir))

    main: Any = hydra.main(version_base="1.3", config_path=config_path(), config_name=config_name)(guarded)
    try:
        if rewrite is not None:
            sys.argv[1:] = rewrite(sys.argv[1:])
        sys.argv[1:] = addresses.hide(readable(sys.argv[1:]))
        check_options(config_name, sys.argv[1:])
        if {"--help", "-h"} & set(sys.argv):
            print(help_text(compose(config_name, sys.argv[1:], whole=True), config_name))
            return
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing in its own words
        main()
    except (Exception, KeyboardInterrupt) as error:
        if full_error:
            raise
        fail(error)


def check_options(config_name: str, arguments: list[str]) -> None:
    """Raise ElaraError for `--max_steps 3`, which other programs take, and name the key that is meant."""
    for i, text in enumerate(arguments):
        if not text.startswith("--"):
            continue
        option, _, value = text.partition("=")
        if any(name.startswith(option) for name in get_args_parser()._option_string_actions):
            continue
        following = arguments[i + 1 : i + 2]
        value = value or next((word for word in following if not word.startswith("-") and not is_override(word)), "...")
        key = option.lstrip("-").replace("-", "_")
        meant = places(compose(config_name, []), key) or [key]
        raise ElaraError(
            f"there is no option {option}: settings are given as key=value, as in {meant[0]}={value}; --help lists them"
        )


def check_numbers(config: DictConfig) -> None:
    """Raise ElaraError for a number of the configuration that is not finite or outside of `elara.ranges`."""
    settings: Any = OmegaConf.to_container(config)
    check_ranges(settings)


def check_effect(config: DictConfig, given: list[str] | None = None) -> None:
    """Raise ElaraError for an override that has no effect in this configuration (`elara.effect`).

    given: the overrides that the user gave now, where the task has others too, of a run that goes on; default all. Of
    those others only a note is made, and so it is in what a sweep, a search or a starter of ranks began: they have
    looked at it themselves.
    """
    if launch.has_parent() and launch.is_rank():
        return
    hydra_config = HydraConfig.get()
    task = list(hydra_config.overrides.task)
    idle = _idle(config, hydra_config, task, set())
    refused = {key_of(text) for text in (task if given is None else given)}
    if launch.has_parent() or hydra_config.mode == RunMode.MULTIRUN:
        refused = set()
    for one in idle:
        if key_of(one.override) in refused:
            raise ElaraError(str(one))
        if launch.global_rank() == 0:
            print(f"note: {one}", flush=True)


def check_effect_in_sweep(config: DictConfig) -> None:
    """Raise ElaraError for an override of a sweep that cannot have an effect in any of its jobs.

    config: as Hydra composes it for the whole sweep, its own part included, without the keys that are swept.
    """
    task = list(config.hydra.overrides.task)
    parsed = OverridesParser.create().parse_overrides(task)
    swept = {str(one.key_or_group) for one in parsed if one.is_sweep_override()}
    for one in _idle(config, config.hydra, task, swept):
        if not swept & set(one.rule.decided_by):
            raise ElaraError(str(one))


def _idle(config: DictConfig, about: Any, task: list[str], swept: set[str]) -> list[Idle]:
    """Overrides without effect that ask for something: not for null, nor for what would be so without them."""
    settings: Any = OmegaConf.to_container(config)
    settings.pop("hydra", None)
    settings[CHOICES] = dict(about.runtime.choices)
    idle = find_idle(settings, task, about.job.config_name)
    if not idle:
        return []

    plain = [text for text in task if key_of(text) not in swept | {key_of(one.override) for one in idle}]
    before: Any = OmegaConf.to_container(hydra.compose(about.job.config_name, overrides=plain))
    places = [key_of(one.override) for one in idle]
    return [
        one
        for one, key in zip(idle, places, strict=True)
        if key in swept or value_at(settings, key) not in (None, value_at(before, key))
    ]


def config_options() -> list[str]:
    """The --config-dir of this command line, for the processes that it starts."""
    sources = HydraConfig.get().runtime.config_sources
    return [part for source in sources if source.provider == "command-line" for part in ("--config-dir", source.path)]


def _remove_empty(folder: Path) -> None:
    """Leave no output folder behind in which nothing was written."""
    if folder != Path.cwd():
        with contextlib.suppress(OSError):
            folder.rmdir()


def guard(main: Callable[[], None]) -> None:
    """Run a script's `main`, with one line instead of a traceback, as `hydra_main` does."""
    shield()
    try:
        main()
    except (ElaraError, OSError, KeyboardInterrupt) as error:
        fail(error)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(error)


def fail(error: BaseException) -> NoReturn:
    """Print one line for `error`, unless another rank speaks for this one, and end the process."""
    if _in_chain(error, OutputClosedError) is not None:
        raise SystemExit(EXIT_UNREAD)
    interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
    line = " ".join(explain(error).split())
    rank = launch.global_rank()
    if interrupted:
        if rank == 0:
            print(line, file=sys.stderr)
    elif not launch.leave_error(line):
        print(f"error: (rank {rank}) {line}" if rank else f"error: {line}", file=sys.stderr)
    code = EXIT_INTERRUPTED if interrupted else EXIT_ERROR
    raise SystemExit(error.exit_code if isinstance(error, Interrupted) else code)


def explain(error: BaseException) -> str:
    """One sentence for the user: what was wrong, which value, what to do."""
    if (own := _in_chain(error, ElaraError)) is not None:
        return str(own)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        key, equals, value = (error.override or "").partition("=")
        advice = f"write it as {shlex.quote(f'{key}={quoted(value)}')}" if equals else "write key=value"
        return f"cannot read the override '{error.override}': {advice}"
    if isinstance(error, InstantiationException):
        return _failed_target(error)
    if (cause := _in_chain(error, OmegaConfBaseException)) is not None:
        return _bad_value(cause)
    if isinstance(error, HydraException):
        return _no_match(str(error))
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return f"cannot write {error.filename or 'a file'}: {error.strerror}"
    if _in_chain(error, pickle.UnpicklingError) is not None:  # whose own words advise to run it
        return "a file that was to be read holds more than tensors and plain values: do not trust the folder it is from"
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return (
            "out of memory: lower data.batch_size and raise trainer.accumulate_grad_batches, or set trm.checkpoint=true"
        )
    return _unexpected(error)


def nearest(word: str, choices: Iterable[str], above: str = "") -> str:
    """` (did you mean 'x'?)` when one of `choices` is close to `word`, else nothing; `above` is put before it."""
    match = get_close_matches(word, [str(c) for c in choices], n=1, cutoff=0.6)
    return f" (did you mean '{above}{match[0]}'?)" if match else ""


def _in_chain(error: BaseException | None, kind: type[BaseException]) -> Any:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kind):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    group = group.strip("/")
    # of a group that takes a list Hydra names no options
    options = error.options or [file.stem for file in (conf_folder() / group).glob("*.yaml")]
    if not options or not group:
        return str(error).splitlines()[0]
    choices = sorted(o for o in options if not o.endswith("/"))
    if group == "hydra/launcher" and option in PLUGINS:
        return f"launcher={option} needs a plugin of Hydra's: pip install 'elara-hivemind[sweep]'"
    return f"there is no {group}={option}{nearest(option, choices)}; choices: {', '.join(choices)}"


def _bad_value(error: Any) -> str:
    """An OmegaConf error: a key that no schema knows, a value of the wrong type, a missing value or interpolation."""
    text = str(error).splitlines()[0]
    key = error.full_key or ""
    parent = error.parent_node
    known = [str(k) for k in parent] if isinstance(parent, DictConfig) and not parent._is_none() else []
    if re.match(r"Key '.*' (is )?not in ", text):
        name = key.rpartition(".")[2]
        listed = f"; keys there: {', '.join(sorted(known))}" if known else ""
        elsewhere = places(parent._get_root(), name) if isinstance(parent, DictConfig) else []
        close = f" (did you mean '{elsewhere[0]}'?)" if elsewhere else nearest(name, known, key[: -len(name)])
        return f"unknown key '{key}'{close}{listed}"
    if "Missing mandatory value" in text or "missing value" in text.lower():
        return f"{key} has no value: give one as {key}=..."
    return f"{key}: {text}" if key and key not in text else text


def _no_match(text: str) -> str:
    first = text.splitlines()[0]
    if found := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", first):
        return f"{first}: add -m to run them one after the other, or write {found[1]}=[{found[2]}] for a list"
    if found := re.match(r"Could not override '([^'@]+).*No match in the defaults list", text, re.DOTALL):
        return f"there is no config group or key '{found[1]}'{nearest(found[1], _top_level())}"
    return first


def _top_level() -> list[str]:
    return [p.name for p in conf_folder().glob("*/")]


def _failed_target(error: InstantiationException) -> str:
    """An object of the config could not be built: name the argument that its class does not know."""
    cause = error.__cause__ or error
    where = (found := re.search(r"full_key: (\S+)", str(error))) and found[1]
    target = re.search(r"'([\w.]+)'", str(error).splitlines()[0])
    message = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if isinstance(cause, ImportError) or "Error locating target" in str(error):
        root = _in_chain(error, ImportError) or cause
        return f"{where or 'the config'} needs {target[1] if target else 'a package'}, which cannot be imported: {root}"
    if isinstance(cause, TypeError) and (bad := re.search(r"unexpected keyword argument '(\w+)'", message)):
        known = list(inspect.signature(hydra.utils.get_object(target[1])).parameters) if target else []
        key = f"{where}.{bad[1]}" if where else bad[1]
        close = nearest(bad[1], known, f"{where}." if where else "")
        taker = target[1].rpartition(".")[2] if target else "its class"
        return f"unknown key '{key}'{close}: {taker} takes no such argument"
    return f"{where}: {message}" if where else message


def _unexpected(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    hint = "set HYDRA_FULL_ERROR=1 for the traceback"
    if HydraConfig.initialized():
        rank = launch.global_rank()
        log = Path(HydraConfig.get().runtime.output_dir) / (f"error-rank{rank}.log" if rank else "error.log")
        try:
            log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            hint = f"the traceback is in {log}"
        except OSError:
            pass  # the folder may be what is broken; the hint above still holds
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}{place}{': ' if first else ''}{first} ({hint})"
