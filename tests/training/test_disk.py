"""A disk that is full or read-only: one line, and what was saved before is whole."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from elara import checkpoint
from elara.data.opinions import OpinionWriter
from elara.errors import ElaraError
from elara.runs import Run

pytestmark = pytest.mark.slow

KINDS = {
    "cpu": [],
    "fsdp": ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"],
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own with some mount options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs root")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_full_at_a_checkpoint_is_one_line_and_earlier_ones_stay(home, disk, kind: str) -> None:
    folder = disk("size=6m") / "run"
    often = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=100"]
    done = home.run(*home.tiny(f"hydra.run.dir={folder}", *often, *KINDS[kind]))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: cannot write the checkpoint"), done.stderr
    assert "No space left on device" in done.stderr
    assert done.stderr.endswith("; make room, then continue with resume=auto\n")
    found = Run(folder).checkpoints()
    assert found and Run(folder).last.resolve() == found[0].resolve()
    assert checkpoint.load(found[0]).meta["step"] < 24
    assert not list((folder / "checkpoints").glob(".*"))  # nothing half-written is left to take up room


def test_a_disk_too_small_for_what_a_teacher_says_is_one_line_before_and_while_it_is_asked(home, disk) -> None:
    folder = disk("size=3m")
    home.call(*home.tiny("name=elder", "tokenizer=byte", "data.name=disk"))
    command = home.tiny(
        "name=younger", "tokenizer=byte", "data.name=disk", "teacher=elara", "distill.context=32", "distill.top_k=32",
        f"teachers.elara.backend.checkpoint={home.only_run('elder')}",
    )  # fmt: skip
    done = home.run(*command, "distill.top_k=8", "trainer.max_steps=1")  # the text is prepared
    assert done.returncode == 0, done.stderr
    (prepared,) = (place for place in (home.path / "data" / "prepared").glob("disk-*") if place.is_dir())
    shutil.rmtree(prepared / "teachers")
    (prepared / "teachers").symlink_to(folder)
    (folder / "filling").write_bytes(b"x" * 2_900_000)
    done = home.run(*command)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: what a teacher says takes ") and "lower distill.top_k" in done.stderr
    writer = OpinionWriter(folder / "some", 8, 256)

    def fill() -> None:
        while True:
            writer.write(torch.zeros(200, 8, dtype=torch.int64), torch.zeros(200, 9), torch.zeros(200))

    with pytest.raises(ElaraError, match=r"cannot write what a teacher said to .*: No space left on device; make room"):
        fill()
    writer.stop()
    whole = writer.done
    (folder / "filling").unlink()
    assert 0 < whole == OpinionWriter(folder / "some", 8, 256).done


def test_a_read_only_outputs_folder_is_one_line(home, disk) -> None:
    folder = disk("ro")
    done = home.run(*home.tiny(f"hydra.run.dir={folder}/run"))
    assert done.returncode == 1
    assert done.stderr == f"error: cannot write {folder}/run: Read-only file system\n"
    done = home.run("-m", *home.tiny(f"hydra.sweep.dir={folder}/sweep", "seed=1,2"))
    assert done.returncode == 1 and done.stderr == f"error: cannot write to {folder}/sweep: Read-only file system\n"
