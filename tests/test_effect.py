"""What a user gives and nothing would read is refused in one line, by every command; what groups bring is no error."""

from __future__ import annotations

import pytest

from elara import evaluate, sample, verify
from elara.collect import __main__ as collect
from elara.data import __main__ as prepare
from elara.export import __main__ as export

PATH = "data.path=my.txt"


def refused(err: str, override: str, words: str) -> None:
    assert err.startswith(f"error: {override} needs ") and err.count("\n") == 1
    assert words in err and err.endswith("; without that it has no effect\n")


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize(("overrides", "words"), [
    ([PATH], "give data=text as well"),
    (["experiment=chat_quick", PATH], "give data=text as well"),
    (["data=chat", "data.url=x.whl"], "give data=shakespeare as well"),
    (["data.replay.path=my.txt"], "data.replay.share"),
    (["data.replay.share=0.5", "data.replay.path=my.txt"], "give data.replay.source=text"),
    (["tokenizer.path=folder"], "tokenizer=huggingface or tokenizer=saved"),
    (["distill.weight=0.9"], "teacher=[smollm2]"),
    (["moe=none", "moe.top_k=1"], "moe=deepseek"),
    (["tidar=none", "tidar.chain=true"], "tidar=full_mask"),
    (["trm=none", "trm.order=stack"], "trm.depth=2"),
])  # fmt: skip
def test_training_refuses_it_and_leaves_no_trace(home, overrides, words):
    done = home.call("name=idle", *overrides)
    assert (done.returncode, done.stdout) == (1, "")
    refused(done.stderr, overrides[-1], words)
    assert not list((home.path / "outputs" / "train").glob("idle/*"))


@pytest.mark.thorough(3, "slow")
@pytest.mark.parametrize(("main", "overrides", "words"), [
    (prepare.main, [PATH], "give data=text as well"),
    (evaluate.main, [PATH], "the data group it belongs to"),
    (evaluate.main, ["data=shakespeare", PATH], "give data=text as well"),
    (evaluate.main, ["eval.fewshot=3"], "eval.tasks"),
    (collect.main, [PATH], "the data group it belongs to"),
    (verify.main, ["moe=none", "moe.top_k=1"], "moe=deepseek"),
    (sample.main, ["mode=ar", "steps=3"], "mode=diffusion"),
    (sample.main, ["draft_length=3"], "mode=tidar"),
    (export.main, ["format.num_ctx=64"], "format=ollama"),
])  # fmt: skip
def test_so_do_the_other_commands(in_process, tmp_path, main, overrides, words):
    code, out, err = in_process(main, tmp_path, *overrides)
    assert (code, out) == (1, "")
    refused(err, overrides[-1], words)


def quick(home, *overrides):
    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2", "+trainer.limit_val_batches=0"]
    tiny = [text for text in home.tiny("callbacks=none", *overrides) if not text.startswith("callbacks.")]
    return [*tiny, *steps]


def test_what_asks_for_nothing_else_is_no_error(home):
    """Values that the options have anyway, null, and what experiments and groups bring."""
    groups = ["moe=none", "tidar=none", "trm=none"]
    idle = ["moe.top_k=2", "tidar.tie_head=false", "tokenizer.path=null", "trm.order=block"]
    done = home.call(*quick(home, "name=harmless", *groups, *idle))
    assert done.returncode == 0, done.stderr
    assert "note: " not in done.stdout


@pytest.mark.slow
def test_a_run_that_goes_on_brings_what_it_has(home):
    """It was begun when that was no error; what is given now is."""
    fast = [text for text in home.tiny("name=older") if not text.startswith("callbacks.")]
    fast += [f"~callbacks.{name}" for name in ("samples", "acceptance", "monitoring")]
    assert home.call(*fast, "trainer.max_steps=2", "trainer.val_check_interval=2").returncode == 0
    run = home.only_run("older")
    saved = run / ".hydra" / "overrides.yaml"
    saved.write_text(saved.read_text() + "- distill.weight=0.9\n")
    done = home.call(f"resume={run}", "trainer.max_steps=3")
    assert done.returncode == 0, done.stderr
    assert "note: distill.weight=0.9 needs a teacher" in done.stdout
    done = home.call(f"resume={run}", "trainer.max_steps=4", "distill.top_k=8")
    assert done.returncode == 1
    refused(done.stderr, "distill.top_k=8", "teacher=[smollm2]")


@pytest.mark.slow
def test_a_sweep_refuses_what_no_job_reads(home):
    done = home.run("-m", "name=idle-sweep", "seed=1,2", PATH)
    assert done.returncode == 1
    refused(done.stderr, PATH, "give data=text as well")
    done = home.run("-m", "name=idle-sweep", "moe=none", "moe.top_k=1,2")
    refused(done.stderr, "moe.top_k=1,2", "moe=deepseek")
    assert not list((home.path / "outputs" / "sweeps").glob("idle-sweep/*"))


@pytest.mark.slow
def test_a_sweep_over_what_decides_it_makes_a_note(home):
    done = home.run("-m", *quick(home, "name=noted", "moe=none,deepseek", "moe.top_k=1,2"))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["moe.top_k=1"]  # a top_k of 2 is that of moe=none anyway
    assert all("needs experts" in note for note in notes)
