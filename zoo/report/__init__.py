"""Rows to a report: tables, figures, one self-contained HTML file; knows no model."""

from zoo.report.page import write_report

__all__ = ["write_report"]
