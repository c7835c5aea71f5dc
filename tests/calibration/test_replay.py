"""A replay is the full forward pass bit by bit, after every layer, or it is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from checkpoints import ARCHITECTURES, VOCAB, load_whole, make_checkpoint, read_shards, write_checkpoint
from torch import nn

from tsenor_cli.calibration.replay import Replay
from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.errors import InputRefused

NOT_LAYERED = {"vit", "resnet", "t5", "whisper"}
QUICK = {"llama", "gpt2", "mixtral", "bloom", "gpt_oss"}
LAYERED = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in ARCHITECTURES
    if name not in NOT_LAYERED
]
# One tensor on disk each: as it stands, one expert of a stack, gate and up interleaved and fused, [in, out].
REPLACED = {
    "llama": "model.layers.1.self_attn.q_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.2.w1.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
    "gpt2": "h.1.attn.c_attn.weight",
}


def batches(sizes=((2, 12), (2, 12), (1, 7))):
    """Several batches of tokens; the last one is smaller."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCAB - 5, size, generator=generator) for size in sizes]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp("replay") / name)
        return made[name]

    return make


def whole(directory):
    """Hidden states after every layer [batch][layer], and logits [batch], of the model as a user gets it."""
    model = load_whole(directory)
    for parameter in model.parameters():
        # freshly allocated, hence aligned alike: matrix products may differ in the last bit with the alignment
        parameter.data = parameter.data.clone()
    seen = []
    for layer in model.get_submodule(Skeleton(open_checkpoint(directory)).layers_name):
        layer.register_forward_hook(lambda _layer, _args, output: seen.append(first(output).clone()))
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits for tokens in batches()]
    each = len(seen) // len(logits)
    return [seen[start : start + each] for start in range(0, len(seen), each)], logits


def first(output):
    return output[0] if isinstance(output, tuple) else output


def streamed(directory, spill_to=None, replaced=None):
    """The same, with one layer in memory at a time."""
    skeleton = Skeleton(open_checkpoint(directory))
    hidden = [[] for _ in batches()]
    with Replay(skeleton, batches(), spill_to) as replay:
        for index in range(len(skeleton.layers)):
            here = {name: new for name, new in (replaced or {}).items() if skeleton.layer_of[name] == index}
            layer = skeleton.load_layer(index, here)
            for batch in range(len(replay)):
                replay.run(index, layer, batch)  # as calibration does: it must leave nothing behind
            replay.advance(index, layer)
            skeleton.drop_layer(index)
            for batch, states in enumerate(hidden):
                states.append(replay.hidden[batch].clone())
        return hidden, [replay.logits(batch) for batch in range(len(replay))]


def assert_same(found, expected):
    for states, wanted in zip(found[0], expected[0], strict=True):
        assert len(states) == len(wanted) > 1
        assert all(torch.equal(a, b) for a, b in zip(states, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert all(logits.isfinite().all() for logits in found[1])


@pytest.mark.parametrize("name", LAYERED)
def test_every_layer_and_the_logits_are_those_of_the_whole_model(name, checkpoint_of, tmp_path):
    directory = checkpoint_of(name)
    expected = whole(directory)
    assert_same(streamed(directory), expected)
    assert_same(streamed(directory, spill_to=tmp_path), expected)


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_tensor_is_as_if_it_stood_on_disk(name, checkpoint_of, tmp_path):
    source, tensor = checkpoint_of(name), REPLACED[name]
    shards = read_shards(source)
    shard = next(tensors for tensors in shards.values() if tensor in tensors)
    new = shard[tensor].flip(-1).contiguous()
    shard[tensor] = new
    changed = write_checkpoint(tmp_path / name, shards, json.loads((source / "config.json").read_text()))
    found = streamed(source, replaced={tensor: new})
    assert_same(found, whole(changed))
    before = whole(source)
    assert torch.equal(found[0][0][0], before[0][0][0])  # it is in the layer after that
    assert not torch.equal(found[0][0][1], before[0][0][1])


@pytest.mark.parametrize("name", ["vit"])
def test_a_model_that_reads_no_text_is_refused(name, checkpoint_of):
    with pytest.raises(InputRefused, match="it reads no text") as refusal:
        Replay(Skeleton(open_checkpoint(checkpoint_of(name))), batches())
    assert refusal.value.exit_code == 3


# --- models made up for their course through the layers ---------------------------------------------------------------


class Layer(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, hidden, **_kwargs):
        return super().forward(hidden)


class TupleLayer(Layer):
    def forward(self, hidden, **kwargs):
        return super().forward(hidden, **kwargs), None


class Model(nn.Module):
    """Three layers, run as `course` (hidden, layers) says."""

    def __init__(self, course, layer=Layer):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10)
        self.layers = nn.ModuleList(layer() for _ in range(3))
        self.config = SimpleNamespace(use_cache=True)
        self.course = course

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.course(self.embed(input_ids), self)))


TOKENS = [torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[7, 8, 9], [0, 1, 2]]), torch.tensor([[3, 4]])]


def replay_of(model, tokens=TOKENS):
    return Replay(SimpleNamespace(model=model, layers=model.layers, device=torch.device("cpu")), tokens)


def in_order(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden)
    return hidden


def first_of_tuple(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden)[0]
    return hidden


def views(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden[:, slice(None)].view(hidden.shape))
    return hidden


