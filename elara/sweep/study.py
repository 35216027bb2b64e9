"""An Optuna study in a folder that several processes and machines may share, and that survives any of them.

Every step from "is there a trial to run" to "this one is mine" happens under a lock of the folder, so that the study
reaches its number of trials exactly. Each trial draws from a generator of (seed, trial number): a resumed search and
the searches of several machines do not repeat each other's draws.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pickle
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, Trial, TrialState

from elara.errors import ElaraError
from elara.sweep.compose import Steps
from elara.sweep.config import SearchConfig
from elara.sweep.process import started
from elara.sweep.records import Record
from elara.sweep.space import Parameter

JOURNAL = "journal.log"
ATTEMPTS = 3  # times that the values of a trial whose search was killed are tried
STOPPED = "stopped with its search"  # the error of a trial that did nothing wrong
OPTIMIZER_PARTS = frozenset(
    [
        ("cmaes._cma", "CMA"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ]
)  # all that CMA-ES's state consists of


class SharedStudy:
    """The study of one search; raises ElaraError when the folder holds another one or cannot be used."""

    def __init__(
        self, wanted: SearchConfig, space: Sequence[Parameter], fixed: Sequence[str], folder: Path, steps: Steps
    ) -> None:
        logging.getLogger("optuna").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="optuna")
        self.wanted, self.space, self.steps = wanted, space, steps
        self.host = socket.gethostname()
        self.revived: list[int] = []  # trials of a search that was killed, which are to run again
        self.folder = folder
        journal = folder / JOURNAL
        with self.alone("start"):
            lock = JournalFileOpenLock(str(journal))
            _mend(journal, lock)
            try:
                self._storage = JournalStorage(JournalFileBackend(str(journal), lock))
                self.study = self._open(fixed)
            except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
                raise ElaraError(f"{journal} cannot be read ({error}): move it away to begin anew") from error
            self._revive()

    def start(self) -> tuple[Trial, list[str]] | None:
        """The next trial and its searched overrides; None while the study has all that it needs, run or running."""
        with self.alone("start"):
            trials = self.study.get_trials(deepcopy=False)
            taken = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) for t in trials)
            if taken >= self.wanted.trials:
                return None
            number = next((t.number for t in trials if t.state == TrialState.WAITING), len(trials))
            self.study.sampler = make_sampler(self.wanted, seed=(self.wanted.seed * 1_000_003 + number) % 2**32)
            trial = self.study.ask()
            overrides = [f"{parameter.key}={parameter.sample(trial)}" for parameter in self.space]
            owner = {"host": self.host, "pid": os.getpid(), "started": started(os.getpid()), "overrides": overrides}
            for name, value in owner.items():
                trial.set_user_attr(name, value)
            return trial, overrides

    def complete(self, trial: Trial, value: float) -> None:
        self.study.tell(trial, value)

    def prune(self, trial: Trial) -> None:
        self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: Trial, error: str) -> None:
        trial.set_user_attr("error", error)
        self.study.tell(trial, state=TrialState.FAIL)

    def give_back(self, trial: Trial) -> None:
        """The trial was stopped through no fault of its own: its values are to be tried again."""
        attempt = trial.user_attrs.get("attempt", 0)
        self.fail(trial, STOPPED)
        self.study.enqueue_trial(trial.params, user_attrs={"attempt": attempt})

    def records(self) -> list[Record]:
        """All trials that began, by number."""
        trials = self.study.get_trials(deepcopy=False)
        return [_record(trial) for trial in trials if trial.state != TrialState.WAITING and trial.params]

    def elsewhere(self) -> list[Record]:
        """Trials that other processes are running, as far as is known."""
        mine = (self.host, os.getpid())
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [_record(t) for t in running if (t.user_attrs.get("host"), t.user_attrs.get("pid")) != mine]

    def _open(self, fixed: Sequence[str]) -> optuna.Study:
        wanted = self.wanted
        asked = {
            "metric": wanted.metric,
            "direction": wanted.direction,
            "overrides": list(fixed),
            "space": [{**asdict(parameter), "choices": list(parameter.choices)} for parameter in self.space],
        }
        study = self._create()
        before = study.user_attrs.get("asked", asked)
        changed = [key for key in asked if before[key] != asked[key]]
        if changed and any(t.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
                           for t in study.get_trials(deepcopy=False)):  # fmt: skip
            what = ", ".join(changed)
            raise ElaraError(
                f"study={wanted.study} was begun with another {what}, so its trials do not compare with these: "
                "give this search a study name of its own"
            )
        if changed:  # nothing came out of it yet, so a mistake can be corrected under the same name
            optuna.delete_study(study_name=wanted.study, storage=self._storage)
            study = self._create()
        if study.user_attrs.get("asked") != asked:
            study.set_user_attr("asked", asked)
        return study

    def _create(self) -> optuna.Study:
        wanted = self.wanted
        return optuna.create_study(
            storage=self._storage,
            study_name=wanted.study,
            direction=cast(Literal["minimize", "maximize"], wanted.direction),
            pruner=make_pruner(wanted, self.steps),
            load_if_exists=True,
        )

    def _revive(self) -> None:
        """Mark trials as failed whose search is gone, and put their values back into the queue."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            owner = trial.user_attrs
            host, pid = owner.get("host"), owner.get("pid")
            if host == self.host:
                dead = pid is None or started(int(pid)) != owner.get("started")
            else:  # a trial without a host: nobody is between asking and signing while we hold the lock
                dead = host is None or host in self.wanted.dead
            if not dead:
                continue
            self._storage.set_trial_user_attr(trial._trial_id, "error", STOPPED)
            self.study.tell(trial.number, state=TrialState.FAIL)
            attempt = owner.get("attempt", 0) + 1
            if trial.params and attempt < ATTEMPTS:
                self.study.enqueue_trial(trial.params, user_attrs={"attempt": attempt})
                self.revived.append(trial.number)

    @contextlib.contextmanager
    def alone(self, what: str, grace: int = 30) -> Iterator[None]:
        """Let one process at a time, of whatever machine, do `what` in this folder; locks expire after `grace` s.

        The lock is a file that only one can create, which network folders keep to as well.
        """
        lock = JournalFileOpenLock(str(self.folder / what), grace)
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # taken away, as this process was very slow
                lock.release()


