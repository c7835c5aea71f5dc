#!/usr/bin/env python3
"""Check for every causal language model of the installed transformers that replaying it layer by layer is exact.

    scripts/check_replay.py [TYPE ...] [--dtype bfloat16] [--at-least 120] [--jobs 2]

Each type gets a tiny config with random weights, is written to disk in shards, and is run twice: whole, by
`from_pretrained`, and with one decoder layer in memory at a time, each layer run twice as calibration does. The logits
of two batches must be equal bit by bit, or the type must have been refused. One line per type, then a summary; exit 1
if any type differs or gives no answer, or if fewer than `--at-least` of all types are equal. "not built" says why the
tiny model itself could not be made or run. All types of transformers 5.23 take two minutes on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # one type per core is quicker than one core per type
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tsenor_cli.calibration.replay import Replay
from tsenor_cli.checkpoint.adapter.skeleton import Skeleton
from tsenor_cli.checkpoint.reader import open_checkpoint
from tsenor_cli.device import CPU, computed_in
from tsenor_cli.errors import InputRefused

LAYERS, HEADS, HIDDEN, VOCAB, LENGTH = 4, 4, 64, 160, 24
MAX_PARAMETERS, MAX_SECONDS = 150_000_000, 60

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
# What a config is shrunk to: every field that it has by one of these names gets the number before them.
_SIZES = f"""
{LAYERS} {" ".join(_LAYER_COUNTS)} encoder_layers num_encoder_layers num_decoder_layers
{HEADS} num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads
{HEADS} attention_heads num_experts n_routed_experts num_local_experts moe_num_experts linear_num_value_heads
{HEADS} linear_num_heads swa_num_attention_heads
{HIDDEN} hidden_size n_embd d_model dim emb_dim embedding_dim embedding_size input_embedding_size
{HIDDEN} output_embedding_size word_embed_proj_dim lru_width attention_hidden_size backbone_hidden_size
{HIDDEN} adapter_in_dim adapter_input_size adapter_out_dim
{VOCAB} vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size
96 intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner feed_forward_size
96 intermediate_size_mlp ffn_hidden_size dense_intermediate_size shared_intermediate_size
32 moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank
32 moe_shared_expert_intermediate_size shared_experts_intermediate_size router_hidden_size
16 head_dim v_head_dim d_head dim_head global_head_dim attention_head_size swa_head_dim linear_head_dim
16 linear_key_head_dim linear_value_head_dim qk_nope_head_dim kv_channels index_head_dim rotary_dim
16 swa_v_head_dim mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank laurel_rank
16 adapter_rank hidden_size_per_layer_input o_lora_rank index_topk index_block_size indexer_head_dim
16 indexer_budget
8 qk_rope_head_dim sliding_window sliding_window_size local_attention window_size chunk_size
8 mamba_chunk_size indexer_compress_ratio attention_chunk_size attention_window_size block_size
8 num_mel_bins
2 num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_k
2 num_query_groups swa_num_key_value_heads linear_num_key_heads encoder_attention_heads
2 num_encoder_attention_heads n_group num_expert_group index_n_heads indexer_n_heads first_k_dense_replace
2 num_kv_shared_layers
1 topk_group n_shared_experts num_shared_experts n_groups mamba_n_groups mamba_ngroups pad_token_id
1 num_dense_layers num_codebooks indexer_kv_heads
64 max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
3 bos_token_id
4 eos_token_id
"""
SHRUNK = {name: int(size) for size, *names in map(str.split, _SIZES.strip().splitlines()) for name in names}
# What the rule above does not get right, by type.
_ATTENTION_LAST = {"layer_types": ["linear_attention", "full_attention"] * 2}
# Of all lists of layers the largest is the decoder's, which is to hold for tiny models too.
_SMALL_VISION = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "image_size": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "git": {"vision_config": _SMALL_VISION | {"intermediate_size": 32}},
    "got_ocr2": {"vision_config": _SMALL_VISION | {"mlp_dim": 32, "output_channels": 16}},
    "granitemoehybrid": _ATTENTION_LAST,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "attn_layer_period": 2},
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types [all causal language models]")
    parser.add_argument("--dtype", default="float32", help="of the weights [float32]")
    parser.add_argument("--at-least", type=int, default=120, metavar="COUNT", help="how many must be equal [120]")
    parser.add_argument("--jobs", type=int, default=2, metavar="COUNT", help="types at a time [2]")
    args = parser.parse_args()
    types = args.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    started, counts = time.perf_counter(), Counter[str]()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "transformers.modeling_utils"])
    with ThreadPoolExecutor(args.jobs) as pool:
        for finished in as_completed(
            pool.submit(in_a_process, kind, getattr(torch, args.dtype), context) for kind in types
        ):
            kind, verdict, why = finished.result()
            counts[verdict] += 1
            print(f"{kind:28} {verdict}{f' ({why})' if why else ''}", flush=True)
    print(f"transformers {transformers.__version__}, {time.perf_counter() - started:.0f} s:", dict(counts))
    if counts["DIFFERS"] or counts["NO ANSWER"]:
        sys.exit("a replay that differs, hangs or crashes is a bug")
    if not args.types and counts["equal"] < args.at_least:
        sys.exit(f"fewer than {args.at_least} are equal")


def in_a_process(kind: str, dtype: torch.dtype, context: Any) -> tuple[str, str, str]:  # noqa: ANN401  (a private class)
    """Check one type where a crash or an endless loop harms no other: type, verdict, why."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check, args=(kind, dtype, sender))
    process.start()
    sender.close()
    try:
        verdict, why = receiver.recv() if receiver.poll(MAX_SECONDS) else ("NO ANSWER", f"{MAX_SECONDS} s are over")
    except EOFError:
        process.join()
        verdict, why = "NO ANSWER", f"its process ended with {process.exitcode}"
    process.kill()
    process.join()
    return kind, verdict, why


