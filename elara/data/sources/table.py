"""Documents as rows of a table: a dataset of the hub, streamed, or local parquet and JSON-lines files.

Each file is a shard, tokenised by one process into parts. A finished part is kept together with the position that was
reached, so that a killed preparation goes on where it was. Local files are read by `elara.data.rows`, each by itself.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np

from elara import tokenizer as tokenizers
from elara.data import rows
from elara.data.config import CorpusConfig
from elara.data.files import Found, walk
from elara.data.hashes import file_hash
from elara.data.progress import Progress
from elara.data.sources.base import SPLITS, Counts, Split
from elara.data.tokens import TokenFile, TokenWriter, concatenate
from elara.errors import ElaraError
from elara.tokenizer import TextError, Tokenizer

PART_TOKENS = 1 << 25  # tokens in a part: what a killed process loses at most
BATCH = 256  # documents read, encoded and written together
SMALL = 1 << 26  # bytes of local files that one process tokenises alone
HUB_TIMEOUT = 10  # seconds until the hub counts as unreachable
SUFFIXES = {"parquet": (rows.PARQUET,), "json": rows.JSON}


@dataclass(frozen=True)
class Table:
    """See `Source`. One document of every `1 / val_fraction` validates, at a place drawn by hash."""

    data: CorpusConfig
    files: tuple[str, ...]  # local files; () = the hub
    root: Path  # of prepared data; remembers the hashes of large files
    found: Found | None = None  # where the files are those of a folder

    def identity(self) -> dict[str, Any]:
        data = self.data
        place: dict[str, Any]
        if self.files:
            hashes = {file: file_hash(Path(file), self.root) for file in self.files}
            place = {"path": data.path, "sha256": hashes}
        else:
            place = {"dataset": data.dataset, "subset": data.subset, "revision": data.revision, "split": data.split}
        return {
            "source": data.source,
            **place,
            "text_field": data.text_field,
            "max_documents": data.max_documents,
            "val_fraction": data.val_fraction,
        }

    def text(self) -> Iterator[str]:
        self._check_reachable()
        shards = self.count_shards()
        for shard in range(shards):
            yield from islice(self.stream(shards, shard)[0], self.limit(shards, shard))

    def documents(self, split: Split) -> Iterator[list[str]]:
        self._check_reachable()
        shards = self.count_shards()
        for shard in range(shards):
            texts = islice(self.stream(shards, shard)[0], self.limit(shards, shard))
            for index, text in enumerate(texts):
                if text and self.is_held_out(shard, index) == (split == "val"):
                    yield [text]

    def write(self, folder: Path, tokenizer: Tokenizer, dtype: np.dtype[Any], work: Path) -> Counts:
        self._check_reachable()
        if self.found is not None:
            self.found.note()
        shards = self.count_shards()
        work.mkdir(parents=True, exist_ok=True)
        tokenizer.save(work / "tokenizer")
        processes = max(1, min(self.data.processes or self._worthwhile_processes(), shards))
        done = sum(_documents_in(part) for part in work.glob("shard-*/part-*"))
        with Progress(f"tokenising {shards} shards", unit="documents", total=self.data.max_documents, done=done) as bar:
            if processes == 1:
                for shard in range(shards):
                    _tokenise(self, shards, shard, work, dtype.str, os.cpu_count() or 1, bar.advance)
            else:
                self._in_processes(processes, shards, work, dtype.str, bar)
        parts = [part for shard in range(shards) for part in _parts(_shard_folder(work, shard))]
        return {split: concatenate(parts, folder, split) for split in SPLITS}

    def stream(
        self, shards: int, shard: int, position: dict[str, Any] | None = None
    ) -> tuple[Iterator[str], Callable[[], Any]]:
        """The texts of a shard, "" where a row has none, and what gives the place in the hub's stream.

        position: of an earlier stream, to go on there: `index`, the rows that were read, and `stream`.
        """
        if self.files:
            start = position["index"] if position else 0
            return rows.texts(Path(self.files[shard]), self.data.text_field, start), lambda: None
        dataset = self.open()
        dataset = dataset.shard(num_shards=shards, index=shard) if shards > 1 else dataset
        if position:
            dataset.load_state_dict(position["stream"])
        return map(self.text_of, self.rows(dataset)), dataset.state_dict

    def open(self) -> Any:
        """The hub's dataset, streamed; ElaraError when it cannot be had."""
        datasets = _datasets()
        data = self.data
        try:
            return datasets.load_dataset(
                data.dataset, data.subset, split=data.split, revision=data.revision, streaming=True
            )
        except Exception as error:  # the library raises many kinds, all of them about this dataset
            raise ElaraError(f"cannot open the dataset {self.name}: {_brief(error)}") from error

    def rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """The rows of a streamed dataset; ElaraError when reading fails."""
        try:
            yield from dataset
        except Exception as error:
            reason = _brief(error)
            raise ElaraError(f"reading {self.name} failed ({reason}); what is finished is kept, run again") from error

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.data.path or self.data.dataset)

    def count_shards(self) -> int:
        """Files of the dataset."""
        return len(self.files) if self.files else int(getattr(self.open(), "num_shards", 1))

    def limit(self, shards: int, shard: int) -> int | None:
        """Documents to read from this shard: an equal share of `max_documents`."""
        total = self.data.max_documents
        return None if total is None else total // shards + (shard < total % shards)

    def text_of(self, row: dict[str, Any]) -> str:
        """The row's text; ElaraError when the column is missing or holds something else."""
        field = self.data.text_field
        if field not in row:
            raise ElaraError(f"data.text_field={field} is not a column of this dataset; it has {', '.join(row)}")
        value = row[field]
        if value is not None and not isinstance(value, str):
            raise ElaraError(f"column {field} holds {type(value).__name__}, not text: set data.text_field")
        return value or ""

    def place(self, split: Split, document: int) -> tuple[str, int]:
        return f"document {document + 1} of the {split} part of {self.name}", 0

    def row_name(self, shards: int, shard: int, index: int) -> str:
        """What messages call a row."""
        return f"row {index + 1} of {self.files[shard] if self.files else f'shard {shard + 1} of {self.name}'}"

    def is_held_out(self, shard: int, index: int) -> bool:
        """Whether a document validates: one of each block of `1 / val_fraction` documents."""
        stride = round(1 / self.data.val_fraction)
        block, place = divmod(index, stride)
        return place == (block * 0x9E3779B97F4A7C15 + shard * 0xBF58476D1CE4E5B9 >> 17) % stride

    def _worthwhile_processes(self) -> int:
        """All cores, unless starting processes would take longer than the work."""
        small = self.files and sum(Path(file).stat().st_size for file in self.files) < SMALL
        return 1 if small else os.cpu_count() or 1

    def _in_processes(self, processes: int, shards: int, work: Path, dtype: str, bar: Progress) -> None:
        context = multiprocessing.get_context("spawn")  # forking a process with threads may hang
        news: Queue[int] = context.Queue()
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, mp_context=context, initializer=_remember, initargs=(news,)) as pool:
            futures = [pool.submit(_in_process, self, shards, shard, work, dtype, threads) for shard in range(shards)]
            try:
                while not all(future.done() for future in futures):
                    if any(future.done() and future.exception() for future in futures):
                        break
                    try:
                        bar.advance(news.get(timeout=0.2))
                    except queue.Empty:
                        continue
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for process in list(pool._processes.values()):
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _check_reachable(self) -> None:
        """One line within seconds when the hub cannot be reached; its own client would try for half a minute."""
        if self.files:
            return
        _datasets()
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        advice = "or give data.path=<local parquet files>"
        try:
            HfApi().dataset_info(self.name, revision=self.data.revision, timeout=HUB_TIMEOUT)
        except HfHubHTTPError as error:
            reason = _brief(error)
            raise ElaraError(f"the hub refuses dataset {self.name} ({reason}): check data.dataset, {advice}") from error
        except Exception as error:
            reason = f"{type(error).__name__} for {self.name}"
            raise ElaraError(f"the hub cannot be reached ({reason}): check the network, {advice}") from error


