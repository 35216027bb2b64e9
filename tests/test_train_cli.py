"""What a user types wrong is one line on stderr that says what and what instead."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from elara import train

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cli(in_process, tmp_path: Path):
    """`elara.train` with some arguments; returns exit code, stdout, stderr."""
    return partial(in_process, train.main, tmp_path)


WRONG = {
    "model.n_emdb=3": ["unknown key 'model.n_emdb'", "did you mean 'model.n_embd'?", "context_length"],
    "model=elara_2p8": ["there is no model=elara_2p8", "did you mean 'elara_2p8b'?", "choices: elara_124m, elara_2p8b"],
    "modle=elara_nano": ["'modle'", "did you mean 'model'?"],
    "model.n_layer=many": ["model.n_layer", "'many'", "Integer"],
    "trainer.max_step=3": ["unknown key 'trainer.max_step'", "did you mean 'trainer.max_steps'?"],
    "+trainer.max_step=3": ["unknown key 'trainer.max_step'", "did you mean 'trainer.max_steps'?"],
    "trainer.max_steps=0": ["trainer.max_steps=0", "at least 1"],
    "trainer.max_steps=many": ["trainer.max_steps=many", "whole number"],
    "trainer.val_check_interval=0.5": ["trainer.val_check_interval=0.5", "whole number"],
    "+trainer.max_epochs=1": ["trainer.max_epochs=1 counts by epochs", "give trainer.max_steps"],
    "+trainer.limit_train_batches=5": ["trainer.limit_train_batches=5 counts by epochs", "give trainer.max_steps"],
    "trainer.max_time=6": ["trainer.max_time=6 must be a time as in '00:12:30:00'"],
    "~callbacks.sample": ["callbacks.sample"],
    "callbacks.samples.tempreature=1": ["'callbacks.samples.tempreature'", "'callbacks.samples.temperature'"],
    "+callbacks.samples.tempreature=1": ["tempreature"],
    "callbacks.checkpoint.keep=0": ["callbacks.checkpoint", "at least 1"],
    "optimizer=adam": ["there is no optimizer=adam", "did you mean 'adamw'?"],
    "foo": ["'foo'", "key=value"],
    "seed=[1": ["'seed=[1'"],
    "name=a/b": ["name=a/b", "folder"],
    "sweep.resume=auto": ["nothing to resume: no sweep called 'elara'"],
    "sweep.resume=nowhere": ["nowhere is not a sweep folder"],
    "trainer.devices=99": ["trainer.devices=99, but this machine has", "cores: give at most"],
    "trainer.devices=none": ["trainer.devices=none must be a whole number"],
    "trainer.devices=2": ["trainer.devices=2 needs a way to share the work: take trainer=ddp or ddp_cpu"],
    "sweep.ray.address=auto": ["sweep.ray is about launcher=ray"],
    "sweep.resume=": ["sweep.resume= needs a sweep folder, or auto"],
    "seed=1,2": ["seed=1,2", "add -m to run them one after the other, or write seed=[1,2] for a list"],
    "launcher=slurm": ["there is no launcher=slurm", "choices: basic, joblib"],
    "resume=nowhere": ["nowhere", "is not a run folder"],
    "init_from=nowhere": ["there is no checkpoint at 'nowhere'"],
    "data.seq=1000": ["data.seq=1000", "model.context_length=256"],
    "trm.depth=0": ["trm.depth=0", "at least 1"],
    "model.vocab_size=3": ["model.vocab_size=3 is too small"],
    "trainer.precision=17": ["precision", "17"],
}


@pytest.mark.thorough(7, "slow")
@pytest.mark.parametrize("argument", WRONG)
def test_a_mistake_is_one_line_that_names_it(cli, argument: str, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("to bee or not to bee, that is the question\n" * 300, "utf-8")
    code, out, err = cli(argument, "data=text", f"data.path={text}")
    assert code == 1
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    for part in WRONG[argument]:
        assert part in err
    assert out == ""
    assert not list(tmp_path.glob("outputs/**/.hydra"))  # and no empty run is left to be resumed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "seed=1,2", "--cfg", "job"], "--cfg shows the configuration of one run: leave out -m"),
        (["-m", "moe=glob(*)"], "glob() is not read in a sweep"),
        (["-m", "moe=none,deepsek"], "there is no moe=deepsek (did you mean 'deepseek'?)"),
        (["-m", "seed=1,2", "resume=auto"], "it does not go with --multirun"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_and_leaves_nothing(
    cli, arguments: list[str], said: str, tmp_path: Path
) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and said in err
    assert not list(tmp_path.glob("outputs/sweeps/*/*"))


@pytest.mark.slow
def test_a_folder_of_the_users_is_never_removed(cli, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it", "utf-8")
    code, _, _ = cli(f"hydra.run.dir={tmp_path}/mine", "optimizer.lr=abc")
    assert code == 1 and [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_ranks_of_torchrun_do_not_start_sweeps(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, _, err = cli("-m", "seed=1,2")
    assert code == 1 and "run it without torchrun or srun" in err


@pytest.mark.thorough(1, "slow")
@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU")
@pytest.mark.parametrize("trainer", ["gpu", "ddp", "fsdp"])
def test_a_missing_gpu_is_named(cli, trainer: str) -> None:
    code, _, err = cli(f"trainer={trainer}", "optimizer=adamw")
    assert code == 1 and err.count("\n") == 1
    assert "trainer.accelerator=gpu, but torch finds no GPU here: take trainer=cpu" in err


def test_a_traceback_is_there_for_the_asking(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="n_emdb"):
        cli("model.n_emdb=3")


def test_a_large_model_with_ddp_composes_without_importing_torch() -> None:
    program = (
        "import sys; from elara.train import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'lightning'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "model=elara_2p8b", "trainer=ddp", "--cfg", "job"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "n_layer: 32" in done.stdout and "elara.training.distributed.ddp" in done.stdout


def test_an_unwritable_output_folder_is_one_line(cli, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("in the way", "utf-8")
    code, _, err = cli("name=x")
    assert code == 1 and err.startswith("error: cannot write") and err.count("\n") == 1
