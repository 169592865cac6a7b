"""A LoRA adapter and its model become one ordinary folder with the same logits; what is no such adapter is told."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur import CutOptions, SecateurError, discover, load, plan, prune, save, score, verify
from secateur.checkpoint.record import make_record, read_record
from secateur.cli.main import run
from secateur.errors import CheckpointError, ExportError, TrainingError
from secateur.export.merge import merge_adapter
from secateur.export.options import MergeOptions
from secateur.models.silence import quiet
from secateur.planning.plan import read_plan
from tiny import names, tiny_tokenizer, write_tiny

IDS = torch.arange(40)[None]


def write_adapter(base: str, folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """An adapter of random weights, as peft writes it."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = load(base, device="cpu")
        known = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
        adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**known))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(folder)
    return folder


def applied(base: str, folder: Path) -> torch.Tensor:
    """The logits of the model with the adapter put on, not merged."""
    with quiet(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = load(base, device="cpu")
        logits: torch.Tensor = peft.PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=IDS).logits
    return logits


def logits_of(folder: str) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load(folder, device="cpu")(input_ids=IDS).logits
    return logits


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, two cuts of it with plan and record, and adapters for the dense one and the per-layer one."""
    folder = tmp_path_factory.mktemp("shelf")
    dense = load(str(write_tiny(folder / "dense")), device="cpu")
    discovery, scores = discover(dense), score(dense, name="l2")
    for name, layers in (("uniform", None), ("per_layer", (1, 3))):
        options = CutOptions(ratio=0.3, of="units", layers=layers, score="l2")
        decided = plan(discovery, options, config=dense.config, scores=scores)
        record = make_record(dense, name="dense")
        save(prune(dense, decided), folder / name, plan=decided, tokenizer=tiny_tokenizer(), record=record)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for base in ("dense", "per_layer"):
            write_adapter(base, folder / f"{base}_adapter")
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the models in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


class TestMerged:
    @pytest.mark.parametrize(("base", "named"), [("dense", True), ("uniform", False), ("per_layer", False)])
    def test_it_computes_what_both_do(self, base: str, named: bool, place: Path) -> None:
        adapter = write_adapter(base, place / "adapter")
        before = hashlib.sha256(Path(base, "model.safetensors").read_bytes()).hexdigest()
        options = MergeOptions(adapter if named else None)
        done = merge_adapter(base if named else "here/adapter", "here/out", options)
        assert hashlib.sha256(Path(base, "model.safetensors").read_bytes()).hexdigest() == before
        expected = applied(base, adapter)
        assert torch.allclose(logits_of("here/out"), expected, atol=1e-5)
        assert not torch.allclose(logits_of(base), expected, atol=1e-2)
        assert (done.base, done.rank, len(done.changed)) == (base, 3, 21)  # seven matrices of three layers
        assert 0 < done.largest < 100
        assert verify("here/out").problems == ()
        if base != "dense":
            assert read_plan(place / "out/secateur_plan.json") == read_plan(Path(base, "secateur_plan.json"))
        assert not [name for name in names(place / "out") if name.startswith("adapter")]
        assert {"tokenizer.json", "config.json", "secateur_record.json"} <= set(names(place / "out"))

    def test_the_record_goes_on(self, place: Path) -> None:
        copied("per_layer", place)
        merge_adapter("here/adapter", "here/out", command="secateur export")
        before, after = read_record(Path("per_layer")), read_record(place / "out")
        assert before is not None
        assert after is not None
        assert (after.model, after.weights, after.tensors) == (before.model, before.weights, before.tensors)
        about: Any = after.recovery
        assert (about["method"], about["adapter"], about["command"]) == ("lora", "here/adapter", "secateur export")
        assert about["options"]["adapter"] == {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0}
        file = (place / "adapter/adapter_model.safetensors").read_bytes()
        assert about["adapter_weights"] == hashlib.sha256(file).hexdigest()

    def test_its_recipe_makes_it_again(self, place: Path) -> None:
        write_adapter("per_layer", place / "adapter")
        assert run(("export", "here/adapter", "here/out", "--merge-lora", "--quiet")) == 0
        assert run(("export", "here/again", "--recipe", "here/out/recipe.yaml", "--quiet")) == 0
        for name in ("model.safetensors", "config.json", "secateur_plan.json", "recipe.yaml"):
            assert (place / "again" / name).read_bytes() == (place / "out" / name).read_bytes()

    @pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}])
    def test_other_kinds_of_lora(self, settings: dict[str, Any], place: Path) -> None:
        adapter = write_adapter("per_layer", place / "adapter", **settings)
        merge_adapter("here/adapter", "here/out")
        assert torch.allclose(logits_of("here/out"), applied("per_layer", adapter), atol=1e-5)

    def test_the_dtype_stays(self, place: Path) -> None:
        write_tiny(place / "half", dtype=torch.bfloat16)
        write_adapter("here/half", place / "adapter")
        merge_adapter("here/adapter", "here/out")
        assert {weight.dtype for weight in load_file(place / "out/model.safetensors").values()} == {torch.bfloat16}
        assert not torch.equal(logits_of("here/out"), logits_of("here/half"))


def copied(base: str, place: Path) -> Path:
    """A copy of an adapter from the shelf."""
    return Path(shutil.copytree(f"{base}_adapter", place / "adapter"))


class TestRefused:
    """One line, and nothing left behind."""

    def check(
        self,
        error: type[SecateurError],
        match: str,
        place: Path,
        model: str = "here/adapter",
        adapter: Path | None = None,
    ) -> None:
        before = names(place)
        with pytest.raises(error, match=match):
            merge_adapter(model, "here/out", MergeOptions(adapter))
        assert names(place) == before

    def test_a_pickle(self, place: Path) -> None:
        folder = copied("per_layer", place)
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
        self.check(ExportError, "adapter_model.bin is a pickle, which can run code and is not read", place)

    def test_a_model_that_is_none(self, place: Path) -> None:
        self.check(ExportError, "'per_layer' is no folder with an adapter_config.json", place, model="per_layer")

    def test_a_folder_with_an_adapter_that_is_merged(self, place: Path) -> None:
        shutil.copytree(Path("per_layer").resolve(), place / "trained")
        copied("per_layer", place / "trained")
        self.check(ExportError, "which is merged into here/trained already", place, model="here/trained")

    @pytest.mark.parametrize(
        ("setting", "value", "match"),
        [
            ("peft_type", "PREFIX_TUNING", "of type PREFIX_TUNING is not merged here"),
            ("base_model_name_or_path", "/gone", "belongs to '/gone', which is not here .* --adapter here/adapter"),
            ("base_model_name_or_path", None, "does not name the model that the adapter belongs to"),
        ],
    )
    def test_other_settings(self, setting: str, value: str | None, match: str, place: Path) -> None:
        file = copied("per_layer", place) / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
        self.check(ExportError, match, place)

    def test_damaged_settings(self, place: Path) -> None:
        (copied("per_layer", place) / "adapter_config.json").write_text("{")
        self.check(CheckpointError, "adapter_config.json cannot be read", place)

    def test_damaged_weights(self, place: Path) -> None:
        (copied("per_layer", place) / "adapter_model.safetensors").write_bytes(b"half")
        self.check(CheckpointError, "adapter_model.safetensors cannot be read", place)

    def test_of_another_size(self, place: Path) -> None:
        adapter = copied("per_layer", place)
        self.check(TrainingError, "does not take the adapter .*size mismatch", place, model="dense", adapter=adapter)

    def test_of_another_depth(self, place: Path) -> None:
        write_tiny(place / "deep", num_hidden_layers=4)
        adapter = copied("dense", place)
        file = adapter / "adapter_model.safetensors"
        save_file({name: x for name, x in load_file(file).items() if "layers.1." not in name}, file)
        self.check(ExportError, "do not have .*layers.1.* in common", place, model="dense", adapter=adapter)

    def test_nan(self, place: Path) -> None:
        file = copied("dense", place) / "adapter_model.safetensors"
        broken = load_file(file)
        next(iter(broken.values()))[0, 0] = float("nan")
        save_file(broken, file)
        self.check(TrainingError, "the adapter cannot be merged", place)

    def test_the_adapter_s_own_folder(self, place: Path) -> None:
        copied("dense", place)
        with pytest.raises(SecateurError, match=r"holds the (adapter itself|MODEL)"):
            merge_adapter("here/adapter", "here/adapter", overwrite=True)
        assert (place / "adapter/adapter_model.safetensors").is_file()

    def test_a_folder_that_is_there(self, place: Path) -> None:
        copied("dense", place)
        (place / "out").mkdir()
        self.check(CheckpointError, "here/out exists", place)
