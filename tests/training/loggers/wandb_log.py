"""Read back what wandb wrote: its log files are LevelDB's log format with protobuf records inside."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, FULL, LAST = 32768, 1, 4


@dataclass
class Log:
    """One process's part of a run."""

    run: Any = None  # id, name, group, tags, as protobuf
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)  # define_metric, by name or glob
    artifacts: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None  # None: the process was killed
    folder: Path = Path()


def read_logs(run_folder: Path) -> list[Log]:
    """All parts of the run in `run_folder`, oldest first."""
    return [read_log(path) for path in sorted((run_folder / "wandb").glob("*run-*/run-*.wandb"))]


def read_log(path: Path) -> Log:
    log = Log(folder=path.parent)
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            log.run = record.run
            _update(log.config, record.run.config.update)
        elif kind == "config":
            _update(log.config, record.config.update)
        elif kind == "history":
            log.history.append({})
            _update(log.history[-1], record.history.item)
        elif kind == "summary":
            _update(log.summary, record.summary.update)
        elif kind == "metric":
            log.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            log.artifacts.append(record.artifact)
        elif kind == "files":
            log.files += [item.path for item in record.files.files]
        elif kind == "preempting":
            log.preempting = True
        elif kind == "exit":
            log.exit_code = record.exit.exit_code
    return log


def by_step(history: list[dict[str, Any]]) -> dict[int, dict[str, list[Any]]]:
    """Every value of every metric under its step, without wandb's own columns."""
    found: dict[int, dict[str, list[Any]]] = {}
    for row in history:
        for name, value in row.items():
            if name != "step" and not name.startswith("_"):
                found.setdefault(row["step"], {}).setdefault(name, []).append(value)
    return found


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, name = item.nested_key or [item.key]
        place = target
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:
            position += room
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        part = data[position + 7 : position + 7 + length]
        if kind == 0 or len(part) < length:  # the padding of a block, or the half record of a killed process
            position += room
            continue
        assert zlib.crc32(bytes([kind]) + part) == checksum
        position += 7 + length
        parts += part
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            parts = b""
            yield record
