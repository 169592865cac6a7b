"""Dense model, pruned model and plan -> what became of every tensor of the dense checkpoint, by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.discovery.groups import Discovery
from secateur.discovery.layers import layer_of
from secateur.discovery.sizes import name_after
from secateur.discovery.sublayers import skipped_in
from secateur.errors import CheckpointError
from secateur.planning.plan import Plan

BYTES_AT_ONCE = 2**26  # of two tensors that are compared


def account_for_tensors(
    dense: nn.Module, pruned: nn.Module, plan: Plan, discovery: Discovery, *, unplaced: Iterable[str] = ()
) -> dict[str, str]:
    """Name of a dense tensor -> its fate, dtype and shape, and its name in the pruned model where that is another.

    `kept`: unchanged, bit by bit. `fitted`: of the same shape, with other values. `cut`: smaller. `tied`: the same
    tensor as another one, in both models. `dropped`: removed with its layer or sub-layer. `unplaced`: in the files, but
    not in the dense model, which has no place for it (given by `load_on_meta`). Raises `CheckpointError` for a tensor
    that has none of these fates: lost, grown, of another dtype, no longer tied, or one that no dense tensor became.

    >>> from secateur.discovery.discover import discover
    >>> from secateur.planning.options import CutOptions
    >>> from secateur.planning.plan import PlannedGroup
    >>> from secateur.pruning.prune import prune
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> last = PlannedGroup("layers", "layer", None, units=2, kept=1, keep=(1,))
    >>> by_hand = Plan("opt", CutOptions(ratio=0.5), (last,), {}, {}, settings={"num_hidden_layers": 1})
    >>> fates = account_for_tensors(model, prune(model, by_hand), by_hand, discover(config))
    >>> fates["model.decoder.layers.1.fc2.bias"], fates["lm_head.weight"]
    ('kept float32 [12] as model.decoder.layers.0.fc2.bias', 'tied to model.decoder.embed_tokens.weight')
    """
    sizes = plan.sizes
    before, after = _state(dense), _state(pruned)
    skipped = tuple(f"{path}." for path in skipped_in(pruned))
    fates: dict[str, str] = {}
    first_names: dict[tuple[int, ...], tuple[str, str]] = {}  # of a storage: its first name, before and after
    unexplained = set(after)
    for name, tensor in before.items():
        about = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        new = name_after(name, discovery, sizes)
        gone = layer_of(name, discovery.layer_lists) in sizes.dropped_layers
        if gone or new not in after:
            fates[name] = f"dropped {about}"
            if not gone and not new.startswith(skipped):
                raise CheckpointError(f"the pruned model lacks {new}, and the plan drops no block around it")
            continue
        unexplained.discard(new)
        first, first_new = first_names.setdefault(_storage(tensor), (name, new))
        if first == name:
            fates[name] = _fate(name, about, tensor, after[new]) + (f" as {new}" if new != name else "")
        elif _storage(after[new]) == _storage(after[first_new]):
            fates[name] = f"tied to {first}"
        else:
            raise CheckpointError(f"the pruned model has {new} apart from {first_new}, to which it was tied")
    if unexplained:
        raise CheckpointError(f"the pruned model has {min(unexplained)}, which no tensor of the dense model became")
    return {**fates, **dict.fromkeys(sorted(set(unplaced) - fates.keys()), "unplaced")}


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _storage(tensor: Tensor) -> tuple[int, ...]:
    """What two names of one tensor have in common; an empty tensor has nothing, and no storage to tell it by."""
    return (tensor.data_ptr(), *tensor.shape) if tensor.data_ptr() else (id(tensor),)


def _fate(name: str, about: str, before: Tensor, after: Tensor) -> str:
    if after.dtype != before.dtype:
        raise CheckpointError(f"the pruned model has {name} in {after.dtype}, the dense one in {before.dtype}")
    if after.shape == before.shape:
        return f"{'kept' if _same(before, after) else 'fitted'} {about}"
    if after.dim() != before.dim() or any(a > b for a, b in zip(after.shape, before.shape, strict=True)):
        raise CheckpointError(f"the pruned model has {name} as {list(after.shape)}, the dense one {list(before.shape)}")
    return f"cut {about} -> {list(after.shape)}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, compared a part at a time."""
    if a.data_ptr() == b.data_ptr():
        return True
    a, b = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b.to(a.device)))
    return all(torch.equal(x, y) for x, y in zip(a.split(BYTES_AT_ONCE), b.split(BYTES_AT_ONCE), strict=True))
