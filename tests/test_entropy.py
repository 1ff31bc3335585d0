"Entropy coding: bytes come back whatever they are, C and NumPy agree on every one, and nothing hostile leads out of bounds"
import hashlib, subprocess, sys
import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from pi2nb import entropy as e
from pi2nb.entropy import entropy, frequencies, group_symbols, rans_decode, rans_encode, ungroup_symbols

quick = settings(max_examples=60, deadline=None)
has_compiler = e._call(e._GROUP_C, 'ungroup', *[np.zeros(8, np.uint8)]*2, 0, 4, np.zeros(8, np.uint8)) is not None


@pytest.fixture
def compiler(request, monkeypatch):
    if not request.param: monkeypatch.setattr(e, 'compile_c', lambda source: None)
    return request.param


both_paths = pytest.mark.parametrize('compiler', [pytest.param(True, marks=pytest.mark.skipif(not has_compiler, reason='no C compiler')), False], indirect=True)
counted = lambda d: np.bincount(d, minlength=256)


def noise(n, spread, seed=0): return np.random.default_rng(seed).normal(128, spread, n).clip(0, 255).astype(np.uint8)


# ---- tables

@quick
@given(st.lists(st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 2**40)), min_size=256, max_size=256), st.sampled_from([256, 1000, 4096, 2**15]))
def test_a_table_sums_exactly(counts, total):
    f = frequencies(counts, total)
    assert f.dtype == np.uint16 and f.astype(int).sum() == total
    assert ((f > 0) == (np.array(counts) > 0)).all() or not any(counts) and (f == total//256).mean() > .5


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=256, max_size=256).filter(any))
def test_no_table_is_shorter_by_more_than_a_hair(counts):
    c = np.array(counts)
    cost = lambda f: -(c*np.log2(np.maximum(f, 1)/4096)).sum()
    best = (c > 0).astype(int)
    while best.sum() < 4096: best[np.argmax(c*np.log1p(1/np.maximum(best, 1)))] += 1   # one by one where it helps most: the optimum
    assert cost(frequencies(c)) <= cost(best)*(1 + 1e-5) + 1e-6


@pytest.mark.parametrize('bad', [[1]*255, [-1] + [1]*255, [.5]*256, [[1]*256], 'no', []])
def test_what_is_no_count(bad):
    with pytest.raises(ValueError, match='256 counts'): frequencies(bad)


@pytest.mark.parametrize('bad', [[16]*255, [17] + [16]*255, [-16, 32] + [16]*254, [16.]*256, [4096+65536] + [0]*255, [], None])
def test_what_is_no_table(bad):
    for call in (lambda: rans_encode(b'a', bad), lambda: rans_decode(bytes(4), 1, bad)):
        with pytest.raises(ValueError, match='4096'): call()


# ---- the stream

def test_the_stored_bytes_are_the_ones_of_the_first_version():
    assert rans_encode(b'pi/2 is exact', [16]*256).hex() == '03970601f62202923707568610364007'
    d = noise(300_000, 18)
    assert hashlib.sha256(rans_encode(d, frequencies(counted(d)))).hexdigest() == 'c8be57e09ac303e05dfb28a407121f773e260e7af7593b1e33bcfe41e8460ae8'


@both_paths
@pytest.mark.parametrize('n', [0, 1, 2, 7, 8, 9, 15, 16, 17, 3000, 2**14, 2**14+3, 2**15+1])
@pytest.mark.parametrize('spread', [0, .4, 40, 1e9])
def test_bytes_come_back(compiler, n, spread):
    d = noise(n, spread)
    t = frequencies(counted(d))
    stored = rans_encode(d, t, 2**14)
    assert len(stored) <= entropy(counted(d))*n/8*1.02 + 4 + 100*(n >= 2**14)
    for threads in (1, 3): assert np.array_equal(rans_decode(stored, n, t, threads, 2**14), d)


