"""A payload in every file of every folder that a command reads: nothing runs, and all end well or in one line."""

from __future__ import annotations

import csv
import functools
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from elara import checkpoint, elara, evaluate, sample, shards, train
from elara.bench import run as bench
from elara.cli import guard
from elara.collect import __main__ as collect
from elara.data import __main__ as prepare
from elara.export import __main__ as export
from elara.export.files import write_model
from elara.export.layout import COMPACT, UNROLLED
from elara.export.llama_cpp import find_library
from elara.export.llama_model import LlamaModel
from elara.export.source import open_source
from elara.report import __main__ as report
from elara.runs import Run
from elara.tokenizer.huggingface import HuggingFaceTokenizer
from tests.backends.conftest import save_model, write_gguf
from tests.conftest import COUNTERPARTS, TINY, Home
from tests.payloads import SCRIPT, program, saved_by_torch, spoiled
from tests.sweep.conftest import SPACE, open_study

PLAIN = ["~callbacks.samples", "~callbacks.acceptance", "~callbacks.plots", "~callbacks.monitoring"]
TRAIN = [*TINY[:-3], "trainer.max_steps=1", *PLAIN]
FEW = ["eval.max_bytes=300", "eval.passage=100", "eval.prompts=0", "eval.speed_rounds=0", "device=cpu"]

BY_OTHERS = (".safetensors", ".gguf", "tokenizer.json")  # which libraries open without Python

_watching: list[set[str]] = []  # an audit hook cannot be taken away, but told to do nothing


def _note(event: str, about: tuple[object, ...]) -> None:
    if _watching and event == "open" and isinstance(about[0], (str, Path)):
        _watching[-1].add(os.path.realpath(about[0]))


sys.addaudithook(_note)


@contextmanager
def watching() -> Iterator[set[str]]:
    """The files that this process opens meanwhile."""
    _watching.append(set())
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


Command = tuple[Callable[[], None], list[str]]


@dataclass
class Case:
    """A folder that somebody sent, within a home of its own, and the commands that read it."""

    home: Path
    folder: Path
    commands: dict[str, Command]  # the function behind each, and its arguments
    only: str = "*"  # files that are spoiled, where others are another case's

    def copy(self, place: Path) -> Case:
        """The same elsewhere; what the commands are told moves along."""
        shutil.copytree(self.home, place, symlinks=True)
        moved = {
            name: (main, [text.replace(str(self.home), str(place)) for text in arguments])
            for name, (main, arguments) in self.commands.items()
        }
        return Case(place, place / self.folder.relative_to(self.home), moved, self.only)

    def files(self) -> list[Path]:
        """Those that a command may read, relative to the folder: no lock, no link to another one, nothing of the run's
        checkpoints, which are a case of their own."""
        found = [file for file in sorted(self.folder.rglob(self.only)) if file.is_file() and file.name != ".lock"]
        links = {file for file in found if any(part.is_symlink() for part in (file, *file.parents))}
        own = [file.relative_to(self.folder) for file in found if file not in links and file.suffix != ".png"]
        return [file for file in own if file.parts[0] != "checkpoints"]


def run_folder(run: Case, place: Path) -> Case:
    """Without its checkpoints, all that `sample` reads."""
    read = {name: run.commands[name] for name in ("evaluate", "export", "resume", "report")}
    return Case(run.home, run.folder, read)


def checkpoint_folder(run: Case, place: Path) -> Case:
    text, folder = run.home.parent / "bees.txt", run.folder / "checkpoints" / "step-2"
    chat = ["prompts.path=asked.txt", "prompts.limit=1", "sampling.max_new_tokens=2", "name=bees"]
    compact = ["format=compact", "quantize=F32", f"output={run.home}/exported", "verify_tokens=40"]
    return Case(run.home, folder, {
        **{name: run.commands[name] for name in ("sample", "evaluate", "resume")},
        "export": (export.main, [f"checkpoint={run.folder}", *compact]),
        "init_from": (train.main, [*TRAIN, f"data.path={text}", f"init_from={run.folder}"]),
        "bench": (read_as_bench, [str(run.folder)]),
        "collect": (collect.main, ["teacher=[elara]", f"teachers.elara.backend.checkpoint={run.folder}", *chat]),
    })  # fmt: skip


def read_as_bench() -> None:
    """Read a checkpoint as the bench does, whose measuring takes seconds and reads nothing."""
    guard(lambda: print(bench._trained(sys.argv[1], torch.device("cpu"))))


