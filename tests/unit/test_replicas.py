"""Arrays that several ranks hold: which these are, and whether they are equal."""

import numpy as np
import pytest
from boxes import described, held_by_ranks, noise
from hypothesis import given, settings
from hypothesis import strategies as st

from mpisave.checksum import crc32c
from mpisave.errors import StateDictError
from mpisave.replicas import check_equal, replicated
from mpisave.shards import Shard, Shards

PROPERTY = settings(max_examples=150, deadline=None)


def content(array):
    """Return what decides whether arrays are replicas of each other: all of it."""
    out = np.empty(array.nbytes, np.uint8)
    array.stage(0, out)
    return array.name, out.tobytes()


HOSTS = [f"node{rank}" for rank in range(16)]


def digests_of(held, found):
    """Return the CRC-32C of each array that a rank is asked about."""
    return [
        np.array([crc32c(content(arrays[n])[1]) for n in ordinals], np.uint32)
        for arrays, (ordinals, _) in zip(held, found, strict=True)
    ]


def check(states):
    merged, held = described(states)
    found = replicated(merged, len(states))
    check_equal(merged, [sets for _, sets in found], digests_of(held, found), HOSTS)


def refusal(states):
    with pytest.raises(StateDictError) as caught:
        check(states)
    return str(caught.value)


class TestReplicated:
    @PROPERTY
    @given(held_by_ranks())
    def test_arrays_of_one_set_are_those_that_several_ranks_hold(self, case):
        states, _ = case
        merged, held = described(states)

        found = replicated(merged, len(states))

        # What is in a set is alike, and what is alike is in one set.
        sets, alike = {}, {}
        for rank, (ordinals, numbers) in enumerate(found):
            for ordinal, number in zip(
                ordinals.tolist(), numbers.tolist(), strict=True
            ):
                sets.setdefault(number, []).append((rank, ordinal))
        for rank, arrays in enumerate(held):
            starts = [
                getattr(box, "start", None)
                for value in states[rank].values()
                for box in getattr(value, "boxes", (value,))
            ]
            for ordinal, (array, start) in enumerate(zip(arrays, starts, strict=True)):
                key = (array.name, start, array.shape)
                alike.setdefault(key, []).append((rank, ordinal))
        shared = [sorted(group) for group in alike.values() if len(group) > 1]
        assert all(len(members) > 1 for members in sets.values())
        assert sorted(map(sorted, sets.values())) == sorted(shared)

    def test_array_of_one_rank_alone_is_in_no_set(self):
        merged, _ = described([{"x": np.zeros(1)}, {"y": np.zeros(1)}, {"n": 1}])

        found = replicated(merged, 3)

        assert [ordinals.tolist() for ordinals, _ in found] == [[], [], []]
        check_equal(merged, [s for _, s in found], [np.zeros(0, np.uint32)] * 3, HOSTS)

    def test_rank_that_holds_all_of_it_is_a_replica_of_one_box_that_is_all(self):
        array = np.arange(6)
        merged, _ = described([{"x": array}, {"x": Shard(array, (6,), (0,))}])

        found = replicated(merged, 2)

        assert [ordinals.tolist() for ordinals, _ in found] == [[0], [0]]
        assert found[0][1].tolist() == found[1][1].tolist()


class TestCheck:
    @PROPERTY
    @given(held_by_ranks())
    def test_equal_replicas_pass(self, case):
        check(case[0])

    @PROPERTY
    @given(held_by_ranks(), st.data())
    def test_one_bit_that_differs_is_refused_by_key_and_ranks(self, case, data):
        states, _ = case
        merged, held = described(states)
        found = replicated(merged, len(states))
        asked = [
            (rank, at)
            for rank, (ordinals, _) in enumerate(found)
            for at, ordinal in enumerate(ordinals.tolist())
            if held[rank][ordinal].nbytes
        ]
        if not asked:
            return
        rank, at = data.draw(st.sampled_from(asked))
        digests = digests_of(held, found)
        digests[rank][at] ^= 1 << data.draw(st.integers(0, 31))

        with pytest.raises(StateDictError, match="1 replica") as caught:
            check_equal(merged, [sets for _, sets in found], digests, HOSTS)

        name = held[rank][int(found[rank][0][at])].name
        assert f"\n  {name}" in str(caught.value)
        assert f"{digests[rank][at]:#010x} on rank {rank}" in str(caught.value)

    def test_refusal_says_which_ranks_have_which_bytes_and_what_to_do(self):
        one, other = np.zeros(4, np.uint8), np.ones(4, np.uint8)

        message = refusal([{"x": one}, {"x": other}, {}, {"x": one}, {"x": one}])

        assert message.startswith("1 replica(s) differ between ranks: \n  'x': ")
        zeros, ones = crc32c(one), crc32c(other)
        assert (
            f"CRC-32C {zeros:#010x} on rank 0 (node0), rank 3 (node3), rank 4 (node4); "
            in message
        )
        assert f"CRC-32C {ones:#010x} on rank 1 (node1)\n" in message
        assert "Nothing was saved." in message
        assert "replicas='first'" in message

    def test_many_ranks_are_named_without_their_hosts(self):
        message = refusal([{"x": np.full(2, rank < 6)} for rank in range(8)])

        assert " on ranks 0-5; " in message
        assert " on rank 6 (node6), rank 7 (node7)\n" in message

    def test_refusal_names_the_box_that_differs(self):
        array = noise((4, 6), "<f4")
        left = Shard(array[:, :2], (4, 6), (0, 0))
        right = Shard(array[:, 2:], (4, 6), (0, 2))
        wrong = Shard(array[:, 2:] * 2, (4, 6), (0, 2))
        alone = {"w": np.zeros(3)}

        message = refusal(
            [{**alone, "x": left}, {"x": right}, {"x": left}, {"x": wrong}]
        )

        assert "'x'[0:4, 2:6]: CRC-32C" in message
        assert "on rank 1 (node1); " in message
        assert "on rank 3 (node3)" in message
        assert "'w'" not in message

    def test_refusal_names_boxes_of_the_second_array_and_nested_keys(self):
        def state(value):
            shards = [Shard(np.full(2, v), (4,), (n,)) for n, v in ((0, 0), (2, value))]
            return {
                "a": Shards(*shards[:1], Shard(np.zeros(2, int), (4,), (2,))),
                "b": {"c": [Shards(*shards)]},
            }

        message = refusal([state(1), state(2)])

        assert "1 replica(s)" in message
        assert "['b']['c'][0][2:4]: CRC-32C" in message

    def test_refusal_names_eight_arrays_at_most(self):
        states = [{f"x{n}": np.full(2, rank) for n in range(10)} for rank in range(2)]

        message = refusal(states)

        assert message.startswith("10 replica(s)")
        assert message.count("CRC-32C 0x") == 16
        assert "and 2 more" in message

    def test_empty_arrays_are_equal(self):
        check([{"x": np.zeros((0, 2))}, {"x": np.zeros((0, 2))}])

    def test_nan_is_compared_by_its_bytes(self):
        nan = np.array([np.nan])

        check([{"x": nan}, {"x": nan.copy()}])
        assert "'x'" in refusal([{"x": nan}, {"x": -nan}])
        assert "'x'" in refusal([{"x": np.zeros(1)}, {"x": -np.zeros(1)}])

    def test_no_ranks_have_no_replicas(self):
        merged, _ = described([{}])

        check_equal(merged, [], [], [])
