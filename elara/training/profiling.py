"""Where the time of a training step goes: ranges around the parts of our model, and what torch.profiler saw in them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch._C._autograd import DeviceType
from torch.profiler import record_function

from elara.model import ElaraLM
from elara.model.mlp import MLP
from elara.model.moe import MoE
from elara.report.style import BLUE, GREY, ORANGE

ATTENTION, ROUTER, EXPERTS, MLP_, REST = "attention", "MoE router", "experts", "dense MLP", "embedding, norms"
LOSS, AUTOGRAD, OPTIMIZER, DATA, AROUND = "heads, loss", "gradient sums", "optimizer", "data", "Lightning, callbacks"
PARTS = (ATTENTION, ROUTER, EXPERTS, MLP_, REST, LOSS, AUTOGRAD, OPTIMIZER, DATA, AROUND)
FORWARD, BACKWARD, OTHER = "forward", "backward", "other"
PHASES = {FORWARD: BLUE, BACKWARD: ORANGE, OTHER: GREY}  # and their colours
IN_THE_MODEL = (ATTENTION, ROUTER, EXPERTS, MLP_, REST, LOSS)
SIGN = " | "  # a range is called "part | what"

# Lightning's names of what it does, by their ends; what is not here belongs to AROUND
ACTIONS = {
    "train_dataloader_next": DATA,
    "batch_to_device": DATA,
    ".training_step": LOSS,  # less the model, which has ranges of its own
    ".backward": AUTOGRAD,  # less what follows from a forward operation
    ".configure_gradient_clipping": OPTIMIZER,
    ".optimizer_zero_grad": OPTIMIZER,
    "Module.optimizer_step": OPTIMIZER,  # with the balance behind it; the closure in it has ranges of its own
}


class Actions(Profiler):
    """Lightning's word for everything it does, as ranges."""

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[str, Any] = {}

    def start(self, action_name: str) -> None:
        part = next((part for end, part in ACTIONS.items() if action_name.endswith(end)), AROUND)
        self._open[action_name] = record_function(part + SIGN + action_name)
        self._open[action_name].__enter__()

    def stop(self, action_name: str) -> None:
        if action_name in self._open:  # it may have begun before there were ranges
            self._open.pop(action_name).__exit__(None, None, None)


def attach(model: ElaraLM) -> ExitStack:
    """Put ranges around the parts of a model until the result is closed. Blocks that are compiled stay one part."""
    stack = ExitStack()
    _around(stack, model, REST, "model")
    for i, block in enumerate(model.blocks):
        if block._compiled_call_impl is not None:
            continue
        name = f"blocks.{i}"
        _around(stack, block.attention, ATTENTION, f"{name}.attention")  # type: ignore[arg-type]
        if isinstance(block.mlp, MoE):
            _around(stack, block.mlp, EXPERTS, f"{name}.mlp")
            _around(stack, block.mlp.router, ROUTER, f"{name}.mlp.router")
            _around_method(stack, block.mlp.experts, "weights", EXPERTS, f"{name}.mlp.experts.weights")
        else:
            assert isinstance(block.mlp, MLP)
            _around(stack, block.mlp, MLP_, f"{name}.mlp")
    return stack


def _around(stack: ExitStack, module: torch.nn.Module, part: str, name: str) -> None:
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(part + SIGN + name))
        ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
    # recomputation of a block ends by an exception as soon as it has what it wants
    stack.callback(module.register_forward_hook(leave, always_call=True).remove)


def _around_method(stack: ExitStack, owner: Any, method: str, part: str, name: str) -> None:
    inner: Callable[..., Any] = getattr(owner, method)

    def ranged(*args: Any) -> Any:
        with record_function(part + SIGN + name):
            return inner(*args)

    setattr(owner, method, ranged)
    stack.callback(delattr, owner, method)


@dataclass
class Row:
    """One operator within one part of the step. calls, seconds (of its own, without what it calls): per step."""

    part: str
    phase: str
    operator: str
    calls: float
    seconds: float


@dataclass
class Profile:
    """What a window of steps cost. seconds: of one step, by the clock; plain: of one before the profiler slowed it."""

    rows: list[Row]
    steps: int
    first: int
    seconds: float
    plain: float
    on: str
    clock: str = "the main thread's"  # whose time the rows are of; on a GPU the device's

    @property
    def total(self) -> float:
        """Seconds that the rows account for; on a GPU less than those of the clock while it waits for the host."""
        return sum(row.seconds for row in self.rows)

    def by_part(self) -> dict[str, dict[str, float]]:
        """Seconds of every part that has any, by phase."""
        found: dict[str, dict[str, float]] = {part: dict.fromkeys(PHASES, 0.0) for part in PARTS}
        for row in self.rows:
            found[row.part][row.phase] += row.seconds
        return {part: phases for part, phases in found.items() if sum(phases.values()) > 0}

    def shares(self) -> dict[str, float]:
        """Share of each part in the time that is accounted for."""
        return {part: sum(phases.values()) / self.total for part, phases in self.by_part().items()}


def measured(events: Iterable[Any], steps: int, first: int, seconds: float, plain: float, on: str) -> Profile:
    """The profile of a window of `seconds` by the clock from torch.profiler's events; the rest as in `Profile`."""
    events = [e for e in events if e.device_type == DeviceType.CPU]
    on_device = any(e.self_device_time_total for e in events)
    rows = rows_of(events, steps, seconds, on_device=on_device)
    return Profile(rows, steps, first, seconds / steps, plain, on, "the device's" if on_device else Profile.clock)


