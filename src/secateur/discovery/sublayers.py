"""Groups that lose all of their units -> the sub-layer that is removed: the attention or the MLP of a layer.

Its module is replaced by one that returns zeros, or the bias that its last matrix adds, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from secateur.discovery.algebra import size_after
from secateur.discovery.groups import Discovery, Group
from secateur.errors import PlanError
from secateur.models.classes import objective
from secateur.models.inputs import arguments, hidden_in, hidden_read
from secateur.models.modeling_per_layer import Skipped, skip_in_place
from secateur.models.silence import quiet

REMOVABLE_KINDS = ("attention", "mlp")
TOKENS = 7  # of the sample that shows what a sub-layer returns


def sublayer_of(discovery: Discovery, group: Group) -> str | None:
    """The module that computes nothing once all units of a group are gone; None where there is none of its own.

    >>> from secateur.discovery.discover import discover
    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> discovery = discover(config)
    >>> sublayer_of(discovery, discovery.group("layers.1.attention"))
    'model.decoder.layers.1.self_attn'
    >>> sublayer_of(discovery, discovery.group("layers.1.mlp")) is None  # its matrices are the layer's own
    True
    """
    if group.kind not in REMOVABLE_KINDS or group.layer is None:
        return None
    emptied = {w.name for w in discovery.weights if any(size_after(dim, {group.name: 0}) == 0 for dim in w.dims)}
    if not emptied:
        return None
    pieces = zip(*(name.split(".") for name in emptied), strict=False)
    path = ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, pieces))
    layer = next((f"{prefix}.{group.layer}" for prefix in discovery.layer_lists), None)
    matrices = {w.name for w in discovery.weights if w.name.startswith(f"{path}.") and w.parameter and len(w.dims) > 1}
    if layer is None or not path.startswith(f"{layer}.") or matrices - emptied or path in emptied:
        return None
    return path


def is_removable(discovery: Discovery, group: Group) -> bool:
    """Whether a group may lose all of its units; the first attention stays, since a cache counts its tokens there."""
    return sublayer_of(discovery, group) is not None and not (group.kind == "attention" and group.layer == 0)


@torch.no_grad()
def skip_sublayers_in_place(model: PreTrainedModel, dense: PreTrainedModel, paths: Iterable[str]) -> None:
    """Replace these modules of a cut model; the dense model shows what they return.

    Parameters that no unit belongs to (the last bias) stay, under their names. Raises `PlanError` for a module that
    returns anything but hidden states, or without which the model gives other logits with a cache than without.
    """
    wanted = sorted(paths)
    if not wanted:
        return
    calls: dict[str, tuple[Tensor, Any]] = {}  # module -> what it reads and returns

    def note(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        calls[path] = hidden_read(args, kwargs), output

    embedding: Any = dense.get_input_embeddings()
    ids = (torch.arange(2 * TOKENS, device=dense.device) % embedding.weight.shape[0]).view(2, TOKENS)
    with ExitStack() as stack:
        for path in wanted:
            stack.enter_context(dense.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True))
        dense(**arguments(dense, ids))
    for path in wanted:
        read, output = calls.get(path, (None, None))
        outputs = len(output) if isinstance(output, (tuple, list)) else 0
        returned = hidden_in(output)
        if not isinstance(read, Tensor) or not isinstance(returned, Tensor) or returned.shape != read.shape:
            raise PlanError(f"{path} does not return hidden states of the shape that it reads, so it cannot be removed")
        sublayer = model.get_submodule(path)
        kept = [name for name, parameter in sublayer.named_parameters() if parameter.numel()]
        skip_in_place(model, {path: {"outputs": outputs, "kept": kept, "bias": _bias(sublayer, kept)}})
    _check_cached(model, ids, wanted)


def _bias(sublayer: nn.Module, kept: list[str]) -> str | None:
    """The bias of the matrix that made the hidden states: what is left to add."""
    biases = [
        name
        for name in kept
        if name.rpartition(".")[2] == "bias"
        and (weight := getattr(sublayer.get_submodule(name.rpartition(".")[0]), "weight", None)) is not None
        and weight.numel() == 0
    ]
    return biases[0] if biases else None


def _check_cached(model: Any, ids: Tensor, paths: list[str]) -> None:
    """Raise `PlanError` unless generation with a cache gives the logits of a pass over the whole sequence."""
    if not hasattr(model, "generate") or objective(model) != "next token":
        return
    plain = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options = {"generation_config": plain, "return_dict_in_generate": True, "output_logits": True}
    try:
        with quiet():
            cached, whole = (
                model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **options).logits[1].float()
                for cache in (True, False)
            )
    except Exception as error:  # model code may fail in any way without the module
        raise PlanError(f"without {paths[0]} the model does not run with a cache: {error}") from error
    if not torch.allclose(cached, whole, rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
        raise PlanError(
            f"without {', '.join(paths)} the model gives other logits with a cache than without: keep those of the "
            "first layers, for example with layers=2:30"
        )


def skipped_in(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The sub-layers of a model that are skipped, as its config lists them."""
    return {
        path: {"outputs": module.outputs, "kept": list(module.kept), "bias": module.bias}
        for path, module in model.named_modules()
        if isinstance(module, Skipped)
    }
