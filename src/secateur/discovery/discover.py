"""MODEL argument, config or model -> its groups: trace the operators, infer the dimensions, join the axes."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.discovery.groups import Discovery
from secateur.discovery.inference import infer
from secateur.discovery.joining import group_axes
from secateur.discovery.sizes import shapes_of
from secateur.discovery.tracing import trace
from secateur.models.classes import config_of
from secateur.models.config import load_config
from secateur.models.loading import skeleton
from secateur.models.trust import runs_remote_code


def discover(
    model: str | PreTrainedConfig | PreTrainedModel, *, name: str | None = None, trust_remote_code: bool = False
) -> Discovery:
    """Find what can be cut in a MODEL argument, a config or a model; no weights are read.

    Custom code runs only with `trust_remote_code`, or where it is the code of the model given.
    Raises `ModelError` or `DiscoveryError`.

    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2)
    >>> discover(config).group("hidden").units
    12
    """
    if isinstance(model, str):
        name = name or model
        config = load_config(model, trust_remote_code=trust_remote_code)
    else:
        config = model if isinstance(model, PreTrainedConfig) else config_of(model)
        trust_remote_code |= isinstance(model, PreTrainedModel) and runs_remote_code(model)
    twin = skeleton(config, trust_remote_code=trust_remote_code)
    if isinstance(model, PreTrainedModel) and shapes_of(model) != shapes_of(twin):
        twin = model  # cut in a way that its config does not say
    return discover_groups(twin, name=name or type(twin).__name__)


def discover_groups(model: nn.Module, *, name: str = "") -> Discovery:
    """Find the groups of a model; its weights may be on `meta`. Raises `DiscoveryError`.

    >>> from transformers import AutoConfig
    >>> from secateur.models.loading import skeleton
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> discovery = discover_groups(skeleton(config))
    >>> [(group.name, group.units) for group in discovery.groups][:3]
    [('layers.0.attention', 2), ('layers.0.head_dim.0', 6), ('layers.0.head_dim.1', 6)]
    """
    return group_axes(infer(trace(model)), name or type(model).__name__)