@quick
@given(st.binary(max_size=400), st.integers(1, 50), st.lists(st.integers(0, 10**6), min_size=256, max_size=256))
def test_any_bytes_any_table(data, block, extra):
    t = frequencies(np.array(extra) + counted(np.frombuffer(data, np.uint8)))
    assert rans_decode(rans_encode(data, t, block), len(data), t, 1, block).tobytes() == data


@pytest.mark.skipif(not has_compiler, reason='no C compiler')
@pytest.mark.parametrize('n, block', [(50, 7), (2**14-1, 2**17), (2**15+77, 2**14), (40_000, 2**17)])
def test_c_and_numpy_write_the_same_bytes(monkeypatch, n, block):
    d = noise(n, 25)
    t = frequencies(counted(d))
    fast = rans_encode(d, t, block)
    monkeypatch.setattr(e, 'compile_c', lambda source: None)
    assert rans_encode(d, t, block) == fast and np.array_equal(rans_decode(fast, n, t, 1, block), d)


@pytest.mark.skipif(not has_compiler, reason='no C compiler')
def test_a_processor_without_avx2_reads_the_same(monkeypatch):
    d = noise(40_000, 25)
    stored = rans_encode(d, t := frequencies(counted(d)))
    monkeypatch.setattr(e, '_HEAD_C', '#undef __AVX2__\n' + e._HEAD_C)
    assert np.array_equal(rans_decode(stored, d.size, t), d)
    with pytest.raises(ValueError, match='damaged'): rans_decode(stored[:-2], d.size, t)


def test_an_unknown_byte_and_other_types():
    t = frequencies(counted(np.uint8([1, 2])))
    with pytest.raises(ValueError, match='no frequency'): rans_encode(b'\1\2\3', t)
    for bad in (np.zeros(3), np.zeros((2, 2), np.uint8)):
        with pytest.raises(ValueError, match='give uint8'): rans_encode(bad, t)
    with pytest.raises(ValueError, match='1 byte or more'): rans_encode(b'\1', t, 0)
    for kind in (bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8), lambda b: np.repeat(np.frombuffer(b, np.uint8), 2)[::2]):
        assert rans_decode(kind(rans_encode(kind(b'\1\2\1'), t)), 3, t).tolist() == [1, 2, 1]


# ---- damage

def verdict(stored, n, t, block):
    try: return rans_decode(stored, n, t, 1, block).tobytes()
    except ValueError as x: assert '\n' not in str(x); return None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_c_and_numpy_judge_damage_alike(data):
    n, block = data.draw(st.sampled_from([(1, 2**17), (40, 2**17), (50, 20), (2**14+9, 2**14), (2**14+9, 2**17)]))
    d = noise(n, 30)
    t = frequencies(counted(d))
    bad = bytearray(rans_encode(d, t, block))
    for _ in range(data.draw(st.integers(1, 3))):
        i, j = sorted(data.draw(st.integers(0, len(bad))) for _ in range(2))
        bad[i:j] = data.draw(st.sampled_from([b'', bytes(2), b'\xff\xff', bytes(bad[i:j][::-1]), bytes(bad[j:j+2])]))
    n = data.draw(st.sampled_from([n, n-1, n+1, 0, 2*n]))
    fast = verdict(bytes(bad), n, t, block)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(e, 'compile_c', lambda source: None)
        assert verdict(bytes(bad), n, t, block) == fast
    assert fast is None or len(fast) == n


def test_every_flip_gives_another_answer_and_every_cut_is_found():
    d = noise(300, 20)
    t = frequencies(counted(d))
    good = rans_encode(d, t)
    flips = [verdict(good[:i] + bytes([good[i] ^ 1 << j]) + good[i+1:], 300, t, 2**17) for i in range(len(good)) for j in range(8)]
    assert d.tobytes() not in flips and sum(f is not None for f in flips) < len(flips)/100
    for i in range(len(good)): assert verdict(good[:i], 300, t, 2**17) is None


