"""Model and plan -> smaller model: weights sliced, ties kept, config and module attributes of the new sizes."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.algebra import kept_along
from secateur.discovery.config_settings import with_settings
from secateur.discovery.counting import count_parameters
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.discovery.module_attributes import replace_in_place
from secateur.discovery.padding import module_changes
from secateur.discovery.sizes import PrunedSizes, resized, weights_after
from secateur.discovery.sublayers import skip_sublayers_in_place, skipped_in, sublayer_of
from secateur.errors import DiskError, PlanError
from secateur.models.classes import config_of
from secateur.models.config import check_not_quantized
from secateur.models.modeling_per_layer import pad_in_place, padded_in
from secateur.models.silence import quiet
from secateur.models.streaming import stream_in_place, streamed_layers
from secateur.models.trust import runs_remote_code
from secateur.planning.options import TOKENS, CutOptions
from secateur.planning.plan import Plan, PlannedGroup, settings_of
from secateur.vocabulary.token_ids import token_id_settings


def prune(
    model: PreTrainedModel,
    plan: Plan,
    *,
    discovery: Discovery | None = None,
    weights: Mapping[str, Tensor] | None = None,
    room: Path | None = None,
) -> PreTrainedModel:
    """A smaller model of the same class, in eval mode; the dense model is left as it is.

    A plan that a stock config can say gives a model built from that config. Any other gives the dense model's modules
    with smaller weights, and the module attributes that depend on sizes changed. Weights that no cut touches are shared
    with the dense model. `weights` are cut instead of the model's own, by name and as large as those (see `repair`).
    `room` is a folder on a disk with space for the cut weights: they then lie in a file there, which goes with the
    model, instead of in memory. Raises `PlanError` when the plan does not say which units stay, or is of another model,
    and `DiskError` when the room is too small.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> half = PlannedGroup("layers.1.mlp", "mlp", 1, units=24, kept=12, keep=tuple(range(12)))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.2), (half,), {}, {})
    >>> pruned = prune(AutoModelForCausalLM.from_config(config), by_hand)
    >>> [layer.fc1.out_features for layer in pruned.model.decoder.layers]
    [24, 12]
    """
    # 1. The plan fits the model.
    check_not_quantized(model.config)
    discovery = discovery or discover(config_of(model), trust_remote_code=runs_remote_code(model))
    check_plan(plan, discovery)
    # 2. Tokens go first: what is left is a smaller dense model.
    if plan.kept_tokens is not None:
        model = cut_vocabulary(model, plan.kept_tokens, discovery=discovery, room=room)
        new = {before: after for after, before in enumerate(plan.kept_tokens)}
        start = tuple(new[token] for token in discovery.start_tokens)  # which the model's code looks for in every row
        discovery = replace(resized(discovery, TOKENS, len(plan.kept_tokens)), start_tokens=start)
        plan = plan.without_vocabulary()
    # 3. Every weight keeps the slices of the units that stay.
    tensors = _tensors_of(model) | dict(weights or {})
    smaller = cut_weights(tensors, plan, discovery, room=room)
    # 4. A model of the new sizes holds them.
    if plan.settings is not None:
        config = with_settings(model.config, plan.settings)
        tied = {other: name for _, (name, *others) in weights_after(discovery, plan.sizes) for other in others}
        pruned = _from_config(model, config, smaller, tied)
    else:
        pruned = _from_modules(model, plan.sizes, smaller, discovery)
    return _running_as(model, pruned)


def cut_vocabulary(
    model: PreTrainedModel, keep: Sequence[int], *, discovery: Discovery | None = None, room: Path | None = None
) -> PreTrainedModel:
    """The model of the tokens in `keep` (ids, ascending): rows of the embedding and of the head, and ids in its config.

    Its logits are the columns of those that stay. `vocabulary.tokenizer.cut_tokenizer` makes the tokenizer that goes
    with it. Raises `PlanError` where discovery finds no vocabulary that can be cut.

    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> sizes = {"vocab_size": 20, "hidden_size": 12, "num_attention_heads": 2, "ffn_dim": 24, "num_hidden_layers": 1}
    >>> model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **sizes))
    >>> smaller = cut_vocabulary(model, [1, 2, 5, 7])
    >>> smaller.config.vocab_size, smaller.config.eos_token_id, smaller.config.pad_token_id
    (4, 1, 0)
    """
    discovery = discovery or discover(model)
    group = next((group for group in discovery.groups if group.kind == TOKENS), None)
    if group is None:
        raise PlanError(f"axes=vocabulary: {discovery.model} has no vocabulary that can be cut: cut other axes")
    planned = PlannedGroup(group.name, group.kind, group.layer, group.units, len(keep), tuple(keep))
    alone = Plan(discovery.model, CutOptions(axes=(TOKENS,), of="parameters"), (planned,), {}, {})
    settings = settings_of(alone, config_of(model), discovery, trust_remote_code=runs_remote_code(model))
    smaller = cut_weights(_tensors_of(model), alone, discovery, room=room)
    tied = {other: name for _, (name, *others) in weights_after(discovery, alone.sizes) for other in others}
    pruned = _from_config(model, with_settings(model.config, settings), smaller, tied)
    if getattr(pruned, "generation_config", None) is not None:
        for name, value in token_id_settings(pruned.generation_config.to_dict(), keep).items():
            setattr(pruned.generation_config, name, value)
    return _running_as(model, pruned)


def _tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    if (streamed := streamed_layers(model)) is not None:
        streamed.leave()
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _running_as(model: PreTrainedModel, pruned: PreTrainedModel) -> PreTrainedModel:
    """The pruned model, streamed to a device as the dense one is."""
    if (streamed := streamed_layers(model)) is not None:
        stream_in_place(pruned, streamed.device)
    pruned.eval()
    return pruned


def check_plan(plan: Plan, discovery: Discovery) -> None:
    """Raise `PlanError` unless the plan is decided and fits the model."""
    if not plan.decided:
        raise PlanError(
            "the plan says how many units stay, not which (it was made without weights): plan again with the model's "
            "weights, or give the options of the cut instead of the plan"
        )
    for planned in plan.groups:
        if planned.name not in discovery.names:
            raise PlanError(
                f"the plan cuts {planned.name}, which {discovery.model} does not have: it is of another model"
            )
        units = discovery.group(planned.name).units
        if units != planned.units:
            raise PlanError(f"the plan counts {planned.units} units of {planned.name}, the model has {units}")
        keep = planned.keep or ()
        ascending = list(keep) == sorted(set(keep) & set(range(units)))
        empty = not keep and sublayer_of(discovery, discovery.group(planned.name)) is None
        if not ascending or len(keep) != planned.kept or empty:
            raise PlanError(
                f"{planned.name}: keep must be {planned.kept} ascending indices below {units}, not {keep!r:.60}"
            )


def fitted_plan(given: Plan, discovery: Discovery, config: PreTrainedConfig, *, trust_remote_code: bool) -> Plan:
    """The plan with the settings that this config needs for it. Raises `PlanError` when it is of another model."""
    check_plan(given, discovery)
    planned, found = given.parameters.get("dense"), count_parameters(discovery)
    if planned != found:
        raise PlanError(
            f"the plan is of another model: of one with {planned} parameters ({given.model}), and {discovery.model} "
            f"has {found}; plan again with `secateur plan {discovery.model} --out plan.json`"
        )
    if given.settings is None:
        return given
    try:
        settings = settings_of(given, config, discovery, trust_remote_code=trust_remote_code)
    except PlanError as error:
        if given.options.shape == "per-layer":
            return replace(given, settings=None, refusal=str(error))
        raise
    return replace(given, settings=settings)


def cut_weights(
    tensors: Mapping[str, Tensor], plan: Plan, discovery: Discovery, *, room: Path | None = None
) -> dict[str, Tensor]:
    """The weights of the smaller model by their new names; a weight that is not cut is the same tensor."""
    keep: dict[str, Sequence[int]] = {g.name: g.keep or () for g in plan.groups if g.kind != "layer"}
    smaller: dict[str, Tensor] = {}
    for weight, (name, *_) in weights_after(discovery, plan.sizes):
        tensor = tensors[weight.name].detach()
        indices = {
            dim: torch.tensor(kept, device=tensor.device, dtype=torch.long)
            for dim, expression in enumerate(weight.dims)
            if len(kept := kept_along(expression, keep)) < expression.size
        }
        smaller[name] = _sliced(tensor, indices, room) if indices else tensor
    return smaller


def _sliced(tensor: Tensor, indices: Mapping[int, Tensor], room: Path | None) -> Tensor:
    """The entries that stay along each dimension; the last slice is written into the room."""
    *before, last = indices.items()
    for dim, kept in before:
        tensor = tensor.index_select(dim, kept)
    shape = [len(indices.get(dim, range(size))) for dim, size in enumerate(tensor.shape)]
    return torch.index_select(tensor, *last, out=new_tensor(shape, tensor, room))


def new_tensor(shape: Sequence[int], like: Tensor, room: Path | None) -> Tensor:
    """An empty tensor with the dtype and device of another; in a file in the room, if it is on the CPU."""
    if room is None or like.device.type != "cpu":
        return like.new_empty(shape)
    return _empty_in_file(room, shape, like.dtype)


def _empty_in_file(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in a file without a name: its pages can leave the memory, and the file ends with the tensor."""
    size = max(1, math.prod(shape) * dtype.itemsize)
    try:
        descriptor, path = tempfile.mkstemp(dir=folder, prefix=".cut.")
        try:
            Path(path).unlink()  # at once: a process that is killed leaves nothing
            path = f"/proc/self/fd/{descriptor}" if Path("/proc/self/fd").is_dir() else f"/dev/fd/{descriptor}"
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # a full disk is an error now, not a crash later
            else:
                os.ftruncate(descriptor, size)
            storage: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DiskError(f"{folder} has no room for the cut weights: {error.strerror or error}") from error
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    tensor: Tensor = torch.empty(0, dtype=dtype).set_(storage, 0, list(shape), strides)
    return tensor


