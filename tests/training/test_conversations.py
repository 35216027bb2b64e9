"""Foreign teachers of conversations: read in their own chat template, against transformers' own logits of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elara import checkpoint
from elara.backends import Answer, BackendError, Params
from elara.backends.elara import Elara
from elara.backends.smollm2 import SmolLM2
from elara.backends.transformers import Transformers
from elara.config import ElaraConfig, ModelConfig
from elara.data import DataConfig, Prepared, prepare
from elara.data.batches import PADDING
from elara.data.config import ReplayConfig
from elara.data.module import ElaraData
from elara.errors import ElaraError
from elara.model import ElaraLM
from elara.tokenizer import Tokenizer, TokenizerConfig
from elara.tokenizer.byte import ByteTokenizer
from elara.training.config import DistillConfig
from elara.training.projection import Projection
from elara.training.reading import Window, reading_windows, stored_opinions, together
from elara.training.teaching import Teacher, open_teachers
from tests.backends.conftest import save_model

transformers: Any = pytest.importorskip("transformers")

K = 6
CHAT = [
    {"role": "system", "content": "Be a bee."},
    {"role": "user", "content": "Where is honey?"},
    {"role": "assistant", "content": "In the flower, naïve bee"},
    {"role": "user", "content": "12?"},
    {"role": "assistant", "content": "3"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=256)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Transformers:
    return Transformers(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def student(backend: Transformers) -> Tokenizer:
    return backend.tokenizer()


def reference(folder: Path, text: str) -> torch.Tensor:
    """(vocab) of transformers' own model behind a text in which special tokens are written out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].log_softmax(-1)


def written(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in messages)


def test_a_frame_and_the_messages_are_what_the_template_writes(folder: Path, backend: Transformers) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    around = backend.frame([message["role"] for message in CHAT])
    ids = list(around[0])
    for message, behind in zip(CHAT, around[1:], strict=True):
        ids += backend.tokenizer().encode(message["content"]) + behind
    assert ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    with pytest.raises(BackendError, match="no tools here") as error:
        backend.frame(("user", "tool"))
    assert error.value.kind == "unfit"


@pytest.mark.parametrize(
    ("template", "kind", "message"),
    [
        (None, "refused", "no chat template"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "unfit", "does not write user, user"),
        ("{{ messages[-1]['content'] }}", "unfit", "does not write user, user"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages[-1]['content'] }}",
            "unfit",
            "does not write user, user",
        ),
    ],
)
def test_a_template_that_is_none_or_no_sequence_of_messages_is_refused(
    tmp_path: Path, template: str | None, kind: str, message: str
) -> None:
    save_model(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = template
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackendError, match=message) as error:
        Transformers(str(tmp_path)).frame(("user", "user"))
    assert error.value.kind == kind


def test_the_words_of_a_conversation_are_learned_as_the_template_has_them(
    folder: Path, backend: Transformers, student: Tokenizer
) -> None:
    """Of a student with the same words: every next token behind a role or a word, and the end behind the last one."""
    ids, _ = student.apply_chat(CHAT)
    found = Projection(backend, student, student).opinion(torch.tensor([ids, [*ids[:-9], *[PADDING] * 9]]), K, 1.0)
    end_here, place, known = 1, 0, 0
    for turn, message in enumerate(CHAT):
        words = student.encode(message["content"])
        for i in range(len(words) + 1):
            begun = written(CHAT[:turn]) + f"<|{message['role']}|>" + student.decode(words[:i])
            if "\ufffd" not in begun:
                wanted = reference(folder, begun)
                top = wanted.topk(K)
                said = dict(zip(found.ids[0, place].tolist(), found.logprobs[0, place, :-1].tolist(), strict=True))
                theirs = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                if end_here in theirs:
                    theirs[student.end_id] = theirs.pop(end_here)
                assert said == pytest.approx(theirs, abs=1e-4)
                follows = words[i] if i < len(words) else end_here
                value = wanted[follows] if follows in top.indices else (1 - top.values.exp().sum()).log()
                assert found.following[0, place].item() == pytest.approx(value.item(), abs=1e-3)
                known += 1
            place += 1
        assert (found.ids[0, place] == -1).all() and found.logprobs[0, place, K] == 0  # no word: whose turn it is
        place += 1
    assert place == len(ids) and known > 20
    torch.testing.assert_close(found.logprobs[1, :-9], found.logprobs[0, :-9], atol=1e-4, rtol=0)
    assert (found.ids[1, -9:] == -1).all()


