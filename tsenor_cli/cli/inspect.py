"""`tsenor inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tsenor_cli.cli import console
from tsenor_cli.cli.options import DIRECTORY, json_option, verbose_option
from tsenor_cli.report.words import amount

if TYPE_CHECKING:
    from tsenor_cli.checkpoint.inspection import Inspection


@click.command()
@click.argument("model", type=DIRECTORY)
@json_option
@verbose_option
def inspect(model: str, as_json: bool, verbose: bool) -> None:
    """Show what of MODEL can be pruned: shapes, orientation, the patterns that fit, and kernels that could take it.

    \b
    Example: tsenor inspect ./llama
    """
    with console.stdout_reserved():
        from tsenor_cli.checkpoint.inspection import inspect_checkpoint

        console.quiet_libraries(verbose=verbose)
        inspection = inspect_checkpoint(model)
    console.emit(inspection.to_dict()) if as_json else _show(inspection)


def _show(inspection: Inspection) -> None:
    rows: list[tuple[Any, ...]] = [
        (
            item.name,
            item.dtype,
            str(item.shape),
            item.layout or "",
            ", ".join(str(m) for m in item.transposable_m if m & (m - 1) == 0) if item.layout else "",
            ", ".join(item.kernels) if item.layout else item.reason or "",
        )
        for item in inspection.tensors
    ]
    columns = ("tensor", "dtype", "shape", "layout", "transposable M", "2:4 kernels, or why not prunable")
    console.table(columns, rows, to_stdout=True)
    console.emit(
        f"{inspection.prunable_tensors} of {len(inspection.tensors)} tensors are prunable: "
        f"{amount(inspection.prunable_parameters)} of {amount(inspection.total_parameters)} parameters"
    )
