"""Teachers' opinions: stored beside the text or asked for live, whose counts how much, and what a run makes of them."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elara.backends import Backend, TopLogprobs
from elara.backends.elara import Elara
from elara.config import TiDARConfig
from elara.data import DataConfig, Prepared, prepare
from elara.data.batches import Batch, Batches, Steps, document_windows
from elara.data.opinions import OpinionFile, StoredOpinion
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer import TokenizerConfig
from elara.tokenizer.byte import ByteTokenizer
from elara.tokenizer.char import CharTokenizer
from elara.training.config import DistillConfig
from elara.training.losses import Lesson, Opinion, elara_loss
from elara.training.module import ElaraModule, _mix
from elara.training.reading import reading_starts, stored_opinions
from elara.training.teaching import Teacher, Teaching, open_teachers

CONTEXT = 32
LONGER = ("trainer.max_steps=150", "trainer.val_check_interval=150", "trainer.log_every_n_steps=50")


@pytest.fixture(scope="session")
def taught(session_home) -> str:
    """A trained model that can teach."""
    done = session_home.call(*session_home.tiny("name=teacher", "tokenizer=byte", "model.dropout=0", *LONGER))
    assert done.returncode == 0, done.stderr
    return str(session_home.only_run("teacher"))


@pytest.fixture
def teacher(taught: str) -> Teacher:
    return Teacher("elara", 1.0, Elara(taught), ByteTokenizer())


@pytest.fixture
def prepared(session_home, tmp_path: Path) -> Prepared:
    text = tmp_path / "a.txt"
    text.write_text(session_home.text.read_text("utf-8")[:700], "utf-8")
    data = DataConfig("text", "text", str(text), val_fraction=0.3)
    return prepare(data, TokenizerConfig("byte"), tmp_path / "data")


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 80))
def test_windows_cover_a_text_and_know_what_stands_before(total: int, length: int) -> None:
    length = min(length, total)
    starts = reading_starts(total, length)
    known = 0
    for start in starts:
        assert start <= known < start + length <= total
        assert known == 0 or known - start >= length // 4
        known = start + length
    assert known == total


def test_what_is_stored_is_what_the_teacher_says(teacher: Teacher, prepared: Prepared) -> None:
    asked = DistillConfig(top_k=7, context=CONTEXT, temperature=1.5)
    file = stored_opinions(teacher, prepared, asked)
    tokens, known = prepared.train.tokens, 0
    total = len(tokens) - 1
    for start in reading_starts(total, CONTEXT - 1):
        row = torch.from_numpy(tokens[start : start + CONTEXT].astype(np.int64))[None]
        said = teacher.backend.top_logprobs(row, 7, 1.5)
        found = file.read(np.arange(known, start + CONTEXT - 1)[None])
        new = slice(known - start, CONTEXT - 1)
        assert torch.equal(found.ids[0], said.ids[0, new])
        expected = torch.cat([said.logprobs, said.rest[..., None]], -1)[0, new]
        torch.testing.assert_close(found.logprobs[0], expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(found.following[0], said.following[0, new], rtol=2e-3, atol=2e-3)
        assert torch.allclose(found.logprobs.exp().sum(-1), torch.ones(()))
        known = start + CONTEXT - 1
    assert file.about["tokens"] == known == total
    assert stored_opinions(teacher, prepared, asked).folder == file.folder
    other = stored_opinions(teacher, prepared, replace(asked, top_k=3))
    assert other.folder != file.folder


@dataclass
class Failing:
    """A real teacher that is killed behind so many calls."""

    backend: Backend
    calls: int

    def identity(self) -> dict[str, Any]:
        return self.backend.identity()

    def top_logprobs(self, ids: torch.Tensor, k: int, temperature: float = 1.0) -> TopLogprobs:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return self.backend.top_logprobs(ids, k, temperature)


def test_an_interrupted_reading_goes_on_and_ends_the_same(teacher: Teacher, prepared: Prepared) -> None:
    asked = DistillConfig(top_k=4, context=16)
    whole = stored_opinions(teacher, prepared, asked)
    files = {name: (whole.folder / name).read_bytes() for name in ("ids", "logprobs", "following")}
    shutil.rmtree(whole.folder)
    with pytest.raises(KeyboardInterrupt):
        stored_opinions(Teacher("elara", 1.0, Failing(teacher.backend, 2), ByteTokenizer()), prepared, asked)  # type: ignore[arg-type]
    assert 0 < (whole.folder / "following").stat().st_size < len(files["following"])
    with (whole.folder / "ids").open("ab") as torn:
        torn.write(b"\1\2\3")  # of a line that a kill cut off
    again = stored_opinions(teacher, prepared, asked)
    assert {name: (again.folder / name).read_bytes() for name in files} == files


def test_a_damaged_file_is_named(teacher: Teacher, prepared: Prepared) -> None:
    file = stored_opinions(teacher, prepared, DistillConfig(top_k=4, context=16))
    (file.folder / "logprobs").write_bytes(b"short")
    with pytest.raises(ElaraError, match=r"what a teacher said in .* cannot be read \(logprobs has 5 bytes"):
        OpinionFile(file.folder)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(teacher: Teacher, prepared: Prepared) -> None:
    backend = teacher.backend
    assert isinstance(backend, Elara)
    batch = Batches(prepared.train, 4, 24, seed=1)[0]
    teaching = Teaching([teacher], DistillConfig(top_k=5, opinions="live", temperature=2.0))
    model = backend._ready().model
    losses = elara_loss(model, batch.tokens, torch.Generator().manual_seed(0), 256, lesson=teaching.lesson(batch))
    assert abs(losses.teachers["elara"].item()) < 1e-5
    assert losses.teachers["elara_diffusion"].item() > 1e-3


@pytest.mark.parametrize("stored", [True, False])
def test_opinions_reach_the_tokens_they_are_about(teacher: Teacher, prepared: Prepared, stored: bool) -> None:
    asked = DistillConfig(top_k=256, context=CONTEXT, opinions="stored" if stored else "live")
    files = [stored_opinions(teacher, prepared, asked)] if stored else []
    batch = Batches(prepared.train, 4, 24, seed=1, opinions=files)[1]
    (opinion,) = Teaching([teacher], asked).lesson(batch).opinions
    rows = teacher.backend.top_logprobs(batch.tokens[:, :-1], 256)
    whole = torch.zeros(4, 24, 320).scatter(-1, rows.ids, rows.logprobs.exp())
    found = torch.zeros(4, 24, 320).scatter_add(-1, opinion.ids.clamp(min=0), opinion.logprobs[..., :-1].exp())
    found, whole = found[..., :256], whole[..., :256]
    if stored:  # which knows another text before the window
        closer = (found - whole).abs().sum(-1).mean()
        elsewhere = (found.roll(1, 1) - whole).abs().sum(-1).mean()
        assert closer < 0.5 * elsewhere
    else:
        torch.testing.assert_close(found, whole)


def test_opinions_go_with_windows_of_whole_documents_to_the_last_token(teacher: Teacher, prepared: Prepared) -> None:
    file = stored_opinions(teacher, prepared, DistillConfig(top_k=5, context=CONTEXT))
    table = document_windows(prepared.train.ends, 24)
    batches = Batches(prepared.train, 1, 24, seed=1, table=table, opinions=[file])
    for i in range(len(batches)):
        (said,) = batches[i].opinions
        assert said.ids.shape == (1, 24, 5)


def test_fewer_tokens_than_asked_for_leave_places_empty(teacher: Teacher, prepared: Prepared) -> None:
    file = stored_opinions(teacher, prepared, DistillConfig(top_k=400, context=CONTEXT))
    (said,) = Batches(prepared.train, 1, 24, seed=1, opinions=[file])[0].opinions
    there = said.ids >= 0
    assert (there.sum(-1) == 257).all()  # the plain vocabulary and the end; no mask, no role, no padding
    assert torch.allclose(said.logprobs.exp().sum(-1), torch.ones(()))


def test_where_no_teacher_has_an_opinion_the_text_is_learned_alone(teacher: Teacher, prepared: Prepared) -> None:
    batch = Batches(prepared.train, 3, 24, seed=1)[0]
    lesson = Teaching([teacher], DistillConfig(top_k=4, opinions="live", weight=0.7)).lesson(batch)
    (opinion,) = lesson.opinions
    opinion.ids[1] = -1
    opinion.logprobs[1, :, :-1], opinion.logprobs[1, :, -1] = -torch.inf, 0.0
    torch.manual_seed(0)
    backend = teacher.backend
    assert isinstance(backend, Elara)
    student = ElaraLM(replace(backend._ready().model.config, tidar=TiDARConfig()))
    rows = [
        elara_loss(student, batch.tokens[i : i + 1], torch.Generator(), 256, lesson=_only(lesson, i)) for i in range(3)
    ]
    assert rows[1].total.item() == pytest.approx(rows[1].ar.item()) and rows[1].teachers["elara"].item() < 1e-6
    for i in (0, 2):
        expected = 0.3 * rows[i].ar + 0.7 * rows[i].teachers["elara"]
        assert rows[i].total.item() == pytest.approx(expected.item(), rel=1e-5)


def _only(lesson: Lesson, row: int) -> Lesson:
    (said,) = lesson.opinions
    some = slice(row, row + 1)
    return replace(lesson, opinions=[Opinion(said.teacher, said.ids[some], said.logprobs[some], said.share[some])])


def test_several_teachers_share_by_weight_or_by_who_knows_the_text(teacher: Teacher, prepared: Prepared) -> None:
    tokens = torch.stack([torch.from_numpy(prepared.train.tokens[i : i + 25].astype(np.int64)) for i in (0, 30, 60)])
    tokens[2, 10:] = -1
    said = teacher.backend.top_logprobs(tokens.clamp(min=0), 3)
    better = said.following.clone()
    better[1] -= 1.0
    better[2, :9] += 0.1
    better[2, 9:] -= 100.0  # behind the end of the row: does not count
    stored = [
        StoredOpinion(said.ids[:, :-1], torch.cat([said.logprobs, said.rest[..., None]], -1)[:, :-1], following)
        for following in (said.following, better)
    ]
    batch = Batch(tokens, None, tuple(stored))
    pair = [Teacher("a", 3.0, teacher.backend, ByteTokenizer()), Teacher("b", 1.0, teacher.backend, ByteTokenizer())]
    by_weight = Teaching(pair, DistillConfig()).lesson(batch)
    assert [opinion.share.tolist() for opinion in by_weight.opinions] == [[0.75] * 3, [0.25] * 3]
    by_text = Teaching(pair, DistillConfig(choice="lowest_perplexity")).lesson(batch)
    assert [opinion.share.tolist() for opinion in by_text.opinions] == [[1, 1, 0], [0, 0, 1]]
    silent = stored[0]._replace(following=torch.full_like(better, torch.nan))  # knows nothing: nothing to compare
    mixed = Batch(tokens, None, (silent, stored[1]))
    lesson = Teaching(pair, DistillConfig(choice="lowest_perplexity")).lesson(mixed)
    assert [opinion.share.tolist() for opinion in lesson.opinions] == [[0, 0, 0], [1, 1, 1]]
    assert Teaching(pair, DistillConfig()).figures(drafts=True) == ["a", "b", "a_diffusion", "b_diffusion"]


@pytest.mark.slow
def test_what_the_student_writes_is_judged_by_the_teacher_alone(teacher: Teacher, prepared: Prepared) -> None:
    backend = teacher.backend
    assert isinstance(backend, Elara)
    torch.manual_seed(0)
    student = ElaraLM(backend._ready().model.config)
    tokens = Batches(prepared.train, 3, 24, seed=1)[0].tokens
    tokens[2, 9:] = -1
    teaching = Teaching([teacher], DistillConfig(top_k=320))
    batch, lesson = teaching.on_policy(student, ByteTokenizer(), Batch(tokens), seed=3)
    again, _ = teaching.on_policy(student, ByteTokenizer(), Batch(tokens), seed=3)
    other, _ = teaching.on_policy(student, ByteTokenizer(), Batch(tokens), seed=4)
    assert torch.equal(batch.tokens, again.tokens) and not torch.equal(batch.tokens, other.tokens)
    assert batch.weights is not None and student.training
    for row, prompt in ((0, 12), (1, 12), (2, 9)):
        assert torch.equal(batch.tokens[row, :prompt], tokens[row, :prompt])
        written = batch.tokens[row, prompt:]
        assert torch.equal(batch.weights[row] > 0, (torch.arange(25) >= prompt) & (batch.tokens[row] >= 0))
        ended = (written == 261).nonzero()
        assert len(ended) <= 1 and ((written < 256) | (written == 261)).all()
    losses = elara_loss(student, batch.tokens, torch.Generator(), 256, weights=batch.weights, lesson=lesson)
    logits = student.ar_head(student(batch.tokens.clamp(min=0)[:, :-1]).hidden).log_softmax(-1)
    teachers = backend._ready().model
    wanted = teachers.ar_head(teachers(batch.tokens.clamp(min=0)[:, :-1]).hidden).log_softmax(-1)
    writable, others = [*range(256), 261], [*range(256, 261), *range(262, wanted.shape[-1])]  # these as one
    wanted, logits = (
        torch.cat([x[..., writable], x[..., others].logsumexp(-1, keepdim=True)], -1).double() for x in (wanted, logits)
    )
    kl = (wanted.exp() * (wanted - logits)).sum(-1)[batch.weights[:, 1:] > 0].mean()
    assert losses.teachers["elara"].item() == pytest.approx(kl.item(), rel=1e-5)
    total = losses.teachers["elara"] + 0.5 * losses.teachers["elara_diffusion"]
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_what_the_student_writes_counts_alike_in_every_micro_batch(teacher: Teacher, prepared: Prepared) -> None:
    """One step of two micro-batches, prompts of other lengths, against their mean by hand."""
    backend = teacher.backend
    assert isinstance(backend, Elara)
    teaching = Teaching([teacher], DistillConfig(top_k=8, on_policy=1.0, diffusion=False))
    torch.manual_seed(0)
    student = ElaraLM(replace(backend._ready().model.config, tidar=TiDARConfig()))
    with torch.no_grad():
        student.embed.weight[261] *= 40  # so that some of what it writes ends early
    by_hand = copy.deepcopy(student)
    batches = [Batches(prepared.train, 2, 24, seed=1)[index] for index in range(2)]
    batches[1].tokens[:, 5:] = -1
    module = ElaraModule(
        student, ByteTokenizer(), seed=5, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        schedule=lambda step: 1.0, teaching=teaching,
    )  # fmt: skip
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Steps(batches, 2))

    written = [
        teaching.on_policy(by_hand, ByteTokenizer(), batch, _mix(5, "written", index) >> 1)
        for index, batch in enumerate(batches)
    ]
    targets = [float((batch.weights > 0).sum()) for batch, _ in written if batch.weights is not None]
    assert targets[0] != targets[1]
    for count, (batch, lesson) in zip(targets, written, strict=True):
        losses = elara_loss(by_hand, batch.tokens, torch.Generator(), 256, weights=batch.weights, lesson=lesson)
        (losses.total * count / sum(targets)).backward()
    for (name, p), trained in zip(by_hand.named_parameters(), student.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(trained, p - 0.1 * p.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"divergence": "kl"}, "distill.divergence=kl is unknown: use forward_kl, reverse_kl"),
        ({"choice": "best"}, "distill.choice=best"),
        ({"opinions": "kept"}, "distill.opinions=kept"),
        ({"weight": -0.5}, "distill.weight=-0.5 must be between 0 and 1"),
        ({"weight": 1.5}, "distill.weight=1.5"),
        ({"temperature": 0.0}, "distill.temperature=0.0"),
        ({"top_k": 0}, "distill.top_k=0"),
        ({"on_policy": 2.0}, "distill.on_policy=2.0"),
    ],
)
def test_settings_that_make_no_sense_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ElaraError) as error:
        Teaching([], DistillConfig(**changed))
    assert message in str(error.value)


@pytest.mark.slow
def test_teachers_that_do_not_fit_are_named_with_what_to_do(taught: str) -> None:
    backend = {"_target_": "elara.backends.elara.Elara", "checkpoint": taught}
    (same,) = open_teachers({"a": {"weight": 2, "backend": backend}}, ByteTokenizer())
    (other,) = open_teachers({"a": {"weight": 1, "backend": backend}}, CharTokenizer("abc"))
    assert same.weight == 2 and same.projection is None and other.projection is not None
    for tokenizer, settings_, message in (
        (ByteTokenizer(), {"weight": 0, "backend": backend}, "teachers.a.weight=0.0"),
        (
            ByteTokenizer(), {"weight": 1, "backend": {"_target_": "elara.backends.ollama.Ollama"}},
            "gives no log-probabilities of a given text: collect its text instead",
        ),
        (
            ByteTokenizer(), {"weight": 1, "backend": {**backend, "checkpoint": None}},
            "teachers.a.backend.checkpoint must be given",
        ),
    ):  # fmt: skip
        with pytest.raises(ElaraError) as error:
            open_teachers({"a": settings_}, tokenizer)
        assert message in str(error.value)
    open_teachers({"a": {"weight": 1, "backend": backend}}, ByteTokenizer(), conversations=True)
    with pytest.raises(ElaraError, match=r"cannot read conversations \(.* has not learned to chat\)"):
        open_teachers({"a": {"weight": 1, "backend": backend}}, CharTokenizer("abc"), conversations=True)


@pytest.mark.slow
@pytest.mark.parametrize("opinions", ["stored", "live", "on_policy"])
def test_a_run_learns_from_its_teacher_and_goes_on_where_it_was(home, taught: str, opinions: str) -> None:
    name = f"student_{opinions}"
    command = home.tiny(
        f"name={name}", "teacher=elara", f"teachers.elara.backend.checkpoint={taught}", "tokenizer=byte", "seed=5",
        "distill.top_k=8", "model.n_embd=16", "distill.context=32",
        *(["distill.on_policy=0.4"] if opinions == "on_policy" else [f"distill.opinions={opinions}"]),
    )  # fmt: skip
    done = home.call(*command)
    assert done.returncode == 0, done.stderr
    run = home.only_run(name)
    rows = [row for row in home.rows(run) if row["train/lr"]]
    suffixes = ["", "_diffusion", *(["_on_policy", "_diffusion_on_policy"] if opinions == "on_policy" else [])]
    for figure in ("train/loss_ar", *(f"train/loss_elara{suffix}" for suffix in suffixes)):
        values = [float(row[figure]) for row in rows if row[figure]]
        assert len(values) >= 6
        assert np.mean(values[-4:]) < 0.97 * np.mean(values[:4]), figure  # 0.005 from batch to batch
    config = json.loads((run / "summary.json").read_text())
    assert config
    (run / "summary.json").unlink()
    for path in (run / "checkpoints").glob("step-*"):
        if path.name != "step-16":
            shutil.rmtree(path)
    for link in ("last", "best"):
        (run / "checkpoints" / link).unlink()
    again = home.call(f"resume={run}")
    assert again.returncode == 0, again.stderr
    assert home.rows(run)[-1]["train/loss"] == rows[-1]["train/loss"]
    if opinions == "stored":  # and may go on with other lessons
        longer = home.call(f"resume={run}", "trainer.max_steps=28", "distill.diffusion=false")
        assert longer.returncode == 0, longer.stderr
