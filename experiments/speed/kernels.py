"""Products and attention of few rows on this CPU, in turn: microseconds by kernel, medians of 25 rounds, one thread.

python experiments/speed/kernels.py
"""

import statistics
import time

import torch
import torch.nn.functional as F

from elara.model.precision import pack

ROUNDS, ON_END = 25, 20
SIZES = [(768, 256), (2048, 1024)]  # outputs, inputs


def race(runs):
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(ON_END):
                run()
            seconds[name].append((time.perf_counter() - begin) / ON_END)
    return {name: 1e6 * statistics.median(taken[1:]) for name, taken in seconds.items()}


def show(label, runs):
    print(f"{label}: " + ", ".join(f"{name} {micros:.0f}" for name, micros in race(runs).items()), flush=True)


def main():
    torch.set_num_threads(1)
    for outputs, inputs in SIZES:
        weight = torch.randn(outputs, inputs)
        narrow = weight.bfloat16()
        packed = {name: pack(weight, None, name) for name in ("bfloat16", "int8", "int4")}
        for rows in (1, 4, 12, 20, 64):
            x = torch.randn(rows, inputs)
            y = x.bfloat16()
            runs = {
                "fp32 torch": lambda x=x, w=weight: F.linear(x, w),
                "fp32 oneDNN": lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
                "bf16 torch": lambda y=y, w=narrow: F.linear(y, w),
            }
            runs |= {f"{name} packed": lambda y=y, layer=layer: layer(y) for name, layer in packed.items()}
            show(f"{rows} rows x {inputs} -> {outputs}", runs)
    for queries in (1, 4, 20):
        q, k, v = (torch.randn(1, 4, count, 64).bfloat16() for count in (queries, 130, 130))
        wide = [t.float() for t in (q, k, v)]
        show(
            f"attention of {queries} over 130, 4 heads of 64",
            {
                "bf16": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
                "bf16 by matmuls": lambda q=q, k=k, v=v: (q @ k.transpose(2, 3)).softmax(-1) @ v,
                "cast to fp32": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(
                    q.float(), k.float(), v.float()
                ).bfloat16(),
                "fp32": lambda wide=wide: F.scaled_dot_product_attention(*wide),
            },
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
