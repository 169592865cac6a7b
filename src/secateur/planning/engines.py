"""The program that is to run the result -> which sizes it takes, and whether it takes what a plan leaves.

What a program's own code says of sizes is in docs/serving.md, with its source.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from secateur.discovery.groups import Group
from secateur.errors import ExportError, PlanError
from secateur.models.attention_calls import attention_calls
from secateur.models.llama_cpp_architectures import architecture, type_of
from secateur.models.loading import skeleton
from secateur.planning.options import CutOptions

MLPS = ("mlp", "expert_mlp", "shared_mlp")
# Kernels of GPUs multiply tiles of 64 columns, and int4 gives as many a scale; rows in GGUF are blocks of 32.
MULTIPLES = {None: 64, "vllm": 64, "sglang": 64, "llama.cpp": 32, "transformers": 1}
FINE = 24  # as many multiples has a width that is rounded without being asked: what is removed stays what was asked for


def usual_multiple(group: Group, options: CutOptions) -> int:
    """What the sizes of a group are multiples of where `round_to` is not given; 1 but for the widths of MLPs.

    The multiple of the engine, or its half, quarter or eighth, if the dense width is one. Without an engine only where
    layers have sizes of their own, and widths are fine enough that rounding hardly changes what is removed.

    >>> group = Group("layers.0.mlp", "mlp", 0, 1536, ())
    >>> usual_multiple(group, CutOptions()), usual_multiple(group, CutOptions(engine="llama.cpp"))
    (64, 32)
    >>> usual_multiple(group, CutOptions(shape="uniform")), usual_multiple(group, CutOptions(engine="sglang"))
    (1, 64)
    """
    if group.kind not in (*MLPS, "vocabulary"):
        return 1
    if options.engine is None and (options.scope == "local" or options.shape == "uniform"):
        return 1
    fewest, multiple = FINE if options.engine is None else 2, MULTIPLES[options.engine]
    while multiple > 1 and (group.units % multiple or group.units < fewest * multiple):
        multiple = multiple // 2 if multiple > 8 else 1
    return multiple


def check_engine(engine: str | None, config: PreTrainedConfig, *, stock: bool, trust_remote_code: bool = False) -> None:
    """Raise `PlanError` where an engine cannot run a model of this config once it is cut.

    `stock` tells whether the config can say the cut, so that layers have one size.
    """
    advice = "Use shape=uniform, or leave engine out"
    if engine == "sglang" and not stock:
        raise PlanError("engine=sglang: no config of the model can say the cut, and it reads no other. Cut other axes")
    if engine == "llama.cpp":
        try:
            known = type_of(config)
        except ExportError as error:
            raise PlanError(f"engine=llama.cpp: {error}") from error
        if not stock and not any(architecture(name).per_layer for name in known.architectures):
            raise PlanError(
                f"engine=llama.cpp: its architecture for {known.name} ({known.architectures[0]}) has layers of one "
                f"size. {advice}"
            )
    if engine == "vllm" and not stock:
        model = skeleton(config, trust_remote_code=trust_remote_code)
        layers = set(range(config.get_text_config().num_hidden_layers))
        if layers - attention_calls(model, flat=True).keys():
            raise PlanError(
                f"engine=vllm: its backend runs layers of different sizes where the model's code calls attention that "
                f"can be replaced, and {type(model).__name__} does not in every layer. {advice}"
            )
