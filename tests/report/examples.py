"""Reports made up for tests: of the shape of a real run, with numbers that vary as real ones do."""

from __future__ import annotations

import random
from dataclasses import replace

from tsenor_cli.report.records import Histogram, Report, Summary, TensorRecord, Tile

_KINDS = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
_OTHERS = ("input_layernorm", "post_attention_layernorm")
_TEXT = {
    "source": "eval.txt",
    "text_sha256": "ab" * 32,
    "tokens_sha256": "cd" * 32,
    "tokenizer_sha256": "ef" * 32,
    "samples": 128,
    "samples_wanted": 128,
    "sequence_length": 2048,
    "tokens": 262144,
    "seed": 0,
}
_CALIBRATION = {"source": "text.jsonl", "field": "text", "samples": 128, "sequence_length": 2048, "seed": 7}


def large_report(m: int = 16) -> Report:
    """Like a Llama 3 8B by ALPS: 291 tensors, 224 of them pruned."""
    rng = random.Random(0)
    tensors = [_kept("model.embed_tokens", [128256, 4096], "an embedding")]
    for layer in range(32):
        for kind, shape in _KINDS.items():
            tensors.append(_pruned(f"model.layers.{layer}.{kind}.weight", list(shape), f"{m // 2}:{m}", rng))
        tensors += [_kept(f"model.layers.{layer}.{name}", [4096], "not a matrix") for name in _OTHERS]
    tensors[7] = _kept(tensors[7].name, tensors[7].shape, "ignored", prunable=True)
    tensors += [_kept("model.norm", [4096], "not a matrix"), _kept("lm_head", [128256, 4096], "the output head")]
    pruned = [record for record in tensors if record.action == "pruned"]
    parameters = sum(record.parameters for record in pruned)
    before = {"perplexity": 6.24, "mean_loss": 1.83, "predicted_tokens": 262016, "dtype": "bfloat16", **_TEXT}
    return Report(
        identity="01" * 32,
        tsenor_version="0.1.0",
        versions={"python": "3.11.7", "torch": "2.13.0"},
        model={
            "source": "meta-llama/Llama-3.1-8B",
            "revision": "a" * 40,
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
        },
        pattern={"n": m // 2, "m": m, "transposable": True},
        options={
            "method": "alps",
            "rules": [],
            "solver": "exact",
            "tau": None,
            "iterations": None,
            "local_search": None,
            "calibration": _CALIBRATION,
            "eval": {"source": "eval.txt", "field": "text", "sequence_length": 2048},
            "update": True,
            "damping": 0.01,
            "few_tokens": "magnitude",
            "only": [],
            "ignore": ["model.layers.1.input_layernorm", "*.0.mlp.down_proj"],
            "min_coverage": 0.9,
            "strict": False,
            "fallback": False,
            "allow_nonfinite": False,
            "save_masks": False,
            "memory_budget": None,
            "device": "auto",
        },
        citations={"alps": "Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning, NeurIPS 2024"},
        device="cuda:0, NVIDIA H100",
        processes=1,
        threads=16,
        summary=Summary(
            coverage=0.991,
            pruned_tensors=len(pruned),
            pruned_parameters=parameters,
            prunable_parameters=int(parameters / 0.991),
            total_parameters=sum(record.parameters for record in tensors),
            zeros=parameters // 2,
            kept_energy=0.873,
            objective=1e6,
            upper_bound=1e6,
            gap=3e-13,
            worst_block_gap=9e-11,
            checkpoint_bytes=16_060_522_496,
            error=0.0312,
            seconds=5321.5,
            stages={
                "planning": 3.1,
                "resuming": 12.0,
                "layers": 1210.4,
                "masks": 905.1,
                "weights": 3001.2,
                "finishing": 9.7,
                "perplexity": 180.0,
            },
            peak_memory_bytes=21_474_836_480,
            read_bytes=48_000_000_000,
            written_bytes=16_100_000_000,
        ),
        tensors=tensors,
        calibration=_TEXT,
        perplexity={"before": before, "after": {**before, "perplexity": 7.02}},
        tile=_tile(m, rng),
        histogram=Histogram(
            223, 223 * 2**15, 4.0, [rng.randrange(10**5) for _ in range(80)], [rng.randrange(10**4) for _ in range(80)]
        ),
    )


def mixture_report() -> Report:
    """Like a mixture of 4 layers of 512 experts, of which many saw too few tokens: what belongs together is one row."""
    rng, report = random.Random(1), large_report()
    names = [
        f"model.layers.{i}.mlp.experts.{e}.{kind}.weight"
        for i in range(4)
        for e in range(512)
        for kind in ("up_proj", "down_proj")
    ]
    tensors = [
        replace(
            _pruned(name, [768, 2048], "2:4", rng), fallbacks=["expert 3 saw 5 tokens"] if rng.random() < 0.1 else None
        )
        for name in names
    ]
    return replace(report, tensors=tensors)


def _tile(m: int, rng: random.Random) -> Tile:
    weights = [[rng.gauss(0, 0.02) for _ in range(m)] for _ in range(m)]
    kept = ["".join("1" if (i + j) % m < m // 2 else "0" for j in range(m)) for i in range(m)]
    rows = [" ".join(f"{weight:.4g}" for weight in row) for row in weights]
    return Tile("model.layers.0.self_attn.q_proj.weight", f"{m // 2}:{m}", transposable=True, weights=rows, kept=kept)


def _pruned(name: str, shape: list[int], pattern: str, rng: random.Random) -> TensorRecord:
    parameters = shape[0] * shape[1]
    kept, error, seconds = (
        0.85 + 0.05 * rng.random(),
        0.02 + 0.03 * rng.random(),
        parameters * 3e-7 * (1 + rng.random()),
    )
    return TensorRecord(
        name,
        "model-00001-of-00004.safetensors",
        "BF16",
        shape,
        parameters,
        "12" * 32,
        prunable=True,
        action="pruned",
        layout="out_in",
        pattern=pattern,
        transposable=True,
        method="alps",
        zeros=parameters // 2,
        energy=parameters * 4e-4,
        kept_energy=kept,
        tokens=262144,
        output_energy=parameters * rng.random(),
        mask_error=2 * error,
        error=error,
        damping=0.01,
        damping_retries=0,
        objective=parameters * 0.01,
        upper_bound=parameters * 0.01 * (1 + 1e-12 * rng.random()),
        gap=1e-13,
        worst_block_gap=1e-11,
        solver="exact",
        status="converged",
        solver_seconds=seconds / 3,
        seconds=seconds,
    )


def _kept(name: str, shape: list[int], reason: str, *, prunable: bool = False) -> TensorRecord:
    parameters = shape[0] * (shape[1] if len(shape) > 1 else 1)
    return TensorRecord(
        name if name.endswith(".weight") else f"{name}.weight",
        "model-00001-of-00004.safetensors",
        "BF16",
        shape,
        parameters,
        "34" * 32,
        prunable=prunable,
        action="kept",
        reason=reason,
        layout="out_in" if prunable else None,
    )
