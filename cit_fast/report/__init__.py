"""Tables and pictures of finished and unfinished runs, read from their folders alone."""

from __future__ import annotations

from cit_fast.report.collect import Runs, collect
from cit_fast.report.page import write_report
from cit_fast.report.table import comparison_table

__all__ = ["Runs", "collect", "comparison_table", "write_report"]
