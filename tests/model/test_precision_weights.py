"""bfloat16, int8 and int4 weights: near float32, each row by itself, on every kind of block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from elara.config import PRECISIONS
from elara.decoding import SamplingConfig, generate
from elara.errors import ElaraError
from elara.model import ElaraLM, KVCache, convert, draw_section
from elara.model.moe import MoE
from elara.model.precision import GROUP, PackedInt4, pack, quantize_int4

SIZES = {"n_embd": 64, "hidden": 96, "expert_hidden": 64, "vocab_size": 64, "block_length": 4, "init_std": 0.08}
REDUCED = PRECISIONS[1:]
TOLERANCE = {"bfloat16": 0.02, "int8": 0.04, "int4": 0.25}  # relative error of a random model's hidden states


def relative(near: torch.Tensor, exact: torch.Tensor) -> float:
    return float((near.float() - exact).norm() / exact.norm())


def experts_block(model: ElaraLM) -> MoE:
    block: Any = model.blocks[1]
    assert isinstance(block.mlp, MoE)
    return block.mlp


def run(model, tokens):
    section = draw_section(tokens, model.config.tidar, 63, torch.Generator().manual_seed(0))[0]
    with torch.inference_mode():
        output = model(tokens, section=section)
        return model.ar_head(output.hidden), model.diffusion_head(output.mask_hidden)


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("options", [{"num_experts": 0}, {"depth": 2}, {"bias": True, "tie_head": True}])
def test_logits_are_near_float32(make_model, options, precision):
    exact = make_model(dtype=torch.float32, **SIZES, **options)
    tokens = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(0))
    near = convert(copy.deepcopy(exact), precision)
    if not options.get("num_experts", 1):  # elsewhere near-ties choose other experts
        for have, want in zip(run(near, tokens), run(exact, tokens), strict=True):
            assert have.dtype == torch.bfloat16
            assert relative(have, want) < TOLERANCE[precision]
    else:
        have, want = (torch.cat(run(model, tokens), 1).float().log_softmax(-1) for model in (near, exact))
        assert F.kl_div(have, want, log_target=True, reduction="none").sum(-1).median() < 0.02


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 64), (576, 192), (80, 4096), (2112, 64)])
@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_a_packed_matrix_multiplies_like_its_float(outputs, inputs, precision, rows):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    packed = pack(weight, bias, precision)
    error = relative(packed(x), F.linear(x.float(), weight, bias))
    assert error < {"bfloat16": 0.005, "int8": 0.02, "int4": 0.09}[precision]
    assert packed(x[None]).shape == (1, rows, outputs)
    wide = torch.cat([x, x], 1)[:, inputs:]  # a view, as decoding slices its hidden states
    assert torch.equal(packed(wide), packed(x)) and torch.equal(packed(x.T.contiguous().T), packed(x))


def test_int4_is_exact_for_weights_on_a_grid():
    """Sixteen levels with a power of two between them are represented without any error."""
    levels = torch.randint(0, 16, (32, 64), generator=torch.Generator().manual_seed(0))
    levels[:, ::GROUP], levels[:, 1::GROUP] = 0, 15  # every group has its full range
    weight = (levels - 8) * 0.25
    x = torch.randint(-3, 4, (3, 64), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(PackedInt4(weight, None)(x).float(), (x @ weight.T).bfloat16().float())


def test_least_squares_beats_the_range():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    levels, scales = quantize_int4(weight)
    scale, zero = scales.float().transpose(0, 1)[..., None].unbind(2)
    fitted = ((levels.view(64, -1, GROUP) - 8) * scale + zero).view(64, 256)
    groups = weight.view(64, -1, GROUP)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    ranged = ((groups - low) / step).round().mul(step).add(low).view(64, 256)
    assert relative(fitted, weight) < 0.96 * relative(ranged, weight)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_weights_survive(value):
    weight, x = torch.full((16, 32), value), torch.ones(1, 32)
    for precision in ("int8", "int4"):
        have = pack(weight, None, precision)(x.bfloat16()).float()
        torch.testing.assert_close(have, x @ weight.T, rtol=2**-7, atol=0)  # two roundings to bf16


@pytest.mark.parametrize("precision", REDUCED)
def test_a_row_does_not_depend_on_its_neighbours(precision):
    """A token's large activations must not coarsen those of the others: batches and drafts would change the text."""
    generator = torch.Generator().manual_seed(0)
    packed = pack(torch.randn(64, 96, generator=generator), None, precision)
    x = torch.randn(6, 96, generator=generator).bfloat16()
    alone = torch.cat([packed(row) for row in x.split(1)])
    x[3] *= 1000
    together = packed(x)
    keep = torch.arange(6) != 3
    torch.testing.assert_close(together[keep], alone[keep], rtol=0.01, atol=0.02)
    zero = packed(torch.zeros(2, 96, dtype=torch.bfloat16))
    assert not zero.any()


@pytest.mark.parametrize(("outputs", "inputs"), [(24, 32), (16, 40)])
def test_sizes_that_int4_cannot_take_stay_bfloat16(outputs, inputs):
    weight = torch.randn(outputs, inputs)
    linear = pack(weight, None, "int4")
    x = torch.randn(3, inputs).bfloat16()
    assert torch.equal(linear(x), F.linear(x, weight.bfloat16()))


@pytest.mark.parametrize("precision", REDUCED)
def test_the_router_stays_float32_and_the_lookup_bfloat16(make_model, precision):
    model = convert(make_model(dtype=torch.float32, **SIZES), precision)
    router = experts_block(model).router
    assert router.weight.dtype == router.selection_bias.dtype == torch.float32
    assert model.embed.weight.dtype == model.norm.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_packed_weights_take_their_bits(make_model):
    """5/8 of a byte per weight in int4: half a byte, and 4 bytes of scale and zero per group of 32."""
    sizes = {"n_embd": 64, "hidden": 256, "expert_hidden": 256, "vocab_size": 64, "n_kv_head": 4}
    exact = make_model(dtype=torch.float32, **sizes)
    experts = experts_block(exact).experts
    count = experts.gate_up.numel() + experts.down.numel()
    packed = experts_block(convert(exact, "int4")).experts
    assert sum(t.nbytes for t in packed.buffers()) == count * 5 // 8


@pytest.mark.parametrize("precision", REDUCED)
def test_decoding_with_the_cache_follows_the_full_pass(make_model, precision):
    model = convert(make_model(dtype=torch.float32, num_experts=0, depth=2, **SIZES), precision)
    tokens = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(tokens).hidden
        cache = KVCache(model.config, 1, 20, depth=2, dtype=torch.bfloat16)
        steps = torch.cat([model(part, cache=cache).hidden for part in tokens.split(5, 1)], 1)
    assert relative(steps, whole.float()) < 0.03


@pytest.mark.parametrize("precision", REDUCED)
@pytest.mark.parametrize("mode", ["ar", "tidar"])
def test_generation_runs_in_every_mode(make_model, precision, mode):
    model = convert(make_model(dtype=torch.float32, **SIZES), precision)
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=12)
    steps = list(generate(model, [[1, 2, 3], [4, 5]], greedy, mode=mode, mask_id=63))
    assert [sum(len(step.tokens[row]) for step in steps) for row in (0, 1)] == [12, 12]


def test_refusals(make_model):
    model = make_model(dtype=torch.float32)
    with pytest.raises(ElaraError, match="precision=int3 must be one of: float32, bfloat16, int8, int4"):
        convert(model, "int3")
    with pytest.raises(ElaraError, match="precision=int4 needs the CPU so far, not meta: use bfloat16 there"):
        convert(model.to("meta"), "int4")
