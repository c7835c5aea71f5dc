"""Tiny random checkpoints of many architectures, written the way real ones are: sharded, with other files beside.

Importing this file is cheap: transformers is imported by the function that needs it.
Sizes are chosen so that 4 divides nearly every weight and 16 divides most: what neither divides has to be skipped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

    Tensors = dict[str, torch.Tensor]
    Shards = dict[str, Tensors]

INDEX = "model.safetensors.index.json"
VOCAB = 96
HIDDEN = 64


@dataclass(frozen=True)
class Architecture:
    """How to build one tiny model: classes by name (see `transformers`), its config, a forward input, its quirks."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    dtype: str = "float32"
    quirk: Callable[[Shards], None] | None = None  # edits the tensors on disk: names, extras, dtypes
    metadata: dict[str, str] = field(default_factory=dict)  # beside format: pt


# --- inputs -----------------------------------------------------------------------------------------------------------


def _ids(length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB - 5, (2, length), generator=torch.Generator().manual_seed(seed))


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids()}


def _image() -> dict[str, torch.Tensor]:
    return {"pixel_values": _noise(2, 3, 32, 32)}


def _text_to_text() -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(6, seed=2)}


def _speech() -> dict[str, torch.Tensor]:
    return {"input_features": _noise(2, 16, 100), "decoder_input_ids": _ids(6, seed=2)}


def _image_and_text() -> dict[str, torch.Tensor]:
    ids = _ids(24)
    ids[:, 2:18] = VOCAB - 1  # sixteen image tokens: 32 x 32 pixels in patches of 8 x 8
    return {"input_ids": ids, **_image()}


# --- quirks of real checkpoints ---------------------------------------------------------------------------------------


def _llama_quirk(shards: Shards) -> None:
    """A multi-token-prediction weight that the model class does not know, and a head kept in float32."""
    last = shards[max(shards)]
    last["model.layers.9.mtp.weight"] = _noise(HIDDEN, HIDDEN).to(torch.bfloat16)
    for tensors in shards.values():
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = _noise(VOCAB, HIDDEN) * 0.1


def _gpt2_quirk(shards: Shards) -> None:
    """The published GPT-2 has names without `transformer.`, and the causal mask as a tensor."""
    _rename(shards, lambda name: name.removeprefix("transformer."))
    shards[min(shards)]["h.0.attn.bias"] = _noise(32, 32).ge(0).view(1, 1, 32, 32)


def _bert_quirk(shards: Shards) -> None:
    """The published BERT calls its norm weights gamma and beta, and brings a pooler and a second head."""
    old_names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in old_names.items():
        _rename(shards, lambda name, new=new, old=old: name.replace(new, old))
    shards[max(shards)] |= {
        "bert.pooler.dense.weight": _noise(HIDDEN, HIDDEN),
        "bert.pooler.dense.bias": _noise(HIDDEN),
        "cls.seq_relationship.weight": _noise(2, HIDDEN),
        "cls.seq_relationship.bias": _noise(2),
    }


def _qwen3_vl_moe_quirk(shards: Shards) -> None:
    """Published checkpoints hold the experts as [experts, in, out]; transformers transposes them while loading."""
    for tensors in shards.values():
        for name in tensors:
            if ".experts." in name:
                tensors[name] = tensors[name].transpose(1, 2).contiguous()


def _rename(shards: Shards, new_name: Callable[[str], str]) -> None:
    for file, tensors in shards.items():
        shards[file] = {new_name(name): tensor for name, tensor in tensors.items()}


