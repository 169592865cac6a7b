"""The tab that plans a cut: options, the sizes that follow at once, and the plan to download."""

# No `from __future__ import annotations`: gradio reads the annotations of handlers.
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from secateur.compare.models import Side
from secateur.compare.plans import Planner, kept_by_layer, possible_axes
from secateur.errors import SecateurError
from secateur.files import write_json
from secateur.planning.options import PRESETS, BudgetName
from secateur.planning.plan import Plan
from secateur.progress import Progress
from secateur.report.tables.plan import size_rows
from secateur.scoring.registry import SCORES

PRESETS_OWN = ("as the preset says", "")
MODELS = "models"  # gradio's queue lets one job at a time compute, so that speeds are fair
BUDGETS = tuple(name for name in get_args(BudgetName) if name != "latency")  # which has to be measured first


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
        return possible_axes(self.sides[title].discovery)

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
    layers = kept_by_layer(side, planned)
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
