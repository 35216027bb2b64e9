"""The tensors of a file: all of the checkpoint, once, under llama.cpp's names."""

from collections import Counter

import pytest
import torch

from elara.export.layout import COMPACT, UNROLLED, effective_layers, pieces
from elara.size.files import exported_tensors
from tests.export.conftest import config

NOT_UNROLLED = ("diffusion", "chain")


@pytest.mark.parametrize("order", ["block", "stack"])
@pytest.mark.parametrize("moe", [True, False])
@pytest.mark.parametrize("architecture", [UNROLLED, COMPACT])
def test_names_and_shapes_are_those_that_the_size_report_counts(architecture: str, moe: bool, order: str) -> None:
    built = config(moe=moe, order=order, depth=3, model__vocab_size=128)
    ours = {name: piece.shape for piece in pieces(built, architecture, 3) for name in piece.names}
    counted = {name: shape for name, _, shape in exported_tensors(built, unrolled=architecture == UNROLLED)}
    assert {name: shape for name, shape in ours.items() if not name.startswith(NOT_UNROLLED)} == counted
    assert any(name.startswith(NOT_UNROLLED) for name in ours) == (architecture == COMPACT)


@pytest.mark.parametrize("num_shared", [0, 1, 2])
def test_a_compact_file_holds_every_weight_once(num_shared: int) -> None:
    from elara.model import ElaraLM

    built = config(model__vocab_size=128, moe__num_shared=num_shared)
    weights = ElaraLM(built).state_dict()
    seen = {name: torch.zeros(value.shape) for name, value in weights.items()}
    for piece in pieces(built, COMPACT, built.trm.depth):
        assert piece.weight is not None and len(piece.names) == 1
        assert tuple(weights[piece.weight][piece.index].shape) == piece.shape
        seen[piece.weight][piece.index] += 1
    assert all((value == 1).all() for value in seen.values())


def test_without_a_shared_expert_llama_cpp_gets_one_of_zeros() -> None:
    built = config(model__vocab_size=128, moe__num_shared=0)
    empty = [piece for piece in pieces(built, UNROLLED, 2) if piece.weight is None]
    names = sorted(name.partition(".ffn_")[2] for piece in empty for name in piece.names)
    assert names == ["down_shexp.weight"] * 2 + ["gate_shexp.weight"] * 2 + ["up_shexp.weight"] * 2


def test_passes_follow_the_order_of_recursion() -> None:
    block, stack = config(order="block"), config(order="stack")
    assert [effective_layers(block, i, 3, UNROLLED) for i in (0, 1)] == [[0, 1, 2], [3, 4, 5]]
    assert [effective_layers(stack, i, 3, UNROLLED) for i in (0, 1)] == [[0, 2, 4], [1, 3, 5]]
    assert effective_layers(stack, 1, 3, COMPACT) == [1]


def test_a_deeper_file_repeats_the_last_selection_bias() -> None:
    built = config(model__vocab_size=128, trm__sample_depth=[1, 3])
    rows = [piece.index for piece in pieces(built, UNROLLED, 5) if "exp_probs_b" in piece.names[0]]
    assert rows == [(0,), (1,), (2,), (2,), (2,)]
    (compact,) = [piece for piece in pieces(built, COMPACT, 5) if "exp_probs_b" in piece.names[0]]
    assert compact.index == ([0, 1, 2, 2, 2],) and compact.shape == (5, 4)
    (shallow,) = [piece for piece in pieces(built, COMPACT, 1) if "exp_probs_b" in piece.names[0]]
    assert shallow.shape == (3, 4)  # none of the trained rows is lost


def test_no_name_is_given_twice() -> None:
    built = config(model__vocab_size=128, depth=3, order="stack")
    counts = Counter(name for piece in pieces(built, UNROLLED, 3) for name in piece.names)
    assert max(counts.values()) == 1


def test_a_tied_diffusion_head_is_not_written_again() -> None:
    built = config(model__vocab_size=128, tidar__tie_head=True, tidar__chain=False)
    names = [name for piece in pieces(built, COMPACT, 2) for name in piece.names]
    assert not [name for name in names if name.startswith(NOT_UNROLLED)]