def sharded(run: Case, place: Path) -> Case:
    case = run.copy(place)
    for step in Run(case.folder).checkpoints():
        shards.write(step / "shards", torch_state(step))
        (step / "model.safetensors").unlink()
        named = {f"shards/{file.name}": None for file in (step / "shards").iterdir()}
        checkpoint.write_json(step / "meta.json", {**checkpoint.read_meta(step), "crc32": named})
    text = case.home.parent / "bees.txt"
    return Case(case.home, case.folder / "checkpoints" / "step-2" / "shards", {
        **{name: case.commands[name] for name in ("sample", "evaluate", "export", "resume")},
        "init_from": (train.main, [*TRAIN, f"data.path={text}", f"init_from={case.folder}"]),
    })  # fmt: skip


def torch_state(step: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in checkpoint.load(step).model.state_dict().items()}


def prepared(run: Case, place: Path) -> Case:
    """With what a teacher said about it."""
    case = run.copy(place)
    text = case.home.parent / "bees.txt"
    taught = ["teacher=[elara]", f"teachers.elara.backend.checkpoint={case.folder}", "distill.context=32"]
    train_on = [*TRAIN, f"data.path={text}", "name=other", *taught]
    assert Home(case.home, text).call(*train_on).returncode == 0
    (folder,) = (case.home / "data" / "prepared").glob("text-*")
    return Case(case.home, folder, {
        "data": (prepare.main, ["data=text", f"data.path={text}"]),
        "train": (train.main, train_on),
        "resume": case.commands["resume"],
        "export": (export.main, [f"checkpoint={case.folder}", "format=compact", "quantize=F32",
                                 f"output={case.home}/exported", "verify_tokens=40"]),
    })  # fmt: skip


def teacher_folder(run: Case, place: Path) -> Case:
    """A model of transformers, which a student learns from and whose tokenizer it takes."""
    home, text = place, text_for(place)
    save_model(home / "teacher", num_hidden_layers=1)
    return Case(home, home / "teacher", asking(home / "teacher", text))


def pickled_teacher(run: Case, place: Path) -> Case:
    """The same with weights as PyTorch pickles them."""
    from safetensors.torch import load_file

    case = teacher_folder(run, place)
    weights = case.folder / "model.safetensors"
    torch.save(load_file(weights), case.folder / "pytorch_model.bin")
    weights.unlink()
    return Case(case.home, case.folder, case.commands, only="*.bin")


def asking(model: Path, text: Path) -> dict[str, Command]:
    """What reads a model of transformers."""
    which = ["teacher=[transformers]", f"teachers.transformers.backend.model={model}",
             "teachers.transformers.backend.dtype=float32", "teachers.transformers.backend.device=cpu"]  # fmt: skip
    few = ["prompts.path=asked.txt", "prompts.limit=1", "sampling.max_new_tokens=8"]
    return {
        "collect": (collect.main, [*which, *few, "name=bees"]),
        "train": (train.main, [*TRAIN, f"data.path={text}", "tokenizer=byte", "distill.opinions=live",
                               *which]),
    }  # fmt: skip


def tokenizers(run: Case, place: Path) -> Case:
    """One as a file of the package's, one as this program saves it, each given by itself."""
    home, file = place, text_for(place)
    folder = save_model(home / "teacher", num_hidden_layers=1)
    saved, text = home / "tokenizers" / "saved", ["data=text", f"data.path={file}"]
    file = home / "tokenizers" / "tokenizer.json"
    saved.mkdir(parents=True)
    shutil.move(folder / "tokenizer.json", file)
    shutil.rmtree(folder)
    HuggingFaceTokenizer.open(str(file), "<|end|>").save(saved)
    given = ["tokenizer=huggingface", f"tokenizer.path={file.parent}", "tokenizer.end_token='<|end|>'"]
    ours = ["tokenizer=saved", f"tokenizer.path={saved}"]
    return Case(home, file.parent, {
        "data": (prepare.main, [*text, *given]), "train": (train.main, [*TRAIN, *text[1:], *given]),
        "data of a saved one": (prepare.main, [*text, *ours]),
        "train with a saved one": (train.main, [*TRAIN, *text[1:], *ours]),
    })  # fmt: skip


def gguf_for_elara(run: Case, place: Path) -> Case:
    file = exported(run, place, COMPACT)
    return Case(place, file.parent, {"elara.py": (read_alone, [str(file), "the", "--tokens", "2"])})


def gguf_for_llama_cpp(run: Case, place: Path) -> Case:
    file = exported(run, place, UNROLLED)
    return Case(place, file.parent, {"llama.cpp": (read_by_llama_cpp, [str(file)])})


