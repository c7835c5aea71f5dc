"""The keeper for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tsenor_cli.training.keeper import MaskKeeper, keep_masks


class KeepMasks(TrainerCallback):
    """`Trainer(..., callbacks=[KeepMasks(masks)])`: as `keep_masks`, from the beginning of training to its end.

    Args:
        masks: see keep_masks.

    Raises:
        InputRefused: see keep_masks; as training begins.
        CheckFailed: a mask does not hold; as training ends.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor] | Path | str) -> None:
        self._masks = masks
        self._keeper: MaskKeeper | None = None

    def on_train_begin(self, *_: object, **given: Any) -> None:  # noqa: ANN401
        self._let_go()  # of a training that did not come to its end
        self._keeper = keep_masks(given["model"], self._masks)

    def on_train_end(self, *_: object, **__: Any) -> None:  # noqa: ANN401
        assert self._keeper is not None, "training has begun"
        try:
            self._keeper.check()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None
