"""elara/manifest.json says what is really there."""

import importlib
import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MANIFEST = json.loads((ROOT / "elara" / "manifest.json").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize("key", ["name", "version", "description"])
def test_identity_is_the_project_s(key: str) -> None:
    assert MANIFEST[key] == PROJECT[key]


def test_packages_are_there() -> None:
    assert MANIFEST["packages"] == [p for p in ("elara", "hivemind") if (ROOT / p / "__init__.py").is_file()]


def test_entry_points_are_the_console_scripts() -> None:
    assert MANIFEST["entry_points"] == PROJECT["scripts"]


@pytest.mark.parametrize("target", MANIFEST["entry_points"].values())
def test_every_entry_point_can_be_called(target: str) -> None:
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_installed_entry_points_are_the_same() -> None:
    try:
        installed = importlib.metadata.distribution(MANIFEST["name"])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the project is not installed here")
    scripts = {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == MANIFEST["entry_points"]
    assert installed.version == MANIFEST["version"]


def test_commands_are_the_makefile_s_targets() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = dict(re.findall(r"^([a-z-]+):.*## (.+)$", makefile, re.MULTILINE))
    assert MANIFEST["commands"] == {name: {"run": f"make {name}", "help": text} for name, text in targets.items()}
