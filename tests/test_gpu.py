"""What is computed on a GPU is what the CPU computes. Without one, the CPU takes its place on paths of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import CalibrationOptions, CutOptions, PruneRecipe, discover, load, prune_model
from secateur.cli.main import run
from secateur.data.windows import calibration_windows
from secateur.models.options import LoadOptions
from secateur.models.streaming import stream_in_place
from secateur.models.tokenizer import load_tokenizer
from secateur.planning.plan import plan
from secateur.pruning.prune import prune
from secateur.pruning.repair import repair
from secateur.scoring.scores import score
from tiny import write_tiny

DEVICE = os.environ.get("SECATEUR_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.gpu
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="compares a GPU with the CPU, and there is none")
CALIBRATION = CalibrationOptions(samples=12, length=32)
CUT = CutOptions(ratio=0.2, axes=("mlp",))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "dense", num_hidden_layers=3)


def pruned(dense: Path, out: Path, device: str) -> Any:
    recipe = PruneRecipe(str(dense), cut=CUT, calibration=CALIBRATION, loading=LoadOptions(device=device))
    return prune_model(recipe, out).plan


@on_a_gpu
@pytest.mark.parametrize("name", ["fisher", "param_mix", "wanda", "obs", "fluctuation"])
def test_scores(name: str, dense: Path) -> None:
    windows = calibration_windows(load_tokenizer(str(dense)), CALIBRATION)
    on_cpu, on_device = (
        score(load(str(dense), device=device), name=name, windows=windows).units for device in ("cpu", DEVICE)
    )
    assert on_cpu.keys() == on_device.keys()
    for group, units in on_cpu.items():
        assert torch.allclose(on_device[group].cpu().float(), units.float(), rtol=1e-2, atol=1e-4 * float(units.max()))


@on_a_gpu
def test_repair(dense: Path, tmp_path: Path) -> None:
    decided = pruned(dense, tmp_path / "out", "cpu")
    windows = calibration_windows(load_tokenizer(str(dense)), CALIBRATION)
    weights = []
    for device in ("cpu", DEVICE):
        model = load(str(dense), device=device)
        weights.append(repair(model, decided, discover(model), windows).weights)
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.allclose(weights[1][name].cpu(), weight, rtol=1e-2, atol=1e-3 * float(weight.abs().max())), name


def test_layers_are_streamed(dense: Path) -> None:
    """A model of which one layer is on the device at a time is scored, repaired and cut as one that is all there."""
    windows = calibration_windows(load_tokenizer(str(dense)), CALIBRATION)
    weights, groups = [], []
    for streams in (False, True):
        model = load(str(dense), device="cpu")
        if streams:
            stream_in_place(model, DEVICE)
        discovery = discover(model)
        decided = plan(discovery, CUT, config=model.config, scores=score(model, name="fisher", windows=windows))
        repaired = repair(model, decided, discovery, windows)
        smaller = prune(model, repaired.plan, discovery=discovery, weights=repaired.weights)
        with torch.no_grad():
            smaller(input_ids=windows.to(next(smaller.get_input_embeddings().parameters()).device))
        weights.append(smaller.state_dict())
        groups.append({group.name: group.kept for group in decided.groups})
    assert sum(abs(groups[0][name] - groups[1][name]) for name in groups[0]) <= 4
    for name, weight in weights[0].items():
        other = weights[1][name].cpu()
        assert weight.shape != other.shape or torch.allclose(
            other, weight, rtol=1e-2, atol=1e-2 * float(weight.abs().max())
        )


@on_a_gpu
def test_a_whole_cut(dense: Path, tmp_path: Path) -> None:
    plans = [pruned(dense, tmp_path / f"out-{n}", device) for n, device in enumerate(("cpu", DEVICE))]
    sizes = [{group.name: group.kept for group in plan.groups} for plan in plans]
    assert sizes[0].keys() == sizes[1].keys()
    assert sum(abs(sizes[0][name] - sizes[1][name]) for name in sizes[0]) <= 4
    losses = [plan.scored["held_out_loss"] for plan in plans]
    assert losses[1]["repaired"] == pytest.approx(losses[0]["repaired"], rel=1e-2)


def test_commands(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prune, train, evaluate and profile, all on the device."""
    out, trained, numbers = tmp_path / "out", tmp_path / "trained", tmp_path / "numbers.json"
    few = ["--samples", "12", "--length", "32"]
    assert run(["prune", str(dense), str(out), *few, "--axes", "mlp", "--device", DEVICE, "--quiet"]) == 0
    words = ["--data", "demo", "--max-steps", "2", "--max-length", "32", "--dtype", "float32"]
    assert run(["recover", str(out), str(trained), *words, "--device", DEVICE, "--quiet"]) == 0
    panel = ["--protocol", "served@32", "--max-tokens", "500", "--json", str(numbers), "--quiet"]
    assert run(["evaluate", str(dense), str(trained), *panel, "--device", DEVICE]) == 0
    on_device = json.loads(numbers.read_text())
    assert run(["evaluate", str(dense), str(trained), *panel, "--device", "cpu"]) == 0
    on_cpu = json.loads(numbers.read_text())
    for one, other in zip(on_device["results"], on_cpu["results"], strict=True):
        assert one["perplexity"][0]["nll"] == pytest.approx(other["perplexity"][0]["nll"], rel=1e-3)
    profile = ["--repeats", "2", "--seq-len", "16", "--new-tokens", "4", "--json", str(numbers), "--quiet"]
    assert run(["profile", str(dense), str(out), *profile, "--device", DEVICE]) == 0
    for each in json.loads(numbers.read_text())["results"]:
        assert each["prefill_seconds"] > 0
        assert each["decode_tokens_per_second"] > 0
