"""Options of a cut: presets, what follows from what, every refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from secateur import CalibrationOptions, CutOptions
from secateur.discovery.discover import discover
from secateur.errors import PlanError, ScoreError
from secateur.planning.options import settled, with_preset
from secateur.planning.plan import check_score
from secateur.planning.selection import columns_fitted


def test_the_default_options_are_the_best_preset() -> None:
    best, calibration = with_preset("best")
    assert (best, calibration) == (CutOptions(), CalibrationOptions())
    assert (best.ratio, best.score, best.scope, best.shape) == (0.2, "fisher", "global", "per-layer")
    assert (best.choose, best.repair) == ("obs", "auto")


def test_presets_depart_from_the_default() -> None:
    assert with_preset("fast") == (
        CutOptions(),
        CalibrationOptions(samples=24, held_out=4, score_samples=8, tokens_per_column=2.0),
    )
    paper, text = with_preset("llm-pruner")
    assert (paper.ratio, paper.of, paper.score, paper.repair) == (0.25, "units", "param_first", "none")
    assert paper.layer_range(32) == (4, 30)
    assert (text.samples, text.length, text.score_samples) == (10, 64, None)
    with pytest.raises(PlanError, match=r"'bets' is unknown\. Expected best, fast or llm-pruner\. Did you mean best\?"):
        with_preset("bets")


@pytest.mark.parametrize("preset", ["best", "fast", "llm-pruner"])
def test_a_ratio_means_the_same_under_every_preset(preset: str) -> None:
    assert with_preset(preset, {"ratio": 0.2})[0].of == "non-embedding"
    assert with_preset(preset, {"target": 10**6})[0].of == "non-embedding"
    assert with_preset(preset, {"ratio": 0.2, "of": "macs"})[0].of == "macs"


@pytest.mark.parametrize(("cut", "varied"), [({}, 0.375), ({"choose": "score", "repair": "none"}, 0.0)])
def test_windows_are_varied_where_a_repair_looks_at_them(cut: dict[str, Any], varied: float) -> None:
    for preset in ("best", "fast"):
        options, calibration = with_preset(preset, cut)
        assert settled(calibration, options).varied == varied
        assert settled(replace(calibration, varied=0.0), options).varied == 0
    assert settled(with_preset("best", cut, {"text": "self"})[1], options).varied == 0


def test_wide_matrices_take_more_windows() -> None:
    def windows(preset: str, cut: dict[str, Any], columns: int, **calibration: Any) -> int:
        options, text = with_preset(preset, cut, calibration)
        return settled(text, options, columns=columns).samples

    assert [windows("best", {}, columns) for columns in (1536, 4096, 8960, 11008)] == [128, 128, 280, 344]
    assert [windows("fast", {}, columns) for columns in (1536, 4096, 8960)] == [24, 32, 70]
    assert windows("best", {"repair": "none", "choose": "score"}, 8960) == 128  # nothing is fitted
    assert windows("llm-pruner", {}, 8960) == 10
    assert windows("fast", {}, 8960, samples=8) == windows("best", {}, 8960, samples=8) == 8  # as it was asked
    assert windows("best", {}, 8960, samples=128) == 128
    assert windows("best", {}, 8960, tokens_per_column=16) == 560
    assert windows("best", {}, 8960, text="self") == 64
    again = settled(*with_preset("best")[::-1], columns=8960)
    assert settled(again, CutOptions(), columns=8960) == again


def test_small_models_take_more_windows_where_nobody_says_how_many() -> None:
    def windows(preset: str, cut: dict[str, Any], parameters: int, **calibration: Any) -> int:
        options, text = with_preset(preset, cut, calibration)
        return settled(text, options, columns=64, parameters=parameters).samples

    sizes = (0, 260_000, 12_500_000, 25_000_000, 50_000_000, 10**9)
    assert [windows("best", {}, size) for size in sizes] == [128, 512, 512, 256, 128, 128]
    assert windows("best", {"repair": "none", "choose": "score"}, 260_000) == 128  # nothing is fitted
    assert windows("fast", {}, 260_000) == 24
    assert windows("best", {}, 260_000, samples=128) == 128  # as it was asked
    assert windows("best", {}, 260_000, samples=64, tokens_per_column=8) == 64
    assert windows("best", {}, 260_000, text="self") == 64
    again = settled(*with_preset("best")[::-1], columns=64, parameters=260_000)
    assert settled(again, CutOptions(), columns=64, parameters=260_000) == again


def test_rows_that_make_a_unit_together_are_no_columns() -> None:
    """The first matrix of this MLP has two rows for each of its 40 channels."""
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 1}
    discovery = discover(AutoConfig.for_model("phi3", pad_token_id=0, **sizes))
    assert columns_fitted(discovery, CutOptions()) == 40
    assert columns_fitted(discovery, CutOptions(axes=("attention",))) == 12


@pytest.mark.parametrize("depth", range(2, 100))
def test_shares_of_the_depth_are_the_papers_layers(depth: int) -> None:
    first, last = with_preset("llm-pruner")[0].layer_range(depth)
    assert (first, depth - last) == (round(depth * 4 / 32), round(depth * 2 / 32))


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan])
def test_a_ratio_outside_is_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"ratio=.* is outside \[0, 1\): .* for example ratio=0\.2"):
        CutOptions(ratio=ratio, scope="local", shape="uniform")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.2, "target": 9}, "either a ratio .* or a target"),
        ({"ratio": 0.2, "target": 5}, "either a ratio .* or a target"),
        ({"ratio": 0.2, "of": "parameter"}, "of='parameter' is unknown.*Did you mean parameters?"),
        ({"target": 5, "of": "units"}, "a target counts parameters, macs, bytes"),
        ({"ratio": 0.2, "axes": ("atention",)}, "axes='atention' is unknown.*Did you mean attention?"),
        ({"ratio": 0.2, "axes": ()}, "axes is empty"),
        ({"ratio": 0.2, "axes": ("hidden", "mlp")}, "hidden and layers are cut alone"),
        ({"ratio": 0.2, "round_to": 0}, "round_to=0 is too small. Expected at least 1, for example round_to=64"),
        ({"ratio": 0.2, "shape": "per-layer", "schedule": (-1, 1)}, "schedule=-1:1: expected shares in proportion"),
        ({"ratio": 0.2, "shape": "per-layer", "schedule": (0, 0)}, "schedule=0:0: expected shares in proportion"),
        (
            {"ratio": 0.2, "shape": "uniform", "schedule": (1, 2)},
            "schedule=1:2 gives every layer its share .* scope=local and shape=per-layer",
        ),
        (
            {"ratio": 0.2, "shape": "per-layer", "scope": "global", "schedule": (1, 2)},
            "scope=local and shape=per-layer",
        ),
        ({"ratio": 0.2, "shape": "per-layer", "axes": ("hidden",), "schedule": (1, 2)}, "axes inside layers"),
        ({"ratio": 0.2, "of": "latency", "axes": ("layers",)}, "of=latency times cuts within layers.*of=non-embedding"),
        (
            {"ratio": 0.2, "of": "parameters", "axes": ("mlp", "vocabulary"), "repair": "reconstruct"},
            "repair=reconstruct fits every layer to the dense model's, which axes=mlp,vocabulary changes",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        CutOptions(**options)


def test_scores_and_reductions_are_checked() -> None:
    with pytest.raises(ScoreError, match="score='L1' is unknown"):
        check_score(CutOptions(ratio=0.2, score="L1", scope="local", shape="uniform"))
    wrong: Any = "sums"
    with pytest.raises(PlanError, match=r"reduce='sums' is unknown.*Did you mean sum\?"):
        CutOptions(ratio=0.2, reduce=wrong, scope="local", shape="uniform")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"scope": "globel"},
            r"scope='globel' is unknown\. Expected auto, local or global\. Did you mean global\?",
        ),
        ({"shape": "round"}, "shape='round'"),
        ({"repair": "glue"}, "repair='glue'"),
        ({"choose": "dice"}, "choose='dice'"),
        ({"min_keep": 1.0}, "min_keep=1 is outside"),
        ({"scope": "global", "of": "units"}, "use scope=local"),
        (
            {"engine": "vllm", "axes": ("head_dim",)},
            "engine=vllm runs values as wide as keys, which axes=",
        ),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CutOptions(ratio=0.2, **given)


def test_automatic_options_follow_from_the_others() -> None:
    assert CutOptions().choose == "obs"
    assert CutOptions(score="l2").choose == "score"
    units = CutOptions(of="units")
    assert (units.scope, units.shape, units.repair) == ("local", "uniform", "auto")
    hidden = CutOptions(axes=("hidden",))
    assert (hidden.scope, hidden.repair, hidden.choose) == ("local", "least-squares", "score")
    assert CutOptions(axes=("layers",), score="layer_loss").repair == "none"


@pytest.mark.parametrize(
    ("given", "scope"),
    [
        ({}, "global"),
        ({"score": "wanda"}, "local"),
        ({"score": "a_score_of_mine"}, "local"),
        ({"score": "wanda", "scope": "global"}, "global"),
        ({"score": "l2", "sublayers": True}, "global"),
        ({"of": "units"}, "local"),
    ],
)
def test_scores_in_nats_rank_all_layers(given: dict[str, Any], scope: str) -> None:
    assert CutOptions(**given).scope == scope
