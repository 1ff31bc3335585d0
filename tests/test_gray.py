"Properties of chapter 02: the Gray map, Lee distance and packing"
import pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb.gray import gray, lee, pack_bits, pack_symbols, transition_key, ungray, unpack_bits, unpack_symbols

symbols = st.lists(st.integers(0, 3), max_size=70)
def u8(x): return torch.tensor(x, dtype=torch.uint8)


@given(st.lists(symbols, min_size=1, max_size=4))
def test_symbols_round_trip(rows):
    n = min(map(len, rows))
    z = u8([r[:n] for r in rows])
    p = pack_symbols(z)
    assert p.shape == (len(rows), -(-n//4)) and p.dtype == torch.uint8
    assert torch.equal(unpack_symbols(p, n), z)
    assert torch.equal(p, pack_bits(gray(z), 2))


@given(symbols)
def test_bytes_are_gray_bits_first_symbol_on_top(row):
    bits = ''.join(f'{r ^ r >> 1:02b}' for r in row)
    bits += '0' * (-len(bits) % 8)
    assert pack_symbols(u8(row)).tolist() == [int(bits[i:i+8], 2) for i in range(0, len(bits), 8)]


@given(st.integers(1, 8), st.data())
def test_bits_round_trip(bits, data):
    row = data.draw(st.lists(st.integers(0, (1 << bits)-1), max_size=70))
    p = pack_bits(u8(row), bits)
    assert len(p) == -(-len(row)*bits//8)
    assert torch.equal(unpack_bits(p, len(row), bits), u8(row))
    s = ''.join(f'{x:0{bits}b}' for x in row)
    s += '0' * (-len(s) % 8)
    assert p.tolist() == [int(s[i:i+8], 2) for i in range(0, len(s), 8)]


@given(st.lists(st.tuples(*[st.integers(0, 3)]*3), min_size=1, max_size=40))
def test_lee_is_a_distance_and_counts_bits(t):
    u, v, w = (u8(list(c)) for c in zip(*t))
    assert lee(u, v) == lee(v, u) and lee(u, u) == 0
    assert lee(u, w) <= lee(u, v) + lee(v, w)
    assert lee(u, v) == sum(b.bit_count() for b in (pack_symbols(u) ^ pack_symbols(v)).tolist())


@given(symbols)
def test_key_ignores_repeats(row):
    twice = [s for s in row for _ in (0, 1)]
    k = transition_key(u8(row))
    assert k == transition_key(u8(twice)) and 0 <= k < 1 << 64


@pytest.mark.parametrize('row, hexa', [([0, 1, 2, 3], '1e'), ([3, 2, 1, 0], 'b4'), ([3, 0, 3, 0], '88'), ([3]*8, 'aaaa'),
                                       ([0]*8, '0000'), ([1]*8, '5555'), ([2]*8, 'ffff'), ([0, 1, 2, 2, 1], '1f40')])
def test_golden_bytes(row, hexa):
    assert bytes(pack_symbols(u8(row)).tolist()).hex() == hexa


def test_golden_lee_and_keys():
    assert lee(u8([0, 1, 2, 3]), u8([0, 2, 2, 1])) == 3
    assert transition_key(u8([0, 0, 1, 1, 2, 3, 3, 0])) == 0x1B00000000000000
    assert transition_key(u8([3]*8)) == 3 << 62
    assert transition_key(u8([0, 1]*40)) == int('01'*16, 4)
    assert torch.equal(ungray(gray(u8([0, 1, 2, 3]))), u8([0, 1, 2, 3]))


def test_odd_layouts():
    z = torch.randint(0, 4, (5, 12), dtype=torch.uint8)
    for view in (z.T, z[:, 1:], z[1:, 3:8], z[:, ::2], z[:0], z[:, :0]):
        n = view.shape[-1]
        assert torch.equal(unpack_symbols(pack_symbols(view), n), view)
        assert torch.equal(unpack_bits(pack_bits(view, 6), n, 6), view)
        p = pack_symbols(view)
        assert torch.equal(unpack_symbols(p.clone(memory_format=torch.contiguous_format), n), unpack_symbols(p, n))
    p = torch.zeros(3, 5, dtype=torch.uint8).T
    assert unpack_symbols(p, 12).shape == (5, 12)


@pytest.mark.parametrize('call', [lambda: pack_symbols(u8([4])), lambda: pack_symbols(torch.tensor([1])), lambda: pack_bits(u8([64]), 6),
                                  lambda: pack_bits(u8([1]), 9), lambda: pack_bits(u8([1]), 0), lambda: unpack_bits(u8([1]), 2, 6),
                                  lambda: unpack_symbols(u8([0, 0]), 9), lambda: unpack_symbols(torch.zeros(2), 8)])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(ValueError) as e: call()
    assert '\n' not in str(e.value)


def test_strided_symbols():
    z = torch.arange(24, dtype=torch.uint8).view(2, 12) % 4
    for v in (z[:, ::2], z[:, 1:9], z.T, z[:1, :1].expand(3, 8), z[0, ::3]): assert torch.equal(pack_symbols(v), pack_symbols(v.clone(memory_format=torch.contiguous_format)))
