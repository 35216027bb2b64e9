"""Weights & Biases: curves, pictures, samples and checkpoints of a run, on its server or kept for it on disk."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import shutil
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from elara import checkpoint
from elara.errors import EXIT_ERROR, EXIT_SAVED, ElaraError
from elara.report.metrics import read_metrics
from elara.runs import Run, shown
from elara.training.loggers import naming
from elara.training.loggers.monitor import Monitor

MODES, CHECKPOINTS = ("auto", "online", "offline"), ("none", "best", "all")
LOSS = "val/loss_ar"
FLUSH = "x_transaction_log_flush_interval"
FLUSH_SECONDS = 0.1  # how much a killed process may lose of what it logged; wandb's own default is 15
LOG_HEADER = 7  # bytes of a log without a record
REACH = 10.0  # seconds that the server gets to take a connection
REGROW = 1.1  # the table of samples is sent again when it has grown by so much; at the end in any case


def wandb(
    folder: str,
    *,
    name: str,
    project: str,
    mode: str,
    entity: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    checkpoints: str = "none",
) -> WeightsAndBiases:
    """Weights & Biases, called `name` and the overrides in the run folder `folder`, which also become tags.

    mode: online (needs a key), offline (no account, no network; `wandb sync` uploads later) or auto: online with a key
    that the server takes, else offline. group: None = the sweep or search that the run is part of.
    checkpoints: which go there as artifacts: none, best or all.
    Raises ElaraError when the package is missing, or the key where it must be there.
    """
    for key, value, choices in (("mode", mode, MODES), ("checkpoints", checkpoints, CHECKPOINTS)):
        if value not in choices:
            raise ElaraError(f"logger.wandb.{key}={value} must be one of {', '.join(choices)}")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb as package  # heavy, an extra, and wanted only here

        importlib.import_module("wandb.errors")  # a folder called wandb, as it leaves them where it runs, is no package
    except ModuleNotFoundError as error:
        raise ElaraError("logger=wandb needs the package wandb: pip install 'elara-hivemind[wandb]'") from error
    first = getattr(rank_zero_only, "rank", 0) in (None, 0)  # other ranks log nothing
    online = first and mode != "offline" and _log_in(package, must=mode == "online")
    overrides = naming.telling(Path(folder))
    about = {
        "project": project,
        "entity": entity,
        "name": naming.shown_name(name, overrides),
        "group": group or naming.group(Path(folder)),
        "job_type": naming.kind(Path(folder)),
        "tags": list(dict.fromkeys([*naming.tags(overrides), *tags])),
    }
    return WeightsAndBiases(Path(folder), about, online=online, checkpoints=checkpoints)


def _log_in(package: Any, *, must: bool) -> bool:
    """Whether there is a key and the server takes it; ElaraError instead of False when it `must` be so."""
    if not must and os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return False
    reason = "there is no key: run `wandb login`"
    try:
        _check_reachable(package)
        if package.login(prompt=False):
            return True
    except package.errors.Error as error:
        reason = str(error).splitlines()[0]
        if not must:
            print(f"note: wandb goes on offline, {reason}", flush=True)
    if must:
        raise ElaraError(f"logger.wandb.mode=online does not work, {reason}; or set logger.wandb.mode=offline")
    return False


def _has_key(settings: Any) -> bool:
    """Whether wandb will find a key for its server, in the environment, its settings or the user's .netrc."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        return netrc(os.environ.get("NETRC")).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    except (OSError, NetrcParseError):
        return False


