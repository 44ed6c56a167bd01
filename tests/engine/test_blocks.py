"""The block manager: references, prefixes by their very tokens, eviction; a random life beside a plain model of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pascaline.engine.blocks import BLOCK, Blocks


def tokens(*words: int) -> list[int]:
    """A block of each number."""
    return [word for word in words for _ in range(BLOCK)]


def store(blocks: Blocks, ids: list[int], salt: str = "") -> list[int]:
    """Compute a prompt: share what is known, take and name the rest."""
    found = blocks.find(ids, blocks.root(salt))
    blocks.share(found)
    serial = blocks.serial(found[-1]) if found else blocks.root(salt)
    own = list(found)
    for i in range(len(found), len(ids) // BLOCK):
        own.append(blocks.take())
        serial = blocks.name(own[i], serial, ids[i * BLOCK : (i + 1) * BLOCK])
    return own


def test_a_common_beginning_is_found_and_no_more():
    blocks = Blocks(20)
    first = store(blocks, tokens(1, 2, 3))
    root = blocks.root("")
    assert blocks.find(tokens(1, 2, 4), root) == first[:2]
    assert blocks.find(tokens(2, 1, 3), root) == []  # the same blocks in another order
    assert blocks.find(tokens(1) + [1] * (BLOCK - 1), root) == first[:1]
    assert blocks.find([1] * (BLOCK - 1) + [9] + tokens(2), root) == []


def test_one_token_at_least_is_computed():
    blocks = Blocks(20)
    first = store(blocks, tokens(1, 2))
    assert blocks.find(tokens(1, 2), blocks.root("")) == first[:1]
    assert blocks.find([*tokens(1, 2), 5], blocks.root("")) == first


def test_tenants_do_not_see_each_others_prefixes():
    """CVE-2025-46570: the time to the first token must not tell what others asked."""
    blocks = Blocks(20)
    store(blocks, tokens(1, 2), "alice")
    assert blocks.find(tokens(1, 2, 3), blocks.root("bob")) == [] != blocks.find(tokens(1, 2, 3), blocks.root("alice"))


def test_tokens_are_compared_not_their_hashes():
    """CVE-2025-25183: in Python hash(-1) == hash(-2), and hash(2**61 - 1) == hash(0)."""
    blocks = Blocks(20)
    store(blocks, [-1] * BLOCK + [0])
    assert hash((-1,) * BLOCK) == hash((-2,) * BLOCK) and blocks.find([-2] * BLOCK + [0], blocks.root("")) == []


def test_let_go_blocks_are_kept_until_they_are_needed_the_oldest_and_the_tails_first():
    blocks = Blocks(5)
    old, new = store(blocks, tokens(1, 2)), store(blocks, tokens(3, 4))
    blocks.release(old)
    blocks.release(new)
    assert blocks.available == 4 and blocks.used == 0
    assert blocks.take() == old[1]  # the tail of the oldest
    root = blocks.root("")
    assert blocks.find([*tokens(1, 2), 0], root) == old[:1] and blocks.find([*tokens(3, 4), 0], root) == new
    blocks.share(old[:1])  # somebody asks for it again
    assert [blocks.take(), blocks.take()] == [new[1], new[0]]
    with pytest.raises(IndexError):
        blocks.take()


def test_flush_forgets_even_what_is_in_use():
    blocks = Blocks(10)
    held = store(blocks, tokens(1, 2))
    root = blocks.root("")
    blocks.flush()
    assert blocks.find([*tokens(1, 2), 0], blocks.root("")) == [] and blocks.root("") != root
    blocks.release(held)
    assert blocks.available == 9


def test_the_same_block_computed_twice_has_one_name():
    blocks = Blocks(10)
    root = blocks.root("")
    first, second = blocks.take(), blocks.take()
    assert blocks.name(first, root, [1] * BLOCK) == blocks.name(second, root, [1] * BLOCK)
    blocks.release([second])  # it has no name: it is not kept
    assert blocks.find([1] * BLOCK + [0], root) == [first] and blocks.take() == second


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**16)), max_size=80))
def test_a_random_life(total, deeds):
    """References never leak, a found prefix holds what was stored there, and what is available can be taken."""
    blocks, held, contents = Blocks(total), [], {}
    for deed, number in deeds:
        if deed == 0:
            ids = [*tokens(*(number >> shift & 1 for shift in range(number % 5))), 9]
            missing = len(ids) // BLOCK - len(blocks.find(ids, blocks.root("")))
            kept = sum(not blocks.references[b] for b in blocks.find(ids, blocks.root("")))
            if missing + kept <= blocks.available:
                found = blocks.find(ids, blocks.root(""))
                assert [contents[b] for b in found] == [tuple(ids[: (i + 1) * BLOCK]) for i in range(len(found))]
                own = store(blocks, ids)
                contents |= {b: tuple(ids[: (i + 1) * BLOCK]) for i, b in enumerate(own)}
                held.append(own)
        elif deed == 1 and held:
            blocks.release(held.pop(number % len(held)))
        elif deed == 2 and held:
            blocks.share(held[number % len(held)])
            held.append(list(held[number % len(held)]))
        elif deed == 3 and number % 7 == 0:
            blocks.flush()
        used = {b for own in held for b in own}
        assert blocks.used == len(used) and 0 not in used
        assert all(blocks.references[b] == sum(own.count(b) for own in held) for b in range(1, total))
    for own in held:
        blocks.release(own)
    assert len({blocks.take() for _ in range(blocks.available)}) == total - 1
