"""What a folder from elsewhere may bring along when a command goes on with it, and what only its owner may."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from elara import train
from elara.errors import ElaraError
from elara.runs import Run
from elara.sweep import multirun
from elara.training import resume
from elara.trust import check, is_part
from tests.conftest import ROOT, TINY
from tests.payloads import saved_by_torch

ELSEWHERE = Path("/somewhere")

ESCAPES = {
    "another package": "os.system",
    "torch itself": "torch.load",
    "what a module of ours imported": "elara.shards.pickle.loads",
    "what a module of Lightning's imported": "lightning.pytorch.trainer.trainer.torch.load",
    "what a module of torch.optim imported": "torch.optim.optimizer.torch.load",
    "Lightning's loader": "lightning.fabric.utilities.cloud_io._load",
    "Lightning's loader by its class": "lightning.pytorch.LightningModule.load_from_checkpoint",
    "processes": "elara.launch.run_ranks",
    "processes of a package": "elara.archives.subprocess.run",
    "any call": "hydra.utils.call",
    "any object": "hydra.utils.instantiate",
    "any method": "hydra.utils.get_method",
    "any object by its name": "hydra._internal.utils._locate",
    "a file that is written": "elara.runs.write_whole",
    "a class of ours that is no part": "elara.launch.threading.Thread",
    "a class of Lightning's that is no part": "lightning.pytorch.utilities.model_summary.ModelSummary",
    "a class that calls what it is given": "lightning.pytorch.utilities.combined_loader.CombinedLoader",
    "a method of a part": "elara.training.callbacks.Checkpoint.save",
    "a package": "elara.shards",
    "a name that only begins alike": "elaraevil.load",
    "nothing": "elara.",
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_no_other_object_can_be_reached(kind: str) -> None:
    assert not is_part(ESCAPES[kind])
    for text in (
        f"callbacks.x._target_={ESCAPES[kind]}",
        f"+callbacks.x={{_target_:{ESCAPES[kind]},f:x}}",
        f"++trainer.plugins=[{{_target_:{ESCAPES[kind]}}}]",
        f"optimizer={{betas:[0,{{_partial_:true,_target_:{ESCAPES[kind]}}}]}}",
    ):
        with pytest.raises(ElaraError, match=r"/somewhere brings along .*resume\.trust=true if you trust") as caught:
            check([text], [], ELSEWHERE)
        assert "\n" not in str(caught.value)


def targets(settings: object) -> list[str]:
    if isinstance(settings, dict):
        own = [settings["_target_"]] if "_target_" in settings else []
        return own + [found for part in settings.values() for found in targets(part)]
    return [found for part in settings for found in targets(part)] if isinstance(settings, list) else []


def test_all_that_the_configuration_names_may_be_named() -> None:
    found = {name for file in (ROOT / "conf").rglob("*.yaml") for name in targets(yaml.safe_load(file.read_text()))}
    assert len(found) > 25 and {name for name in found if not is_part(name)} == set()


@pytest.mark.parametrize(
    "target",
    [
        "lightning.pytorch.callbacks.EarlyStopping", "lightning.pytorch.loggers.TensorBoardLogger", "lightning.Trainer",
        "lightning.pytorch.strategies.DDPStrategy", "torch.optim.AdamW", "torch.optim.lr_scheduler.CosineAnnealingLR",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    ],
)  # fmt: skip
def test_parts_of_a_run_that_others_define_may_be_named(target: str) -> None:
    check([f"+callbacks.x={{_target_:{target}}}"], [], ELSEWHERE)


REFUSED = {
    "an object through a reference": "callbacks.x._target_=${name}",
    "an object out of text": "+callbacks.x='${oc.create:{_target_:os.system}}'",
    "an object out of decoded text": "+callbacks.x='${oc.decode:\"{_target_: os.system}\"}'",
    "a resolver with a reference for a name": "+callbacks.x='${${name}:y}'",
    "the environment": "data.path='${oc.env:HOME}'",
    "Hydra's own callbacks": "+hydra.callbacks.x={_target_:elara.training.callbacks.Metrics}",
    "Hydra's own, taken away": "~hydra.callbacks",
    "Hydra's own, by a group": "callbacks@hydra.callbacks=default",
    "Hydra's places": "hydra.searchpath=[file:///tmp]",
    "Hydra's environment": "hydra.job.env_set={LD_PRELOAD:/tmp/x.so}",
    "Hydra's logging": "hydra/job_logging=default",
    "Hydra's launcher": "hydra.launcher._target_=elara.launch.run_ranks",
    "a configuration anywhere": "experiment=../../outputs/train/x/evil",
    "a configuration anywhere, in a list": "teacher=[smollm2,../../evil]",
    "an option of the command line": "--experimental-rerun=/tmp/job.pickle",
    "a folder of configurations": "--config-dir=/tmp",
    "a list made longer": "trainer.plugins=extend_list({_target_:os.system})",
    "a server elsewhere": "teachers.a.backend.base_url=http://example.org/v1",
    "a server that looks as if it were here": "teachers.a.backend.base_url=http://127.0.0.1@example.org/v1",
    "a server elsewhere, in an object": "+teachers.a={backend:{host:'example.org:11434'}}",
    "a cluster elsewhere": "sweep.ray.address=ray://example.org:10001",
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_make_a_folder_a_program_is_refused(kind: str) -> None:
    with pytest.raises(ElaraError, match=r"resume\.trust=true"):
        check([REFUSED[kind]], [], ELSEWHERE)


HARMLESS = [
    *TINY, "name=bees", "+trainer.max_time=00:01:00:00", "~callbacks.samples", "optimizer=adamw", "optimizer.lr=1e-3",
    "data.path='/home/a b/text.txt'", "init_from=/home/a/checkpoint", "experiment=elara_char", "teacher=[ollama,elara]",
    "logger=wandb", "logger.wandb.tags=[a,b]", "callbacks.plots.title='${name} ${model.n_layer}'", "trm=depth2",
    "teachers.ollama.backend.host=127.0.0.1:11434", "teachers.a.backend.base_url=http://localhost:8000/v1",
    "+logger.board={_target_:elara.training.loggers.tensorboard,folder:'${hydra:runtime.output_dir}/tensorboard'}",
    "optimizer.betas=[0.9,0.95]", "data.url=null", "launcher=joblib",
]  # fmt: skip


def test_settings_and_options_come_back_as_they_were() -> None:
    check(HARMLESS, [], ELSEWHERE)


def test_what_the_command_line_names_may_be_built() -> None:
    check(["+callbacks.x={_target_:mine.Callback}"], ["+callbacks.y={_target_:mine.Callback}"], ELSEWHERE)
    with pytest.raises(ElaraError, match="none of the parts"):
        check(["+callbacks.x={_target_:mine.Other}"], ["+callbacks.y={_target_:mine.Callback}"], ELSEWHERE)


def test_of_a_sweep_the_launcher_may_be_set_but_not_made() -> None:
    check(["hydra.launcher.n_jobs=4", "hydra/launcher=joblib"], [], ELSEWHERE, sweep=True)
    for text in ("hydra.launcher.setup=['curl example.org']", "hydra.launcher._target_=os.system"):
        with pytest.raises(ElaraError, match="about Hydra itself"):
            check([text], [], ELSEWHERE, sweep=True)


@pytest.fixture(scope="session")
def stopped(session_home) -> Path:
    """A run that may go on."""
    done = session_home.call(*session_home.tiny("name=stopped", "trainer.max_steps=2"))
    assert done.returncode == 0, done.stderr
    return session_home.only_run("stopped")


def from_elsewhere(run: Path, place: Path, *more: str) -> Path:
    """A copy of the run whose overrides say more than those of the original."""
    shutil.copytree(run, place, symlinks=True)
    overrides = Run(place).overrides
    overrides.write_text(yaml.safe_dump([*yaml.safe_load(overrides.read_text("utf-8")), *more]), "utf-8")
    return place


@pytest.mark.slow
def test_a_resumed_folder_runs_nothing_that_it_brings_along(home, stopped: Path, tmp_path: Path) -> None:
    marker, pickle = tmp_path / "marker", tmp_path / "state.pt"
    pickle.write_bytes(saved_by_torch(marker))
    load = f"+callbacks.x={{_target_:torch.load,f:'{pickle}',weights_only:false}}"
    run = from_elsewhere(stopped, tmp_path / "run", load)
    before = sorted(run.rglob("*"))
    done = home.call(f"resume={run}", "trainer.max_steps=4")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not marker.exists()
    assert "and torch.load is none of the parts of a run" in done.stderr and "resume.trust=true" in done.stderr
    assert sorted(run.rglob("*")) == before
    done = home.call(f"resume={run}", "trainer.max_steps=4", "resume.trust=true")
    assert done.returncode == 1 and marker.exists()  # it was trusted


def test_trust_needs_a_folder_to_trust(home) -> None:
    done = home.call("resume.trust=true")
    assert done.returncode == 1 and "give resume=<run folder> too" in done.stderr
    done = home.call("resume.trust=perhaps", "resume=auto")
    assert done.returncode == 1 and done.stderr == "error: resume.trust=perhaps must be true or false\n"
    assert resume.rewrite(["name=nobody", "resume=auto", "resume.trust=true"]) == ["name=nobody"]


def test_a_resumed_sweep_brings_along_nothing_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process, home
) -> None:
    def write(task: list[str], hydra: list[str]) -> Path:
        record = {"hydra": {"overrides": {"task": task, "hydra": ["hydra.mode=MULTIRUN", *hydra]}}}
        (tmp_path / "multirun.yaml").write_text(yaml.safe_dump(record), "utf-8")
        return tmp_path

    for task, hydra in (
        (["moe=none,deepseek", "+callbacks.x={_target_:os.system},{_target_:torch.load}"], []),
        (["moe=none,deepseek"], ["hydra.launcher._target_=os.system"]),
        (["moe=none,deepseek"], ["hydra.job.env_set={PATH:/tmp}"]),
        (["moe=none,deepseek"], ["hydra.callbacks.sweep._target_=os.system"]),
        (["moe=none,deepseek"], ["--experimental-rerun=/tmp/x"]),
    ):
        folder = write(task, hydra)
        code, _, errors = in_process(train.main, home.path, f"sweep.resume={folder}")
        assert code == 1 and errors.count("\n") == 1 and "resume.trust=true" in errors
        trusted = multirun.rewrite([f"sweep.resume={folder}", "resume.trust=true"])
        assert trusted == ["-m", *task, *hydra, f"hydra.sweep.dir='{folder}'"]
    folder = write(["moe=none,deepseek", "launcher=joblib"], ["hydra.launcher.n_jobs=2"])
    assert multirun.rewrite([f"sweep.resume={folder}"])[:4] == [
        "-m", "moe=none,deepseek", "launcher=joblib", "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
