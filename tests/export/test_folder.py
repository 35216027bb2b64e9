"""format=safetensors: a checkpoint folder that others can load."""

from pathlib import Path

import pytest
import torch

from elara import checkpoint, shards
from elara.errors import ElaraError
from elara.export.folder import write_folder
from elara.export.source import open_source
from elara.tokenizer.byte import ByteTokenizer
from tests.export.conftest import MAKE, config


@pytest.mark.parametrize("sharded", [False, True])
def test_it_loads_back_exactly(make: MAKE, tmp_path: Path, sharded: bool) -> None:
    source = make(config(), ByteTokenizer(), {"step": 7, "run": "bees"})
    if sharded:
        model = source.weights.model()

        def write_shards(trainer: Path) -> dict[str, torch.Tensor]:
            shards.write(trainer.parent / checkpoint.SHARDS, model.state_dict())
            trainer.write_bytes(b"optimizer")
            return {}

        checkpoint.save(tmp_path / "s", model, source.tokenizer, meta={"step": 7, "run": "bees"},
                        trainer_state=write_shards)  # fmt: skip
        source = open_source(tmp_path / "s")
    write_folder(tmp_path / "out", source)
    before, after = checkpoint.load(source.folder), checkpoint.load(tmp_path / "out")
    ours, theirs = before.model.state_dict(), after.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert after.config == before.config and after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.meta["step"] == 7 and after.meta["run"] == "bees"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "meta.json", "tokenizer", "README.md"}


def test_what_is_known_about_the_weights_goes_with_them(make: MAKE, tmp_path: Path) -> None:
    meta = {"step": 7, "commit": "abc", "data": "bees"}
    write_folder(tmp_path / "out", make(config(), ByteTokenizer(), meta, name="Bee", license="cc0-1.0", chat=True))
    again = open_source(tmp_path / "out")
    assert (again.about.name, again.about.license, again.about.commit, again.about.data, again.chat) == (
        "Bee", "cc0-1.0", "abc", "bees", True,
    )  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlicense: cc0-1.0\n") and "# Bee" in card and "bees" in card and "abc" in card
    assert f"{again.about.parameters.total:,} parameters" in card and "checkpoint.load" in card


def test_a_licence_is_the_user_s_to_give(make: MAKE, tmp_path: Path) -> None:
    write_folder(tmp_path / "out", make(config(), ByteTokenizer()))
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: elara\n") and "License: none was given by those who trained it." in card
    write_folder(tmp_path / "again", open_source(tmp_path / "out", license="apache-2.0"))
    assert open_source(tmp_path / "again").about.license == "apache-2.0"


def test_a_folder_with_something_in_it_is_left_alone(make: MAKE, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ElaraError, match="is there already"):
        write_folder(tmp_path / "out", make(config(), ByteTokenizer()))
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_one_line(make: MAKE, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ElaraError, match=r"cannot write .*make room, or give another output=FOLDER"):
        write_folder(tmp_path / "file" / "out", make(config(), ByteTokenizer()))
