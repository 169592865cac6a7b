"""A model whose layers differ in size -> the same as an object of the class that the ordinary loader builds.

That class is in the one file of code in the folder (`modeling_per_layer`), and writes the weights that it will read.
What differs from the dense model that the config describes is read off the two models, however the smaller one was
made.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from secateur.checkpoint.layer_settings import set_layer_settings_in_place
from secateur.discovery.layers import path_and_parents
from secateur.discovery.module_attributes import plain_attributes
from secateur.discovery.sublayers import skipped_in
from secateur.errors import CheckpointError, ModelError
from secateur.models.attention_calls import attention_calls
from secateur.models.classes import stock_type
from secateur.models.config import auto_map, takes
from secateur.models.loading import skeleton
from secateur.models.modeling_per_layer import PER_LAYER, padded_in, per_layer_class, skip_in_place
from secateur.models.silence import quiet
from secateur.models.trust import runs_remote_code

# What a config says beside its settings: where it comes from, how to compute, and what differs between layers.
NO_SETTINGS = {
    *(PER_LAYER, "per_layer_config", "allow_global_per_layer_attribute_access", "serialize_explicit_per_layer_config"),
    *("architectures", "auto_map", "dtype", "model_type", "transformers_version"),
}


def as_per_layer(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, with the same tensors, as an object of the class that says its shapes in its config.

    It is for saving: buffers that its code computes are on `meta`. Raises `CheckpointError` when no config can describe
    the model.

    >>> import torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> model = AutoModelForCausalLM.from_config(config)
    >>> model.model.decoder.layers[0].fc1.bias = nn.Parameter(torch.zeros(20))
    >>> as_per_layer(model).config.secateur_per_layer["shapes"]
    {'model.decoder.layers.0.fc1.bias': [20]}
    """
    config = _dense_config(model)
    try:
        dense = skeleton(config)
        attention = attention_calls(dense)
        skipped = skipped_in(model)
        skip_in_place(dense, skipped)
        about = {"skipped": skipped} if skipped else {}
        setattr(config, PER_LAYER, {**getattr(config, PER_LAYER), **about, **differences(model, dense)})
        architecture: str = getattr(config, PER_LAYER)["architecture"]
        config.auto_map = auto_map(config, getattr(transformers, architecture))
        set_layer_settings_in_place(config, dense, before=attention, after=attention_calls(skeleton(config)))
        per_layer = skeleton(config)
    except ModelError as error:
        raise CheckpointError(f"no folder can hold the model: {error}") from error
    check_same(model, per_layer)
    _check_computed(model, skeleton(config), dense)
    with quiet():
        per_layer.load_state_dict(model.state_dict(), assign=True)  # the very tensors, each in its own dtype
        per_layer.tie_weights()
    if hasattr(model, "generation_config"):
        per_layer.generation_config = copy.deepcopy(model.generation_config)
    return per_layer


def layer_settings(model: PreTrainedModel) -> Any:
    """What `per_layer_config` has to say of a per-layer model, whatever its config says; None where it says nothing."""
    config: Any = _dense_config(model)
    dense = skeleton(config)
    before = attention_calls(dense)
    setattr(config, PER_LAYER, getattr(model.config, PER_LAYER))
    set_layer_settings_in_place(config, dense, before=before, after=attention_calls(skeleton(config)))
    return config.to_dict().get("per_layer_config")


def is_per_layer(model: nn.Module) -> bool:
    """Tell whether a model is of a class of per-layer shapes, ours or that of a folder.

    >>> is_per_layer(nn.Linear(2, 2))
    False
    """
    config: Any = getattr(model, "config", None)
    return isinstance(getattr(config, PER_LAYER, None), dict) and config.model_type.startswith(f"{PER_LAYER}_")