# --- the table --------------------------------------------------------------------------------------------------------

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA = {**_DECODER, "intermediate_size": 96}
_CLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA,
        _text,
        dtype="bfloat16",
        quirk=_llama_quirk,
        metadata={"origin": "a test", "note": "naïve \U0001f600"},
    ),
    # 5 heads of 12: projections of 60, which 4 divides and 16 does not
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            **_DECODER,
            "intermediate_size": 96,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 12,
            "tie_word_embeddings": True,
        },
        _text,
        dtype="bfloat16",
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _text,
        quirk=_gpt2_quirk,
    ),
    # feed-forward width 40: 16 divides neither the rows of fc1 nor the columns of fc2
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "word_embed_proj_dim": HIDDEN,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        _text,
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "intermediate_size": 32, "num_local_experts": 4},
        _text,
        dtype="bfloat16",
    ),
    # experts of width 24: 16 does not divide gate and up (24 rows each), but does divide them fused (48 rows)
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            "intermediate_size": 96,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "mlp_only_layers": [0],
        },
        _text,
        dtype="bfloat16",
    ),
    # experts are stored fused as [experts, in, out], gate and up interleaved
    "gpt_oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
        },
        _text,
        dtype="bfloat16",
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_DECODER,
            "intermediate_size": 96,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
        _text,
        dtype="bfloat16",
    ),
    "gpt_neox": Architecture(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _text,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": 2, "n_head": 4},
        _text,
        dtype="bfloat16",
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        _text,
    ),
    "bert": Architecture(
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
        _text,
        quirk=_bert_quirk,
    ),
    "vit": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 16,
        },
        _image,
    ),
    # reduced widths of 8 and 16 inside the bottlenecks: 16 does not divide the first
    "resnet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            "embedding_size": 16,
            "hidden_sizes": [32, 64],
            "depths": [2, 2],
            "layer_type": "bottleneck",
            "num_labels": 16,
        },
        _image,
    ),
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": 16,
            "d_ff": 96,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        _text_to_text,
        dtype="bfloat16",
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_source_positions": 50,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        _speech,
    ),
    # experts are stored fused as [experts, in, out]; gate_up is square, so only the module can tell
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "head_dim": 16,
        },
        _text,
        dtype="bfloat16",
    ),
    # compressed keys of 16 + 6 = 22 rows: not even 4 divides them
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 6,
            "qk_nope_head_dim": 10,
            "v_head_dim": 16,
        },
        _text,
        dtype="bfloat16",
    ),
    "qwen2_moe": Architecture(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_DECODER,
            "intermediate_size": 96,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
        _text,
    ),
    # experts are stored [experts, in, out] and transposed while loading; of width 24, as in qwen3_moe
    "qwen3_vl_moe": Architecture(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {
                **_DECODER,
                "intermediate_size": 96,
                "moe_intermediate_size": 24,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": HIDDEN,
                "patch_size": 8,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": VOCAB - 1,
            "video_token_id": VOCAB - 2,
            "vision_start_token_id": VOCAB - 3,
            "vision_end_token_id": VOCAB - 4,
        },
        _text,
        dtype="bfloat16",
        quirk=_qwen3_vl_moe_quirk,
    ),
    # input projection of 128 + 160 + 4 = 292 rows, which 4 divides and 16 does not
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 32,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        _text,
    ),
    "llava": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_LLAMA},
            "vision_config": {"model_type": "clip_vision_model", **_CLIP_VISION},
            "image_token_id": VOCAB - 1,
        },
        _image_and_text,
    ),
}


# --- making them ------------------------------------------------------------------------------------------------------


def make_checkpoint(name: str, directory: Path) -> Path:
    """Write the checkpoint of `ARCHITECTURES[name]` into `directory`: always the same bytes."""
    architecture = ARCHITECTURES[name]
    model = _random_model(architecture)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(directory, max_shard_size=size // 3)
    _apply_quirks(directory, architecture)
    _add_other_files(directory)
    return directory


def read_shards(directory: Path) -> Shards:
    """Every tensor on disk: file name -> tensor name -> tensor."""
    return {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))}


def write_checkpoint(
    directory: Path,
    tensors_by_shard: Mapping[str, Tensors],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write shards, the index they need and config.json into `directory`; other files there stay as they are."""
    directory.mkdir(parents=True, exist_ok=True)
    for file, tensors in tensors_by_shard.items():
        save_file(tensors, directory / file, metadata={"format": "pt", **(metadata or {})})
    if set(tensors_by_shard) != {"model.safetensors"}:
        _write_json(directory / INDEX, index_of(tensors_by_shard))
    _write_json(directory / "config.json", config)
    return directory


def index_of(tensors_by_shard: Mapping[str, Tensors]) -> dict[str, Any]:
    """The content of model.safetensors.index.json for these shards."""
    size = sum(t.numel() * t.element_size() for tensors in tensors_by_shard.values() for t in tensors.values())
    weight_map = {name: file for file, tensors in tensors_by_shard.items() for name in tensors}
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}


def _random_model(architecture: Architecture) -> PreTrainedModel:
    """Every parameter random: a fresh model has norms of ones and biases of zeros, which hide mistakes."""
    import transformers

    config = getattr(transformers, architecture.config_class)(**architecture.config)
    torch.manual_seed(0)
    model = getattr(transformers, architecture.model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(getattr(torch, architecture.dtype))


def _apply_quirks(directory: Path, architecture: Architecture) -> None:
    if architecture.quirk is None and not architecture.metadata:
        return
    shards = read_shards(directory)
    if architecture.quirk is not None:
        architecture.quirk(shards)
    config = json.loads((directory / "config.json").read_text())
    write_checkpoint(directory, shards, config, architecture.metadata)


def _add_other_files(directory: Path) -> None:
    """Files that have to come along unread: their content makes no sense on purpose."""
    (directory / "tokenizer.json").write_bytes(b'{"not": "a tokenizer", \xff')
    (directory / "assets" / "more").mkdir(parents=True)
    (directory / "assets" / "more" / "params.json").write_text('{"dim": 64}\n')
    (directory / "LICENSE").write_text("as you like\n")
    generation = directory / "generation_config.json"
    if not generation.exists():
        generation.write_text('{"_from_model_config": true}\n')


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_whole(directory: Path) -> PreTrainedModel:
    """The model as `from_pretrained` gives it to a user, in the dtype that layers run in on this CPU."""
    import transformers

    from tsenor_cli.device import CPU, computed_in

    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(directory)
    if computed_in(model.dtype, CPU) != model.dtype:
        model = getattr(transformers, name).from_pretrained(directory, dtype=computed_in(model.dtype, CPU))
    return model.eval()


def add_tokenizer(directory: Path) -> Path:
    """Give a checkpoint a tokenizer: a token for each letter, number 2 between texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(32 + i): 5 + i for i in range(VOCAB - 10)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 2, **letters}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(directory)
    return directory
