"""What a sweep came to, as text, table and picture."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib.figure import Figure

from elara.errors import ElaraError
from elara.report import print_summary, summarize
from elara.report.comparison import compare
from elara.report.sweep_figure import panels
from elara.runs import Run
from tests.report.conftest import TINY, plan, write_job

Made = Callable[..., Path]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def held_out(run: Path) -> list[float]:
    with open(run / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row["val/loss_ar"]) for row in csv.DictReader(file) if row["val/loss_ar"]]


@pytest.fixture(scope="module")
def summarized(sweep: Path) -> Path:
    summarize(sweep)
    return sweep


def test_every_job_has_a_row_with_its_figures(summarized: Path) -> None:
    found = rows(summarized)
    assert [row["job"] for row in found] == ["0", "1", "2", "3", "4", "5"]
    assert [(row["moe"], row["seed"]) for row in found[:3]] == [("none", "1"), ("none", "2"), ("deepseek", "1")]
    for row in found[:4]:
        losses = held_out(summarized / row["job"])
        about = json.loads((summarized / row["job"] / "summary.json").read_text("utf-8"))
        assert len(losses) == 2 and row["state"] == "finished"
        assert float(row["val_loss_best"]) == pytest.approx(min(losses), rel=1e-8)
        assert int(row["best_step"]) == 3 * (1 + losses.index(min(losses)))
        assert float(row["val_loss_last"]) == pytest.approx(losses[-1], rel=1e-8)
        assert int(row["parameters"]) == about["parameters"]
        assert float(row["wall_seconds"]) == about["wall_seconds"]
        assert 1 <= float(row["tokens_per_forward"]) <= 4 and float(row["seconds_per_step"]) > 0


def test_jobs_that_failed_or_never_began_say_so(summarized: Path) -> None:
    failed, missing = rows(summarized)[4:]
    assert failed["state"] == "failed" and failed["error"].startswith("there is no moe=other")
    assert missing["state"] == "missing" and (missing["moe"], missing["seed"]) == ("other", "2")
    text = (summarized / "summary.md").read_text("utf-8")
    assert "6 jobs: 4 finished, 1 failed, 1 missing." in text
    assert "* job 4: failed: there is no moe=other" in text and "* job 5: missing" in text


def test_what_is_the_same_in_all_is_named_once(summarized: Path) -> None:
    text = (summarized / "summary.md").read_text("utf-8")
    for override in TINY:
        assert text.count(f"`{override}`") == 1
    assert f"`data.path={summarized.parents[3] / 'bees.txt'}`" in text  # without the quotes of the command line
    assert "hydra.run.dir" not in text


def test_seeds_are_put_together(summarized: Path) -> None:
    text = (summarized / "summary.md").read_text("utf-8")
    for moe, jobs in (("none", "01"), ("deepseek", "23")):
        losses = [min(held_out(summarized / job)) for job in jobs]
        mean, deviation = statistics.mean(losses), statistics.stdev(losses)
        assert re.search(rf"\| {moe} \| 2 \| {mean:.4f} ± {deviation:.4f} \|", text), text


def test_a_summary_made_again_is_the_same(summarized: Path) -> None:
    before = {end: (summarized / f"summary.{end}").read_bytes() for end in ("md", "csv", "png")}
    assert before["png"].startswith(b"\x89PNG")
    summarize(summarized)
    assert before == {end: (summarized / f"summary.{end}").read_bytes() for end in before}


def test_the_terminal_gets_tables_and_errors(summarized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(compare(summarized))
    out = capsys.readouterr().out
    assert "Over seeds" in out and "Every job" in out and "best loss" in out
    assert "job 4: failed: there is no moe=other" in out and str(summarized / "summary.png") in out


def test_a_narrow_terminal_loses_columns_not_figures(summarized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    monkeypatch.setattr(printed, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", printed)
    monkeypatch.setenv("COLUMNS", "90")
    comparison = compare(summarized)
    print_summary(comparison)
    out = printed.getvalue()
    assert "at step" not in out and "…" not in out
    assert all(f"{job.best_loss:.4f}" in out for job in comparison.finished)


def test_the_best_is_first_and_numbers_are_short(made_up: Made) -> None:
    folder = made_up([(["optimizer.lr=0.0123456789", "a.x=1"], 2.0), (["optimizer.lr=3.0e-2", "b.x='q'"], 1.5)])
    summarize(folder)
    table = [line for line in (folder / "summary.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    assert table[0].startswith("| job | lr | a.x | b.x | state | best loss |")
    assert table[2].startswith("| 1 | 3.0e-2 | - | q | finished | 1.5000 |")
    assert table[3].startswith("| 0 | 0.01235 | 1 | - | finished | 2.0000 |")
    assert [row["optimizer.lr"] for row in rows(folder)] == ["0.0123456789", "3.0e-2"]


def test_a_group_tells_how_many_of_its_seeds_came_through(made_up: Made) -> None:
    jobs = [(["moe=none", "seed=1"], 2.0), (["moe=none", "seed=2"], math.nan), (["moe=other", "seed=1"], 1.0)]
    folder = made_up(jobs)
    summarize(folder)
    text = (folder / "summary.md").read_text("utf-8")
    assert "| none | 1 of 2 | 2.0000 |" in text and "| other | 1 | 1.0000 |" in text
    assert "* job 1: failed: cannot | go on at all" in text


def test_nothing_finished_leaves_text_only(made_up: Made) -> None:
    folder = made_up([(["moe=none"], 2.0)])
    summarize(folder)
    assert (folder / "summary.png").exists()
    write_job(Run(folder / "0"), ["moe=none"], 1, "broke")
    (folder / "0" / "summary.json").unlink()
    comparison = summarize(folder)
    assert [job.state for job in comparison.failed] == ["failed"]
    assert "1 job: 1 failed." in (folder / "summary.md").read_text("utf-8")
    assert rows(folder)[0]["error"] == "broke" and not (folder / "summary.png").exists()


def test_states_of_a_job(made_up: Made) -> None:
    folder = made_up([([f"seed={n}"], 2.0) for n in range(5)])
    (folder / "1" / "job.json").unlink()  # finished, and its coordinator was killed
    (folder / "2" / "job.json").unlink()
    (folder / "2" / "summary.json").unlink()  # trains, or was killed
    (folder / "3" / "summary.json").write_text('{"finished": false, "steps": 20}', "utf-8")
    (folder / "3" / "job.json").write_text('{"exit_code": 130, "pruned_at": 20}', "utf-8")
    (folder / "4" / "summary.json").unlink()  # callbacks=minimal
    comparison = compare(folder)
    assert [job.state for job in comparison.jobs] == ["finished", "finished", "unfinished", "pruned", "finished"]
    assert [job.name for job in comparison.failed] == ["2"]


def test_a_failure_without_a_word_is_told_by_its_log(made_up: Made) -> None:
    folder = made_up([(["seed=1"], math.nan)])
    write_job(Run(folder / "0"), ["seed=1"], -9, None, "step 3\nKilled\n\n")
    assert compare(folder).jobs[0].error == "Killed"
    write_job(Run(folder / "0"), ["seed=1"], -9, None, "")
    assert compare(folder).jobs[0].error == "exit code -9"


def test_a_folder_without_jobs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ElaraError, match="is no sweep"):
        summarize(tmp_path)


def test_jobs_of_a_plan_are_known_before_they_begin(tmp_path: Path) -> None:
    plan(tmp_path, "a=1", "b=x,y", "c=range(3)", "d='e,f'")
    jobs = compare(tmp_path).jobs
    assert [job.state for job in jobs] == ["missing"] * 6
    assert jobs[4].overrides == {"a": "1", "b": "y", "c": "1", "d": "e,f"}


GRIDS: dict[str, list[list[str]]] = {
    "one": [["moe=none"]],
    "two": [["moe=none"], ["moe=deepseek"]],
    "seeds": [[f"moe={m}", f"seed={s}"] for m in "ab" for s in range(3)],
    "grid of 24": [[f"moe={m}", f"trm.depth={d}", f"tidar={t}", f"optimizer.lr={lr}"]
                   for m in "ab" for d in (1, 2) for t in "xy" for lr in (0.01, 0.1, 1)],
    "search of 40": [[f"optimizer.lr={10 ** -(i / 13):.4g}", f"x={i * 7 % 41}", f"m={'ab'[i % 2]}"] for i in range(40)],
    "one far off": [[f"moe=option{i}"] for i in range(8)],
}  # fmt: skip


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("grid", GRIDS)
def test_the_picture_holds_every_kind_of_sweep(made_up: Made, grid: str) -> None:
    jobs = [(overrides, 2 + 0.01 * (i * 5 % 7)) for i, overrides in enumerate(GRIDS[grid])]
    if grid == "one far off":
        jobs[3] = (jobs[3][0], 11.0)
    folder = made_up(jobs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not fit
        summarize(folder)
    assert (folder / "summary.png").stat().st_size > 10_000


def axes_of(folder: Path) -> list[matplotlib.axes.Axes]:
    drawn = []
    for panel in panels(compare(folder)):
        figure = Figure(figsize=panel.size)
        panel.draw(figure)
        drawn += figure.axes
    return drawn


def test_loss_is_drawn_over_numeric_settings(made_up: Made) -> None:
    rates, depths = ("0.003", "0.01", "0.03", "0.1"), ("1", "2", "3")
    jobs = [([f"optimizer.lr={lr}", f"trm.depth={d}"], float(d) - float(lr)) for lr in rates for d in depths]
    over_rate, over_depth = axes_of(made_up(jobs))[2:]
    assert over_rate.get_xscale() == "log" and over_rate.get_xlabel() == "optimizer.lr"
    assert over_depth.get_xscale() == "linear" and over_depth.get_xlabel() == "trm.depth"
    assert over_rate.get_legend_handles_labels()[1] == ["depth=1", "depth=2", "depth=3"]
    line = over_rate.containers[2].lines[0]  # type: ignore[attr-defined]
    assert list(line.get_xdata()) == [0.003, 0.01, 0.03, 0.1]
    assert list(line.get_ydata()) == pytest.approx([3 - float(lr) for lr in rates])


def test_two_values_words_and_seeds_are_no_numeric_setting(made_up: Made) -> None:
    jobs = [([f"trm.depth={d}", f"moe={m}", f"seed={s}"], 2.0) for d in (1, 2) for m in "abc" for s in range(4)]
    assert len(axes_of(made_up(jobs))) == 2


def test_the_ranking_shows_mean_and_spread_of_seeds(made_up: Made) -> None:
    losses = {"a": (2.0, 2.1, 2.4), "b": (1.0, 1.0, 1.3)}
    jobs = [([f"moe={moe}", f"seed={i}"], loss) for moe, found in losses.items() for i, loss in enumerate(found)]
    ranking = axes_of(made_up(jobs))[0]
    words = [text.get_text() for text in ranking.texts]
    for found in losses.values():
        assert f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}" in words
    assert words.index("b") < words.index("a")  # the best is the first row