def rows_of(events: list[Any], steps: int, seconds: float, *, on_device: bool = False) -> list[Row]:
    """Own time of every operator, by part. events: torch.profiler's of the host; seconds: of the window, by the clock.

    A backward operation belongs where the forward operation belongs that it differentiates, which autograd numbers.
    The time is that of the kernels an operator started or, on a CPU, that of the main thread; what lies outside of all
    events is AROUND then.
    """
    events = sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end))
    main = next((e.thread for e in events if SIGN in e.name), 0)
    forward: dict[tuple[int, int], str] = {}  # part of the forward operation, by its thread and number
    place: dict[int, tuple[str, str]] = {}
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for e in events:
        part, phase = _place(e, place, forward)
        place[e.id] = part, phase
        if e.scope == 0 and e.sequence_nr >= 0 and not e.fwd_thread:
            forward[e.thread, e.sequence_nr] = part  # the last of a number is the one that made the node
        own = e.self_device_time_total if on_device else e.self_cpu_time_total
        if on_device or e.thread == main:
            entry = sums[part, phase, "(in Python)" if SIGN in e.name else e.name]
            entry[0] += 1
            entry[1] += own / 1e6
    rows = [Row(*key, calls / steps, own / steps) for key, (calls, own) in sums.items()]
    if not on_device and (left := seconds / steps - sum(row.seconds for row in rows)) > 0:
        rows.append(Row(AROUND, OTHER, "(between events)", 1.0, left))
    return sorted(rows, key=lambda row: -row.seconds)


def _place(e: Any, place: dict[int, tuple[str, str]], forward: dict[tuple[int, int], str]) -> tuple[str, str]:
    part, sign, _ = e.name.partition(SIGN)
    parent = place.get(e.cpu_parent.id) if e.cpu_parent is not None else None
    if sign and part in PARTS:
        # recomputation in the backward pass as well: it is the forward pass, once more
        return part, FORWARD if part in IN_THE_MODEL else OTHER
    if e.name.startswith("Optimizer.step#"):
        return OPTIMIZER, OTHER
    if e.fwd_thread and (e.fwd_thread, e.sequence_nr) in forward:
        return forward[e.fwd_thread, e.sequence_nr], BACKWARD
    if parent is not None:
        return parent
    return (AUTOGRAD if e.scope == 1 or "AccumulateGrad" in e.name else AROUND), OTHER


def write(profile: Profile, folder: Path) -> None:
    """table.txt, table.csv and parts.png."""
    (folder / "table.txt").write_text(text(profile), "utf-8")
    with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["part", "phase", "operator", "calls_per_step", "ms_per_step", "share"])
        for r in profile.rows:
            row = [r.part, r.phase, r.operator, f"{r.calls:g}", f"{1e3 * r.seconds:.4f}"]
            writer.writerow([*row, f"{r.seconds / profile.total:.5f}"])
    draw(profile).savefig(folder / "parts.png", bbox_inches="tight")


def text(profile: Profile, operators: int = 30) -> str:
    """Two tables to read: by part, and the most expensive operators."""
    first, last = profile.first, profile.first + profile.steps - 1
    lines = [
        f"Steps {first}-{last} on {profile.on}: {1e3 * profile.seconds:.1f} ms a step under the profiler, "
        f"{1e3 * profile.plain:.1f} ms without it. The times below are {profile.clock}.",
        "",
        f"{'part':<22}{'share':>8}{'ms/step':>10}" + "".join(f"{phase:>10}" for phase in PHASES),
    ]
    for part, phases in sorted(profile.by_part().items(), key=lambda item: -sum(item[1].values())):
        own = sum(phases.values())
        numbers = "".join(f"{1e3 * t:>10.2f}" if t else f"{'':>10}" for t in phases.values())
        lines.append(f"{part:<22}{own / profile.total:>8.1%}{1e3 * own:>10.2f}{numbers}".rstrip())
    lines += ["", f"{'operator (own time)':<52}{'share':>8}{'ms/step':>10}{'calls':>8}  most of it in"]
    merged: dict[str, list[Row]] = defaultdict(list)
    for row in profile.rows:
        merged[row.operator].append(row)
    for name, rows in sorted(merged.items(), key=lambda item: -sum(r.seconds for r in item[1]))[:operators]:
        own, calls = sum(r.seconds for r in rows), sum(r.calls for r in rows)
        most = max(rows, key=lambda r: r.seconds)
        name = name if len(name) <= 50 else name[:24] + "…" + name[-25:]
        lines.append(f"{name:<52}{own / profile.total:>8.1%}{1e3 * own:>10.2f}{calls:>8.0f}  {most.part}, {most.phase}")
    return "\n".join(lines) + "\n"


def draw(profile: Profile) -> Any:
    """Milliseconds of a step by part and phase: a matplotlib figure."""
    from matplotlib.figure import Figure  # takes a second to import: not before it is needed

    parts = sorted(profile.by_part().items(), key=lambda item: sum(item[1].values()))
    names = [part for part, _ in parts]
    figure = Figure(figsize=(8, 0.42 * len(parts) + 1.3), layout="constrained", dpi=130)
    axes = figure.subplots()
    left = [0.0] * len(parts)
    for phase, color in PHASES.items():
        widths = [1e3 * phases[phase] for _, phases in parts]
        axes.barh(names, widths, left=left, color=color, label=phase, height=0.68)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, end in enumerate(left):
        axes.text(end, place, f"  {end / 1e3 / profile.total:.1%}", va="center", fontsize=9)
    axes.set_xlim(0, 1.13 * max(left))
    axes.set_xlabel("ms per step, under the profiler")
    axes.set_title(f"One training step: {1e3 * profile.plain:.1f} ms ({profile.on})", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure
