"""What a written token costs: caching, modes, forwards of several tokens, fewer bits per weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from elara.bench.graph import DecodeGraph
from elara.bench.limits import against_bandwidth, bandwidth
from elara.bench.measure import Figure, Run, compare, figure, race
from elara.config import ElaraConfig, TiDARConfig
from elara.decoding import Controller, SamplingConfig, calibrate, generate
from elara.model import ElaraLM, KVCache, MaskSection, convert
from elara.model.moe import Router

DRAFT_LENGTHS = (2, 4, 8)
BATCHES = (1, 4, 16)
ROUTINGS = ("token", "block", "anchor", "shared")  # shared: all tokens of a step by the same experts, a bound
ON_END = 6  # steps of forward_cost in a row


@dataclass
class Trained:
    """A model to measure instead of random weights, and the id of its [MASK]."""

    model: ElaraLM
    mask_id: int
    name: str


def against_no_cache(config: ElaraConfig, device: torch.device, rounds: int, new_tokens: int = 256) -> Iterator[Figure]:
    """Greedy decoding with the KV cache against running the whole text again for every token."""
    model = ElaraLM(replace(config, tidar=TiDARConfig())).to(device).eval()
    prompt = _prompts(config, [8])

    @torch.no_grad()
    def uncached() -> None:
        text = torch.tensor(prompt, device=device)
        for _ in range(new_tokens):
            logits = model.ar_head(model(text).hidden[:, -1])
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)

    found = compare(
        "decoding with KV cache: speed-up over none",
        _write(model, prompt, new_tokens),
        uncached,
        target=10.0,
        faster=True,
        rounds=rounds,
        note=f"{new_tokens} new tokens, fp32",
    )
    yield against_bandwidth(found, model, new_tokens)


def precision(config: ElaraConfig, device: torch.device, rounds: int, new_tokens: int = 16) -> Iterator[Figure]:
    """Greedy decoding at batch 1 with weights in fewer bits; what a token must read is counted in those bits."""
    names = ["float32", "bfloat16"] + (["int8", "int4"] if device.type == "cpu" else [])
    exact = ElaraLM(replace(config, tidar=TiDARConfig())).to(device)
    models = {name: convert(copy.deepcopy(exact), name) for name in names}
    prompt = _prompts(config, [1])  # read in one forward like any other token
    seconds = race({name: _write(model, prompt, new_tokens) for name, model in models.items()}, rounds)
    limit = bandwidth(device)
    targets = {("bfloat16", "float32"): None, ("int8", "bfloat16"): None, ("int4", "bfloat16"): 1.3,
               ("int4", "float32"): 2.0}  # fmt: skip
    for (name, reference), target in targets.items():
        if name in models:
            found = figure(
                f"{name} weights: speed-up over {reference}",
                seconds[name],
                seconds[reference],
                target=target,
                faster=True,
                note=f"{_millions(models['float32'])}, batch 1, {new_tokens} tokens",
            )
            yield against_bandwidth(found, models[name], new_tokens, limit=limit)


def graph(config: ElaraConfig, device: torch.device, rounds: int, new_tokens: int = 64) -> Iterator[Figure]:
    """A GPU at batch 1 in bf16: the step as one CUDA graph against the same step launched kernel by kernel."""
    model = convert(ElaraLM(replace(config, tidar=TiDARConfig())).to(device), "bfloat16")
    prompt = _prompts(config, [32])[0]
    captured = DecodeGraph(model, prompt, new_tokens, capture=device.type == "cuda")
    eager = DecodeGraph(model, prompt, new_tokens, capture=False)
    found = compare(
        "CUDA graph of a decoding step: speed-up over single kernels",
        captured.write,
        eager.write,
        faster=True,
        rounds=rounds,
        note=f"{_millions(model)}, bf16, batch 1",
    )
    yield against_bandwidth(found, model, new_tokens, target=0.5)


def modes(
    config: ElaraConfig, device: torch.device, rounds: int, trained: Trained | None = None, new_tokens: int = 24
) -> Iterator[Figure]:
    """Greedy TiDAR by draft length and batch, prompts of ragged lengths, against plain AR on the same prompts.

    `auto` is the controller, calibrated beforehand. With random weights hardly a draft stands, which is the worst case;
    the ratio grows with the tokens per forward. A trained model begins with texts of its own and writes four times as
    much.
    """
    target, own_text = (None, False) if trained is None else (0.97, True)
    if trained is None:
        trained = Trained(ElaraLM(config).to(device).eval(), config.vocab_size - 1, "random weights")
    model, mask_id = trained.model, trained.mask_id
    new_tokens *= 4 if own_text else 1
    for batch in BATCHES:
        prompts = _prompts(model.config, [16 + 7 * row % 32 for row in range(batch)])
        if own_text:
            prompts = _own_text(model, mask_id, prompts)
        controller = Controller(calibrate(model, mask_id, batch=batch, context=32, seconds=1.0))
        runs: dict[str, Run] = {"ar": _write(model, prompts, new_tokens)}
        for length in DRAFT_LENGTHS:
            runs[str(length)] = _write(model, prompts, new_tokens, mask_id, length)
        runs["auto"] = _write(model, prompts, new_tokens, mask_id, controller=controller)
        seconds = race(runs, rounds)
        for name in (*map(str, DRAFT_LENGTHS), "auto"):
            forwards = runs[name]()
            assert isinstance(forwards, int)
            found = figure(
                f"tidar, {'auto' if name == 'auto' else 'drafts of ' + name}, batch {batch}: speed-up over ar",
                seconds[name],
                seconds["ar"],
                target=target if name == "auto" else None,
                faster=True,
                note=f"{trained.name}, {new_tokens / forwards:.2f} tokens per forward",
            )
            found.tokens_per_second = batch * new_tokens / found.subject
            if name != "auto":
                found.series, found.at = f"tidar over ar, batch {batch}", int(name)
            yield found


def forward_cost(name: str, config: ElaraConfig, device: torch.device, rounds: int) -> Iterator[Figure]:
    """One TiDAR step of L drafted tokens and their L groups of L masks, heads included, against one token's step.

    The cache holds a quarter of the context, at most 256 tokens. In bf16, random weights; the same ones under every
    routing of the masks. The last one sends every token to the same experts: no way of sharing them can cost less.
    """
    model = ElaraLM(config).to(device)
    size = _millions(model)
    model = convert(model, "bfloat16")
    held = min(256, config.model.context_length // 4)
    routings = ROUTINGS if config.moe_layers else ROUTINGS[:1]
    runs: dict[str, Run] = {"one token": _step(model, held, 0)}  # the same under every routing
    for routing in routings:
        twin = copy.copy(model)  # shares the weights
        trained = "anchor" if routing == "shared" else routing
        twin.config = replace(config, tidar=replace(config.tidar, draft_routing=trained))
        for length in DRAFT_LENGTHS:
            step = _step(twin, held, length)
            runs[f"{routing} {length}"] = _with_one_choice(model, step) if routing == "shared" else step
    seconds = race(runs, rounds)
    for routing in routings:
        for length in DRAFT_LENGTHS:
            new = length * (length + 1)
            found = figure(
                f"{name}: step of {new} tokens / 1, {routing} routing",
                seconds[f"{routing} {length}"],
                seconds["one token"],
                note=f"drafts of {length}, {size}, bf16, {held} in the cache",
            )
            found.series, found.at = f"{name}, {routing} routing", new
            yield found


def _with_one_choice(model: ElaraLM, run: Run) -> Run:
    """The same with every token sent to the first experts."""
    top_k = model.config.moe.top_k
    biases = [router.selection_bias[:, :top_k] for router in model.modules() if isinstance(router, Router)]

    def biased() -> None:
        for bias in biases:
            bias += 10  # scores are below 1
        run()
        for bias in biases:
            bias.zero_()

    return biased


def _step(model: ElaraLM, held: int, length: int) -> Run:
    """ON_END forwards behind `held` tokens that come back to them: of one token, or of `length` with their masks.

    Several on end, as in decoding: one plain step between large ones would find its weights out of the cache.
    """
    config, device = model.config, model.embed.weight.device
    room = held + (length or 1) * (length + 1)
    cache = KVCache(config, 1, room, dtype=model.embed.weight.dtype, device=device)
    with torch.inference_mode():
        model(torch.tensor(_prompts(config, [held]), device=device), cache=cache)
    drafts = torch.tensor(_prompts(config, [max(1, length)] * ON_END), device=device)
    section = None
    if length:
        starts = torch.arange(held + 1, held + 1 + length)
        section = MaskSection(starts, length, torch.zeros(1, length * length, dtype=torch.long, device=device))

    @torch.inference_mode()
    def run() -> None:
        for tokens in drafts.split(1):
            cache.truncate([held])
            output = model(tokens, section=section, cache=cache)
            model.ar_head(output.hidden).argmax(-1)
            if output.mask_hidden is not None and length > 1:
                masks = output.mask_hidden[:, 1:length]
                model.diffusion_head(masks, *([tokens[:, 1:]] if config.tidar.chain else [])).argmax(-1)

    return run


def _write(
    model: ElaraLM,
    prompts: list[list[int]],
    new_tokens: int,
    mask_id: int | None = None,
    draft_length: int | None = None,
    controller: Controller | None = None,
) -> Run:
    """Greedy generation, by tidar with a draft length or a controller, else by ar; a call returns its forwards."""
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=new_tokens, draft_length=draft_length)
    mode = "ar" if mask_id is None else "tidar"

    def run() -> int:
        steps = generate(model, prompts, sampling, mode=mode, mask_id=mask_id, controller=controller)
        return sum(1 for _ in steps)

    return run


def _own_text(model: ElaraLM, mask_id: int, prompts: list[list[int]]) -> list[list[int]]:
    """What the model writes behind each prompt's first token, as much as the prompt was long."""
    texts: list[list[int]] = []
    allowed = torch.arange(model.config.vocab_size, device=model.embed.weight.device) < mask_id  # text alone
    for row, prompt in enumerate(prompts):
        sampling = SamplingConfig(temperature=0.8, max_new_tokens=len(prompt), seed=row)
        steps = generate(model, [[prompt[0] % mask_id]], sampling, mode="ar", allowed=allowed)
        texts.append([token for step in steps for token in step.tokens[0]])
    return texts


def _prompts(config: ElaraConfig, lengths: list[int]) -> list[list[int]]:
    """Random ids, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in lengths]


def _millions(model: ElaraLM) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
