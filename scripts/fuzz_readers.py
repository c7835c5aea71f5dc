#!/usr/bin/env python3
"""Coverage-guided fuzzing of what reads a checkpoint's headers, index and report, with Atheris (libFuzzer).

    scripts/fuzz_readers.py [--seconds 3600] [--corpus DIRECTORY]

Needs Atheris, which the tests do not: python -m venv --system-site-packages fuzz && fuzz/bin/pip install atheris.
The first byte of an input chooses the reader: a shard, a header (its length and 16 bytes of data are put around it), an
index beside shards, a config, or a report. A reader may return, or raise InputRefused; what it returns has to be sound:
every tensor within its file, none over another, and the format's own library reads the shard too. Anything else is a
fault, and so is an input that takes more than five seconds or a GiB: libFuzzer stops there and keeps the input. Ends
with the number of executions, coverage and corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import atheris
import safetensors

sys.path.insert(0, str(Path(__file__).parent.parent))

for name in [name for name in sys.modules if name.partition(".")[0] == "json"]:
    del sys.modules[name]  # imported before, and not instrumented

with atheris.instrument_imports(include=["tsenor_cli", "json"]):
    import json.decoder
    import json.scanner

    from tsenor_cli.checkpoint import jsonfile, reader
    from tsenor_cli.checkpoint.shard import DTYPE_BITS, read_shard
    from tsenor_cli.checkpoint.verifier import _claim_of_report
    from tsenor_cli.errors import InputRefused

# In Python, so that coverage guides through it; the same grammar as the C one that is used otherwise.
json.decoder.scanstring = json.decoder.py_scanstring
json.scanner.make_scanner = json.scanner.py_make_scanner

MEMORY = Path("/dev/shm")
LIMITS = ["-timeout=5", "-rss_limit_mb=1024", "-max_len=4096", "-print_final_stats=1"]
HEADER = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
WORDS = (
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "weight_map",
    "quantization_config",
    "BF16",
    "F4",
    "[0,16]",
    "../",
)
REPORT = (
    b'{"options":{"update":true},"tensors":[{"name":"a","action":"pruned","pattern":"2:4","transposable":true,'
    b'"method":"alps","layout":"out_in","sha256":"0"}]}'
)
TWO = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
INDEX = b'{"metadata":{"total_size":16},"weight_map":{"a":"model-00001.safetensors"}}'
SEEDS = (
    b"h" + HEADER,
    b"h" + TWO,
    b"h" + TWO.replace(b"[8,16]", b"[0,8]"),  # these are to be refused
    b"h" + TWO.replace(b"[2]", b"[4]", 1).replace(b"[0,8]", b"[0,16]"),
    b"h" + HEADER[:-1] + b"," + HEADER[HEADER.index(b'"a"') :],
    b"s" + len(HEADER).to_bytes(8, "little") + HEADER + bytes(16),
    b'h{"a":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}',
    b"i" + INDEX,
    b"i" + INDEX.replace(b"model-00001", b"../outside"),
    b"i" + INDEX.replace(b"}}", b',"b":"model-00001.safetensors"}}'),
    b'c{"architectures":["LlamaForCausalLM"],"text_config":{"quantization_config":null}}',
    b"r" + REPORT,
)


class Readers:
    """Every reader of foreign bytes, on files in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "inside"
        self._directory.mkdir()
        (self._directory / "config.json").write_bytes(b"{}")
        for name in ("inside/model-00001", "outside"):
            raw = len(HEADER).to_bytes(8, "little") + HEADER + bytes(16)
            (directory / f"{name}.safetensors").write_bytes(raw)

    def __call__(self, data: bytes) -> None:
        """Let the reader that the first byte chooses read the rest."""
        kind, rest = data[:1], data[1:]
        try:
            if kind == b"i":
                self._index(rest)
            elif kind == b"c":
                self._config(rest)
            elif kind == b"r":
                (self._directory / "report.json").write_bytes(rest)
                _claim_of_report(self._directory / "report.json", None)
            elif kind == b"h":
                self._shard(len(rest).to_bytes(8, "little") + rest + bytes(16))
            else:
                self._shard(rest)
        except InputRefused:
            pass  # as it should be

    def _shard(self, raw: bytes) -> None:
        path = self._directory / "one.safetensors"
        path.write_bytes(raw)
        shard = read_shard(path)
        names = [name for name, _ in json.loads(shard.header, object_pairs_hook=list)]
        assert len(set(names)) == len(names)
        end = 8 + len(shard.header)
        for tensor in shard.tensors:
            assert tensor.start == end
            assert tensor.nbytes * 8 == tensor.parameters * DTYPE_BITS[tensor.dtype]
            end = tensor.stop
        assert end == len(raw)
        safetensors.deserialize(raw)

    def _index(self, raw: bytes) -> None:
        (self._directory / "config.json").write_bytes(b"{}")
        (self._directory / reader.INDEX_FILE).write_bytes(raw)
        found = reader.open_checkpoint(self._directory)
        assert [shard.path for shard in found.shards] == [self._directory / "model-00001.safetensors"]

    def _config(self, raw: bytes) -> None:
        (self._directory / reader.INDEX_FILE).write_bytes(INDEX)
        (self._directory / "config.json").write_bytes(raw)
        found = reader.open_checkpoint(self._directory)
        assert found.config == jsonfile.parse_object(raw, "the config")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=3600, help="[3600]")
    parser.add_argument("--corpus", type=Path, help="where inputs that find something new are kept [nowhere]")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
    corpus = arguments.corpus or directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    (directory / "words").write_text("".join(f'"{word}"\n' for word in WORDS))
    options = [*LIMITS, f"-dict={directory / 'words'}", f"-max_total_time={arguments.seconds}"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], Readers(directory))
    atheris.Fuzz()  # ends the process


if __name__ == "__main__":
    main()
