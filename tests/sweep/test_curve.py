"""Reading a metrics.csv while the logger writes it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from elara.sweep.curve import Curve
from elara.training.loggers import CSV

METRIC = "val/loss_ar"


def test_each_value_is_reported_once_and_soon(tmp_path: Path):
    logger, curve = CSV(str(tmp_path / "metrics.csv")), Curve(tmp_path / "metrics.csv", METRIC)
    assert curve.read() == []
    logger.log_metrics({"train/loss": 3.0}, 10)
    assert curve.read() == []
    logger.log_metrics({METRIC: 2.5}, 10)  # joins the row of step 10, and a column joins the file
    assert curve.read() == [(10, 2.5)]
    assert curve.read() == []
    logger.log_metrics({"train/loss": 2.0}, 20)
    logger.log_metrics({METRIC: 2.25}, 20)
    logger.log_metrics({"train/loss": 1.0}, 30)
    assert curve.read() == [(20, 2.25)]
    assert curve.values == {10: 2.5, 20: 2.25}
    assert curve.columns == ["step", "train/loss", METRIC]


@pytest.mark.parametrize("seed", range(20))
def test_whenever_it_looks_it_misses_nothing(tmp_path: Path, seed: int):
    generator = random.Random(seed)
    logger, curve = CSV(str(tmp_path / "metrics.csv")), Curve(tmp_path / "metrics.csv", METRIC)
    written, read = [], []
    for step in range(1, 40):
        for name in generator.sample(["a", "b/c", METRIC, f"new/{step // 9}"], k=generator.randint(1, 4)):
            value = round(generator.uniform(0, 10), generator.randint(0, 6))
            logger.log_metrics({name: value}, step)
            if name == METRIC:
                written.append((step, value))
            if generator.random() < 0.4:
                read += curve.read()
    read += curve.read()
    assert read == written and len(read) > 5


def test_a_file_that_is_written_anew_is_read_by_its_own_header(tmp_path: Path):
    """A validation comes before the first log; columns join twice between two looks, and the second new file gets the
    inode that the first one freed."""
    file = tmp_path / "metrics.csv"
    logger, curve = CSV(str(file)), Curve(file, METRIC)
    logger.log_metrics({METRIC: 2.5}, 5)
    assert curve.read() == [(5, 2.5)]
    first = tmp_path / "first"
    first.hardlink_to(file)
    for step in range(10, 65, 10):
        logger.log_metrics({METRIC: 20 / step, "train/loss": 3.0}, step)
    first.write_bytes(file.read_bytes())
    os.replace(first, file)
    assert dict(curve.read()) == pytest.approx({step: 20 / step for step in range(10, 65, 10)})
    assert curve.columns == ["step", METRIC, "train/loss"]


def test_half_a_row_waits_for_its_other_half(tmp_path: Path):
    file = tmp_path / "metrics.csv"
    file.write_text(f"step,{METRIC}\n10,2.5\n20,1.", "utf-8")
    curve = Curve(file, METRIC)
    assert curve.read() == [(10, 2.5)]
    with open(file, "a", encoding="utf-8") as more:
        more.write("75\n")
    assert curve.read() == [(20, 1.75)]
