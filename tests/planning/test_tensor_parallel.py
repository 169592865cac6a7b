"""Plans for several GPUs: every layer can be split over them, whatever the scores say, or one error says why not."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from secateur import CutOptions, discover, plan
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.export.serving import tensor_parallel_sizes
from secateur.planning.plan import Plan
from secateur.scoring.scores import Scores

SIZES = {"hidden_size": 72, "num_hidden_layers": 3, "vocab_size": 64}


def config(kv_heads: int, queries: int, width: int) -> Any:
    heads = {"num_attention_heads": kv_heads * queries, "num_key_value_heads": kv_heads, "head_dim": 8}
    return AutoConfig.for_model("llama", **SIZES, **heads, intermediate_size=width)


@cache
def discovered(kv_heads: int, queries: int, width: int) -> Discovery:
    return discover(config(kv_heads, queries, width))


def kept(discovery: Discovery, planned: Plan, kind: str) -> list[int]:
    """Of the groups of a kind in all layers, cut or not."""
    sizes = {group.name: group.kept for group in planned.groups}
    return [sizes.get(group.name, group.units) for group in discovery.groups if group.kind == kind]


@given(
    st.sampled_from([(3, 3, 200), (4, 2, 96), (6, 1, 130), (6, 2, 257)]),
    st.sampled_from([2, 3, 4]),
    st.sampled_from([{"scope": "local"}, {"shape": "uniform"}, {}, {"of": "units"}, {"round_to": 8}]),
    st.integers(0, 3),
)
@settings(max_examples=40)
def test_every_layer_divides(sizes: tuple[int, int, int], gpus: int, options: dict[str, Any], seed: int) -> None:
    discovery = discovered(*sizes)
    generator = torch.Generator().manual_seed(seed)
    units = {g.name: torch.rand(g.units, generator=generator) ** 4 for g in discovery.groups if g.layer is not None}
    try:
        planned = plan(
            discovery,
            CutOptions(ratio=0.5, tensor_parallel=gpus, **options),
            config=config(*sizes),
            scores=Scores("fisher", "sum", units),
        )
    except PlanError as error:
        assert sizes[0] < gpus  # more GPUs than KV heads, which do not divide them, either
        assert "The nearest that can be is tensor_parallel=" in str(error)  # noqa: PT017
        return
    assert all(width % gpus == 0 for width in kept(discovery, planned, "mlp"))
    assert all(heads % gpus == 0 for heads in kept(discovery, planned, "attention"))
    if planned.settings is not None:
        smaller = config(*sizes)
        smaller.update(planned.settings)
        assert gpus in tensor_parallel_sizes(smaller)


def test_kv_heads_are_repeated_where_gpus_are_a_multiple() -> None:
    discovery = discovered(2, 4, 96)
    planned = plan(discovery, CutOptions(ratio=0.2, tensor_parallel=4))
    assert kept(discovery, planned, "attention") == [2, 2, 2]
    assert all(width % 4 == 0 for width in kept(discovery, planned, "mlp"))


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ((3, 3, 200), {"tensor_parallel": 4}, r"layers\.0\.attention has 3 units \(attention\), too few.*parallel=3"),
        (
            (3, 3, 200),
            {"tensor_parallel": 2, "axes": ("mlp",)},
            r"attention has 3 units \(attention\), no multiple of it, and these axes do not cut them.*parallel=1",
        ),
        ((2, 3, 200), {"tensor_parallel": 4}, r"attention has 2 units.*is tensor_parallel=2"),  # of 6 query heads
        (
            (3, 3, 200),
            {"tensor_parallel": 2, "ratio": 0.01},
            r"alone removes more than ratio=0\.01.*use ratio=0\.0806 or more",
        ),
        ((3, 3, 200), {"tensor_parallel": 0}, r"tensor_parallel=0 is too small"),
    ],
)
def test_what_cannot_be(sizes: tuple[int, int, int], options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan(discovered(*sizes), CutOptions(**{"ratio": 0.3, **options}))
