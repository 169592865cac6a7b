"""vLLM gives transformers' greedy tokens from per-layer folders, by its transformers backend and by our plug-in.

`make slow` runs two model types, `make vllm` all of them. vLLM lies in `.venv-vllm`, which the first test makes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import CutOptions, discover, plan, prune, save, score
from secateur.cli.main import run
from secateur.models.loading import load
from secateur.models.modeling_per_layer import PER_LAYER
from secateur.models.tokenizer import load_tokenizer
from servers import ask, serving
from tiny import tiny_tokenizer
from vllm_cases import CASES, FEWEST_KINDS, NEW_TOKENS, PROMPTS, REFUSED, dense, reference, shortfall, write
from vllm_environment import ROOT, SETTINGS, WITHOUT, python, server

pytestmark = pytest.mark.skipif(os.environ.get(WITHOUT) == "1", reason=f"{WITHOUT}=1: without vLLM")
WAYS = {"backend": False, "plugin": True}
NEARLY_BEST = 0.2  # of the spread of logits: what rounding activations once more may turn round
COARSER = {"gemma2": 5}  # times does rounding to bfloat16 turn round more than in llama (unquantized: 0.12 and 0.026)
DAILY = ("llama", "qwen3_moe")  # types that the slow suite runs


def types(*names: str) -> list[object]:
    """Each type as a parameter: the two of the slow suite in it, the others in `make vllm` alone."""
    return [pytest.param(name, marks=pytest.mark.slow if name in DAILY else pytest.mark.vllm) for name in names]


@pytest.mark.parametrize("model_type", types(*CASES))
def test_heads_and_widths_of_every_layer(model_type: str, tmp_path: Path) -> None:
    folder = write(model_type, tmp_path / "folder")
    assert len({json.dumps(layer) for layer in json.loads(config(folder))["per_layer_config"].values()}) > 1
    expected = reference(folder)
    assert len({token for row in expected for token in row}) >= FEWEST_KINDS
    assert server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS) == expected
    if says := CASES[model_type].backend:
        with pytest.raises(RuntimeError, match=says):
            server(plugin=False).generate(folder, PROMPTS, NEW_TOKENS)
    else:
        assert server(plugin=False).generate(folder, PROMPTS, NEW_TOKENS) == expected


@pytest.mark.parametrize("model_type", types("llama", "gemma2", "gpt_neox", "phi3"))
def test_sublayers_that_are_gone_are_for_the_plugin(model_type: str, tmp_path: Path) -> None:
    folder = write(model_type, tmp_path / "folder", gone=("layers.1.attention", "layers.2.mlp"))
    assert server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS) == reference(folder)
    with pytest.raises(RuntimeError, match=r"Layer 1.* does not dispatch through the Transformers attention interface"):
        server(plugin=False).generate(folder, PROMPTS, NEW_TOKENS)


@pytest.mark.parametrize("model_type", types("llama", "qwen2", "gemma2", "phi3"))
def test_layers_are_split_over_two_processes(model_type: str, tmp_path: Path) -> None:
    """A plan for two GPUs: heads and widths differ between layers, and half of each lies in each process.

    vLLM's backend does not split fused projections, of the dense model either.
    """
    model = dense(model_type)
    discovery = discover(model)
    options = CutOptions(ratio=0.35, score="l2", scope="global", tensor_parallel=2)
    decided = plan(discovery, options, scores=score(model, discovery=discovery, name="l2"))
    assert len({group.kept for group in decided.groups}) > 2
    folder = save(
        prune(model, decided, discovery=discovery), tmp_path / "folder", plan=decided, tokenizer=tiny_tokenizer()
    )
    if model_type == "phi3":
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS, tensor_parallel_size=2)
    else:
        assert server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS, tensor_parallel_size=2) == reference(folder)


# What vLLM computes with small weights on this CPU: oneDNN adds products of int8 up in 16 bits without VNNI, where they
# saturate, and the kernel for int4 is built for AVX-512 alone.
EXACT = {
    "w8a8": torch.cpu._is_vnni_supported(),
    "w4a16": torch.backends.cpu.get_cpu_capability() == "AVX512",
    "fp8": True,
}
DAILY_SCHEME = "w8a8" if EXACT["w8a8"] else "fp8"
# Of these vLLM's kernel for int8 multiplies bfloat16 alone, and reads one row of the transformers backend's batch.
AMX = torch.cpu._is_amx_tile_supported()


def quantized(model_type: str, scheme: str) -> object:
    """A type and a scheme as a parameter: one of them is in the slow suite."""
    daily = model_type == "llama" and scheme == DAILY_SCHEME
    marks = [pytest.mark.slow if daily else pytest.mark.vllm]
    if not EXACT[scheme]:
        marks.append(pytest.mark.skip(reason=f"vLLM does not compute {scheme} exactly on this CPU"))
    return pytest.param(model_type, scheme, marks=marks)


QUANTIZED = itertools.product(("llama", "qwen2", "gemma2", "starcoder2"), EXACT)


@pytest.mark.parametrize(("model_type", "scheme"), [quantized(*each) for each in QUANTIZED])
def test_quantized_folders_are_served(model_type: str, scheme: str, tmp_path: Path) -> None:
    """Layers of different sizes with small weights: what vLLM says next is what transformers holds for the best."""
    write(model_type, tmp_path / "cut", widths=(96, 160, 64))
    text = ["--samples", "8", "--length", "32"] if scheme != "fp8" else []
    assert run(["export", str(tmp_path / "cut"), str(tmp_path / "folder"), "--quantize", scheme, *text, "--quiet"]) == 0
    of_amx = scheme == "w8a8" and AMX
    dtype = "bfloat16" if scheme == "w4a16" or of_amx else "float32"  # its kernel for CPUs takes no other
    for plugin in WAYS.values():
        if of_amx and not plugin:
            with pytest.raises(RuntimeError, match="mat1 must be a 2D tensor"):
                server(plugin=plugin).generate(tmp_path / "folder", PROMPTS, NEW_TOKENS, dtype=dtype)
            continue
        found = server(plugin=plugin).generate(tmp_path / "folder", PROMPTS, NEW_TOKENS, dtype=dtype)
        assert len({token for row in found for token in row}) >= FEWEST_KINDS
        coarser = COARSER.get(model_type, 1) if dtype == "bfloat16" else 1
        assert shortfall(tmp_path / "folder", found) < coarser * NEARLY_BEST


@pytest.mark.parametrize("model_type", types("mixtral", "qwen3_moe"))
def test_experts_of_every_layer_are_for_the_plugin(model_type: str, tmp_path: Path) -> None:
    folder = write(model_type, tmp_path / "folder", experts=True)
    assert server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS) == reference(folder)
    with pytest.raises(RuntimeError, match="for this kind of AutoModel: AutoModel"):
        server(plugin=False).generate(folder, PROMPTS, NEW_TOKENS)


@pytest.mark.vllm
@pytest.mark.parametrize("model_type", REFUSED)
def test_what_the_backend_does_not_run_is_refused(model_type: str, tmp_path: Path) -> None:
    write(model_type, tmp_path / "folder")
    for plugin in WAYS.values():
        with pytest.raises(RuntimeError, match=re.escape(REFUSED[model_type].says)):
            server(plugin=plugin).generate(tmp_path / "folder", PROMPTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is copied where it is changed."""
    return write("llama", tmp_path_factory.mktemp("whole") / "folder")


