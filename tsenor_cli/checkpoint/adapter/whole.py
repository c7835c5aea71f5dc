"""A checkpoint's model as a whole, to be trained, and its weights as they lie on disk again.

Both ways go through transformers' own conversion; that they fit together is seen before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tsenor_cli.checkpoint.adapter.meta import meta_model
from tsenor_cli.checkpoint.adapter.skeleton import keys_in_model, no_progress_bar
from tsenor_cli.checkpoint.reader import Checkpoint
from tsenor_cli.checkpoint.shard import DiskTensor
from tsenor_cli.errors import InputRefused


def load_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of a checkpoint that predicts tokens, in float32 on the CPU.

    Raises:
        InputRefused: it predicts none, or its weights would not come back from the model as they went in.
    """
    kind = type(meta_model(checkpoint))
    if not kind.can_generate():
        raise InputRefused(
            f"{kind.__name__} predicts no next token", "train it with keep_masks", code="unsupported-model"
        )
    with no_progress_bar():
        model: PreTrainedModel = kind.from_pretrained(checkpoint.directory, dtype=torch.float32, local_files_only=True)
    for tensor, there in weights_on_disk(model, checkpoint):
        if not torch.equal(_bits(there), _bits(tensor.read())):
            raise InputRefused(
                f"{tensor.name} does not come back from transformers as it went in",
                "train it with keep_masks, and save it as you do",
                code="unsupported-model",
            )
    return model


def weights_on_disk(model: PreTrainedModel, checkpoint: Checkpoint) -> Iterator[tuple[DiskTensor, torch.Tensor]]:
    """What the tensors of the checkpoint that the model takes are in the model now: shape and dtype as on disk.

    Raises:
        InputRefused: one of them cannot be found in the model.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    reverted = revert_weight_conversion(model, dict(state))
    for name, key in keys_in_model(model, checkpoint.tensors).items():
        tensor, found = checkpoint.tensors[name], reverted.get(name, state[key])  # it does not revert every renaming
        if found.shape != tensor.shape:
            raise InputRefused(
                f"{name} cannot be taken out of {type(model).__name__}",
                "train it with keep_masks, and save it as you do",
                code="unsupported-model",
            )
        yield tensor, found.to("cpu", tensor.torch_dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
