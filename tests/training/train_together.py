"""Started by torchrun, see test_together.py: every way of training in several processes that there is."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))

from nets import OPTIMIZERS, STEPS, assert_kept, masked, train

from tsenor_cli.training import KeepMasks, keep_masks


def plain(kind, masks, net):
    """Train wrapped by DDP or FSDP2, and see that the whole net has kept its masks."""
    wrapped = DistributedDataParallel(net) if kind == "ddp" else net
    if kind == "masks, then fsdp":
        keeper = keep_masks(wrapped, masks)
    if "fsdp" in kind:
        fully_shard(net.first)
        fully_shard(net)
    if kind != "masks, then fsdp":
        keeper = keep_masks(wrapped, masks)
    with keeper:
        steps = STEPS if kind == "ddp" else STEPS // 10  # of the others one takes much longer
        train(wrapped, OPTIMIZERS["adamw"](net.parameters()), steps=steps, accumulate=2, clip=0.5)
        keeper.check()
        assert all(grads_masked(net, name, mask) for name, mask in masks.items())
    for parameter in net.parameters():
        assert isinstance(parameter, DTensor) == ("fsdp" in kind)
    assert_kept({name: whole(parameter) for name, parameter in net.named_parameters()}, masks)


def grads_masked(net, name, mask):
    """One more backward pass leaves nothing where the mask drops."""
    net(torch.ones(4, 16)).sum().backward()
    return not whole(net.get_parameter(name).grad)[~mask].any()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trainer(sparse, out):
    """Trainer of transformers, which wraps the model by DDP itself."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(sparse)
    arguments = TrainingArguments(
        out,
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.5,
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    rows = torch.randint(5, 90, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=[KeepMasks(sparse)]).train()
    if dist.get_rank() == 0:
        model.save_pretrained(out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in ("ddp", "fsdp, then masks", "masks, then fsdp"):
        net, masks = masked()
        plain(kind, masks, net)
    trainer(sys.argv[1], sys.argv[2])
    dist.destroy_process_group()
