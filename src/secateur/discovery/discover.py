"""MODEL argument, config or model -> its groups: trace the operators, infer the dimensions, join the axes.

Most code reads any row of token ids. Some looks for tokens of its own in each row, and fails without them: the rows of
such a model begin with what its tokenizer puts before a text, or with special tokens that its config names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.data.windows import start_tokens as tokenizer_start_tokens
from secateur.discovery.groups import Discovery
from secateur.discovery.inference import infer
from secateur.discovery.joining import group_axes
from secateur.discovery.sizes import shapes_of
from secateur.discovery.tracing import FAKE_TENSORS, trace
from secateur.errors import DiscoveryError, ModelError
from secateur.models.classes import config_of
from secateur.models.config import load_config, special_token_ids
from secateur.models.loading import skeleton
from secateur.models.silence import silence_logger
from secateur.models.tokenizer import load_tokenizer
from secateur.models.trust import runs_remote_code

logger = logging.getLogger(__name__)


def discover(
    model: str | PreTrainedConfig | PreTrainedModel,
    *,
    name: str | None = None,
    start_tokens: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> Discovery:
    """Find what can be cut in a MODEL argument, a config or a model; no weights are read.

    Custom code runs only with `trust_remote_code`, or where it is the code of the model given. Where it fails without
    certain tokens, every row that it is shown begins with `start_tokens`; None: those that are needed are looked for.
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
    name = name or type(twin).__name__
    if start_tokens is not None:
        return discover_groups(twin, name=name, start_tokens=start_tokens)
    try:
        with silence_logger(FAKE_TENSORS):
            return discover_groups(twin, name=name)
    except DiscoveryError as error:
        if not runs_remote_code(twin):
            raise DiscoveryError(
                f"{error}. If it takes more than what was found, say what: --inputs FILE (register_inputs)"
            ) from error
        for tokens in _tokens_to_try(twin, model if isinstance(model, str) else config.name_or_path or ""):
            if _runs_with(twin, tokens):
                return discover_groups(twin, name=name, start_tokens=tokens)
        raise DiscoveryError(
            f"{error}. If its code looks for tokens in every row, name their ids: --start-tokens 1,2 "
            "(start_tokens=(1, 2))"
        ) from error


def _tokens_to_try(model: PreTrainedModel, source: str) -> Iterator[list[int]]:
    """What custom code may look for: what the tokenizer puts before a text, else what it needs of the config's."""
    try:
        yield tokenizer_start_tokens(load_tokenizer(source, trust_remote_code=True)).tolist()
    except ModelError as error:
        logger.debug("no tokenizer that says what a row begins with: %s", error)
    needed = special_token_ids(model.config)
    for token in [*needed]:
        fewer = [each for each in needed if each != token]
        needed = fewer if _runs_with(model, fewer) else needed
    yield needed


def _runs_with(model: nn.Module, tokens: Sequence[int]) -> bool:
    """Whether the model's code runs on rows that begin with these tokens."""
    try:
        with silence_logger(FAKE_TENSORS):
            trace(model, start_tokens=tokens)
    except DiscoveryError as error:
        logger.debug("rows that begin with %s: %s", tokens, error)
        return False
    return True


def discover_groups(model: nn.Module, *, name: str = "", start_tokens: Sequence[int] = ()) -> Discovery:
    """Find the groups of a model; its weights may be on `meta`. Raises `DiscoveryError`.

    >>> from transformers import AutoConfig
    >>> from secateur.models.loading import skeleton
    >>> config = AutoConfig.for_model("opt", hidden_size=12, num_attention_heads=2, ffn_dim=48, word_embed_proj_dim=12)
    >>> discovery = discover_groups(skeleton(config))
    >>> [(group.name, group.units) for group in discovery.groups][:3]
    [('layers.0.attention', 2), ('layers.0.head_dim.0', 6), ('layers.0.head_dim.1', 6)]
    """
    found = group_axes(infer(trace(model, start_tokens=start_tokens)), name or type(model).__name__)
    return replace(found, start_tokens=tuple(start_tokens))
