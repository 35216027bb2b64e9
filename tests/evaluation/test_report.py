"""What the user sees: names, table, JSON, picture."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
from matplotlib.image import imread
from rich.console import Console

from elara import checkpoint
from elara.errors import ElaraError
from elara.evaluation.config import EvalConfig
from elara.evaluation.models import data_of, find_models
from elara.evaluation.report import table, write
from elara.evaluation.run import compare, evaluate
from elara.evaluation.text import HeldOutText
from elara.tokenizer.byte import ByteTokenizer

QUICK = EvalConfig(prompts=3, prompt_tokens=4, new_tokens=6, speed_rounds=2, precisions=["bfloat16", "float32"])


@pytest.fixture(scope="module")
def results(make_loaded, text):
    models = {
        "first": make_loaded(seed=1),
        "plain": make_loaded(seed=2, block=0),
        "bytes": make_loaded(seed=3, tokenizer=ByteTokenizer()),
    }
    return compare(models, text, QUICK, reload=lambda name, precision: models[name])


def shown(results, text):
    out = io.StringIO()
    Console(width=200, file=out).print(table(results, text))
    return out.getvalue()


@pytest.mark.slow
def test_the_table_has_a_column_for_each_and_only_what_was_measured(results, text):
    out = shown(results, text)
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if "│" in line}
    header = next(line for line in out.splitlines() if "first" in line)
    places = [header.index(name) for name in ("first", "plain", "bytes")]
    assert places == sorted(places)
    bits = [float(cell.split("±")[0]) for cell in lines["bits per byte"]]
    assert bits == pytest.approx([result.loss.bits_per_byte for result in results], abs=1e-4)
    assert lines["tokens per forward, greedy"][1].strip() == "-", "a plain model has no drafts"
    assert [float(cell.split("±")[0]) for cell in lines["against first, paired"][1:]] == pytest.approx(
        [bits[1] - bits[0], bits[2] - bits[0]], abs=2e-4
    )
    assert "bfloat16 against float32, nats per token" in lines
    assert not any("float32 against float32" in what for what in lines)
    assert "tasks" not in out
    alone = shown(results[1:2], text)
    assert "paired" not in alone and "drafts" not in alone


@pytest.mark.slow
def test_json_and_picture_are_written(results, text, tmp_path):
    results[0].tasks = {"cloze": {"acc": 0.5, "acc_stderr": 0.1, "odd": math.nan}}
    files = write(results, text, {"device": "cpu"}, tmp_path / "out")
    found = json.loads(files[0].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [result["name"] for result in found["results"]] == ["first", "plain", "bytes"]
    assert found["results"][0]["loss"]["bits_per_byte"] == results[0].loss.bits_per_byte
    assert found["results"][0]["tasks"] == {"cloze": {"acc": 0.5, "acc_stderr": 0.1, "odd": None}}
    assert found["results"][1]["drafts"] is None
    assert found["device"] == "cpu" and found["text"]["bytes"] == text.bytes
    assert min(imread(files[1]).shape[:2]) > 500
    assert "cloze, acc" in shown(results, text)


def test_one_passage_has_no_standard_error(loaded, text, tmp_path):
    one = HeldOutText("short", text.passages[:1], 1)
    result = evaluate(loaded, one, EvalConfig(prompts=0, precisions=[]))
    assert result.loss is not None and math.isnan(result.loss.bits_per_byte_error)
    assert "±" not in shown([result], one)
    plain = json.loads(write([result], one, {}, tmp_path)[0].read_text())
    assert plain["results"][0]["loss"]["loss_error"] is None
    assert result.speed == [] and result.drafts is None


@pytest.fixture
def runs(tmp_path, monkeypatch, make_loaded):
    """Two runs of one name and a checkpoint outside of any."""
    monkeypatch.setattr("elara.runs.train_root", lambda: tmp_path / "train")
    loaded = make_loaded()
    for time in ("2030-01-01", "2030-01-02"):
        run = tmp_path / "train" / "mine" / time
        (run / ".hydra").mkdir(parents=True)
        (run / "config.yaml").write_text(f"data: {{name: of-{time}, source: text, path: a.txt, later_key: 1}}\n")
        (run / "summary.json").write_text('{"finished": true}')
        checkpoint.save(run / "checkpoints" / "step-7", loaded.model, loaded.tokenizer, meta={"step": 7})
    checkpoint.save(tmp_path / "moved", loaded.model, loaded.tokenizer, meta={"step": 7})
    return tmp_path


def test_checkpoints_are_named_by_run_and_step_and_never_alike(runs):
    newest = runs / "train" / "mine" / "2030-01-02" / "checkpoints" / "step-7"
    assert find_models() == {"mine/step-7": newest}
    assert find_models("mine") == {"mine/step-7": newest}
    assert find_models([str(runs / "moved")]) == {"moved": runs / "moved"}
    both = find_models([str(newest.parents[1]), str(runs / "train" / "mine" / "2030-01-01")])
    assert list(both) == ["mine/2030-01-02/step-7", "mine/2030-01-01/step-7"]
    with pytest.raises(ElaraError, match=r"checkpoint=mine is .*step-7, which was named before"):
        find_models([str(newest), "mine"])
    with pytest.raises(ElaraError, match=r"checkpoint=\[\] names nothing"):
        find_models([])
    with pytest.raises(ElaraError, match="there is no checkpoint at 'nope'"):
        find_models("nope")


def test_the_runs_own_data_is_found(runs):
    data = data_of(runs / "train" / "mine" / "2030-01-01" / "checkpoints" / "step-7")
    assert data is not None
    assert (data.name, data.source, data.path) == ("of-2030-01-01", "text", "a.txt")
    assert data_of(runs / "moved") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bytes": 0}, "eval.max_bytes=0 must be at least 1"),
        ({"passage": 3}, "eval.passage=3 must be at least 16"),
        ({"speed_rounds": -1}, "eval.speed_rounds=-1 must be at least 0"),
        ({"temperatures": [0.0, -1.0]}, r"eval.temperatures=\[0.0, -1.0\]: -1.0 must be 0 \(greedy\) or positive"),
        ({"precisions": ["int3"]}, r"eval.precisions=\['int3'\]: int3 must be one of: float32, bfloat16, int8, int4"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ElaraError, match=message):
        EvalConfig(**settings)


def test_tasks_without_lm_eval_name_the_extra(loaded, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "elara.evaluation.harness", None)
    with pytest.raises(ElaraError, match=r"pip install 'elara-hivemind\[eval\]'"):
        evaluate(loaded, text, EvalConfig(tasks=["copying"]))
    with pytest.raises(ElaraError, match="no checkpoint"):
        compare({}, text, QUICK)
