"""Tool calls of a chat model: what counts as right, and what the table, JSON and picture say of it."""

from __future__ import annotations

import io
import json

import pytest
from matplotlib.image import imread
from rich.console import Console

from elara.data.tool_use import conversation, questions
from elara.errors import ElaraError
from elara.evaluation.calls import judge, measure_calls, wilson
from elara.evaluation.config import EvalConfig
from elara.evaluation.report import table, write
from elara.evaluation.run import evaluate
from elara.tokenizer.byte import ByteTokenizer

ASKED = {family: questions(2, 0, [family])[0] for family in ("arithmetic", "dates", "units", "lookups", "talk")}


@pytest.fixture(scope="module")
def chatty(make_loaded):
    loaded = make_loaded(seed=1, tokenizer=ByteTokenizer(), context=192)
    loaded.meta["chat"] = True
    return loaded


def right(question):
    messages = [message["content"] for message in conversation(question) if message["role"] == "assistant"]
    return messages[0], messages[-1]


@pytest.mark.parametrize("family", ASKED)
def test_the_right_call_and_answer_are_right(family):
    reply, answer = right(ASKED[family])
    assert judge(ASKED[family], reply, answer) == dict.fromkeys(("format", "tool", "arguments", "answer"), True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda call: call.replace("calculate", "convert"), (True, False, False)),
        (lambda call: call.replace(" * ", "*"), (True, True, True)),
        (lambda call: call.replace(" * ", " + "), (True, True, False)),
        (lambda call: call.replace("}}", "}"), (False, False, False)),
        (lambda call: call + " ", (True, True, True)),
        (lambda call: f"Well: {call}", (False, False, False)),
        (lambda call: call + call, (False, False, False)),
        (lambda call: None, (False, False, False)),
    ],
)
def test_a_call_is_judged_by_format_tool_and_arguments(change, expected):
    question = ASKED["arithmetic"]
    assert " * " in question.arguments["expression"]
    reply, answer = right(question)
    found = judge(question, change(reply), answer)
    assert (found["format"], found["tool"], found["arguments"]) == expected


def test_an_answer_needs_the_result_as_a_word_of_its_own():
    question = ASKED["lookups"]
    reply, answer = right(question)
    assert json.loads(conversation(question)[3]["content"]).keys() == {"result"}
    (record,) = (record for table in question.world.values() for key, record in table.items() if key in question.text)
    assert judge(question, reply, f"It is {record}, I think.")["answer"]
    for wrong in (f"It is 1{record}.", f"It is {record}1.", f"It is {record}.5", f"It is -{record}.", "It is.", None):
        assert not judge(question, reply, wrong)["answer"], wrong


def test_talk_is_right_without_a_call():
    reply, _ = right(ASKED["arithmetic"])
    assert not any(judge(ASKED["talk"], reply).values())
    assert judge(ASKED["talk"], "Hm.") == {"format": True, "tool": True, "arguments": True, "answer": False}
    assert not judge(ASKED["talk"], "")["format"]


@pytest.mark.slow
def test_rates_are_counted_by_family_and_phrasing_with_wilson_s_interval(chatty):
    done: list[int] = []
    found = measure_calls(chatty, 40, advance=done.append)
    assert sum(done) == 40
    counted = {(one.family, one.phrasing): one.arguments.of for one in found.rates}
    assert counted["all tools", "all"] == 32
    assert all(counted[family, "all"] == 8 and counted[family, "held out"] == 4 for family in ASKED)
    assert found.rates[0].arguments == wilson([False] * 32), "an untrained model knows nothing"
    assert len(found.mistakes) == 20 and "<tool_call>" in found.mistakes[0].right


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
     (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_intervals_are_wilson_s(right, of, low, high):
    found = wilson([True] * right + [False] * (of - right))
    assert (found.right, found.of, found.share) == (right, of, right / of)
    assert [found.low, found.high] == pytest.approx([low, high], abs=6e-5)
    assert 0 <= found.low <= found.share <= found.high <= 1, "error bars have no negative length"


def test_table_json_and_picture_show_them(chatty, loaded, text, tmp_path):
    wanted = EvalConfig(prompts=0, precisions=[], tool_calls=10)
    other = evaluate(loaded, text, EvalConfig(prompts=0, precisions=[]))
    results = [evaluate(chatty, text, wanted, name="chatty"), other]
    out = io.StringIO()
    Console(width=200, file=out).print(table(results, text))
    lines = ("tool calls, format", "tool calls, arguments", "0.0% (0%-32% of 8)", "talk, no call, phrasings held out")
    assert all(words in out.getvalue() for words in lines)
    files = write(results, text, {}, tmp_path)
    first, second = json.loads(files[0].read_text())["results"]
    assert second["tool_calls"] is None
    assert first["tool_calls"]["rates"][0]["arguments"]["of"] == 8
    assert min(imread(files[1]).shape[:2]) > 400


def test_a_model_that_does_not_chat_is_refused_in_one_line(loaded, text):
    with pytest.raises(ElaraError, match="model was not trained on conversations; train one") as error:
        evaluate(loaded, text, EvalConfig(prompts=0, precisions=[], tool_calls=10))
    assert "\n" not in str(error.value)
    with pytest.raises(ElaraError, match="tool_calls=-1 must be at least 0"):
        EvalConfig(tool_calls=-1)
