"""Scores are scaled, layer by layer, to what the cheapest units of a group lose when they are left out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel, PreTrainedModel

from every_type import tiny_type_model
from families import family_config, family_model
from secateur import CutOptions, discover, score
from secateur.discovery.groups import Discovery
from secateur.errors import PlanError
from secateur.models.silence import quiet
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.prune import prune
from secateur.scoring import measured
from secateur.scoring.measured import LEAST, MOST, SHARE, measured_factors
from secateur.scoring.passes.layers import LayerOutputs
from secateur.scoring.scores import Scores

WINDOWS = torch.randint(3, 101, (6, 12), generator=torch.Generator().manual_seed(2))
SEEN, UNSEEN = WINDOWS[:4], WINDOWS[4:]


def fisher(model: PreTrainedModel, discovery: Discovery, axes: tuple[str, ...]) -> Scores:
    groups = [group.name for group in discovery.groups if group.kind in axes]
    return score(model, discovery=discovery, name="fisher", windows=SEEN, groups=groups)


def divergence(model: PreTrainedModel, smaller: PreTrainedModel) -> float:
    """Nats per token, by the definition."""
    total: list[Tensor] = []
    with torch.no_grad():
        for ids in UNSEEN:
            p, q = (functional.log_softmax(m(input_ids=ids[None]).logits[0].double(), -1) for m in (model, smaller))
            total.append(functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    return float(torch.cat(total).mean())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_each_group_is_scaled_to_the_divergence_of_its_cut(family: str) -> None:
    """Layers in turn, attention and MLP side by side, transposed weights: leaving out is cutting."""
    model = family_model(family_config(family), dtype=torch.float64)
    discovery = discover(model.config)
    scores = fisher(model, discovery, ("attention", "mlp"))
    factors = measured_factors(model, discovery, scores, UNSEEN)
    assert factors.keys() == {name for name in scores.units if name.endswith("mlp")}  # of three heads, each is its own
    expected = {}
    for name in factors:
        group, units = discovery.group(name), scores.units[name]
        gone = set(units.argsort(stable=True)[: max(1, round(SHARE * len(units)))].tolist())
        keep = tuple(unit for unit in range(group.units) if unit not in gone)
        planned = PlannedGroup(name, group.kind, group.layer, units=group.units, kept=len(keep), keep=keep)
        smaller = prune(model, Plan(family, CutOptions(), (planned,), {}, {}), discovery=discovery)
        estimated = float(units[sorted(gone)].sum())
        expected[name] = min(MOST, max(LEAST, divergence(model, smaller) / estimated))
    usual = sorted(expected.values())[len(expected) // 2]
    assert len(expected) == 3
    assert factors == pytest.approx({name: each / usual for name, each in expected.items()}, rel=1e-3)


@pytest.mark.parametrize(("model_type", "skips"), [("llama", True), ("gemma3n_text", False)])
def test_layers_before_a_group_run_where_later_ones_read_more_than_they_return(
    model_type: str, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3n's last layers attend to the keys of earlier ones."""
    with quiet():
        model = tiny_type_model(model_type)
    discovery = discover(model.config)
    scores = fisher(model, discovery, ("mlp",))
    assert measured._Divergence(model, discovery, UNSEEN).skips is skips
    factors = measured_factors(model, discovery, scores, UNSEEN)
    monkeypatch.setattr(LayerOutputs, "run_alone", lambda _: False)
    assert factors == pytest.approx(measured_factors(model, discovery, scores, UNSEEN))
    assert len(factors) >= 3


def test_groups_of_few_units_keep_their_scores() -> None:
    with quiet():
        model = tiny_type_model("mixtral")
    discovery = discover(model.config)
    assert measured_factors(model, discovery, fisher(model, discovery, ("attention", "expert")), UNSEEN) == {}


def test_an_embedding_model_is_judged_by_its_hidden_states() -> None:
    config = BertConfig(
        vocab_size=101, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = BertModel(config).eval()
    discovery = discover(model)
    scores = fisher(model, discovery, ("mlp",))
    factors = measured_factors(model, discovery, scores, UNSEEN)
    with torch.no_grad():
        dense = torch.cat([model(input_ids=ids[None]).last_hidden_state for ids in UNSEEN])
    expected = {}
    for name, units in scores.units.items():
        gone = units.argsort(stable=True)[: max(1, round(SHARE * len(units)))]
        keep = tuple(sorted({*range(len(units))} - {*gone.tolist()}))
        group = discovery.group(name)
        planned = PlannedGroup(name, "mlp", group.layer, units=group.units, kept=len(keep), keep=keep)
        smaller = prune(model, Plan("bert", CutOptions(), (planned,), {}, {}), discovery=discovery)
        with torch.no_grad():
            cut = torch.cat([smaller(input_ids=ids[None]).last_hidden_state for ids in UNSEEN])
        size = dense.square().mean(-1, keepdim=True).sqrt()
        lost = float((0.5 * ((cut - dense) / size).square()).sum(-1).mean())
        expected[name] = min(MOST, max(LEAST, lost / float(units[gone].sum())))
    usual = sum(expected.values()) / 2
    assert factors == pytest.approx({name: each / usual for name, each in expected.items()}, rel=1e-3)


def test_the_model_stays_as_it_is() -> None:
    model = family_model(family_config("llama"), dtype=torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logits = model(input_ids=UNSEEN).logits
    measured_factors(model, discover(model.config), fisher(model, discover(model.config), ("mlp",)), UNSEEN)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(model(input_ids=UNSEEN).logits, logits)
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("other", [{"scope": "local"}, {"score": "l2"}, {"of": "units"}])
def test_prices_are_those_of_one_ranking_in_nats(other: dict[str, str]) -> None:
    assert CutOptions(**other).prices == "estimated"  # type: ignore[arg-type]
    assert CutOptions().prices == "measured"
    with pytest.raises(PlanError, match=r"prices=measured scales scores in nats .*: use score=fisher and scope=global"):
        CutOptions(prices="measured", **other)  # type: ignore[arg-type]
