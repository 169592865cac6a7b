"""Calibration text, or images or sound with their texts -> the windows that a model reads, as it is served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from secateur.data.calibration import CalibrationOptions
from secateur.data.encoder_windows import as_read
from secateur.data.pairs import holds_pairs, reader_of
from secateur.data.windows import CalibrationTokens, behind, calibration_windows, held_out_windows, start_tokens
from secateur.models.classes import objective_of
from secateur.models.config import check_positions, class_of
from secateur.models.inputs import check_reads_text


class WindowReader:
    """Reads the windows of one model and its calibration; `needed` are tokens that its code looks for in every row."""

    def __init__(
        self,
        model: str,
        config: PreTrainedConfig,
        calibration: CalibrationOptions,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        needed: Sequence[int] = (),
        trust_remote_code: bool = False,
    ) -> None:
        self.model, self.config, self.calibration, self.trust = model, config, calibration, trust_remote_code
        self.tokenizer = tokenizer
        self.needed = torch.tensor([*needed], dtype=torch.int64)
        self.start: Tensor | None = None  # what goes before a text that is served, once this has begun
        self._tokens: CalibrationTokens | None = None  # of the texts, until the last windows are read

    def check_reads_text(self) -> None:
        """Raise `DataError` for a model that does not read the text which calibration gives it."""
        model_class = class_of(self.config)
        if model_class is not None and not any(map(holds_pairs, self.calibration.names)):
            check_reads_text(model_class)

    def begin(self) -> None:
        """Refuse what can be, before any window is read or written. Raises `DataError`."""
        self.check_reads_text()
        if isinstance(self._reads(), ProcessorMixin):
            self.start = self.needed  # what goes before is there
        else:
            self.start = self.needed if len(self.needed) else start_tokens(self.tokenizer())
        check_positions(self.config, self.calibration.length)

    def windows(self) -> Tensor:
        """The calibration windows, int64 (samples, length)."""
        reads = self._reads()
        if not isinstance(reads, ProcessorMixin):
            self._tokens = CalibrationTokens(reads, self.calibration)
        return self._as_read(calibration_windows(reads, self.calibration, tokens=self._tokens))

    def held_out(self, count: int) -> Tensor:
        """So many more windows. Raises `DataError` where the texts have fewer."""
        tokens, self._tokens = self._tokens, None
        options = replace(self.calibration, held_out=count)
        return self._as_read(held_out_windows(self._reads(), options, start=self.start, tokens=tokens))

    def as_served(self, windows: Tensor) -> Tensor:
        """The windows behind what goes before a text, if this has begun."""
        return windows if self.start is None else behind(self.start, windows)

    def behind_needed(self, windows: Tensor) -> Tensor:
        """The windows behind the tokens that the model's code looks for, if this has begun."""
        return windows if self.start is None else behind(self.needed, windows)

    def _reads(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        return reader_of(self.model, self.calibration, self.tokenizer(), trust_remote_code=self.trust)

    def _as_read(self, windows: Tensor) -> Tensor:
        model_class = class_of(self.config)
        kind = "next token" if model_class is None else objective_of(model_class, self.config)
        return as_read(windows, self.tokenizer(), kind, seed=self.calibration.seed)
