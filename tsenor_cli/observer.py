"""How a run tells of its progress. The library prints nothing; the command line passes a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.plan import Plan
    from tsenor_cli.report.records import TensorRecord


class Observer:
    """Told how a run goes; does nothing."""

    def planned(self, plan: Plan) -> None:
        """The plan stands and work begins."""

    def began(self, nbytes: int) -> None:
        """Work on so many bytes of input begins."""

    def advanced(self, name: str, nbytes: int) -> None:
        """`nbytes` more of the input, all of them in tensor `name`, are done."""

    def pruned(self, record: TensorRecord) -> None:
        """A tensor is pruned and written."""

    def trained(self, step: int, steps: int, loss: float) -> None:
        """A step of training is done; `loss` is the mean over its tokens, in nats."""

    def entered(self, stage: str) -> None:
        """A part of the run that has a name begins."""
