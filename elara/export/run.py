"""One export from beginning to end: open, write, read back, say what came out."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from elara import runs
from elara.errors import ElaraError, naming
from elara.export import ollama
from elara.export.config import FORMATS, ExportConfig
from elara.export.files import write_model
from elara.export.folder import write_folder
from elara.export.layout import COMPACT, UNROLLED
from elara.export.llama_cpp import HOW_TO_GET, Library, find_library
from elara.export.quantize import CASTS, check_type
from elara.export.reference import make_reference
from elara.export.source import Source, file_name, open_source
from elara.export.verify import table, verify
from elara.export.vocabulary import vocabulary


def run(wanted: ExportConfig, folder: Path) -> Path:
    """Export a checkpoint and print where it is, how well it agrees and what to do next; returns the file or folder.

    Raises ElaraError when something cannot be exported, and when what was written does not agree; it stays then.
    """
    kind, form = wanted.quantize.type, wanted.format.kind
    if form not in FORMATS:
        raise ElaraError(f"format.kind={form} must be one of: {', '.join(FORMATS)}")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    if form == "safetensors":
        if wanted.depth is not None:
            raise ElaraError("format=safetensors keeps the trained recursion depth: leave depth out")
        source = _open(wanted, folder)
        path = _target(wanted, source, "")
        write_folder(path, source)
        console.print(f"written: {runs.shown(path)}", f"next:    {_command(path)}", sep="\n")
        return path
    library, note = _library(wanted.quantize.library, kind)
    source = _open(wanted, folder)
    if note is not None:
        console.print(f"note: {note}")
    vocabulary(source.tokenizer, source.config.vocab_size)  # refused before anything is written
    architecture = COMPACT if form == "compact" else UNROLLED
    name = file_name(source.about.name)
    path = _target(wanted, source, f"{name}-compact-{kind}.gguf" if form == "compact" else f"{name}-{kind}.gguf")
    write_model(path, source, architecture, kind, library)
    console.print(f"written: {runs.shown(path)} ({path.stat().st_size / 1e6:,.1f} MB)")
    following = _next(wanted, source, path, name)
    if wanted.verify:
        _verify(wanted, source, path, architecture, library, console)
    console.print(*(f"next:    {line}" for line in following), sep="\n")
    return path


def _open(wanted: ExportConfig, folder: Path) -> Source:
    source = open_source(folder, name=wanted.name, license=wanted.license, depth=wanted.depth, chat=wanted.chat)
    runs.say_reading(folder)
    return source


def _library(named: str | None, kind: str) -> tuple[Library | None, str | None]:
    """llama.cpp's library, and what the user should know about its absence.

    One that was found nearby and is not fit for use is in nobody's way where no library is needed.
    """
    try:
        library = find_library(named)
    except ElaraError as error:
        if named is not None or kind not in (*CASTS, "Q8_0"):
            raise
        return None, str(error)
    return library, check_type(kind, library)


def _target(wanted: ExportConfig, source: Source, file: str) -> Path:
    """Where to write. file: the name of a GGUF file in a folder; "" for a folder."""
    if wanted.output is None:
        return runs.new_folder("export", file_name(source.about.name)) / file
    path = Path(wanted.output).expanduser().absolute()
    if path.suffix == ".gguf" and not path.is_dir():
        if not file:
            raise ElaraError(f"output={wanted.output} names a file, and format=safetensors is a folder")
        return path
    return path / file


def _next(wanted: ExportConfig, source: Source, path: Path, name: str) -> list[str]:
    shown = Path(runs.shown(path))
    if wanted.format.kind == "ollama":
        tables = vocabulary(source.tokenizer, source.config.vocab_size)
        settings = wanted.format
        ollama.write_modelfile(path, source, tables, temperature=settings.temperature, num_ctx=settings.num_ctx)
        return ollama.commands(shown, name.lower())
    if wanted.format.kind == "compact":
        return [f'{runs.python()} -m elara.elara {shown} "Once upon"']
    return [f'llama-cli -m {shown} -p "Once upon"', f'{runs.python()} -m elara.elara {shown} "Once upon"']


def _command(path: Path) -> str:
    return f'{runs.python()} -m elara.sample checkpoint={runs.shown(path)} prompt="..."'


def _verify(
    wanted: ExportConfig, source: Source, path: Path, architecture: str, library: Library | None, console: Console
) -> None:
    kind = wanted.quantize.type
    console.print("comparing it with the checkpoint; verify=false leaves this out ...")
    with naming(source.folder):
        reference = make_reference(source, runs.project_root() / "data", wanted.verify_tokens)
    found, notes = verify(path, architecture, reference, library)
    if architecture == UNROLLED and library is None:
        notes.append(f"not read back by llama.cpp, whose library is not here: {HOW_TO_GET}")
    if found:
        console.print(table(found, reference, kind))
    console.print(*(f"note: {note}" for note in notes), sep="\n", end="\n" if notes else "")
    if not found:
        raise ElaraError(f"{runs.shown(path)} was kept, but nothing here reads it back: {'; '.join(notes)}")
    if problems := [problem for one in found if (problem := one.problem(kind)) is not None]:
        raise ElaraError(f"{runs.shown(path)} does not agree with the checkpoint, and was kept: {'; '.join(problems)}")
