"""What `save` writes is an ordinary model, which a process reads that knows nothing of us."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur import CutOptions, discover, plan, prune, save, score
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record, make_record, read_record, weights_digest
from secateur.checkpoint.save import check_saveable
from secateur.errors import CheckpointError
from secateur.planning.plan import Plan, PlannedGroup, read_plan
from tiny import names, tiny_model, tiny_tokenizer

IDS = torch.arange(2 * 20).reshape(2, 20) % 300
NEW_TOKENS = 8

# Runs where nothing of ours can be imported; writes the logits and the tokens of every folder to the first argument.
READER = """
import sys
sys.modules["secateur"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(2 * 20).reshape(2, 20) % 300
    with torch.inference_mode():
        found[folder + " logits"] = model(input_ids=ids).logits
        found[folder + " cached"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )[:, 20:].contiguous()
    assert len(AutoTokenizer.from_pretrained(folder)("prune").input_ids) > 0
save_file(found, sys.argv[1])
"""


@dataclass(frozen=True)
class Case:
    """A model, a cut, and the config settings that must change."""

    settings: set[str]
    cut: CutOptions
    model: dict[str, Any]
    dtype: torch.dtype = torch.float32


BOTH = CutOptions(ratio=0.35, of="units")
CASES = {
    "attention and mlp": Case({"intermediate_size", "num_attention_heads", "num_key_value_heads"}, BOTH, {}),
    "hidden": Case({"hidden_size"}, CutOptions(ratio=0.25, of="units", axes=("hidden",)), {}),
    "layers": Case({"num_hidden_layers"}, CutOptions(ratio=0.4, of="units", axes=("layers",)), {}),
    "tied": Case({"hidden_size"}, CutOptions(ratio=0.25, of="units", axes=("hidden",)), {"tie_word_embeddings": True}),
    "bfloat16": Case(
        {"intermediate_size"}, CutOptions(ratio=0.3, axes=("mlp",), scope="local", shape="uniform"), {}, torch.bfloat16
    ),
    "query heads": Case({"num_attention_heads"}, CutOptions(ratio=0.5, of="units", axes=("query",)), {}),
}


@dataclass(frozen=True)
class Saved:
    """A pruned model in memory, where it was saved, and what a stranger reads there."""

    model: PreTrainedModel
    plan: Plan
    folder: Path
    logits: Tensor
    cached: Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    parent = tmp_path_factory.mktemp("saved")
    made: dict[str, tuple[PreTrainedModel, Plan]] = {}
    for name, case in CASES.items():
        dense = tiny_model(dtype=case.dtype, **case.model)
        discovery = discover(dense, name="tiny")
        decided = plan(discovery, case.cut, config=dense.config, scores=score(dense, discovery=discovery, name="l2"))
        pruned = prune(dense, decided)
        record = make_record(dense, name="tiny", seed=7, command="secateur prune tiny out")
        save(pruned, parent / name, plan=decided, tokenizer=tiny_tokenizer(), record=record)
        made[name] = pruned, decided
    # -I: neither the environment nor the current folder adds anything that could be imported
    command = [sys.executable, "-I", "-c", READER, "read.safetensors", *CASES]
    subprocess.run(command, cwd=parent, check=True, capture_output=True, text=True)
    read = load_file(parent / "read.safetensors")
    return {name: Saved(*made[name], parent / name, read[f"{name} logits"], read[f"{name} cached"]) for name in CASES}


@pytest.mark.parametrize("name", CASES)
class TestSaved:
    def test_a_stranger_reads_the_same_logits(self, saved: dict[str, Saved], name: str) -> None:
        with torch.inference_mode():
            logits = saved[name].model(input_ids=IDS).logits
        assert saved[name].logits.dtype == logits.dtype == CASES[name].dtype
        assert torch.equal(saved[name].logits, logits)

    def test_the_cache_changes_no_token(self, saved: dict[str, Saved], name: str) -> None:
        if CASES[name].dtype != torch.float32:
            pytest.skip("rounding may turn a tie")
        ids = IDS
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logits = saved[name].model(input_ids=ids, use_cache=False).logits[:, -1].clone()
                logits[:, 0] = -torch.inf  # the end of the text, which the stranger does not take either
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(saved[name].cached, ids[:, IDS.shape[1] :])

    def test_config(self, saved: dict[str, Saved], name: str) -> None:
        settings = saved[name].plan.settings
        assert settings is not None
        assert settings.keys() == CASES[name].settings
        config = json.loads((saved[name].folder / "config.json").read_text())
        assert {key: config[key] for key in settings} == dict(settings)
        assert config["dtype"] == str(CASES[name].dtype).removeprefix("torch.")

    def test_weights(self, saved: dict[str, Saved], name: str) -> None:
        with safe_open(saved[name].folder / "model.safetensors", framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no dict
            dtypes = {file.get_tensor(key).dtype for key in shapes}
        assert shapes == {key: tuple(value.shape) for key, value in saved[name].model.named_parameters()}
        assert dtypes == {CASES[name].dtype}
        assert ("lm_head.weight" in shapes) != ("tie_word_embeddings" in CASES[name].model)
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == saved[name].plan.parameters["pruned"]

    def test_no_file_is_a_pickle(self, saved: dict[str, Saved], name: str) -> None:
        allowed = {".json", ".safetensors", ".jinja", ".txt"}
        assert {path.suffix for path in saved[name].folder.iterdir()} <= allowed

    def test_files_can_be_read_by_others(self, saved: dict[str, Saved], name: str) -> None:
        assert {stat.S_IMODE(path.stat().st_mode) for path in saved[name].folder.iterdir()} == {0o644}

    def test_plan_and_record_lie_beside_the_weights(self, saved: dict[str, Saved], name: str) -> None:
        assert read_plan(saved[name].folder / PLAN_FILE) == saved[name].plan
        record = Record(**json.loads((saved[name].folder / RECORD_FILE).read_text()))
        assert (record.model, record.seed, record.command) == ("tiny", 7, "secateur prune tiny out")
        dense = tiny_model(dtype=CASES[name].dtype, **CASES[name].model)
        assert record.weights == weights_digest(dense)
        assert record.dtype == str(CASES[name].dtype).removeprefix("torch.")

    def test_loading_says_that_nothing_is_missing(self, saved: dict[str, Saved], name: str) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(saved[name].folder, output_loading_info=True)
        report = loaded[1]
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


class TestSave:
    @pytest.fixture
    def pruned(self, saved: dict[str, Saved]) -> Saved:
        return saved["attention and mlp"]

    def test_the_same_bytes_twice(self, pruned: Saved, tmp_path: Path) -> None:
        for name in "ab":
            save(pruned.model, tmp_path / name, plan=pruned.plan)
        assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()

    def test_a_weight_that_is_lost(self, pruned: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = PreTrainedModel.save_pretrained

        def lossy(change: str) -> Any:
            def save_other(self: PreTrainedModel, folder: Path, **_: Any) -> None:
                state = self.state_dict()
                if change == "lacks":
                    del state["model.norm.weight"]
                elif change == "leftover":
                    state["model.extra.weight"] = torch.zeros(3)
                else:
                    state["model.norm.weight"] = torch.zeros(3)
                write(self, folder, state_dict=state)

            return save_other

        for change, match in (
            ("lacks", "lacks model.norm.weight"),
            ("leftover", "has leftover model.extra.weight"),
            ("shape", "has the wrong shape for model.norm.weight"),
        ):
            monkeypatch.setattr(PreTrainedModel, "save_pretrained", lossy(change))
            with pytest.raises(CheckpointError, match=match):
                save(pruned.model, tmp_path / "out", plan=pruned.plan)
            assert names(tmp_path) == []

    def test_a_plan_without_a_stock_folder(self, pruned: Saved, tmp_path: Path) -> None:
        """What no config can say has a folder with code (`test_per_layer`), unless there is no such model."""
        refused = replace(pruned.plan, settings=None, refusal="no setting gives these sizes.")
        check_saveable(refused)
        dense = tiny_model()
        discovery = discover(dense)
        check_saveable(refused, config=dense.config, discovery=discovery)
        layers = (PlannedGroup("layers", "layer", None, 3, 2, (0, 2)),)
        with pytest.raises(CheckpointError, match=r"no folder can hold .*: no setting gives these sizes\. Drop other"):
            check_saveable(replace(refused, groups=layers))
        with pytest.raises(CheckpointError, match=r"no folder can hold"):
            save(pruned.model, tmp_path / "out", plan=replace(refused, groups=layers))
        heads = (PlannedGroup("layers.0.head_dim", "head_dim", 0, 16, 3, (0, 1, 2)),)
        with pytest.raises(CheckpointError, match=r"no model can be made of what the plan leaves: no setting .*, and "):
            check_saveable(replace(refused, groups=heads), config=dense.config, discovery=discovery)
        dense.config.auto_map = {"AutoModelForCausalLM": "code.Model"}
        with pytest.raises(CheckpointError, match="and of a model with custom code only a cut that its config can say"):
            check_saveable(refused, config=dense.config, discovery=discovery)
        assert names(tmp_path) == []


class TestRecord:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_every_bit_counts(self, dtype: torch.dtype) -> None:
        model = nn.Linear(3, 2).to(dtype)
        found = {weights_digest(model)}
        raw = model.weight.data.view(torch.uint8)
        for byte in range(raw.shape[1]):
            for bit in range(8):
                raw[0, byte] ^= 1 << bit
                found.add(weights_digest(model))
                raw[0, byte] ^= 1 << bit
        assert len(found) == 1 + 8 * raw.shape[1]
        assert weights_digest(model) in found

    def test_names_shapes_and_dtypes_count(self) -> None:
        def digest(shape: tuple[int, int], dtype: torch.dtype = torch.float32, name: str = "a") -> str:
            holder = nn.Module()
            holder.register_buffer(name, torch.zeros(shape, dtype=dtype))
            return weights_digest(holder)

        same = digest((2, 3))
        assert same == digest((2, 3))
        assert len({same, digest((3, 2)), digest((2, 3), torch.int32), digest((2, 3), name="b")}) == 4

    def test_order_does_not_count(self) -> None:
        first, second = nn.ModuleDict(), nn.ModuleDict()
        layers = {name: nn.Linear(2, 2) for name in "ab"}
        first.update(layers)
        second.update(dict(reversed(layers.items())))
        assert weights_digest(first) == weights_digest(second)

    def test_round_trip(self) -> None:
        options = {"text": "demo", "seed": 3}
        record = make_record(
            nn.Linear(2, 2), name="x", calibration="hash", calibration_options=options, seed=3, command="c"
        )
        assert Record(**json.loads(json.dumps(record.to_json()))) == record
        assert record.versions.keys() == {"secateur", "torch", "transformers", "python"}
        assert (record.calibration, record.dtype) == ("hash", "float32")
        assert record.calibration_options == options

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ("{", "cannot be read; Expecting property name"),
            ("[" * 100_000, "cannot be read; maximum recursion depth"),
            ("[]", "is damaged: weights cannot be missing"),
            ('{"colour": "green"}', "is damaged: model cannot be missing"),
            ('{"model": 3}', "is damaged: model cannot be 3"),
        ],
    )
    def test_a_damaged_record(self, content: str, match: str, tmp_path: Path) -> None:
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(CheckpointError, match=rf"^[^\n]*{tmp_path.name}: {RECORD_FILE} {match}[^\n]*$"):
            read_record(tmp_path)

    def test_no_record(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").touch()
        assert read_record(tmp_path) is None
        assert read_record(tmp_path / "config.json") is None

    def test_a_record_of_an_earlier_version(self, tmp_path: Path) -> None:
        data = make_record(nn.Linear(2, 2), name="x").to_json()
        del data["calibration_options"], data["tensors"]
        (tmp_path / RECORD_FILE).write_text(json.dumps(data))
        record = read_record(tmp_path)
        assert record is not None
        assert (record.model, record.calibration_options, record.tensors) == ("x", None, None)

    def test_a_record_of_a_later_version(self, tmp_path: Path) -> None:
        data = make_record(nn.Linear(2, 2), name="x").to_json()
        (tmp_path / RECORD_FILE).write_text(json.dumps({**data, "mood": "good"}))
        record = read_record(tmp_path)
        assert record is not None
        assert record.to_json() == data