def _check_reachable(package: Any) -> None:
    """Raise wandb's own error at once where it would try for minutes: there is a key, but no server.

    What goes through a proxy is left to wandb.
    """
    settings = package.setup().settings
    parts = urlsplit(settings.base_url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if not _has_key(settings) or (parts.scheme in getproxies() and not proxy_bypass(host)):
        return
    try:
        socket.create_connection((host, port), timeout=REACH).close()
    except OSError as error:
        raise package.errors.CommError(f"{settings.base_url} cannot be reached ({error.strerror or error})") from error


class WeightsAndBiases(Monitor):
    """A wandb run whose id lies in the run folder, so that a resumed run continues its own curves.

    Figures of one step share a row, under `step`, which is the axis of every curve. After a crash the server is asked
    what it has: steps that come again are not sent twice, steps that the dead process did not get rid of are sent
    from metrics.csv. Offline nobody can be asked: there a step that comes again makes a second row with the same
    `step` and, as resuming is exact, the same losses.

    about: project, entity, name, group, job type and tags of a new run; a run that goes on keeps what it has, as its
    owner may have changed them on the server.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], *, online: bool, checkpoints: str) -> None:
        super().__init__()
        self.folder = folder / "wandb"
        self.about = about
        self.online = online
        self.checkpoints = checkpoints
        self._note = folder / "wandb_id"
        self._run: Any = None
        self._row: dict[str, Any] = {}
        self._there: int | None = None  # newest step on the server when this process began
        self._shown_samples = 0  # rows of the table that was sent last
        self._url: str | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        """The run's id, made when it is first asked for."""
        if not self._note.exists():
            self._note.parent.mkdir(parents=True, exist_ok=True)
            self._note.write_text(uuid.uuid4().hex[:8] + "\n", "utf-8")
        return self._note.read_text("utf-8").strip()

    @property
    def hint(self) -> str:
        if self._url:
            return f"curves: {self._url}"
        return f"upload the curves: wandb sync {shlex.quote(shown(self.folder))}"

    @property
    def run(self) -> Any:
        """The wandb.Run, begun when it is first needed. Raises ElaraError when it cannot begin."""
        if self._run is None:
            self._run = self._begin()
            self._url = self._run.url
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.run.config.update(dict(params), allow_val_change=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step != self._row.get("step"):
            self.save()
            self._row = {"step": step}
            self._catch_up()
        self._row.update(metrics)

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        self.run.config.update(dict(facts), allow_val_change=True)

    def log_best(self, figures: Mapping[str, float]) -> None:
        self.save()  # the summary of a row that comes later would win
        for name, lowest in figures.items():
            self.run.summary.update({name: {**dict(self.run.summary.get(name) or {}), "min": lowest}})

    def log_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        import wandb

        self.log_metrics({f"pictures/{name}": wandb.Image(pixels)}, step)

    def log_samples(self, samples: Sequence[tuple[str, str]], step: int) -> None:
        """A table cannot grow once it is logged, so all its rows are sent again; they are kept on disk for resumes."""
        rows = [row for row in self._samples() if row[0] < step] + [[step, *sample] for sample in samples]
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self._samples_file, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        if len(rows) >= REGROW * self._shown_samples:
            self._send_samples(rows, step)

    def log_checkpoint(self, folder: Path, aliases: Sequence[str]) -> None:
        import wandb

        meta = checkpoint.read_meta(folder)
        about: dict[str, Any] = {key: meta[key] for key in ("step", "run", "parent", "metrics") if key in meta}
        artifact = wandb.Artifact(f"model-{self.version}", type="model", metadata=about)
        kept = _kept(folder, self.folder / "checkpoints" / folder.name)
        for file in sorted(path for path in kept.rglob("*") if path.is_file()):
            # immutable: read from where it lies rather than copied to the home folder first
            artifact.add_file(str(file), file.relative_to(kept).as_posix(), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=list(aliases))

    @rank_zero_only
    def save(self) -> None:
        """Hand the row that is being filled over to wandb, unless the server has it."""
        row, self._row = self._row, {}
        repeated = self._there is not None and self.resumed_step and row.get("step", 0) < self._there
        if len(row) > 1 and not repeated:
            self.run.log(row)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is None:
            return
        if self.more_follows and status == "success":
            self.save()
            return
        rows = self._samples()
        if len(rows) > self._shown_samples:
            self._send_samples(rows, rows[-1][0])
        self.save()
        code = self.exit_code or (0 if status == "success" else EXIT_ERROR)
        if code == EXIT_SAVED:
            self._run.mark_preempting()
        self._run.finish(exit_code=code)
        self._run = None
        if self.online:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # they are uploaded

    def _begin(self) -> Any:
        import wandb

        private: dict[str, Any] = {FLUSH: FLUSH_SECONDS} if FLUSH in wandb.Settings.model_fields else {}
        earlier = self._earlier_logs()
        about = {key: value for key, value in self.about.items() if key in ("project", "entity") or not earlier}
        try:
            run = wandb.init(
                **about,
                id=self.version,
                resume="allow",
                dir=str(self.folder.parent),
                mode="online" if self.online else "offline",
                settings=wandb.Settings(**private),
            )
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ElaraError(f"wandb cannot begin its run: {reason}; or set logger.wandb.mode=offline") from error
        if self.online and any(folder.name.startswith("run-") for folder in earlier):
            self._there = run.summary.get("step") or 0
        for section in ("train", "val", "pictures"):
            run.define_metric(f"{section}/*", step_metric="step")
        run.define_metric("moe/*", step_metric="step", hidden=True)  # hundreds: the picture shows them
        run.define_metric(LOSS, step_metric="step", summary="min,last")
        return run

    def _catch_up(self) -> None:
        """Send what a process that was killed had logged before its last checkpoint and could not send."""
        if self._there is None or self._there >= self.resumed_step:
            return
        columns = read_metrics(Run(self.folder.parent).metrics)
        for row in zip(*columns.values(), strict=True):
            figures = {name: float(value) for name, value in zip(columns, row, strict=True) if value == value}
            step = int(figures.pop("step"))
            if self._there < step <= self.resumed_step:
                self.run.log({"step": step, **figures})
        self._there = self.resumed_step

    def _earlier_logs(self) -> list[Path]:
        """Folders of wandb's logs, offline-run-* and run-*, of earlier processes of this run.

        Those without a record, of processes killed in their first moment, go: `wandb sync` stumbles over them.
        """
        found = []
        for log in self.folder.glob(f"*run-*-{self.version}/run-*.wandb"):
            if log.stat().st_size > LOG_HEADER:
                found.append(log.parent)
            else:
                shutil.rmtree(log.parent, ignore_errors=True)
        return found

    @property
    def _samples_file(self) -> Path:
        return self.folder / "samples.jsonl"

    def _samples(self) -> list[list[Any]]:
        """All samples so far as [step, prompt, text]."""
        rows = []
        if self._samples_file.exists():
            for line in self._samples_file.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):  # half a line of a process that was killed
                    rows.append(json.loads(line))
        return rows

    def _send_samples(self, rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        self._shown_samples = len(rows)
        self.log_metrics({"samples": wandb.Table(["step", "prompt", "text"], data=[list(row) for row in rows])}, step)


def _kept(folder: Path, copy: Path) -> Path:
    """The weights of a checkpoint under a name that outlives it: linked, so that they take no room of their own."""
    shutil.rmtree(copy, ignore_errors=True)

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:  # another file system, or one without links
            shutil.copy2(source, target)

    def trainers(place: str, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in (checkpoint.TRAINER, checkpoint.OPTIMIZER)]

    shutil.copytree(folder, copy, ignore=trainers, copy_function=link)
    return copy
