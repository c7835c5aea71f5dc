"""From what the user typed to a local directory: a path, or a hub id `org/name[@revision]`."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from tsenor_cli.checkpoint.hub import failures, is_of_the_system, reason
from tsenor_cli.errors import InputRefused

# Dense copies of the same weights in other formats. A sparse checkpoint must not carry them: some loaders
# prefer them, and would serve the dense model (docs/decisions/0005).
OTHER_WEIGHT_FORMATS = (
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "consolidated*.safetensors",
    "consolidated*.pth",
    "*.gguf",
    "tf_model*.h5",
    "tf_model.h5.index.json",
    "flax_model*.msgpack",
    "flax_model.msgpack.index.json",
    "rust_model.ot",
    "original/*",
    "onnx/*",
    "*.onnx",
    "openvino*",
    "coreml/*",
    "metal/*",
    "*.ckpt",
    "model.pt",
    "model.fp*.safetensors",  # from_pretrained(variant="fp16") loads it; shards may be called model.safetensors-*
    "model.bf16*.safetensors",
    "model.safetensors.index.*.json",
    "checkpoint-*/*",  # of a Trainer, with the moments of its optimizer
    "optimizer.pt",
)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def resolve_checkpoint(model: str) -> tuple[Path, str | None]:
    """The local directory of `model`, and its hub commit if it came from the hub.

    A directory that exists wins over a hub id of the same name. Hub files go through huggingface_hub's cache;
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured by it.

    Raises:
        InputRefused: no such directory and no such repository, or the hub cannot be reached.
    """
    path = local_path(model)
    if model and path.is_dir():
        return path, _cached_revision(path)
    if model and path.exists():
        raise InputRefused(f"{model} is a file", "give the checkpoint's directory", code="no-checkpoint")
    local = _download(*hub_id(model))
    return local, _cached_revision(local)


def local_path(given: str) -> Path:
    """With ~ and ~user in the place of a home; a user that nobody knows stays as given, as in a shell."""
    return Path(os.path.expanduser(given))  # noqa: PTH111  (Path.expanduser raises for such a user)


def hub_id(model: str) -> tuple[str, str | None]:
    """The repository and the revision of a hub id, org/name[@revision].

    Raises:
        InputRefused: it is none.
    """
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith(("./", "../", "/", "~")):
        raise InputRefused(
            f"no such directory: {model!r}",
            "give a local checkpoint or a hub id, org/name[@revision]",
            code="no-checkpoint",
        )
    return match["repo"], match["revision"]


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub."""
    return any(os.environ.get(name, "").upper() in {"1", "TRUE", "YES", "ON"} for name in _OFFLINE)


def is_other_format(file: str) -> bool:
    """Whether a file, by its path in a checkpoint, is a dense copy of the weights in another format."""
    return any(fnmatchcase(file, pattern) for pattern in OTHER_WEIGHT_FORMATS)  # as the hub filters


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not os.isatty(2):
        disable_progress_bars()
    offline = is_offline()
    try:
        found = snapshot_download(
            repo, revision=revision, ignore_patterns=list(OTHER_WEIGHT_FORMATS), local_files_only=offline
        )
    except LocalEntryNotFoundError as error:
        why = "it is not in the local cache and the hub is off" if offline else "the hub cannot be reached"
        raise InputRefused(
            f"no local directory {repo}, and as a hub id {why}", "check the name and the network", code="no-checkpoint"
        ) from error
    except failures() as error:
        if is_of_the_system(error):
            raise
        raise InputRefused(
            f"the hub has no usable {repo} ({reason(error)})",
            "check the name, the revision and HF_TOKEN",
            code="no-checkpoint",
        ) from error
    return Path(found)


def _cached_revision(path: Path) -> str | None:
    """The commit of a directory inside the hub's cache (…/snapshots/COMMIT), else None."""
    path = path.absolute()
    return path.name if path.parent.name == "snapshots" else None
