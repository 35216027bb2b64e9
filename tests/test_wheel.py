"""The distribution: every package is in it, and an installation without the checkout works."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# Composes every option of every group from the installed package; prints how many there were.
COMPOSE_ALL = """
import json
from importlib.resources import files
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from elara.cli import register_resolvers
from elara.export import ExportConfig
from elara.sweep.config import SearchConfig
from elara.training.config import register

register_resolvers()
register()
ConfigStore.instance().store(name="sweep_schema", node=SearchConfig)
ConfigStore.instance().store(name="export_schema", node=ExportConfig)
conf = files("elara.conf")
options = {g.name: [f.name[:-5] for f in g.iterdir() if f.name.endswith(".yaml")] for g in conf.iterdir() if g.is_dir()}
count = sum(map(len, options.values()))
plugins = ("joblib", "submitit")  # which an extra brings
options["launcher"] = [name for name in options["launcher"] if not name.startswith(plugins)]
groups = {"sweep": ["search"], "export": ["format", "quantize"]}
groups["train"] = [group for group in options if options[group] and group not in sum(groups.values(), [])]
with initialize_config_module("elara.conf", version_base="1.3"):
    for command in groups:
        for number in range(max(len(options[group]) for group in groups[command])):
            compose(command, [f"{group}={options[group][number % len(options[group])]}" for group in groups[command]])
print(json.dumps({"options": count, "from": str(conf)}))
"""


def test_every_package_is_listed() -> None:
    folders = {file.parent for top in ("elara", "hivemind") for file in (ROOT / top).rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"elara.conf"}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.slow
def test_all_extras_resolve_together() -> None:
    """What pip would install for `.[all]`, torch in the version of the constraints; nothing is installed."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "-c", "constraints.txt", "--report", "-", ".[all]"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    planned = {item["metadata"]["name"].lower() for item in json.loads(done.stdout)["install"]}
    assert "elara-hivemind" in planned
    extras = PYPROJECT["project"]["optional-dependencies"]
    (every,) = extras["all"]
    assert set(re.findall(r"\w+", every.partition("[")[2])) == extras.keys() - {"all", "dev"}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the core installed from a wheel, torch in the version of the constraints."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files beside the sources
    source.mkdir()
    for name in ("elara", "hivemind", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, source, cwd=folder)
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    pip = [folder / "venv/bin/python", "-m", "pip", "install", "-qq", "--no-compile", "-c", ROOT / "constraints.txt"]
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch is not None
    run(*pip, torch[0], cwd=folder)
    run(*pip, next(folder.glob("*.whl")), cwd=folder)
    return folder / "venv"


def run(*command: object, cwd: Path) -> str:
    ours = ("PYTHON", "ELARA", "VIRTUAL")  # what could lead back to the checkout
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_config_composes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    found = json.loads(run(installed / "bin/python", "-c", COMPOSE_ALL, cwd=tmp_path))
    assert found["options"] == len(list((ROOT / "conf").glob("*/*.yaml")))
    assert str(installed) in found["from"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in PYPROJECT["project"]["scripts"] if script != "elara-report"])
def test_console_scripts_work_from_the_wheel(installed: Path, tmp_path: Path, script: str) -> None:
    assert "each given as key=value" in run(installed / "bin" / script, "--help", cwd=tmp_path)
    assert run(installed / "bin" / script, "--cfg", "job", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_report_works_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss_ar\n1,2.5\n2,2.25\n", "utf-8")
    assert "written: report.html" in run(installed / "bin/elara-report", ".", cwd=tmp_path)
    assert "2.2500" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_folder_that_wandb_left_is_not_the_package(installed: Path, tmp_path: Path) -> None:
    """Python takes a folder where it runs for a package when the package is not installed."""
    (tmp_path / "wandb").mkdir()
    script = (
        "from elara.errors import ElaraError\nfrom elara.training.loggers import wandb\n"
        "try:\n    wandb('.', name='x', project='p', mode='offline')\nexcept ElaraError as error:\n    print(error)"
    )
    printed = run(installed / "bin/python", "-c", script, cwd=tmp_path)
    assert printed.startswith("logger=wandb needs the package wandb: pip install") and printed.count("\n") == 1


@pytest.mark.slow
def test_verify_counts_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "bin/elara-verify", "model=elara_2p8b", "json=true", "smoke=false", cwd=tmp_path)
    assert json.loads(printed)["total"] == 2_855_328_000
    manifest = "from importlib.resources import files; print(files('elara').joinpath('manifest.json').read_text())"
    assert json.loads(run(installed / "bin/python", "-c", manifest, cwd=tmp_path))["name"] == "elara-hivemind"


@pytest.mark.slow
def test_the_core_stays_under_its_budget(installed: Path) -> None:
    """1.2 GB with the CPU build of torch; other builds bring their own libraries.

    Every module counts twice: pip compiles it into a file of its size, which this environment leaves out.
    """
    if run(installed / "bin/python", "-c", "import torch; print(torch.version.cuda)", cwd=installed).strip() != "None":
        pytest.skip("torch is not the CPU build")
    files = [file for file in installed.rglob("*") if file.is_file() and not file.is_symlink()]
    size = sum(file.stat().st_size * {".py": 2, ".pyc": 0}.get(file.suffix, 1) for file in files)
    assert size < 1.2e9, f"{size / 1e9:.2f} GB"
