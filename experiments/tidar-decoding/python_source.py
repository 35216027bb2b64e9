"""Copy this interpreter's standard library, tests left out, into data/python-source: text to train on."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

from elara.cli import guard
from elara.runs import project_root

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "lib2to3", "pydoc_data", "encodings", "__pycache__"}


def main() -> None:
    library, folder = Path(sysconfig.get_path("stdlib")), project_root() / "data" / "python-source"
    files = [f for f in sorted(library.rglob("*.py")) if not LEFT_OUT & set(f.relative_to(library).parts)]
    for file in files:
        target = folder / file.relative_to(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    print(f"{len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB in {folder}")


if __name__ == "__main__":
    guard(main)
