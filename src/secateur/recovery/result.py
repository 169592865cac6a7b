"""The result of a training: as data, as files beside the weights, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.files import write_json

CURVES_FILE = "secateur_curves.json"
PLOT_FILE = "secateur_curves.png"


@dataclass(frozen=True, slots=True)
class RecoverResult:
    """What a training wrote, read and measured."""

    out: Path
    method: str
    steps: int  # done
    best_step: int  # whose weights are in `out`
    tokens: int  # read in all steps, without padding
    trained_parameters: int
    rows: int  # to train on
    dropped: Mapping[str, int]  # rows by reason
    loss: tuple[tuple[int, float], ...]  # (step, nats per label)
    evaluation: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
    seconds: Mapping[str, float]  # by stage
    peak_rss_bytes: int = 0
    notes: tuple[str, ...] = ()  # what was done differently than asked, and why
    resumed: bool = False
    diverged: str | None = None  # what became NaN or Inf; the weights are those of the best checkpoint before

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur recover --json` writes it."""
        return {**asdict(self), "out": str(self.out)}


def write_curves(result: RecoverResult, folder: Path, *, plot: bool) -> None:
    """Write the loss and the evaluations as JSON and, with `plot`, as a picture."""
    data = result.to_json()
    write_json(folder / CURVES_FILE, {"loss": data["loss"], "evaluation": data["evaluation"]})
    if plot:
        _draw(result, folder / PLOT_FILE)


def _draw(result: RecoverResult, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    axes.plot(*zip(*result.loss, strict=True), linewidth=0.8, alpha=0.7, label="loss")
    steps = [entry["step"] for entry in result.evaluation]
    if any(entry["validation"] is not None for entry in result.evaluation):
        axes.plot(steps, [entry["validation"] for entry in result.evaluation], marker="o", label="validation")
    texts = result.evaluation[0]["perplexity"] if result.evaluation else {}
    if texts:
        right = axes.twinx()
        right.set_ylabel("perplexity")
        for name in texts:
            right.plot(steps, [entry["perplexity"][name] for entry in result.evaluation], "--", marker="s", label=name)
        right.legend(loc="upper right")
    axes.axvline(result.best_step, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
