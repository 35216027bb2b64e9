"""llama.cpp's own shared library through ctypes: found, checked, loaded once per process.

Nothing of it is built or shipped here. A struct that its default values do not bear out is refused, not guessed at.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from ctypes import Structure, c_void_p
from pathlib import Path
from typing import Any

from elara import runs
from elara.errors import ElaraError
from elara.export.llama_abi import (
    SIGNATURES,
    ContextParams,
    EarlierContextParams,
    LogCallback,
    ModelParams,
    QuantizeParams,
)

LIBRARY = re.compile(r"(lib)?llama(\.[\w.-]+)?\.(so|dylib|dll)(\.\d+)*")  # not libllama-common and the like
HOW_TO_GET = (
    "get llama.cpp's library with `npm install --ignore-scripts @node-llama-cpp/linux-x64` in this folder, or name "
    "that of any build with quantize.library=PATH"
)
ERROR = 4  # of ggml_log_level


class Library:
    """The loaded library: `functions` by their C names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loaded = _dependencies(path)
        self.functions: dict[str, Callable[..., Any]] = {}
        for name, (result, arguments) in SIGNATURES.items():
            self.functions[name] = self._function(name, result, arguments)
        self.context_params = self._context_params()
        for name, kind in (("model", ModelParams), ("model_quantize", QuantizeParams)):
            self.defaults(name, kind)
        self._errors: list[str] = []
        self._log = LogCallback(self._hear)  # kept: the library calls it as long as it lives
        self.functions["llama_log_set"](ctypes.cast(self._log, c_void_p), None)
        self.functions["llama_backend_init"]()
        self.functions["ggml_backend_load_all_from_path"](os.fsencode(path.parent))
        if not self.functions["ggml_backend_dev_count"]():
            raise ElaraError(f"{path} finds no backend for this processor in its folder: name another build's library")

    def defaults(self, name: str, kind: type[Structure]) -> Any:
        """What llama_<name>_default_params gives; raises ElaraError where it is not what this program knows."""
        params = self._function(f"llama_{name}_default_params", kind, [])()
        for field, values in kind.known.items():  # type: ignore[attr-defined]
            if hasattr(params, field) and getattr(params, field) not in values:
                have = getattr(params, field)
                raise ElaraError(
                    f"{self.path} is a build of llama.cpp that this program does not know ({name}.{field} is {have} by "
                    "default): name another build's library with quantize.library=PATH"
                )
        return params

    def complaint(self) -> str:
        """The first error that the library reported since the last call, in its words."""
        found = self._errors[0] if self._errors else "it does not say why"
        self._errors.clear()
        return found

    def _context_params(self) -> type[Structure]:
        try:
            self.defaults("context", ContextParams)
        except ElaraError:
            self.defaults("context", EarlierContextParams)
            self.functions["llama_init_from_model"] = self._function(
                "llama_init_from_model", c_void_p, [c_void_p, EarlierContextParams]
            )
            return EarlierContextParams
        self.functions["llama_init_from_model"] = self._function(
            "llama_init_from_model", c_void_p, [c_void_p, ContextParams]
        )
        return ContextParams

    def _function(self, name: str, result: Any, arguments: Sequence[Any]) -> Callable[..., Any]:
        for library in self._loaded:
            function = getattr(library, name, None)
            if function is not None:
                function.restype, function.argtypes = result, list(arguments)
                return function  # type: ignore[no-any-return]
        raise ElaraError(f"{self.path} has no function {name}: this build of llama.cpp is too old or not whole")

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR and text.strip():
            self._errors.append(text.decode("utf-8", "replace").strip())


_libraries: dict[Path, Library] = {}


def find_library(named: str | None = None) -> Library | None:
    """llama.cpp's library: as named, else of a node-llama-cpp nearby, else of the system; None = there is none.

    named: a file, or a folder that is searched with all below it. Raises ElaraError when that has no library, or when
    the library found is none that this program knows.
    """
    problem: ElaraError | None = None
    for path in [_named(Path(named).expanduser())] if named is not None else _nearby():
        path = path.resolve()
        try:
            if path not in _libraries:
                _libraries[path] = Library(path)
            return _libraries[path]
        except ElaraError as error:
            problem = error  # another one may be fit: that of a graphics card, say, needs its driver
    if problem is not None:
        raise problem
    return None


def _named(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ElaraError(f"quantize.library={path} does not exist: name llama.cpp's library or a folder that holds it")
    found = next(_below(path), None)
    if found is None:
        raise ElaraError(f"quantize.library={path} holds no libllama: {HOW_TO_GET}")
    return found


def _nearby() -> Iterator[Path]:
    for root in dict.fromkeys((Path.cwd(), runs.project_root(), Path.home())):
        for folder in sorted((root / "node_modules" / "@node-llama-cpp").glob("*/bins/*")):
            yield from _below(folder)
    system = ctypes.util.find_library("llama")
    if system is not None and (path := _system_path(system)) is not None:
        yield path


def _below(folder: Path) -> Iterator[Path]:
    files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if LIBRARY.fullmatch(name))
    yield from sorted(files, key=lambda file: (len(file.parts), file.name))


def _system_path(name: str) -> Path | None:
    """Where the system's loader finds a library that it knows by name; dlopen alone does not say."""
    if os.path.isabs(name):
        return Path(name)
    folders = [*os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep), "/usr/local/lib", "/usr/lib", "/lib"]
    places = (Path(folder, name) for folder in folders if folder)
    more = (path for folder in ("/usr/lib", "/lib") for path in Path(folder).glob(f"*/{name}"))
    return next((path for path in (*places, *more) if path.is_file()), None)


def _dependencies(path: Path) -> list[ctypes.CDLL]:
    """The library, and ggml's beside it: loaded first, for builds that do not say where they lie."""
    loaded = []
    for pattern in ("libggml-base.*", "libggml.*", "ggml-base.dll", "ggml.dll"):
        for file in sorted(path.parent.glob(pattern)):
            try:
                loaded.append(ctypes.CDLL(str(file)))
            except OSError:
                continue  # the library itself says what is wrong, if it needs this file
    try:
        return [ctypes.CDLL(str(path)), *loaded]
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ElaraError(
            f"{path} cannot be loaded ({reason}): name another build with quantize.library=PATH"
        ) from error


def threads() -> int:
    """Cores that this process may use, or what OMP_NUM_THREADS says."""
    if (wanted := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(wanted):
        return int(wanted)
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
