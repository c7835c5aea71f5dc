"""The model card: valid hub metadata, what was done, and the original card below it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData

from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.report.records import Report
from tsenor_cli.specs import PruneSpec

CARD_FILE = "README.md"


def model_card(checkpoint: Checkpoint, spec: PruneSpec, report: Report) -> str:
    """The text of the output's README.md."""
    metadata, original = _original_card(checkpoint.directory / CARD_FILE)
    tags = [*(metadata.tags or []), "sparse", "tsenor", str(spec.pattern), spec.pattern.kind]
    metadata.tags = list(dict.fromkeys(tags))
    metadata.library_name = metadata.library_name or "transformers"
    if checkpoint.revision is not None and not Path(spec.model).exists():
        metadata.base_model = spec.model.partition("@")[0]
        metadata["base_model_relation"] = (
            "quantized"  # the hub's name for a compressed re-release; it has none for pruned
        )
    body = _what_was_done(spec, report)
    if original:
        body += f"\n---\n\nThe original model card follows.\n\n{original}"
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _what_was_done(spec: PruneSpec, report: Report) -> str:
    pattern, summary = spec.pattern, report.summary
    tile = (
        f"Every {pattern.m}×{pattern.m} tile keeps exactly {pattern.n} weights per row and {pattern.n} per column, "
        f"so both W and its transpose are {pattern}."
        if pattern.transposable
        else f"Of every {pattern.m} consecutive weights along the input axis {pattern.n} are kept."
    )
    return f"""# {pattern} sparse ({pattern.kind})

This checkpoint was pruned to {pattern} {pattern.kind} sparsity with `tsenor {report.tsenor_version}`, method
{spec.method}. {tile} It is stored dense, with zeros, and loads like the original.

| | |
|---|---|
| tensors pruned | {summary.pruned_tensors} |
| coverage (pruned / prunable parameters) | {summary.coverage:.2%} |
| energy kept (sum of squared weights) | {summary.kept_energy:.2%} |
| optimality gap of the masks | {summary.gap:.1e} |

Every tensor, with the reason for each that was left alone, is in `tsenor-report.json`;
`tsenor verify DIR` checks this checkpoint against it.
"""


def _original_card(path: Path) -> tuple[ModelCardData, str]:
    """Metadata and body of the input's card; a card whose metadata cannot be read is kept as plain text."""
    if not path.is_file():
        return ModelCardData(), ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
    except Exception:  # noqa: BLE001  (any YAML at all may stand there)
        return ModelCardData(), re.sub(r"\A---.*?\n---\n", "", text, flags=re.DOTALL)
    return cast("ModelCardData", card.data), card.text.strip()
