"""The stages of the pipeline: their order, their progress, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import secateur.pipeline.pipeline
from recipes import cut_in_memory, recipe
from secateur.data.calibration import CalibrationOptions
from secateur.discovery.discover import discover
from secateur.discovery.groups import Discovery
from secateur.errors import DataError, PlanError
from secateur.files import PLAN_FILE, RECIPE_FILE
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.pipeline.pipeline import Pipeline
from secateur.pipeline.recipe import load_recipe
from secateur.pipeline.run import prune_model
from secateur.planning.options import CutOptions
from secateur.planning.plan import read_plan
from small_runs import STAGES, emptied, never, raiser, small, weights, write_inputs
from tiny import VOCABULARY, tiny_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def discovery(model: PreTrainedModel) -> Discovery:
    return discover(model)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("cut", "stages"),
    [
        ({}, ["score", "price", "repair", "cut"]),
        ({"prices": "estimated"}, ["score", "repair", "cut"]),
        ({"score": "l2", "repair": "none"}, ["score", "cut"]),
        ({"repair": "reconstruct", "score": "l2"}, ["score", "repair", "cut", "reconstruct"]),
        (
            {"iterations": 2, "score": "param_first", "ratio": 0.4},
            [f"{stage}, iteration {number}" for number in (1, 2) for stage in ("score", "repair", "cut")],
        ),
    ],
    ids=str,
)
def test_stages_come_in_order_and_leave_the_dense_model_as_it_is(
    cut: dict[str, Any], stages: list[str], model: PreTrainedModel, discovery: Discovery, windows: Tensor
) -> None:
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    seen: list[str] = []
    smaller, decided = cut_in_memory(model, discovery, CutOptions(**cut), windows, seen)
    assert seen == stages
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert sum(weight.numel() for weight in smaller.parameters()) == decided.parameters["pruned"]
    assert decided.parameters["pruned"] < decided.parameters["dense"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def place(inputs: Path) -> Iterator[Path]:
    with emptied(inputs):
        yield inputs


class Bars:
    """Notes each stage, and how far it said that it was."""

    def __init__(self) -> None:
        self.stages: dict[str, list[tuple[int, int]]] = {}

    def __call__(self, stage: str) -> Any:
        steps = self.stages.setdefault(stage, [])

        class Bar:
            def __enter__(self) -> Any:
                return lambda done, total: steps.append((done, total))

            def __exit__(self, *_: object) -> None:
                pass

        return Bar()


def test_every_stage_of_a_run_has_a_bar_and_seconds(place: Path) -> None:
    bars = Bars()
    own = CalibrationOptions("self", samples=2, length=12)
    pruned = prune_model(small(calibration=own), "here/out", run=RunOptions(bars=bars))
    assert list(bars.stages) == ["discover", "load", "write", "score", "price", "repair", "cut", "save"]
    assert list(pruned.seconds) == list(bars.stages)
    for stage in ("write", "score", "repair"):
        done, total = bars.stages[stage][-1]
        assert done == total > 0


def test_repair_training_and_what_judges_them_read_text_as_the_model_is_served(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the start token, and scores without: layers trained without it harm a model that is used with it."""
    begin = VOCABULARY - 1
    read: dict[str, list[Tensor]] = {}

    def noted(name: str, tensors: slice) -> None:
        function = getattr(secateur.pipeline.pipeline, name)

        def noting(*arguments: Any, **options: Any) -> Any:
            read[name] = [*arguments[tensors]]
            return function(*arguments, **options)

        monkeypatch.setattr(f"{STAGES}.{name}", noting)

    monkeypatch.setattr("secateur.pipeline.reader.start_tokens", lambda _: torch.tensor([begin]))
    noted("statistics_for", slice(3, 4))
    noted("checked_repair", slice(3, 5))
    noted("checked_reconstruction", slice(3, 5))
    prune_model(small(cut={"repair": "reconstruct"}), "here/out")
    behind = {name: [bool((ids[:, 0] == begin).all()) for ids in windows] for name, windows in read.items()}
    assert behind == {"statistics_for": [False], "checked_repair": [True] * 2, "checked_reconstruction": [True] * 2}


