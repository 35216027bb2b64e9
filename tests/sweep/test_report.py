"""What a search tells: the best command, tables, the time that pruning saved, importances, pictures."""

from __future__ import annotations

import csv
import math
import random
import shlex
from pathlib import Path

import pytest
from matplotlib.image import imread

from elara.sweep.config import SearchConfig
from elara.sweep.importance import LEAST, importances
from elara.sweep.records import Record, best, duration, projected
from elara.sweep.report import best_command, saved_by_pruning, write
from elara.sweep.space import read_space

SPACE = read_space({
    "optimizer": {"lr": {"type": "float", "low": 1e-3, "high": 0.1, "log": True}},
    "moe": {"type": "choice", "choices": ["none", "deepseek"]},
    "schedule.warmup": {"type": "int", "low": 0, "high": 100, "step": 10},
})  # fmt: skip
FIXED = ["data.path=/it's here", "trainer.max_steps=40"]


def record(number: int, state: str = "complete", value: float | None = 2.0, *, seconds: float = 10.0, lr: float = 0.01,
           moe: str = "none", warmup: int = 30, steps: int = 40, error: str | None = None) -> Record:  # fmt: skip
    curve = {} if value is None else {step: value + 2 * math.exp(-step / 15) - 2 * math.exp(-steps / 15)
                                      for step in range(10, steps + 1, 10)}  # fmt: skip
    values = {"optimizer.lr": lr, "moe": moe, "schedule.warmup": warmup}
    overrides = [f"{p.key}={p.text(values[p.key])}" for p in SPACE]
    return Record(number, state, value, curve, values, overrides, seconds, "here", error)


def many(count: int = 30) -> list[Record]:
    """Trials whose loss hangs on the rate, a little on the experts, and not on the warm-up."""
    generator, found = random.Random(0), []
    for number in range(count):
        lr, moe = 10 ** generator.uniform(-3, -1), generator.choice(["none", "deepseek"])
        value = 2 + 0.2 * (math.log10(lr) + 2) ** 2 + 0.04 * (moe == "none") + generator.gauss(0, 0.01)
        found.append(record(number, value=value, lr=lr, moe=moe, warmup=10 * generator.randint(0, 10)))
    return found


def test_best_is_the_best_complete_trial_whatever_pruned_ones_had_reached():
    records = [record(0, value=3.0), record(1, value=2.0), record(2, "pruned", 1.0, steps=20), record(3, value=2.0)]
    found = best(records, "minimize"), best(records, "maximize")
    assert [top.number for top in found if top] == [1, 0]
    assert best(records[2:3], "minimize") is None


def test_the_command_holds_fixed_and_searched_values_and_survives_the_shell():
    command = best_command(record(0, lr=0.0125, moe="deepseek"), FIXED)
    assert shlex.split(command) == [
        "python", "-m", "elara.train", "data.path=/it's here", "trainer.max_steps=40",
        "optimizer.lr=0.0125", "moe=deepseek", "schedule.warmup=30",
    ]  # fmt: skip


def test_time_saved_is_what_the_pruned_trials_would_have_taken_more():
    records = [record(0, seconds=10), record(1, seconds=14), record(2, "pruned", seconds=3), record(3, "failed", None)]
    assert saved_by_pruning(records) == "pruning one trial saved about 9 s of 36 s (25%)"
    assert saved_by_pruning(records[:2]) is None
    assert saved_by_pruning(records[2:]) is None


def test_a_pruned_trial_is_projected_by_what_complete_ones_gained_from_there():
    complete = [record(number, value=value) for number, value in enumerate((2.0, 2.5))]
    pruned = record(2, "pruned", 3.4, steps=20)
    gains = [other.curve[20] - other.curve[40] for other in complete]
    assert projected([*complete, pruned])[2] == pytest.approx(3.4 - sum(gains) / 2)
    assert projected([*complete, pruned, record(3, "failed", None)]).keys() == {0, 1, 2}
    assert projected([pruned]) == {}


