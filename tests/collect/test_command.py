"""`python -m elara.collect` from prompts to kept answers, with real servers."""

import hashlib
import json
import os
import signal
import time

import pytest
import torch

from elara.backends import Answer, Params
from elara.backends.transformers import Transformers
from elara.collect.prompts import Prompt
from elara.collect.store import Store, answer_sample
from elara.data.samples import read_samples
from tests.backends.conftest import save_model


def test_every_prompt_is_answered_once_with_all_that_is_known_about_it(collector, oracle):
    server = oracle()
    prompts = collector.ask(["one?", "two?", "one?", "  ", "three?"])
    sampling = ["sampling.logprobs=2", "sampling.temperature=0"]
    code, out, err = collector(prompts, collector.teachers(oracle=server), *sampling)
    assert (code, err) == (0, "")
    rows = collector.rows()
    assert sorted(row["messages"][0]["content"] for row in rows) == ["one?", "three?", "two?"]
    for row in rows:
        question, answer = row["messages"]
        about = row["provenance"]
        assert answer == {"role": "assistant", "content": f"The answer to {question['content']}"}
        assert row["source"] == "teacher"
        assert about["teacher"] == "oracle"
        assert about["identity"]["model"] == "oracle"
        assert about["finish"] == "stop"
        assert about["params"]["temperature"] == 0
        assert about["sha256"] == hashlib.sha256(answer["content"].encode()).hexdigest()
        assert "".join(text for text, _, _ in about["logprobs"]) == answer["content"]
        assert about["logprobs"][0][1:] == [-0.5, [["?", -3.0], ["?", -3.0]]]
    assert "3, 1 repeated, each to oracle" in out
    assert "oracle: 3 answered" in out
    assert "data=chat data.path=" in out
    assert collector.rows("kept.jsonl") == rows


def test_a_second_run_asks_only_what_is_new(collector, oracle):
    server = oracle()
    collector(collector.ask(["one?", "two?"]), collector.teachers(oracle=server))
    code, out, _ = collector(collector.ask(["one?", "two?", "three?"]), collector.teachers(oracle=server))
    assert code == 0
    assert server.asked == {"one?": 1, "two?": 1, "three?": 1}
    assert "1 answered, 2 were there" in out
    code, out, _ = collector(collector.ask(["one?"]), collector.teachers(oracle=server), "sampling.seed=1")
    assert server.asked["one?"] == 2, "other sampling is another answer"
    assert len(collector.rows()) == 4
    code, out, _ = collector(collector.teachers(oracle=server), "prompts.path=prompts.txt", "name=other")
    assert server.asked["one?"] == 3, "another store knows nothing of it"


def test_teachers_work_side_by_side_and_their_disagreement_is_kept(collector, oracle):
    prompts = [f"question {i}?" for i in range(8)]
    agree, differ = oracle(lambda q: f"It is {q}", 0.2), oracle(lambda q: "XYZ" if "3" in q else f"It is {q}", 0.2)
    code, out, _ = collector(
        collector.ask(prompts), collector.teachers(a=agree, b=differ, settings={"concurrency": 2})
    )
    assert code == 0
    assert any(a < d and c < b for a, b in agree.busy for c, d in differ.busy)  # both at the same time
    assert len(collector.rows()) == 16
    rows = {row["prompt"]: row for row in collector.rows("disagreement.jsonl")}
    assert len(rows) == 8
    assert sorted(row["disagreement"] for row in rows.values()) == [0] * 7 + [1]
    assert all(row["pairs"][0]["teachers"] == ["a", "b"] for row in rows.values())
    assert "a and b: 0.12 over 8 prompts" in out


@pytest.mark.slow
def test_share_asks_one_teacher_per_prompt_by_weight(collector, oracle):
    heavy, light = oracle(), oracle()
    prompts = [f"{i}?" for i in range(100)]
    code, _, _ = collector(
        collector.ask(prompts), collector.teachers({"heavy": 3}, heavy=heavy, light=light), "ask=share",
    )  # fmt: skip
    assert code == 0
    assert heavy.asked.total() + light.asked.total() == 100
    assert heavy.asked.keys().isdisjoint(light.asked)
    assert 60 <= heavy.asked.total() <= 90
    assert {row["weight"] for row in collector.rows("kept.jsonl")} == {1.0}, "the weights have had their effect"


def test_a_teacher_that_is_down_is_dropped_and_the_others_go_on(collector, oracle):
    up, down = oracle(), oracle()
    down.close()
    code, out, err = collector(collector.ask(["one?", "two?"]), collector.teachers(up=up, down=down))
    assert code == 1
    assert [row["provenance"]["teacher"] for row in collector.rows("kept.jsonl")] == ["up", "up"]
    assert "up: 2 answered" in out
    assert err.count("\n") == 2
    assert "down is dropped after 0 answers, unreachable" in err
    assert err.splitlines()[1].startswith("error: teacher down failed: unreachable")


