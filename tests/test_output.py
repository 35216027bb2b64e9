"""A command whose output nobody reads any more goes on, or ends, without a word."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from io import TextIOWrapper

import pytest
from rich.console import Console

from elara import sample, train
from elara.errors import EXIT_UNREAD
from elara.output import OutputClosedError, shield
from elara.runs import Run


def become_stdout(patch: pytest.MonkeyPatch, stream: TextIOWrapper) -> None:
    for name in ("stdout", "__stdout__"):
        patch.setattr(sys, name, stream)


@pytest.fixture
def unread() -> Iterator[TextIOWrapper]:
    """A pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        yield stream


def test_print_and_rich_go_on_in_silence_and_child_processes_too(
    unread: TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_stdout(monkeypatch, unread)
    shield()
    for _ in range(3):
        print("nobody reads this", flush=True)
        Console().print("nor this")
    os.write(unread.fileno(), b"nor what others write there")


def test_a_command_that_only_prints_hears_of_it_once(unread: TextIOWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    become_stdout(monkeypatch, unread)
    shield(ends=True)
    with pytest.raises(OutputClosedError):
        print("nobody reads this", flush=True)
    print("the interpreter's own end must not fail", flush=True)


def test_a_terminal_that_is_closed_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    keyboard, screen = pty.openpty()
    with os.fdopen(screen, "w", encoding="utf-8") as stream:
        become_stdout(monkeypatch, stream)
        shield()
        assert sys.stdout.isatty()
        print("read", flush=True)
        assert os.read(keyboard, 100).strip() == b"read"
        os.close(keyboard)
        for _ in range(3):
            print("nobody reads this", flush=True)


def test_no_standard_output_at_all_is_none_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    shield()
    print("nowhere", flush=True)
    assert not sys.stdout.isatty()
    sys.stdout.close()


@pytest.mark.slow
def test_a_run_ends_well_when_nobody_reads_its_output(
    home, unread: TextIOWrapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_stdout(monkeypatch, unread)
    monkeypatch.setenv("ELARA_HOME", str(home.path))
    monkeypatch.chdir(home.path)
    monkeypatch.setattr(sys, "argv", ["train.py", *home.tiny("name=unread", "trainer.max_steps=8")])
    train.main()
    run = Run(home.only_run("unread"))
    assert run.finished and run.read_summary()["steps"] == 8 and run.last.exists()


@pytest.mark.slow
def test_writing_text_ends_when_nobody_reads_it(
    home, unread: TextIOWrapper, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert home.call(*home.tiny("name=read", "trainer.max_steps=1")).returncode == 0
    become_stdout(monkeypatch, unread)
    monkeypatch.setenv("ELARA_HOME", str(home.path))
    monkeypatch.setattr(sys, "argv", ["sample.py", "checkpoint=read", "prompt=The", "max_new_tokens=1000000"])
    with pytest.raises(SystemExit) as ending:
        sample.main()
    assert ending.value.code == EXIT_UNREAD
    assert "error" not in capfd.readouterr().err