def test_a_student_of_bytes_learns_from_the_same_reading(folder: Path, backend: Transformers) -> None:
    student = ByteTokenizer()
    ids, _ = student.apply_chat(CHAT[:3])
    all_of_it = 80  # four times as many are asked for, and the teacher has 320
    found = Projection(backend, backend.tokenizer(), student).opinion(torch.tensor([ids]), all_of_it, 1.0)
    place = ids.index(student.role_ids["assistant"])
    wanted = reference(folder, written(CHAT[:2]) + "<|assistant|>").exp()
    mass: dict[int, float] = {}
    for token, value in enumerate(wanted.tolist()):
        text = backend.tokenizer().decode([token])
        if token in (0, 1):
            mass[student.end_id] = mass.get(student.end_id, 0) + value
        elif token > 4 and text and "\ufffd" not in text:
            mass[text.encode()[0]] = mass.get(text.encode()[0], 0) + value
    said = dict(zip(found.ids[0, place].tolist(), found.logprobs[0, place].exp().tolist(), strict=False))
    for token in sorted(mass, key=lambda token: -mass[token])[:8]:
        assert said[token] == pytest.approx(mass[token], rel=1e-3)


def test_rows_that_begin_inside_a_message_or_hold_several_conversations(
    folder: Path, backend: Transformers, student: Tokenizer
) -> None:
    ids, _ = student.apply_chat(CHAT)
    inside = ids[ids.index(student.role_ids["assistant"]) + 3 :]
    again = [*ids, *student.apply_chat([{"role": "system", "content": "x"}, {"role": "user", "content": "bee"}])[0]]
    projection = Projection(backend, student, student)
    first = projection.opinion(torch.tensor([inside]), K, 1.0)
    start = student.decode(inside[: inside.index(student.end_id)])
    top = reference(folder, f"{start}<|endoftext|><|user|>").topk(K)  # not known to be a message, it is a document
    said = first.logprobs[0, inside.index(student.role_ids["user"]), :-1]
    torch.testing.assert_close(said.double(), top.values, atol=1e-4, rtol=0)
    second = projection.opinion(torch.tensor([again]), K, 1.0)
    top = reference(folder, f"{written(CHAT)}<|system|>x<|end|><|user|>bee").topk(K)
    torch.testing.assert_close(second.logprobs[0, -2, :-1].double(), top.values, atol=1e-4, rtol=0)


def test_documents_between_conversations_are_read_as_documents(
    folder: Path, backend: Transformers, student: Tokenizer
) -> None:
    talk, _ = student.apply_chat(CHAT[1:3])
    text = [*student.encode("honey"), student.end_id]
    row = torch.tensor([[*text, *text, *talk, *text, *talk]])
    found = Projection(backend, student, student).opinion(row, K, 1.0)
    once, twice = f"honey<|endoftext|>honey<|endoftext|>{written(CHAT[1:3])}", f"honey<|endoftext|>{written(CHAT[1:2])}"
    for place, begun in (
        (len(text) - 1, "honey<|endoftext|>"),
        (2 * len(text) + len(talk) - 2, once[: -len("<|end|>")]),
        (2 * len(text) + len(talk) + len(text) - 1, once + "honey<|endoftext|>"),
        (row.shape[1] - 2, once + twice + "<|assistant|>" + CHAT[2]["content"]),
    ):
        top = reference(folder, begun).topk(K)
        torch.testing.assert_close(found.logprobs[0, place, :-1].double(), top.values, atol=1e-4, rtol=0)


