"""Made conversations: every result is true, held-out words never occur, every draw is fixed for ever."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from datetime import date
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elara.data.tool_use import FAMILIES, TOOLS, Call, conversation, conversations, parse_call, questions, run_tool
from elara.data.tool_use.arithmetic import calculate
from elara.data.tool_use.base import WORD
from elara.errors import ElaraError
from elara.evaluation.calls import SEED

COUNT = 3000
FACTORS = {  # what a unit is in meters, kilograms, cubic meters or seconds (NIST Handbook 44, appendix C)
    "meters": 1, "kilometers": 1e3, "centimeters": 1e-2, "miles": 1609.344, "feet": 0.3048, "inches": 0.0254,
    "grams": 1e-3, "kilograms": 1, "pounds": 0.45359237, "ounces": 0.028349523125,
    "liters": 1e-3, "milliliters": 1e-6, "gallons": 231 * 0.0254**3, "seconds": 1, "minutes": 60, "hours": 3600,
    "weeks": 7 * 86400,
}  # fmt: skip


@pytest.fixture(scope="module")
def training():
    return list(conversations(COUNT, 1))


@pytest.fixture(scope="module")
def held_out():
    return questions(1000, SEED)


def test_conversations_are_the_same_in_every_version_of_python():
    rows = json.dumps([sample.row() for sample in conversations(500, 7)], sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "97e9c6e03dd5972d"
    asked = json.dumps([conversation(question) for question in questions(200, 0)])
    assert hashlib.sha256(asked.encode()).hexdigest()[:16] == "47d4c1f7c7cb1ba2"


def test_a_longer_set_begins_with_the_shorter_and_another_seed_is_another():
    short, long = list(conversations(50, 3)), list(conversations(80, 3))
    assert long[:50] == short
    pairs = zip(short, conversations(50, 4), strict=True)
    assert all(a.messages != b.messages for a, b in pairs if a.provenance["family"] != "talk")


def test_every_number_date_and_name_of_held_out_questions_is_new(training, held_out):
    words = {word for sample in training for message in sample.messages for word in WORD.findall(message["content"])}
    values = {value for question in held_out for value in question.values}
    assert len(values) > 700
    assert not values & words
    assert len({value for value in values if re.fullmatch(r"\d\d", value)}) > 5, "short ones as well"


def test_half_of_the_held_out_questions_are_phrased_in_ways_that_training_has_not(training, held_out):
    for family in FAMILIES:
        own = [question for question in held_out if question.family == family]
        assert sum(question.held_out for question in own) == len(own) // 2
        seen = {question.template for question in own if not question.held_out}
        assert not seen & {question.template for question in own if question.held_out}
    texts = {message["content"] for sample in training for message in sample.messages}
    assert not texts & {question.text for question in held_out if question.family == "talk" and question.held_out}


@pytest.mark.parametrize(
    ("family", "least"), [("arithmetic", 30), ("dates", 30), ("units", 20), ("lookups", 20), ("talk", 60)]
)
def test_there_are_dozens_of_phrasings(family, least):
    assert len({question.template for question in questions(3000, 5, [family]) if not question.held_out}) >= least


def test_the_right_call_gives_the_answer_that_the_conversation_ends_with(training):
    for sample in training:
        *before, last = sample.messages
        if sample.provenance["family"] == "talk":
            assert before[-1]["role"] == "user" and parse_call(last["content"]) is None
            continue
        *_, user, asked, said = before
        assert [m["role"] for m in (user, asked, said, last)] == ["user", "assistant", "tool", "assistant"]
        call = parse_call(asked["content"])
        assert call is not None and call.name in TOOLS and call.text() == asked["content"]
        assert before[0]["role"] == "user" or call.name in before[0]["content"], "the tool is among those named"
        told = json.loads(said["content"])
        expected = str(told["result"]) if "result" in told else "I found no "
        assert expected in last["content"]


def exact(call):
    """What a call must give, computed in another way: fractions, ordinals, the calendar, physics; None = a look-up."""
    given, day = call.arguments, date.fromisoformat
    if call.name == "calculate":
        a, sign, b = given["expression"].split()
        a, b = Fraction(a), Fraction(b)
        return float({"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign])
    if call.name == "days_between":
        return day(given["end"]).toordinal() - day(given["start"]).toordinal()
    if call.name == "weekday":
        return day(given["date"]).strftime("%A")
    if call.name == "add_days":
        return date.fromordinal(day(given["date"]).toordinal() + given["days"]).isoformat()
    if call.name == "convert" and given["from"] in FACTORS:
        return given["value"] * FACTORS[given["from"]] / FACTORS[given["to"]]
    if call.name == "convert":
        return given["value"] * 1.8 + 32 if given["to"] == "fahrenheit" else (given["value"] - 32) / 1.8
    return None


def test_results_are_true(training):
    checked = set()
    for asked, said in (pair for sample in training for pair in itertools.pairwise(sample.messages)):
        if (call := parse_call(asked["content"])) is None:
            continue
        checked.add(call.name)
        right = exact(call)
        if right is not None:
            near = right if isinstance(right, str) else pytest.approx(right, abs=6e-5, rel=1e-9)
            assert json.loads(said["content"])["result"] == near, call
    assert checked == TOOLS.keys()


@pytest.mark.parametrize(
    ("quantity", "right"),
    [((10, "kilometers", "miles"), 6.2137), ((100, "celsius", "fahrenheit"), 212), ((32, "fahrenheit", "celsius"), 0),
     ((1, "weeks", "hours"), 168), ((2.5, "gallons", "milliliters"), 9463.5295), ((16, "ounces", "pounds"), 1)],
)  # fmt: skip
def test_conversions_known_from_books(quantity, right):
    value, source, target = quantity
    said = run_tool(Call("convert", {"value": value, "from": source, "to": target}), {})
    assert json.loads(said) == {"result": right}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (Call("calculate", {"expression": "1 / 0"}), "division by zero"),
        (Call("calculate", {"expression": "__import__('os')"}), "is not an expression"),
        (Call("calculate", {"expression": "2 ** 99"}), "is not an expression"),
        (Call("calculate", {"expression": "1e308 * 10"}), "is not an expression"),
        (Call("calculate", {"expression": "9" * 101}), "at most 100 characters"),
        (Call("calculate", {"sum": "1"}), "calculate needs an expression"),
        (Call("weekday", {"date": "2023-02-29"}), "2023-02-29 is no date"),
        (Call("weekday", {"date": "tomorrow"}), "date must be a date such as"),
        (Call("add_days", {"date": "2023-02-28", "days": 10**9}), "too many"),
        (Call("add_days", {"date": "2023-02-28", "days": "3"}), "days must be a whole number"),
        (Call("convert", {"value": 1, "from": "miles", "to": "grams"}), "cannot convert miles to grams"),
        (Call("convert", {"value": True, "from": "miles", "to": "feet"}), "value must be a number"),
        (Call("look_up", {"table": "phones", "key": "Nobody"}), "phones has no Nobody"),
        (Call("look_up", {"table": ["phones"], "key": "Nobody"}), "there is no table"),
        (Call("fly", {}), "there is no tool fly"),
    ],
)
def test_a_tool_says_what_is_wrong(call, error):
    assert error in json.loads(run_tool(call, {"phones": {"Somebody": 1}}))["error"]


@given(st.text(max_size=40) | st.text("0123456789+-*/(). ", max_size=40))
def test_no_expression_breaks_the_calculator(expression):
    with contextlib.suppress(ElaraError):
        assert isinstance(calculate({"expression": expression}, {}), int | float)


@pytest.mark.parametrize(
    "text",
    ["", "hello", '{"name": "calculate", "arguments": {}}', "<tool_call>{}</tool_call>", "<tool_call>[1]</tool_call>",
     '<tool_call>{"name": "calculate"}</tool_call>', '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
     '<tool_call>{"name": "calculate", "arguments": {"expression": "1}</tool_call>',
     'Sure: <tool_call>{"name": "calculate", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "a", "arguments": {}}</tool_call>'],
)  # fmt: skip
def test_what_is_no_call(text):
    assert parse_call(text) is None


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=4))
def test_calls_are_read_as_they_were_written(arguments):
    call = Call("calculate", arguments)
    assert parse_call(call.text()) == call or "</tool_call>" in str(arguments)
