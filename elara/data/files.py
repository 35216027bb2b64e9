"""The one walk through a folder of data: which files are read, and what was left out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elara.errors import ElaraError


@dataclass
class Found:
    """Files of a folder, by name. hidden, repeated, other, broken: paths that were left out, and why; a hidden folder
    stands for all that it holds."""

    folder: Path
    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)  # a name that begins with a dot, at any level
    repeated: list[Path] = field(default_factory=list)  # links to what is read already
    other: list[Path] = field(default_factory=list)  # not of the kind that is wanted
    broken: list[Path] = field(default_factory=list)  # links to nothing, and what is no file

    def note(self) -> None:
        """Say how many files were left out, where there are any."""
        counts = {
            "hidden": sum(map(_files_in, self.hidden)),
            "linked twice": sum(map(_files_in, self.repeated)),
            "of another kind": len(self.other),
            "links to nothing or no files": len(self.broken),
        }
        total, why = sum(counts.values()), ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        if total:
            are = "files are" if total > 1 else "file is"
            print(f"note: {total:,} {are} left out of {self.folder} ({why})", file=sys.stderr, flush=True)


def walk(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> Found:
    """The files below a folder of which `wanted` is true, each once, under the first name that leads to it.

    Links are followed, but to no folder or file a second time, so not in circles; what is there itself goes before
    links to it. Raises ElaraError for a folder that cannot be read.
    """
    found, seen = Found(folder), set[str]()
    places, linked_files = [folder], list[Path]()
    while places:
        links = list[Path]()
        for place in places:
            for file in _real_files(place, found, seen, links):
                (linked_files if file.is_symlink() else found.files).append(file)
        places = links
    seen = {os.path.realpath(file) for file in found.files} if linked_files else set()
    for file in linked_files:
        if (real := os.path.realpath(file)) in seen:
            found.repeated.append(file)
            continue
        seen.add(real)
        found.files.append(file)
    kinds: dict[bool, list[Path]] = {True: [], False: []}
    for file in sorted(found.files):
        kinds[wanted(file)].append(file)
    found.files, found.other = kinds[True], kinds[False]
    return found


def _real_files(place: Path, found: Found, seen: set[str], links: list[Path]) -> Iterator[Path]:
    """Files below a place, through no link to a folder; those are added to `links`, real folders to `seen`."""

    def refuse(error: OSError) -> None:
        raise ElaraError(f"cannot read {error.filename}: {error.strerror}") from error

    for root, folders, names in os.walk(place, onerror=refuse):
        real = os.path.realpath(root)
        if real in seen:
            found.repeated.append(Path(root))
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in [*folders, *names] if name.startswith(".")]
        found.hidden += [Path(root, name) for name in sorted(hidden)]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [path for name in folders if (path := Path(root, name)).is_symlink()]
        for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
            if path.is_file():
                yield path
            else:
                found.broken.append(path)


def _files_in(path: Path) -> int:
    """Files that a path stands for, through no links."""
    return sum(len(names) for _, _, names in os.walk(path)) if path.is_dir() else 1
