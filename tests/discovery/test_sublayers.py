"""Attention or MLP of a layer gone as a whole: as the masked model, with a cache and without, in its folder too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, save
from secateur.cli.main import run
from secateur.discovery.counting import count_parameters
from secateur.discovery.groups import Discovery
from secateur.discovery.sublayers import is_removable, sublayer_of
from secateur.errors import PlanError
from secateur.files import PLAN_FILE
from secateur.models.loading import load
from secateur.models.modeling_per_layer import Skipped, skip_in_place
from secateur.planning.plan import Plan, PlannedGroup, read_plan
from secateur.pruning.reconstruct import LayerTraining, reconstruct_in_place
from secateur.pruning.repair import repair
from secateur.scoring.scores import Scores
from tiny import write_tiny

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
WINDOWS = torch.randint(3, 97, (16, 16), generator=torch.Generator().manual_seed(1))


def emptied(discovery: Discovery, *names: str, **kept: int) -> Plan:
    groups = [(discovery.group(name), 0) for name in names]
    groups += [(discovery.group(name.replace("_", ".")), units) for name, units in kept.items()]
    planned = [PlannedGroup(g.name, g.kind, g.layer, g.units, n, tuple(range(n))) for g, n in groups]
    return Plan(
        discovery.model, CutOptions(ratio=0.2, shape="per-layer", scope="global", min_keep=0.0), tuple(planned), {}, {}
    )


def removable(discovery: Discovery) -> list[str]:
    return [group.name for group in discovery.groups if is_removable(discovery, group)]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def masked(model: PreTrainedModel, discovery: Discovery, names: list[str]) -> Tensor:
    """The logits of the dense model, whose sub-layers give their last bias alone, by hooks."""
    handles = []
    for name in names:
        path = sublayer_of(discovery, discovery.group(name))
        assert path is not None
        module = model.get_submodule(path)
        # The last matrix is the one with as many outputs as there are hidden features.
        last = [m for m in module.modules() if getattr(m, "weight", torch.empty(0)).dim() == 2][-1]
        handles.append(last.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),)))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_sublayer_goes_as_a_whole(family: str, tmp_path: Path) -> None:
    model = family_model(family_config(family), dtype=torch.float64)
    model.set_attn_implementation("eager")
    discovery = discover(model)
    names = removable(discovery)
    assert "layers.0.attention" not in names
    assert "layers.0.mlp" in names
    assert "layers.2.attention" in names
    chosen = ["layers.1.attention", "layers.2.mlp"]
    decided = emptied(discovery, *chosen, layers_0_mlp=5)
    smaller = prune(model, decided, discovery=discovery)
    assert sum(isinstance(module, Skipped) for module in smaller.modules()) == 2
    sizes = {group.name: group.kept for group in decided.groups}
    assert sum(parameter.numel() for parameter in smaller.parameters()) == count_parameters(discovery, sizes)
    only = prune(model, emptied(discovery, *chosen), discovery=discovery)
    assert torch.allclose(logits(only), masked(model, discovery, chosen), atol=1e-10)
    # In a folder, and read from it by transformers alone.
    save(smaller, tmp_path / "out", plan=decided)
    for again in (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True, dtype=torch.float64, attn_implementation="eager"
        ).eval(),
        load(str(tmp_path / "out"), dtype="float64"),
    ):
        again.set_attn_implementation("eager")
        close = 1e-3 if family == "gemma2" else 1e-6  # its embedding is scaled by a number in half precision
        assert torch.allclose(logits(again), logits(smaller), atol=close)
        written: list[Any] = [again, smaller]
        tokens = [
            each.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cache)
            for each in written
            for cache in (True, False)
        ]
        assert all(torch.equal(tokens[0], other) for other in tokens)
    # And cut again.
    found = discover(smaller)
    assert "layers.1.attention" not in found.names
    further = prune(smaller, emptied(found, "layers.1.mlp"), discovery=found)
    save(further, tmp_path / "further", plan=emptied(found, "layers.1.mlp"))
    once_more = load(str(tmp_path / "further"), dtype="float64")
    once_more.set_attn_implementation("eager")
    assert torch.allclose(logits(once_more), logits(further), atol=close)


def test_matrices_of_the_layers_own_cannot_go_as_a_whole() -> None:
    model = family_model(family_config("opt"))
    discovery = discover(model)
    assert sublayer_of(discovery, discovery.group("layers.1.mlp")) is None
    with pytest.raises(PlanError, match=r"layers\.1\.mlp: keep must be 0 ascending indices"):
        prune(model, emptied(discovery, "layers.1.mlp"), discovery=discovery)


def test_what_a_cache_does_not_bear_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"))
    discovery = discover(model)
    monkeypatch.setattr(
        type(model), "generate", lambda *_, use_cache, **__: SimpleNamespace(logits=[0, torch.ones(2) * use_cache])
    )
    with pytest.raises(PlanError, match="other logits with a cache than without"):
        prune(model, emptied(discovery, "layers.1.attention"), discovery=discovery)

    def fails(*_: Any, **__: Any) -> None:
        raise IndexError("no such layer")

    monkeypatch.setattr(type(model), "generate", fails)
    with pytest.raises(PlanError, match="does not run with a cache: no such layer"):
        prune(model, emptied(discovery, "layers.1.attention"), discovery=discovery)


def test_worthless_sublayers_go() -> None:
    config = family_config("llama", num_hidden_layers=4)
    model = family_model(config, dtype=torch.float64)
    discovery = discover(model)
    cheap = ("layers.2.attention", "layers.1.mlp")
    units = {g.name: torch.ones(g.units) * (1e-9 if g.name in cheap else 1.0) for g in discovery.groups}
    gone = dict.fromkeys(cheap, 0)
    ratio = 1 - count_parameters(discovery, gone, embeddings=False) / count_parameters(discovery, embeddings=False)
    options = CutOptions(ratio=ratio, score="l2", sublayers=True, min_keep=0.2)
    scores = Scores("l2", "sum", units)
    decided = plan(discovery, options, config=config, scores=scores)
    assert {group.name: group.kept for group in decided.groups} == gone
    assert decided.settings is None
    assert "goes as a whole" in str(decided.refusal)
    smaller = prune(model, decided, discovery=discovery)
    assert sum(parameter.numel() for parameter in smaller.parameters()) == decided.parameters["pruned"]
    without = plan(discovery, CutOptions(ratio=ratio, score="l2", min_keep=0.0), scores=scores)
    assert min(group.kept for group in without.groups) > 0


def test_repair_and_reconstruction_of_emptied_groups() -> None:
    model = family_model(family_config("gpt2"), dtype=torch.float32)
    discovery = discover(model)
    decided = emptied(discovery, "layers.1.attention", "layers.2.mlp", layers_0_mlp=40)
    found = repair(model, decided, discovery, WINDOWS)
    assert {g.name: g.kept for g in found.plan.groups} == {g.name: g.kept for g in decided.groups}
    # What is lost on average is in the last bias.
    assert found.weights["transformer.h.1.attn.c_proj.bias"].any()
    smaller = prune(model, found.plan, discovery=discovery, weights=found.weights)
    attention: Any = smaller.get_submodule("transformer.h.1.attn")
    hidden = attention(torch.ones(1, 3, model.config.n_embd))[0]
    assert torch.equal(hidden, found.weights["transformer.h.1.attn.c_proj.bias"].expand(1, 3, -1))
    errors = reconstruct_in_place(model, smaller, discovery, WINDOWS, training=LayerTraining(steps=5))
    assert len(errors) == 3


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"outputs": "2", "kept": [], "bias": None}, "skipped: 'out' cannot be"),
        ({"outputs": 2, "kept": ["none"], "bias": None}, "skipped: 'out' cannot be"),
        ({"outputs": 2, "kept": [], "bias": "bias"}, "has no 'bias' to add"),
        (7, "expected a mapping"),
    ],
)
def test_a_hostile_config(about: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        skip_in_place(nn.ModuleDict({"out": nn.Linear(2, 2)}), {"out": about})
    with pytest.raises(ValueError, match="has no module 'none'"):
        skip_in_place(nn.ModuleDict(), {"none": {"outputs": 1, "kept": [], "bias": None}})


def test_uniform_shapes_and_local_scopes_are_refused() -> None:
    others: list[dict[str, Any]] = [{"shape": "uniform", "scope": "global"}, {"shape": "per-layer", "scope": "local"}]
    for other in others:
        with pytest.raises(PlanError, match="use shape=per-layer and scope=global"):
            CutOptions(ratio=0.2, sublayers=True, **other)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "in")
    (tmp_path / "text.txt").write_text("One sentence. Another one, longer than it. " * 60)
    arguments = ["prune", "in", "out", "--ratio", "0.5", "--sublayers", "--min-keep", "0"]
    assert run([*arguments, "--calibration", "text.txt", "--samples", "4", "--length", "16", "--quiet"]) == 0
    smaller = load("out", dtype="float32")
    decided = read_plan(Path("out") / PLAN_FILE)
    assert sum(parameter.numel() for parameter in smaller.parameters()) == decided.parameters["pruned"]
    assert run(["discover", "out"]) == 0
