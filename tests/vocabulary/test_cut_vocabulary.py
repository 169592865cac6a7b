"""A model and its tokenizer without some tokens: its logits, its folder, and what is trained, compared and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.cli.main import run
from secateur.data.options import DataOptions
from secateur.discovery.groups import Group
from secateur.errors import PlanError
from secateur.files import write_json
from secateur.planning.latency import LatencyTable
from secateur.planning.options import CutOptions
from secateur.planning.plan import read_plan
from secateur.pruning.prune import cut_vocabulary
from secateur.recovery.recipe import RecoverRecipe
from secateur.recovery.setup import load_teacher
from secateur.vocabulary.token_ids import token_id_settings
from tiny import tiny_model, write_tiny

KEEP = [0, *range(3, 290, 2)]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_columns_that_stay(tied: bool) -> None:
    dense = tiny_model(dtype=torch.float64, tie_word_embeddings=tied, bos_token_id=5, eos_token_id=[7, 4])
    dense.generation_config.suppress_tokens = [9, 10]
    smaller = cut_vocabulary(dense, KEEP)
    ids = torch.randint(len(KEEP), (2, 9))
    with torch.no_grad():
        expected = dense(torch.tensor(KEEP)[ids]).logits[..., KEEP]
        torch.testing.assert_close(smaller(ids).logits, expected, rtol=0, atol=1e-12)
    assert smaller.config.vocab_size == len(KEEP)
    assert [KEEP[n] for n in (smaller.config.bos_token_id, *smaller.config.eos_token_id)] == [5, 7]  # 4 has gone
    assert [KEEP[n] for n in smaller.generation_config.suppress_tokens] == [9]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A dense folder, one of fewer tokens, and one of which layers are cut as well, to sizes of their own."""
    base = tmp_path_factory.mktemp("vocabulary")
    dense, stock, per_layer = (base / name for name in ("dense", "stock", "per-layer"))
    write_tiny(dense)
    small = ["--samples", "6", "--length", "32", "--quiet"]
    assert (
        run(["prune", str(dense), str(stock), "--axes", "vocabulary", "--of", "parameters", "--ratio", "0.02", *small])
        == 0
    )
    axes = [
        "--axes",
        "attention,mlp,vocabulary",
        "--of",
        "parameters",
        "--ratio",
        "0.3",
        "--scope",
        "local",
        "--shape",
        "per-layer",
    ]
    assert run(["prune", str(dense), str(per_layer), *axes, *small]) == 0
    return dense, stock, per_layer


def test_a_folder_loads_with_its_tokenizer(folders: tuple[Path, Path, Path]) -> None:
    dense, *smaller = folders
    text = "The `if` statement: Ünï \u65e5\u672c \U0001f600"
    for folder in smaller:
        keep = read_plan(folder / "secateur_plan.json").kept_tokens
        assert keep is not None
        assert len(keep) < 300
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == text
        assert model.config.vocab_size == model(ids).logits.shape[-1] == len(keep) == len(tokenizer)
        assert tokenizer.eos_token_id == model.config.eos_token_id == keep.index(0)
        whole = AutoTokenizer.from_pretrained(dense)
        assert tokenizer.convert_ids_to_tokens([*range(len(keep))]) == whole.convert_ids_to_tokens([*keep])


