"""How a tensor on disk is read as matrices [out, in]: the one place that knows orientations.

A layout's leading axis can always be cut into bands (of M rows, or of whole experts) without cutting a group or
a tile, so a tensor of any size is pruned band by band.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch

Layout = Literal["out_in", "in_out", "experts_out_in", "experts_in_out", "conv2d"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# Where [K, out, in] comes from: K experts, or K positions of a convolution kernel.
_AXES: dict[Layout, tuple[int, ...]] = {
    "out_in": (0, 1),
    "in_out": (1, 0),  # transformers' Conv1D
    "experts_out_in": (0, 1, 2),
    "experts_in_out": (0, 2, 1),
    "conv2d": (2, 3, 0, 1),  # [out, in, kh, kw]: N:M along the input channels of each kernel position
}


def matrix_size(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(out, in) of the matrices that a tensor of this shape holds."""
    *_, out_axis, in_axis = _AXES[layout]
    return shape[out_axis], shape[in_axis]


def to_matrices(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view [.., out, in] of a tensor in its layout on disk."""
    return tensor.permute(_AXES[layout])


def from_matrices(matrices: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse view: [.., out, in] back to the layout on disk."""
    axes = _AXES[layout]
    return matrices.permute([axes.index(axis) for axis in range(len(axes))])


def fits(shape: tuple[int, ...], layout: Layout) -> bool:
    """Whether a tensor of this shape can have this layout at all."""
    return len(shape) == len(_AXES[layout]) and all(shape)


def banded_axis(layout: Layout) -> int:
    """Which axis of [.., out, in] is the leading axis on disk."""
    return _AXES[layout].index(0)


def band_step(layout: Layout, m: int) -> int:
    """Bands along the leading axis must be multiples of this to keep groups and tiles whole."""
    return 1 if layout.startswith("experts") else m