@pytest.mark.slow
class TestDamage:
    """One clear error for a folder that is not as it was written, and other models are served as before."""

    @pytest.fixture
    def folder(self, whole: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(whole, tmp_path / "folder"))

    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(RuntimeError, match=match):
            server(plugin=True).generate(folder, PROMPTS, NEW_TOKENS)

    def test_a_config_that_was_changed(self, folder: Path) -> None:
        settings = json.loads(config(folder))
        settings["num_hidden_layers"] = 2
        (folder / "config.json").write_text(json.dumps(settings))
        self.refused(folder, r"ModelError: .*config\.json has \d+ bytes, \d+ were written\. Copy it again")

    def test_shapes_that_no_dense_model_has(self, folder: Path) -> None:
        (folder / "secateur_manifest.json").unlink()
        settings = json.loads(config(folder))
        settings[PER_LAYER]["shapes"]["model.layers.1.mlp.up_proj.weight"] = [10**9, 192]
        (folder / "config.json").write_text(json.dumps(settings))
        self.refused(folder, r"ModelError: .*model\.layers\.1\.mlp\.up_proj\.weight cannot be \[1000000000, 192\]")

    def test_weights_that_are_cut_off(self, folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refused(folder, r"ModelError: .*model\.safetensors")

    def test_a_uniform_folder_beside_it(self, tmp_path: Path) -> None:
        model = dense("llama")
        options = CutOptions(ratio=0.34, of="units", axes=("attention", "mlp"), scope="local", score="l2")
        decided = plan(discover(model), options, config=model.config, scores=score(model, name="l2"))
        assert decided.settings is not None
        folder = save(prune(model, decided), tmp_path / "stock", plan=decided)
        for plugin in WAYS.values():
            assert server(plugin=plugin).generate(folder, PROMPTS, NEW_TOKENS) == reference(folder)


def test_the_documentation_lists_what_is_tested() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    served = [f"| `{model_type}` | {case.about} |" for model_type, case in CASES.items()]
    refused = [f"| `{model_type}` | {why.says} | {why.because} |" for model_type, why in REFUSED.items()]
    assert re.findall(r"^\| `\w+` \| .*\|$", page, re.MULTILINE) == served + refused


@pytest.mark.slow
@pytest.mark.demo_model
@pytest.mark.parametrize("axes", [(), ("--axes", "attention,mlp,vocabulary", "--of", "parameters")])
def test_the_demo_is_served(axes: tuple[str, ...], tmp_path: Path) -> None:
    """The commands as a user types them, `vllm serve` where tokens of the vocabulary have gone."""
    folder = tmp_path / "demo"
    quick = ["--choose", "score", "--repair", "none", "--prices", "estimated", "--samples", "4"]
    assert run(["prune", "demo", str(folder), *axes, *quick]) == 0
    assert json.loads(config(folder))["model_type"].startswith(PER_LAYER)
    expected = reference(folder)
    for plugin in WAYS.values():
        assert server(plugin=plugin).generate(folder, PROMPTS, NEW_TOKENS) == expected
    if axes:
        check_answers(folder, tmp_path / "log")


def check_answers(folder: Path, log: Path) -> None:
    """`vllm serve` completes a text and answers a chat as the folder does in transformers."""
    prompt, environment = "The capital of France is", {**os.environ, **SETTINGS}
    command = [str(python().with_name("vllm")), "serve", str(folder), "--dtype", "float32", "--max-model-len", "256"]
    command.append("--enforce-eager")  # nothing is compiled, which takes a minute
    with serving(command, log, environment) as port:
        settings = {"model": str(folder), "max_tokens": 8, "temperature": 0}
        completion = ask(port, "/v1/completions", prompt=prompt, **settings)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        message = ask(port, "/v1/chat/completions", messages=chat, **settings)
    model: Any = load(str(folder), device="cpu")
    tokenizer = load_tokenizer(str(folder))
    asked: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for ids, text in (
        (tokenizer(prompt, return_tensors="pt").input_ids, completion["choices"][0]["text"]),
        (asked["input_ids"], message["choices"][0]["message"]["content"]),
    ):
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def config(folder: Path) -> str:
    """The text of its config."""
    return (folder / "config.json").read_text()
