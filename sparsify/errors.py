"""Every error a user can meet, as one sentence each for: what, got, allowed, how to fix it."""


class SparsifyError(Exception):
    """Base of all errors of this package; the command line prints it as one paragraph.

    Args:
        what: what is wrong, as a sentence without a full stop.
        got: the offending value.
        allowed: what would have been accepted.
        fix: what to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, allowed: object = None, fix: str | None = None) -> None:
        self.what = what
        self.got = got
        self.allowed = allowed
        self.fix = fix
        super().__init__(self.paragraph())

    def paragraph(self) -> str:
        """The whole message on one line."""
        parts = [self.what.rstrip(".") + "."]
        if self.got is not None:
            parts.append(f"Got: {' '.join(str(self.got).split()).rstrip('.') or repr(self.got)}.")
        if self.allowed is not None:
            parts.append(f"Allowed: {self.allowed}.")
        if self.fix is not None:
            parts.append(f"Fix: {self.fix}.")
        return " ".join(parts)

    def __str__(self) -> str:
        return self.paragraph()

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.got, self.allowed, self.fix)


def _rebuild(cls: type[SparsifyError], what: str, got: object, allowed: object, fix: str | None) -> SparsifyError:
    """Un-pickle an error: launchers of Hydra send it between processes."""
    return cls(what, got=got, allowed=allowed, fix=fix)


class UsageError(SparsifyError, ValueError):
    """The request itself is wrong: a value out of range, an unknown name, a typo."""

    exit_code = 2


class BudgetError(UsageError):
    """No allocation can meet the wanted sparsity within its bounds."""


class PatternError(UsageError):
    """The sparsity pattern does not fit the layer or the allocator."""


class UnsupportedModelError(SparsifyError):
    """The model's structure is one that this package does not prune."""


class DataError(SparsifyError):
    """A text is nowhere to be found, empty or too short."""


class NumericsError(SparsifyError):
    """A non-finite number or a factorisation that failed, with the layer it happened in."""


class RecordError(SparsifyError):
    """A record cannot be read or written, or another process holds the cell."""


class DamagedError(RecordError):
    """A file holds no record, whatever happened to it: set aside by the next process that works on the cell."""


class HeldError(RecordError):
    """Another living process works on the cell; a sweep goes on without it."""


class UnexpectedError(SparsifyError):
    """Anything we did not foresee; shown with its traceback."""
