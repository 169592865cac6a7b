"""What serving needs of a pruned folder: every way to generate, transformers' own server, and what compiles it.

The folders are read where nothing of ours can be imported. What engines that cannot run here need is in
docs/serving.md, with what was tested and what was not.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from families import family_config, family_model
from secateur import CutOptions, discover, plan, prune, save, score
from secateur.export.serving import serving_note, tensor_parallel_sizes
from secateur.models.loading import load
from secateur.models.tokenizer import load_tokenizer
from servers import ask, serving
from tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "qwen2", "gpt_neox")
START = "import sys\nsys.modules['secateur'] = None\n"

# Every way to generate from each folder, compared with the plain one.
WAYS = (
    START
    + """
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

def check_ways(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generated(inputs, model=model, **options):
        mask = options.pop("attention_mask", torch.ones_like(inputs))
        return model.generate(inputs, attention_mask=mask, **settings, **options)[:, inputs.shape[1]:]

    plain = generated(ids, use_cache=False)
    assert torch.equal(generated(ids), plain), "dynamic cache"
    assert torch.equal(generated(ids, cache_implementation="static"), plain), "static cache"
    assert torch.equal(generated(ids[:1], assistant_model=model), plain[:1]), "assisted"
    assert torch.equal(generated(ids[:1], prompt_lookup_num_tokens=2), plain[:1]), "prompt look-up"
    beams = generated(ids, num_beams=3, use_cache=False)
    assert torch.equal(generated(ids, num_beams=3), beams), "beams"

    padded = torch.cat([torch.zeros(2, 4, dtype=ids.dtype), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand(2, -1)
    assert torch.equal(generated(padded, attention_mask=mask), plain), "left padding"

    with torch.no_grad():
        logits = model(ids).logits
    (layers,) = [name for name, module in model.named_modules() if type(module) is nn.ModuleList and "." in name][:1]
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(layers + ".")}
    places |= {f"{layers}.{number}": "disk" for number in range(model.config.num_hidden_layers)}
    options = {"trust_remote_code": True, "attn_implementation": "eager"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=folder + " offload", **options
    ).eval()
    assert {p.device.type for p in offloaded.get_submodule(layers).parameters()} == {"meta"}
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids).logits, logits, atol=1e-4, rtol=0)
    assert torch.equal(generated(ids, model=offloaded), plain), "from the disk"

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
    prompt = "the cat sat"
    read = tokenizer(prompt, return_tensors="pt").input_ids
    text = tokenizer.decode(generated(read)[0], skip_special_tokens=True)
    answer = pipe(prompt, return_full_text=False, **settings)[0]["generated_text"]
    assert answer == text and text, (answer, text)


def check_compiled(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="sdpa").eval()
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain, atol=1e-3, rtol=0)

for folder in sys.argv[2:]:
    check_ways(folder)
if sys.argv[1] == "compile":
    check_compiled(sys.argv[2])
"""
)


def per_layer_folder(family: str, out: Path) -> Path:
    """A folder with heads and channels of some layers cut, so that layers differ."""
    dense = family_model(family_config(family, vocab_size=len(tiny_tokenizer())), dtype=torch.float32)
    options = CutOptions(ratio=0.3, of="units", axes=("attention", "mlp"), layers=(1, 3), score="l2")
    decided = plan(discover(dense), options, scores=score(dense, name="l2"))
    assert decided.settings is None
    return save(prune(dense, decided), out, plan=decided, tokenizer=tiny_tokenizer())


def uniform_folder(out: Path) -> Path:
    """A stock folder with fewer heads and channels."""
    dense: PreTrainedModel = tiny_model()
    options = CutOptions(ratio=0.34, of="units", axes=("attention", "mlp"), scope="local", score="l2")
    decided = plan(discover(dense), options, config=dense.config, scores=score(dense, name="l2"))
    assert decided.settings is not None
    return save(prune(dense, decided), out, plan=decided, tokenizer=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiling",
    [
        "skip",
        pytest.param("compile", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="it calls g++")),
    ],
)
def test_layers_of_different_sizes_generate_in_every_way_and_compile_as_one_graph(
    compiling: str, tmp_path: Path
) -> None:
    folders = [str(per_layer_folder(family, tmp_path / family)) for family in FAMILIES]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WAYS, compiling, *folders]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "expected"),
    [
        (12, 12, 120, (1, 2, 3, 4, 6)),
        (12, 2, 120, (1, 2, 4, 6)),  # KV heads are repeated, two or three times
        (9, 3, 1536, (1, 3)),
        (8, 8, 86, (1, 2)),
        (7, 7, 85, (1,)),
    ],
)
def test_a_model_is_split_over_gpus_that_divide_heads_and_width(
    heads: int, kv_heads: int, width: int, expected: tuple[int, ...]
) -> None:
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = family_config("llama", intermediate_size=width, **sizes)
    assert tensor_parallel_sizes(config) == expected


def test_a_note_tells_what_a_pruned_model_cannot_be_split_over() -> None:
    dense, heads_cut, mlp_cut = (
        family_config("llama", num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=width)
        for heads, width in ((4, 80), (3, 60), (4, 60))
    )
    note = "serving: vLLM splits it over 1 or 3 GPUs (the dense model: 1, 2 or 4); --tensor-parallel N keeps to N"
    assert serving_note(dense, heads_cut) == note
    assert serving_note(dense, mlp_cut) is None


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai", "pydantic")),
    reason="transformers serve is not installed: pip install 'secateur[serve]'",
)
def test_transformers_serves_a_uniform_folder(tmp_path: Path) -> None:
    """The server gives the greedy tokens of the model in this process."""
    folder, prompt = uniform_folder(tmp_path / "pruned"), "the cat sat on"
    code = START + "from transformers.cli.transformers import main\nsys.argv[0] = 'transformers'\nmain()"
    with serving([sys.executable, "-c", code, "serve", str(folder), "--device", "cpu"], tmp_path / "log") as port:
        settings = {"model": str(folder), "prompt": prompt, "max_tokens": 5, "temperature": 0, "stream": False}
        answer = ask(port, "/v1/completions", **settings)
    model: Any = load(str(folder), device="cpu")
    tokenizer = load_tokenizer(str(folder))
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert answer["choices"][0]["text"] == text
