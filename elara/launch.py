"""The processes of a run: how they are started, watched over and ended, so that none of them outlives the others.

Lightning's own launcher starts the ranks from rank 0: when that dies the others hang, and when another dies rank 0 is
killed without a word. Here a process that does not train starts all ranks, and every process watches its parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from elara.errors import EXIT_ERROR, EXIT_SAVED, ElaraError

PARENT = "ELARA_PARENT"  # pid of the process that started this one; when it ends, this one saves and ends too
ERRORS = "ELARA_ERRORS"  # folder where a rank leaves its one-line error for the process that speaks for all
POLL = 0.1  # seconds between looks at the ranks
GRACE = 5.0  # seconds that the other ranks get to end by themselves when one has failed
SAVING = 600.0  # seconds that a process without its parent gets to save
STAMP = "%Y-%m-%d_%H-%M-%S"  # names of the folders of runs and sweeps
# What tells a process its place among ranks; the jobs of a sweep start ranks of their own
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

_parent = 0  # pid of the process of ours that started this one


def signals() -> list[int]:
    """The signals that ask this process to save and end; SIGHUP only where it is heard, which it is not under nohup."""
    found = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    deaf = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in found if not (deaf and number == signal.SIGHUP)]


def is_rank() -> bool:
    """Whether this process is one of several that something started together: this module, torchrun or srun."""
    return "LOCAL_RANK" in os.environ or is_slurm_task()


def is_slurm_task() -> bool:
    """Whether srun started this process beside others; the script of an sbatch job knows their number, but is none."""
    return "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def local_rank() -> int:
    """This process's number among the ranks of its machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def global_rank() -> int:
    """This process's number among all ranks; 0 where there is only one."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0)


def local_ranks() -> int | None:
    """How many ranks torchrun started on this machine, which then decides `trainer.devices`; None without torchrun."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in os.environ else None


def nodes() -> int:
    """Machines that torchrun or srun started ranks on."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("SLURM_NNODES", "1")) if is_slurm_task() and ERRORS not in os.environ else 1


def new_name(parent: Path) -> str:
    """The name of a new folder in `parent`, on every rank the same: the time, and a number where that is taken.

    The folder is made here, so that of two processes begun in the same second each has its own. torchrun's ranks hear
    its name from the first one, through torchrun's own store; those of a SLURM step take the step's number.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False)
        key = f"elara/folder/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        if global_rank() == 0:
            store.set(key, _take_name(parent))
        return str(store.get(key).decode())
    if is_slurm_task():
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return _take_name(parent)


def _take_name(parent: Path) -> str:
    stamp = time.strftime(STAMP)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                (parent / name).mkdir()
                return name
    except OSError:
        pass  # who writes there next meets the same, and says so
    return stamp


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a process that must not outlive this one; `more` may give it a place among ranks."""
    inherited = {name: value for name, value in os.environ.items() if name not in PLACE}
    return {**inherited, PARENT: str(os.getpid()), **more}


def watch_parent() -> None:
    """End this process, saving first if it trains, when the process that started it is gone."""
    global _parent
    _parent = int(os.environ.pop(PARENT, "0"))
    if _parent:
        threading.Thread(target=_watch, args=(_parent,), name="watch-parent", daemon=True).start()


def has_parent() -> bool:
    """Whether a process of ours started this one, as a sweep, a search and a starter of ranks do."""
    return _parent != 0


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING)
    os._exit(EXIT_ERROR)


def leave_error(line: str) -> bool:
    """Hand the line to the process that started the ranks; False where there is none and the rank speaks for itself."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return False
    with contextlib.suppress(OSError):
        Path(folder, str(local_rank())).write_text(line, "utf-8")
    return True


def run_ranks(command: Sequence[str], count: int, resume: str) -> int:
    """Run `command` in `count` processes, ranks 0 .. count - 1 of one machine; returns the exit code for all of them.

    A signal is passed on, once each time. When a rank fails, the others are ended within GRACE seconds. resume: the
    command that goes on from the last checkpoint, for the message. Raises ElaraError with the first rank's error.
    """
    with tempfile.TemporaryDirectory(prefix="elara-ranks-") as errors:
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "NODE_RANK": "0",
            ERRORS: errors,
        }
        if "OMP_NUM_THREADS" not in os.environ:
            shared["OMP_NUM_THREADS"] = str(max(1, cores() // count))
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            with _passing_on(ranks):
                for rank in range(count):
                    environment = child_environment(LOCAL_RANK=str(rank), RANK=str(rank), **shared)
                    ranks.append(subprocess.Popen(command, env=environment, start_new_session=True))
                codes, ended = _wait(ranks)
        finally:
            for process in ranks:
                _kill(process)
        if all(code == 0 for code in codes.values()):
            return 0
        if set(codes.values()) == {EXIT_SAVED}:
            return EXIT_SAVED
        return _explain(codes, ended, ranks, Path(errors), resume)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def signal_name(code: int) -> str:
    """`SIGKILL` of the exit code -9."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[dict[int, int], set[int]]:
    """Exit codes by rank, in the order in which the ranks ended, and the ranks that were killed here.

    When one has failed, the others get GRACE seconds; when one has saved, SAVING.
    """
    codes: dict[int, int] = {}
    killed: set[int] = set()
    deadline = float("inf")
    while len(codes) < len(ranks):
        ended = {rank: p.returncode for rank, p in enumerate(ranks) if rank not in codes and p.poll() is not None}
        # of those that ended between two looks, the killed one came first: the others failed because of it
        codes.update(sorted(ended.items(), key=lambda item: item[1]))
        if any(code not in (0, EXIT_SAVED) for code in ended.values()):
            deadline = min(deadline, time.monotonic() + GRACE)
        elif EXIT_SAVED in ended.values():
            deadline = min(deadline, time.monotonic() + SAVING)
        if time.monotonic() > deadline:
            for rank, process in enumerate(ranks):
                if process.poll() is None:
                    killed.add(rank)
                    _kill(process)
        time.sleep(POLL)
    return codes, killed


def _explain(
    codes: Mapping[int, int], ended: set[int], ranks: Sequence[subprocess.Popen[bytes]], errors: Path, resume: str
) -> int:
    """Say once, for all ranks, what happened; returns the exit code or raises ElaraError. ended: those killed by us."""
    codes = {rank: code for rank, code in codes.items() if rank not in ended} or codes
    killed = next((rank for rank, code in codes.items() if code < 0), None)
    if all(code in (0, EXIT_SAVED) for code in codes.values()):
        raise ElaraError(f"ranks {sorted(ended)} hung when the others had ended: go on with {resume}")
    first = next(rank for rank, code in codes.items() if code not in (0, EXIT_SAVED))
    lines = {rank: _read(errors / str(rank)) for rank in codes}
    own = next((lines[rank] for rank in sorted(codes) if lines[rank] and codes[rank] > 0), "")
    if killed is not None and (killed == first or not own):
        what = f"rank {killed} (process {ranks[killed].pid}) was killed by {signal_name(codes[killed])}"
        hint = ", perhaps for want of memory" if codes[killed] == -getattr(signal, "SIGKILL", 9) else ""
        raise ElaraError(f"{what}{hint}; all ranks were ended: go on from the last checkpoint with {resume}")
    if own:
        raise ElaraError(lines[first] or own)
    return codes[first]


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:
        return ""


@contextlib.contextmanager
def _passing_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals to this process reach every rank, and a terminal's Ctrl-C reaches this process only."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a rank and the data workers of its group at once."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
