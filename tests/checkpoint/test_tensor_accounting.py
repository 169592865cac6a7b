"""Every tensor of a dense checkpoint is accounted for by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from contract import uneven
from every_type import tiny_type_model
from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, save, score, verify
from secateur.checkpoint.tensor_accounting import account_for_tensors
from secateur.errors import CheckpointError
from secateur.models.manifest import read_manifest
from secateur.models.silence import quiet
from secateur.planning.plan import Plan
from tiny import tiny_model


def cut(model: PreTrainedModel, *, ratio: float = 0.34, **options: Any) -> tuple[PreTrainedModel, Plan]:
    """The model cut by a share of the units of its axes."""
    decided = plan(
        discover(model),
        CutOptions(ratio=ratio, of="units", score="l2", **options),
        config=model.config,
        scores=score(model, name="l2"),
    )
    return prune(model, decided), decided


def fates(model: PreTrainedModel, pruned: PreTrainedModel, decided: Plan) -> dict[str, str]:
    return account_for_tensors(model, pruned, decided, discover(model))


def kinds(found: dict[str, str]) -> dict[str, int]:
    return dict(Counter(fate.split()[0] for fate in found.values()))


def test_widths() -> None:
    model = tiny_model()
    found = fates(model, *cut(model, axes=("mlp",)))
    assert found.keys() == model.state_dict().keys()
    assert kinds(found) == {"kept": 3 * 6 + 3, "cut": 3 * 3}
    assert found["model.layers.1.mlp.down_proj.weight"] == "cut float32 [48, 84] -> [48, 55]"
    assert found["model.layers.1.mlp.up_proj.weight"] == "cut float32 [84, 48] -> [55, 48]"
    assert found["model.norm.weight"] == "kept float32 [48]"


def test_layers() -> None:
    """The number in a name may change; the account says from which dense tensor each comes."""
    model = tiny_model()
    pruned, decided = cut(model, axes=("layers",))
    (dropped,) = decided.sizes.dropped_layers
    found = fates(model, pruned, decided)
    assert kinds(found) == {"kept": 2 * 9 + 3, "dropped": 9}
    after = pruned.state_dict()
    moved = {old: fate.split(" as ")[1] for old, fate in found.items() if " as " in fate}
    assert len(moved) == 9 * (2 - dropped)
    for old, new in moved.items():
        assert torch.equal(model.state_dict()[old], after[new])


def test_hidden_width_keeps_the_tie(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    pruned, decided = cut(model, ratio=0.25, axes=("hidden",))
    found = fates(model, pruned, decided)
    assert found["lm_head.weight"] == "tied to model.embed_tokens.weight"
    assert found["model.embed_tokens.weight"] == "cut float32 [300, 48] -> [300, 36]"
    save(pruned, tmp_path / "out", plan=decided)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert "lm_head.weight" not in (manifest["model.safetensors"].tensors or {})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_sublayers_that_go_as_a_whole(tmp_path: Path) -> None:
    model = tiny_model()
    options = CutOptions(ratio=0.5, score="l2", scope="global", shape="per-layer", sublayers=True, min_keep=0.0)
    decided = plan(discover(model), options, config=model.config, scores=score(model, name="l2"))
    assert decided.sizes.emptied
    pruned = prune(model, decided)
    found = fates(model, pruned, decided)
    assert kinds(found)["dropped"] >= 3
    save(pruned, tmp_path / "out", plan=decided)
    assert verify(tmp_path / "out").problems == ()


def test_other_values_are_told_from_the_same() -> None:
    model = tiny_model()
    pruned, decided = cut(model, axes=("mlp",))
    weight = pruned.get_parameter("model.layers.0.self_attn.q_proj.weight")
    pruned.get_submodule("model.layers.0.self_attn.q_proj").weight = nn.Parameter(weight.detach().clone())
    assert kinds(fates(model, pruned, decided)).get("fitted") is None
    pruned.get_parameter("model.layers.0.self_attn.q_proj.weight").data[0, 0] += 1
    found = fates(model, pruned, decided)
    assert found["model.layers.0.self_attn.q_proj.weight"] == "fitted float32 [96, 48]"


@pytest.mark.parametrize("make", [lambda: tiny_type_model("mixtral"), lambda: family_model(family_config("gpt2"))])
def test_experts_and_fused_projections(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    with quiet():
        model = make()
    decided = uneven(model, ("attention", "mlp", "expert_mlp"))
    pruned = prune(model, decided)
    found = fates(model, pruned, decided)
    assert found.keys() == model.state_dict().keys()
    assert kinds(found)["cut"] > 0
    save(pruned, tmp_path / "out", plan=decided)
    assert verify(tmp_path / "out").problems == ()


def test_what_has_no_place_in_the_model() -> None:
    model = tiny_model()
    pruned, decided = cut(model, axes=("mlp",))
    found = account_for_tensors(model, pruned, decided, discover(model), unplaced=["visual.patch.weight"])
    assert found["visual.patch.weight"] == "unplaced"
    assert len(found) == len(model.state_dict()) + 1


def test_what_cannot_be_accounted_for() -> None:
    model = tiny_model(tie_word_embeddings=True)
    pruned, decided = cut(model, axes=("mlp",))

    def lost(other: Any) -> None:
        del other.model.norm.weight

    def added(other: Any) -> None:
        other.model.norm.bias = nn.Parameter(torch.zeros(48))

    def grown(other: Any) -> None:
        other.model.norm.weight = nn.Parameter(torch.ones(50))

    def untied(other: Any) -> None:
        other.lm_head.weight = nn.Parameter(other.lm_head.weight.detach().clone())

    def halved(other: Any) -> None:
        other.model.norm.half()

    for change, match in (
        (lost, r"lacks model\.norm\.weight, and the plan drops no block around it"),
        (added, r"has model\.norm\.bias, which no tensor of the dense model became"),
        (grown, r"has model\.norm\.weight as \[50\], the dense one \[48\]"),
        (untied, r"has \S+ apart from \S+, to which it was tied"),
        (halved, r"has model\.norm\.weight in torch\.float16, the dense one in torch\.float32"),
    ):
        other = copy.deepcopy(pruned)
        change(other)
        with pytest.raises(CheckpointError, match=match):
            fates(model, other, decided)
