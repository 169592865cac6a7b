"""The tab that plans a cut: options, the sizes that follow at once, and the plan to download when units are scored."""

# No `from __future__ import annotations`: gradio reads the annotations of handlers.
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from secateur.compare.models import Side
from secateur.errors import SecateurError
from secateur.files import write_json
from secateur.models.options import LoadOptions
from secateur.pipeline.options import RunOptions
from secateur.pipeline.recipe import PruneRecipe, prune_recipe
from secateur.pipeline.run import plan_model
from secateur.planning.options import AXES, PRESETS, TOKENS, BudgetName
from secateur.planning.plan import Plan, plan
from secateur.planning.selection import groups_to_cut
from secateur.progress import Progress, ProgressBars
from secateur.report.tables.plan import size_rows
from secateur.scoring.registry import SCORES

PRESETS_OWN = ("as the preset says", "")
MODELS = "models"  # gradio's queue lets one job at a time compute, so that speeds are fair
BUDGETS = tuple(name for name in get_args(BudgetName) if name != "latency")  # which has to be measured first


@dataclass(frozen=True, slots=True)
class Planner:
    """Plans cuts of the models of a page."""

    run: Path
    """Folder for statistics, which serve the next plan, too."""
    loading: LoadOptions = field(default_factory=LoadOptions)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """Calibration options by name; the preset has the others."""

    def recipe(self, side: Side, preset: str, cut: Mapping[str, Any]) -> PruneRecipe:
        """The preset's recipe, with the options of a cut by name. Raises `SecateurError`."""
        recipe = prune_recipe(side.name, preset=preset, cut=cut, calibration=self.calibration)
        return replace(recipe, loading=self.loading)

    def sizes(self, side: Side, preset: str, cut: Mapping[str, Any]) -> Plan:
        """The sizes of a cut, at once: from the discovery, which is made once. Raises `SecateurError`."""
        return plan(side.discovery, self.recipe(side, preset, cut).cut)

    def units(self, side: Side, preset: str, cut: Mapping[str, Any], bars: ProgressBars | None = None) -> Plan:
        """The plan of a cut, as `secateur plan` makes it; `prune --plan` takes it. Raises `SecateurError`."""
        return plan_model(self.recipe(side, preset, cut), run=RunOptions(folder=self.run, bars=bars))


def plan_tab(page: Any, sides: Sequence[Side], planner: Planner, plans: Path) -> None:
    """Lay out the tab, within an open page; plans to download are written to the folder `plans`."""
    handlers = _Handlers({side.title: side for side in sides}, planner, plans)
    with gr.Row():
        which = gr.Dropdown(list(handlers.sides), label="Model", elem_id="plan-model")
        preset = gr.Dropdown(list(PRESETS), label="Preset", elem_id="plan-preset")
        ratio = gr.Slider(0.01, 0.95, 0.2, step=0.01, label="Ratio to remove", elem_id="plan-ratio")
        of = gr.Dropdown([PRESETS_OWN, *BUDGETS], value="", label="Of")
    with gr.Row():
        score = gr.Dropdown([PRESETS_OWN, *SCORES], value="", label="Score", elem_id="plan-score")
        shape = gr.Dropdown([PRESETS_OWN, "uniform", "per-layer"], value="", label="Shape", elem_id="plan-shape")
        axes = gr.CheckboxGroup(handlers.axes(sides[0].title), label="Axes", info="none: as the preset says")
    status = gr.Markdown(elem_id="plan-status")
    with gr.Row():
        choose = gr.Button("Choose the units", variant="primary", elem_id="choose")
        download = gr.DownloadButton("Download plan.json", interactive=False, elem_id="download")
    with gr.Row():
        sizes = gr.Dataframe(headers=["size", "dense", "pruned", "removed"], label="Sizes", elem_id="plan-sizes")
        layers = gr.Dataframe(label="Units kept", elem_id="plan-layers")
    inputs: list[Any] = [which, preset, ratio, of, score, shape, axes]
    outputs = [status, sizes, layers, download]
    changes = [page.load, *(each.change for each in inputs)]
    gr.on(changes, handlers.sizes, inputs, outputs, trigger_mode="always_last", show_progress="hidden")
    which.change(lambda title: gr.CheckboxGroup(handlers.axes(title), value=[]), which, axes)
    choose.click(handlers.units, inputs, outputs, concurrency_id=MODELS, concurrency_limit=1, show_progress_on=[status])


