"""Recipes: what is written is read back, options replace what a file says, and errors name file, key and value."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from secateur.data.calibration import CalibrationOptions
from secateur.decoding import build, values_by_field
from secateur.errors import PlanError, RecipeError
from secateur.export.options import ExportRecipe
from secateur.files import plain
from secateur.models.loading import DTYPES
from secateur.models.options import LoadOptions
from secateur.pipeline.recipe import PruneRecipe, load_recipe, prune_recipe, read_whole_recipe, recipe_text
from secateur.planning.options import AXES, ITEM_BYTES, PRESETS, CutOptions, settled
from secateur.scoring.registry import REDUCTIONS, SCORES

SHARES = st.floats(0, 1, exclude_max=True)
RANGES = st.tuples(st.integers(0, 40), st.integers(0, 40)) | st.tuples(SHARES, st.floats(0, 1))


@st.composite
def cut_options(draw: st.DrawFn) -> CutOptions:
    """Any options of a cut that can be together."""
    budget = draw(st.fixed_dictionaries({"ratio": SHARES}) | st.fixed_dictionaries({"target": st.integers(1, 2**40)}))
    alone = st.sampled_from([("hidden",), ("layers",)])
    within = st.lists(st.sampled_from(sorted(AXES.keys() - {"hidden", "layers"})), min_size=1, unique=True).map(tuple)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "axes": within | alone,
        "of": st.sampled_from(["non-embedding", "parameters", "macs", "memory", "latency", "units"]),
        "shape": st.sampled_from(["auto", "uniform", "per-layer"]),
        "repair": st.sampled_from(["auto", "none", "bias", "least-squares", "reconstruct"]),
        "score": st.sampled_from(sorted(SCORES)),
        "reduce": st.sampled_from(["auto", *REDUCTIONS]),
        "choose": st.sampled_from(["auto", "score", "obs"]),
        "scope": st.sampled_from(["auto", "local", "global"]),
        "layers": RANGES,
        "schedule": st.tuples(SHARES, st.floats(0.1, 4)),
        "min_keep": SHARES,
        "round_to": st.integers(1, 512),
        "tensor_parallel": st.integers(1, 8),
        "iterations": st.integers(1, 9),
        "sublayers": st.booleans(),
        "memory_dtype": st.sampled_from(sorted(ITEM_BYTES)),
    }
    choices = draw(st.fixed_dictionaries({}, optional=optional))
    try:
        return CutOptions(**budget, **choices)
    except PlanError:
        assume(False)
        raise


CALIBRATIONS = st.builds(
    CalibrationOptions,
    st.text(min_size=1).filter(lambda text: text != "self" and "@" not in text),
    samples=st.integers(1, 2**31),
    length=st.integers(2, 2**31),
    seed=st.integers(0, 2**31),
    column=st.text(min_size=1),
    chat=st.booleans(),
    score_samples=st.none() | st.integers(1, 2**31),
    varied=st.none() | SHARES,
    copied=st.none() | SHARES,
)
LOADING = st.builds(LoadOptions, st.sampled_from(["auto", *DTYPES]), st.text(), trust_remote_code=st.booleans())
RECIPES = st.builds(PruneRecipe, st.text(), cut=cut_options(), calibration=CALIBRATIONS, loading=LOADING)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that every example of a property writes anew."""
    return tmp_path_factory.mktemp("recipes") / "r.yaml"


class TestRoundTrip:
    @given(recipe=RECIPES)
    def test_what_is_written_is_read_back(self, recipe: PruneRecipe, scratch: Path) -> None:
        scratch.write_text(recipe_text("prune", recipe), encoding="utf-8")
        read = load_recipe(scratch)
        assert read == recipe
        assert repr(read) == repr(recipe)  # whole numbers are whole, and shares are shares
        assert build(PruneRecipe, plain(recipe), "it") == recipe

    @pytest.mark.parametrize("preset", PRESETS)
    def test_presets_too(self, preset: str, scratch: Path) -> None:
        recipe = prune_recipe("demo", preset=preset)
        scratch.write_text(recipe_text("prune", recipe))
        assert load_recipe(scratch) == recipe

    def test_a_plan_is_found_beside_the_recipe(self, scratch: Path) -> None:
        scratch.write_text(recipe_text("prune", PruneRecipe("demo", plan="plan.json")))
        assert load_recipe(scratch).plan == str(scratch.parent / "plan.json")

    def test_every_field_is_in_the_text(self) -> None:
        data = yaml.safe_load(recipe_text("prune", PruneRecipe("demo")))
        assert list(data) == ["command", "model", "cut", "calibration", "loading", "plan"]
        for section, kind in (("cut", CutOptions), ("calibration", CalibrationOptions), ("loading", LoadOptions)):
            assert list(data[section]) == [field.name for field in dataclasses.fields(kind)]


