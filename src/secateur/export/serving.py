"""Config of a stock folder -> over how many GPUs a serving engine can split it."""

from __future__ import annotations

from transformers import PreTrainedConfig

MOST = 8  # GPUs of one machine


def tensor_parallel_sizes(config: PreTrainedConfig) -> tuple[int, ...]:
    """The numbers of GPUs, up to `MOST`, over which vLLM can split the layers of a model with this config.

    Its rules, as of 0.33: the query heads and the width of the MLP divide by the number; the KV heads do, or else the
    number divides by them, and they are repeated (`ModelConfig.verify_with_parallel_config`, `QKVParallelLinear`,
    `ColumnParallelLinear`). Sizes that a config does not name are taken to divide.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    widths = [getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "moe_intermediate_size")]
    divided = [size for size in (heads, *widths) if isinstance(size, int) and size]

    def fits(gpus: int) -> bool:
        shared = not isinstance(kv_heads, int) or kv_heads % gpus == 0 or gpus % kv_heads == 0
        return shared and all(size % gpus == 0 for size in divided)

    return tuple(gpus for gpus in range(1, MOST + 1) if fits(gpus))


def serving_note(dense: PreTrainedConfig, pruned: PreTrainedConfig) -> str | None:
    """What to say where the pruned model can no longer be split as the dense one can; None where it can.

    >>> from transformers import AutoConfig
    >>> sizes = {"hidden_size": 96, "ffn_dim": 120, "num_hidden_layers": 2, "word_embed_proj_dim": 96}
    >>> dense, pruned = (AutoConfig.for_model("opt", num_attention_heads=heads, **sizes) for heads in (12, 9))
    >>> serving_note(dense, pruned)
    'serving: vLLM splits it over 1 or 3 GPUs (the dense model: 1, 2, 3, 4 or 6); --tensor-parallel N keeps to N'
    """
    before, after = tensor_parallel_sizes(dense), tensor_parallel_sizes(pruned)
    if set(before) <= set(after):
        return None
    return (
        f"serving: vLLM splits it over {_listed(after)} (the dense model: {_listed(before, unit='')}); "
        "--tensor-parallel N keeps to N"
    )


def _listed(numbers: tuple[int, ...], *, unit: str = " GPUs") -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}{unit}" if others else f"{last}{unit.rstrip('s')}"