def _from_config(
    model: PreTrainedModel, config: PreTrainedConfig, weights: Mapping[str, Tensor], tied: Mapping[str, str]
) -> PreTrainedModel:
    """A stock model built from the config, holding these weights; what the code computes is computed anew."""
    options = {"attn_implementation": model.config._attn_implementation}
    if getattr(model.config, "_experts_implementation", None) is not None:
        options["experts_implementation"] = model.config._experts_implementation
    state = {**weights, **{other: weights[name] for other, name in tied.items() if name in weights}}
    with quiet():
        pruned: PreTrainedModel = type(model).from_pretrained(
            None, config=config, state_dict=state, dtype=model.dtype, use_kernels=False, **options
        )
    pruned.load_state_dict(state, assign=True)  # the very tensors, each in its own dtype
    if streamed_layers(model) is None:  # what is left to move are buffers
        pruned.to(device=model.device)  # type: ignore[call-arg]  # transformers wraps `to`
    pruned.tie_weights()
    if hasattr(model, "generation_config"):  # custom code may not generate by itself
        pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.config.name_or_path = model.config.name_or_path  # custom code is found there
    return pruned


def _from_modules(
    model: PreTrainedModel, sizes: PrunedSizes, weights: Mapping[str, Tensor], discovery: Discovery
) -> PreTrainedModel:
    """The dense model's modules with cut weights, and the attributes that go with them."""
    changes = module_changes(
        config_of(model),
        discovery,
        sizes.without_emptied(),
        skipped=skipped_in(model),
        padded=padded_in(model),
        trust_remote_code=runs_remote_code(model),
    )
    shared = [*model.parameters(), *model.buffers()]
    pruned: PreTrainedModel = copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})
    for attribute in changes.attributes:
        if isinstance(attribute.value, PreTrainedConfig):
            attribute.value._attn_implementation = model.config._attn_implementation
    replace_in_place(pruned, weights, discovery.tied, changes.attributes)
    padded_in(pruned, remove=True)
    pad_in_place(pruned, changes.padded)
    paths = [path for name in sizes.emptied if (path := sublayer_of(discovery, discovery.group(name))) is not None]
    skip_sublayers_in_place(pruned, model, paths)
    text_config = pruned.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):  # a loss over routers that choose from as many experts
        text_config.output_router_logits = False
    return pruned
