"""Processes that begin together end together, and one of them speaks for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elara import launch
from elara.errors import EXIT_SAVED, ElaraError

ROOT = Path(__file__).parents[1]
HEAD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from elara import launch
rank = launch.local_rank()
def note(text): open(os.path.join({folder!r}, str(rank)), "w").write(text)
note("")
while len([f for f in os.listdir({folder!r}) if f.isdigit()]) < 2: time.sleep(0.01)
"""


def run(folder: Path, body: str, count: int = 2) -> int:
    """Two ranks that run `body`, once both have begun."""
    program = HEAD.format(root=str(ROOT), folder=str(folder)) + body
    return launch.run_ranks([sys.executable, "-c", program], count, "the command to go on")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.5)
    monkeypatch.setattr(launch, "POLL", 0.02)


def test_ranks_know_their_place(tmp_path: Path) -> None:
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR")
    assert run(tmp_path, f"note(' '.join(os.environ[name] for name in {names}))") == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 2 0 127.0.0.1", "1 1 2 0 127.0.0.1"]


def test_the_error_of_one_rank_is_the_error_of_all_and_ends_the_other(tmp_path: Path) -> None:
    began = time.monotonic()
    body = "if rank: launch.leave_error('no such thing'); sys.exit(1)\nnote(str(os.getpid())); time.sleep(60)"
    with pytest.raises(ElaraError, match=r"^no such thing$"):
        run(tmp_path, body)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "0").read_text()), 0)


def test_a_killed_rank_is_named_and_not_what_the_others_said_because_of_it(tmp_path: Path) -> None:
    body = (
        "if rank: os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(0.2); launch.leave_error('connection closed by peer'); sys.exit(1)"
    )
    with pytest.raises(ElaraError, match=r"^rank 1 \(process \d+\) was killed by SIGKILL.*the command to go on$"):
        run(tmp_path, body)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_rank_once_and_the_code_says_that_all_have_saved(
    tmp_path: Path, number: signal.Signals
) -> None:
    before = lambda *_: None  # noqa: E731 - not the default: it would end the tests where nobody listens
    usual = signal.signal(number, before)
    body = (
        f"signal.signal({int(number)}, lambda *_: (note('asked'), os._exit(75)))\n"
        "note('ready')\n"
        f"while not all(open(f'{tmp_path}/{{r}}').read() == 'ready' for r in (0, 1)): time.sleep(0.01)\n"
        f"if rank == 0: os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(3)"
    )
    try:
        assert run(tmp_path, body) == EXIT_SAVED
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, usual)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["asked", "asked"]


@pytest.mark.slow
def test_a_process_ends_when_the_one_that_started_it_is_gone(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); from elara import launch\n"
        "launch.watch_parent(); open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time; sys.path.insert(0, sys.argv[1]); from elara import launch\n"
        "subprocess.Popen([sys.executable, '-c', *sys.argv[3:], *sys.argv[1:3]], env=launch.child_environment(),"
        " start_new_session=True)\n"
        "time.sleep(60)"
    )
    note = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", parent, str(ROOT), str(note), child]) as process:
        deadline = time.monotonic() + 20
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        pid = int(note.read_text())
        os.kill(pid, 0)
        process.kill()
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_the_tasks_of_a_slurm_step_share_a_name_that_other_steps_do_not_have(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert not launch.is_rank() and launch.new_name(tmp_path).startswith("20")  # inside a job, but not one of several
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_STEP_ID", "2")
    assert launch.is_rank() and launch.global_rank() == 3 and launch.new_name(tmp_path) == "slurm-77.2"


def test_processes_begun_in_the_same_second_take_a_folder_each(tmp_path: Path) -> None:
    body = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from elara import launch\n"
    body += "input(); print(*(launch.new_name(Path(sys.argv[2]) / 'bee') for _ in range(20)))"
    command = [sys.executable, "-c", body, str(ROOT), str(tmp_path)]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]  # fmt: skip
    for other in others:
        assert other.stdin is not None
        other.stdin.write("now\n")
        other.stdin.flush()
    names = [name for other in others for name in other.communicate()[0].split()]
    assert len(names) == len(set(names)) == 60
    assert {path.name for path in (tmp_path / "bee").iterdir()} == set(names)


def test_a_folder_that_cannot_be_made_still_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "bee").write_text("a file", "utf-8")
    assert launch.new_name(tmp_path / "bee").startswith("20")
