"""A size report for people: tables with rules and colour on a terminal, plain columns when piped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from elara.config import ElaraConfig


def show(report: dict[str, Any], config: ElaraConfig, title: str, console: Console) -> None:
    """Print the report of `elara.size.size_report`."""
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    rows = [(name, part["total"], part["active"]) for name, part in report["parameters"].items()]
    rows.append(("all", report["total"], report["active"]))
    if report["without_diffusion_head"] != report["total"]:
        rows.append(("without diffusion head", report["without_diffusion_head"], report["active"]))
    counts = [(name, f"{total:,}", f"{active:,}", f"{total / report['total']:.1%}") for name, total, active in rows]
    _table(console, ("parameters", "total", "active per token", "share"), counts)

    unrolled = "unrolled, as GGUF" if config.trm.depth > 1 else "as GGUF"
    files = [(name, _bytes(size["one_copy"]), _bytes(size["unrolled"])) for name, size in report["file_bytes"].items()]
    _table(console, ("weights for inference", "one copy of each block", unrolled), files)

    cache, context = report["kv_cache_bytes_per_token"], config.model.context_length
    kept = report["activation_bytes_per_sequence"]
    recursion = f"{config.model.n_layer} blocks x {config.trm.depth}, {config.trm.order}"
    facts = [
        ("effective layers", f"{report['effective_layers']} ({recursion})"),
        ("KV cache per token", f"{_bytes(cache['bf16'])} in bf16, {_bytes(cache['fp32'])} in fp32"),
        (f"KV cache of {context} tokens", f"{_bytes(cache['bf16'] * context)} in bf16"),
        ("training with AdamW, fp32", f"{_bytes(report['adamw_bytes'])}: weights, gradients, two moments"),
        (f"+ per sequence of {context}", f"{_bytes(kept['plain'])} of activations (fp32, without the heads' logits)"),
        ("  with trm.checkpoint", f"{_bytes(kept['checkpointed'])}, and {_bytes(kept['recomputed'])} for one block"),
    ]
    _table(console, ("", ""), facts)


def _table(console: Console, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """The first column is text, the others are numbers unless there is no header."""
    if not console.is_terminal:
        lines = [header, *rows] if any(header) else rows
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        align = str.rjust if any(header) else str.ljust
        for first, *others in lines:
            aligned = [align(cell, width) for cell, width in zip(others, widths[1:], strict=True)]
            print("  ".join([first.ljust(widths[0]), *aligned]).rstrip(), file=console.file)
        print(file=console.file)
        return
    table = Table(box=box.SIMPLE_HEAD, show_header=any(header), pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i and any(header) else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _bytes(count: int) -> str:
    """Decimal units, three digits: 3.46 GB."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
