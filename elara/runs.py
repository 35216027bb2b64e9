"""The run folder: what lies where in it, how runs are found again, and who may write to one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import OmegaConf

from elara.errors import ElaraError
from elara.launch import new_name

LOCK = ".lock"  # held by the process that trains in a folder
_STEP = re.compile(r"step-\d+")  # names of checkpoints
# Names under which checkpoints, links to them, and small files are written, or deleted, until they are whole or gone
LEFTOVER = re.compile(r"\.(step-\d+|last|best)-(old-)?[0-9a-f]{8}|\.[\w-]+\.(json|csv|yaml)\.(\d+|tmp)")
CHECKOUT = Path(__file__).resolve().parent.parent


def project_root() -> Path:
    """Where `data/` and `outputs/` go: $ELARA_HOME, else the checkout this package lies in, else the current folder."""
    if home := os.environ.get("ELARA_HOME"):
        return Path(home).expanduser().resolve()
    return CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()


@dataclass(frozen=True)
class Run:
    """One training run's folder: outputs/train/<name>/<time>."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The command line's overrides, a YAML list."""
        return self.path / ".hydra" / "overrides.yaml"

    @property
    def hydra(self) -> Path:
        """Hydra's own settings of the command that began the run or went on with it, with its folder; YAML."""
        return self.path / ".hydra" / "hydra.yaml"

    def record(self, hydra: Any) -> None:
        """Remember the command that this run is begun or gone on with. hydra: Hydra's own settings (a HydraConf).

        Hydra itself would write this before anyone could refuse the command, over the record of another run.
        """
        self.overrides.parent.mkdir(exist_ok=True)
        write_whole(self.overrides, OmegaConf.to_yaml(hydra.overrides.task))
        write_whole(self.hydra, OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra})))

    def discard(self) -> None:
        """Remove the traces of a run that never began; what else lies in the folder stays, and so does the folder."""
        shutil.rmtree(self.path / ".hydra", ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def read_overrides(self) -> list[str]:
        """The command line's overrides; [] where Hydra saved none."""
        try:
            found = yaml.safe_load(self.overrides.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return []
        return [str(text) for text in found] if isinstance(found, list) else []

    @property
    def metrics(self) -> Path:
        """One row per logged step."""
        return self.path / "metrics.csv"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def samples(self) -> Path:
        """What the model wrote during training."""
        return self.path / "samples.txt"

    @property
    def summary(self) -> Path:
        """Final metrics, versions, hardware; `finished` tells whether training reached its last step."""
        return self.path / "summary.json"

    @property
    def job(self) -> Path:
        """How the process of a job of a sweep ended."""
        return self.path / "job.json"

    @property
    def job_log(self) -> Path:
        """What that process wrote."""
        return self.path / "job.log"

    @property
    def last(self) -> Path:
        """Link to the newest checkpoint; `followed` tells which."""
        return self.path / "checkpoints" / "last"

    @property
    def best(self) -> Path:
        """Link to the checkpoint with the lowest validation loss; `followed` tells which."""
        return self.path / "checkpoints" / "best"

    @property
    def finished(self) -> bool:
        """Whether training reached its last step; of a job without a summary, whether its process ended well."""
        if summary := self.read_summary():
            return bool(summary.get("finished"))
        return self.read_job().get("exit_code") == 0

    @property
    def over(self) -> bool:
        """Whether a sweep has done with it: finished, or ended well by itself before that, as its time was up."""
        return self.finished or self.read_job().get("exit_code") == 0

    def read_job(self) -> dict[str, Any]:
        """job.json, or {} where there is none."""
        return _read_json(self.job)

    def read_summary(self) -> dict[str, Any]:
        """summary.json, or {} while there is none."""
        return _read_json(self.summary)

    def checkpoints(self) -> list[Path]:
        """The checkpoints step-N, newest first; where `last` or `best` was copied alone, as a folder, that one too."""
        found = {path for path in (self.path / "checkpoints").glob("step-*") if _STEP.fullmatch(path.name)}
        found |= {followed(link) for link in (self.last, self.best) if link.is_dir()}
        return sorted(found, key=step_of, reverse=True)

    def remove_leftovers(self) -> None:
        """Delete what killed processes were writing, whole checkpoints among it; only for who holds the folder."""
        places = [self.path, self.path / "checkpoints", *self.checkpoints()]
        for left in (path for place in places if place.is_dir() for path in place.iterdir()):
            if not LEFTOVER.fullmatch(left.name):
                continue
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def say_reading(*paths: Path) -> None:
    """Tell which checkpoints or runs a command found, on stderr: what it writes to stdout may go on into a pipe."""
    print(f"reading {', '.join(shown(path.resolve()) for path in paths)}", file=sys.stderr, flush=True)


def shown(path: Path) -> str:
    """A path as the user would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def python() -> str:
    """How the user would type the Python that runs this: its path where `python` is another one or none."""
    ours = Path(sys.executable)
    found = shutil.which("python")
    if found is not None and Path(found).parent.resolve() == ours.parent.resolve():
        return "python"
    return shlex.quote(shown(ours))


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, also while others, on whatever machine, write the same one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error


def followed(link: Path) -> Path:
    """The checkpoint folder that `last` or `best` stands for; a path that is no such link is returned as it is.

    In a copied run a link may have become a folder of its own (scp -r, zip) or a file with a name in it (disks without
    links, where such a file is also what is written here).
    """
    if link.is_symlink():
        return link.with_name(os.readlink(link).rpartition("/")[2])
    if link.is_file() and (found := _STEP.fullmatch(link.read_text("utf-8", errors="replace")[:99].strip())):
        return link.with_name(found[0])
    if link.is_dir() and not _STEP.fullmatch(link.name):
        twin = link.with_name(f"step-{_read_json(link / 'meta.json').get('step')}")
        return twin if (twin / "meta.json").is_file() else link
    return link


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that led to a checkpoint folder (or the one a link leads to); -1 where nothing tells."""
    folder = followed(checkpoint)
    if _STEP.fullmatch(folder.name):
        return int(folder.name.removeprefix("step-"))
    step = _read_json(folder / "meta.json").get("step")
    return step if isinstance(step, int) else -1


def train_root() -> Path:
    return project_root() / "outputs" / "train"


def sweep_root() -> Path:
    return project_root() / "outputs" / "sweeps"


def new_folder(*parts: str) -> Path:
    """A folder outputs/<parts>/<time> that no other process has, on every rank of this one's the same."""
    parent = project_root().joinpath("outputs", *parts)
    return parent / new_name(parent)


def find_runs(name: str | None = None, root: Path | None = None) -> list[Run]:
    """Training runs, that with the newest checkpoint first: those called `name`, or all."""
    root = root or train_root()
    folders = (root / name).glob("*/") if name else root.glob("*/*/")
    runs = [Run(folder) for folder in folders if (folder / ".hydra").is_dir()]
    return sorted(runs, key=lambda run: worked_at(run.path), reverse=True)


def saved_at(checkpoint: Path) -> float:
    """Seconds since 1970 at which a checkpoint was saved, as its meta.json says; of older ones the file's own time."""
    try:
        return datetime.fromisoformat(_read_json(checkpoint / "meta.json")["saved"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return _written(checkpoint / "meta.json", checkpoint)


def worked_at(folder: Path) -> float:
    """When the newest checkpoint of a run, or of a sweep's jobs, was saved; without any, when it last began.

    Neither the folder's name, which is a time of wherever it was made, nor what copying does to files counts.
    """
    run = Run(folder)
    times = [saved_at(path) for path in run.checkpoints()] or [worked_at(job) for job in folder.glob("[0-9]*/")]
    return max(times, default=_written(run.config, run.path / ".hydra", folder))


def _written(*paths: Path) -> float:
    """The time of the first of these that is there; 0 where none is."""
    return next((path.stat().st_mtime for path in paths if path.exists()), 0.0)


def newest_unfinished(name: str, root: Path | None = None) -> Run | None:
    """The run that `resume=auto` continues: the newest one of that name that began and is not finished.

    None while there is no run of that name, so that the command which a scheduler repeats is the same from the first
    time on. Raises ElaraError when every one of them is finished.
    """
    runs = [run for run in find_runs(name, root) if run.config.exists()]
    for run in runs:
        if not run.finished:
            return run
    if runs:
        raise ElaraError(f"nothing to resume: every run called '{name}' is finished (the newest is {runs[0].path})")
    return None


def find_checkpoint(where: str | Path | None = None) -> Path:
    """A checkpoint folder for sampling or evaluation.

    where: a checkpoint folder; a run folder (its best checkpoint, else the last); a run's name (its newest run that has
    one), also where a folder without a checkpoint is called the same, as this package is; None: the newest run of any
    name. The newest is the one whose last checkpoint is, finished or not. Raises ElaraError when there is nothing.
    """
    if where is not None:
        path = followed(Path(where)) if Path(where).is_file() else Path(where)
        if (path / "config.json").is_file():
            return path
        if found := _best_of(Run(path)):
            return found
    runs = find_runs(str(where) if where is not None else None)
    for run in runs:
        if found := _best_of(run):
            return found
    if where is not None:
        if Path(where).is_dir():
            return _nothing(f"{where} holds no checkpoint, and there is no run of that name")
        return _nothing(f"there is no checkpoint at '{where}', and no run of that name")
    return _nothing(f"there is no trained model under {train_root()}")


def _best_of(run: Run) -> Path | None:
    links = [link if link.is_dir() else followed(link) for link in (run.best, run.last)]
    candidates = [*links, *run.checkpoints()]
    return next((p for p in candidates if (p / "config.json").is_file()), None)


def _nothing(message: str) -> Path:
    raise ElaraError(f"{message}: train one with `{python()} -m elara.train` first")


def claim(folder: Path) -> IO[str]:
    """Make this process the only one that trains in `folder`, until it ends; keep the returned file open.

    Raises ElaraError when another process holds the folder or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w", encoding="utf-8")  # noqa: SIM115 - held open on purpose
    except OSError as error:
        raise ElaraError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        import fcntl  # absent on Windows, where nothing guards the folder
    except ImportError:
        return lock
    try:
        # lockf, not flock: data workers forked later must not keep the lock alive after this process is killed
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ElaraError(f"another process is training in {folder}: wait for it or stop it first") from error
    return lock
