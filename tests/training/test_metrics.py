"""Names and values of what is logged."""

from __future__ import annotations

import math

import pytest
import torch

from elara.errors import ElaraError
from elara.training.metrics import Means, loss_figures, moe_figures
from elara.training.module import check_finite


def test_means_are_weighted_and_reading_empties_them() -> None:
    means = Means(("a", "b"))
    means.update([torch.tensor(1.0), torch.tensor(10.0)], 3)
    means.update([torch.tensor(5.0), torch.tensor(30.0)], torch.tensor(1))
    assert means.read() == {"a": 2.0, "b": 15.0}
    means.update([torch.tensor(7.0), torch.tensor(8.0)])
    assert means.read() == {"a": 7.0, "b": 8.0}


def test_every_mean_may_have_weights_of_its_own() -> None:
    means = Means(("a", "b", "c"))
    zero, one, two = (torch.tensor(float(n)) for n in range(3))
    means.update([one, 2 * one, one], [2 * one, one, zero])
    means.update([4 * one, 5 * one, one], [one, two, zero])
    assert means.read() == {"a": 2.0, "b": 4.0}  # nothing counts for c


def test_means_do_not_lose_small_values_among_many() -> None:
    means = Means(("a",))
    for _ in range(10_000):
        means.update([torch.tensor(0.1)])
    assert means.read()["a"] == pytest.approx(0.1, rel=1e-7)


def test_perplexity_and_bits_per_character() -> None:
    figures = loss_figures("val", math.log(8), chars_per_token=1.5)
    assert figures == {"val/perplexity": pytest.approx(8.0), "val/bits_per_char": pytest.approx(2.0)}
    assert "val/bits_per_char" not in loss_figures("val", 1.0, None)
    assert math.isfinite(loss_figures("val", 1e6, None)["val/perplexity"])


def test_moe_figures_by_layer_pass_and_section() -> None:
    load = torch.zeros(2, 2, 2, 4)
    load[0, 0, 0] = torch.tensor([4.0, 4.0, 4.0, 4.0])
    load[1, 1, 0] = torch.tensor([8.0, 2.0, 2.0, 0.0])
    load[1, 1, 1] = torch.tensor([0.0, 0.0, 0.0, 6.0])
    figures = moe_figures(load, [1, 3])
    assert figures["moe/layer1/pass0/clean/max_vio"] == 0
    assert figures["moe/layer1/pass0/clean/entropy"] == pytest.approx(1)
    assert figures["moe/layer3/pass1/clean/max_vio"] == pytest.approx(8 / 3 - 1)
    assert figures["moe/layer3/pass1/clean/dead"] == 1
    assert figures["moe/layer3/pass1/clean/load0"] == pytest.approx(8 / 12)
    assert figures["moe/layer3/pass1/mask/max_vio"] == 3 and figures["moe/layer3/pass1/mask/dead"] == 3
    assert not any(name.startswith("moe/layer1/pass0/mask") for name in figures)  # no mask section there


def test_a_loss_that_is_not_a_number_ends_the_run() -> None:
    check_finite({"train/loss": 1.0, "moe/layer1/pass0/clean/entropy": float("nan")}, 3)
    with pytest.raises(ElaraError, match=r"train/loss_ar is nan at step 3: lower optimizer\.lr"):
        check_finite({"train/loss_ar": float("nan")}, 3)
