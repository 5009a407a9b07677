"""The report of a diff as a short paper, section by section."""

from crosscoder.analysis.report.data import ReportData
from crosscoder.analysis.report.page import report

__all__ = ["ReportData", "report"]
