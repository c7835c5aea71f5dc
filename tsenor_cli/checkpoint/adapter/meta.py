"""A checkpoint's own model class on the meta device: structure, shapes and dtypes, no weights."""

from __future__ import annotations

import warnings

import torch
import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from tsenor_cli.checkpoint.reader import TORCH_NAMES, Checkpoint
from tsenor_cli.errors import InputRefused


def meta_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model of a checkpoint on the meta device, in the dtype that `from_pretrained` would compute in.

    Raises:
        InputRefused: transformers has no model for this config, or it needs remote code.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, local_files_only=True)
        if config.dtype is None:
            config.dtype = _first_dtype(checkpoint)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # initialisation has nothing to say about meta tensors
            return _build(config)
    except InputRefused:
        raise
    except Exception as error:  # configs are foreign input: whatever they break in transformers is their fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputRefused(
            f"transformers cannot build the model of {checkpoint.directory} ({reason})",
            "the checkpoint needs remote code or another transformers version",
        ) from error


def _build(config: PretrainedConfig) -> PreTrainedModel:
    names = getattr(config, "architectures", None) or []
    model: PreTrainedModel
    if not names:
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    elif hasattr(transformers, names[0]):
        model = getattr(transformers, names[0])._from_config(config)  # noqa: SLF001  (what from_pretrained calls)
    else:
        raise InputRefused(f"transformers {transformers.__version__} has no {names[0]}", "upgrade transformers")
    return model


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """What `from_pretrained` takes when the config names no dtype: that of the first floating tensor."""
    found = next((tensor for tensor in checkpoint.tensors.values() if tensor.dtype in TORCH_NAMES), None)
    return getattr(torch, TORCH_NAMES[found.dtype]) if found else None
