"""A payload in every file of every folder that a command reads: nothing runs, and all end well or in one line."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from elara import checkpoint, evaluate, sample, shards, train
from elara.cli import guard
from elara.collect import __main__ as collect
from elara.export import __main__ as export
from elara.report import __main__ as report
from elara.runs import Run
from tests.conftest import TINY, Home
from tests.payloads import SCRIPT, saved_by_torch, spoiled
from tests.sweep.conftest import SPACE, open_study

PLAIN = ["~callbacks.samples", "~callbacks.acceptance", "~callbacks.plots", "~callbacks.monitoring"]
FEW = ["eval.max_bytes=300", "eval.passage=100", "eval.prompts=0", "eval.speed_rounds=0", "device=cpu"]

opened: set[str] = set()  # files that this process has opened since it was emptied


def _note(event: str, about: tuple[object, ...]) -> None:
    if event == "open" and isinstance(about[0], (str, Path)):
        opened.add(os.path.realpath(about[0]))


sys.addaudithook(_note)

Command = tuple[Callable[[], None], list[str]]


@dataclass
class Case:
    """A folder that somebody sent, within a home of its own, and the commands that read it."""

    home: Path
    folder: Path
    commands: dict[str, Command]  # the function behind each, and its arguments

    def copy(self, place: Path) -> Case:
        """The same elsewhere; what the commands are told moves along."""
        shutil.copytree(self.home, place, symlinks=True)
        moved = {
            name: (main, [text.replace(str(self.home), str(place)) for text in arguments])
            for name, (main, arguments) in self.commands.items()
        }
        return Case(place, place / self.folder.relative_to(self.home), moved)

    def files(self) -> list[Path]:
        """Those that a command may read, relative to the folder; no lock, and no link to another one of them."""
        found = [file for file in sorted(self.folder.rglob("*")) if file.is_file() and file.name != ".lock"]
        links = {file for file in found if any(part.is_symlink() for part in (file, *file.parents))}
        return [file.relative_to(self.folder) for file in found if file not in links and file.suffix != ".png"]


def reading(run: Path, text: Path, home: Path) -> dict[str, Command]:
    """What reads a checkpoint, given by its run."""
    more = ["trainer.max_steps=1", *(text for text in PLAIN)]
    return {
        "sample": (sample.main, [f"checkpoint={run}", "prompt=the", "max_new_tokens=2", "mode=ar", "device=cpu"]),
        "evaluate": (evaluate.main, [f"checkpoint={run}", *FEW]),
        "export": (export.main, [f"checkpoint={run}", "format=safetensors", f"output={home}/exported"]),
        "init_from": (train.main, [*TINY[:-3], f"data.path={text}", f"init_from={run}", *more]),
        "tokenizer": (train.main, [*TINY[:-3], f"data.path={text}", "tokenizer=saved",
                                   f"tokenizer.path={run}/checkpoints/last", *more]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """One of every kind, made in this process; checksums are left out, as whoever alters a file alters them too."""
    place = tmp_path_factory.mktemp("sent")
    home = Home(place / "home", place / "home" / "bees.txt")
    home.path.mkdir()
    home.text.write_text("the queen bee flew over the honey and found a flower.\n" * 200, "utf-8")
    done = home.call(*home.tiny("name=bees", "trainer.max_steps=2", "trainer.val_check_interval=2"))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("bees"))
    for step in run.checkpoints():
        checkpoint.write_json(step / "meta.json", {**checkpoint.read_meta(step), "crc32": {}})
    found = {"run": Case(home.path, run.path, {
        **reading(run.path, home.text, home.path),
        "resume": (train.main, [f"resume={run.path}", "trainer.max_steps=3"]),
        "report": (report.main, [str(run.path)]),
    })}  # fmt: skip
    data = next((home.path / "data").glob("**/manifest.json")).parent
    found["prepared data"] = Case(home.path, data, {
        "train": (train.main, [*TINY[:-3], f"data.path={home.text}", "trainer.max_steps=1", *PLAIN]),
        "resume": found["run"].commands["resume"],
    })  # fmt: skip
    found["sharded"] = sharded(found["run"].copy(place / "sharded"))
    found["sweep"] = swept(found["run"].copy(place / "sweep"))
    found["study"] = studied(place / "study")
    found["store"] = collected(place / "store")
    return found


def sharded(case: Case) -> Case:
    for step in Run(case.folder).checkpoints():
        shards.write(step / "shards", torch_state(step))
        (step / "model.safetensors").unlink()
    kept = {name: case.commands[name] for name in ("sample", "evaluate", "init_from", "resume")}
    return Case(case.home, case.folder / "checkpoints", kept)


def torch_state(step: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in checkpoint.load(step).model.state_dict().items()}


def swept(case: Case) -> Case:
    folder = case.home / "outputs" / "sweeps" / "bees" / "2030-01-01_00-00-00"
    folder.mkdir(parents=True)
    task = ["name=bees", "moe=deepseek,none"]
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": {"task": task, "hydra": []}}}))
    for number, moe in enumerate(("deepseek", "none")):
        shutil.copytree(case.folder, folder / str(number), symlinks=True)
        told = {"overrides": ["name=bees", f"moe={moe}"], "exit_code": number, "error": "it broke" if number else None}
        (folder / str(number) / "job.json").write_text(json.dumps(told), "utf-8")
        (folder / str(number) / "job.log").write_text("step 1\nerror: it broke\n", "utf-8")
        shutil.rmtree(folder / str(number) / "checkpoints")
    return Case(case.home, folder, {"report": (report.main, [str(folder)])})


def studied(home: Path) -> Case:
    folder = home / "outputs" / "searches" / "bees"
    folder.mkdir(parents=True)
    study = open_study(folder, space=SPACE, trials=3)
    while (begun := study.start()) is not None:
        study.complete(begun[0], 1.0)
        (folder / str(begun[0].number)).mkdir()
    return Case(home, folder, {"search": (go_on, [str(folder)])})


def go_on() -> None:
    """Open a study as the search does that goes on with it."""
    guard(lambda: print(open_study(Path(sys.argv[1]), space=SPACE, trials=3).start()))


def collected(home: Path) -> Case:
    folder = home / "data" / "collected" / "bees"
    folder.mkdir(parents=True)
    answers = [
        {
            "id": f"{i}", "source": "teacher", "weight": 1.0,
            "messages": [{"role": "user", "content": f"why {i}?"}, {"role": "assistant", "content": f"so {i} " * 9}],
            "provenance": {"teacher": "a", "teacher_hash": "a1", "prompt": f"p{i}", "identity": {}, "finish": "stop"},
        }
        for i in range(80)
    ]  # fmt: skip
    for name in ("answers.jsonl", "kept.jsonl"):
        (folder / name).write_text("".join(json.dumps(answer) + "\n" for answer in answers), "utf-8")
    chat = ["data=chat", f"data.path={folder}/kept.jsonl", "tokenizer=byte", "trainer.max_steps=1"]
    return Case(home, folder, {
        "collect": (collect.main, ["teacher=[]", "name=bees"]),
        "train": (train.main, [*TINY[1:-3], *chat, *PLAIN]),
    })  # fmt: skip


def ends_well(code: int, errors: str) -> bool:
    """Success, or one line that says what was wrong, beside notes."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    return "Traceback" not in errors and len(lines) == (code != 0)


