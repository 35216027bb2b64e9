"""What a saved folder may ask for when a command goes on with it: a folder that came from elsewhere is no program.

The overrides that it brings along may set values and choose options. What makes them a program is checked here: objects
to build, text that is worked out when it is read, settings of Hydra itself, configurations in other places, addresses.
Not checked: where its callbacks and loggers write; what they write is a run's own files.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any
from urllib.parse import urlsplit

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.utils import get_object

from elara.errors import ElaraError
from elara.overrides import is_override, key_of, value_of

TRUST = "resume.trust"
TARGET = "_target_"
PACKAGES = r"(elara|lightning|torch\.optim|hydra)(\.\w+)+"
FACTORIES = (  # whose functions are there for a configuration to name
    "elara.training.optimizers",
    "elara.training.schedules",
    "elara.training.distributed",
    "elara.training.loggers.event_files",
    "elara.training.loggers.weights_and_biases",
)
# references to other settings and to the run's own places; the others call something, or read what is on this machine
HARMLESS = re.compile(r"\$\{(hydra:[\w./]+|elara_root:|now:[^${}]*|[\w.]+)\}")
VALUES = ("name", "seed", "init_from", "compile")  # all other keys without a dot are groups
OPTION = re.compile(r"[\w-][\w.-]*")  # of a group, by its name; with a / it could be any file
ADDRESSES = ("base_url", "host", "address", "tracking_uri")
LAUNCHING = ("n_jobs", "timeout_min", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb", "partition",
             "account", "array_parallelism")  # fmt: skip
OF_A_SWEEP = frozenset(["hydra/launcher", "hydra.verbose", *(f"hydra.launcher.{name}" for name in LAUNCHING)])


def taken(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments without `resume.trust`, and whether it is true."""
    own = [text for text in arguments if is_override(text) and key_of(text) == TRUST]
    for text in own:
        if value_of(text).lower() not in ("true", "false"):
            raise ElaraError(f"{text} must be true or false")
    return [text for text in arguments if text not in own], any(value_of(text).lower() == "true" for text in own)


def check(saved: Iterable[str], given: Iterable[str], place: Path, *, sweep: bool = False) -> None:
    """Raise ElaraError for the first of a folder's saved overrides that only its owner may ask for.

    given: the command line's own overrides; what they name may be built. sweep: its overrides say where jobs run.
    """
    named = {str(value) for text in given for key, value in _leaves(text) if _last(key) == TARGET}
    for text in saved:
        if (why := _objection(text, named, sweep)) is not None:
            advice = f"give it on the command line too, or {TRUST}=true if you trust whoever made this folder"
            raise ElaraError(f"{place} brings along {text}, {why}: {advice}")


def _objection(text: str, named: set[str], sweep: bool) -> str | None:
    """What is wrong with an override that a folder brings along; None when it sets a value or chooses an option."""
    override = _parsed(text)
    if override is None:  # an option of the command line, perhaps: --experimental-rerun unpickles a file
        return "which is no override"
    key = override.key_or_group
    about_hydra = any(re.match(r"hydra\b", where or "") for where in (key, override.package))
    if about_hydra and not (sweep and key in OF_A_SWEEP):
        return "which is about Hydra itself"
    for path, value in _leaves(text):
        if not isinstance(value, (str, int, float, type(None))):
            return "which is no plain value"
        if "${" in HARMLESS.sub("", f"{path} {value}"):
            return "which is worked out from what is on this machine"
        if TARGET in path.split(".") and value not in named and not is_part(value):
            return f"and {value} is none of the parts of a run that elara, lightning, torch.optim or hydra define"
        if _last(path) in ADDRESSES and not _is_here(value):
            return "which names another machine"
        if "." not in key and key not in VALUES and path == key and not _is_option(value):
            return "which is no option of a group"
    return None


def is_part(target: Any) -> bool:
    """Whether a target is a class or function that those packages define themselves for a run to be made of.

    Not what their modules have imported (`elara.shards.pickle.loads`), nor what calls what it is given.
    """
    if not isinstance(target, str) or not re.fullmatch(PACKAGES, target):
        return False
    logging.getLogger("hydra.utils").disabled = True  # it would say first, in its words, what is missing
    try:
        found: Any = get_object(target)
    except Exception:  # Hydra would not build it either
        return False
    if not isinstance(found, (type, FunctionType)) or found.__name__.startswith("_"):
        return False
    module = found.__module__
    if not re.fullmatch(PACKAGES, f"{module}.x") or vars(sys.modules[module]).get(found.__qualname__) is not found:
        return False
    if isinstance(found, type):
        return issubclass(found, _kinds()) or _teaches(found)
    return module in FACTORIES


def _kinds() -> tuple[type, ...]:
    # a second or two, and only folders that name a target wait for them
    from hydra.core.plugins import Plugins  # noqa: F401 - else its plugins import in a circle
    from hydra.experimental.callback import Callback as HydraCallback
    from hydra.plugins.plugin import Plugin
    from lightning import Callback, Trainer
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    parts = (Callback, Trainer, Logger, Strategy, Precision, ClusterEnvironment, Profiler, Optimizer, LRScheduler)
    return (*parts, HydraCallback, Plugin)


def _teaches(found: type) -> bool:
    """Whether a class is a backend of ours, which the option of a group `teacher` names."""
    return found.__module__.startswith("elara.backends.") and hasattr(found, "answers") and hasattr(found, "identity")


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _leaves(text: str) -> Iterator[tuple[str, Any]]:
    """The plain values of an override with their dotted keys; nothing for one that removes a key."""
    override = _parsed(text)
    if override is not None and not override.is_delete():
        yield from _inside(override.key_or_group, override.value())


def _inside(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _inside(f"{path}.{key}", part)
    elif isinstance(value, list):
        for part in value:
            yield from _inside(path, part)
    else:
        yield path, value


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _is_option(value: Any) -> bool:
    return value is None or (isinstance(value, str) and OPTION.fullmatch(value) is not None)


def _is_here(address: Any) -> bool:
    """Whether an address is this machine's own, as 127.0.0.1:8000 or http://localhost/v1."""
    if address is None or address == "auto":
        return True
    text = str(address)
    try:
        name = urlsplit(text if "//" in text else f"//{text}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