def make_sampler(wanted: SearchConfig, seed: int) -> BaseSampler:
    """The sampler that `wanted.sampler` describes."""
    startup = wanted.sampler.startup
    if wanted.sampler.name == "tpe":
        # constant_liar: running trials count as bad ones, so that neighbours do not all try the same place
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)
    if wanted.sampler.name == "cmaes":
        pruned = wanted.pruner.name == "hyperband"  # as Optuna's authors measured: with median pruning it harms
        return _CmaEs(
            seed=seed, n_startup_trials=startup, consider_pruned_trials=pruned, warn_independent_sampling=False
        )
    return RandomSampler(seed=seed)


class _CmaEs(CmaEsSampler):
    """Optuna's, which keeps its state as a pickle in the journal, and would run whatever a journal holds there."""

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            mine = {key: text for key, text in trial.system_attrs.items() if key.startswith(self._attr_key_optimizer)}
            if not mine:
                continue
            try:
                return _OptimizerUnpickler(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(mine)))).load()
            except Exception as error:  # a damaged pickle may end in any
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise ElaraError(
                    f"the state of CMA-ES in trial {trial.number} of {JOURNAL} cannot be read ({reason}): do not trust "
                    "this study if it came from elsewhere, else begin another one"
                ) from error
        return None


class _OptimizerUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in OPTIMIZER_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def make_pruner(wanted: SearchConfig, steps: Steps) -> BasePruner:
    """The pruner that `wanted.pruner` describes, for trials that are judged at every validation."""
    pruner = wanted.pruner
    if pruner.name == "median":
        return MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup)
    if pruner.name == "hyperband":
        first = max(steps.validation or 1, pruner.warmup)
        return HyperbandPruner(
            min_resource=first, max_resource=max(steps.last or 0, first) or "auto", reduction_factor=pruner.reduction
        )
    return NopPruner()


def _mend(journal: Path, lock: JournalFileOpenLock) -> None:
    """Cut off half a line that a full disk or a lost machine left at the end: lines written behind it would be lost."""
    if not journal.exists():
        return
    with get_lock_file(lock), open(journal, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _record(trial: FrozenTrial) -> Record:
    attrs = trial.user_attrs
    states = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
    state = states.get(trial.state, "stopped" if attrs.get("error") == STOPPED else "failed")
    curve = dict(sorted(trial.intermediate_values.items()))
    value = trial.value if trial.state == TrialState.COMPLETE else next(reversed(curve.values()), None)
    seconds = trial.duration.total_seconds() if trial.duration else 0.0
    return Record(trial.number, state, value, curve, dict(trial.params), attrs.get("overrides", []), seconds,
                  attrs.get("host", ""), attrs.get("error"))  # fmt: skip
