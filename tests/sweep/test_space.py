"""The section `space`, sampled values as overrides, and overrides as text."""

from __future__ import annotations

import math
import shlex

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from elara.errors import ElaraError
from elara.sweep.overrides import merged, train_command, value_text
from elara.sweep.space import read_space

RATE = {"type": "float", "low": 1e-3, "high": 0.1, "log": True}

WRONG = [
    ({}, "space is empty"),
    ({"a": 3}, "space.a=3 must be a mapping"),
    ({"a": {"b": {"low": 1, "high": 2}}}, "space.a.b has low but no type: give one of float, int, choice"),
    ({"a": {**RATE, "type": "flaot"}}, "space.a.type=flaot must be one of: float, int, choice"),
    ({"a": {**RATE, "hihg": 3}}, "unknown key 'space.a.hihg' (did you mean 'space.a.high'?)"),
    ({"a": {**RATE, "choices": [1, 2]}}, "unknown key 'space.a.choices'"),
    ({"a": {"b": {**RATE, "low": 0.1}}}, "space.a.b: low=0.1 must be below high=0.1"),
    ({"a": {**RATE, "low": 2}}, "space.a: low=2 must be below high=0.1"),
    ({"a": {**RATE, "low": 0}}, "space.a: log=true needs a positive low, not low=0"),
    ({"a": {**RATE, "low": -1.5}}, "not low=-1.5"),
    ({"a": {**RATE, "log": "yes"}}, "space.a.log=yes must be true or false"),
    ({"a": {"type": "float", "low": 1}}, "space.a.high has no value"),
    ({"a": {"type": "float", "low": "x", "high": 1}}, "space.a.low=x must be a number"),
    ({"a": {"type": "int", "low": 1, "high": 2.5}}, "space.a.high=2.5 must be a whole number"),
    ({"a": {"type": "int", "low": 0, "high": 10, "step": 3}}, "steps of 3 from low=0 miss high=10"),
    ({"a": {"type": "int", "low": 0, "high": 10, "step": 0}}, "step=0 must be positive"),
    ({"a": {**RATE, "step": 0.01}}, "step=0.01 does not go with log=true"),
    ({"a": {"type": "choice", "choices": ["x"]}}, "needs at least two different values"),
    ({"a": {"type": "choice", "choices": ["x", "x"]}}, "needs at least two different values"),
    ({"a": {"type": "choice", "choices": "xy"}}, "space.a.choices=xy must be a list"),
    ({"a.b": RATE, "a": {"b": RATE}}, "space.a.b is given twice"),
]


@pytest.mark.parametrize(("section", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_space_that_cannot_be_meant_is_refused_by_its_key(section, message):
    with pytest.raises(ElaraError) as error:
        read_space(section)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_may_be_nested_or_dotted():
    section = {"optimizer": {"lr": RATE}, "moe": {"type": "choice", "choices": ["none", "deepseek"]}, "moe.top_k": RATE}
    assert [parameter.key for parameter in read_space(section)] == ["optimizer.lr", "moe", "moe.top_k"]


def sample(section: dict, values: dict | None = None) -> list[str]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    if values:
        study.enqueue_trial(values)
    trial = study.ask()
    return [parameter.sample(trial) for parameter in read_space(section)]


def test_sampled_values_are_texts_that_hydra_reads():
    (text,) = sample({"a": RATE})
    assert 1e-3 <= float(text) <= 0.1
    assert len(text.replace("0.", "").lstrip("0")) <= 4
    assert sample({"a": RATE}, {"a": 0.0123456789}) == ["0.01235"]
    assert sample({"a": {"type": "float", "low": 0, "high": 1, "step": 0.1}}, {"a": 0.30000000000000004}) == ["0.3"]
    assert sample({"a": {"type": "int", "low": 0, "high": 8, "step": 4}}, {"a": 8}) == ["8"]
    choices = ["none", None, True, 3, [0.9, 0.95], "two words"]
    texts = ["none", "null", "true", "3", "[0.9,0.95]", "'two words'"]
    for choice in texts:
        assert sample({"a": {"type": "choice", "choices": choices}}, {"a": choice}) == [choice]
    parser = OverridesParser.create()
    assert [parser.parse_override(f"a={text}").value() for text in texts] == choices


def test_rounding_does_not_leave_the_range():
    tight = {"type": "float", "low": 0.00123456, "high": 0.00123459}
    assert math.isclose(float(sample({"a": tight})[0]), 0.001234575, rel_tol=2e-5)
    assert 0.00123456 <= float(sample({"a": tight})[0]) <= 0.00123459


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"k[a-z0-9_]{0,5}", fullmatch=True), inner)
    ),
    max_leaves=6,
)


@given(VALUES)
def test_hydra_reads_back_any_value(value):
    assert OverridesParser.create().parse_override(f"key={value_text(value)}").value() == value


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_the_shell_reads_back_the_command(overrides):
    assert shlex.split(train_command(overrides)) == ["python", "-m", "elara.train", *overrides]


def test_later_overrides_win():
    assert merged(["a=1", "b=2"], ["+a=3", "c=4"], ["~b"]) == ["+a=3", "~b", "c=4"]