def open_table(data: CorpusConfig, root: Path) -> Table:
    """The table for a configuration; ElaraError when its settings are incomplete."""
    if not 0 < data.val_fraction <= 0.5:
        raise ElaraError(f"data.val_fraction={data.val_fraction} must be above 0 and at most 0.5")
    if data.path is None:
        if data.source != "hub":
            raise ElaraError(f"data={data.source} needs data.path=<a file or a folder of them>")
        if data.dataset is None:
            raise ElaraError("data.source=hub needs data.dataset=<name on the hub>")
        return Table(data, (), root)
    place = Path(data.path).expanduser().resolve()
    if not place.exists():
        raise ElaraError(f"data.path={data.path} does not exist")
    kinds = {"parquet": ["parquet"], "jsonl": ["json"]}.get(data.source, list(SUFFIXES))
    for kind in kinds:
        if place.is_file():
            found = Found(place.parent, [place] if place.name.endswith(SUFFIXES[kind]) else [])
        else:
            found = walk(place, lambda file, ends=SUFFIXES[kind]: file.name.endswith(ends))  # type: ignore[misc]
        if found.files:
            return Table(data, tuple(map(str, found.files)), root, found)
    wanted = " or ".join(suffix for kind in kinds for suffix in SUFFIXES[kind])
    raise ElaraError(f"data.path={data.path} holds no file that ends in {wanted}")


