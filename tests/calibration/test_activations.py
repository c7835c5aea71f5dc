"""Hidden states come back bit by bit, from memory and from disk, and leave nothing behind."""

from __future__ import annotations

import os
from contextlib import closing

import pytest
import torch

from tsenor_cli.calibration.activations import Activations


def states(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(params=["memory", "disk"])
def activations(request, tmp_path):
    with closing(Activations(tmp_path if request.param == "disk" else None)) as made:
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(activations, dtype):
    batches = [states(2, 5, 8, dtype=dtype), states(2, 5, 8, dtype=dtype, seed=1), states(1, 3, 8, dtype=dtype, seed=2)]
    for batch in batches:
        activations.append(batch)
    assert len(activations) == 3
    for index, batch in enumerate(batches):
        assert activations[index].dtype == dtype
        assert torch.equal(bits(activations[index]), bits(batch))


def test_special_values_keep_their_bits(activations):
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 0.0]])
    activations.append(odd)
    assert torch.equal(bits(activations[0]), bits(odd))


def test_a_new_value_leaves_its_neighbours_alone(activations):
    for seed in range(3):
        activations.append(states(2, 4, 8, seed=seed))
    activations[1] = states(2, 4, 8, seed=9)
    for index, seed in enumerate((0, 9, 2)):
        assert torch.equal(activations[index], states(2, 4, 8, seed=seed))


def test_states_that_are_not_contiguous(activations):
    turned = states(4, 2, 8).transpose(0, 1)
    activations.append(turned)
    activations.append(turned[:, ::2])
    assert torch.equal(activations[0], turned)
    assert torch.equal(activations[1], turned[:, ::2])


def test_an_empty_batch(activations):
    activations.append(states(0, 4, 8))
    activations.append(states(1, 4, 8))
    assert activations[0].shape == (0, 4, 8)
    assert torch.equal(activations[1], states(1, 4, 8))


def test_states_that_become_wider(activations):
    """As those of Mamba, of which the first layer takes bfloat16 and gives float32."""
    narrow = [states(2, 4, 8, dtype=torch.bfloat16, seed=seed) for seed in range(3)]
    for batch in narrow:
        activations.append(batch)
    for seed in (9, 10):
        activations[1] = states(2, 4, 8, seed=seed)
        found = [activations[index] for index in range(3)]
        assert torch.equal(found[1], states(2, 4, 8, seed=seed))
        assert torch.equal(found[0], narrow[0])
        assert torch.equal(found[2], narrow[2])


def test_calls_that_move_fewer_bytes(tmp_path, monkeypatch):
    with closing(Activations(tmp_path)) as activations:
        write, read = activations._file.write, activations._file.readinto
        monkeypatch.setattr(activations._file, "write", lambda part: write(part[:7]))
        monkeypatch.setattr(activations._file, "readinto", lambda part: read(part[:5]))
        for seed in range(2):
            activations.append(states(1, 4, 8, seed=seed))
        assert torch.equal(activations[0], states(1, 4, 8))
        assert torch.equal(activations[1], states(1, 4, 8, seed=1))


def test_on_disk_they_take_no_memory_and_no_name(tmp_path):
    """What has no name cannot be left behind, not even by a process that is killed."""
    spill_to = tmp_path / "spill"
    spill_to.mkdir()
    with closing(Activations(spill_to)) as activations:
        activations.append(states(2, 4, 8))
        activations[0] = states(2, 4, 8, seed=1)
        assert os.fstat(activations._file.fileno()).st_size == states(2, 4, 8).nbytes
        assert [held.device.type for held in activations._held] == ["meta"]
        assert not list(spill_to.iterdir())


def test_closing_frees_the_disk(tmp_path):
    activations = Activations(tmp_path)
    activations.append(states(2, 4, 8))
    activations.close()
    with pytest.raises(ValueError, match="closed"):
        activations[0]
