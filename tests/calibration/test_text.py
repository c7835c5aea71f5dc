"""Text from every kind of source, and one line for every mistake."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import sys
import types

import pytest

from tsenor_cli.calibration import text
from tsenor_cli.calibration.text import Piece, read_pieces
from tsenor_cli.errors import InputRefused, UsageError


def documents(source, field="text"):
    """Whole documents again."""
    found = []
    for piece in read_pieces(str(source), field):
        if piece.begins:
            found.append("")
        found[-1] += piece.text
    return found


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text, "_PIECE", 10)


@pytest.fixture
def standard_input(monkeypatch):
    return lambda content: monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content)))


def refusal(error, source, field="text"):
    with pytest.raises(error) as caught:
        documents(source, field)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize("content", ["one\ntwo\n", "windows\r\nline\rends\n", "ünïcödé \U0001f600", "x" * 3_000_000])
def test_a_text_file_is_one_document_as_it_stands(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content.encode())
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(content.encode())
    assert documents(tmp_path / "a.txt") == documents(tmp_path / "b.txt.gz") == [content]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert documents(tmp_path / "a.txt") == ["hello"]


@pytest.mark.usefixtures("small_pieces")
def test_pieces_are_cut_at_line_ends(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb cccc\ndddd\nee\nffffffff\n")
    assert list(read_pieces(str(tmp_path / "a.txt"))) == [
        Piece("aaaa bbbb cccc\n", begins=True),
        Piece("dddd\nee\nffffffff\n", begins=False),
    ]


@pytest.mark.usefixtures("small_pieces")
def test_a_line_without_end_is_cut_all_the_same(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 95)
    assert [len(piece.text) for piece in read_pieces(str(tmp_path / "a.txt"))] == [20, 20, 20, 20, 15]


@pytest.mark.usefixtures("small_pieces")
def test_lines_of_json_are_documents(tmp_path):
    rows = [{"text": "short"}, {"text": ""}, {"text": "longer than a piece", "id": 3}]
    (tmp_path / "a.jsonl").write_text(lines(*rows) + "\n  \n" + '{"text": "no line end"}')
    assert documents(tmp_path / "a.jsonl") == ["short", "longer than a piece", "no line end"]
    (tmp_path / "b.ndjson").write_text(lines({"body": "x"}))
    assert documents(tmp_path / "b.ndjson", "body") == ["x"]


def test_standard_input(standard_input):
    standard_input(b"a pipe\n")
    assert documents("-") == ["a pipe\n"]
    standard_input(lines({"text": "a"}, {"text": "b"}).encode())
    assert documents("-:jsonl") == ["a", "b"]


def test_no_more_is_read_than_is_wanted(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": "fine"}) + "this is not JSON")
    assert next(read_pieces(str(tmp_path / "a.jsonl"))) == Piece("fine", begins=True)


def test_a_data_set(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for source in ("hf:org/set", "hf:org/set:test", "hf:org/set:en:validation"):
        assert documents(source) == ["one", "two"]
    assert asked == [
        ("org/set", None, "train", True),
        ("org/set", None, "test", True),
        ("org/set", "en", "validation", True),
    ]


def test_a_data_set_that_cannot_be_had(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputRefused, match=r"no route to host\)"):
        documents("hf:org/set")


def test_a_table(monkeypatch, tmp_path):
    """Without pyarrow, which is not among the test packages: this stands for what is used of it."""

    class ArrowError(Exception):
        pass

    class ParquetFile:
        schema_arrow = types.SimpleNamespace(names=["id", "text"])

        def __init__(self, path):
            if path.name == "bad.parquet":
                raise ArrowError("not a parquet file\nand why")
            if path.name == "gone.parquet":
                path.open()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def iter_batches(self, *, batch_size, columns):
            assert batch_size < 1000  # documents may be long
            rows = [[{"id": 1, "text": "one"}], [{"id": 2, "text": "two"}, {"id": 3, "text": ""}]]
            parts = [[{name: row[name] for name in columns} for row in batch] for batch in rows]
            assert all(set(row) == set(columns) and len(row) == 1 for part in parts for row in part)
            return (types.SimpleNamespace(to_pylist=lambda part=part: part) for part in parts)

    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(ArrowException=ArrowError))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=ParquetFile))
    assert documents(tmp_path / "a.parquet") == ["one", "two"]
    assert "can be read (not a parquet file)" in refusal(InputRefused, tmp_path / "bad.parquet")
    assert "gone.parquet: No such file" in refusal(InputRefused, tmp_path / "gone.parquet")
    assert "has no text 'body': it has id, text" in refusal(InputRefused, tmp_path / "a.parquet", "body")
    assert "a.parquet, row 1 has no text 'id'" in refusal(InputRefused, tmp_path / "a.parquet", "id")


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", b"", UsageError, "no text that can be read"),
        ("a", b"", UsageError, "no text that can be read"),
        ("a.parquet.gz", b"", UsageError, "no text that can be read"),
        ("none.txt", None, InputRefused, "No such file"),
        ("a.txt", b"caf\xe9", InputRefused, "is not UTF-8"),
        ("a.txt.gz", b"plain", InputRefused, "not a whole gzip"),
        ("a.txt.gz", gzip.compress(b"hello" * 100, mtime=0)[:-5], InputRefused, "not a whole gzip"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', InputRefused, "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', InputRefused, "line 1 has no text 'text': it has body; .* --text-field"),
        ("a.jsonl", b'{"text": 3}\n', InputRefused, "line 1 has no text"),
        ("a.jsonl", b"[1]\n", InputRefused, "it is not an object"),
        ("a.jsonl", b"[" * 100_000, InputRefused, "line 1 is not JSON"),
    ],
)
def test_mistakes_are_named(name, content, error, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        documents(tmp_path / name)


@pytest.mark.parametrize(("source", "package"), [("hf:a/b", "datasets"), ("a.parquet", "pyarrow")])
def test_packages_that_are_missing(source, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"needs the package {package}.*tsenor\[datasets\]"):
        documents(source)


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d"])
def test_no_data_set(source):
    with pytest.raises(UsageError, match="names no data set"):
        documents(source)


def test_a_directory(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(InputRefused, match="directory"):
        documents(tmp_path / "a.txt")


# --- bytes, positions, and how far is read


BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_dropped_at_the_beginning_only(tmp_path):
    (tmp_path / "a.TXT").write_bytes(BOM + b"a\n" + BOM + b"b")
    (tmp_path / "a.jsonl").write_bytes(BOM + lines({"text": "a"}).encode())
    assert documents(tmp_path / "a.TXT") == ["a\n\ufeffb"]
    assert documents(tmp_path / "a.jsonl") == ["a"]


def test_characters_and_line_ends_survive_any_cut(tmp_path, monkeypatch):
    """One line longer than a piece, with characters of one to four bytes at every phase."""
    monkeypatch.setattr(text, "_PIECE", 4)
    for shift in range(9):
        content = "x" * shift + "aé€𝄞" * 7 + "\r\n" + "é" * 5
        (tmp_path / "a.txt").write_bytes(content.encode())
        pieces = list(read_pieces(str(tmp_path / "a.txt")))
        assert "".join(piece.text for piece in pieces) == content
        assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert all(0 < len(piece.text) <= 9 for piece in pieces)


def test_line_ends_inside_a_row_stay_as_they_are(tmp_path):
    rows = [{"text": "a\r\nb\rc"}, {"text": " \n"}, {"text": "\u2028é𝄞"}]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows).replace("\n", "\r\n").encode())
    assert documents(tmp_path / "a.jsonl") == ["a\r\nb\rc", "\u2028é𝄞"]  # a row of blanks is none


@pytest.mark.usefixtures("small_pieces")
def test_a_long_row_comes_in_pieces(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": "abcdefghijk\nl"}, {"text": "g" * 21}))
    assert list(read_pieces(str(tmp_path / "a.jsonl"))) == [
        Piece("abcdefghijk\n", begins=True),
        Piece("l", begins=False),
        Piece("g" * 20, begins=True),
        Piece("g", begins=False),
    ]


def test_only_the_first_piece_is_read_for_it(standard_input):
    """A damaged end does no harm to whoever stops before it."""
    standard_input(b"good\n" * 2**20 + b"\xff")
    pieces = read_pieces("-")
    assert next(pieces).text.startswith("good\ngood\n")
    assert 2**17 <= sys.stdin.buffer.tell() <= 2**18
    with pytest.raises(InputRefused, match=r"- is not UTF-8 at byte 5,242,880 "):
        list(pieces)


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", "0"),
        (BOM + b"abc\xffde", "6"),
        (b"abc\n\xc3", "4"),  # cut short
        (b"a\xed\xa0\x80", "1"),  # a surrogate
        (b"x" * (3 * 2**20) + b"\x80" + b"y" * 2**20, "3,145,728"),
        ("é".encode() * (2 * 2**20) + b"\xc3x", "4,194,304"),
        ("a\n".encode("utf-16"), "0"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_bytes_that_are_not_utf8_are_found(name, content, offset, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    assert f"{name} is not UTF-8 at byte {offset} (" in refusal(InputRefused, tmp_path / name)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}", "line 2 has no text 'text': it has nothing"),
        (b'{"text": null}', "line 2 has no text 'text': it holds something else"),
        (b'{"text": "a"', "line 2 is not JSON (Expecting ',' delimiter)"),
        (b"1" * 10_000, "line 2 is not JSON"),  # more digits than Python reads
        (b'{"text": "\\ud83d"}', "line 2: half of a surrogate pair"),
        (b'{"text": "\xe9"}', "line 2 is not UTF-8 at byte 24"),
    ],
)
def test_a_bad_line_is_named(line, words, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "a"}).encode() + line + b"\n")
    assert words in refusal(InputRefused, tmp_path / "a.jsonl")


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\\ud834\\udd1e"}')
    assert documents(tmp_path / "a.jsonl") == ["𝄞"]


def test_a_line_of_json_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LINE_BYTES", 30)
    fits, long = lines({"text": "a" * 17}), lines({"text": "a" * 18})
    assert len(fits) == 30
    (tmp_path / "a.jsonl").write_text(fits)
    assert documents(tmp_path / "a.jsonl") == ["a" * 17]
    (tmp_path / "a.jsonl").write_text(fits + long)
    assert "line 2 is longer than 30 bytes" in refusal(InputRefused, tmp_path / "a.jsonl")


def test_damage_inside_gzip(tmp_path):
    whole = gzip.compress(bytes(range(128)) * 1000)
    (tmp_path / "a.txt.gz").write_bytes(whole[:12] + b"\xff" * 9 + whole[21:])
    assert "a.txt.gz is not a whole gzip file" in refusal(InputRefused, tmp_path / "a.txt.gz")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
@pytest.mark.parametrize("content", [b"", BOM, b" \n\t\r\n", BOM + b"\n"])
def test_nothing_but_blanks(name, content, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert "holds no text" in refusal(InputRefused, tmp_path / name)


def test_standard_input_is_not_read_twice(standard_input, monkeypatch):
    standard_input(b"a\n" * 2**21)
    next(read_pieces("-"))
    assert "it was read before" in refusal(UsageError, "-")
    monkeypatch.setattr(sys, "stdin", None)
    assert "there is no standard input" in refusal(UsageError, "-")


def test_a_data_set_without_end_is_streamed(monkeypatch):
    asked, given = [], itertools.count()
    endless = ({"text": f"row {number}"} for number in given)
    fake = types.SimpleNamespace(load_dataset=lambda *names, **options: asked.append((names, options)) or endless)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    pieces = list(itertools.islice(read_pieces("hf:org/set:en:"), 3))
    assert pieces == [Piece(f"row {number}", begins=True) for number in range(3)]
    assert asked == [(("org/set", "en"), {"split": "train", "streaming": True})]
    assert next(given) == 3


def test_a_row_of_a_data_set_is_named(monkeypatch):
    rows = [{"text": "a"}, {"body": "b"}]
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    assert "hf:a/b, row 2 has no text 'text': it has body" in refusal(InputRefused, "hf:a/b")


def test_requests_that_make_no_sense(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert ". is a directory: give one file" in refusal(InputRefused, ".")
    assert "give JSON lines" in refusal(UsageError, "a.json")
    assert "pip install pyarrow" in refusal(UsageError, "a.parquet")
    for source in ("", "-:csv", "a.txt.bz2", "a.gz"):
        assert "give .txt, .jsonl" in refusal(UsageError, source)


def test_a_home_directory(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("home")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/a.txt") == ["home"]
