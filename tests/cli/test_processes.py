"""Work in processes of its own: where children can be forked."""

import sys

import pytest

from zoo.cli import processes


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
@pytest.mark.parametrize(
    ("counts", "forks"), [([1], True), ([2, 1], True), ([2] * processes.RECOUNTS, False)]
)
def test_a_thread_that_is_about_to_leave_keeps_no_process_from_being_forked(
    counts, forks, monkeypatch
):
    """One that was joined is among the system's for a moment; the libraries' own stay."""
    counted = iter(counts)
    monkeypatch.setattr(processes, "_imported", 1)
    monkeypatch.setattr(processes, "_native_threads", lambda: next(counted))
    assert processes.can_fork() == forks
    assert not [*counted]
