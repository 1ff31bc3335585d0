"Chapter 07: streams stored in the smallest way, and nothing accepted that is not one"
import random
import numpy as np, pytest, zstandard
from hypothesis import given, settings, strategies as st
from pi2nb.streams import MAX_TABLES, RAW, TABLE, ZSTD, byte_planes, fetch_stream, join_planes, squeeze, store_streams, table_arrays, unsqueeze


@given(st.sampled_from(['uint8', 'float16', 'float32']), st.integers(1, 50), st.integers(0, 99))
def test_planes(dtype, n, seed):
    a = np.frombuffer(random.Random(seed).randbytes(n*np.dtype(dtype).itemsize), dtype)
    p = byte_planes(a)
    assert len(p) == a.itemsize and join_planes(p, dtype).tobytes() == a.tobytes()
    assert p[0][0] == a.tobytes()[0]                                     # the least significant byte first


def some(seed):
    r = np.random.default_rng(seed)
    make = [lambda n: r.integers(0, 256, n), lambda n: np.zeros(n), lambda n: r.choice(256, n, p=r.dirichlet(np.full(256, .05))), lambda n: np.arange(n) % 7]
    return [('abc'[r.integers(3)], make[r.integers(4)](r.integers(1, 3000)).astype('uint8')) for _ in range(r.integers(1, 9))]

@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_streams_come_back(seed):
    streams = some(seed)
    stored, tables = store_streams(streams)
    ts = table_arrays(tables)
    for (_, d), (how, s) in zip(streams, stored):
        assert len(s) <= len(d) and np.array_equal(fetch_stream(how, s, len(d), ts), d)
        for n in (len(d)-1, len(d)+1, len(d)+200_000):
            if how >= TABLE and 4096 in tables[how-TABLE]: continue          # a byte that comes for certain takes no room: the count decides
            with pytest.raises(ValueError): fetch_stream(how, s, n, ts)
        with pytest.raises(ValueError): fetch_stream(how, s[:-1], len(d), ts)
    assert store_streams(streams) == (stored, tables)
    assert {how - TABLE for how, _ in stored if how >= TABLE} == set(range(len(tables))) # no table without use


def test_the_smallest_way():
    r = np.random.default_rng(0)
    uneven = [r.choice(256, 20_000, p=p).astype('uint8') for p in r.dirichlet(np.full(256, .05), 2)]
    stored, tables = store_streams([('k', uneven[0]), ('k', uneven[0][:9000]), ('k', uneven[1]), ('noise', r.integers(0, 256, 999, 'uint8')), ('text', np.frombuffer(b'again and '*99, 'uint8'))])
    ways = [how for how, _ in stored]
    assert ways[0] == ways[1] and len({*ways[:3]}) == 2 and min(ways[:3]) >= TABLE and ways[3:] == [RAW, ZSTD] and len(tables) == 2


def test_more_kinds_than_tables():
    r = np.random.default_rng(0)
    streams = [(i, r.choice(256, 3000, p=r.dirichlet(np.full(256, .02))).astype('uint8')) for i in range(MAX_TABLES + 9)]
    stored, tables = store_streams(streams)
    assert len(tables) == MAX_TABLES and max(how for how, _ in stored) == 255
    for (_, d), (how, s) in zip(streams, stored): assert np.array_equal(fetch_stream(how, s, len(d), table_arrays(tables)), d)


def test_frames_that_lie():
    z = squeeze(bytes(5000))
    assert unsqueeze(z, 5000) == bytes(5000)
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    for bad, n in ((z, 4999), (z, 2**40), (no_size, 5000), (z + b'x', 5000), (z + z, 10_000), (z[:-1], 5000), (b'', 5), (b'\x28\xb5\x2f\xfd' + bytes(9), 5000)):
        with pytest.raises(ValueError): unsqueeze(bad, n)
    with pytest.raises(ValueError, match='not shorter'): fetch_stream(ZSTD, bytes(4), 4, [])