def gguf_teacher(run: Case, place: Path) -> Case:
    text = text_for(place)
    (place / "models").mkdir()
    file = write_gguf(place / "models" / "tiny.gguf")
    return Case(place, file.parent, asking(file, text))


def exported(run: Case, place: Path, architecture: str) -> Path:
    file = place / "models" / "bees.gguf"
    file.parent.mkdir(parents=True)
    write_model(file, open_source(run.folder / "checkpoints" / "step-2"), architecture, "F32", None)
    return file


def read_alone() -> None:
    """`python -m elara.elara`, which lets Python print its one line."""
    try:
        elara.main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            raise SystemExit(1) from error
        raise


def read_by_llama_cpp() -> None:
    """Load a file into llama.cpp and read a text with it, as the export does to verify it."""

    def read() -> None:
        library = find_library(str(COUNTERPARTS))
        assert library is not None
        with LlamaModel(library, Path(sys.argv[1]), 16) as model:
            print(model.greedy(model.tokenize("the"), 2))

    guard(read)


def text_for(home: Path) -> Path:
    """A text beside all homes: where it lies names what is prepared of it, also in a home that was copied."""
    file = home.parent / "bees.txt"
    if not file.exists():
        file.write_text("the queen bee flew over the honey and found a flower.\n" * 200, "utf-8")
    home.mkdir(exist_ok=True)
    (home / "asked.txt").write_text("the queen bee flew\n", "utf-8")
    return file


