"""The audit of a trained model for leaks, before its first measurement.

A row says in `audited` what was compared: the tokens of the longest text by arithmetic, `{}` for an
encoder, which may read both ways, None where no comparison was made. In `audit` it has the reason
for which the model leaks, or None.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from zoo.measurement import agrees
from zoo.model.audit import AUTOCAST, Audit, audit, stretch
from zoo.report.validity import LEAKS
from zoo.tasks.context import EvalContext, LeakError, Row, failure_row

MAX_AUDIT_TOKENS = 4096  # up to so many an audit reads as far as the measurements will


class Leaks:
    """The audit of a context's model, made before its first measurement and before longer ones."""

    def __init__(self, context: EvalContext) -> None:
        self.context = context
        self.found: Audit | None = None
        self.problem: Row = {}  # status and reason of a model that could not be audited
        self.longest = 0  # tokens that were to be read

    @property
    def audited(self) -> dict[str, int] | None:
        """A row's `audited`."""
        return self.found.tokens if self.found else None

    def check(self, wanted: Sequence[Row]) -> None:
        """Audit at the training length and at a longer one, the longest that is `wanted` or twice
        the training length at least. Raises LeakError where the model leaks."""
        train = self.context.train_length
        longest = max(int(question.get("length") or 0) for question in wanted)
        longest = max(2 * train, min(longest, MAX_AUDIT_TOKENS))
        ended = self.found is not None and max(self.found.lengths, default=0) < self.longest
        if longest > self.longest and not self.problem and not ended:
            self._make((train, longest))
        if self.found and not self.found.ok:
            raise LeakError(self.found.reason)

    def _make(self, lengths: tuple[int, int]) -> None:
        context, self.longest = self.context, lengths[1]
        text = stretch(context.data.text(context.split), self.longest)
        dtype = AUTOCAST.get(context.precision)
        try:
            self.found = audit(context.model, text, lengths=lengths, autocast=dtype)
        except Exception as error:  # what breaks the audit may well break the measurement: see it
            reason = f"it could not be audited for leaks: {failure_row(error)['reason']}"
            self.found, self.problem = None, {"status": "failed", "reason": reason}

    def judge(self, row: Row) -> Row:
        """The row with what was audited; without success where the model could not be."""
        return row | {"audited": self.audited} | (self.problem if row["status"] == "ok" else {})


def is_leak(row: Mapping[str, Any], weights: Mapping[str, Any]) -> bool:
    """Whether the row reports a leak of these weights, a row's fields of who is measured."""
    same = {name: value for name, value in weights.items() if name != "audit"}
    return row.get("status") == LEAKS and agrees(row, same)


def lengths_read(leaks: Iterable[Row]) -> list[Row]:
    """As questions, the lengths at which leaks showed: they are audited no less far again."""
    return [{"length": n} for row in leaks for n in (row.get("audited") or {}).values()]


def leaked_in_training(info: Row) -> Row:
    """Status and reason of a run whose model leaked when its training ended, or nothing."""
    found = info.get("audit")
    if not isinstance(found, dict) or found.get("ok") is not False:
        return {}
    return failure_row(LeakError(f"trained with a leak: {found.get('reason')}"))