@pytest.mark.parametrize(("dtype", "precision"), [("auto", "medium"), ("float32", "highest")])
def test_products_are_fast_unless_float32_is_asked_for(
    dtype: Any, precision: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine whose fastest products are not exact, as a GPU's."""
    seen: dict[str, set[str]] = {}

    class Watching(Bars):
        def __call__(self, stage: str) -> Any:
            bar = super().__call__(stage)
            noted = seen.setdefault(stage, set())
            type(bar).__enter__ = lambda _: lambda *_: noted.add(torch.get_float32_matmul_precision())
            return bar

    monkeypatch.setattr("secateur.models.precision._exact_at_medium", lambda: False)
    trained = small(cut={"repair": "reconstruct"})
    prune_model(replace(trained, loading=LoadOptions(dtype=dtype)), "here/out", run=RunOptions(bars=Watching()))
    assert seen["score"] == seen["price"] == seen["repair"] == seen["reconstruct"] == {precision}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("preset", "cut", "samples", "varied", "repair"),
    [
        ("best", {}, 512, 0.375, "reconstruct"),  # of so small a model
        ("best", {"repair": "least-squares"}, 512, 0.375, "least-squares"),
        ("best", {"choose": "score", "repair": "none"}, 128, 0.0, "none"),
        ("fast", {}, 24, 0.375, "least-squares"),
        ("llm-pruner", {"layers": (0, 2)}, 10, 0.0, "none"),
    ],
)
def test_calibration_and_repair_are_the_presets(
    preset: str,
    cut: dict[str, Any],
    samples: int,
    varied: float,
    repair: str,
    model: PreTrainedModel,
    discovery: Discovery,
) -> None:
    """Repairs look at a share of windows in random order, and where there is none no window is."""
    chosen = recipe("tiny", preset=preset, cut=cut)
    pipeline = Pipeline(chosen, model=model, discovery=discovery)
    assert pipeline.calibration == replace(
        chosen.calibration, samples=samples, varied=varied, copied=0.0 if preset == "llm-pruner" else 0.125
    )
    assert pipeline.recipe.calibration == pipeline.calibration
    assert pipeline.options.repair == pipeline.recipe.cut.repair == repair


@pytest.mark.parametrize("why", ["weights streamed", "no text left", "a layer refuses"])
def test_layers_of_a_small_model_that_cannot_be_trained_stay_as_repaired(
    why: str, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The rule for small models is no error; whoever asks for the training gets it, or why not."""
    monkeypatch.setattr(CalibrationOptions, "takes_more_time", lambda *_: True)
    monkeypatch.setattr("secateur.data.calibration.MOST_SAMPLES", 4)
    if why == "weights streamed":
        monkeypatch.setattr(f"{STAGES}.check_in_place", raiser(PlanError(why)))
    elif why == "no text left":
        monkeypatch.setattr("secateur.pipeline.reader.WindowReader.held_out", raiser(DataError(why)))
    else:
        monkeypatch.setattr("secateur.pruning.reconstruct._Reconstruction._train", raiser(PlanError(why)))
    prune_model(small(), "here/out")
    assert f"the layers of this small model are not trained: {why}" in caplog.text or why == "no text left"
    assert caplog.text.count("of this small model are not trained") == 1
    recipe_, plan_ = load_recipe(Path("here/out", RECIPE_FILE)), read_plan(Path("here/out", PLAN_FILE))
    assert recipe_.cut.repair == plan_.options.repair == "least-squares"
    prune_model(small(cut={"repair": "least-squares"}), "here/other")
    assert weights("here/out") == weights("here/other")
    asked = small(cut={"repair": "reconstruct"})
    if why == "no text left":
        assert "reconstruct" in prune_model(asked, "here/asked").seconds
    else:
        with pytest.raises(PlanError, match=why):
            prune_model(asked, "here/asked")


def test_layers_of_a_small_model_are_trained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CalibrationOptions, "takes_more_time", lambda *_: True)
    monkeypatch.setattr("secateur.data.calibration.MOST_SAMPLES", 4)
    prune_model(small(), "here/out")
    assert load_recipe(Path("here/out", RECIPE_FILE)).cut.repair == "reconstruct"
    losses = read_plan(Path("here/out", PLAN_FILE)).scored["held_out_loss"]
    assert losses["reconstructed"] <= min(losses["cut"], losses["repaired"])
    prune_model(small(cut={"repair": "reconstruct"}), "here/asked")
    assert weights("here/out") == weights("here/asked")


def test_a_recipe_that_cannot_be_is_refused_at_once(
    model: PreTrainedModel, discovery: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{STAGES}.statistics_for", never("scored"))
    for cut, match in (
        ({"axes": ("layers",), "score": "fisher"}, "score=fisher is not for whole layers"),
        ({"iterations": 2, "of": "latency"}, "several iterations with a budget of latency are not supported"),
    ):
        with pytest.raises(PlanError, match=match):
            Pipeline(recipe("tiny", cut=cut), model=model, discovery=discovery)