def check_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Raise `CheckpointError` unless the other has the shapes and attributes of the model."""
    for section, values in differences(model, other).items():
        for name in values:
            raise CheckpointError(f"no folder can hold the model: its {section} would not be the same ({name})")


def differences(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """How a model differs from the dense one: shapes by name; attributes, settings of configs and padding by module.

    Only modules with a weight of another shape in them are compared: others hold what running has left in them.
    """
    shapes, dense_shapes = _shapes(model), _shapes(dense)
    if shapes.keys() != dense_shapes.keys():
        odd = ", ".join(sorted(shapes.keys() ^ dense_shapes.keys())[:3])
        raise CheckpointError(f"no folder can hold the model: its config describes one with other weights ({odd})")
    changed = {name: shape for name, shape in shapes.items() if shape != dense_shapes[name]}
    unsaved = sorted(changed.keys() - model.state_dict().keys())
    if unsaved:
        raise CheckpointError(
            f"no folder can hold the model: {unsaved[0]} is computed from the config, which does not say the cut"
        )
    attributes: dict[str, dict[str, Any]] = {}
    configs: dict[str, dict[str, Any]] = {}
    around = _around(changed)
    for path, module in model.named_modules():
        if path not in around:
            continue
        counterpart = dense.get_submodule(path)
        own = dict(plain_attributes(counterpart))
        other = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain_attributes(module)
            if name in own and value != own[name]
        }
        if other:
            attributes[path] = other
        config, dense_config = getattr(module, "config", None), getattr(counterpart, "config", None)
        if isinstance(config, PreTrainedConfig) and isinstance(dense_config, PreTrainedConfig):
            settings = dict(_other_settings(config, dense_config))
            if settings:
                configs[path] = settings
    before, now = padded_in(dense), padded_in(model)
    padded = {path: sides for path, sides in now.items() if sides != before.get(path)}
    more = {"attributes": attributes, "configs": configs, "padded": padded}
    return {
        "shapes": {name: list(shape) for name, shape in changed.items()},
        **{section: values for section, values in more.items() if values},
    }


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter, a tied one once, and every buffer."""
    return {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _around(names: Iterable[str]) -> set[str]:
    """Paths of the modules that own these weights, and of all around them."""
    return {"", *(path for name in names for path in path_and_parents(name)[1:])}


def _check_computed(model: PreTrainedModel, per_layer: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise `CheckpointError` where a buffer that no file holds would get another value when the model is loaded.

    A number that is derived from a size may be one. Those that are as in the dense model may have been rounded since.
    """
    around = _around(getattr(per_layer.config, PER_LAYER)["shapes"])
    before = dict(_computed_in_place(dense, around))
    for name, value in _computed_in_place(per_layer, around):
        now = model.get_buffer(name).to(value)
        rounding = 4 * torch.finfo(model.dtype).eps if value.is_floating_point() else 0.0
        if not torch.equal(value, before[name]) and not torch.allclose(value, now, rtol=max(rounding, 1e-6), atol=0.0):
            raise CheckpointError(
                f"no folder can hold the model: {name} is computed when it is loaded, and would not be what it is now"
            )


def _computed_in_place(model: PreTrainedModel, around: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The buffers of these modules, of a model on `meta`, that are not saved, computed as when a model is loaded."""
    names = [
        (path, name)
        for path in sorted(around)
        for name in sorted(model.get_submodule(path)._non_persistent_buffers_set)
    ]
    for path, name in names:
        module = model.get_submodule(path)
        setattr(module, name, torch.zeros_like(module.get_buffer(name), device="cpu"))
    for path in sorted(around, key=len, reverse=True) if names else ():  # what lies within first
        holder: Any = model  # the innermost model around a module says how
        for inner, candidate in model.named_modules():
            if isinstance(candidate, PreTrainedModel) and f"{path}.".startswith(f"{inner}."):
                holder = candidate
        holder._init_weights(model.get_submodule(path))
    for path, name in names:
        yield f"{path}.{name}" if path else name, model.get_submodule(path).get_buffer(name)


def _other_settings(config: PreTrainedConfig, dense: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    before: Mapping[str, Any] = dense.to_dict()
    for name, value in config.to_dict().items():
        own, own_dense = vars(config).get(name), vars(dense).get(name)
        if isinstance(own, PreTrainedConfig) and isinstance(own_dense, PreTrainedConfig):
            yield from _other_settings(own, own_dense, f"{prefix}{name}.")
        elif name not in NO_SETTINGS and not name.startswith("_") and name in before and value != before[name]:
            yield f"{prefix}{name}", value


def _dense_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of per-layer shapes, without any of another shape yet."""
    config: Any = model.config
    again = is_per_layer(model)
    model_type = stock_type(config)
    architecture = getattr(config, PER_LAYER)["architecture"] if again else type(model).__name__
    stock: Any = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 - `get` is not lazy
    known = stock is not None and takes(getattr(transformers, architecture, None), stock)
    if not known or not (again or (type(config) is stock and not runs_remote_code(model))):
        raise CheckpointError(
            f"no folder can hold the model: no stock config says its sizes, and {type(model).__name__} with a "
            f"{type(config).__name__} is no class of transformers' own, of which alone other shapes can be said. Cut "
            "all layers alike (leave out --layers)"
        )
    settings = {**config.to_dict(), PER_LAYER: {"model_type": model_type, "architecture": architecture}}
    if settings.pop("serialize_explicit_per_layer_config", False):  # by `set_layer_settings_in_place`, which does again
        for name in ("per_layer_config", "allow_global_per_layer_attribute_access"):
            settings.pop(name, None)
    dense: PreTrainedConfig = per_layer_class(stock).from_dict(settings)
    return dense
