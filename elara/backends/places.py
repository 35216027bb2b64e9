"""Where a model's files lie: a folder, or a snapshot of the hub that is fetched into its own cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elara.backends.base import BackendError
from elara.data.hashes import file_hash
from elara.runs import project_root

HUB_TIMEOUT = 10  # seconds until the hub counts as unreachable
SMALL = (".json", ".jinja", ".model", ".txt")  # what a model needs beside its weights
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # of a model on the hub


def find_folder(model: str, revision: str | None, gguf_file: str | None) -> tuple[Path, str | None]:
    """The folder with a model's files, and the commit if it comes from the hub.

    Raises BackendError within seconds when there is no such folder and the hub cannot be reached or does not have it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if model.startswith(("/", ".", "~")) or not NAME.fullmatch(model):
        raise BackendError("refused", f"there is no model folder {model}: check backend.model")
    return _from_hub(model, revision, gguf_file)


def _from_hub(model: str, revision: str | None, gguf_file: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    advice = "give backend.model=<a local folder>"
    try:
        info = HfApi().model_info(model, revision=revision, timeout=HUB_TIMEOUT)
    except Exception as unreachable:
        status = unreachable.response.status_code if isinstance(unreachable, HfHubHTTPError) else 500
        if status < 500 and status != 429:
            reason = f"the hub refuses {model} ({brief(unreachable)}): check the name, or {advice}"
            raise BackendError("refused", reason) from unreachable
        kept = try_to_load_from_cache(model, gguf_file or "config.json", revision=revision)
        if not isinstance(kept, str):
            reason = f"there is no folder {model}, and the hub cannot be reached ({type(unreachable).__name__})"
            raise BackendError("unreachable", f"{reason}: check the network, or {advice}") from unreachable
        return Path(kept).parent, Path(kept).parent.name
    files = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_wanted(files, gguf_file)))
    except Exception as error:
        raise BackendError(
            "unreachable", f"fetching {model} failed ({brief(error)}): run again, or {advice}"
        ) from error
    return folder, folder.name


def _wanted(files: list[str], gguf_file: str | None) -> list[str]:
    """The files of a repository that loading takes: weights in one format only."""
    if gguf_file is not None:
        return [gguf_file]
    kept = [file for file in files if file.endswith(SMALL)]
    for suffix in (".safetensors", ".bin"):
        if weights := [file for file in files if file.endswith(suffix) and not file.startswith("consolidated")]:
            return kept + weights
    return kept


def revision_of(folder: Path, gguf_file: str | None) -> str:
    """Hex sha256 over everything in a model's folder that changes what it answers."""
    suffixes = (*SMALL, ".safetensors", ".bin")
    files = [folder / gguf_file] if gguf_file else [file for file in folder.iterdir() if file.suffix in suffixes]
    return digest_of(files, folder)


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """Hex sha256 over the names in `folder` and the bytes of those files that exist; of large ones it is remembered."""
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(folder)} {file_hash(file, project_root() / 'data')}\n".encode())
    return digest.hexdigest()


def brief(error: BaseException) -> str:
    """An exception of somebody else's in at most one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def library() -> Any:
    """The package transformers, told to keep quiet: what fails is raised as well."""
    try:
        import transformers
    except ImportError as error:
        raise BackendError("refused", "this teacher needs an extra: pip install 'elara-hivemind[teachers]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def pretrained(kind: str, folder: Path, **options: Any) -> Any:
    """What transformers' class `kind` makes of a folder. Raises ValueError where that would run a program in it.

    transformers itself would ask on the terminal whether to run it.
    """
    try:
        return getattr(library(), kind).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        advice = "take a model that transformers knows without"
        raise ValueError(f"it brings a program of its own, which is never run: {advice}") from error