def test_failures_of_single_prompts_are_counted_and_asked_again(collector, oracle):
    trouble = {"bad?": 500, "mute?": "", "busy?": 429, "half?": b"caf\xe9", "long?": "x" * 5000}
    server = oracle(lambda q: trouble.get(q, "fine, thank you"))
    prompts = collector.ask(["good?", *trouble, "good again?"])
    teacher = collector.teachers(oracle=server, settings={"max_characters": 1000})
    code, out, err = collector(prompts, teacher)
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("asked")]
    assert line.startswith("asked     oracle: 2 answered, 5 failed (")
    for kind in ("empty 1", "rate_limited 1", "not_text 1", "endless 1"):
        assert kind in line
    assert max(server.asked.values()) <= 2, "one retry"
    trouble.clear()
    code, out, _ = collector(prompts, teacher)
    assert "5 answered, 2 were there" in out
    assert server.asked["good?"] == 1


def test_a_teacher_that_only_fails_is_given_up_soon(collector, oracle):
    server = oracle(lambda q: 500)
    teacher = collector.teachers(oracle=server, settings={"retries": 0})
    code, _, err = collector(collector.ask([f"{i}?" for i in range(500)]), teacher, "give_up=7")
    assert code == 1
    assert server.asked.total() < 30
    assert "error: nothing was collected; oracle: " in err
    assert "7 failures in a row" in err


@pytest.mark.slow
def test_time_is_bounded(collector, oracle):
    server = oracle(delay=0.3)
    teacher = collector.teachers(oracle=server, settings={"concurrency": 1})
    code, out, _ = collector(collector.ask([f"{i}?" for i in range(200)]), teacher, "minutes=0.1")
    assert code == 0
    assert 1 <= len(collector.rows()) <= 21
    assert "not asked" in out
    assert "the same command goes on" in out


@pytest.mark.slow
def test_while_one_collects_a_second_is_refused_and_ctrl_c_saves(collector, oracle):
    server = oracle(delay=0.1)
    teacher = collector.teachers(oracle=server, settings={"concurrency": 2})
    arguments = [collector.ask([f"{i}?" for i in range(300)]), teacher]
    process = collector.start(*arguments)
    while len(server.asked) < 6 and process.poll() is None:
        time.sleep(0.01)
    code, _, refused = collector(*arguments)
    assert code == 1
    assert refused.startswith("error: another process collects in ")
    assert refused.count("\n") == 1
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    rows = collector.rows()
    assert len(rows) >= 4
    assert f"interrupted; {len(rows)} new answers are in" in err
    assert "Traceback" not in err
    assert all(count == 1 for count in server.asked.values())


