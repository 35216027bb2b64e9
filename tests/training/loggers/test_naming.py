"""What runs are called where many are shown side by side."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.overrides import key_of
from elara.training.loggers import naming


def run_folder(path: Path, *overrides: str) -> Path:
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)), "utf-8")
    return path


def sweep_folder(path: Path, *overrides: str) -> Path:
    path.mkdir(parents=True)
    record = {"hydra": {"overrides": {"task": [*overrides], "hydra": []}}}
    (path / "multirun.yaml").write_text(yaml.safe_dump(record), "utf-8")
    return path


def test_a_run_of_its_own_is_named_by_its_overrides_but_those_about_places_and_logging(tmp_path: Path) -> None:
    folder = run_folder(
        tmp_path / "elara" / "2026-01-01",
        *("name=bees", "moe=none", "optimizer.lr=0.010000", "+optimizer.eps=1e-8", "seed=3", "data.path=bees.txt"),
        *("trainer=ddp", "trainer.max_steps=9", "logger=wandb", "logger.wandb.mode=offline", "~callbacks.plots"),
        *("hydra.run.dir='/tmp/x'", "resume=auto", "init_from=/somewhere/else"),
    )
    overrides = naming.telling(folder)
    assert naming.shown_name("bees", overrides) == "bees moe=none lr=0.01 eps=1e-08 seed=3"
    assert naming.tags(overrides) == ["moe=none", "optimizer.lr=0.01", "optimizer.eps=1e-08", "seed=3"]
    assert (naming.kind(folder), naming.group(folder)) == ("train", None)


def test_a_job_of_a_sweep_is_named_by_what_differs_and_grouped_with_the_others(tmp_path: Path) -> None:
    whole = sweep_folder(tmp_path / "toggles" / "t0", "moe=none,deepseek", "trainer.max_steps=choice(5,6)", "seed=1")
    folder = run_folder(whole / "1", "moe=deepseek", "trainer.max_steps=6", "seed=1")
    overrides = naming.telling(folder)
    assert naming.shown_name("toggles", overrides) == "toggles moe=deepseek max_steps=6"
    assert (naming.kind(folder), naming.group(folder)) == ("sweep", "toggles/t0")


def test_a_trial_of_a_search_is_grouped_by_its_study(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "searches" / "rates" / "7", "optimizer.lr=0.0123456", "name=rates")
    (folder.parent / "journal.log").touch()
    assert naming.shown_name("rates", naming.telling(folder)) == "rates lr=0.01235"
    assert (naming.kind(folder), naming.group(folder)) == ("search", "rates")


def test_keys_that_end_alike_are_written_out() -> None:
    assert naming.shown_name("x", ["a.size=1", "b.size=2", "c.depth=3"]) == "x a.size=1 b.size=2 depth=3"


@given(
    overrides=st.lists(st.tuples(st.from_regex(r"[a-z]{1,30}(\.[a-z]{1,30}){0,3}", fullmatch=True), st.text("ab1 ,/")))
)
@settings(max_examples=25, deadline=None)
def test_names_and_tags_keep_to_the_limits_of_wandb(overrides: list[tuple[str, str]]) -> None:
    texts = [f"{key}='{value}'" for key, value in overrides]
    assert len(naming.shown_name("elara", texts)) <= 128
    assert all(1 <= len(tag) <= 64 for tag in naming.tags(texts))
    assert all(tag.startswith(key_of(text)[:63]) for tag, text in zip(naming.tags(texts), texts, strict=True))