@pytest.mark.slow
def test_importances_name_the_key_that_matters_and_need_enough_trials():
    assert importances(many(LEAST - 1), SPACE) is None
    assert importances([record(number) for number in range(LEAST)], SPACE) is None, "all the same"
    shares = importances(many(), SPACE)
    assert shares is not None
    assert shares[0].key == "optimizer.lr"
    assert shares[0].share > 0.7
    assert sum(share.share for share in shares) == pytest.approx(1)
    assert all(0 <= share.low <= share.high <= 1 for share in shares)


@pytest.mark.slow
def test_pruning_does_not_hide_what_matters():
    """Without the pruned trials, those with a bad rate, the rate would explain little."""
    records = [r if (r.value or 0) < 2.08 else record(r.number, "pruned", (r.value or 0) + 0.6, steps=20,
               lr=r.values["optimizer.lr"], moe=r.values["moe"], warmup=r.values["schedule.warmup"])
               for r in many()]  # fmt: skip
    assert 8 < sum(r.state == "pruned" for r in records) < 22
    shares = importances(records, SPACE)
    assert shares is not None and shares[0].key == "optimizer.lr" and shares[0].share > 0.7


@pytest.mark.slow
def test_the_tables_hold_every_trial(tmp_path: Path):
    records = [record(0, value=2.5, seconds=100), record(1, "pruned", 4.0, steps=20, seconds=40), record(2, value=2.25),
               record(3, "failed", None, error="train/loss is nan at step 10, a | b")]  # fmt: skip
    told = "\n".join(write(records, SearchConfig(study="bees", trials=5), SPACE, FIXED, tmp_path))
    command = best_command(records[2], FIXED)
    assert "3 of 5 trials: 2 trained to the end, 1 pruned, 1 failed" in told
    assert f"importances need {LEAST} trials, so they are left out" in told
    assert command in told
    assert (tmp_path / "best.txt").read_text("utf-8") == f"# val/loss_ar 2.25, trial 2\n{command}\n"
    with open(tmp_path / "summary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], row["state"], row["val/loss_ar"], row["step"]) for row in rows] == [
        ("0", "complete", "2.5", "40"),
        ("1", "pruned", "4", "20"),
        ("2", "complete", "2.25", "40"),
        ("3", "failed", "", ""),
    ]
    assert rows[3]["error"] == "train/loss is nan at step 10, a | b"
    assert rows[0]["optimizer.lr"] == "0.01"
    text = (tmp_path / "summary.md").read_text("utf-8")
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert order == ["2", "0", "1", "3"], "the best first, failed ones last"
    assert "- trial 3: train/loss is nan at step 10" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("(")[2].rstrip(")")).is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("kind", ["many", "few", "one", "pruned", "failed"])
def test_pictures_are_drawn_of_whatever_there_is(tmp_path: Path, kind: str, direction: str):
    records = {
        "many": [
            *many(14),
            record(14, "pruned", 3.0, steps=20),
            record(15, "failed", None),
            record(16, "running", 3.0),
        ],
        "few": many(3),
        "one": [record(0)],
        "pruned": [record(0, "pruned", 3.0, steps=10)],
        "failed": [record(0, "failed", None, error="no")],
    }[kind]
    write(records, SearchConfig(study="bees", direction=direction), SPACE, [], tmp_path)
    pictures = {file.stem for file in tmp_path.glob("*.png")}
    assert pictures == {
        "many": {"history", "importance", "slices", "parallel"}, "few": {"history", "slices", "parallel"},
        "one": {"history", "slices", "parallel"}, "pruned": {"history", "slices"}, "failed": set(),
    }[kind]  # fmt: skip
    for name in pictures:
        assert imread(tmp_path / f"{name}.png").std() > 0.02, "not blank"


def test_durations_are_words():
    assert [duration(seconds) for seconds in (0, 41.6, 89, 720, 5400, 12600)] == [
        "0 s", "42 s", "89 s", "12 min", "1.5 h", "3.5 h",
    ]  # fmt: skip
