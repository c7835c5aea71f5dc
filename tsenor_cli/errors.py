"""Every failure that is not a bug: one line that says what, a remedy, and an exit code.

The command line turns these into a single line on stderr; the library raises them.
"""

from __future__ import annotations

import errno

DISK_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas
_TORCH_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # of the CPU, of CUDA


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch found no memory; torch says so in a RuntimeError."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _TORCH_OUT_OF_MEMORY)


class TsenorError(Exception):
    """The operation failed (exit 1): disk full, no permission, an I/O error."""

    exit_code = 1
    code = "failed"

    def __init__(self, message: str, remedy: str = "", *, code: str | None = None) -> None:
        """Say what is wrong and what to do about it.

        Args:
            message: what is wrong, with the file or tensor that it is about.
            remedy: what to do about it.
            code: the heading in docs/troubleshooting.md that says more; the class has one for what needs no more.
        """
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.code = code or self.code

    def __str__(self) -> str:
        return f"{self.message}: {self.remedy}" if self.remedy else self.message


class UsageError(TsenorError):
    """The request itself makes no sense (exit 2): a bad pattern, options that contradict."""

    exit_code = 2
    code = "usage"


class InputRefused(TsenorError):
    """The checkpoint or the environment cannot be used (exit 3): missing, corrupt, unsafe, unsupported."""

    exit_code = 3
    code = "input-refused"


class CheckFailed(TsenorError):
    """A check fell short (exit 4): coverage, --strict, or verify."""

    exit_code = 4
    code = "check-failed"


class OutputUnavailable(TsenorError):
    """The output exists, is locked by another run, or collides with the input (exit 5)."""

    exit_code = 5
    code = "output-unavailable"


class SaidElsewhereError(TsenorError):
    """Another process has failed and says why: this one ends like it, and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of this run has failed", "see what it says")
        self.exit_code = exit_code


def budget_too_small(budget: int, needed: int) -> UsageError:
    """A memory budget is below what is needed at least; both in bytes."""
    return UsageError(
        f"--memory-budget {budget:,} bytes is too small", f"at least {needed:,} are needed", code="budget-too-small"
    )
