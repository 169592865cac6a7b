"""The cache of a run: what it gives back, what it takes for damaged or another's, and what a run may resume from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import DataError, DiskError
from secateur.models.options import LoadOptions
from secateur.models.tensor_files import METADATA_KEY
from secateur.pipeline.cache import Cache, Iteration, has_begun, run_key, work_folder
from secateur.planning.options import CutOptions
from secateur.planning.plan import Plan, PlannedGroup
from secateur.pruning.repair import Repaired
from secateur.scoring import registry
from secateur.scoring.scores import Scores
from small_runs import CALIBRATION, OTHER_TEXT, emptied, small, top, write_inputs
from tiny import write_tiny

OPTIONS = CutOptions(iterations=3, ratio=0.4)
SCORES = Scores("fisher", "sum", {"mlp": torch.tensor([1.0, 2.0])}, calibration="a0", loss=2.5)
PLAN = Plan("tiny", OPTIONS, (PlannedGroup("mlp", "mlp", 0, 2, 1, (1,)),), {"dense": 8}, {"dense": 8})
WEIGHTS = {"w": torch.arange(3.0)}
OTHER_TEXTS: list[dict[str, Any]] = [
    {"seed": 1},
    {"samples": 5},
    {"length": 17},
    {"chat": True},
    {"score_samples": 3},
    {"text": "demo"},
    {"text": "self"},
    {"text": "in/rows.jsonl"},
    {"text": "in/rows.jsonl", "column": "body"},
]
REPAIRED = Repaired(PLAN, WEIGHTS)


def same(one: Any, other: Any) -> bool:
    """Whether two values of frozen dataclasses, mappings and tensors are equal."""
    return str(one) == str(other) and type(one) is type(other)


def loaded(cache: Cache) -> list[object]:
    """All that a cache can give."""
    return [cache.load_scores(1), cache.load_repair(PLAN), cache.load_iteration(OPTIONS), cache.load_windows()]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("key"))


class TestCache:
    """Every stage comes back as it was saved, for what it was saved for, and nothing else does."""

    def test_without_a_folder_nothing_is_kept(self) -> None:
        cache = Cache(None)
        cache.save_scores(1, SCORES)
        cache.save_repair(PLAN, REPAIRED)
        cache.save_iteration(OPTIONS, Iteration(1, PLAN, WEIGHTS))
        cache.save_windows(torch.ones(2, 3, dtype=torch.int64))
        assert loaded(cache) == [None] * 4
        assert cache.layers(1) is None

    def test_scores_by_iteration(self, tmp_path: Path) -> None:
        cache, later = Cache(tmp_path), replace(SCORES, loss=3.0)
        (tmp_path / "layers-1").mkdir()
        assert cache.layers(1) == tmp_path / "layers-1"
        cache.save_scores(1, SCORES)
        cache.save_scores(2, later)
        assert same((cache.load_scores(1), cache.load_scores(2), cache.load_scores(3)), (SCORES, later, None))
        assert top(tmp_path) == ["scores-1.safetensors", "scores-2.safetensors"]  # layers are in the scores now

    def test_repair_by_plan(self, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        cache.save_repair(PLAN, REPAIRED)
        assert same(cache.load_repair(PLAN), REPAIRED)
        assert cache.load_repair(replace(PLAN, groups=(replace(PLAN.groups[0], keep=(0,)),))) is None
        assert cache.load_repair(replace(PLAN, options=replace(OPTIONS, repair="bias"))) is None

    def test_an_iteration_by_options(self, tmp_path: Path) -> None:
        cache, first = Cache(tmp_path), Iteration(1, PLAN, WEIGHTS)
        cache.save_iteration(OPTIONS, first)
        assert same(cache.load_iteration(OPTIONS), first)
        assert cache.load_iteration(replace(OPTIONS, ratio=0.3)) is None

    def test_an_iteration_removes_scores_of_later_ones(self, tmp_path: Path) -> None:
        """They are of what another run's iteration left."""
        cache = Cache(tmp_path)
        for number in (1, 2, 3):
            cache.save_scores(number, SCORES)
        (tmp_path / "layers-2").mkdir()
        cache.save_iteration(OPTIONS, Iteration(1, PLAN, WEIGHTS))
        assert top(tmp_path) == ["iteration.safetensors", "scores-1.safetensors"]

    def test_windows(self, tmp_path: Path) -> None:
        windows = torch.arange(6).view(2, 3)
        Cache(tmp_path).save_windows(windows)
        assert same(Cache(tmp_path).load_windows(), windows)

    @pytest.mark.parametrize("about", ["[]", "{}", '{"options": 3}', '{"options": {"colour": 1}}', '{"plan": []}', "{"])
    def test_damaged_files_are_not_there(self, about: str, tmp_path: Path) -> None:
        cache = Cache(tmp_path)
        for name in ("scores-1", "repaired", "iteration", "windows"):
            save_file({"hidden": torch.ones(2)}, tmp_path / f"{name}.safetensors", {METADATA_KEY: about})
        (tmp_path / "damage.json").write_text(about)
        assert loaded(cache) == [None] * 4

    @pytest.mark.parametrize(
        ("file", "begun"),
        [
            ("scores-1.safetensors", True),
            ("iteration.safetensors", True),
            ("layers-2/forward-0.safetensors", True),
            ("windows.safetensors", True),
            ("key.json", False),
        ],
    )
    def test_what_is_worth_a_resumption(self, file: str, begun: bool, tmp_path: Path) -> None:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
        assert has_begun(tmp_path) == begun


