"""stories260K, a tiny Llama trained until it had converged -> a folder of transformers, and two texts of its kind.

    python benchmarks/stories.py FOLDER --text STORIES [--out FOLDER]

FOLDER has `stories260K.bin`, weights in llama2.c's form (version 0), and `tok512.bin`, its tokenizer; STORIES is a file
of TinyStories, with `<|endoftext|>` between two. The second half of the stories is written to `calibration.json`, the
first, which is measured, to `test.txt`.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from secateur.models.silence import quiet

LAYER = {  # in the file's order, each stacked over the layers; weights are (out, in)
    "input_layernorm": ("hidden",),
    "self_attn.q_proj": ("hidden", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "hidden"),
    "post_attention_layernorm": ("hidden",),
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
    "mlp.up_proj": ("inner", "hidden"),
}
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = len(SPECIAL)  # the first of 256 tokens for bytes
BETWEEN = "<|endoftext|>"


def read_model(file: Path) -> PreTrainedModel:
    """The model of a llama2.c file whose output head is its table of embeddings. Raises `ValueError` for another."""
    data = file.read_bytes()
    header = struct.unpack("<7i", data[:28])
    hidden, inner, layers, heads, kv_heads, vocabulary, positions = header
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    sizes = {"hidden": hidden, "inner": inner, "kv": hidden // heads * kv_heads}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocabulary, hidden)}
    shapes |= {name: (layers, *(sizes[each] for each in dims)) for name, dims in LAYER.items()}
    shapes |= {"norm": (hidden,), "rotary": (2, positions, hidden // heads // 2)}
    counts = [torch.Size(shape).numel() for shape in shapes.values()]
    if sum(counts) != len(numbers):
        raise ValueError(f"{file} has {len(numbers):,} weights, its header {header} wants {sum(counts):,}")
    parts = {
        name: part.reshape(shape)
        for (name, shape), part in zip(shapes.items(), numbers.split(counts), strict=True)
        if name != "rotary"
    }
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    weights = {"lm_head.weight": parts["embed_tokens"]}
    for name, part in parts.items():
        if name not in LAYER:
            weights[f"model.{name}.weight"] = part
            continue
        for layer, weight in enumerate(part):
            rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            weights[f"model.layers.{layer}.{name}.weight"] = weight if rotated is None else halves(weight, rotated)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head whose rotated pairs are neighbours, in transformers' order: pairs lie half a head apart.

    >>> halves(torch.arange(4.0)[:, None], heads=1).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Byte pairs, merged by score, with single bytes for what has no token."""
    data, at, pieces = file.read_bytes(), 4, list[tuple[str, float]]()
    while at < len(data):
        score, length = struct.unpack("<fi", data[at : at + 8])
        pieces.append((data[at + 8 : at + 8 + length].decode(errors="replace").replace(" ", "▁"), score))
        at += 8 + length
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *(name for name, _ in pieces[BYTES + 256 :])]
    scores = dict(pieces[BYTES + 256 :])
    merges = [
        (name[:cut], name[cut:])
        for name in sorted(scores, key=lambda each: -scores[each])
        for cut in range(1, len(name))
        if name[:cut] in scores and name[cut:] in scores
    ]
    vocabulary = {name: token for token, name in enumerate(names)}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def main() -> None:
    """Write the folder and the texts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo/stories260K"))
    arguments = parser.parse_args()
    with quiet():
        read_model(arguments.folder / "stories260K.bin").save_pretrained(arguments.out)
        read_tokenizer(arguments.folder / "tok512.bin").save_pretrained(arguments.out)
    stories = [story.strip() for story in arguments.text.read_text(encoding="utf-8").split(BETWEEN)]
    half = len(stories) // 2
    rows = [{"text": story} for story in stories[half:]]
    (arguments.out / "calibration.json").write_text(json.dumps(rows), encoding="utf-8")
    (arguments.out / "test.txt").write_text("\n".join(stories[:half]), encoding="utf-8")


if __name__ == "__main__":
    main()
