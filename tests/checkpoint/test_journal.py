"""What a run has noted is there for the next one, up to the first line that is not whole."""

from __future__ import annotations

import pytest

from tsenor_cli.checkpoint.journal import Journal

IDENTITY = {"--nm": "2:4"}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.begin(IDENTITY)
    journal.note("tensor", {"name": "a"})
    journal.note("perplexity", {"loss": 0.1})
    journal.note("tensor", {"name": "b\n☃"})
    return tmp_path / "journal"


def test_notes_are_found_again(path):
    journal = Journal(path)
    assert journal.identity == IDENTITY
    assert journal.notes("tensor") == [{"name": "a"}, {"name": "b\n☃"}]
    assert journal.notes("perplexity") == [{"loss": 0.1}]
    assert len(journal) == 3


def test_at_whatever_byte_it_was_cut(path):
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        count = sum(end <= size for end in ends)
        assert (journal.identity is not None, len(journal)) == (count > 0, max(count - 1, 0))
        if count:  # and it can be gone on with
            journal.note("tensor", {"name": "c"})
            again = Journal(path)
            assert (len(again), again.notes("tensor")[-1]) == (count, {"name": "c"})


@pytest.mark.parametrize("garbage", [b"\0\0\0\n", b"[1]\n", b'"x"\n', b"\xff\xfe\n", b"{}\n"])
def test_garbage_ends_it(path, garbage):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], garbage, *lines[2:]]))
    assert len(Journal(path)) == 1 + 2 * (garbage == b"{}\n")
    path.write_bytes(garbage)
    assert Journal(path).identity is None


def test_it_begins_anew(path):
    journal = Journal(path)
    journal.begin({"--nm": "4:8"})
    again = Journal(path)
    assert (again.identity, len(again)) == ({"--nm": "4:8"}, 0)


def test_no_journal(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert (journal.identity, len(journal)) == (None, 0)
