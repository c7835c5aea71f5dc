"""Windows of tokens: which ones, how many, and that they are always the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import types
from collections import Counter

import pytest
import torch

from tsenor_cli.calibration import tokens as module
from tsenor_cli.calibration.text import Piece
from tsenor_cli.calibration.tokens import all_windows, calibration_windows
from tsenor_cli.errors import InputRefused, UsageError

EOS = 1000


class Letters:
    """A token for each letter, its code point."""

    eos = EOS
    fingerprint = "f" * 64

    def __init__(self):
        self.calls = []

    def encode(self, texts):
        self.calls.append(len(texts))
        return [[ord(letter) for letter in text] for text in texts]


def write(tmp_path, *texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def letters(window):
    return "".join("|" if token == EOS else chr(token) for token in window.tolist())


def test_documents_are_joined_and_cut(tmp_path):
    found = all_windows(write(tmp_path, "abcd", "", "ef", "ghijkl"), Letters(), length=4)
    assert [letters(window) for window in found.windows] == ["abcd", "|ef|", "ghij"]
    assert found.windows.dtype == torch.int64
    limited = all_windows(write(tmp_path, "abcdefgh"), Letters(), length=4, limit=1)
    assert [letters(window) for window in limited.windows] == ["abcd"]


def test_without_an_end_of_text_they_are_joined_all_the_same(tmp_path):
    tokenizer = Letters()
    tokenizer.eos = None
    found = all_windows(write(tmp_path, "ab", "cd"), tokenizer, length=4)
    assert letters(found.windows[0]) == "abcd"


def test_pieces_of_one_document_are_one(monkeypatch):
    pieces = [Piece("ab", begins=True), Piece("cd", begins=False), Piece("ef", begins=True)]
    monkeypatch.setattr(module, "read_pieces", lambda *_: iter(pieces))
    assert [letters(w) for w in all_windows("x", Letters(), length=7).windows] == ["abcd|ef"]


def test_windows_are_drawn_without_repeating(tmp_path):
    text = "".join(chr(0x4E00 + i) for i in range(4000))
    source = write(tmp_path, text)
    found = {seed: calibration_windows(source, Letters(), samples=20, length=8, seed=seed) for seed in (0, 0, 1)}
    again = calibration_windows(source, Letters(), samples=20, length=8, seed=0)
    assert torch.equal(found[0].windows, again.windows)
    assert not torch.equal(found[0].windows, found[1].windows)
    starts = (found[0].windows[:, 0] - 0x4E00).tolist()
    assert starts == sorted(set(starts))
    assert all(start % 8 == 0 for start in starts)
    assert max(starts) < 8 * 20 * module.OVERSAMPLING
    assert max(starts) > 8 * 20 * 2  # and not only from the beginning
    assert starts[:4] == [8, 16, 24, 56]  # the same on every machine, for ever


def test_a_short_text_gives_what_it_has(tmp_path):
    found = calibration_windows(write(tmp_path, "abcdefghij"), Letters(), samples=128, length=4)
    assert [letters(window) for window in found.windows] == ["abcd", "efgh"]
    assert found.to_dict() | {"tokens": 8, "samples": 2, "samples_wanted": 128, "seed": 0} == found.to_dict()
    with pytest.raises(InputRefused, match=r"has 10 tokens, and a window 11: .*--sequence-length"):
        calibration_windows(write(tmp_path, "abcdefghij"), Letters(), samples=1, length=11)
    with pytest.raises(InputRefused, match="holds no text"):
        calibration_windows(write(tmp_path, ""), Letters(), samples=1, length=2)


def test_many_short_documents_are_enough(tmp_path):
    """Other tools wait for a document longer than a window, for ever."""
    source = write(tmp_path, *["a"] * 100_000)
    found = calibration_windows(source, Letters(), samples=10, length=2048)
    assert found.windows.shape == (10, 2048)
    assert (found.windows == EOS).float().mean() == 0.5


def test_an_endless_text_is_read_as_far_as_needed(monkeypatch):
    taken = []

    def endless(*_):
        while True:
            taken.append(1)
            assert len(taken) < 2000
            yield Piece("x" * 100, begins=True)

    monkeypatch.setattr(module, "read_pieces", endless)
    found = calibration_windows("x", Letters(), samples=4, length=50)
    assert found.windows.shape == (4, 50)
    assert len(taken) <= -(-4 * 50 * module.OVERSAMPLING // 101) + 64


def test_long_pieces_are_not_gathered(monkeypatch):
    tokenizer = Letters()
    monkeypatch.setattr(module, "_CHARACTERS", 10)
    monkeypatch.setattr(module, "read_pieces", lambda *_: iter([Piece("abcdef", begins=True)] * 5))
    all_windows("x", tokenizer, length=4)
    assert tokenizer.calls == [2, 2, 1]


def test_hashes_change_with_what_they_are_of(tmp_path):
    base = all_windows(write(tmp_path, "abcd", "efgh"), Letters(), length=4)
    same = all_windows(write(tmp_path, "abcd", "efgh"), Letters(), length=4)
    joined = all_windows(write(tmp_path, "abcdefgh"), Letters(), length=4)
    longer = all_windows(write(tmp_path, "abcd", "efghx"), Letters(), length=4)
    assert base.to_dict() == same.to_dict()
    assert base.text_sha256 != joined.text_sha256
    assert base.tokens_sha256 != joined.tokens_sha256
    assert base.text_sha256 != longer.text_sha256
    assert base.tokens_sha256 == longer.tokens_sha256  # what does not fill a window is not used
    assert base.tokenizer_sha256 == "f" * 64
    narrow = all_windows(write(tmp_path, "abcd", "efgh"), Letters(), length=2)
    assert base.tokens_sha256 != narrow.tokens_sha256


def numbered(tmp_path, windows):
    """A text of consecutive characters from 1001 on, so that a window of four shows which one it is."""
    path = tmp_path / "numbered.txt"
    path.write_text("".join(chr(1001 + token) for token in range(4 * windows)))
    return str(path)


def positions(tokens):
    first = tokens.windows[:, :1]
    assert torch.equal(tokens.windows, first + torch.arange(4))
    return ((first[:, 0] - 1001) // 4).tolist()


def test_the_windows_of_a_seed(tmp_path):
    """By Algorithm R worked out apart from the package; Python promises that random() never changes."""
    source = numbered(tmp_path, 20)
    assert positions(calibration_windows(source, Letters(), samples=5, length=4, seed=0)) == [0, 1, 8, 10, 12]
    assert positions(calibration_windows(source, Letters(), samples=5, length=4, seed=1)) == [3, 8, 10, 13, 18]


def test_every_window_is_as_likely_as_any_other(tmp_path):
    """3 of 12, 2000 times: each 500 times, give or take six standard deviations (of 19)."""
    source = numbered(tmp_path, 12)
    counts = Counter()
    for seed in range(2000):
        found = positions(calibration_windows(source, Letters(), samples=3, length=4, seed=seed))
        assert found == sorted(set(found))
        counts.update(found)
    assert sorted(counts) == list(range(12))
    assert all(abs(count - 500) < 116 for count in counts.values())


def test_windows_are_drawn_from_four_times_as_many(tmp_path):
    found = set()
    source = numbered(tmp_path, 2 * module.OVERSAMPLING + 50)
    for seed in range(300):
        found.update(positions(calibration_windows(source, Letters(), samples=2, length=4, seed=seed)))
    assert found == set(range(2 * module.OVERSAMPLING))


def test_an_end_of_text_of_zero_is_one(tmp_path):
    tokenizer = Letters()
    tokenizer.eos = 0
    assert all_windows(write(tmp_path, "a", "b"), tokenizer, length=3).windows.tolist() == [[97, 0, 98]]


def test_a_long_document_is_not_broken_by_the_end_of_text(tmp_path):
    content = "".join(chr(97 + index % 26) for index in range(3 * 2**20))
    (tmp_path / "a.txt").write_text(content)
    tokens = all_windows(str(tmp_path / "a.txt"), Letters(), length=2**20)
    assert bytes(tokens.windows.flatten().tolist()).decode() == content


def test_a_billion_documents_are_not_waited_for(monkeypatch):
    given = itertools.count()
    endless = ({"text": f"{number:09}"} for number in given if number < 10**9)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: endless))
    assert calibration_windows("hf:a/b", Letters(), samples=4, length=100).windows.shape == (4, 100)
    needed = 4 * 100 * module.OVERSAMPLING // 10  # documents, each with its end of text
    assert needed <= next(given) <= needed + 65  # and at most what is tokenised in one call


def test_the_hash_of_a_file_is_what_sha256sum_says(tmp_path):
    content = b"a\r\n\xc3\xa9\n" * 10
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "a.txt").write_bytes(mark + content)
        tokens = all_windows(str(tmp_path / "a.txt"), Letters(), length=5)
        assert tokens.text_sha256 == hashlib.sha256(content).hexdigest()


def test_the_hash_tells_documents_apart(tmp_path):
    hashes = [
        all_windows(write(tmp_path, *texts), Letters(), length=3).text_sha256
        for texts in (["abc", "def"], ["abcdef"], ["ab", "cdef"], ["abc", "deg"], ["def", "abc"])
    ]
    assert len(set(hashes)) == 5
    assert hashes[0] == hashlib.sha256(b"abc\xffdef").hexdigest()


def test_text_that_was_not_used_does_not_count(tmp_path):
    """Documents behind the last window: not even those that were tokenised along with it."""
    used = ["abcd"] * 10
    one, two, three = (
        all_windows(write(tmp_path, *texts), Letters(), length=7, limit=7).to_dict()
        for texts in ([*used, "x"], [*used, "y", "z"], ["abce", *used[1:], "x"])
    )
    assert one == two
    assert one["text_sha256"] != three["text_sha256"]
    assert one["tokens_sha256"] != three["tokens_sha256"]


def test_what_a_report_says(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    tokens = calibration_windows(str(tmp_path / "a.txt"), Letters(), samples=2, length=4, seed=7)
    content = b"".join(token.to_bytes(8, "little") for token in b"abcdefgh")
    assert json.loads(json.dumps(tokens.to_dict())) == {
        "source": str(tmp_path / "a.txt"),
        "samples": 2,
        "samples_wanted": 2,
        "sequence_length": 4,
        "tokens": 8,
        "seed": 7,
        "text_sha256": hashlib.sha256(b"abcdefgh").hexdigest(),
        "tokens_sha256": hashlib.sha256(b"2,4" + content).hexdigest(),
        "tokenizer_sha256": "f" * 64,
    }


def test_text_without_tokens(tmp_path):
    tokenizer = Letters()
    tokenizer.encode = lambda texts: [[] for _ in texts]
    with pytest.raises(InputRefused, match="has 0 tokens, and a window 1:"):
        all_windows(write(tmp_path, "abc"), tokenizer, length=1)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"length": 0}, {"seed": -1}])
def test_numbers_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        calibration_windows("a.txt", Letters(), **({"samples": 1, "length": 1} | wrong))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 1, "limit": 0}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(UsageError):
        all_windows("a.txt", Letters(), **wrong)