def told(place: Path) -> Iterator[str]:
    for page in place.rglob("report*.html"):
        yield page.read_text("utf-8")


def put(case: Case, file: Path, content: bytes) -> None:
    (case.folder / file).write_bytes(content)


def test_no_payload_in_a_run_runs(cases: dict[str, Case], tmp_path: Path, in_process) -> None:
    """The files that were or could be programs; the others' turn comes in the slow test."""
    marker = tmp_path / "marker"
    marker.with_suffix(".pt").write_bytes(saved_by_torch(marker))
    for kind, file, what, command in (
        ("sharded", "step-2/shards/.metadata", "a pickle", "sample"),
        ("run", "checkpoints/step-2/trainer.ckpt", "a pickle of torch's", "resume"),
        ("run", ".hydra/overrides.yaml", "overrides", "resume"),
        ("run", "config.yaml", "references", "evaluate"),
        ("run", "summary.json", "a script", "report"),
        ("run", "samples.txt", "a script", "report"),
    ):
        case = cases[kind].copy(tmp_path / f"{kind}-{Path(file).name}")
        put(case, Path(file), spoiled(file, (case.folder / file).read_bytes(), marker)[what])
        main, arguments = case.commands[command]
        code, _, errors = in_process(main, case.home, *arguments)
        assert ends_well(code, errors) and not marker.exists(), (kind, file, errors)
        assert (code == 1) is (command != "report"), (kind, file, errors)
        assert all(SCRIPT not in page and page.count("<script") == 1 for page in told(case.home)), file


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sweep", "study", "store"])
def test_no_payload_in_any_file_runs(cases: dict[str, Case], kind: str, tmp_path: Path, in_process) -> None:
    whole, marker, wrong = cases[kind], tmp_path / "marker", list[tuple[str, ...]]()
    marker.with_suffix(".pt").write_bytes(saved_by_torch(marker))
    for name in whole.commands:
        case = whole.copy(tmp_path / "whole")
        main, arguments = case.commands[name]
        opened.clear()
        code, _, errors = in_process(main, case.home, *arguments)
        assert code == 0, (name, errors)
        own = [(file, os.path.realpath(case.folder / file)) for file in whole.files()]
        read = [file for file, place in own if place in opened or file.suffix == ".safetensors"]
        assert read, f"{name} reads nothing of its folder"
        shutil.rmtree(case.home)
        for file in read:
            for what, payload in spoiled(file.name, (whole.folder / file).read_bytes(), marker).items():
                case = whole.copy(tmp_path / "spoiled")
                put(case, file, payload)
                main, arguments = case.commands[name]
                code, _, errors = in_process(main, case.home, *arguments)
                if marker.exists() or not ends_well(code, errors) or any(SCRIPT in page for page in told(case.home)):
                    wrong.append((str(file), what, name, errors[-300:]))
                marker.unlink(missing_ok=True)
                shutil.rmtree(case.home)
    assert not wrong
