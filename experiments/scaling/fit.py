"""Fit the best learning rates of runs.csv by powers of width, depth, tokens and batch, and print what follows."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elara.cli import guard

HERE = Path(__file__).parent
RATIO, WINDOW, DRAWS = 0.2, 4, 2000  # adam_lr / lr of the fits; notches around the best that a parabola sees; bootstrap
Values = NDArray[np.float64]


class Cell(NamedTuple):
    """What the learning rate is tuned for."""

    width: int
    layers: int
    tokens: int
    batch: int


BASE = Cell(128, 2, 384 * 1024, 1024)  # the powers are relative to this


class Points(NamedTuple):
    """The runs of a cell: half powers of 2 of the learning rate from 0.02, held-out loss, seed."""

    notch: Values
    loss: Values
    seed: Values


def read() -> tuple[dict[Cell, Points], list[dict[str, float]]]:
    """The runs of every cell at the usual ratio of the rates, and those of the other ratios."""
    with (HERE / "runs.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    cells = defaultdict(list)
    for row in rows:
        if row["ratio"] == RATIO and np.isfinite(row["loss_ar"]):
            cell = Cell(*(int(row[name]) for name in Cell._fields))
            cells[cell].append((row["notch"], row["loss_ar"], row["seed"]))
    return {cell: Points(*np.array(sorted(found)).T) for cell, found in sorted(cells.items())}, rows


class Optimum(NamedTuple):
    """A cell's best rate in log2 and the loss there; bootstrap draws of both; the parabola's curvature per notch^2."""

    rate: float
    loss: float
    rates: Values
    losses: Values
    curvature: float


def design(points: Points) -> tuple[Values, Values]:
    """Which points a parabola sees, and its columns: notch^2, notch, 1, and a level of its own for a second seed."""
    first = points.seed == 1
    best = points.notch[first][points.loss[first].argmin()]
    near = np.abs(points.notch - best) <= WINDOW
    notch, seed = points.notch[near], points.seed[near]
    columns = [notch**2, notch, np.ones_like(notch), *(seed == s for s in np.unique(seed)[1:])]
    return near, np.stack(columns, axis=1).astype(float)


def optima(cells: dict[Cell, Points], random: np.random.Generator) -> tuple[dict[Cell, Optimum], float]:
    """The minimum of a parabola through every cell's runs, and the noise of a run: what the parabolas leave, pooled.

    Few runs tell little about the curvature, so it is drawn to the cells' median as if that were known to a half.
    """
    seen = {cell: design(points) for cell, points in cells.items()}
    alone = [np.linalg.lstsq(x, cells[cell].loss[near])[0] for cell, (near, x) in seen.items()]
    pairs = zip(seen.items(), alone, strict=True)
    left = sum(((cells[cell].loss[near] - x @ k) ** 2).sum() for (cell, (near, x)), k in pairs)
    noise = float((left / sum(len(x) - x.shape[1] for _, x in seen.values())) ** 0.5)
    usual = float(np.median([k[0] for k in alone]))
    found = {}
    for cell, (near, x) in seen.items():
        weight = noise / (usual / 2)
        solve = np.linalg.pinv(np.vstack([x, weight * np.eye(x.shape[1])[:1]])).T
        loss = cells[cell].loss[near]
        drawn = np.concatenate([loss[None], loss + noise * random.standard_normal((DRAWS, len(loss)))])
        prior = weight * usual * np.append(1, 1 + random.standard_normal(DRAWS) / 2)
        a, b, c = (np.hstack([drawn, prior[:, None]]) @ solve)[:, :3].T
        notch = np.clip(-b / (2 * np.maximum(a, usual / 20)), x[:, 1].min() - 1, x[:, 1].max() + 1)
        rate, loss = np.log2(0.02) + notch / 2, a * notch**2 + b * notch + c
        found[cell] = Optimum(float(rate[0]), float(loss[0]), rate[1:], loss[1:], float(a[0]))
    return found, noise


class Rule(NamedTuple):
    """log2(rate) = k[0] + k[1:] . log2(cell / BASE); `draws`: the same from bootstrapped optima and their misfit."""

    k: Values
    draws: Values

    def rate(self, cell: Cell) -> tuple[float, float, float]:
        """The rate for a cell and the band that holds two thirds of the draws."""
        x = powers([cell])[0]
        low, high = np.percentile(self.draws @ x, [16, 84])
        return float(2 ** (self.k @ x)), float(2**low), float(2**high)


def powers(cells: Iterable[Cell]) -> Values:
    """Columns of the regression: 1 and log2 of width, layers, tokens, batch relative to BASE."""
    return np.array([[1.0, *np.log2(np.array(cell) / np.array(BASE))] for cell in cells])


def fit_rule(found: dict[Cell, Optimum], random: np.random.Generator) -> Rule:
    """Weighted least squares through the optima; what they scatter beyond their own errors goes into the draws."""
    x = powers(found)
    y, draws = np.array([o.rate for o in found.values()]), np.stack([o.rates for o in found.values()])
    error = draws.std(axis=1) + 0.05
    solve = np.linalg.pinv(x / error[:, None]) / error
    k = solve @ y
    misfit = ((y - x @ k) / error) ** 2
    beyond = max(1.0, float(misfit.sum()) / max(1, len(y) - x.shape[1])) ** 0.5
    spread = y[:, None] + beyond * error[:, None] * random.standard_normal(draws.shape)
    return Rule(k, (solve @ spread).T)


def steps_term(found: dict[Cell, Optimum]) -> tuple[float, float, dict[tuple[int, int], float], Values]:
    """Tuned loss = level(width, tokens) + k * steps^-q where the batch was varied: k, q, levels, k per draw."""
    groups = defaultdict(list)
    for cell in found:
        if cell.layers == 2:
            groups[cell.width, cell.tokens].append(cell)
    groups = {key: cells for key, cells in groups.items() if len(cells) > 2}
    cells = [cell for group in groups.values() for cell in group]
    steps = np.array([cell.tokens / cell.batch for cell in cells])
    level = np.array([[cell in group for group in groups.values()] for cell in cells], dtype=float)
    losses = np.stack([np.append(found[cell].loss, found[cell].losses) for cell in cells])

    def solve(q: float) -> tuple[float, Values]:
        x = np.hstack([level, steps[:, None] ** -q])
        k = np.linalg.pinv(x) @ losses
        return float(((losses[:, 0] - x @ k[:, 0]) ** 2).sum()), k

    q = min(np.arange(0.3, 2.01, 0.05), key=lambda q: solve(q)[0])
    k = solve(q)[1]
    return float(k[-1, 0]), float(q), dict(zip(groups, map(float, k[:-1, 0]), strict=True)), k[-1, 1:]


TARGETS = {  # 20 tokens per active parameter
    "elara_124m": Cell(768, 12, int(2.5e9), 2**18),
    "elara_2p8b": Cell(1280, 32, int(25.6e9), 2**20),
}


def other_ratios(rows: list[dict[str, float]]) -> None:
    """Print the losses where adam_lr was varied: at the same lr, and at the same adam_lr."""
    varied = {(row["width"], row["notch"]) for row in rows if row["ratio"] != RATIO}
    print("width lr adam_lr loss")
    for row in rows:
        if (row["width"], row["notch"]) in varied and tuple(row[name] for name in Cell._fields[1:]) == BASE[1:]:
            print(f"{row['width']:.0f} {row['lr']:.4f} {row['lr'] * row['ratio']:.4f} {row['loss_ar']:.4f}")


def main() -> None:
    cells, rows = read()
    found, noise = optima(cells, np.random.default_rng(0))
    print(f"noise of a run's loss {noise:.4f}")
    for cell, o in found.items():
        low, high = 2 ** np.percentile(o.rates, [16, 84])
        print(*cell, f"{2**o.rate:.4f} [{low:.4f} {high:.4f}] {o.loss:.4f} ±{o.losses.std():.4f} {o.curvature:.4f}")
    rule = fit_rule(found, np.random.default_rng(1))
    for name, value, error in zip(("log2 rate", *Cell._fields), rule.k, rule.draws.std(axis=0), strict=True):
        print(f"{name:10} {value:6.2f} ±{error:.2f}")
    for name, target in TARGETS.items():
        without = rule.rate(target._replace(layers=BASE.layers))
        print(name, "{:.4f} [{:.4f} {:.4f}]; without depth {:.4f} [{:.4f} {:.4f}]".format(*rule.rate(target), *without))
        fits = [fit_rule({c: o for c, o in found.items() if c != left}, np.random.default_rng(1)) for left in found]
        each = [fit.rate(target)[0] for fit in fits]
        print(f"  without any one setting {min(each):.4f} to {max(each):.4f}")
    k, q, levels, _ = steps_term(found)
    print("steps", k, q, levels)
    other_ratios(rows)


if __name__ == "__main__":
    guard(main)
