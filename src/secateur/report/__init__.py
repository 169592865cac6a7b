"""One run folder -> one page of HTML that needs nothing else."""

from __future__ import annotations

from secateur.report.page import Report, write_report

__all__ = ["Report", "write_report"]
