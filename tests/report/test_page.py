"""The page of a run or sweep: whole, readable without a network, and nothing that a model wrote is taken for HTML."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest

from elara.errors import ElaraError
from elara.report import __main__ as command
from elara.report import write
from elara.report.comparison import compare
from elara.report.figures import panels
from elara.report.metrics import read_metrics
from elara.report.write import find_folder, write_report
from elara.runs import Run
from tests.report.conftest import write_job

VOID = {"meta", "img", "br", "link", "input", "hr"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</pre></div><script>document.title='taken'</script><img src=x onerror=alert(1)> & \"quoted\""


class Page(HTMLParser):
    """A page's elements, checked for being closed in order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # tag and text directly in it
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def inside(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(text for tag, text in self.texts if tag not in ("style", "script"))


def check_alone(page: Page) -> None:
    """Nothing is fetched, ids are unique, every reference inside the page has its target."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "foreignobject")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in attributes and not (tag == "a" and "/" in attributes[name]):
                assert attributes[name].startswith(("data:image/png;base64,", "#"))
            if attributes.get(name, "").startswith("#"):
                assert attributes[name][1:] in ids
        for address in re.findall(r"url\(([^)]*)\)", " ".join(attributes.values())):
            assert address.strip("#'\"") in ids
    (style,) = page.inside("style")
    assert "url(" not in style and "@import" not in style
    assert len(page.all("script")) == 1
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "sha256-" in policy


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    """A run that a test may change."""
    folder = tmp_path / "bees" / "2030-01-01_00-00-00"
    shutil.copytree(run.path, folder)
    return Run(folder)


@pytest.fixture(scope="module")
def run_page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    (file,) = write_report(run.path, tmp_path_factory.mktemp("page") / "run.html")
    return Page(file)


@pytest.fixture(scope="module")
def sweep_page(sweep: Path) -> Page:
    (file,) = write_report(sweep)
    assert file == sweep / "report.html"
    return Page(file)


@pytest.mark.slow
def test_pages_need_no_network(run_page: Page, sweep_page: Page) -> None:
    check_alone(run_page)
    check_alone(sweep_page)


def test_a_run_has_all_its_parts(run_page: Page, run: Run) -> None:
    headings = ["Loss", "Experts", "Drafts", "Training", "Samples", "Configuration", "Code and machine"]
    assert run_page.inside("h2") == headings
    summary = run.read_summary()
    assert f"{summary['metrics']['val/loss_ar']:.4f}" in run_page.inside("b") and "steps of 6" in run_page.text
    assert "finished" in run_page.text and summary["commit"] in run_page.text
    assert (
        summary["hardware"]["processor"] in run_page.text and f"torch {summary['versions']['torch']}" in run_page.text
    )
    drawn = panels(read_metrics(run.metrics))
    assert len(run_page.all("svg")) == sum(len(found) for found in drawn.values())
    assert len(run_page.all("image")) >= 2  # the heat maps of both recursion passes
    words = " ".join(run_page.inside("text"))
    for title in ("Next token", "Load of each expert", "MaxVio", "Accepted up to position", "Tokens per forward pass"):
        assert title in words


def test_pictures_follow_light_and_dark(run_page: Page) -> None:
    assert "prefers-color-scheme: dark" in run_page.inside("style")[0]
    drawings = re.findall(r"<svg.*?</svg>", run_page.source, re.DOTALL)
    assert not any("#000000" in drawing or "#ffffff" in drawing or "DejaVu" in drawing for drawing in drawings)


def test_what_was_given_is_marked_in_the_configuration(run_page: Page) -> None:
    marked = re.findall(r"<mark>(.*?)</mark>", run_page.source)
    plain = [re.sub(r"<.*?>", "", line) for line in marked]
    assert "max_steps: 6" in plain and "n_embd: 32" in plain and "name: bees" in plain
    assert "data:" in plain  # data=text chose the whole group
    assert not any(line.startswith(("seed:", "lr:", "optimizer:")) for line in plain)
    assert "seed: 1" in re.sub(r"<.*?>", "", run_page.source)


def test_samples_are_shown_as_text_newest_first(copy: Run) -> None:
    copy.samples.write_text(f"==== step 3 ====\nold\n\n==== step 6 ====\n[a <i>]{NASTY}\n----\nsecond\n\n", "utf-8")
    page = Page(write_report(copy.path)[0])
    check_alone(page)
    assert NASTY in page.text and "a <i>" in page.inside("span")
    assert page.inside("summary")[:2] == ["after step 6", "after step 3"]
    assert [text for tag, text in page.texts if tag == "div"][-2:] == ["second", "old"]
    assert [("open" in attributes) for attributes in page.all("details")][:2] == [True, False]


def test_nothing_from_outside_is_taken_for_html(copy: Run, tmp_path: Path) -> None:
    overrides = [f"data.path='{NASTY}'", "moe=none"]
    write_job(copy, overrides, 1, NASTY, f"line\n{NASTY}\n")
    summary = copy.read_summary() | {"finished": False, "commit": NASTY}
    copy.summary.write_text(json.dumps(summary), "utf-8")
    copy.config.write_text(json.dumps({NASTY: NASTY, "trainer": {"max_steps": NASTY}}), "utf-8")
    shutil.copytree(copy.path, tmp_path / "sweep" / "0")
    for folder in (copy.path, tmp_path / "sweep"):
        page = Page(write_report(folder)[0])
        check_alone(page)
        assert NASTY in page.inside("pre")[0] and page.text.count(NASTY) >= 5 and not page.all("img")


@pytest.mark.slow
def test_a_run_that_still_trains(copy: Run) -> None:
    summary = copy.read_summary() | {"finished": False, "steps": 0, "metrics": {}}
    copy.summary.write_text(json.dumps(summary), "utf-8")
    lines = copy.metrics.read_text("utf-8").splitlines(keepends=True)
    copy.metrics.write_text("".join(lines[:4]) + lines[4][:30], "utf-8")  # its fourth row is being written
    page = Page(write_report(copy.path)[0])
    check_alone(page)
    assert "not finished, at step 3 of 6" in page.text and "Still training" in page.text
    assert len(page.all("svg")) >= 6 and "best at step 3" in page.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_steps: 5}\n", "utf-8")
    page = Page(write_report(tmp_path)[0])
    assert "it has no figures yet" in page.text and "Configuration" in page.inside("h2")


def test_a_run_that_broke_shows_its_traceback(copy: Run) -> None:
    copy.summary.unlink()
    (copy.path / "error.log").write_text("Traceback\nValueError: <broke>\n", "utf-8")
    page = Page(write_report(copy.path)[0])
    assert "Ended with an error." in page.text and "ValueError: <broke>" in page.inside("pre")[0]


@pytest.mark.slow
def test_a_sweep_lists_every_job_best_first(sweep_page: Page, sweep: Path) -> None:
    comparison = compare(sweep)
    assert [text for text in sweep_page.inside("a") if text.isdigit()] == [job.name for job in comparison.ranked]
    head = [text for text in sweep_page.inside("button") if text in ("job", "moe", "seed", "best loss", "wall time")]
    assert head == ["moe", "best loss", "job", "moe", "seed", "best loss", "wall time"]  # over seeds, every job
    raw = [
        float(a["data-value"])
        for a in sweep_page.all("td")
        if a.get("data-value") == f"{comparison.ranked[0].best_loss:.9g}"
    ]
    assert raw, "cells are sorted by figures in full"
    assert "6 jobs: 4 finished, 1 failed, 1 missing" in sweep_page.text
    best = comparison.groups[0].loss
    assert best is not None and f"{best.mean:.4f} ± {best.deviation:.4f}" in sweep_page.inside("b")
    assert f"{best.mean:.3f} ± {best.deviation:.3f}" in sweep_page.inside("text")


@pytest.mark.slow
def test_a_sweep_shows_failures_and_every_run(sweep_page: Page) -> None:
    assert any("there is no moe=other" in text for text in sweep_page.inside("pre"))
    assert "This job never began." in sweep_page.text
    parts = [attributes["id"] for attributes in sweep_page.all("details") if "id" in attributes]
    assert sorted(parts) == [f"run-{n}" for n in range(6)]
    assert sweep_page.inside("h3").count("Experts") == 2 and sweep_page.inside("h3").count("Samples") == 4


def test_runs_of_a_large_sweep_get_their_own_pages(
    made_up: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "LARGEST", 10_000)
    folder = made_up([(["moe=a"], 1.0), (["moe=b"], 2.0), (["moe=c"], math.nan)], "toggles")
    index, *pages = write_report(folder, tmp_path / "all.html")
    assert pages == [folder / str(n) / "report.html" for n in range(3)]
    page = Page(index)
    check_alone(page)
    links = {a["href"] for a in page.all("a") if not a["href"].startswith("#")}
    assert {(tmp_path / link).resolve() for link in links} == {path.resolve() for path in pages}
    assert "cannot | go on at all" in page.text and len(page.all("svg")) == 2
    assert "toggles/up, job 0" in Page(pages[0]).inside("h1")


def test_a_sweep_in_which_nothing_finished(made_up: Callable[..., Path]) -> None:
    folder = made_up([(["moe=a"], math.nan), (["moe=b"], math.nan)])
    page = Page(write_report(folder)[0])
    check_alone(page)
    assert "2 jobs: 2 failed" in page.text and not page.all("svg")


def test_what_a_search_found_is_taken_along(made_up: Callable[..., Path], run: Run) -> None:
    folder = made_up([(["moe=a"], 1.0), (["moe=b"], 2.0)])
    for name in ("importance.png", "summary.png"):
        shutil.copy(run.plots / "loss.png", folder / name)
    (folder / "best.txt").write_text("# val/loss_ar 1\npython -m elara.train moe=<a>\n", "utf-8")
    page = Page(write_report(folder)[0])
    check_alone(page)
    assert [a["alt"] for a in page.all("img")] == ["importance"]
    assert "python -m elara.train moe=<a>" in page.inside("pre")[0]


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(in_process, home: Path) -> Call:
    """`elara.report` with some arguments; returns exit code, stdout, stderr."""
    return partial(in_process, command.main, home)


@pytest.mark.slow
def test_the_command_finds_runs_and_sweeps_by_folder_and_name(call: Call, run: Run, sweep: Path, home: Path) -> None:
    job = f"outputs/sweeps/toggles/{sweep.name}/0"
    for arguments, folder in (((), run.path), (("bees",), run.path), (("toggles",), sweep), ((job,), home / job)):
        file = folder / "report.html"
        file.unlink(missing_ok=True)
        code, out, err = call(*arguments)
        assert code == 0 and "report.html (" in out and file.exists()
        assert err == f"reading {folder.relative_to(home)}\n"


@pytest.mark.slow
def test_a_folder_called_like_a_run_does_not_hide_it(call: Call, run: Run, home: Path) -> None:
    (home / "bees").mkdir(exist_ok=True)
    assert call("bees")[0] == 0


def test_bad_input_is_one_line(call: Call, home: Path) -> None:
    (home / "empty").mkdir(exist_ok=True)
    for arguments, words in (
        (("nothing",), "no run, sweep or search of that name"),
        (("empty",), "is neither a run folder nor a sweep folder"), (("../..",), "is neither"),
        (("bees", "--output", "no/such/folder.html"), "cannot write no/such/folder.html"),
        (("--outptu", "x"), "--help"), (("bees", "moe=none"), "unrecognized arguments: moe=none"),
    ):  # fmt: skip
        code, out, err = call(*arguments)
        err = re.sub(r"^reading .*\n", "", err)
        assert code == 1 and out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_no_run_at_all_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELARA_HOME", str(tmp_path))
    with pytest.raises(ElaraError, match="train one with"):
        find_folder()


def rendered(file: Path, profile: Path, fragment: str = "") -> tuple[Page, list[str]]:
    """A page as Chromium has it after its script ran, and what the console said."""
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
               "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
               "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000"]  # fmt: skip
    address = f"{file.resolve().as_uri()}{fragment}"
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    )
    dump = profile / "dump.html"
    dump.write_text(done.stdout, "utf-8")
    return Page(dump), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_opens_the_page_without_a_complaint(sweep: Path, run: Run, copy: Run, tmp_path: Path) -> None:
    (file,) = write_report(sweep, tmp_path / "sweep.html")
    page, said = rendered(file, tmp_path / "profile", "#run-4")
    assert said == []  # no error, and nothing that the policy had to refuse
    opened = [attributes.get("id") for attributes in page.all("details") if "open" in attributes]
    assert "run-4" in opened and "run-0" not in opened  # so the page's own script runs under its policy
    (file,) = write_report(run.path, tmp_path / "run.html")
    assert rendered(file, tmp_path / "profile")[1] == []

    tampered = tmp_path / "tampered.html"  # the same checks do see what they look for
    injected = "<script>document.title = 'taken'</script><img src='https://example.org/x.png'></main>"
    tampered.write_text(file.read_text("utf-8").replace("</main>", injected), "utf-8")
    page, said = rendered(tampered, tmp_path / "profile")
    assert len(said) == 2 and all("Content Security Policy" in line for line in said)
    assert "taken" not in page.inside("title")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_tables_sort_by_a_click(sweep: Path, tmp_path: Path) -> None:
    (file,) = write_report(sweep, tmp_path / "sweep.html")
    source = re.sub(r"<meta http-equiv[^>]*>", "", file.read_text("utf-8"))

    def jobs(column: str, clicks: int) -> list[str]:
        """The jobs in their order after clicks on a column's head."""
        script = (
            "const table = [...document.querySelectorAll('table.sortable')].at(-1);"
            f"const head = [...table.querySelectorAll('button')].find((one) => one.textContent === '{column}');"
            f"{'head.click();' * clicks}"
        )
        clicked = tmp_path / "clicked.html"
        clicked.write_text(source.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        page, said = rendered(clicked, tmp_path / "profile")
        assert said == []
        return [text for text in page.inside("a") if text.isdigit()]

    comparison = compare(sweep)
    assert jobs("job", 1) == ["0", "1", "2", "3", "4", "5"]
    ranked = [job.name for job in comparison.ranked]
    assert jobs("best loss", 1) == ranked
    assert jobs("best loss", 2) == [*reversed(ranked[:4]), *ranked[4:]]  # jobs without a figure stay behind
