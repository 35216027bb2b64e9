"""What `--help` prints: the composed configuration, and what the files in conf/ say beside each of its keys."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import DictConfig

from elara import runs
from elara.configuration import conf_folder, leaves

COLUMN = 34  # of the comments
LINE = re.compile(r"( *)([\w-]+):(?= |$)(.*)")
COMMENT = re.compile(r"(?:^|\s)# (.*)")
GROUP = re.compile(r"  - (?!override)([\w/]+): .*?# (.*)")


def help_text(config: DictConfig, config_name: str) -> str:
    """One sentence, examples, groups with their options, and every key with its value and comment.

    config: as the command line composes it, with Hydra's own part: `model=elara_tiny --help` shows that size.
    """
    choices = config.hydra.runtime.choices
    file = conf_folder() / f"{config_name}.yaml"
    lines = [*head(file.read_text("utf-8")), ""]
    if groups := dict(GROUP.findall(file.read_text("utf-8"))):
        lines += ["Groups, each given as group=option:", ""]
        for group, comment in groups.items():
            lines += _entry(f"{group}={_text(choices.get(group))}", comment)
        lines += [""]
    lines += ["Keys, each given as key=value:", ""]
    explained = _Comments(config_name, choices)
    first = list(_comments(file.read_text("utf-8")))  # in the order of that file
    for key, value in sorted(leaves(config), key=lambda leaf: first.index(leaf[0]) if leaf[0] in first else len(first)):
        lines += _entry(f"{key}={_text(value)}", explained.of(key))
    lines += ["", "--cfg job prints this configuration as YAML, --hydra-help tells more of the command line."]
    return "\n".join(lines)


def head(text: str) -> list[str]:
    """The comment at the beginning of a configuration's file, its commands with the Python that runs this one."""
    comment: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line[1:].removeprefix(" ").replace("python -m", f"{runs.python()} -m"))
    return comment


class _Comments:
    """What stands beside the keys in the files of the chosen options, or else of their siblings."""

    def __init__(self, config_name: str, choices: Mapping[str, Any]) -> None:
        folder = conf_folder()
        chosen = [folder / group / f"{option}.yaml" for group, option in choices.items()]
        siblings = [file for group in choices for file in sorted((folder / group).glob("*.yaml"))]
        self._files = []
        for file in [folder / f"{config_name}.yaml", *chosen, *siblings]:
            if not file.is_file():
                continue
            text = file.read_text("utf-8")
            package = found[1] if (found := re.match(r"# @package (\S+)", text)) else file.parent.name
            if package != "_global_" and file.parent != folder:
                self._files.append((f"{package}.", _comments(text)))
            elif file not in siblings or file in chosen:  # a recipe that is not chosen says nothing here
                self._files.append(("", _comments(text)))
        self._files.sort(key=lambda one: one[0] != "")  # a recipe's values are what counts, so are its words

    def of(self, key: str) -> str:
        for package, comments in self._files:
            if key.startswith(package) and (comment := comments.get(key.removeprefix(package))):
                return comment
        return ""


def _comments(text: str) -> dict[str, str]:
    """Comments of a YAML file by the key they stand beside, as `sampler.name`."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []  # indentation and name of the sections around a line
    for line in text.splitlines():
        if not (match := LINE.match(line)):
            continue
        indentation = len(match[1])
        above = [*((depth, name) for depth, name in above if depth < indentation), (indentation, match[2])]
        if comment := COMMENT.search(match[3]):
            found[".".join(name for _, name in above)] = comment[1]
    return found


def _text(value: Any) -> str:
    """A value as it can be given on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _entry(setting: str, comment: str) -> list[str]:
    """A line, or several, the comment in a column of its own."""
    width = max(80, min(120, shutil.get_terminal_size((100, 24)).columns))
    wrapped = textwrap.wrap(comment, width - COLUMN - 2)
    if not wrapped or len(setting) >= COLUMN:
        wrapped = ["", *wrapped]
    return [f"  {setting if i == 0 else '':<{COLUMN}}{part}".rstrip() for i, part in enumerate(wrapped)]
