"""Model cards: what `README.md` of a folder says, and that the hub's own reader takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from huggingface_hub import ModelCard

from secateur.checkpoint.card import write_card
from secateur.checkpoint.record import Record
from secateur.checkpoint.save import save
from secateur.files import PLAN_FILE, RECORD_FILE, write_json
from secateur.models.card import origin
from secateur.models.manifest import CARD_FILE, read_manifest
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.prune import prune
from tiny import tiny_model

GROUPS = (PlannedGroup("layers.0.mlp", "mlp", 0, units=84, kept=80, keep=tuple(range(80))),)
PARAMETERS = {"dense": 1000, "pruned": 900, "dense_non_embedding": 500, "pruned_non_embedding": 400}
LOSSES = {"before": 2.0, "cut": 3.5, "repaired": 2.75}
PLAN = Plan("tiny", CutOptions(), GROUPS, PARAMETERS, {"dense": 10, "pruned": 9}, {}, scored={"held_out_loss": LOSSES})
RECORD = Record("demo", "0" * 64, None, 0, "float32", {"secateur": "1"}, "secateur prune demo out")
TRAINING = {
    "method": "lora",
    "data": {"sources": ["rows|of`mine.jsonl"]},
    "teacher": "demo",
    "steps": 7,
    "best_step": 7,
    "tokens": 1234,
    "evaluation": [
        {"step": 0, "validation": 3.0, "perplexity": {"novel": None}},
        {"step": 7, "validation": 2.5, "perplexity": {"novel": 40.0}},
    ],
    "command": "secateur recover out better",
    "before": None,
}


def card(folder: Path, *, config: Any = None, plan: Plan | None = PLAN, record: Record | None = RECORD) -> Any:
    """The card of such a folder, as the hub's client reads it."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", config or {"model_type": "opt"})
    if plan is not None:
        write_json(folder / PLAN_FILE, plan.to_json())
    if record is not None:
        write_json(folder / RECORD_FILE, record.to_json())
    write_card(folder, None if record is None else record.model)
    return ModelCard.load(folder / CARD_FILE)


def test_the_card_of_a_cut(tmp_path: Path) -> None:
    made = card(tmp_path)
    assert made.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["secateur", "pruned", "structured-pruning"],
    }
    assert "| parameters outside the embeddings | 500 | 400 | -20.0 % |" in made.text
    assert "| mlp | 1 | 84 | 80 |" in made.text
    assert "| cut and repaired, on held-out windows | 2.000 | 2.750 |" in made.text
    assert "secateur prune demo out\n" in made.text
    assert "trust_remote_code" not in made.text


def test_the_card_of_a_trained_and_packed_per_layer_folder(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "auto_map": {},
        "secateur_per_layer": {},
        "quantization_config": {"quant_method": "torchao"},
    }
    made = card(tmp_path, config=config, record=replace(RECORD, recovery=TRAINING))
    assert made.data.tags == ["secateur", "pruned", "structured-pruning", "distillation", "custom_code", "torchao"]
    assert made.data.to_dict()["base_model_relation"] == "quantized"
    assert "# SmolLM2-135M-Instruct, pruned, trained, quantized" in made.text
    assert "7 steps, 1,234 tokens of `rows|of'mine.jsonl`, with `demo` as teacher" in made.text
    assert "| training, on its validation rows | 3.000 | 2.500 |" in made.text
    assert "| training, perplexity on novel | infinite | 40.000 |" in made.text
    assert "trust_remote_code=True" in made.text
    assert "secateur prune demo out\nsecateur recover out better\n" in made.text


def test_a_card_without_plan_and_record_says_what_is_known(tmp_path: Path) -> None:
    made = card(tmp_path, plan=None, record=None)
    assert "base_model" not in made.data.to_dict()
    assert made.data.tags == ["secateur"]
    assert "The licence is not known here" in made.text


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("license: mit\nlanguage: [de]\nbase_model: a/b", {"license": "mit", "language": ["de"]}),
        ("license: mit\ntags: [secateur]\nbase_model: a/b", {"license": "mit", "base_model": "a/b"}),
        ("license: [", {}),
        ("only text", {}),
    ],
)
def test_the_dense_folder_gives_its_licence_and_a_folder_of_ours_its_base(
    header: str, said: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / CARD_FILE).write_text(f"---\r\n{header}\r\n---\r\n# Title\n---\n", newline="")
    assert origin(str(tmp_path)) == said


def test_a_gguf_says_its_licence(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_license("mit")
    writer.add_languages(["en", "fr"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert origin(str(tmp_path / "x.gguf")) == {"license": "mit", "language": ["en", "fr"]}


def test_a_name_on_the_hub_is_the_base() -> None:
    assert origin("organisation/model") == {"base_model": "organisation/model"}  # no network: no licence is known


def test_a_saved_folder_has_a_card_that_may_be_edited(tmp_path: Path) -> None:
    plan = replace(PLAN, options=replace(PLAN.options, shape="per-layer"), settings=None, refusal="layers differ")
    out = save(prune(tiny_model(), plan), tmp_path / "out", plan=plan, record=RECORD)
    assert CARD_FILE not in (read_manifest(out) or {})
    assert "auto_map" in json.loads((out / "config.json").read_text())
    read: Any = ModelCard.load(out / CARD_FILE)
    assert read.data.tags[-1] == "custom_code"
