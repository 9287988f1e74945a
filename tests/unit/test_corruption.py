"""A short cut of tests/faults/corruption.py: damage of every kind, counted."""

import collections

import pytest
from faults import corruption


@pytest.mark.parametrize("file", ["mpisave pickle", "mpisave HDF5"])
def test_verify_finds_all_damage_and_load_is_right_or_refuses(file):
    counts = collections.defaultdict(corruption.Counts)
    # One byte in a few of the small file: test_verifying takes them all.
    for _, way, reader, verdict in corruption.read_all(
        file, many=200, bits=1, one_in=19
    ):
        counts[way, reader][verdict] += 1

    assert corruption.misses(counts) == []
    assert counts["random bit", "verify"] == {"found": 200}
    assert {way for way, _ in counts} == {
        *("random bit", "bit of every byte", "truncation, small", "truncation, large"),
        *("zeroed 512 B", "zeroed 4 KiB", "swapped 512 B", "swapped 4 KiB"),
        *("insertion", "deletion", "tail twice", "trailing bytes", "concatenation"),
    }


@pytest.mark.parametrize("file", ["pickle", "h5py"])
def test_plain_readers_are_wrong_and_do_not_say_so(file):
    verdicts = collections.Counter(
        verdict
        for _, way, _, verdict in corruption.read_all(file, many=50, bits=1, one_in=50)
        if way == "random bit"
    )

    # The comparison is worth something: damage gets to them.
    assert verdicts["wrong"] > 40


def test_miss_is_told():
    counts = {
        ("random bit", "verify"): collections.Counter(found=9, missed=1),
        ("random bit", "load"): collections.Counter(wrong=2, refused=3),
        ("random bit", "load, verify=False"): collections.Counter(wrong=2),
        ("(any)", "verify, load"): collections.Counter(hung=1),
    }

    assert corruption.misses(counts) == [
        ("random bit", "verify", "missed", 1),
        ("random bit", "load", "wrong", 2),
        ("(any)", "verify, load", "hung", 1),
    ]
