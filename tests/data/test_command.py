"""`python -m elara.data`: prepares and says what is there."""

import os
import subprocess
import sys


def command(root, *arguments):
    environment = {**os.environ, "ELARA_HOME": str(root), "PYTHONPATH": os.getcwd(), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "elara.data", *arguments], env=environment, capture_output=True, text=True
    )


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
