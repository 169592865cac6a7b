"""Hidden states of the teacher are learned at the layers and channels that a plan has left."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill import some_rows
from test_recover import ROWS, TEXT, farthest, stopped_at

from recipes import recipe
from secateur import CalibrationOptions, DataOptions, RecoverOptions, recover
from secateur.data.reading import read_tuning_data
from secateur.data.rows import IGNORED, collate
from secateur.discovery.discover import discover
from secateur.errors import ModelError, TrainingError
from secateur.models.loading import LoadOptions, load
from secateur.pipeline.run import prune_model
from secateur.planning.plan import read_plan
from secateur.recovery.distillation import KeptTeacher, keep_teacher
from secateur.recovery.hidden_states import Counterparts, counterparts, gathered, states_at, states_loss
from secateur.recovery.result import Recovered
from tiny import names, tiny_model, tiny_tokenizer, write_tiny

CUTS: dict[str, dict[str, Any]] = {
    "mlp": {"ratio": 0.3, "shape": "per-layer"},
    "hidden": {"ratio": 0.34, "axes": ("hidden",), "of": "units"},
    "layers": {"ratio": 0.4, "axes": ("layers",), "of": "units", "layers": (0, 2)},
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, three cuts of it, and rows to train on."""
    folder = tmp_path_factory.mktemp("shelf")
    write_tiny(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    text = CalibrationOptions(str(folder / "text.txt"), 4, 16)
    for name, cut in CUTS.items():
        prune_model(recipe(str(folder / "dense"), cut=cut, calibration=text), folder / name)
    return folder


@pytest.fixture
def place(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the models in reach under short names."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "here"


def train(
    pruned: str, out: str = "here/out", *, resume: bool = False, teacher: str | None = None, **given: Any
) -> Recovered:
    known = {
        "method": "distill",
        "max_steps": 8,
        "global_batch_size": 8,
        "learning_rate": 3e-3,
        "eval_steps": 4,
        "hidden_states_weight": 1.0,
    }
    return recover(
        pruned,
        out,
        data=DataOptions(("rows.json",), max_length=128),
        options=RecoverOptions(**{**known, **given}),
        teacher=teacher,
        loading=LoadOptions("float32", "cpu"),
        resume=resume,
    )


def found_for(name: str, shelf: Path) -> Counterparts:
    dense, cut = (discover(str(shelf / each)) for each in ("dense", name))
    return counterparts(read_plan(shelf / name / "secateur_plan.json"), dense, cut, teacher="dense", width=48)


def distance(pruned: str | Path, shelf: Path, name: str) -> float:
    """How far the states of a folder are from those of the dense model, per place."""
    compared = found_for(name, shelf)
    rows = read_tuning_data(tiny_tokenizer(), DataOptions((str(shelf / "rows.json"),), max_length=128)).train
    model, dense = load(str(pruned), device="cpu"), load(str(shelf / "dense"), device="cpu")
    batch = collate(rows, range(20), pad=0)
    places = batch.pop("labels") != IGNORED
    with torch.no_grad(), gathered(model, compared.layers) as own, gathered(dense, compared.dense_layers) as others:
        model(**batch)
        dense(**batch)
    wanted = states_at(others, compared.dense_layers, places)
    wanted = wanted if compared.channels is None else wanted[..., list(compared.channels)]
    return float(states_loss(states_at(own, compared.layers, places), wanted)) / int(places.sum())


class TestCounterparts:
    def test_by_the_plan(self, shelf: Path) -> None:
        whole = tuple(f"model.layers.{i}" for i in range(3))
        assert found_for("mlp", shelf) == Counterparts(whole, whole, None, 48)
        hidden = found_for("hidden", shelf)
        plan = read_plan(shelf / "hidden" / "secateur_plan.json")
        assert hidden.channels == plan.groups[0].keep
        assert (hidden.layers, hidden.width) == (whole, len(plan.groups[0].keep or ()))
        layers = found_for("layers", shelf)
        keep = read_plan(shelf / "layers" / "secateur_plan.json").groups[0].keep
        assert keep is not None
        assert layers.layers == whole[:2]
        assert layers.dense_layers == tuple(whole[i] for i in keep)

    def test_of_many_layers_some_and_the_last(self, tmp_path: Path) -> None:
        write_tiny(tmp_path / "deep", num_hidden_layers=9)
        found = discover(str(tmp_path / "deep"))
        plan = replace(
            read_plan_of(tmp_path / "deep"), parameters={"dense": sum(p.numel() for p in load_all(tmp_path / "deep"))}
        )
        chosen = counterparts(plan, found, found, teacher="deep", width=48).layers
        assert chosen == tuple(f"model.layers.{i}" for i in (1, 3, 6, 8))

    def test_another_model(self, shelf: Path, tmp_path: Path) -> None:
        write_tiny(tmp_path / "wide", intermediate_size=100)
        plan = read_plan(shelf / "mlp" / "secateur_plan.json")
        with pytest.raises(ModelError, match="which of its hidden states belong to which layer is not known"):
            counterparts(plan, discover(str(tmp_path / "wide")), discover(str(shelf / "mlp")), teacher="wide", width=48)


def read_plan_of(folder: Path) -> Any:
    """A plan that cuts nothing but the MLP of a folder's first layer."""
    cut = {"ratio": 0.02, "layers": (0, 1), "axes": ("mlp",), "score": "l2", "repair": "none"}
    prune_model(recipe(str(folder), cut=cut), folder.with_name("cut"))
    return read_plan(folder.with_name("cut") / "secateur_plan.json")


def load_all(folder: Path) -> list[torch.Tensor]:
    return [*load(str(folder), device="cpu").parameters()]


class TestLoss:
    def test_the_formula(self) -> None:
        student, teacher = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(0)).unbind()
        wanted = 0.0
        for place in range(5):
            for layer in range(3):
                t, s = teacher[place, layer], student[place, layer]
                wanted += float(((s - t) ** 2).mean() / t.var(unbiased=False)) / 3
        assert float(states_loss(student, teacher)) == pytest.approx(wanted, rel=1e-5)

    def test_a_place_with_large_states_counts_as_any_other(self) -> None:
        student, teacher = torch.randn(2, 2, 1, 7, generator=torch.Generator().manual_seed(1)).unbind()
        alone = [float(states_loss(student[i : i + 1], teacher[i : i + 1])) for i in range(2)]
        student[1], teacher[1] = 1000 * student[1], 1000 * teacher[1]
        assert float(states_loss(student, teacher)) == pytest.approx(sum(alone), rel=1e-4)

    def test_other_shapes(self) -> None:
        with pytest.raises(TrainingError, match=r"hidden states of \[1, 1, 4\] .* are \[1, 1, 5\]"):
            states_loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 5))


