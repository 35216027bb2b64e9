"""Values that turn training around are refused by name, with the range that is allowed; those at its edge are not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from elara import evaluate, sample
from elara.collect import __main__ as collect
from elara.config import ElaraConfig, ModelConfig
from elara.errors import ElaraError
from elara.ranges import RANGES, check_ranges

CONF = Path(__file__).parent.parent / "conf"

NAN, INF = math.nan, math.inf
FINITE = "give a finite one"
REFUSED = [
    ("optimizer.lr", -0.01, "at least 0"), ("optimizer.lr", NAN, FINITE), ("optimizer.adam_lr", INF, FINITE),
    ("optimizer.momentum", 2, "at least 0 and below 1"), ("optimizer.betas", [0.9, 1.0], "at least 0 and below 1"),
    ("optimizer.weight_decay", -0.1, "at least 0"), ("optimizer.eps", -INF, FINITE),
    ("schedule.warmup", -1, "a whole number of at least 0"), ("trainer.log_every_n_steps", 2.5, "a whole number"),
    ("schedule.final", 1.5, "between 0 and 1"),
    ("trainer.gradient_clip_val", -1, "at least 0"), ("trainer.log_every_n_steps", 0, "at least 1"),
    ("model.dropout", 1.0, "at least 0 and below 1"), ("model.init_std", -0.02, "at least 0"),
    ("moe.bias_update_rate", -0.1, "at least 0"), ("tidar.loss_weight", -0.5, "at least 0"),
    ("tidar.block_fraction", 1.5, "above 0 and at most 1"), ("data.val_batches", -1, "at least 1"),
    ("distill.temperature", 0, "above 0"), ("callbacks.acceptance.temperature", -1, "at least 0"),
    ("callbacks.samples.every", 0, "at least 1"), ("callbacks.mine.deep.list", [1, [{"key": NAN}]], FINITE),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), REFUSED, ids=str)
def test_a_value_out_of_range_is_refused_by_name(key, value, words):
    settings = value
    for name in reversed(key.split(".")):
        settings = {name: settings}
    with pytest.raises(ElaraError, match=rf"^{key}\S*=\S+ .*{words}"):
        check_ranges({"name": "elara", "ready": True, **settings, "seed": 1})


STOP = "+callbacks.stop={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss,min_delta:nan}"


@pytest.mark.thorough(2, "slow")
@pytest.mark.parametrize(("override", "words"), [
    ("optimizer.lr=nan", "error: optimizer.lr=nan is no number to compute with: give a finite one"),
    ("trainer.log_every_n_steps=-1", "error: trainer.log_every_n_steps=-1 must be a whole number of at least 1"),
    ("optimizer.betas=[0.9]", "error: optimizer.betas=[0.9] must be a list of 2 numbers"),
    (STOP, "error: callbacks.stop.min_delta=nan is no number"),
])  # fmt: skip
def test_training_says_so_in_one_line_and_leaves_no_trace(home, override, words):
    done = home.call(*home.tiny("name=ranges", override))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(words)
    assert not list((home.path / "outputs" / "train").glob("ranges/*"))


def test_the_edges_of_the_ranges_train(home):
    edges = ["optimizer.lr=0", "optimizer.adam_lr=0", "trainer.gradient_clip_val=0", "optimizer.betas=[0,0.95]"]
    given = home.tiny("name=edges", "callbacks=none", "trainer.max_steps=2", "trainer.val_check_interval=2", *edges)
    done = home.call(*[text for text in given if not text.startswith("callbacks.")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("main", "override"), [
    (sample.main, "temperature=nan"), (evaluate.main, "data.val_fraction=2"), (collect.main, "sampling.top_p=nan"),
    (collect.main, "data.honeycomb.rag.dropout=-1"),
])  # fmt: skip
def test_so_do_the_other_commands(in_process, tmp_path, main, override):
    code, _, err = in_process(main, tmp_path, override)
    key = override.partition("=")[0]
    assert code == 1
    assert err.startswith(f"error: {key}=") and ("finite" in err or " must be " in err)


def test_every_range_is_of_a_key_that_there_is():
    def keys(value, prefix=""):
        if not isinstance(value, dict):
            return {prefix}
        return {key for name, inner in value.items() for key in keys(inner, f"{prefix}.{name}".lstrip("."))}

    known = keys(ElaraConfig().to_dict())
    for file in [*CONF.glob("*/*.yaml"), *CONF.glob("*.yaml")]:
        group = file.parent.name if file.parent != CONF else ""
        known |= {f"{group}.{key}".lstrip(".") for key in keys(yaml.safe_load(file.read_text("utf-8")))}
    assert RANGES.keys() - known == set()


def test_the_words_are_those_of_the_interval():
    for key, low, high in [("optimizer.momentum", 0, 1), ("tidar.block_fraction", 0, 1), ("distill.weight", 0, 1)]:
        closed = RANGES[key][0] == "[", RANGES[key][-1] == "]"
        for value, inside in [(low, closed[0]), (high, closed[1]), (math.nextafter(high, 2), False), (0.5, True)]:
            if inside:
                check_ranges({key: value})
            else:
                with pytest.raises(ElaraError, match=f"{key}={value} must be "):
                    check_ranges({key: value})


def test_a_model_is_not_built_from_such_values():
    with pytest.raises(ElaraError, match=r"model\.norm_eps=nan"):
        ElaraConfig(ModelConfig(norm_eps=math.nan))
