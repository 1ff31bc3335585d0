"Properties of chapter 03: LIV words, pairs of Boolean matrices, and their codons"
from itertools import permutations, product

import pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb.liv import boolean_product, liv_codon, pack_liv_cacheline, pack_liv_pair, unpack_liv_cacheline, unpack_liv_pair, verify_codon

word64 = st.integers(-2**63, 2**63-1)
rows = st.lists(st.lists(st.integers(0, 31), min_size=12, max_size=12), min_size=1, max_size=6)
INTS = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64
I, J = torch.eye(5).bool(), torch.ones(5, 5).bool()
def i64(x): return torch.tensor(x, dtype=torch.int64)
def number(C): return int(''.join(str(int(b)) for b in C.flatten()), 2)


@given(rows, st.sampled_from(INTS), st.data())
def test_words_are_the_bits_in_order(rows, dtype, data):
    tags = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    words = pack_liv_cacheline(torch.tensor(rows, dtype=dtype), torch.tensor(tags, dtype=dtype))
    assert words.dtype == torch.int64
    assert [w % 2**64 for w in words.tolist()] == [int(''.join(f'{s:05b}' for s in r) + f'{t:02b}00', 2) for r, t in zip(rows, tags)]
    symbols, back = unpack_liv_cacheline(words)
    assert symbols.dtype == back.dtype == torch.uint8 and symbols.tolist() == rows and back.tolist() == tags


@given(word64)
def test_unpack_takes_every_word_without_reserved_bits(w):
    if w & 3:
        with pytest.raises(ValueError, match='bits 1:0'): unpack_liv_cacheline(i64(w))
    else: assert pack_liv_cacheline(*unpack_liv_cacheline(i64(w))).item() == w


@pytest.mark.parametrize('shape', [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (2, 3, 4)])
def test_shapes(shape):
    s, t = torch.randint(0, 32, (*shape, 12)), torch.randint(0, 4, shape)
    words = pack_liv_cacheline(s, t)
    assert words.shape == shape
    assert all(torch.equal(a, b.to(torch.uint8)) for a, b in zip(unpack_liv_cacheline(words), (s, t)))
    assert torch.equal(pack_liv_cacheline(s), words & ~12)
    m1, m2, p = unpack_liv_pair(words)
    assert m1.shape == m2.shape == (*shape, 5, 5) and p.shape == shape
    assert torch.equal(pack_liv_pair(m1, m2, p), words)
    assert liv_codon(words).shape == shape and verify_codon(words, liv_codon(words)).all()
    assert boolean_product(m1, m2).shape == (*shape, 5, 5)


def test_golden_and_views():
    assert pack_liv_cacheline(torch.arange(12), torch.tensor(2)).item() == 0x00443214C74254B8
    assert pack_liv_cacheline(torch.full((12,), 31), torch.tensor(3)).item() == -4
    s = torch.randint(0, 32, (12, 9), dtype=torch.uint8).T
    assert torch.equal(unpack_liv_cacheline(pack_liv_cacheline(s))[0], s)
    assert torch.equal(pack_liv_cacheline(s[::2]), pack_liv_cacheline(s)[::2])
    assert torch.equal(unpack_liv_cacheline(pack_liv_cacheline(s)[::2])[0], s[::2])


@given(word64)
def test_pairs_and_codons(w):
    m1, m2, p = unpack_liv_pair(i64(w))
    assert pack_liv_pair(m1, m2, p).item() == w and p.item() == w & 16383
    assert [number(r) for r in (*m1, *m2)] == unpack_liv_cacheline(i64(w & ~3))[0][:10].tolist()
    C = torch.tensor([[any(bool(m1[i, k] & m2[k, j]) for k in range(5)) for j in range(5)] for i in range(5)])
    assert torch.equal(boolean_product(m1, m2), C)
    assert liv_codon(i64(w)).item() == number(C)
    assert verify_codon(i64(w), i64(number(C))) and not verify_codon(i64(w), i64(number(C) ^ 1))


@given(word64, st.sampled_from(list(permutations(range(5)))))
@settings(max_examples=30)
def test_a_renamed_middle_keeps_the_codon(w, p):
    m1, m2, _ = unpack_liv_pair(i64(w))
    assert liv_codon(pack_liv_pair(m1[:, list(p)], m2[list(p)])) == liv_codon(i64(w))


def test_payloads_of_every_type():
    for dtype in INTS: assert pack_liv_pair(I, J, torch.tensor(127, dtype=dtype)).item() & 16383 == 127
    assert pack_liv_pair(I, J).item() & 16383 == 0
    assert liv_codon(pack_liv_pair(I, J, torch.tensor(16383))).item() == 2**25-1


def test_fibres_of_2x2():
    M = [torch.tensor(b).view(2, 2) for b in product([False, True], repeat=4)]
    n = [0]*16
    for a in M:
        for b in M: n[number(boolean_product(a, b))] += 1
    assert sum(n) == 256 and min(n) == 2 and n[0] == max(n) == 49


@pytest.mark.parametrize('n, k, m', [(1, 1, 1), (2, 0, 3), (0, 2, 2), (3, 70, 2), (1, 5000, 1)])
def test_product_of_any_size(n, k, m):
    a, b = torch.rand(n, k) < .05, torch.rand(k, m) < .05
    want = [[bool((a[i] & b[:, j]).any()) for j in range(m)] for i in range(n)]
    assert boolean_product(a, b).tolist() == want


twelve, words = torch.zeros(3, 12, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
@pytest.mark.parametrize('call', [
    lambda: pack_liv_cacheline(twelve[:, :11]), lambda: pack_liv_cacheline(torch.tensor(3)), lambda: pack_liv_cacheline(twelve.float()),
    lambda: pack_liv_cacheline(twelve.float()*float('nan')), lambda: pack_liv_cacheline(twelve.bool()), lambda: pack_liv_cacheline(twelve + 32),
    lambda: pack_liv_cacheline(twelve.long() - 1), lambda: pack_liv_cacheline(twelve, words[:2]), lambda: pack_liv_cacheline(twelve, torch.tensor(0)),
    lambda: pack_liv_cacheline(twelve, words + 4), lambda: pack_liv_cacheline(twelve, words - 1), lambda: pack_liv_cacheline(twelve, words.float()),
    lambda: unpack_liv_cacheline(words.int()), lambda: unpack_liv_cacheline(words + 2), lambda: unpack_liv_pair(words.float()),
    lambda: pack_liv_pair(I.int(), J), lambda: pack_liv_pair(I[:4], J[:4]), lambda: pack_liv_pair(I, J[None]), lambda: pack_liv_pair(I[0], I[0]),
    lambda: pack_liv_pair(I, J, torch.tensor(1 << 14)), lambda: pack_liv_pair(I, J, words), lambda: pack_liv_pair(I, J, torch.tensor(.5)),
    lambda: boolean_product(I.float(), J), lambda: boolean_product(I, J[:4]), lambda: boolean_product(I[0], J), lambda: boolean_product(I[None], J),
    lambda: liv_codon(words.int()), lambda: verify_codon(words, words[:1]), lambda: verify_codon(words, words + 2**25), lambda: verify_codon(words, words.bool())])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(ValueError) as e: call()
    assert '\n' not in str(e.value)
