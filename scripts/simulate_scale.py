#!/usr/bin/env python3
"""Replay large checkpoints through the planner: who writes what, how even that is, and how long it would take.

    scripts/simulate_scale.py [--only 8b,671b] [--ranks 1,8,64] [--type h200]

Makes checkpoints that are nothing but headers (the weights are holes in the files, which take no disk) with the
tensors and shards of Llama 3.1 8B, 70B and 405B and of a mixture of experts like DeepSeek V3 (671B), opens and plans
them as `tsenor prune` does, and shares them out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tsenor_cli.distribution import balance, cost, loads, share_out
from tsenor_cli.forecast import PLANNED, forecast
from tsenor_cli.pipeline import plan_prune
from tsenor_cli.specs import NMPattern, PruneSpec

Shapes = dict[str, tuple[int, ...]]
Model = tuple[dict[str, object], Shapes, int]  # its config, the shapes of its tensors, how many shards
GPUS_PER_NODE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--ranks", default="1,8,64", help="numbers of processes, eight to a machine")
    parser.add_argument("--type", default="h200", choices=sorted(PLANNED), help="of GPU")
    args = parser.parse_args()
    print(f"{'model':6} {'tensors':>8} {'shards':>7} {'size':>8} {'ranks':>6} {'balance':>8} {'largest share':>14} "
          f"{'critical tensor':>16} {'seconds':>9}   on {args.type}, predicted, never measured on a card")  # fmt: skip
    for name in args.only.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            make_headers(path, *MODELS[name])
            started = time.monotonic()
            plan = plan_prune(PruneSpec(str(path), Path(folder) / "out", NMPattern(2, 4)))
            planned_s = time.monotonic() - started
            for ranks in map(int, args.ranks.split(",")):
                nodes = [
                    list(range(first, min(first + GPUS_PER_NODE, ranks))) for first in range(0, ranks, GPUS_PER_NODE)
                ]
                shares = loads(plan, share_out(plan, nodes), ranks)
                found = forecast(plan, PLANNED[args.type], nodes)
                print(
                    f"{name:6} {len(plan.tensors):8} {len(plan.checkpoint.shards):7}"
                    f" {plan.checkpoint.nbytes / 1e9:6.0f}GB {ranks:6} {balance(shares):8.1%}"
                    f" {max(shares) / sum(shares):14.2%} {max(map(cost, plan.tensors)) / sum(shares):16.2%}"
                    f" {found.seconds:9.1f}"
                )
            print(f"       planned in {planned_s:.1f} s")


def llama(
    hidden: int, intermediate: int, layers: int, heads: int, shards: int, words: int = 128256
) -> tuple[dict[str, object], Shapes, int]:
    """Config, tensors and number of shards of a Llama 3.1."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": words,
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }  # fmt: skip
    narrow = hidden // heads * 8
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "mlp.down_proj": (hidden, intermediate),
                "mlp.gate_proj": (intermediate, hidden),
                "mlp.up_proj": (intermediate, hidden),
                "post_attention_layernorm": (hidden,),
                "self_attn.k_proj": (narrow, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.v_proj": (narrow, hidden),
            }.items()
        }
    return config, shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}, shards


def mixture(
    layers: int = 61, dense: int = 3, experts: int = 256, hidden: int = 7168, shards: int = 163
) -> tuple[dict[str, object], Shapes, int]:
    """The same of a mixture of experts with the sizes of DeepSeek V3 (its config.json), in bfloat16."""
    words, heads, query, key_value, rope, plain, value = 129280, 128, 1536, 512, 64, 128, 128
    wide, narrow = 18432, 2048
    config: dict[str, object] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "dtype": "bfloat16",
        "vocab_size": words,
        "hidden_size": hidden, "intermediate_size": wide, "moe_intermediate_size": narrow, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": heads, "n_routed_experts": experts, "n_shared_experts": 1,
        "first_k_dense_replace": dense, "q_lora_rank": query, "kv_lora_rank": key_value, "qk_rope_head_dim": rope,
        "qk_nope_head_dim": plain, "v_head_dim": value, "max_position_embeddings": 163840, "tie_word_embeddings": False,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    }  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}"
        shapes |= {
            f"{start}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_a_proj": (query, hidden),
                "self_attn.q_a_layernorm": (query,),
                "self_attn.q_b_proj": (heads * (plain + rope), query),
                "self_attn.kv_a_proj_with_mqa": (key_value + rope, hidden),
                "self_attn.kv_a_layernorm": (key_value,),
                "self_attn.kv_b_proj": (heads * (plain + value), key_value),
                "self_attn.o_proj": (hidden, heads * value),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
        if layer < dense:
            shapes |= dict(_gated(f"{start}.mlp", hidden, wide))
            continue
        shapes |= {
            f"{start}.mlp.gate.weight": (experts, hidden),
            f"{start}.mlp.gate.e_score_correction_bias": (experts,),
        }
        shapes |= dict(_gated(f"{start}.mlp.shared_experts", hidden, narrow))
        for expert in range(experts):
            shapes |= dict(_gated(f"{start}.mlp.experts.{expert}", hidden, narrow))
    return config, shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}, shards


def _gated(start: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, int]]]:
    yield f"{start}.gate_proj.weight", (inner, hidden)
    yield f"{start}.up_proj.weight", (inner, hidden)
    yield f"{start}.down_proj.weight", (hidden, inner)


MODELS = {
    "8b": llama(4096, 14336, 32, 32, 4),
    "70b": llama(8192, 28672, 80, 64, 30),
    "405b": llama(16384, 53248, 126, 128, 191),
    "671b": mixture(),
}


def make_headers(folder: Path, config: dict[str, object], shapes: Shapes, shards: int) -> None:
    """A checkpoint whose weights are holes, its tensors in shards of about the same size."""
    folder.mkdir()
    sizes = {name: 2 * _product(shape) for name, shape in shapes.items()}
    total, done = sum(sizes.values()), 0
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    for name, shape in shapes.items():
        parts[done * shards // total][name] = shape
        done += sizes[name]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:06}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in part.items():
            start, end = end, end + sizes[name]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _product(shape: tuple[int, ...]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


if __name__ == "__main__":
    sys.exit(main())
