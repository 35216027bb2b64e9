"""What each removed cost was: the new way against the old one, in turn, in CPU seconds of one thread.

    OMP_NUM_THREADS=1 python experiments/training-speed/costs.py [elara_nano ...]   # minutes; prints a table

Attention before: norms, RoPE, scores in float32, masks and zero gradients of slices by autograd (the path that remains
for long sequences and for GPUs). Experts before: gather, weigh and sum as operations of their own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from steps import MODELS, training_step
from torch import Tensor

from elara.model import attention, moe

NEW = {"attention": attention.KEPT_LIMIT, "experts": (moe._Combine, moe._total)}


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ys: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.rows = len(ys)
        return ys.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slot,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, slot, grad), None


class _OldCombine:
    @staticmethod
    def apply(ys: Tensor, slot: Tensor, gates: Tensor) -> Tensor:
        picked: Tensor = _Collect.apply(ys, slot).view(*gates.shape, -1)
        return (picked * gates.to(ys.dtype).unsqueeze(-1)).sum(1)


def switch(what: str, new: bool) -> None:
    """Take the new way or the old one."""
    if what == "attention":
        attention.KEPT_LIMIT = NEW["attention"] if new else 0
    else:
        moe._Combine, moe._total = NEW["experts"] if new else (_OldCombine, lambda x: x.sum(1))  # type: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print("| whole step of | | removed from | before | after | ratio (lowest, highest) |\n|---|---|---|---|---|---|")
    for name in args.models:
        for narrow in (True, False):
            _, step = training_step(name, narrow)
            for what in ("attention", "experts"):
                found: dict[bool, list[float]] = {False: [], True: []}
                for counted in range(-1, args.rounds):
                    for new in (False, True):
                        switch(what, new)
                        step()  # settles caches
                        begin = time.process_time()
                        for _ in range(2):
                            step()
                        if counted >= 0:
                            found[new].append((time.process_time() - begin) / 2)
                ratios = [after / before for before, after in zip(found[False], found[True], strict=True)]
                before, after = (1e3 * statistics.median(found[new]) for new in (False, True))
                print(
                    f"| {name} | {'bf16' if narrow else 'fp32'} | {what} | {before:.0f} ms | {after:.0f} ms "
                    f"| {statistics.median(ratios):.3f} ({min(ratios):.3f}, {max(ratios):.3f}) |", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()
