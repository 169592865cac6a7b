"""What every model type is held to: discovery, cut equals mask for each kind of group, and a stock folder.

A cut is compared with a mask in float64. The mask is the dense model with the slices of all removed units set to
zero; where an operator takes a sum or a statistic across the units, or makes a choice among them, it does so over the
units that stay, because that is what cutting them means.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from every_type import CAUSAL, SIZES, auto_and_type, initial_model, tiny_config, tiny_inputs, tiny_type_model
from masked_pass import OverKept, Scalars, StayDouble
from secateur.checkpoint.save import save
from secateur.discovery.algebra import kept_along, variables_in
from secateur.discovery.config_settings import stock_settings
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery, Group
from secateur.discovery.inference import infer
from secateur.discovery.joining import group_axes
from secateur.discovery.rules.state import Inference
from secateur.discovery.tracing import trace
from secateur.errors import PlanError
from secateur.models.classes import AUTO_CLASSES, is_encoder_decoder, objective
from secateur.models.inputs import DECODER_IDS, INPUT_IDS, is_numbers, predicted, with_end
from secateur.models.loading import EXPERTS
from secateur.models.silence import quiet
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.prune import prune
from secateur.scoring.scores import score
from secateur.vocabulary.token_ids import token_id_settings

TOLERANCE = 1e-8
LARGEST = 5_000_000  # parameters of a tiny model
FOLDER = "stock folder"  # save, load with the ordinary loader, generate the same
DISCOVER = "discover"
# Sizes from which code derives constants: the scale of embeddings, scores or a bottleneck.
DERIVING = ("hidden", "head_dim", "latent", "state", "vocabulary")
# Of these a uniform plan is made, each that a stock config can say.
FLAT_EXPERTS = ("dbrx",)  # their matrices lie below each other in one, so none can be run alone: reap refuses them
UNIFORM = ("mlp", "expert_mlp", "shared_mlp", "attention", "query", "state", "expert", "latent", "hidden")


@dataclass(slots=True)
class Report:
    """How one type fares: each thing checked -> None where it passes, else why it does not."""

    model_type: str
    checks: dict[str, str | None] = field(default_factory=dict)
    uniform: tuple[str, ...] = ()  # the kinds that the stock folder was cut in


@dataclass(frozen=True)
class Subject:
    """A tiny model of one type and what is known of it; what several checks need is computed once."""

    model_type: str
    model: PreTrainedModel
    inputs: dict[str, Any]
    state: Inference
    discovery: Discovery
    settings: dict[frozenset[tuple[str, int]], dict[str, Any] | str] = field(default_factory=dict)
    """Sizes -> the config settings that say them, or why none do."""

    @cached_property
    def logits(self) -> Tensor:
        """Of the dense model."""
        return logits(self.model, self.inputs)

    @cached_property
    def families(self) -> dict[tuple[str, str], list[Group]]:
        """(kind, name without the layer's number) -> its groups, one in each layer."""
        families: dict[tuple[str, str], list[Group]] = defaultdict(list)
        for group in self.discovery.groups:
            families[group.kind, family(group.name)].append(group)
        return families

    @property
    def kinds(self) -> list[str]:
        """The kinds of its groups."""
        return list(dict.fromkeys(group.kind for group in self.discovery.groups))


def subject(model_type: str) -> Subject:
    """Build and discover the tiny model of a type. Raises what these raise."""
    with quiet(), torch.device("meta"):
        config = tiny_config(model_type)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = EXPERTS
        twin = initial_model(model_type, config).eval()
    assert twin.num_parameters() < LARGEST, f"{model_type} is not tiny: {twin.num_parameters():,} parameters"
    state = infer(trace(twin))
    discovery = group_axes(state, type(twin).__name__)
    with quiet():
        model = tiny_type_model(model_type)
    shapes = {name: state.graph.shapes[number] for name, number in state.graph.inputs.items()}
    inputs = (
        causal_inputs(model_type, model, shapes)
        if auto_and_type(model_type)[0] == CAUSAL
        else inputs_like(model, shapes)
    )
    return Subject(model_type, model, inputs, state, discovery)


def causal_inputs(model_type: str, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Random tokens of a causal language model, or what else the type takes."""
    batch, length = shapes[INPUT_IDS]
    return tiny_inputs(model_type, model.config, batch=batch, length=length)


def inputs_like(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], *, seed: int = 0) -> dict[str, Any]:
    """Random tokens, none of them special, pixels or sound."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    for name, shape in shapes.items():
        if is_numbers(name):
            inputs[name] = torch.randn(shape, generator=generator, dtype=model.dtype)
        else:
            inputs[name] = with_end(model, torch.randint(5, SIZES["vocab_size"], shape, generator=generator))
    return inputs


def check_type(model_type: str, *, skip: Sequence[str] = ()) -> Report:
    """Run the contract for one type, without the checks named."""
    report = Report(model_type)
    try:
        tested = subject(model_type)
    except Exception as error:  # whatever fails is the finding
        report.checks[DISCOVER] = said(error)
        return report
    report.checks[DISCOVER] = None
    for name, check in checks_of(tested, report).items():
        if name not in skip:
            report.checks[name] = outcome(check)
    return report


def checks_of(tested: Subject, report: Report) -> dict[str, Callable[[], None]]:
    """Each check of a type that is discovered, by its name; it raises where the type fails."""
    checks: dict[str, Callable[[], None]] = {}
    if reason := attention_frozen(tested):
        checks["attention"] = partial(_refuse, reason)
    if reason := experts_frozen(tested):
        checks["expert"] = partial(_refuse, reason)
    for kind in tested.kinds:
        checks[kind] = partial(check_cut, tested, kind)
    checks[FOLDER] = partial(check_folder, tested, report)
    return checks


def outcome(check: Callable[[], None]) -> str | None:
    """None where the check passes, else why it does not."""
    try:
        check()
    except Exception as error:  # whatever fails is the finding
        return said(error)
    return None


def said(error: Exception) -> str:
    """The message of an error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text[:300]}"


def _refuse(reason: str) -> None:
    raise AssertionError(reason)


def attention_frozen(tested: Subject) -> str | None:
    """Why no head of attention can be cut in a model that has attention, or None."""
    if {"attention", "query"} & set(tested.kinds):
        return None
    state = tested.state
    heads = {v for dim in state.beside_softmax for v in variables_in(state.unifier.resolve(dim))}
    reasons = {state.unifier.reason(v) for v in heads if not v.name.startswith(("batch", "sequence"))}
    return f"frozen: {'; '.join(sorted(filter(None, reasons)))}" if reasons else None


def experts_frozen(tested: Subject) -> str | None:
    """Why no expert can be cut in a model that has experts, or None."""
    paths = [path for path, module in tested.model.named_modules() if "Expert" in type(module).__name__]
    if "expert" in tested.kinds or not paths:
        return None
    inside = tuple(f"{path}." for path in paths)
    reasons = {frozen.reason for frozen in tested.discovery.frozen if frozen.weight.startswith(inside)}
    return f"frozen: {'; '.join(sorted(reasons))}" if reasons else None  # else they are found as another kind


# --- cut equals mask --------------------------------------------------------------------------------------------


def check_cut(tested: Subject, kind: str) -> None:
    """Cut a quarter to a half of every group of a kind, and compare with the mask."""
    if kind == "layer":
        return check_layers(tested)
    for (of_kind, _), groups in tested.families.items():
        if of_kind == kind:
            check_groups(tested, kind, groups)
            if kind == "expert":
                check_expert_scores(tested, groups)
    return None


def check_expert_scores(tested: Subject, groups: Sequence[Group]) -> None:
    """Whatever the code of the experts, REAP's score sees what each adds to its tokens."""
    windows, names = torch.arange(3, 39).reshape(4, 9), [group.name for group in groups]
    if tested.model_type in FLAT_EXPERTS:
        return
    with quiet():
        scores = score(tested.model, discovery=tested.discovery, name="reap", windows=windows, groups=names)
    for name in names:
        assert (scores.units[name] >= 0).all(), f"an expert of {name} is worth less than nothing"
        assert scores.units[name].any(), f"no expert of {name} is worth anything"


def family(name: str) -> str:
    """The name of a group without the number of its layer."""
    return re.sub(r"^layers\.\d+", "layers", name)


def check_groups(tested: Subject, kind: str, groups: Sequence[Group]) -> None:
    """Cut these groups, one in each layer, and compare with the mask."""
    plan = planned(tested, groups)
    with quiet():
        pruned = prune(tested.model, plan, discovery=tested.discovery)
    pruned.to(dtype=tested.model.dtype)  # type: ignore[call-arg]  # rotary tables too
    reference = masked(tested.model, plan, tested.discovery)
    with_constants_of(pruned, reference, only_precision=kind not in DERIVING)
    keep = {group.name: group.keep or () for group in plan.groups}
    inputs, kept = tested.inputs, list(keep["vocabulary"]) if kind == "vocabulary" else None
    if kept is not None:  # the tokens that stay have new numbers
        inputs = {name: value if is_numbers(name) else value % len(kept) for name, value in inputs.items()}
    scalars = Scalars() if kind in DERIVING else None
    with scalars or nullcontext():
        got = logits(pruned, inputs)
    if kept is not None:
        tokens = torch.tensor(kept)
        inputs = {name: value if is_numbers(name) else tokens[value] for name, value in inputs.items()}
    over_kept = OverKept(tested.state, tested.discovery, keep, scalars)
    with over_kept if over_kept.changes else nullcontext():  # which takes time for every operator
        expected = logits(reference, inputs)
    if kept is not None:
        expected = expected[..., kept]
    within = tolerance(tested)
    assert torch.isfinite(tested.logits).all(), "the dense model gives NaN or Inf"
    assert got.shape == expected.shape, f"logits {tuple(got.shape)} instead of {tuple(expected.shape)}"
    off = (got - expected).abs().max()
    assert off < within, f"the cut model is off by {off:.1e}"
    if kind != "vocabulary":
        assert (expected - tested.logits).abs().max() > 10 * within, "the mask changes nothing"


def tolerance(tested: Subject) -> float:
    """How far logits may be off."""
    return TOLERANCE if tested.model.dtype == torch.float64 else 1e-3


def check_layers(tested: Subject) -> None:
    """Drop one layer, and compare with the dense model that skips it."""
    group = tested.discovery.group("layers")
    for dropped in reversed(range(group.units)):  # where the kinds of layer alternate, a config can say few of them
        keep = tuple(i for i in range(group.units) if i != dropped)
        plan = _with_settings(tested, (PlannedGroup("layers", "layer", None, group.units, len(keep), keep),))
        if plan.settings is not None:
            break
    else:
        raise PlanError(plan.refusal or "")
    skipped = copy.deepcopy(tested.model)
    layer = skipped.get_submodule(f"{tested.discovery.layer_lists[0]}.{dropped}")

    def pass_on(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        enters = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        return (enters, *output[1:]) if isinstance(output, tuple) else enters

    layer.register_forward_hook(pass_on, with_kwargs=True)
    with quiet():
        pruned = prune(tested.model, plan, discovery=tested.discovery)
    pruned.to(dtype=tested.model.dtype)  # type: ignore[call-arg]  # rotary tables too
    with_constants_of(pruned, skipped, layers=False)
    off = (logits(pruned, tested.inputs) - logits(skipped, tested.inputs)).abs().max()
    assert off < tolerance(tested), f"the model without layer {dropped} is off by {off:.1e}"


def planned(tested: Subject, groups: Sequence[Group], *, seed: int = 0) -> Plan:
    """A plan that keeps random units of each of these groups, half to three quarters of them."""
    chooser = random.Random(seed)
    found = []
    for group in groups:
        kept = max(kept_of(group.units) // group.multiple * group.multiple, group.least)
        stay = special_tokens(tested.model.config) if group.kind == "vocabulary" else set()
        others = [unit for unit in range(group.units) if unit not in stay]
        keep = tuple(sorted([*stay, *chooser.sample(others, kept - len(stay))]))
        found.append(PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep))
    return _with_settings(tested, tuple(found))


def special_tokens(config: PreTrainedConfig) -> set[int]:
    """The tokens that a config names, which a cut of a vocabulary keeps."""
    named: list[Any] = []
    for name in token_id_settings(config.to_dict(), ()):
        value: Any = config.to_dict()
        for key in name.split("."):
            value = value[key]
        named += value if isinstance(value, (list, tuple)) else [value]
    vocabulary = config.get_text_config().vocab_size
    return {token for token in named if isinstance(token, int) and 0 <= token < vocabulary}


def uneven(model: PreTrainedModel, kinds: tuple[str, ...], *, discovery: Discovery | None = None) -> Plan:
    """A plan that leaves every layer other sizes."""
    groups = []
    for group in (discovery or discover(model)).groups:
        if group.kind in kinds and group.layer is not None and group.units > 1:
            drop = 1 + group.layer % 2 if group.units < 10 else 7 + 5 * group.layer
            least = -(-max(group.least, 1) // group.multiple) * group.multiple
            kept = max((group.units - drop) // group.multiple * group.multiple, least)
            keep = tuple(range(group.units))[group.units - kept :] if group.layer % 2 else tuple(range(kept))
            groups.append(PlannedGroup(group.name, group.kind, group.layer, group.units, kept, keep))
    return Plan("tiny", CutOptions(ratio=0.3, of="units"), tuple(g for g in groups if g.kept < g.units), {}, {})


def kept_of(units: int) -> int:
    """Half to three quarters of the units, a round number where there is one: code likes to divide sizes."""
    between = range(-(-units // 2), units * 3 // 4 + 1) or range(units // 2, units)
    return max(between, key=lambda n: (n % 12 == 0, n % 4 == 0, n % 2 == 0, n))


def _with_settings(tested: Subject, groups: tuple[PlannedGroup, ...]) -> Plan:
    plan = Plan(tested.discovery.model, CutOptions(ratio=0.5, of="units"), groups, {}, {})
    sizes = frozenset((group.name, group.kept) for group in groups) | frozenset(
        (f"layer {layer}", 0) for layer in plan.sizes.dropped_layers
    )
    if sizes not in tested.settings:
        try:
            with quiet():
                tested.settings[sizes] = stock_settings(tested.model.config, tested.discovery, plan.sizes)
        except PlanError as error:
            tested.settings[sizes] = str(error)
    settings = tested.settings[sizes]
    return replace(plan, refusal=settings) if isinstance(settings, str) else replace(plan, settings=settings)


def masked(model: PreTrainedModel, plan: Plan, discovery: Discovery) -> PreTrainedModel:
    """The dense model with the slices of all removed units set to zero."""
    keep: Mapping[str, Sequence[int]] = {group.name: group.keep or () for group in plan.groups}
    found = copy.deepcopy(model)
    weights = dict(found.named_parameters()) | dict(found.named_buffers())
    with torch.no_grad():
        for weight in discovery.weights:
            if not weights[weight.name].is_floating_point():
                continue
            for dim, expression in enumerate(weight.dims):
                mask = torch.zeros(expression.size, dtype=torch.float64)
                mask[kept_along(expression, dict(keep))] = 1
                weights[weight.name].mul_(mask.reshape([-1 if i == dim else 1 for i in range(len(weight.dims))]))
    return found


def with_constants_of(
    pruned: nn.Module, dense: nn.Module, *, layers: bool = True, only_precision: bool = False
) -> None:
    """Give `dense` the scalars that the pruned model's code derived from its sizes (an embedding's scale).

    With `only_precision`, only those that are the same but for having been made in another dtype.
    """
    for path, module in pruned.named_modules():
        if not layers and any(piece.isdigit() for piece in path.split(".")):
            continue
        other = dense.get_submodule(path)
        for name, value in vars(module).items():
            if isinstance(value, float) and not only_precision:
                setattr(other, name, value)
        for name, buffer in module.named_buffers(recurse=False):
            own = getattr(other, name)
            if buffer.numel() == 1 and (not only_precision or torch.allclose(buffer.double(), own.double())):
                setattr(other, name, buffer.to(getattr(other, name).dtype))


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The logits, or the hidden states of a model without a head, of one pass without a cache."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with quiet(), StayDouble():  # type: ignore[no-untyped-call]
        return predicted(model(**inputs, **options))


# --- a stock folder ---------------------------------------------------------------------------------------------


def uniform_plan(tested: Subject) -> tuple[Plan, tuple[str, ...]]:
    """A plan that cuts every kind of group that the stock config can say, and these kinds."""
    refusals = []
    sayable: list[list[Group]] = []  # the groups of one family each
    for kind in UNIFORM:
        families = [groups for (each, _), groups in tested.families.items() if each == kind]
        whole = [[group for groups in families for group in groups]] if len(families) > 1 else []
        found: list[list[Group]] = []
        for groups in [*families, *whole]:  # an encoder and a decoder may have one setting for both
            if not (kind == "hidden" and sayable) and not (groups in whole and found):
                plan = planned(tested, groups)
                found += [groups] if plan.settings is not None else []
                refusals.append(plan.refusal or "")
        sayable += found
    assert sayable, f"no kind of group can be cut uniformly: {'; '.join(refusals)[:300]}"
    plan = planned(tested, [group for groups in sayable for group in groups])
    if plan.settings is None:  # what it can say alone it may not be able to say together: one family after the other
        chosen: list[Group] = []
        for groups in sayable:
            if planned(tested, [*chosen, *groups]).settings is not None:
                chosen += groups
        plan = planned(tested, chosen)
    return plan, tuple(dict.fromkeys(group.kind for group in plan.groups))


def check_folder(tested: Subject, report: Report) -> None:
    """Cut every kind that a config can say, write the folder, load it with the ordinary loader, generate the same."""
    plan, report.uniform = uniform_plan(tested)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        model = tiny_type_model(tested.model_type, dtype=torch.float32)
        pruned: Any = prune(model, plan, discovery=tested.discovery)
        path = save(pruned, Path(folder) / "pruned", plan=plan)
        auto = auto_and_type(tested.model_type)[0]
        # A text model inside another has no name of its own for the auto class.
        loader: Any = getattr(transformers, auto) if type(model.config) in AUTO_CLASSES[auto] else type(model)
        loaded = loader.from_pretrained(path, dtype="auto", attn_implementation="eager")
        loaded.eval()
        for name, tensor in pruned.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), f"{name} is another tensor after loading"
        assert type(loaded) is type(pruned), f"{auto} makes a {type(loaded).__name__} of it"
        inputs = {
            name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in tested.inputs.items()
        }
        off = (logits(pruned, inputs) - logits(loaded, inputs)).abs().max()
        assert off < 1e-4, f"logits after loading are off by {off:.1e}"
        if objective(model) not in ("next token", "second half"):
            return
        inputs = {name: value[:1] for name, value in inputs.items() if name != DECODER_IDS}
        ids = inputs[model.main_input_name]
        settings: dict[str, Any] = {
            "max_new_tokens": 5,
            "min_new_tokens": 5,
            "do_sample": False,
            "attention_mask": torch.ones(ids.shape[:2] if ids.dim() == 2 else ids[:, 0].shape, dtype=torch.int64),
        }
        if is_encoder_decoder(model.config):
            settings["decoder_start_token_id"] = 1
        one, other = (smaller.generate(**inputs, **settings) for smaller in (pruned, loaded))
    assert torch.equal(one, other), "other tokens after loading"
    least = 5 if is_encoder_decoder(model.config) else ids.shape[1] + 5
    assert one.shape[1] >= least, "it does not generate"
