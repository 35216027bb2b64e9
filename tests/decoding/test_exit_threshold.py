"""`exit_threshold` as a caller sees it; what it computes is tested beside the model."""

from __future__ import annotations

import pytest

from elara.decoding import Controller, Costs, SamplingConfig, generate
from elara.errors import ElaraError

MASK_ID = 10


def config(threshold, count=20, **options):
    options = {"temperature": 0.0, "mode": "ar", **options}
    return SamplingConfig(max_new_tokens=count, exit_threshold=threshold, **options)


@pytest.mark.parametrize("order", ["block", "stack"])
@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_from_all_passes_to_one(make_model, write, order, mode):
    """One-token prompts and no sliding window: nothing is read at full depth, so one pass is depth 1 exactly."""
    model = make_model(depth=3, order=order)
    prompts = [[1], [4], [7]]

    def texts(threshold, **options):
        sampling = config(threshold, mode=mode, steps=2, temperature=1.0)
        return write(model, prompts, sampling, mask_id=MASK_ID, **options)[0]

    full, shallow = texts(None), texts(None, depth=1)
    assert full != shallow
    assert texts(0.0) == full
    assert texts(1e9) == shallow


def test_prompts_are_read_at_full_depth(make_model, write):
    """So a prefix that was remembered serves with and without a threshold."""
    model = make_model(depth=3)
    texts = [write(model, [[5, 6, 7, 8, 9, 1]], config(1e9, 12), depth=depth)[0] for depth in (None, 1)]
    assert texts[0] != texts[1]


def test_a_text_goes_on_over_the_sliding_window(make_model, write):
    model = make_model(depth=2)
    texts, _ = write(model, [[1, 2, 3], [4]], config(0.5, 70))
    assert [len(text) for text in texts] == [70, 70]


def test_tidar_refuses_it_and_auto_avoids_it(make_model, write):
    model = make_model(depth=2)
    with pytest.raises(ElaraError, match=r"exit_threshold=0.5 needs mode=ar or diffusion"):
        generate(model, [[1]], config(0.5, mode="tidar"), mask_id=MASK_ID)
    controller = Controller(Costs({(1, 0, 0): 1.0, (1, 1, 4): 1.0, (4, 4, 4): 1.0, (4, 0, 0): 1.0}))
    texts, steps = write(model, [[1]], config(0.5, mode="auto"), mask_id=MASK_ID, controller=controller)
    assert len(steps) == 20
    assert texts == write(model, [[1]], config(0.5))[0]


@pytest.mark.parametrize("threshold", [-0.1, float("inf"), float("nan")])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ElaraError, match="exit_threshold="):
        config(threshold)
