"""A small net with two transposable 2:4 matrices, and ways to train it."""

from __future__ import annotations

import torch
from torch import nn

from tsenor_cli.masks import solve
from tsenor_cli.specs import NMPattern

STEPS = 200
PATTERN = NMPattern(2, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, inputs):
        return self.second(torch.relu(self.norm(self.first(inputs))))


def masked(seed=0):
    """A small net, its two matrices transposable 2:4, and their masks."""
    torch.manual_seed(seed)
    net = Net()
    masks = {f"{name}.weight": solve.solve_mask(getattr(net, name).weight.abs(), PATTERN).mask for name in WEIGHTS}
    with torch.no_grad():
        for name, mask in masks.items():
            net.get_parameter(name).mul_(mask)
    return net, masks


WEIGHTS = ("first", "second")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd, momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def batches(count, dtype=torch.float32):
    draws = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(8, 16, generator=draws).to(dtype), torch.randn(8, 8, generator=draws).to(dtype)


def train(net, optimizer, *, steps=STEPS, accumulate=1, clip=None, autocast=None):
    """The losses of a plain loop."""
    losses = []
    for number, (inputs, wanted) in enumerate(batches(steps * accumulate)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            loss = nn.functional.mse_loss(net(inputs).float(), wanted) / accumulate
        loss.backward()
        if (number + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_kept(parameters, masks):
    """Zero, and not negative zero, exactly where the masks drop; trained elsewhere."""
    for name, mask in masks.items():
        weight = parameters[name].detach()
        bits = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)
        assert not bits[~mask].any()
        assert weight[mask].count_nonzero() > 0.9 * mask.sum()
