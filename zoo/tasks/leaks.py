"""The audit of a trained model for leaks, before its first measurement."""

from collections.abc import Sequence

from zoo.model.audit import AUTOCAST, Audit, audit, stretch
from zoo.tasks.context import EvalContext, LeakError, Row, failure_row

MAX_AUDIT_TOKENS = 4096  # up to so many an audit reads as far as the measurements will


class Leaks:
    """The audit of a context's model, made once, before its first measurement."""

    def __init__(self, context: EvalContext) -> None:
        self.context = context
        self.found: Audit | None = None
        self.problem: Row = {}  # status and reason of a model that could not be audited

    def check(self, wanted: Sequence[Row]) -> None:
        """Audit at the training length and at a longer one, the longest that is `wanted` or twice
        the training length at least. Raises LeakError where the model leaks."""
        if self.found is None and not self.problem:
            self._make(max(int(question.get("length") or 0) for question in wanted))
        if self.found and not self.found.ok:
            raise LeakError(self.found.reason)

    def _make(self, longest: int) -> None:
        context, train = self.context, self.context.train_length
        lengths = train, max(2 * train, min(longest, MAX_AUDIT_TOKENS))
        text, dtype = (
            stretch(context.data.text(context.split), lengths[1]),
            AUTOCAST.get(context.precision),
        )
        try:
            self.found = audit(context.model, text, lengths=lengths, autocast=dtype)
        except Exception as error:  # what breaks the audit may well break the measurement: see it
            reason = f"it could not be audited for leaks: {failure_row(error)['reason']}"
            self.problem = {"status": "failed", "reason": reason}

    def judge(self, row: Row) -> Row:
        """The row, but without success where the model could not be audited."""
        return row | (self.problem if row["status"] == "ok" else {})
