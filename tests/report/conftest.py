"""One experiment's rows, shared by the tests of the report."""

from pathlib import Path
from typing import Any

import pytest
from synthetic import experiment, run_records

from zoo.report import write_report


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """Four arms, one seed, all tasks."""
    return experiment()


@pytest.fixture(scope="session")
def report(rows, tmp_path_factory) -> tuple[Path, str]:
    """The folder of the experiment's report (report.html, figures/), and what was printed."""
    folder = tmp_path_factory.mktemp("report")
    html, figures = folder / "report.html", folder / "figures"
    return folder, write_report(rows, run_records(rows), html, figures)