@pytest.mark.slow
def test_passages_of_a_data_set_are_asked_about(collector, oracle):
    server = oracle()
    (collector.home / "bees.txt").write_text(" ".join(f"Bee {i} and the other bees fly." for i in range(200)))
    code, out, err = collector(
        collector.teachers({"oracle": 2}, oracle=server), "data=text", "data.path=bees.txt", "prompts.passage=100",
        "prompts.template='Ask a question about: {passage}'", "prompts.limit=3", "filters.duplicates=none",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "(prompts.limit)" in out
    assert len(server.asked) == 3
    assert all(question.startswith("Ask a question about: ") and "bees" in question for question in server.asked)
    assert [row["weight"] for row in collector.rows("kept.jsonl")] == [2.0] * 3
    code, _, _ = collector("teacher=[oracle]", "teachers.oracle.weight=0.5", "data=text", "data.path=bees.txt",
                           "prompts.passage=100", "prompts.template='Ask a question about: {passage}'",
                           "prompts.limit=3", "filters.duplicates=none")  # fmt: skip
    assert server.asked.total() == 3
    assert [row["weight"] for row in collector.rows("kept.jsonl")] == [0.5] * 3, "weights are those of today"
    assert [row["weight"] for row in collector.rows()] == [2.0] * 3


@pytest.mark.slow
def test_filtering_anew_asks_nobody(collector, oracle):
    server = oracle(lambda q: "As an AI, I cannot" if "x" in q else "Yes, that is so.")
    collector(collector.ask(["x?", "y?"]), collector.teachers(oracle=server))
    (rejected,) = collector.rows("rejected.jsonl")
    assert (rejected["reason"], rejected["answer"]) == ("refusal", "As an AI, I cannot")
    assert len(collector.rows()) == 2, "the store keeps what is rejected"
    folder = collector.home / "data" / "collected"
    assert [sample.row() for sample in read_samples(folder)] == collector.rows("kept.jsonl"), "what a training reads"
    code, out, _ = collector("teacher=[]", "filters.refusals=[]")
    assert code == 0
    assert len(collector.rows("kept.jsonl")) == 2
    assert server.asked.total() == 2


def test_parquet_holds_the_same_answers(collector, oracle):
    server = oracle()
    code, _, _ = collector(collector.ask(["one?", "two?"]), collector.teachers(oracle=server), "store.parquet=true")
    assert code == 0
    folder = collector.home / "data" / "collected" / "teachers"
    assert list(read_samples(folder / "answers.parquet")) == list(read_samples(folder / "answers.jsonl"))
    assert len(list(read_samples(folder))) == 2
    assert not [file for file in folder.iterdir() if file.suffix == ".draft"]


@pytest.mark.thorough(4, "slow")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts.path=prompts.txt"], "nobody is asked"),
        (["teacher=[smollm2]", "teachers.smollm2.weight=-1"], "weight=-1.0 must be a number of at least 0"),
        (["prompts.template=hello"], "must hold {passage}"),
        (["filters.language=klingon"], "klingon is not known here: use one of en, de"),
        (["filters.student=nobody", "filters.max_nats=2"], "no run of that name"),
        (["filters.max_nats=2"], "need a student"),
        (["filters.refusals=['(']"], "is no regular expression"),
        (["ask=some"], "ask=some must be one of: all, share"),
        (["name=../x"], "must be a plain name"),
        (["data.path=x"], "needs the data group"),
    ],
)
def test_mistakes_are_one_line(collector, overrides, message):
    code, out, err = collector("teacher=[]", *overrides)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "prompts come from one place"),
        (["prompts.path=missing.jsonl"], "does not exist"),
        (["prompts.path=empty.txt"], "holds nothing to ask"),
    ],
)
def test_without_prompts_nobody_is_asked(collector, oracle, overrides, message):
    (collector.home / "empty.txt").write_text("\n\n")
    code, _, err = collector(collector.teachers(oracle=oracle()), *overrides)
    assert code == 1
    assert message in err


def test_twice_the_same_model_is_a_mistake(collector, oracle):
    server = oracle()
    code, _, err = collector(collector.ask(["one?"]), collector.teachers(a=server, b=server))
    assert code == 1
    assert "it is the same model as" in err
    assert server.asked.total() == 1


def test_damage_in_the_middle_is_named(collector, oracle):
    server = oracle()
    prompts = collector.ask(["one?", "two?"])
    collector(prompts, collector.teachers(oracle=server))
    file = collector.home / "data" / "collected" / "teachers" / "answers.jsonl"
    first, second = file.read_text().splitlines()
    file.write_text(first[:50] + "\n" + second + "\n")
    code, _, err = collector(prompts, collector.teachers(oracle=server))
    assert code == 1
    assert "answers.jsonl, line 1 is damaged" in err
    assert json.loads(file.read_text().splitlines()[1])


def test_a_teacher_without_numbers_is_dropped_and_what_it_said_is_thrown_away(collector, oracle, tmp_path):
    """What it answered to earlier prompts, before its file was seen to be damaged, came of the same weights."""
    transformers = pytest.importorskip("transformers")
    folder = save_model(tmp_path / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[70] = torch.nan
        model.get_output_embeddings().weight[70] = torch.nan
    model.save_pretrained(folder)
    identity = Transformers(str(folder), device="cpu", dtype="float32").identity()
    with Store(collector.home / "data" / "collected" / "teachers") as store:
        for question in ("one", "two"):
            prompt = Prompt.of([{"role": "user", "content": question}])
            store.append(answer_sample(prompt, Answer("garbage", "stop"), "llama", identity, Params(), 1.0))
    backend = {"_target_": "elara.backends.transformers.Transformers", "model": str(folder), "dtype": "float32"}
    option = {"weight": 1.0, "backend": {**backend, "device": "cpu"}}
    named = collector.teachers(good=oracle())
    file = collector.home / "conf" / "teacher" / "llama.yaml"
    file.write_text(f"# @package teachers.llama\n{json.dumps(option)}\n")
    code, out, err = collector(named.replace("good", "good,llama"), collector.ask(["What is a bee?", "And a queen?"]))
    assert code == 1
    assert "teacher llama failed: the model computes nan or infinite numbers" in err
    assert "its answers are thrown away, 2 in the store" in out + err
    assert {row["provenance"]["teacher"] for row in collector.rows()} == {"good"}
    assert len(collector.rows("kept.jsonl")) == 2
