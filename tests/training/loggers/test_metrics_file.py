"""metrics.csv after crashes and resumes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.training.loggers import CSV


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_of_one_step_share_a_row_and_late_columns_are_empty_before(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path / "m.csv"))
    logger.log_metrics({"a": 1.5}, step=1)
    logger.log_metrics({"a": 2}, step=2)
    logger.log_metrics({"val": 0.25}, step=2)
    logger.log_metrics({"a": 3}, step=3)
    assert (tmp_path / "m.csv").read_text("utf-8") == "step,a,val\n1,1.5,\n2,2,0.25\n3,3,\n"


def test_the_file_is_whole_after_every_call(tmp_path: Path) -> None:
    logger = CSV(str(tmp_path / "m.csv"))
    for step in range(1, 4):
        logger.log_metrics({"a": step}, step=step)
        assert [row["step"] for row in rows_of(tmp_path / "m.csv")] == [str(i) for i in range(1, step + 1)]


def test_a_half_written_last_row_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("step,a,b\n1,1,2\n2,1,2\n3,1", "utf-8")
    CSV(str(path)).log_metrics({"a": 9}, step=3)
    assert path.read_text("utf-8") == "step,a,b\n1,1,2\n2,1,2\n3,9,\n"


@given(crash=st.integers(1, 12), back=st.integers(0, 11), every=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_resumed_file_reads_like_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory, crash: int, back: int, every: int
) -> None:
    folder = tmp_path_factory.mktemp("csv")

    def log(logger: CSV, first: int, last: int) -> None:
        for step in range(first, last + 1):
            logger.log_metrics({"loss": 1 / step}, step=step)
            if step % every == 0:
                logger.log_metrics({"val": step / 7}, step=step)

    log(CSV(str(folder / "whole.csv")), 1, 12)
    log(CSV(str(folder / "killed.csv")), 1, crash)
    log(CSV(str(folder / "killed.csv")), min(back, crash) + 1, 12)
    assert (folder / "killed.csv").read_text("utf-8") == (folder / "whole.csv").read_text("utf-8")