class TestWorkFolder:
    def work(self, out: Path, error: BaseException | None, *, key: str = "a", resume: bool = False) -> bool:
        """A run that saves scores and ends so; whether there were any."""
        with work_folder(out, key, resume=resume) as folder:
            begun = has_begun(folder)
            Cache(folder).save_scores(1, SCORES)
            if error is not None:
                raise error
        return begun

    @pytest.mark.parametrize(
        ("error", "kept"),
        [(KeyboardInterrupt(), True), (RuntimeError(), True), (DiskError("full"), True), (DataError("no"), False)],
        ids=repr,
    )
    def test_what_a_repetition_would_meet_again_keeps_nothing(
        self, error: BaseException, kept: bool, tmp_path: Path
    ) -> None:
        with pytest.raises(type(error)):
            self.work(tmp_path / "out", error)
        assert top(tmp_path) == ([".out.secateur"] if kept else [])
        assert getattr(error, "__notes__", []) == (
            ["what was done so far is kept: make room, and go on with --resume (resume=True)"]
            if isinstance(error, DiskError)
            else []
        )

    @pytest.mark.parametrize(("key", "resume", "begun"), [("a", True, True), ("a", False, False), ("b", True, False)])
    def test_only_a_resumed_run_of_the_same_key_finds_anything(
        self, key: str, resume: bool, begun: bool, tmp_path: Path
    ) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.work(tmp_path / "out", KeyboardInterrupt())
        assert self.work(tmp_path / "out", None, key=key, resume=resume) == begun
        assert top(tmp_path) == []

    @pytest.mark.parametrize("text", ["{", "[]", "{}"])
    def test_a_damaged_key_is_no_key(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.work(tmp_path / "out", KeyboardInterrupt())
        (tmp_path / ".out.secateur" / "key.json").write_text(text)
        assert not self.work(tmp_path / "out", None, resume=True)


class TestRunKey:
    """Scores may be used again by a run with the same key."""

    @pytest.fixture(autouse=True)
    def place(self, inputs: Path) -> Iterator[None]:
        with emptied(inputs):
            yield

    def key(self, **choices: Any) -> str:
        return run_key(small(**choices))

    @pytest.mark.parametrize(
        "change",
        [
            {"cut": {"score": "param_first"}},
            {"cut": {"reduce": "max"}},
            {"cut": {"axes": ("mlp",)}},
            {"cut": {"layers": (0, 1)}},
            {"cut": {"prices": "estimated"}},
            {"cut": {"within": "model"}},
            *({"calibration": replace(CALIBRATION, **other)} for other in OTHER_TEXTS),
            {"loading": LoadOptions(dtype="float64")},
        ],
        ids=str,
    )
    def test_what_scores_depend_on_changes_it(self, change: dict[str, Any]) -> None:
        assert self.key(**change) != self.key()

    def test_so_does_what_is_read_of_a_folder_of_text(self) -> None:
        folder = Path("here/sources")
        (folder / "package").mkdir(parents=True)
        (folder / "package" / "a.py").write_text("one")
        calibration = replace(CALIBRATION, text=(str(folder),))
        before = self.key(calibration=calibration)
        (folder / ".cache").write_text("hidden")
        assert self.key(calibration=calibration) == before
        (folder / "package" / "a.py").write_text("another")
        assert self.key(calibration=calibration) != before

    def test_so_does_the_code_of_a_score_of_ones_own(self) -> None:
        file, keys = Path("here/mine.py"), list[str]()
        for power in (1, 1, 2):
            text = f"""from secateur import register_score
@register_score("mine")
def mine(evidence):
    return evidence.weight.abs() ** {power}
"""
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
            run_path(str(file))
            keys.append(self.key(cut={"score": "mine"}))
        registry.SCORES.pop("mine")
        assert keys[0] == keys[1] != keys[2]

    def test_what_lies_below_the_model_does_not(self) -> None:
        folder = shutil.copytree("in/tiny", "here/tiny")
        before = self.key(model=folder)
        (Path(folder) / "cut").mkdir()
        (Path(folder) / "cut" / "README.md").write_text("made of it")
        assert self.key(model=folder) == before

    def test_columns_and_templates_of_one_file_differ(self) -> None:
        rows = replace(CALIBRATION, text="in/rows.jsonl")
        keys = {self.key(calibration=each) for each in (rows, replace(rows, column="body"), replace(rows, chat=True))}
        assert len(keys) == 3

    @pytest.mark.parametrize(
        "change",
        [{"ratio": 0.4}, {"target": 50_000}, {"shape": "uniform"}, {"iterations": 2}],
    )
    def test_budgets_do_not_change_it(self, change: dict[str, Any]) -> None:
        assert self.key(cut=change) == self.key()

    def test_the_state_of_files_does(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        keys = [self.key()]
        shutil.copytree("in", tmp_path / "in")
        monkeypatch.chdir(tmp_path)
        keys.append(self.key())  # the same name elsewhere
        Path("in/text.txt").write_text(OTHER_TEXT)
        keys.append(self.key())
        write_tiny(Path("in/tiny"), seed=1, num_hidden_layers=2)
        keys.append(self.key())
        assert len(set(keys)) == 4
