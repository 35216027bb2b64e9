"""`python -m elara.data`: prepares and says what is there."""

import os
import shlex

import pytest

from elara.data.__main__ import main
from tests import forks


def command(root, *arguments):
    environment = {**os.environ, "ELARA_HOME": str(root), "PYTHONPATH": os.getcwd(), "COLUMNS": "200"}
    return forks.run("elara.data", *arguments, env=environment)


def test_it_prints_documents_tokens_and_size(tmp_path):
    file = tmp_path / "my.txt"
    file.write_text("0123456789" * 1000)
    result = command(tmp_path, "data=text", f"data.path={file}", "tokenizer=byte")
    assert result.returncode == 0, result.stderr
    assert "9,000" in result.stdout
    assert "1,000" in result.stdout
    assert str(tmp_path / "data" / "prepared") in result.stdout


def test_mistakes_are_one_line(tmp_path):
    for arguments, word in ((["data=text"], "data.path"), (["data.pth=x"], "data.pth"), (["data=tekst"], "text")):
        result = command(tmp_path, *arguments)
        assert result.returncode == 1
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert word in result.stderr


@pytest.mark.parametrize("name", ["a=b.txt", "[x].txt", "it's.txt", "данные.txt", "a,b.txt", "a b {c}.txt", "a.txt"])
def test_files_of_any_name_are_read(in_process, tmp_path, name):
    (tmp_path / name).write_text("0123456789" * 100)
    code, out, err = in_process(main, tmp_path, "data=text", f"data.path={name}", "tokenizer=byte")
    assert code == 0 and "900" in out, err


def test_an_override_that_cannot_be_read_is_shown_as_it_can(in_process, tmp_path):
    code, _, err = in_process(main, tmp_path, "data=text", "data.path=нет its.txt", "tokenizer=byte")
    assert code == 1 and err.count("\n") == 1
    (advice,) = shlex.split(err.rpartition("write it as ")[2])
    (tmp_path / "нет its.txt").write_text("0123456789" * 100)
    code, out, err = in_process(main, tmp_path, "data=text", advice, "tokenizer=byte")
    assert code == 0 and "900" in out, err