def changed(folder: Path, template: str) -> Transformers:
    """A random model with another chat template."""
    save_model(folder, max_position_embeddings=256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return Transformers(str(folder), device="cpu", dtype="float32")


def test_a_template_that_lets_nobody_but_the_user_begin_reads_what_begins_otherwise(tmp_path: Path) -> None:
    backend = changed(tmp_path, (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    ))  # fmt: skip
    student = backend.tokenizer()
    ids, _ = student.apply_chat(CHAT[2:4])
    found = Projection(backend, student, student).opinion(torch.tensor([ids]), K, 1.0)
    top = reference(tmp_path, f"<|user|><|end|>{written(CHAT[2:4])[: -len('<|end|>')]}").topk(K)
    torch.testing.assert_close(found.logprobs[0, -2, :-1].double(), top.values, atol=1e-4, rtol=0)


def test_where_no_token_ends_an_answer_its_end_is_left_to_the_text(tmp_path: Path) -> None:
    backend = changed(tmp_path, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}")
    student = backend.tokenizer()
    ids, _ = student.apply_chat(CHAT[1:3])
    found = Projection(backend, student, student).opinion(torch.tensor([ids]), K, 1.0)
    known = (found.ids[0] >= 0).any(-1)
    assert known[-4] and not known[-2]
    assert backend.frame(("user", "assistant"))[2] == student.encode("\n\n")


def test_what_marks_a_template_is_no_text_to_a_student(backend: Transformers) -> None:
    """Neither before a conversation was read nor behind it."""
    student = ByteTokenizer()
    projection = Projection(backend, backend.tokenizer(), student)
    row = torch.tensor([list(b"The bee flew")])
    before = projection.opinion(row, 16, 1.0)
    projection.opinion(torch.tensor([student.apply_chat(CHAT)[0]]), 16, 1.0)
    behind = projection.opinion(row, 16, 1.0)
    assert torch.equal(before.ids, behind.ids) and torch.equal(before.logprobs, behind.logprobs)
    assert [projection._spell(token) for token in range(5)] == [(student.end_id,), (student.end_id,), (), (), ()]


def test_a_chatting_checkpoint_frames_messages_with_its_roles(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    size = ModelConfig(n_layer=1, n_embd=32, n_head=2, hidden=32, vocab_size=320, context_length=64)
    checkpoint.save(tmp_path, ElaraLM(ElaraConfig(model=size)), tokenizer, meta={"step": 0, "chat": True})
    around = Elara(str(tmp_path)).frame([message["role"] for message in CHAT])
    ids = list(around[0])
    for message, behind in zip(CHAT, around[1:], strict=True):
        ids += tokenizer.encode(message["content"]) + behind
    assert ids == tokenizer.apply_chat(CHAT)[0]


def test_a_conversation_that_the_template_refuses_stays_without_opinion(
    backend: Transformers, student: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    refused, _ = student.apply_chat([*CHAT[1:3], {"role": "tool", "content": "4"}])
    text = student.encode("The bee flew over the flower")
    rows = torch.full((3, max(len(refused), len(text))), PADDING)
    rows[0, : len(refused)], rows[1, : len(text)] = torch.tensor(refused), torch.tensor(text)
    rows[2, : len(refused) - 3] = torch.tensor(refused[:-3])
    teacher = Teacher("t", 1.0, backend, student, Projection(backend, student, student))
    found = teacher.opinion(rows, DistillConfig(top_k=K))
    assert (found.ids[0] == -1).all() and found.logprobs[0, :, K].eq(0).all() and found.following[0].isnan().all()
    direct = backend.top_logprobs(torch.tensor([text]), K)
    assert torch.equal(found.ids[1, : len(text)], direct.ids[0])  # plain text is read as it is
    assert (found.ids[2] >= 0).any()
    noted = capsys.readouterr().err
    assert noted.count("some conversations stay without a teacher") == 1 and "no tools here" in noted


def samples(path: Path, count: int, words: int = 6) -> Path:
    with path.open("w") as file:
        for i in range(count):
            long = " ".join(["honey"] * (200 if i % 9 == 3 else i % words))
            messages = [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"bee {long}"}]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    return path


@pytest.fixture
def prepared(folder: Path, tmp_path: Path) -> Prepared:
    data = DataConfig("chat", "chat", str(samples(tmp_path / "a.jsonl", 40)), val_fraction=0.3)
    return prepare(data, TokenizerConfig("huggingface", path=str(folder), end_token="<|endoftext|>"), tmp_path / "data")


def test_stored_every_conversation_is_read_alone(
    folder: Path, prepared: Prepared, backend: Transformers, student: Tokenizer
) -> None:
    assert prepared.tokenizer.fingerprint == student.fingerprint
    train, context = prepared.train, 64
    windows = list(reading_windows(train, context, student))
    assert max(window.end - window.start for window in windows) == context
    done = 0
    for window in windows:
        assert window.start <= done < window.stop == window.end
        done = window.stop
    assert done == len(train)
    teacher = Teacher("t", 1.0, backend, student, Projection(backend, student, student))
    settings = DistillConfig(top_k=K, context=context)
    file = stored_opinions(teacher, prepared, settings)
    assert file.about["tokens"] == len(train)
    begins = [0, *train.ends[:-1].tolist()]
    for begin, end in zip(begins, train.ends.tolist(), strict=True):
        if end - begin > context:
            long = (begin, end)
            continue
        alone = teacher.opinion(torch.from_numpy(train.tokens[None, begin:end].astype(np.int64)), settings)
        found = file.read(np.arange(begin, end)[None])
        assert torch.equal(found.ids, alone.ids)
        torch.testing.assert_close(found.logprobs.exp(), alone.logprobs.exp(), rtol=5e-3, atol=1e-4)
    second = next(window for window in windows if long[0] < window.start < long[1])
    assert second.speaker == student.role_ids["assistant"]
    words = train.tokens[second.start + 1 : second.stop - 4].astype(np.int64).tolist()
    wanted = reference(folder, "<|assistant|>" + student.decode(words))
    said = file.read(np.array([[second.stop - 5]]))
    theirs = wanted.topk(K).values.exp().float()
    torch.testing.assert_close(said.logprobs[0, 0, :-1].exp(), theirs, atol=1e-3, rtol=1e-2)
    said = file.read(np.arange(*long)[None])
    assert (said.ids[0, 2:-1] >= 0).any(-1).float().mean() > 0.95  # behind its own end and its first role, nothing


def test_windows_that_are_read_together_hold_so_many_tokens() -> None:
    lengths = [5, 9, 1, 1, 1, 30, 2, 2, *[1] * 100]
    windows = [Window(i, i + length, i + length) for i, length in enumerate(lengths)]
    groups = list(together(windows, 20))
    assert [window for group in groups for window in group] == windows
    for group, after in zip(groups, [*groups[1:], []], strict=True):
        longest = max(window.end - window.start for window in group)
        assert len(group) == 1 or longest * len(group) <= 20
        if after:
            more = max(longest, after[0].end - after[0].start)
            assert more * (len(group) + 1) > 20


def test_text_and_conversations_in_one_batch_keep_their_opinions(
    folder: Path, tmp_path: Path, backend: Transformers, student: Tokenizer
) -> None:
    words = np.random.default_rng(0).choice(["The bee", "flew", "over", "honey", "12"], 400)  # each window once
    (tmp_path / "a.txt").write_text(" ".join(words))
    replay = ReplayConfig(
        source="chat", share=0.5, path=str(samples(tmp_path / "b.jsonl", 30)), cross_documents=False, pack=True
    )
    config = DataConfig("text", "text", str(tmp_path / "a.txt"), val_fraction=0.3, batch_size=4, replay=replay)
    token = TokenizerConfig("huggingface", path=str(folder), end_token="<|endoftext|>")
    data = ElaraData(config, token, tmp_path / "data", seed=1, seq=48)
    teacher = Teacher("t", 1.0, backend, student, Projection(backend, student, student))
    settings = DistillConfig(top_k=K, context=64)
    data.opinions = [[stored_opinions(teacher, corpus, settings)] for corpus in data.corpora]
    text, talk = data.corpora
    assert text.train.weights is None and talk.train.weights is not None
    batch = data.train_batches()[0]
    (said,) = batch.opinions
    assert batch.tokens.shape == (4, 49) and said.ids.shape == (4, 48, K)
    for row in range(4):
        tokens = batch.tokens[row].numpy()
        tokens = tokens[tokens >= 0]
        corpus, file = ((text, data.opinions[0][0]), (talk, data.opinions[1][0]))[row >= 2]
        stream = corpus.train.tokens
        places = [i for i in range(len(stream)) if np.array_equal(stream[i : i + len(tokens)], tokens)]
        wanted = [file.read(np.arange(at, at + len(tokens) - 1)[None]) for at in places]  # a long answer repeats itself
        assert any(
            torch.equal(said.ids[row, : len(tokens) - 1], one.ids[0])
            and torch.equal(said.logprobs[row, : len(tokens) - 1], one.logprobs[0])
            for one in wanted
        )


def test_a_teacher_without_a_template_is_refused_for_conversations_alone(tmp_path: Path) -> None:
    save_model(tmp_path, chat=False)
    backend = {"_target_": "elara.backends.transformers.Transformers", "model": str(tmp_path)}
    given = {"t": {"weight": 1, "backend": backend}}
    assert open_teachers(given, ByteTokenizer())
    with pytest.raises(ElaraError, match=r"teachers.t cannot read conversations \(the model has no chat template\)"):
        open_teachers(given, ByteTokenizer(), conversations=True)


@pytest.mark.slow
def test_a_run_learns_conversations_from_a_teacher_that_knows_no_roles_of_ours(
    home, folder: Path, tmp_path: Path
) -> None:
    command = home.tiny(
        "name=talked", "data=chat", f"data.path={samples(tmp_path / 'c.jsonl', 60)}", "data.val_fraction=0.2",
        "teacher=transformers", f"teachers.transformers.backend.model={folder}", "tokenizer=byte",
        "data.replay.share=0.5", "data.replay.source=text", f"data.replay.path={home.text}", "distill.top_k=8",
        "distill.context=64",
    )  # fmt: skip
    done = home.call(*command)
    assert done.returncode == 0, done.stderr
    values = [float(row["train/loss_transformers"]) for row in home.rows(home.only_run("talked")) if row["train/loss"]]
    assert np.mean(values[-4:]) < np.mean(values[:4])


@pytest.mark.slow
def test_smollm2_judges_a_conversation_as_it_would_answer_it(smollm2: SmolLM2) -> None:
    """The real one, and the words of its own greedy answer: they are what it finds likeliest, to the end."""
    tokenizer = smollm2.tokenizer()
    question = {"role": "user", "content": "What is the capital of France?"}
    ((_, answer),) = smollm2.answers([[question]], Params(temperature=0, max_new_tokens=40))
    assert isinstance(answer, Answer) and "Paris" in answer.text and answer.finish == "stop"
    ids, learned = tokenizer.apply_chat([question, {"role": "assistant", "content": answer.text}])
    found = Projection(smollm2, tokenizer, tokenizer).opinion(torch.tensor([ids]), 8, 1.0)
    likeliest = [top[0] for top in found.ids[0].tolist()]
    words = [place for place, yes in enumerate(learned) if yes]
    assert [likeliest[place - 1] for place in words] == [ids[place] for place in words]
    assert sum(learned) > 5 and ids[-1] == tokenizer.end_id