def write(place: Path, text: str) -> Path:
    (place / "r.yaml").write_text(text)
    return place / "r.yaml"


class TestFile:
    def test_what_it_leaves_out_is_the_presets(self, tmp_path: Path) -> None:
        file = write(tmp_path, "model: demo\npreset: llm-pruner\ncalibration: {samples: 3}\n")
        expected = prune_recipe("demo", preset="llm-pruner", calibration={"samples": 3})
        assert load_recipe(file) == expected
        assert (expected.cut.of, expected.calibration.length) == ("units", 64)

    def test_options_win(self, tmp_path: Path) -> None:
        file = write(
            tmp_path,
            "model: demo\npreset: fast\ncut: {target: 70000, of: macs, axes: [mlp]}\nloading: {device: cpu}\n",
        )
        made = prune_recipe(
            "tiny", file=file, cut={"ratio": 0.3}, calibration={"seed": 2}, loading={"dtype": "float32"}
        )
        assert (made.model, made.cut.ratio, made.cut.target) == ("tiny", 0.3, None)  # one budget replaces another
        assert (made.cut.of, made.cut.axes) == ("macs", ("mlp",))
        assert (made.calibration.seed, made.calibration.samples) == (2, 24)
        assert made.loading == LoadOptions(dtype="float32", device="cpu")
        assert prune_recipe(file=file, preset="best").calibration.samples == 128

    @pytest.mark.parametrize(
        "given",
        [
            {"axes": ("hidden",)},
            {"axes": ("layers",)},
            {"of": "units"},
            {"schedule": (0.5, 1.5)},
            {"score": "l2"},
            {"repair": "none", "choose": "score"},
            {"target": 1_000_000},
        ],
    )
    def test_what_followed_from_other_options_in_a_written_recipe_follows_from_those_given(
        self, given: dict[str, Any], tmp_path: Path
    ) -> None:
        own = {"min_keep": 0.1, "score": "param_first"}
        for before in ({}, own):
            made = prune_recipe("demo", cut=before)
            written = dataclasses.replace(made, calibration=settled(made.calibration, made.cut))
            again = prune_recipe(file=write(tmp_path, recipe_text("prune", written)), cut=given)
            expected = prune_recipe("demo", cut=before | given)
            assert again == expected
            settled(again.calibration, again.cut)

    def test_what_is_written_by_hand_stays(self, tmp_path: Path) -> None:
        file = write(tmp_path, "model: demo\ncut: {scope: global}\n")
        with pytest.raises(PlanError, match="of=units takes the same share from every group"):
            prune_recipe(file=file, cut={"of": "units"})

    @pytest.mark.parametrize(
        ("key", "text", "value"),
        [
            ("min_keep", "1e-4", 1e-4),  # text for YAML 1.1
            ("ratio", "1.0e-4", 1e-4),
            ("ratio", "0", 0),
            ("axes", "[mlp, attention]", ("mlp", "attention")),
            ("layers", "[4, 30]", (4, 30)),
            ("layers", "[0.125, 1.0]", (0.125, 1.0)),
            ("layers", "null", None),
            ("schedule", "[.5, 1.5]", (0.5, 1.5)),
            ("sublayers", "yes", True),
        ],
    )
    def test_values_have_the_types_of_their_fields(self, key: str, text: str, value: object, tmp_path: Path) -> None:
        loaded = values_by_field(PruneRecipe, yaml.safe_load(f"model: demo\ncut: {{{key}: {text}}}"), "r.yaml")["cut"][
            key
        ]
        assert (loaded, repr(loaded)) == (value, repr(value))

    def test_layers_by_number_and_by_share(self, tmp_path: Path) -> None:
        by_number = load_recipe(write(tmp_path, "model: demo\ncut: {layers: [0, 1]}\n"))
        by_share = load_recipe(write(tmp_path, "model: demo\ncut: {layers: [0.0, 1.0]}\n"))
        assert by_number.cut.layer_range(32) == (0, 1)
        assert by_share.cut.layer_range(32) == (0, 32)


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("a: " + "[" * 5_000, r"r\.yaml: no recipe can be read; "),
            ("a: [", r"r\.yaml: no recipe can be read; "),
            ("- demo", r"r\.yaml: expected keys with values, for example `model: demo`; found list"),
            ("", r"r\.yaml: expected keys with values, .* found NoneType"),
            ("command: recover\nmodel: demo", r"another command\. Expected `command: prune`"),
            ("cut: {ratio: 0.2}", r"r\.yaml: no model\. Expected one, for example `model: demo`"),
            ("modle: demo", r"r\.yaml: 'modle' is unknown\. Known: model, cut, .*Did you mean model\?"),
            ("cut: {ratoi: 0.2}", r"r\.yaml: cut: 'ratoi' is unknown\. Known: ratio, of, .*Did you mean ratio\?"),
            ("cut: {1: 2}", r"r\.yaml: cut: 1 is unknown\. Known: ratio"),
            ("cut: 3", r"r\.yaml: cut: 3 is no CutOptions"),
            ("cut: {ratio: half}", r"r\.yaml: cut: ratio: 'half' is no float"),
            ("cut: {ratio: true}", r"r\.yaml: cut: ratio: True is no float"),
            ("cut: {ratio: [0.2]}", r"r\.yaml: cut: ratio: \[0\.2\] is no float"),
            ("cut: {min_keep: null}", r"r\.yaml: cut: min_keep: None is no float"),
            ("cut: {iterations: 2.0}", r"r\.yaml: cut: iterations: 2\.0 is no int"),
            ("cut: {iterations: true}", r"r\.yaml: cut: iterations: True is no int"),
            ("cut: {of: mac}", r"r\.yaml: cut: of: 'mac' is no non-embedding or .*Did you mean macs\?"),
            ("cut: {axes: mlp}", r"r\.yaml: cut: axes: 'mlp' is no list"),
            ("cut: {axes: [mpl]}", r"r\.yaml: cut: axes: 'mpl' is no attention or mlp or .*Did you mean mlp\?"),
            ("cut: {layers: [1]}", r"r\.yaml: cut: layers: \[1\] is no list of 2"),
            ("cut: {score: 3}", r"r\.yaml: cut: score: 3 is no str"),
            ("calibration: {samples: many}", r"r\.yaml: calibration: samples: 'many' is no int"),
            ("loading: {dtype: 16}", r"r\.yaml: loading: dtype: 16 is no auto or float32 or"),
            ("plan: 3", r"r\.yaml: plan: 3 is no str"),
        ],
    )
    def test_a_file_that_is_no_recipe(self, text: str, match: str, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=match) as error:
            load_recipe(write(tmp_path, text))
        assert "\n" not in str(error.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"none\.yaml: no recipe can be read; "):
            load_recipe(tmp_path / "none.yaml")

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
        with pytest.raises(RecipeError, match=r"r\.yaml: no recipe can be read; "):
            load_recipe(tmp_path / "r.yaml")

    def test_no_python_objects(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"r\.yaml: no recipe can be read; "):
            load_recipe(write(tmp_path, "model: !!python/object/apply:os.getcwd []"))

    def test_values_that_cannot_be_are_refused_as_everywhere(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r"ratio=1\.5 is outside \[0, 1\)"):
            load_recipe(write(tmp_path, "model: demo\ncut: {ratio: 1.5}"))
        with pytest.raises(PlanError, match=r"preset='bets' is unknown.*Did you mean best\?"):
            load_recipe(write(tmp_path, "model: demo\npreset: bets"))

    @pytest.mark.parametrize("section", ["cut", "calibration", "loading"])
    def test_unknown_options_are_refused_in_python_as_in_a_file(self, section: str) -> None:
        given: dict[str, Any] = {section: {"sampels": 8}}
        with pytest.raises(RecipeError, match=rf"^{section}: 'sampels' is unknown\. Known: "):
            prune_recipe("demo", **given)

    def test_a_whole_recipe_names_its_model(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"r\.yaml: model is missing"):
            read_whole_recipe(write(tmp_path, "command: export"), "export", ExportRecipe)
