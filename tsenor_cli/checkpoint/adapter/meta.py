"""A checkpoint's own model class on the meta device: structure, shapes and dtypes, no weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from tsenor_cli.checkpoint.adapter.bounds import bounded_memory, bounded_modules
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import TORCH_NAMES
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.errors import InputRefused

_MOST_LABELS = 1_000_000


def meta_model(checkpoint: Checkpoint, device: torch.device = CPU) -> PreTrainedModel:
    """Build the model of a checkpoint on the meta device, in the dtype that it is to be run in on `device`.

    Raises:
        InputRefused: transformers has no model for this config, or it needs remote code.
    """
    _refuse_excess(checkpoint)
    try:
        with bounded_memory():
            config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
        if config.dtype is None:
            config.dtype = _first_dtype(checkpoint)
        if isinstance(config.dtype, torch.dtype):
            config.dtype = computed_in(config.dtype, device)
        build = _builder(config)
        # Tied, split and new parameters are none of the checkpoint's tensors, but no model has several times as many.
        most = 4 * len(checkpoint.tensors) + 1000
        with bounded_memory(), bounded_modules(most), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initialisation has nothing to say about meta tensors
            return build()
    except InputRefused:
        raise
    except Exception as error:  # configs are foreign input: whatever they break in transformers is their fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputRefused(
            f"transformers cannot build the model of {checkpoint.directory} ({reason})",
            "the checkpoint needs remote code or another transformers version",
            code="unsupported-model",
        ) from error


def _refuse_excess(checkpoint: Checkpoint) -> None:
    """What transformers would fetch and run, or spend minutes on.

    An implementation of attention or experts with a slash in its name is compiled code from the hub; a label is a word.
    """
    config = checkpoint.config
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):
                raise InputRefused(
                    f"{checkpoint.directory} asks for code from elsewhere ({key} {value!r})",
                    "remove it from config.json",
                    code="bad-config",
                )
            if key == "num_labels" and isinstance(value, int) and value > _MOST_LABELS:
                raise InputRefused(
                    f"{checkpoint.directory} asks for {value:,} labels", "correct config.json", code="bad-config"
                )


def _builder(config: PretrainedConfig) -> Callable[[], PreTrainedModel]:
    """What builds the model; whatever code that needs is imported by now."""
    names = getattr(config, "architectures", None) or []
    if not names:
        return partial(AutoModel.from_config, config)
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputRefused(
            f"transformers {transformers.__version__} has no model {names[0]!r}",
            "upgrade transformers",
            code="unsupported-model",
        )
    return partial(found._from_config, config)  # noqa: SLF001  (what from_pretrained calls)


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """What `from_pretrained` takes when the config names no dtype: that of the first floating tensor."""
    found = next((tensor for tensor in checkpoint.tensors.values() if tensor.dtype in TORCH_NAMES), None)
    return getattr(torch, TORCH_NAMES[found.dtype]) if found else None