def _tokenise(
    table: Table, shards: int, shard: int, work: Path, dtype: str, threads: int, advance: Any, parent: int | None = None
) -> None:
    """Write the missing parts of one shard."""
    folder = _shard_folder(work, shard)
    folder.mkdir(exist_ok=True)
    if (folder / "done").exists():
        return
    tokenizer = tokenizers.load(work / "tokenizer")
    parts = _parts(folder)
    position = json.loads((parts[-1] / "position.json").read_text(encoding="utf-8")) if parts else None
    index = position["index"] if position else 0
    limit = table.limit(shards, shard)
    stream, place = table.stream(shards, shard, position)
    number, finished = len(parts), False
    with ThreadPoolExecutor(threads) as pool:
        while not finished:
            with _Part(folder, number, np.dtype(dtype)) as part:
                while part.tokens < PART_TOKENS and not finished:
                    if parent is not None and os.getppid() != parent:
                        os._exit(1)  # the preparing process was killed; raising would leave this one waiting for work
                    room = BATCH if limit is None else min(BATCH, limit - index)
                    texts = list(islice(stream, room))
                    for text, waiting in [(text, pool.submit(tokenizer.encode_exactly, text)) for text in texts]:
                        try:
                            ids = waiting.result()
                        except TextError as error:
                            raise error.within(table.row_name(shards, shard, index)) from error
                        if text:
                            part.add("val" if table.is_held_out(shard, index) else "train", ids, text, tokenizer.end_id)
                        index += 1
                    finished = len(texts) < BATCH
                    advance(len(texts))
                part.finish({"index": index, "stream": place()})
            number += 1
    (folder / "done").touch()


class _Part:
    """A folder of token files that appears under its name when it is whole."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any]) -> None:
        self._target = folder / f"part-{number:05d}"
        self._building = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
        self._dtype = dtype
        self._writers = {split: TokenWriter(self._building, split, dtype) for split in SPLITS}

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()
        shutil.rmtree(self._building, ignore_errors=True)

    @property
    def tokens(self) -> int:
        return sum(writer.counts["tokens"] for writer in self._writers.values())

    def add(self, split: Split, ids: tokenizers.Ids, text: str, end_id: int) -> None:
        writer = self._writers[split]
        writer.write(ids, len(text))
        writer.write([end_id], 0)
        writer.end_document()

    def finish(self, position: dict[str, Any]) -> None:
        for writer in self._writers.values():
            writer.close()
        manifest: dict[str, Any] = {split: writer.counts for split, writer in self._writers.items()}
        manifest["dtype"] = self._dtype.str
        (self._building / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        (self._building / "position.json").write_text(json.dumps(position), encoding="utf-8")
        try:
            os.rename(self._building, self._target)
        except OSError:  # a process that outlived its killed parent was faster; its part is the same
            if not self._target.exists():
                raise


_news: Queue[int] | None = None  # in a worker: where it reports finished documents


def _remember(news: Queue[int]) -> None:
    global _news
    _news = news


def _in_process(table: Table, shards: int, shard: int, work: Path, dtype: str, threads: int) -> None:
    assert _news is not None
    _tokenise(table, shards, shard, work, dtype, threads, _news.put, os.getppid())


def _shard_folder(work: Path, shard: int) -> Path:
    return work / f"shard-{shard:05d}"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


def _documents_in(part: Path) -> int:
    return sum(len(TokenFile(part, split).ends) for split in SPLITS)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ElaraError("this data source needs an extra: pip install 'elara-hivemind[hub]'") from error
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what fails is raised as well
    # Versions before 4 would ask on the terminal whether to run a dataset's own program; then it is refused instead
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False
    return datasets


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