def test_a_repair_has_nothing_to_do_where_tokens_alone_go(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """As where the vocabulary gives all that a budget over several axes asks for."""
    dense, stock, _ = folders
    found = read_plan(stock / "secateur_plan.json")
    options = CutOptions(axes=("mlp", "vocabulary"), of="parameters", ratio=0.02)
    assert options.repairs
    write_json(tmp_path / "plan.json", replace(found, options=options).to_json())
    assert run(["prune", str(dense), str(tmp_path / "out"), "--plan", str(tmp_path / "plan.json"), "--quiet"]) == 0
    weights = [(each / "model.safetensors").read_bytes() for each in (stock, tmp_path / "out")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("saves", [{"mlp": 0.0001, "vocabulary": 0.25}, {"mlp": 0.25, "vocabulary": 0.0001}])
def test_a_budget_of_time_weighs_tokens_against_channels(
    saves: dict[str, float], folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_a_machine(model: object, discovery: object, groups: list[Group], **others: object) -> LatencyTable:
        """What half of each group saves of a second."""
        sizes = {group.kind: group.units for group in groups}
        return LatencyTable("cpu", 8, 1.0, {kind: ((0.5, saves[kind] / n), (1.0, 0.0)) for kind, n in sizes.items()})

    monkeypatch.setattr("secateur.pipeline.pipeline.latency_table", of_a_machine)
    out = tmp_path / "out"
    axes = ["--axes", "mlp,vocabulary", "--of", "latency", "--ratio", "0.003", "--samples", "6", "--length", "32"]
    assert run(["prune", str(folders[0]), str(out), *axes, "--quiet"]) == 0
    decided = read_plan(out / "secateur_plan.json")
    kept = {group.kind: group.kept for group in decided.groups}
    tokens = kept.get("vocabulary", 300)  # groups that stay whole are in no plan
    assert (tokens < 300) == (saves["vocabulary"] > saves["mlp"])
    assert AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).config.vocab_size == tokens


@pytest.mark.slow
def test_a_process_without_us_loads_the_folder(folders: tuple[Path, Path, Path]) -> None:
    _, stock, _ = folders
    code = (
        "import sys; sys.modules['secateur'] = None\n"
        "from transformers import pipeline\n"
        f"print(pipeline('text-generation', {str(stock)!r})('The', max_new_tokens=4)[0]['generated_text'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("The"), done.stderr


def test_training_learns_from_the_dense_model(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The teacher gives the logits of the tokens that stay, for their ids."""
    dense, _, per_layer = folders
    out, result = tmp_path / "out", tmp_path / "result.json"
    few = ["--max-steps", "3", "--max-length", "32", "--samples", "40", "--json", str(result), "--quiet"]
    assert run(["recover", str(per_layer), str(out), "--data", "demo", *few]) == 0
    assert json.loads(result.read_text())["method"] == "lora+distill"
    keep = read_plan(out / "secateur_plan.json").kept_tokens
    assert keep == read_plan(per_layer / "secateur_plan.json").kept_tokens
    assert keep is not None
    teacher = load_teacher(RecoverRecipe(str(per_layer), DataOptions(("demo",))), str(dense), bf16=False)
    whole = AutoModelForCausalLM.from_pretrained(dense)
    ids = torch.randint(len(keep), (2, 9))
    with torch.no_grad():
        expected = whole(torch.tensor(keep)[ids]).logits[..., list(keep)]
        torch.testing.assert_close(teacher(ids).logits, expected)


@pytest.mark.skipif(
    find_spec("llama_cpp_py_sync") is None, reason="runs files in llama.cpp: pip install 'secateur[gguf]'"
)
def test_llama_cpp_reads_and_writes_the_tokens_that_stay(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """`export` compares texts, greedy tokens and logits with torch's, and fails where they differ."""
    result = tmp_path / "result.json"
    out = tmp_path / "smaller.gguf"
    assert run(["export", str(folders[1]), str(out), "--gguf", "f32", "--json", str(result), "--quiet"]) == 0
    assert out.stat().st_size > 0


def test_two_vocabularies_are_evaluated_by_bytes(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, stock, _ = folders
    file = tmp_path / "result.json"
    assert run(["evaluate", str(dense), str(stock), "--max-tokens", "600", "--json", str(file)]) == 0
    whole, smaller = (model["perplexity"][0] for model in json.loads(file.read_text())["results"])
    assert smaller["tokens_per_byte"] > whole["tokens_per_byte"]
    assert abs(smaller["bytes"] - whole["bytes"]) < 200  # of the same text
    assert smaller["against"]["bits_per_byte"] == smaller["bits_per_byte"] - whole["bits_per_byte"]
    assert "vocabularies differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axes": ("vocabulary",)}, "which of=non-embedding does not count. Use of=parameters"),
        ({"axes": ("mlp",), "keep_text": ("a.txt",)}, "keep_text=a.txt keeps tokens, and axes=mlp cuts none"),
        ({"axes": ("vocabulary",), "of": "parameters", "iterations": 2}, "is cut once, and iterations=2"),
        ({"axes": ("mlp", "vocabulary"), "of": "parameters", "score": "l2"}, "weighs tokens against other units in"),
    ],
)
def test_what_a_vocabulary_is_not_cut_with(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        CutOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"bad_words_ids": [[5, 7], [2]]}, {"bad_words_ids": [[1]]}),
        ({"bad_words_ids": [[7]]}, {"bad_words_ids": None}),
        ({"sequence_bias": [[[5, 7], -1.0], [[5], 2.0]]}, {"sequence_bias": [[[2], 2.0]]}),
        ({"forced_decoder_ids": [[1, 5], [2, 7]]}, {"forced_decoder_ids": [[1, 2]]}),
        ({"suppress_tokens": [2, 7], "eos_token_id": 7}, {"suppress_tokens": [1], "eos_token_id": None}),
        ({"suppress_tokens": [], "bad_words_ids": []}, {}),
    ],
)
def test_a_sequence_that_loses_a_token_is_left_out(settings: dict[str, Any], changed: dict[str, Any]) -> None:
    assert token_id_settings(settings, [0, 2, 5]) == changed