@pytest.mark.parametrize('n', [2**62, 10**12, 2**20])
def test_a_lie_about_the_length_takes_no_memory(n):
    with pytest.raises(ValueError, match='do not fit'): rans_decode(bytes(36), n, [4096] + [0]*255)


@pytest.mark.skipif(not has_compiler or not sys.platform.startswith('linux'), reason='guard pages, with a C compiler on Linux')
def test_nothing_outside_is_touched():
    "Input and output end at a page that may not be touched; whoever does is killed"
    code = r'''
import ctypes, mmap, numpy as np
from pi2nb import entropy as e
def guarded(n):
    size = -(-max(n, 1)//4096)*4096
    m = mmap.mmap(-1, size + 4096)
    a = np.frombuffer(m, np.uint8)
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(a.ctypes.data + size), ctypes.c_size_t(4096), 0) == 0
    return a[size-n:size]
rng, wrong = np.random.default_rng(0), 0
for i in range(600):
    n = int(rng.choice([1, 5, 300, 2**14, 2**14+5]))
    d = rng.normal(128, 30, n).clip(0, 255).astype(np.uint8)
    t = e.frequencies(np.bincount(d, minlength=256))
    f, start, inverse, slots = e._prepared(t.tobytes())
    stored = bytearray(e.rans_encode(d, t))
    if i % 3: stored = stored[:2*int(rng.integers(2*e._lanes(n), len(stored)//2+1))]
    for _ in range(int(rng.integers(0, 4))): stored[int(rng.integers(0, len(stored)))] = int(rng.integers(0, 256))
    s, out = guarded(len(stored)), guarded(n)
    s[:] = np.frombuffer(stored, np.uint8)
    wrong += e._call(e._DECODE_C, 'decode', s, np.int64([0, len(stored)]), out, n, 2**17, slots, e._TURN, 1)
    g, data = guarded(2*n + 32), guarded(n)
    data[:] = d
    size = e._call(e._ENCODE_C, 'encode', data, n, g, g.size, f, start, inverse, e._lanes(n))
    assert g[g.size-size:].tobytes() == e.rans_encode(d, t)
assert 200 < wrong < 600, wrong
'''
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, (r.returncode, r.stderr)


# ---- groups

@both_paths
@pytest.mark.parametrize('levels', [*range(2, 20), 63, 255, 256])
def test_symbols_come_back(compiler, levels):
    k = e._digits(levels)[0]
    assert levels**k <= 256 < levels**(k+1)
    for n in (0, 1, k-1, k, k+1, 1000, 1003):
        z = np.random.default_rng(n).integers(0, levels, n, dtype=np.uint8)
        b = group_symbols(z, levels)
        assert b.tolist() == [sum(int(s)*levels**(k-1-j) for j,s in enumerate(z[i:i+k])) for i in range(0, n, k)]
        back = ungroup_symbols(b, n, levels)
        assert back.dtype == np.uint8 and np.array_equal(back, z)


@both_paths
def test_symbols_that_are_none(compiler):
    for levels in (2, 3, 4, 5, 6, 15, 255):
        z = np.zeros(50, np.uint8)
        for i in (0, 13, 49):
            z[i] = levels
            with pytest.raises(ValueError, match=f'0 to {levels-1}, not {levels}'): group_symbols(z, levels)
            z[i] = 0
    with pytest.raises(ValueError, match='2 to 256 levels'): group_symbols(z, 1)
    with pytest.raises(ValueError, match='uint8'): group_symbols(z.astype(int), 4)


@quick
@given(st.binary(max_size=20), st.integers(0, 100), st.integers(2, 256))
def test_groups_are_unique(b, n, levels): # what is accepted is what group_symbols makes
    b = np.frombuffer(b, np.uint8)
    try: z = ungroup_symbols(b, n, levels)
    except ValueError as x: assert '\n' not in str(x); return
    assert z.size == n and np.array_equal(group_symbols(z, levels), b)