def swept(run: Case, place: Path) -> Case:
    case = run.copy(place)
    folder = case.home / "outputs" / "sweeps" / "bees" / "2030-01-01_00-00-00"
    folder.mkdir(parents=True)
    task = ["name=bees", "moe=deepseek,none"]
    (folder / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": {"task": task, "hydra": []}}}))
    for number, moe in enumerate(("deepseek", "none")):
        (folder / str(number)).mkdir()
        told = {"overrides": ["name=bees", f"moe={moe}"], "exit_code": number, "error": "it broke" if number else None}
        (folder / str(number) / "job.json").write_text(json.dumps(told), "utf-8")
        (folder / str(number) / "job.log").write_text("step 1\nerror: it broke\n", "utf-8")
    without = shutil.ignore_patterns("checkpoints")
    shutil.copytree(case.folder, folder / "1", symlinks=True, ignore=without, dirs_exist_ok=True)
    return Case(case.home, folder, {"report": (report.main, [str(folder)])})


def studied(run: Case, home: Path) -> Case:
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


def collected(run: Case, home: Path) -> Case:
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
    chat = ["data=chat", f"data.path={folder}/kept.jsonl", "tokenizer=byte"]
    return Case(home, folder, {
        "collect": (collect.main, ["teacher=[]", "name=bees"]),
        "train": (train.main, [*TRAIN[1:], *chat]),
    })  # fmt: skip


KINDS = {
    "run": run_folder, "checkpoint": checkpoint_folder, "sharded": sharded, "sweep": swept, "study": studied,
    "store": collected, "prepared data": prepared, "teacher folder": teacher_folder, "pickled teacher": pickled_teacher,
    "tokenizer": tokenizers, "GGUF for elara.py": gguf_for_elara, "GGUF for llama.cpp": gguf_for_llama_cpp,
    "GGUF teacher": gguf_teacher,
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """One of a kind, made in this process when it is asked for; checksums are left out, as whoever alters a file
    alters them too."""
    place = tmp_path_factory.mktemp("sent")
    run = trained(place / "home")
    return functools.cache(lambda kind: KINDS[kind](run, place / kind.replace(" ", "-")))


def trained(place: Path) -> Case:
    home = Home(place, text_for(place))
    told = ["name=bees", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    done = home.call(*home.tiny(*told, "~callbacks.monitoring"))
    assert done.returncode == 0, done.stderr
    run = Run(home.only_run("bees"))
    few = [{key: row[key] for key in ("step", "train/loss", "val/loss")} for row in Home.rows(run.path)]
    with (run.path / "metrics.csv").open("w", encoding="utf-8", newline="") as file:  # few pictures in reports
        table = csv.DictWriter(file, few[0])
        table.writeheader()
        table.writerows(few)
    for step in run.checkpoints():
        checkpoint.write_json(step / "meta.json", {**checkpoint.read_meta(step), "crc32": {}})
    text = ["prompt=the", "max_new_tokens=2", "mode=ar", "device=cpu"]
    return Case(home.path, run.path, {
        "sample": (sample.main, [f"checkpoint={run.path}", *text]),
        "evaluate": (evaluate.main, [f"checkpoint={run.path}", *FEW]),
        "export": (export.main, [f"checkpoint={run.path}", "format=safetensors", f"output={home.path}/exported"]),
        "resume": (train.main, [f"resume={run.path}", "trainer.max_steps=3"]),
        "report": (report.main, [str(run.path)]),
    })  # fmt: skip


def ends_well(code: int, errors: str) -> bool:
    """Success, or one line that says what was wrong, beside notes; not one for what nobody has thought of."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    return "raceback" not in errors and len(lines) == (code != 0)


def told(place: Path) -> Iterator[str]:
    for page in place.rglob("report*.html"):
        yield page.read_text("utf-8")


def put(case: Case, file: Path, content: bytes) -> None:
    (case.folder / file).write_bytes(content)


def test_no_payload_in_a_run_runs(cases: Callable[[str], Case], tmp_path: Path, in_process) -> None:
    """The files that were or could be programs; the others' turn comes in the slow test."""
    marker = tmp_path / "marker"
    marker.with_suffix(".pt").write_bytes(saved_by_torch(marker))
    for kind, file, what, command in (
        ("sharded", ".metadata", "a pickle", "sample"),
        ("checkpoint", "trainer.ckpt", "a pickle of torch's", "resume"),
        ("run", ".hydra/overrides.yaml", "overrides", "resume"),
        ("run", "config.yaml", "references", "evaluate"),
        ("run", "config.yaml", "a pickle", "report"),
        ("run", "metrics.csv", "a pickle", "report"),
        ("run", "summary.json", "a script", "report"),
        ("run", "samples.txt", "a script", "report"),
    ):
        case = cases(kind).copy(tmp_path / f"{command}-{Path(file).name}")
        put(case, Path(file), spoiled(file, (case.folder / file).read_bytes(), marker)[what])
        main, arguments = case.commands[command]
        code, _, errors = in_process(main, case.home, *arguments)
        assert ends_well(code, errors) and not marker.exists(), (kind, file, errors)
        assert (code == 1) is (command != "report"), (kind, file, errors)
        assert all(SCRIPT not in page and page.count("<script") == 1 for page in told(case.home)), file


@pytest.mark.parametrize(
    "every",
    [pytest.param(False, marks=pytest.mark.slow, id="one"), pytest.param(True, marks=pytest.mark.long, id="every")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_no_payload_in_any_file_runs(
    cases: Callable[[str], Case], kind: str, every: bool, tmp_path: Path, in_process, request: pytest.FixtureRequest
) -> None:
    """every: each command meets every payload in every file that it reads; else one in each, which take turns."""
    if kind in ("tokenizer", "teacher folder", "pickled teacher", "GGUF teacher"):
        pytest.importorskip("transformers")
    if kind == "GGUF for llama.cpp":
        request.getfixturevalue("llama_library")  # or skipped
    gc.freeze()  # torch's and Hydra's own objects, which teachers would look through again and again
    whole, marker, wrong = cases(kind), tmp_path / "marker", list[tuple[str, ...]]()
    marker.with_suffix(".pt").write_bytes(saved_by_torch(marker))
    for turn, name in enumerate(whole.commands):
        case = whole.copy(tmp_path / "whole")
        main, arguments = case.commands[name]
        with watching() as opened:
            code, _, errors = in_process(main, case.home, *arguments)
        assert code == 0, (name, errors)
        own = [(file, os.path.realpath(case.folder / file)) for file in whole.files()]
        read = [file for file, place in own if place in opened or (file.suffix in BY_OTHERS or file.name in BY_OTHERS)]
        assert read, f"{name} reads nothing of its folder"
        shutil.rmtree(case.home)
        for number, file in enumerate(read):
            payloads = list(spoiled(file.name, (whole.folder / file).read_bytes(), marker).items())
            if not every:
                payloads = [payloads[(number + turn) % len(payloads)]]
            for what, payload in payloads:
                case = whole.copy(tmp_path / "spoiled")
                put(case, file, payload)
                (case.folder / file.parent / "program.py").write_text(program(marker))
                main, arguments = case.commands[name]
                code, _, errors = in_process(main, case.home, *arguments)
                if marker.exists() or not ends_well(code, errors) or any(SCRIPT in page for page in told(case.home)):
                    wrong.append((str(file), what, name, errors[-300:]))
                marker.unlink(missing_ok=True)
                shutil.rmtree(case.home)
    assert not wrong
