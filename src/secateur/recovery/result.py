"""What a training came to, as data and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a training came to: the folder, what was read and measured, seconds by stage, the most memory in bytes."""

    out: Path
    method: str
    steps: int  # that were done
    best_step: int  # whose weights these are
    tokens: int  # that were read in them, without padding
    trained_parameters: int
    rows: int  # to train on
    dropped: Mapping[str, int]  # rows that were left out, by reason
    loss: tuple[tuple[int, float], ...]
    evaluation: tuple[Mapping[str, Any], ...]  # step, validation, perplexity by text, score
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    notes: tuple[str, ...] = ()  # what was done otherwise than asked, and why
    resumed: bool = False
    rounds: tuple[Mapping[str, Any], ...] = ()  # of cutting and training in turns: what each has come to

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `secateur recover --json` writes it."""
        return {
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "out": str(self.out),
            "dropped": dict(self.dropped),
            "seconds": dict(self.seconds),
            "evaluation": [dict(entry) for entry in self.evaluation],
            "rounds": [dict(entry) for entry in self.rounds],
        }


def check_plot() -> None:
    """Raise `TrainingError` where what draws pictures is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainingError("plot needs the package matplotlib. Run: pip install 'secateur[plot]'")


def draw(found: Recovered, path: Path) -> None:
    """Loss over steps, and what was measured on the way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    axes.plot(*zip(*found.loss, strict=True), linewidth=0.8, alpha=0.7, label="loss")
    steps = [entry["step"] for entry in found.evaluation]
    if any(entry["validation"] is not None for entry in found.evaluation):
        axes.plot(steps, [entry["validation"] for entry in found.evaluation], marker="o", label="validation")
    texts = found.evaluation[0]["perplexity"] if found.evaluation else {}
    if texts:
        right = axes.twinx()
        right.set_ylabel("perplexity")
        for name in texts:
            right.plot(steps, [entry["perplexity"][name] for entry in found.evaluation], "--", marker="s", label=name)
        right.legend(loc="upper right")
    axes.axvline(found.best_step, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)
