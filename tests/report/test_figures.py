"""The pictures are drawn from whatever a metrics.csv holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from elara.errors import ElaraError
from elara.report.figures import draw_all
from elara.report.metrics import read_metrics
from elara.training.loggers import CSV


def metrics(path: Path, *, moe: bool, tidar: bool, rows: int = 6) -> Path:
    logger = CSV(str(path))
    for step in range(1, rows + 1):
        row = {"train/loss_ar": 4 / step, "train/lr": 1e-3, "train/grad_norm": 1.0, "train/tokens_per_second": 100.0}
        if tidar:
            row["train/loss_diffusion"] = 5 / step
        if moe:
            for layer in range(1, 41, 2):
                row[f"moe/layer{layer}/pass0/clean/max_vio"] = 0.5
                row |= {f"moe/layer{layer}/pass0/clean/load{e}": 0.25 for e in range(4)}
        logger.log_metrics(row, step=step)
        if step % 3 == 0:
            logger.log_metrics({"val/loss_ar": 4.1 / step}, step=step)
            if tidar:
                logger.log_metrics({"val/accept/2": 0.5, "val/accept/3": 0.2, "val/tokens_per_forward": 1.7}, step=step)
    return path


@pytest.mark.thorough(1, "slow")
@pytest.mark.parametrize(
    ("moe", "tidar", "rows", "expected"),
    [
        (False, False, 6, {"loss", "training"}),
        (True, False, 6, {"loss", "training", "experts"}),
        (True, True, 6, {"loss", "training", "experts", "acceptance"}),
        (True, True, 1, {"loss", "training", "experts"}),
    ],
)
def test_each_run_gets_the_pictures_it_has_figures_for(
    tmp_path: Path, moe: bool, tidar: bool, rows: int, expected: set[str]
) -> None:
    drawn = draw_all(metrics(tmp_path / "m.csv", moe=moe, tidar=tidar, rows=rows), tmp_path / "plots", "a run")
    assert {path.stem for path in drawn} == expected


def test_no_figures_yet_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ElaraError, match="no metrics at"):
        read_metrics(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_text("step,a\n", "utf-8")
    with pytest.raises(ElaraError, match="yet"):
        read_metrics(tmp_path / "m.csv")


def test_columns_that_a_shorter_run_kept_without_a_value_draw_nothing(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint and goes on with fewer steps logs only some of its figures."""
    head, *_ = metrics(tmp_path / "m.csv", moe=True, tidar=True).read_text("utf-8").splitlines()
    values = {"step": "1", "train/tokens_per_second": "100.0"}
    row = ",".join(values.get(name, "") for name in head.split(","))
    (tmp_path / "m.csv").write_text(f"{head}\n{row}\n", "utf-8")
    drawn = draw_all(tmp_path / "m.csv", tmp_path / "plots", "a run")
    assert {path.stem for path in drawn} == {"training"}