@pytest.mark.parametrize(("course", "layer"), [(in_order, Layer), (first_of_tuple, TupleLayer), (views, Layer)])
def test_made_up_models_are_exact(course, layer):
    model = Model(course, layer)
    replay = replay_of(model)
    for index, each in enumerate(model.layers):
        replay.advance(index, each)
    with torch.no_grad():
        assert all(torch.equal(replay.logits(batch), model(tokens).logits) for batch, tokens in enumerate(TOKENS))


def backwards(hidden, model):
    for layer in reversed(model.layers):
        hidden = layer(hidden)
    return hidden


def twice_in_all(hidden, model):
    return in_order(in_order(hidden, model), model)


def twice_each(hidden, model):
    for layer in model.layers:
        hidden = layer(layer(hidden))
    return hidden


def the_first_two(hidden, model):
    return model.layers[1](model.layers[0](hidden))


def none_of_them(hidden, _model):
    return hidden


def scaled(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden) * 2
    return hidden


def scaled_in_place(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden).mul_(2)
    return hidden


def a_part(hidden, model):
    for layer in model.layers:
        hidden = layer(hidden)[:, :-1]
    return hidden


def three_values(hidden, model):
    for layer in model.layers:
        hidden, _, _ = layer(hidden)
    return hidden


def no_hidden_states(_hidden, model):
    for layer in model.layers:
        hidden = layer(x=1)
    return hidden


@pytest.mark.parametrize(
    ("course", "why"),
    [
        (backwards, "layer 2 is called where layer 0 is expected"),
        (twice_in_all, "layer 0 is called where the end is expected"),
        (twice_each, "layer 0 is called where layer 1 is expected"),
        (the_first_two, "only 2 of its 3 layers are called"),
        (none_of_them, "only 0 of its 3 layers are called"),
        (scaled, "something is done to the hidden states in between"),
        (scaled_in_place, "something is done to the hidden states in between"),
        (a_part, "something is done to the hidden states in between"),
        (three_values, "with layers that return what they are given, ValueError"),
        (no_hidden_states, "with layers that return what they are given, KeyError: 'hidden_states'"),
    ],
)
def test_what_cannot_be_exact_is_refused(course, why):
    model = Model(course)
    with pytest.raises(InputRefused, match=f"Model cannot be run layer by layer .*{why}") as refusal:
        replay_of(model)
    assert refusal.value.exit_code == 3
    assert "--method magnitude" in refusal.value.remedy
    assert all("forward" not in vars(layer) for layer in model.layers)


@pytest.mark.parametrize(("returned", "kind"), [(lambda x: (x, x), "tuple"), (lambda x: [x], "list")])
def test_a_layer_that_returns_something_else_is_refused(returned, kind, monkeypatch):
    model = Model(in_order)
    replay = replay_of(model)
    monkeypatch.setattr(Layer, "forward", lambda _layer, hidden: returned(hidden))
    with pytest.raises(InputRefused, match=f"layer 0 returns a {kind}, not a Tensor") as refusal:
        replay.run(0, model.layers[0], 0)
    assert refusal.value.exit_code == 3


def test_layers_are_themselves_again_whatever_happened():
    model = Model(in_order)
    replay = replay_of(model)
    assert all("forward" not in vars(layer) for layer in model.layers)
    model.head = None
    with pytest.raises(TypeError):
        replay.logits(0)
    assert all("forward" not in vars(layer) for layer in model.layers)


def with_arguments(hidden, model):
    rows = hidden.shape[1]
    mask, pair, shared = torch.eye(rows), (torch.ones(rows), torch.full((rows,), hidden.shape[0])), {}
    for layer in model.layers:
        hidden = layer(hidden, mask=mask, pair=pair, own=hidden.sum(), shared=shared)
    return hidden


def test_equal_arguments_are_kept_once_and_dicts_for_each_batch():
    """Masks of every batch would fill the memory; layers write into dicts."""
    one, two, smaller = ([call.kwargs for call in calls] for calls in replay_of(Model(with_arguments))._calls)
    for a, b in zip(one, two, strict=True):
        assert a["mask"] is b["mask"]
        assert all(x is y for x, y in zip(a["pair"], b["pair"], strict=True))
        assert a["own"] is not b["own"]
        assert a["shared"] is not b["shared"]
    assert one[0]["shared"] is one[2]["shared"]
    assert smaller[0]["mask"].shape == (2, 2)
    assert smaller[0]["pair"][1].tolist() == [1, 1]


def test_a_cache_that_no_argument_turns_off():
    """A layer runs more than once; it must not meet its own keys again."""

    def growing(hidden, model):
        cache = [] if model.config.use_cache else None
        for layer in model.layers:
            hidden = layer(hidden, cache=cache)
        return hidden

    class Remembering(Layer):
        def forward(self, hidden, cache):
            if cache is not None:
                cache.append(hidden)
                hidden = hidden + len(cache)
            return super().forward(hidden)

    model = Model(growing, Remembering)
    replay = replay_of(model)
    assert torch.equal(replay.run(0, model.layers[0], 0), replay.run(0, model.layers[0], 0))


def test_the_head_runs_on_a_few_tokens_only():
    """Logits of a large vocabulary are the most expensive tensor of a pass, and nobody reads them here."""
    model = Model(in_order)
    seen = []
    model.head.register_forward_pre_hook(lambda _head, args: seen.append(args[0].shape[:2].numel()))
    replay_of(model, [torch.ones(4, 100, dtype=torch.int64)] * 3)
    assert seen == [8]
