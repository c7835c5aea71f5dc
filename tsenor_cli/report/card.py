"""The model card: valid hub metadata, what was done, and the original card below it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData

from tsenor_cli.checkpoint.reader import MASKS_DIRECTORY, Checkpoint
from tsenor_cli.checkpoint.writer import CARD_FILE
from tsenor_cli.report.records import Report
from tsenor_cli.report.words import tiny
from tsenor_cli.specs import NMPattern


def model_card(checkpoint: Checkpoint, source: str, report: Report) -> str:
    """The text of the output's README.md; `source` is what the user has called the input."""
    metadata, original = _original_card(checkpoint.directory / CARD_FILE)
    patterns = _patterns(report)
    tags = [*(metadata.tags or []), "sparse", "tsenor", *map(str, patterns), *(pattern.kind for pattern in patterns)]
    metadata.tags = list(dict.fromkeys(tags))
    metadata.library_name = metadata.library_name or "transformers"
    if checkpoint.revision is not None and not Path(source).exists():
        metadata.base_model = source.partition("@")[0]
        metadata["base_model_relation"] = (
            "quantized"  # the hub's name for a compressed re-release; it has none for pruned
        )
    body = _what_was_done(report, patterns)
    if original:
        body += f"\n---\n\nThe original model card follows.\n\n{original}"
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def training_card(checkpoint: Checkpoint, report: Report) -> str:
    """The text of a fine-tuned output's README.md: what was learned, and the card of the pruned checkpoint below it."""
    metadata, original = _original_card(checkpoint.directory / CARD_FILE)
    assert report.training is not None
    assert report.perplexity is not None
    options, text = report.training["options"], report.training["text"]
    before, after = (report.perplexity[key]["perplexity"] for key in ("before", "after"))
    windows = options["batch_size"] * options["accumulate"]
    return f"""---
{metadata.to_yaml()}
---

# Fine-tuned after pruning

Trained with its masks kept by `tsenor {report.tsenor_version}`: the weights that pruning has dropped are still zero.

| | |
|---|---|
| steps | {options["steps"]} of {windows} windows of {text["sequence_length"]} tokens |
| learning rate | {options["learning_rate"]} |
| perplexity before → after | {before:.2f} → {after:.2f} |

---

{original}
"""


def _patterns(report: Report) -> list[NMPattern]:
    """The patterns of the pruned tensors, the most frequent first."""
    pruned = [record for record in report.tensors if record.pattern is not None]
    found = Counter(NMPattern.parse(str(r.pattern), transposable=bool(r.transposable)) for r in pruned)
    return [pattern for pattern, _ in found.most_common()]


def _what_was_done(report: Report, patterns: list[NMPattern]) -> str:
    summary = report.summary
    kinds = ", ".join(f"{pattern} {pattern.kind}" for pattern in patterns)
    return f"""# {", ".join(f"{pattern} sparse ({pattern.kind})" for pattern in patterns)}

This checkpoint was pruned to {kinds} sparsity with `tsenor {report.tsenor_version}`, method
{" and ".join(report.citations)}. {" ".join(map(_meaning, patterns))} It is stored dense, with zeros, and loads like
the original.

| | |
|---|---|
| tensors pruned | {summary.pruned_tensors} |
| coverage (pruned / prunable parameters) | {summary.coverage:.2%} |
| optimality gap of the masks | {tiny(summary.gap)} |
{_calibration_rows(report)}
Every tensor, with the reason for each that was left alone, is in `tsenor-report.json`;
`tsenor verify DIR` checks this checkpoint against it.{_masks(report)}

{_citations(report)}
"""


def _meaning(pattern: NMPattern) -> str:
    if pattern.transposable:
        return (
            f"Every {pattern.m}×{pattern.m} tile keeps exactly {pattern.n} weights per row and {pattern.n} per column, "
            f"so both W and its transpose are {pattern}."
        )
    return f"Of every {pattern.m} consecutive weights along the input axis {pattern.n} are kept."


def _calibration_rows(report: Report) -> str:
    if report.summary.error is not None:
        rows = f"| relative output error on the calibration text | {report.summary.error:.2%} |\n"
    else:
        rows = f"| energy kept (sum of squared weights) | {report.summary.kept_energy:.2%} |\n"
    if report.calibration is not None:
        rows += f"| calibration | {report.calibration['tokens']} tokens |\n"
    if report.perplexity is not None:
        before, after = (report.perplexity[key]["perplexity"] for key in ("before", "after"))
        rows += f"| perplexity before → after | {before:.2f} → {after:.2f} |\n"
    return rows


def _masks(report: Report) -> str:
    saved = any(record.mask_sha256 is not None for record in report.tensors)
    return f" `{MASKS_DIRECTORY}` has the masks, a bit per weight." if saved else ""


def _citations(report: Report) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in report.citations.items())


def _original_card(path: Path) -> tuple[ModelCardData, str]:
    """Metadata and body of the input's card; a card whose metadata cannot be read is kept as plain text."""
    if not path.is_file():
        return ModelCardData(), ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        metadata = cast("ModelCardData", card.data)
        metadata.tags = [tag for tag in metadata.tags or [] if isinstance(tag, Hashable)]
        metadata.to_yaml()  # which a key may be in the way of
    except Exception:  # noqa: BLE001  (any YAML at all may stand there)
        return ModelCardData(), re.sub(r"\A---.*?\n---\n", "", text, flags=re.DOTALL)
    return metadata, card.text.strip()