@dataclass(frozen=True, slots=True)
class _Handlers:
    """What the tab's components call."""

    sides: dict[str, Side]  # by title
    planner: Planner
    plans: Path

    def axes(self, title: str) -> list[str]:
        """The axes of which the model has groups; not tokens, of which the two sides would then have others."""
        kinds = {group.kind for group in self.sides[title].discovery.groups}
        return [axis for axis, wanted in AXES.items() if kinds & set(wanted) and axis != TOKENS]

    def sizes(self, title: str, preset: str, *options: Any) -> list[Any]:
        """The sizes of the cut that was asked for, or why it cannot be made."""
        side, off = self.sides[title], gr.DownloadButton(value=None, interactive=False)
        try:
            planned = self.planner.sizes(side, preset, _cut(*options))
        except SecateurError as error:
            return [f"**{error}**", None, None, off]
        text = "Sizes only. Choose the units to get a plan that `secateur prune` takes."
        return [text, size_rows(planned), layer_rows(side, planned), off]

    def units(
        self,
        title: str,
        preset: str,
        *options: Any,
        progress: Any = gr.Progress(),  # noqa: B008 - how gradio is asked for it
    ) -> list[Any]:
        """The plan, with the file to download."""
        side = self.sides[title]

        @contextmanager
        def bars(stage: str) -> Iterator[Progress]:
            progress(0, desc=stage)
            yield lambda done, total, _="": progress((done, total), desc=stage)

        with errors_shown():
            planned = self.planner.units(side, preset, _cut(*options), bars)
        file = Path(tempfile.mkdtemp(dir=self.plans)) / "plan.json"
        write_json(file, planned.to_json())
        text = f"Units chosen by the score {planned.options.score}: `secateur prune {side.name} OUT --plan plan.json`"
        on = gr.DownloadButton(value=str(file), interactive=True)
        return [text, size_rows(planned), layer_rows(side, planned), on]


def _cut(ratio: float, of: str, score: str, shape: str, axes: list[str]) -> dict[str, Any]:
    """Options of a cut by name; what is left to the preset is not there."""
    options = {"ratio": ratio, "of": of, "score": score, "shape": shape, "axes": tuple(axes)}
    return {name: value for name, value in options.items() if value}


def layer_rows(side: Side, planned: Plan) -> dict[str, Any]:
    """A row for each layer, a column for each kind of units, as a Dataframe takes them."""
    stays = {group.name: group.kept for group in planned.groups}
    layers: dict[str, dict[str, tuple[int, int]]] = {}  # layer -> kind -> units kept, and all
    for groups in groups_to_cut(side.discovery, replace(planned.options, layers=None)).values():
        for group in groups:
            found = layers.setdefault("model" if group.layer is None else f"layer {group.layer}", {})
            before = found.get(group.kind, (0, 0))
            found[group.kind] = (before[0] + stays.get(group.name, group.units), before[1] + group.units)
    kinds = [*dict.fromkeys(kind for kept in layers.values() for kind in kept)]
    texts = [["{:,} of {:,}".format(*kept[kind]) if kind in kept else "" for kind in kinds] for kept in layers.values()]
    return {"headers": ["", *kinds], "data": [[layer, *row] for layer, row in zip(layers, texts, strict=True)]}


@contextmanager
def errors_shown() -> Iterator[None]:
    """Show an error of ours on the page, and not in the terminal."""
    try:
        yield
    except SecateurError as error:
        raise gr.Error(str(error), print_exception=False, duration=None) from error