def check(kind: str, dtype: torch.dtype, answer: Connection) -> None:
    """Send what became of one type: verdict, why."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        try:
            write_tiny(kind, dtype, Path(directory))
            expected = whole(kind, Path(directory))
        except Exception as error:  # noqa: BLE001  (whatever transformers has against our config)
            answer.send(("not built", brief(error)))
            return
        try:
            found = streamed(Path(directory))
        except InputRefused as refusal:
            answer.send(("refused", refusal.message))
        except Exception as error:  # noqa: BLE001  (a bug of ours; the other types are still to be checked)
            answer.send(("DIFFERS", brief(error)))
        else:
            same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            answer.send(("equal", "") if same else ("DIFFERS", f"by {furthest(expected, found):.1e}"))


def batches() -> list[torch.Tensor]:
    """Two batches of tokens; the second is smaller, as the last one usually is."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, VOCAB, (sequences, LENGTH), generator=generator) for sequences in (2, 1)]


def write_tiny(kind: str, dtype: torch.dtype, directory: Path) -> None:
    """Write the checkpoint of a shrunken model with random weights, in a few shards."""
    config = shrink(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    if not isinstance(config, model_class.config_class):  # a class for the text part of a larger model
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"{parameters:,} parameters are too many")
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model has norms of ones and biases of zeros, which hide mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.to(dtype).save_pretrained(directory, max_shard_size=parameters * dtype.itemsize // 3)


def shrink(config_class: type[PretrainedConfig], special: Mapping[str, Any]) -> PretrainedConfig:
    """A small config: usual fields by `SHRUNK`, lists with one entry per layer to the length of `LAYERS`."""
    return config_class(**(_small_fields(config_class) | dict(special)))


def _small_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    usual = config_class()
    layers = next((getattr(usual, name) for name in _LAYER_COUNTS if hasattr(usual, name)), None)
    small: dict[str, Any] = {}
    for name, value in vars(usual).items():
        if isinstance(value, PretrainedConfig):
            small[name] = _small_fields(type(value))
        elif isinstance(value, list) and len(value) == layers:
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
        elif name == "rope_parameters":
            small[name] = _small_rope(value)
        elif name in SHRUNK:
            small[name] = SHRUNK[name]
    if "kv_lora_rank" in small:  # latent attention: as many keys as queries; a head's size is what is rotated
        small |= {"num_key_value_heads": HEADS, "head_dim": SHRUNK["qk_rope_head_dim"]}
    return small


def _small_rope(rope: Any) -> Any:  # noqa: ANN401  (a dict, one dict per kind of layer, or None)
    if not isinstance(rope, dict):
        return rope
    return {name: [4, 2, 2] if name == "mrope_section" else _small_rope(value) for name, value in rope.items()}


@torch.no_grad()
def whole(kind: str, directory: Path) -> list[torch.Tensor]:
    """The logits of every batch, by the model that `from_pretrained` gives."""
    load = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]).from_pretrained
    model: PreTrainedModel = load(directory)
    if (dtype := computed_in(model.dtype, CPU)) != model.dtype:
        model = load(directory, dtype=dtype)
    for parameter in model.parameters():
        # freshly allocated, hence aligned alike: matrix products may differ in the last bit with the alignment
        parameter.data = parameter.data.clone()
    model.eval()  # type: ignore[no-untyped-call]
    model.config.use_cache = False  # some round what they keep
    logits = [model(input_ids=tokens).logits for tokens in batches()]
    if not all(found.isfinite().all() for found in logits):
        raise ValueError("the logits are not finite")
    return logits


def streamed(directory: Path) -> list[torch.Tensor]:
    """The logits of every batch, one decoder layer in memory at a time."""
    skeleton = Skeleton(open_checkpoint(directory))
    replay = Replay(skeleton, batches())
    for index in range(len(skeleton.layers)):
        layer = skeleton.load_layer(index)
        for batch in range(len(replay)):
            replay.run(index, layer, batch)  # as calibration does, which must leave nothing behind
        replay.advance(index, layer)
        skeleton.drop_layer(index)
    return [replay.logits(batch) for batch in range(len(replay))]


def furthest(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    return max((a.float() - b.float()).abs().max().item() for a, b in zip(expected, found, strict=True))


def brief(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip() or "no message").replace("\n", " ")
    return f"{type(error).__name__}: {text[:160]}; {Path(where.filename).name}:{where.lineno}"


if __name__ == "__main__":
    main()
