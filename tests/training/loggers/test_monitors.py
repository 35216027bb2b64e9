"""TensorBoard's and wandb's real packages: what they wrote is read back and compared with metrics.csv."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from elara import checkpoint
from elara.errors import EXIT_SAVED, ElaraError
from elara.runs import Run
from elara.training import loggers
from tests.conftest import TIMED, Home
from tests.training.loggers.wandb_log import by_step, read_logs
from tests.training.loggers.wandb_server import Server, serving

BOTH = (
    "logger=wandb",
    "logger.wandb.mode=offline",
    "+logger.board={_target_:elara.training.loggers.tensorboard,folder:'${hydra:runtime.output_dir}/tensorboard'}",
)

KEY = "a" * 40  # of the right form


def figures_of(run: Path) -> dict[int, dict[str, float]]:
    """metrics.csv by step."""
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


@pytest.mark.slow
def test_with_the_csv_alone_neither_wandb_nor_tensorboard_is_imported(home: Home) -> None:
    script = (
        "import sys\nfrom elara.train import main\nmain()\n"
        "print('imported:', {name.partition('.')[0] for name in sys.modules} & {'wandb', 'tensorboard'})"
    )
    command = [sys.executable, "-c", script, *home.tiny("name=alone", "trainer.max_steps=1")]
    done = subprocess.run(command, cwd=home.path, env=home.env(), capture_output=True, text=True, check=False)
    assert "imported: set()" in done.stdout, done.stdout + done.stderr


# One run with both monitors


def on_its_own(patch: pytest.MonkeyPatch, user: Path) -> None:
    """Processes started from now on share nothing with this one's wandb or with the developer's."""
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    patch.setenv("HOME", str(user))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)


@pytest.fixture(scope="module")
def logged(session_home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A tiny run that logs to TensorBoard and, offline, to wandb."""
    with pytest.MonkeyPatch.context() as patch:
        on_its_own(patch, tmp_path_factory.mktemp("user"))
        options = [*BOTH, "logger.wandb.checkpoints=best", "logger.wandb.tags=[quick]", "optimizer.lr=0.01"]
        done = session_home.call(*session_home.tiny("name=both", *options))
        assert done.returncode == 0, done.stderr
        run = max((session_home.path / "outputs" / "train" / "both").glob("*/"))  # of those that workers made in turns
        import wandb

        wandb.teardown()  # waits for its process, which writes things down
        (log,) = read_logs(run)
        yield SimpleNamespace(run=run, log=log, stdout=done.stdout, figures=figures_of(run))


@pytest.mark.slow
def test_wandb_knows_name_tags_and_settings_by_key(logged: SimpleNamespace) -> None:
    log = logged.log
    assert log.run.run_id == (logged.run / "wandb_id").read_text("utf-8").strip()
    assert log.run.display_name.startswith("both data=text n_layer=2 n_embd=32")
    assert {"model.n_layer=2", "optimizer.lr=0.01", "quick"} <= set(log.run.tags)
    assert not any("path" in tag or "logger" in tag or "trainer" in tag for tag in log.run.tags)
    assert (log.run.project, log.run.job_type, log.run.run_group) == ("elara", "train", "")
    wanted = yaml.safe_load((logged.run / "config.yaml").read_text("utf-8"))
    assert {key: log.config[key] for key in wanted} == wanted
    assert log.config["model"]["n_layer"] == 2
    summary = Run(logged.run).read_summary()
    assert log.config["parameters"]["total"] == summary["parameters"] > log.config["parameters"]["active"] > 0
    assert log.config["hardware"] == summary["hardware"]


@pytest.mark.slow
def test_wandb_has_every_figure_once_as_in_metrics_csv(logged: SimpleNamespace) -> None:
    history = by_step(logged.log.history)
    assert list(history) == list(logged.figures) == list(range(1, 25))
    for step, wanted in logged.figures.items():
        found = {k: v for k, v in history[step].items() if k != "samples" and not k.startswith("pictures/")}
        assert found == {name: [pytest.approx(value, rel=1e-8)] for name, value in wanted.items()}


