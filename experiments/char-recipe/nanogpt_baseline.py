"""nanoGPT's CPU recipe for Shakespeare characters, as the yardstick of this study, in one plain loop.

4 layers, 4 heads, n_embd 128, context 64, batch 12, 2000 steps, AdamW 1e-3 -> 1e-4 cosine with 100 warm-up steps,
betas (0.9, 0.99), weight decay 0.1, clip 1.0, no dropout, LayerNorm, GELU, learned positions, no biases, tied head.
    python experiments/char-recipe/nanogpt_baseline.py PATH_TO_TEXT [steps]
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS, HEADS, WIDTH, CONTEXT, BATCH = 4, 4, 128, 64, 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, HEADS, -1).transpose(1, 2) for t in self.qkv(self.ln1(x)).split(C, 2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.ln = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * LAYERS) if name.endswith(("proj.weight", "down.weight")) else 0.02
                nn.init.normal_(p, std=std)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(F.linear(self.ln(h), self.wte.weight).flatten(0, 1), y.flatten())


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    torch.manual_seed(1337)
    chars = sorted(set(text))
    ids = torch.tensor([chars.index(c) for c in text])
    train, val = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    model = GPT(len(chars))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], 1e-3, betas=(0.9, 0.99)
    )

    @torch.no_grad()
    def evaluate() -> float:
        rows = len(val[:-1]) // CONTEXT
        x, y = val[: rows * CONTEXT].view(rows, CONTEXT), val[1 : rows * CONTEXT + 1].view(rows, CONTEXT)
        return sum(model(a, b).item() * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)) / rows

    seconds = 0.0
    for step in range(steps):
        begin = time.perf_counter()
        progress = (step - 100) / 1900
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - CONTEXT, (BATCH,))
        rows = train[starts[:, None] + torch.arange(CONTEXT + 1)]
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.perf_counter() - begin
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(f"step {step + 1}  train time {seconds:.1f} s  val loss {evaluate():.4f}", flush=True)


if __name__ == "__main__":
    main()