class TestKept:
    @pytest.mark.parametrize("channels", [None, (3, 5, 40)])
    def test_what_is_read_back_is_what_the_teacher_gives(
        self, channels: tuple[int, ...] | None, tmp_path: Path
    ) -> None:
        model, rows = tiny_model(3), some_rows(300)
        paths = ("model.layers.0", "model.layers.2")
        keep_teacher(
            lambda: model,
            rows,
            tmp_path,
            top_k=2,
            states=Counterparts(paths, paths, channels, len(channels or range(48))),
        )
        kept = KeptTeacher(tmp_path, rows)
        for numbers in ([299, 0, 3], [7]):
            batch = collate(rows, numbers, pad=0)
            labels = batch.pop("labels")
            with torch.no_grad():
                # transformers' own list begins with the embeddings; the last in it has been through the norm
                states = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
                with gathered(model, ["model.layers.2"]) as last:
                    model(**batch, use_cache=False)
            wanted = torch.stack([states[1], last["model.layers.2"]], dim=2)[labels != IGNORED]
            wanted = wanted if channels is None else wanted[..., list(channels)]
            found = kept.of(numbers)["states"]
            assert found.dtype == torch.bfloat16
            assert torch.allclose(found.float(), wanted, rtol=1e-2, atol=1e-3)

    def test_a_disk_without_room(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("secateur.recovery.distillation.shutil.disk_usage", lambda _: usage(10**6, 10**6, 1000))
        with pytest.raises(
            TrainingError, match=r"hidden states at [\d,]+ places take .* GiB free. Expected room for them"
        ):
            train("mlp")
        assert names(place) == []


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "method", "rate"),
        [("mlp", "distill", 2e-4), ("hidden", "lora+distill", 1e-3), ("layers", "distill", 2e-4)],
    )
    def test_the_states_come_nearer(self, name: str, method: str, rate: float, shelf: Path, place: Path) -> None:
        before = distance(name, shelf, name)
        given: dict[str, Any] = {"method": method, "max_steps": 24, "learning_rate": rate, "eval_steps": 24}
        found = train(name, hidden_states_weight=10.0, **given)
        after = distance("here/out", shelf, name)
        train(name, "here/without", hidden_states_weight=0.0, **given)
        assert after < 0.3 * before
        assert after < 0.3 * distance("here/without", shelf, name)
        layers = ", ".join(found_for(name, shelf).layers)
        assert any(f"layers were compared ({layers}); the teacher's took" in note for note in found.notes)
        assert [path for path in names(place) if "/" not in path] == ["out", "without"]

    @pytest.mark.slow
    def test_layers_may_be_computed_again(self, place: Path) -> None:
        for recompute in (False, True):
            train("mlp", f"here/{recompute}", gradient_checkpointing=recompute, max_steps=4)
        assert farthest("here/False", "here/True") < 1e-5

    @pytest.mark.slow
    def test_rows_of_a_step_may_be_computed_in_any_parts(self, place: Path) -> None:
        for micro_batch in (8, 2):
            train("mlp", f"here/{micro_batch}", micro_batch_size=micro_batch, max_steps=4)
        assert farthest("here/8", "here/2") < 2e-5

    def test_a_stopped_run_goes_on(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        train("hidden", "here/whole")
        with stopped_at(6):
            train("hidden")
        monkeypatch.setattr(
            "secateur.recovery.distillation._likeliest", lambda *_: pytest.fail("the teacher read again")
        )
        assert train("hidden", resume=True).resumed
        assert farthest("here/out", "here/whole") == 0


class TestRefused:
    def test_no_plan(self, place: Path) -> None:
        with pytest.raises(ModelError, match=r"'dense' has no secateur_plan.json, which says what layers"):
            train("dense", teacher="dense")
        assert names(place) == []

    def test_another_teacher(self, place: Path) -> None:
        write_tiny(place / "wide", intermediate_size=100)
        with pytest.raises(ModelError, match=r"the plan of the folder is of .*, and the teacher 'here/wide' has"):
            train("mlp", teacher="here/wide")
        shutil.rmtree(place / "wide")
        assert names(place) == []

    @pytest.mark.parametrize(
        ("given", "match"),
        [
            ({"method": "lora", "hidden_states_weight": 1.0}, "method='lora' has no teacher whose hidden states"),
            ({"method": "distill", "hidden_states_weight": -1.0}, "hidden_states_weight=-1.0 is no loss weight"),
        ],
    )
    def test_odd_options(self, given: dict[str, Any], match: str) -> None:
        with pytest.raises(TrainingError, match=match):
            RecoverOptions(**given)