@pytest.mark.slow
def test_wandb_draws_all_curves_over_the_step_and_sums_up_by_the_lowest_loss(logged: SimpleNamespace) -> None:
    metrics = logged.log.metrics
    assert all(metrics[f"{part}/*"].step_metric == "step" for part in ("train", "val", "moe", "pictures"))
    assert metrics["moe/*"].options.hidden
    losses = [row["val/loss_ar"] for row in logged.figures.values() if "val/loss_ar" in row]
    assert len(losses) == 3
    assert logged.log.summary["val/loss_ar"] == {
        "min": pytest.approx(min(losses), rel=1e-8),
        "last": pytest.approx(losses[-1], rel=1e-8),
    }


@pytest.mark.slow
def test_wandb_shows_the_experts_at_the_end(logged: SimpleNamespace) -> None:
    pictures = [row for row in logged.log.history if "pictures" in str(row)]
    assert [row["step"] for row in pictures] == [24]  # the one at the end: the run is too short for more
    for name in ("expert_load", "max_vio"):
        shown = pictures[0][f"pictures/{name}"]
        assert (shown["_type"], shown["width"] > 600) == ("image-file", True)
        assert shown["path"] in logged.log.files
        assert (logged.log.folder / "files" / shown["path"]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_table_of_samples_grows(logged: SimpleNamespace) -> None:
    tables = [(row["step"], row["samples"]) for row in logged.log.history if "samples" in row]
    assert [(step, table["nrows"]) for step, table in tables] == [(8, 1), (16, 2), (24, 3)]
    table = json.loads((logged.log.folder / "files" / tables[-1][1]["path"]).read_text("utf-8"))
    assert table["columns"] == ["step", "prompt", "text"]
    blocks = Run(logged.run).samples.read_text("utf-8").split("==== step ")[1:]
    for block, (step, prompt, text) in zip(blocks, table["data"], strict=True):
        assert block.rstrip("\n") == f"{step} ====\n[{prompt}]{text}".rstrip("\n")


@pytest.mark.slow
def test_the_best_checkpoint_is_an_artifact_without_the_trainers_state(logged: SimpleNamespace) -> None:
    (model,) = [artifact for artifact in logged.log.artifacts if artifact.type == "model"]
    best = Run(logged.run).best.resolve()
    assert set(model.aliases) == {"best", "latest", best.name}
    assert json.loads(model.metadata)["step"] == int(best.name.removeprefix("step-"))
    assert json.loads(model.metadata)["metrics"]["val/loss_ar"] == min(
        row["val/loss_ar"] for row in map(json_metrics, Run(logged.run).checkpoints())
    )
    files = {entry.path: Path(entry.local_path) for entry in model.manifest.contents}
    held = {path.relative_to(best).as_posix() for path in best.rglob("*") if path.is_file()}
    assert set(files) == held - {"trainer.ckpt"}
    assert held > set(files)
    assert all(files[name].samefile(best / name) for name in files), "linked, not copied"
    (kept,) = {path.parent for name, path in files.items() if "/" not in name}
    assert checkpoint.load(kept).meta["step"] == int(best.name.removeprefix("step-"))


def json_metrics(folder: Path) -> dict[str, float]:
    metrics: dict[str, float] = json.loads((folder / "meta.json").read_text("utf-8"))["metrics"]
    return metrics


@pytest.mark.slow
def test_the_run_ends_well_and_says_how_to_upload(logged: SimpleNamespace) -> None:
    assert (logged.log.exit_code, logged.log.preempting) == (0, False)
    (line,) = [line for line in logged.stdout.splitlines() if "wandb sync" in line]
    assert line == f"upload the curves: wandb sync {logged.run.relative_to(Path(logged.run).parents[3])}/wandb"


def board(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def scalars(events: Any) -> dict[int, dict[str, list[float]]]:
    found: dict[int, dict[str, list[float]]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {}).setdefault(name, []).append(event.value)
    return dict(sorted(found.items()))


@pytest.mark.slow
def test_tensorboard_has_every_figure_once_as_in_metrics_csv(logged: SimpleNamespace) -> None:
    wanted = {
        step: {name: [pytest.approx(value, rel=1e-6)] for name, value in row.items()}  # TensorBoard keeps 32 bits
        for step, row in logged.figures.items()
    }
    assert scalars(board(logged.run)) == wanted


@pytest.mark.slow
def test_tensorboard_has_settings_samples_and_pictures(logged: SimpleNamespace) -> None:
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = board(logged.run)
    (config,) = events.Tensors("config/text_summary")
    assert "\t  n_layer: 2\n" in config.tensor_proto.string_val[0].decode()
    (facts,) = events.Tensors("facts/text_summary")
    assert "\tparameters:\n\t  total: " in facts.tensor_proto.string_val[0].decode()
    samples = {
        event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")
    }
    assert list(samples) == [8, 16, 24]
    last = Run(logged.run).samples.read_text("utf-8").split("==== step 24 ====\n")[1].strip("\n")
    assert samples[24].replace("\t", "").strip("\n") == last
    for name in ("expert_load", "max_vio"):
        (picture,) = events.Images(name)
        assert (picture.step, picture.width > 600) == (24, True)

    def hparams(part: str) -> Any:
        content = events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content
        return getattr(HParamsPluginData.FromString(content), part)

    settings = hparams("session_start_info").hparams
    assert settings["model.n_layer"].number_value == 2
    assert settings["data.source"].string_value == "text"
    assert not any(key.startswith(("logger", "callbacks")) for key in settings)
    assert [info.name.tag for info in hparams("experiment").metric_infos] == ["val/loss_ar"]
    assert hparams("session_end_info").status == 1  # success


def test_rows_of_samples_stay_whole(tmp_path: Path) -> None:
    on_paper = tmp_path / "wandb" / "samples.jsonl"
    made_here = made(tmp_path, mode="offline")
    made_here._send_samples = lambda rows, step: None  # nothing is sent: this is about what is kept
    made_here.log_samples([("a", "one\u2028line\x85"), ("b", "x")], 5)
    on_paper.write_text(on_paper.read_text("utf-8") + '[7, "killed he', "utf-8")
    made_here.log_samples([("a", "two")], 9)
    assert made_here._samples() == [[5, "a", "one\u2028line\x85"], [5, "b", "x"], [9, "a", "two"]]
    made_here.log_samples([("a", "again")], 5)
    assert made_here._samples() == [[5, "a", "again"]]


# Resuming


def assert_joined(run: Path) -> None:
    """What both monitors hold of a resumed run is what metrics.csv holds, which a run without a break equals."""
    figures = figures_of(run)
    assert list(figures) == list(range(1, 25))
    logs = read_logs(run)
    assert {log.run.run_id for log in logs} == {(run / "wandb_id").read_text("utf-8").strip()}
    assert all(log.run.resume for log in logs), "wandb sync must put them together"
    assert logs[0].run.display_name and not any(log.run.display_name for log in logs[1:])
    history = by_step([row for log in logs for row in log.history])
    assert sorted(history) == list(figures)
    for step, wanted in figures.items():
        for name, value in wanted.items():
            if name not in TIMED:  # a step that was done twice has the same losses both times
                assert history[step][name] == [pytest.approx(value, rel=1e-8)] * len(history[step][name]), (step, name)
    assert logs[-1].summary["val/loss_ar"]["min"] == pytest.approx(
        min(row["val/loss_ar"] for row in figures.values() if "val/loss_ar" in row), rel=1e-8
    )
    table = [row["samples"] for row in logs[-1].history if "samples" in row][-1]
    rows = json.loads((logs[-1].folder / "files" / table["path"]).read_text("utf-8"))["data"]
    assert [row[0] for row in rows] == [step for step, row in figures.items() if "val/loss" in row]
    found = scalars(board(run))
    assert list(found) == list(figures)
    for step, wanted in figures.items():
        assert found[step] == {name: [pytest.approx(value, rel=1e-6)] for name, value in wanted.items()}, step


@pytest.mark.slow
def test_an_interrupted_run_is_marked_so_and_goes_on(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_its_own(monkeypatch, tmp_path)
    process = home.start(*home.tiny("name=monitors-stopped", *BOTH, "callbacks.monitoring.share=1"))
    run = home.wait_for(process, 10, "monitors-stopped")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == EXIT_SAVED
    (log,) = read_logs(run)
    assert (log.exit_code, log.preempting) == (EXIT_SAVED, True)
    assert [row["step"] for row in log.history if "train/loss" in row] == list(figures_of(run)), "nothing is lost"
    assert [row["step"] for row in log.history if "pictures" in str(row)][:1] == [8], "not at the end alone"
    meta = checkpoint.read_meta(Run(run).last)  # as if a validation had been due there: it comes before the training
    checkpoint.write_json(Run(run).last / "meta.json", {**meta, "validation_due": True})
    done = home.run(f"resume={run}")
    assert done.returncode == 0, done.stderr
    assert [log.exit_code for log in read_logs(run)] == [EXIT_SAVED, 0]
    assert_joined(run)
    history = by_step([row for log in read_logs(run) for row in log.history])
    assert all(len(values) == 1 for row in history.values() for values in row.values()), "no step twice"


# With a server


def sync(run: Path, server: Server) -> None:
    command = [str(Path(sys.executable).with_name("wandb")), "sync", str(run / "wandb")]
    environment = {**os.environ, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, cwd=run, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0 and "ERROR" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_curves_and_wandb_sync_puts_them_together(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_its_own(monkeypatch, tmp_path)
    run = home.kill_at(14, "monitors-killed", *home.tiny(*BOTH))
    (log,) = read_logs(run)
    empty = log.folder.with_name(f"offline-run-20200101_000000-{log.run.run_id}")
    empty.mkdir()
    (empty / f"run-{log.run.run_id}.wandb").write_bytes(log_header(log.folder))  # of one killed in its first moment
    done = home.run(f"resume={run}")
    assert done.returncode == 0, done.stderr
    assert [log.exit_code for log in read_logs(run)] == [None, 0]
    assert_joined(run)
    with serving() as server:
        sync(run, server)
        (uploaded,) = server.runs.values()
    assert uploaded["displayName"].startswith("monitors-killed data=text") and "model.n_layer=2" in uploaded["tags"]
    assert json.loads(uploaded["config"])["model"]["value"]["n_layer"] == 2
    assert [row["_step"] for row in uploaded["history"]] == list(range(len(uploaded["history"]))), "nothing overwritten"
    assert uploaded["exit"] == 0
    figures, history = figures_of(run), by_step(uploaded["history"])
    assert sorted(history) == list(figures)
    for step, wanted in figures.items():
        assert {name: history[step][name][-1] for name in wanted} == pytest.approx(wanted, rel=1e-8)


def log_header(folder: Path) -> bytes:
    (log,) = folder.glob("run-*.wandb")
    return log.read_bytes()[:7]


@pytest.mark.slow
def test_online_a_killed_run_leaves_neither_gaps_nor_steps_twice(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_its_own(monkeypatch, tmp_path)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        online = ["logger=wandb", "logger.wandb.mode=online"]
        process = home.start(*home.tiny("name=online", *online), WANDB_API_KEY=KEY)
        run = home.wait_for(process, 12, "online")
        process.kill()
        process.wait()
        (identity,) = server.runs
        had = len(server.runs[identity]["history"])
        resumed = home.run(f"resume={run}", WANDB_API_KEY=KEY)
        assert resumed.returncode == 0, resumed.stderr
        assert f"curves: {server.url}/me/elara/runs/{identity}" in resumed.stdout
        uploaded = server.runs[identity]
    assert list(server.runs) == [identity]
    assert uploaded["displayName"].startswith("online data=text"), "kept when resumed"
    assert had < 20, "the client sends every few seconds: what it had not sent is what this test is about"
    figures, history = figures_of(run), by_step(uploaded["history"])
    assert sorted(history) == list(figures)
    for step, wanted in figures.items():
        assert {name: history[step][name] for name in wanted} == {
            name: [pytest.approx(value, rel=1e-8)] for name, value in wanted.items()
        }


# Several ranks, several jobs


@pytest.mark.slow
def test_of_several_ranks_the_first_one_logs(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_its_own(monkeypatch, tmp_path)
    done = home.run(*home.tiny("name=ranks", *BOTH, "trainer=ddp_cpu", "trainer.max_steps=8"))
    assert done.returncode == 0, done.stderr
    run = home.only_run("ranks")
    (log,) = read_logs(run)
    assert list(by_step(log.history)) == list(figures_of(run)) == list(range(1, 9))
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert log.config["world_size"] == 2
    assert done.stdout.count("wandb sync") == 1


@pytest.mark.slow
def test_jobs_of_a_sweep_are_one_group(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_its_own(monkeypatch, tmp_path)
    options = home.tiny("name=swept", "logger=wandb", "logger.wandb.mode=offline", "trainer.max_steps=2")
    done = home.run("-m", *options, "moe=none,deepseek", "optimizer.lr=0.01")
    assert done.returncode == 0, done.stderr + done.stdout
    (whole,) = (home.path / "outputs" / "sweeps" / "swept").glob("*/")
    logs = [read_logs(whole / number)[0] for number in ("0", "1")]
    assert [log.run.display_name for log in logs] == ["swept moe=none", "swept moe=deepseek"]
    assert [(log.run.run_group, log.run.job_type) for log in logs] == [(f"swept/{whole.name}", "sweep")] * 2
    assert logs[0].run.run_id != logs[1].run.run_id


# What goes wrong early


def made(folder: Path, **options: Any) -> Any:
    return loggers.wandb(str(folder), name="x", project="elara", **options)


def test_wandb_online_without_a_key_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_its_own(monkeypatch, tmp_path)
    with pytest.raises(ElaraError, match=r"there is no key: run `wandb login`; or set logger\.wandb\.mode=offline"):
        made(tmp_path, mode="online")
    assert not made(tmp_path, mode="auto").online


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"mode": "on"}, "logger.wandb.mode=on must be one of auto, online, offline"),
        ({"mode": "offline", "checkpoints": "some"}, "logger.wandb.checkpoints=some must be one of none, best, all"),
    ],
)
def test_what_wandb_may_be_told_is_checked(tmp_path: Path, options: dict[str, str], line: str) -> None:
    with pytest.raises(ElaraError) as caught:
        made(tmp_path, **options)
    assert str(caught.value) == line


@pytest.mark.parametrize(("package", "option"), [("wandb", "logger=wandb"), ("tensorboard", "logger=tensorboard")])
def test_a_missing_package_is_one_line_and_leaves_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, package: str, option: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what importing a package that is not there meets
    done = home.call(*home.tiny(f"name=without-{package}", option))
    assert (done.returncode, done.stdout) == (1, "")
    hint = f"pip install 'elara-hivemind[{package}]'"
    assert done.stderr == f"error: {option} needs the package {package}: {hint}\n"
    assert list((home.path / "outputs" / "train").glob(f"without-{package}/*")) == []


def logging_in(home: Home, folder: Path, mode: str, address: str) -> subprocess.Popen[str]:
    """A process that says whether its wandb is online."""
    environment = {**home.env(), "WANDB_API_KEY": KEY, "WANDB_BASE_URL": address}
    script = (
        "import sys\nfrom elara.cli import guard\nfrom elara.training.loggers import wandb\n"
        f"guard(lambda: print(wandb(sys.argv[1], name='x', project='p', mode='{mode}').online))"
    )
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_key_that_the_server_does_not_take_is_one_line(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_its_own(monkeypatch, tmp_path)
    with serving() as server:
        server.knows_the_key = False
        process = logging_in(home, tmp_path, "online", server.url)
        out, errors = process.communicate(timeout=200)
    assert (process.returncode, out) == (1, "")
    assert errors.startswith("error: logger.wandb.mode=online does not work, Failed to authenticate")
    assert errors.endswith("; or set logger.wandb.mode=offline\n") and errors.count("\n") == 1


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_one_line_or_a_note(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_its_own(monkeypatch, tmp_path)
    nowhere = "http://127.0.0.1:9"
    online, auto = (logging_in(home, tmp_path, mode, nowhere) for mode in ("online", "auto"))
    out, errors = online.communicate(timeout=200)
    assert (online.returncode, out) == (1, "")
    unreached = f"{nowhere} cannot be reached (Connection refused)"
    assert errors.startswith(f"error: logger.wandb.mode=online does not work, {unreached}")
    assert errors.endswith("; or set logger.wandb.mode=offline\n") and errors.count("\n") == 1
    out, errors = auto.communicate(timeout=200)
    assert (auto.returncode, errors) == (0, "")
    assert out == f"note: wandb goes on offline, {unreached}\nFalse\n"
