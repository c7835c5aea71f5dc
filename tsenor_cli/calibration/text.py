"""Text from a file, a pipe or a data set, a piece at a time: no more is read than is wanted.

    text.txt  text.jsonl  text.ndjson (each also with .gz)   text.parquet   -   -:jsonl   hf:DATASET[:CONFIG][:SPLIT]

A .txt file, or standard input, is one document; a line of JSON or a row of a table is one each, unless it is blank.
Line ends stay as they are, so that a hash of the text is one of the file; a byte order mark is dropped. Of one part
after DATASET, it is the split; the usual split is train.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, AnyStr, NamedTuple, cast

from tsenor_cli.checkpoint.source import local_path
from tsenor_cli.errors import InputRefused, UsageError

_PIECE = 2**17  # bytes of a file or characters of a row; as many again to find a line end
_LINE_BYTES = 2**26  # of a line of JSON
_TABLE_ROWS = 256  # in memory at a time
_STANDARD_INPUT = {"-": "text", "-:jsonl": "lines"}
_KINDS = {".txt": "text", ".jsonl": "lines", ".ndjson": "lines", ".parquet": "table"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell halves of characters, UTF-8 and tokenisers cannot


class Piece(NamedTuple):
    """Part of a document, never empty."""

    text: str
    begins: bool  # a document


class _UnreadableText(InputRefused):
    """It is not there, or is not what it claims to be."""

    code = "unreadable-text"


def read_pieces(source: str, field: str = "text") -> Iterator[Piece]:
    """The pieces of a source (see above), of 2^18 characters at most, cut at line ends where there are any.

    Standard input is closed afterwards: whoever asks for it a second time must not get the rest.

    Args:
        source: where the text is.
        field: of a line of JSON or a row of a table, the one that is the text.

    Raises:
        UsageError: a source of no known kind, one that needs a package that is not installed, or a second
            standard input.
        InputRefused: it is not there, is not what it claims to be, or holds nothing but blanks.
    """
    blank = True
    for piece in _pieces(source, field):
        blank = blank and piece.text.isspace()
        yield piece
    if blank:
        raise InputRefused(f"{source} holds no text", "give one that is not empty", code="too-few-tokens")


def _pieces(source: str, field: str) -> Iterator[Piece]:
    if source.startswith("hf:"):
        yield from _of_rows(_dataset_rows(source, field))
        return
    kind = _kind(source)
    try:
        if kind == "table":
            yield from _of_rows(_table_rows(source, field))
            return
        with _opened(source) as file:
            if kind == "lines":
                yield from _of_rows(_json_lines(file, source, field))
            else:
                yield from _of_document(_decoded(_cut(file), source))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _UnreadableText(f"{source} is not a whole gzip file ({error})", "compress it again") from error
    except OSError as error:
        raise _UnreadableText(
            f"{source}: {error.strerror or _first_line(error)}", "give a text file that can be read"
        ) from error


def _kind(source: str) -> str:
    path = Path(source)
    if source in _STANDARD_INPUT:
        return _STANDARD_INPUT[source]
    if source and path.is_dir():
        raise _UnreadableText(f"{source} is a directory", "give one file of text")
    kind = _KINDS.get(Path(source.removesuffix(".gz")).suffix.lower())
    if path.suffix.lower() == ".json":
        raise UsageError(
            f"{source!r} would have to be read as a whole",
            "give JSON lines, one object a line, as .jsonl",
            code="bad-text-source",
        )
    if kind is None or (kind == "table" and source.endswith(".gz")):
        raise UsageError(
            f"{source!r} is no text that can be read",
            "give .txt, .jsonl (both also with .gz), .parquet, - or hf:dataset[:config][:split]",
            code="bad-text-source",
        )
    return kind


def _opened(source: str) -> IO[bytes]:
    if source in _STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.buffer.closed:
            raise UsageError(
                "there is no standard input, or it was read before", "put the text into a file", code="bad-text-source"
            )
        return sys.stdin.buffer
    path = local_path(source)
    return cast("IO[bytes]", gzip.open(path)) if source.endswith(".gz") else path.open("rb")


def _cut(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """All of a file, in parts that end at line ends where there are any: there, a tokeniser would mostly cut too."""
    while part := file.read(_PIECE):
        yield part + file.readline(_PIECE)


def _decoded(blocks: Iterable[bytes], source: str) -> Iterator[str]:
    """UTF-8 without a byte order mark; a character may stand across two blocks."""
    decoder, end = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for block in chain(blocks, [b""]):
        end += len(block)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(source, end, error) from error
        if text:
            yield text


def _of_document(parts: Iterable[str]) -> Iterator[Piece]:
    for number, part in enumerate(parts):
        yield Piece(part, begins=number == 0)


def _of_rows(texts: Iterable[str]) -> Iterator[Piece]:
    for text in texts:
        if text and not text.isspace():
            yield from _of_document(_cut(io.StringIO(text)))  # which splits at \n alone, and translates nothing


def _json_lines(file: IO[bytes], source: str, field: str) -> Iterator[str]:
    number = end = 0
    while line := file.readline(_LINE_BYTES + 1):
        number, end = number + 1, end + len(line)
        where = f"{source}, line {number}"
        if len(line) > _LINE_BYTES:
            raise _UnreadableText(f"{where} is longer than {_LINE_BYTES:,} bytes", "give one object a line")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, end, error) from error
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without the "line 1" of the line itself
            raise _UnreadableText(f"{where} is not JSON ({reason})", "give one object a line") from error
        yield _field(row, field, where)


def _table_rows(source: str, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(
            f"{source} needs the package pyarrow", "pip install pyarrow, or 'tsenor[datasets]'", code="missing-extra"
        ) from error
    number = 0
    try:
        with ParquetFile(local_path(source)) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise _no_field(source, field, names)
            for batch in table.iter_batches(batch_size=_TABLE_ROWS, columns=[field]):
                for row in batch.to_pylist():
                    number += 1
                    yield _field(row, field, f"{source}, row {number}")
    except ArrowException as error:
        raise _UnreadableText(
            f"{source} is not a parquet file that can be read ({_first_line(error)})", "fetch it again"
        ) from error


def _dataset_rows(source: str, field: str) -> Iterator[str]:
    name, *more = source.removeprefix("hf:").split(":")
    if not name or len(more) > 2:
        raise UsageError(f"{source!r} names no data set", "give hf:dataset[:config][:split]", code="bad-text-source")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{source} needs the package datasets", "pip install 'tsenor[datasets]'", code="missing-extra"
        ) from error
    config, split = ["", *more][-2:] if more else ["", ""]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _field(row, field, f"{source}, row {number}")
    except InputRefused:
        raise
    except Exception as error:  # a network, a hub and foreign files stand behind it
        raise _UnreadableText(
            f"{source} cannot be read ({_first_line(error)})",
            "check hf:dataset[:config][:split] and the network, or give a file",
        ) from error


def _field(row: Any, field: str, where: str) -> str:  # noqa: ANN401  (what JSON holds)
    if not isinstance(row, dict):
        raise _UnreadableText(f"{where} has no text {field!r}", f'it is not an object such as {{"{field}": "…"}}')
    if field not in row:
        raise _no_field(where, field, row)
    text = row[field]
    if not isinstance(text, str):
        raise _UnreadableText(
            f"{where} has no text {field!r}", "it holds something else; name the field with --text-field"
        )
    if _SURROGATE.search(text):
        raise _UnreadableText(f"{where}: half of a surrogate pair stands in {field!r}", "write whole characters")
    return text


def _no_field(where: str, field: str, names: Iterable[str]) -> InputRefused:
    known = ", ".join(sorted(names)[:8]) or "nothing"
    return _UnreadableText(f"{where} has no text {field!r}", f"it has {known}; name the field with --text-field")


def _not_utf8(where: str, end: int, error: UnicodeDecodeError) -> InputRefused:
    """`end`: position in the file of the end of what was decoded."""
    offset = end - len(error.object) + error.start
    return _UnreadableText(f"{where} is not UTF-8 at byte {offset:,} ({error.reason})", "convert it to UTF-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
