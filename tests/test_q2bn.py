"Chapter 50: every file version, golden bytes, every flip and cut, and a structured fuzz of the readers"
import errno, hashlib, multiprocessing, os, random, struct, time, tracemalloc, zlib
from contextlib import contextmanager
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
import pi2nb.q2bn as q
from pi2nb.codebook import CODES, Codebook, Coded, codebook, hold, matrix_shape
from pi2nb.entropy import frequencies, group_symbols, rans_encode
from pi2nb.q2bn import (Q2BNError, decode_state, identity, inspect_q2bn, pack_state_dict, q2bn_bytes, q2bn_parse, read_q2bn, read_v2, unpack_state_dict,
                        v2_bytes, v2_codebook, v2_parse, write_q2bn, write_v2)

W = torch.tensor([[-2., -.1, .1, 2., 0.], [1., 2., 3., 4., 5.]])
GOLDEN = bytes.fromhex('5132424e02'
    '0000000c656d6265642e776569676874020000000200000005000000000000000008004000441f40ff80'
    '0000000e6c6d5f686561642e7765696768740200000002000000050200000000000000100000000c656d6265642e776569676874'
    '0000000b6e6f726d2e776569676874010000000201' '0000000000000004003c0038')
TIED = {'embed.weight': W, 'lm_head.weight': W, 'norm.weight': torch.tensor([1., .5])}
Q2, GROUPED = codebook('q2'), Codebook('q2-g4', (-1.5, -.5, .5, 1.5), (-1., 0., 1.), 'rms', .996, group=4)
INT6, TERNARY = codebook('int6'), Codebook('ternary', (-1., 0., 1.), (-.5, .5), 'absmax', 1.)


def coded(code, *shape, seed=0):
    return hold(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), code)

def small_state():
    return {'embed': coded(INT6, 5, 7), 'a.weight': coded(Q2, 3, 6), 'head': 'embed', 'b': coded(GROUPED, 2, 8),
            'c': coded(TERNARY, 2, 2, 3), 'norm': torch.tensor([1., -.5, 0.]), 'half': torch.tensor(.25).half()}

def same(a, b):
    assert list(a) == list(b)
    for k in a:
        if isinstance(a[k], str): assert a[k] == b[k]
        elif isinstance(a[k], Coded):
            assert a[k].code == b[k].code and tuple(a[k].shape) == tuple(b[k].shape)
            assert torch.equal(a[k].z, b[k].z) and torch.equal(a[k].s, b[k].s)
        else: assert a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k])

def refused(data, parse=q2bn_parse):
    try: parse(data)
    except Q2BNError as e:
        assert '\n' not in str(e) and '; ' in str(e)
        return True
    return False


# ---- version 2

def test_v2_golden():
    assert len(GOLDEN) == 132 and v2_bytes(TIED) == GOLDEN
    t = decode_state(v2_parse(GOLDEN))
    assert torch.allclose(t['embed.weight'], torch.tensor([[-2, -2/3, 2/3, 2/3, -2/3], [4/3, 4/3, 4/3, 4/3, 4.]]))
    assert t['lm_head.weight'] is t['embed.weight'] and t['norm.weight'].tolist() == [1., .5]
    x = decode_state(v2_parse(GOLDEN, 'text'))['embed.weight']
    assert x.tolist() == [[-3., -1., 1., 1., -1.], [2., 2., 2., 2., 6.]]
    assert v2_bytes(v2_parse(GOLDEN)) == GOLDEN and v2_bytes({**TIED, 'lm_head.weight': 'embed.weight'}) == GOLDEN


def test_v2_files(tmp_path):
    f = tmp_path/'a.q2bin'
    assert pack_state_dict(TIED, f) == write_v2(f, TIED) == 132 and f.read_bytes() == GOLDEN
    assert torch.equal(unpack_state_dict(f)['embed.weight'], decode_state(read_v2(f))['embed.weight'])
    r = inspect_q2bn(f)
    assert (r.version, r.weights, len(r.records)) == (2, 12, 3) and 'no checksums' in str(r)


@given(st.integers(1, 6), st.integers(1, 19), st.booleans(), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_v2_symbols_follow_the_rule(rows, cols, cube, seed):
    w = torch.randn(rows, *((cols, 3) if cube else (cols,)), generator=torch.Generator().manual_seed(seed))
    c = v2_parse(v2_bytes({'w': w}))['w']
    m = w.reshape(rows, -1)
    tau = torch.from_numpy(np.quantile(m.abs().numpy(), .75, axis=1)).float().clamp(min=1e-6)
    assert torch.allclose(c.s[:, 0].float(), tau, rtol=1e-3) and tuple(c.shape) == tuple(w.shape)
    away = (m.abs() - tau[:, None]).abs() > 1e-5 # not decided by the last bit of the quantile
    slow = (m > -tau[:, None]).int() + (m > 0).int() + (m > tau[:, None]).int()
    assert torch.equal(c.z[away].int(), slow[away])


@given(st.integers(0, 999), st.sampled_from(['text', 'unpack']))
@settings(max_examples=30, deadline=None)
def test_v2_takes_our_code(seed, lv):
    c = coded(Q2, 4, 9, seed=seed)
    got = decode_state(v2_parse(v2_bytes({'w': c}, lv), lv))['w']
    assert torch.equal(got, c.decode()) if lv == 'text' else torch.allclose(got, c.decode(), rtol=2**-11)


@pytest.mark.parametrize('make', [
    lambda: v2_bytes({'w': coded(INT6, 2, 4)}), lambda: v2_bytes({'b': coded(GROUPED, 2, 8)}), lambda: v2_bytes({'b': 'w', 'w': W}),
    lambda: v2_bytes({'w': 'w'}), lambda: v2_bytes({'w': W*float('nan')}), lambda: v2_bytes({'w': torch.full((2, 2), 1e9)}),
    lambda: v2_bytes({'w': torch.tensor([1e9])}), lambda: v2_bytes({'w': torch.zeros(0, 3)}), lambda: v2_bytes({'w': 3.}),
    lambda: v2_bytes({'': W}), lambda: v2_bytes({'\ud800': W}), lambda: v2_bytes({7: W}), lambda: v2_codebook('best'), lambda: v2_codebook(['text'])])
def test_v2_refuses_to_write(make):
    with pytest.raises(ValueError) as e: make()
    assert '\n' not in str(e.value)


def v2_rec(name, shape, flag, data, n=None):
    return (struct.pack('>I', len(name)) + name + struct.pack(f'>B{len(shape)}IB', len(shape), *shape, flag)
            + struct.pack('>Q', len(data) if n is None else n) + data)

@pytest.mark.parametrize('rec, words', [
    (v2_rec(b'w', (1, 4), 0, b'\0\x3c\xff', 2**60), 'promised'), (v2_rec(b'w', (2**32-1,)*8, 0, b'\0\x3c\xff'), 'takes'),
    (v2_rec(b'w', (1, 4), 0, b'\0\x7c\xff'), 'NaN or infinity'), (v2_rec(b'w', (1, 4), 0, b'\0\0\xff'), 'a scale of w is zero'), (v2_rec(b'w', (1, 3), 0, b'\0\x3c\xff'), 'fill bits'),
    (v2_rec(b'w', (4,), 0, b'\0\x3c\xff'), 'unknown kind'), (v2_rec(b'w', (4,), 3, b''), 'unknown kind'), (v2_rec(b'w', (0, 4), 0, b''), 'zeros'),
    (v2_rec(b'w', (1,)*9, 1, b'\0\x3c'), 'at most 8'), (v2_rec(b'w', (2,), 1, b'\0\x3c\0\x7e'), 'NaN or infinity'), (v2_rec(b'', (1,), 1, b'\0\x3c'), 'name'),
    (v2_rec(b'\xff', (1,), 1, b'\0\x3c'), 'name'), (v2_rec(b'w', (1,), 1, b'\0\x3c')*2, 'twice'), (v2_rec(b'a', (1,), 2, b'\0\0\0\1b'), 'before'),
    (v2_rec(b'a', (1,), 2, b'\0\0\0\1a'), 'before'), (v2_rec(b'a', (1,), 1, b'\0\x3c') + v2_rec(b'b', (2,), 2, b'\0\0\0\1a'), 'does not fit'),
    (v2_rec(b'a', (1,), 1, b'\0\x3c') + v2_rec(b'b', (1,), 2, b'\0\0\0\1a!'), 'does not fit'), (b'', 'no records'), (b'\xff\xff\xff\xff', 'promised')])
def test_v2_refuses_to_read(rec, words):
    with pytest.raises(Q2BNError, match=words): v2_parse(b'Q2BN\2' + rec)


def test_v2_becomes_v4():
    state = v2_parse(GOLDEN)
    got, meta = q2bn_parse(q2bn_bytes(state))
    same(state, got)
    assert Codebook.from_dict(meta['codes']['q2-v2']) == v2_codebook()


def test_v2_alias_of_alias_leads_to_the_tensor():
    data = b'Q2BN\2' + v2_rec(b'a', (1,), 1, b'\0\x3c') + v2_rec(b'b', (1,), 2, b'\0\0\0\1a') + v2_rec(b'c', (1,), 2, b'\0\0\0\1b')
    assert v2_parse(data)['c'] == 'a'


@pytest.mark.parametrize('data, words', [
    (b'', 'not a Q2BN file'), (b'Q2B', 'not a Q2BN file'), (b'PK\3\4' + bytes(60), 'not a Q2BN file'), (b'Q2BN', 'version bytes'),
    (b'Q2BN\7' + bytes(60), 'version bytes'), (b'Q2BN\3\0\0\1' + bytes(60), 'version bytes'),
    (b'Q2BN' + struct.pack('<IIII', 1, 5, 12, 0), 'little-endian'), (b'Q2BN\1' + v2_rec(b'embed', (1, 4), 0, b'\xff'), 'version 1')])
def test_other_formats_are_named(data, words, tmp_path):
    for parse in (q2bn_parse, v2_parse):
        with pytest.raises(Q2BNError, match=words): parse(data)
    (tmp_path/'f').write_bytes(data)
    for read in (read_q2bn, read_v2, inspect_q2bn):
        with pytest.raises(Q2BNError, match=words): read(tmp_path/'f')


# ---- version 3, which is read and no longer written

V3 = zlib.decompress(bytes.fromhex(
    '78da0b3472f2636660604860610083104608cd0ac42c764e53ab951295ac0c759492f353528b95acaa950a8d40647269099017ad6ba867a06300c4403a56472925333d13246e0664e6272b5929a5e5971629a496a5e629e4'
    '00c99c621d209d585ca2905a54945fa4909fa790a890949a93a3905c5a5496aaa4a39496985c925fa46465a06769093424bd28bfb400c8d351826887d868aaa36b00244018c8015a9b97989b0ab40ce8321da5a2d21c10bb'
    '28b758a95647a924b5282fb1a812d9c550ad48ae3534843917c905208fe1b01fd9c750ab61f6c0ed4f4c2ace4dac50aaad05855c5e5a663ac8092999b94a56e6b5b50c48e012dff953c020670205fb01a8182334fccb1988'
    '00160c140159cab4335c8edec2c7c8c004663b40c5ca48d0df57734904e47f0624ff3341fd9f4a8c01b60b9c2871bf9cc3bf064af44b4d58b1969181119c6b1a90dc9f47b4090df64841473278c494ac0db41f9c6660f667'
    '9062800965f13fb17edb8be2f32b74d74dfff657a5be4de7c0fde8ff172fd97cfe5524b6f0a4c9c35500f7c88ed1'))

def test_v3_is_read():
    assert len(V3) == 1120 and hashlib.sha256(V3).hexdigest() == '4783b067146bb7db2f2d5bb73920a2e4f1ca376128335412de879e715af84b2c'
    state, meta = q2bn_parse(V3)
    assert (meta['a'], meta['config'], list(state), state['v']) == (1, {'dim': 7}, ['w', 'v', 'e', 'n', 'h'], 'w')
    assert state['w'].z.tolist() == [[0, 1, 2, 1, 0]] and state['w'].s.tolist() == [[.5]] and state['w'].code == TERNARY
    assert state['e'].z.tolist() == [[0, 1, 2, 3, 1], [2, 2, 2, 3, 3]] and state['e'].s.tolist() == [[1.25], [3.3125]]
    assert state['n'].tolist() == [1, 2] and state['h'].item() == .25 and state['h'].dtype == torch.float16
    new = q2bn_bytes(state, meta)
    same(q2bn_parse(new)[0], state)
    assert new[4] == 4 and len(new) < len(V3)*.7 and identity((state, meta)) == identity(q2bn_parse(new))

def test_every_flip_and_cut_of_v3_is_refused():
    for i in range(len(V3)):
        for x in (1, 0x80): assert refused(V3[:i] + bytes([V3[i] ^ x]) + V3[i+1:]), i
        assert refused(V3[:i])

def test_v3_report(tmp_path):
    (tmp_path/'f').write_bytes(V3)
    r = inspect_q2bn(tmp_path/'f')
    assert r.version == 3 and sum(r.streams().values()) == 1120 and r.streams()['codes'] == 6


# ---- version 4

def test_v4_round_trip():
    state, meta = small_state(), {'config': {'dim': 7, 'x': [1, 2.5, None, 'ü']}, 'note': ''}
    data = q2bn_bytes(state, meta)
    got, m = q2bn_parse(data)
    same(state, got)
    plain = decode_state(got)
    assert plain['head'] is plain['embed'] and torch.equal(plain['a.weight'], state['a.weight'].decode())
    assert {k: m[k] for k in meta} == meta and set(m['codes']) == {'q2', 'q2-g4', 'int6', 'ternary'}
    assert q2bn_bytes(got, m) == data == q2bn_bytes(small_state(), dict(reversed(meta.items())))


def skewed():
    "Enough symbols of an uneven kind that a table pays, and one matrix that is unlike them"
    p = [[.9, .05, .03, .02], [.01, .01, .08, .9]]
    z = [np.random.default_rng(i).choice(4, size=(32, n), p=p[i > 1]).astype('uint8') for i,n in enumerate((100, 150, 500))]
    return {f's{i}': Coded(Q2, torch.from_numpy(x), torch.full((32, 1), .5).half(), x.shape) for i,x in enumerate(z)}

def ways(data):
    "How the streams of a file are stored"
    meta, out = q._front(c := q._Cursor(data))[0], []
    c.data = c.data[:-32]
    while c.left():
        name, kind, shape, ref, d = q._take(c, 'a record')
        n = {'coded': 3, 'raw': 4 >> ref, 'alias': 0}[kind]
        out += [d.numbers(q._STREAM, name)[0] for _ in range(n)]
    return out

def test_streams_are_stored_in_every_way():
    data = q2bn_bytes(skewed() | {'zeros': torch.zeros(500)} | small_state())
    assert {0, 1, 2, 3} <= set(ways(data)) and sum(len(t) for t in q._front(q._Cursor(data))[0]['tables']) >= 512
    same(q2bn_parse(data)[0], skewed() | {'zeros': torch.zeros(500)} | small_state())


def test_v4_bytes_stay_what_they_are():
    "A change of this hash is a change of the format, or of zstd; the second part of the test says which"
    c = Coded(TERNARY, torch.tensor([[0, 1, 2, 1, 0]], dtype=torch.uint8), torch.tensor([[.5]]).half(), (1, 5))
    data = q2bn_bytes({'w': c, 'v': 'w', 'n': torch.tensor([1., 2.])}, {'a': 1})
    assert hashlib.sha256(data[32+struct.unpack('<I', data[16:20])[0]:-32]).hexdigest() == 'c70dd2cd79c92c840715c7b8cd391d65eb25d116e7f3b99919f37abb06092cd0'
    assert q._front(q._Cursor(data))[0] == {'a': 1, 'codes': {'ternary': TERNARY.to_dict()}, 'tables': []}


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_v4_round_trips_any_state(data):
    state, tensors = {}, []
    for i in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.text(st.characters(min_codepoint=33, max_codepoint=0x2ff, blacklist_categories=('C', 'Z')), min_size=1, max_size=12)) + str(i)
        kind = data.draw(st.sampled_from(['alias', 'f4', 'f2', Q2, GROUPED, INT6, TERNARY, codebook('int8')]))
        if kind == 'alias' and tensors: state[name] = data.draw(st.sampled_from(tensors)); continue
        tensors.append(name)
        shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
        if isinstance(kind, Codebook):
            if kind.group: shape = (*shape[:-1], 4)
            state[name] = coded(kind, *shape, seed=i)
        else: state[name] = torch.randn(shape[data.draw(st.integers(0, len(shape))):]).to(torch.float16 if kind == 'f2' else torch.float32)
    b = q2bn_bytes(state, {'n': len(state)})
    got, meta = q2bn_parse(b)
    same(state, got)
    assert q2bn_bytes(got, meta) == b


def test_every_flipped_byte_is_refused():
    "Every byte of a small file: each of its eight bits, and all of them"
    data = q2bn_bytes(small_state() | {'z': torch.zeros(64)}, {'note': 'x'})
    assert {0, 1} <= set(ways(data))
    for i in range(len(data)):
        for x in (1, 2, 4, 8, 16, 32, 64, 128, 255): assert refused(data[:i] + bytes([data[i] ^ x]) + data[i+1:]), i

def test_every_other_value_of_every_byte_is_refused():
    data = q2bn_bytes({'n': torch.ones(1), 'v': 'n'})
    for i in range(len(data)):
        for x in range(1, 256): assert refused(data[:i] + bytes([data[i] ^ x]) + data[i+1:]), i

def test_flips_where_streams_are_entropy_coded():
    data, r = q2bn_bytes(skewed()), random.Random(0)
    assert 2 in ways(data)
    for i in range(len(data)): assert refused(data[:i] + bytes([data[i] ^ r.randrange(1, 256)]) + data[i+1:]), i


def test_every_cut_and_every_extension_is_refused():
    data = q2bn_bytes(small_state(), {'note': 'x'})
    assert all(refused(data[:n]) for n in range(len(data)))
    assert all(refused(data + bytes(n)) for n in (1, 32, 64, 1000))


@pytest.mark.parametrize('state, meta', [
    ({}, {}), ({'w': torch.tensor([float('nan')])}, {}), ({'w': torch.zeros(0)}, {}), ({'w': torch.zeros(2).double()}, {}), ({'w': 3}, {}),
    ({'b': 'w', 'w': torch.ones(1)}, {}), ({'w': torch.ones(1), 'a': 'w', 'b': 'a'}, {}), ({'': torch.ones(1)}, {}), ({'a\n': torch.ones(1)}, {}),
    ({'x'*2000: torch.ones(1)}, {}), ({'w': torch.ones((1,)*9)}, {}), ({'w': torch.ones(1)}, {'x': float('inf')}), ({'w': torch.ones(1)}, {'x': {1, 2}}),
    ({'w': torch.ones(1)}, {'x'*(1 << 25): 1}), ({'w': Coded(Q2, torch.zeros(1, 4).byte(), torch.tensor([[float('inf')]]).half(), (1, 4))}, {}),
    ({'w': Coded(INT6, torch.full((1, 4), 63).byte(), torch.ones(1, 1).half(), (1, 4))}, {}),
    ({'w': Coded(Q2, torch.zeros(1, 4).byte(), torch.ones(1, 1).half(), (1, 5))}, {}),
    ({'w': Coded(Q2, torch.zeros(1, 4).byte(), torch.ones(1, 1).double(), (1, 4))}, {}), ({'w': Coded(Q2, torch.zeros(1, 4).byte(), torch.zeros(1, 1).half(), (1, 4))}, {}),
    ({'w': Coded(GROUPED, torch.zeros(2, 16).byte(), torch.ones(4, 2).half(), (2, 16))}, {}), ({'w': W.numpy()}, {}), ({7: torch.ones(1)}, {}),
    ({'\ud800': torch.ones(1)}, {}), ({'w': coded(Codebook('float32', Q2.levels, Q2.cuts, 'rms', 1.), 2, 4)}, {}),
    ({'w': coded(Codebook('a\n', Q2.levels, Q2.cuts, 'rms', 1.), 2, 4)}, {}),
    ({'w': coded(Q2, 2, 4), 'v': coded(Codebook('q2', (0., 1.), (.5,), 'rms', 1.), 2, 4)}, {})])
def test_what_cannot_be_read_is_not_written(state, meta, tmp_path):
    with pytest.raises(ValueError) as e: write_q2bn(tmp_path/'f', state, meta)
    assert '\n' not in str(e.value) and os.listdir(tmp_path) == []


def front(data):
    "Where the records begin, and at multiples of what"
    if data[4] == 3: at = min(32 + struct.unpack('<Q', data[16:24])[0], len(data)); return at + -at % 64, 64
    return 32 + struct.unpack('<I', data[16:20])[0], 1

def fix(data):
    "Make all checksums of a changed file right again, as far as its lengths still make sense"
    d = bytearray(data)
    if len(d) < 64: return bytes(d)
    d[8:16] = struct.pack('<Q', len(d))
    at, to = front(d)
    d[28:32] = struct.pack('<I', zlib.crc32(d[32:at], zlib.crc32(d[:28])))
    while at + 20 <= len(d)-32:
        size = struct.unpack('<Q', d[at+12:at+20])[0]
        if not 20 < size <= len(d)-32-at: break
        d[at:at+4] = struct.pack('<I', zlib.crc32(d[at+4:at+size])); at += size
    d[-32:] = hashlib.sha256(d[:-32]).digest()
    return bytes(d)

def records(data):
    "Where the records of a good file begin and end"
    at, out = front(data)[0], []
    while at < len(data)-32:
        size = struct.unpack('<Q', data[at+12:at+20])[0]
        out.append((at, at+size)); at += size
    return out

def heads(data, i):
    "Where the stream heads of record i begin"
    at = records(data)[i][0]
    return at + 20 + 4*data[at+7] + struct.unpack('<H', data[at+4:at+6])[0]

def test_fix_is_right():
    data = q2bn_bytes(small_state(), {'note': 'x'})
    assert fix(data) == data and len(records(data)) == 7 and fix(V3) == V3 and len(records(V3)) == 5


@pytest.mark.parametrize('i, field, value, words', [ # record, (offset, format) in its head, new value
    (1, (12, '<Q'), 2**63, 'says that it takes'), (1, (12, '<Q'), 0, 'says that it takes'), (1, (12, '<Q'), 20, 'says that it takes'),
    (1, (6, '<B'), 9, 'unknown kind'), (1, (6, '<B'), 1, 'cannot be used|promised'), (1, (6, '<B'), 2, 'alias'), (1, (7, '<B'), 255, 'promised|name|shape'),
    (1, (8, '<I'), 77, 'does not exist'), (1, (8, '<I'), 3, 'cannot be used|holds'), (1, (20, '<I'), 2**32-1, 'claims'), (1, (24, '<I'), 2**32-1, 'claims'), (1, (24, '<I'), 7, 'cannot be used'),
    (1, (20, '<I'), 0, 'no zeros'), (1, (4, '<H'), 0, 'name'), (1, (4, '<H'), 65535, 'promised'), (2, (8, '<I'), 2, 'earlier'), (2, (8, '<I'), 5, 'earlier'),
    (2, (8, '<I'), 2**32-1, 'earlier'), (0, (6, '<B'), 2, 'alias'), (5, (8, '<I'), 2, 'does not exist'), (5, (8, '<I'), 1, 'cannot be used|more than|NaN')])
def test_lies_with_right_checksums(i, field, value, words):
    data = bytearray(q2bn_bytes(small_state(), {'note': 'x'}))
    at = records(data)[i][0] + field[0]
    data[at:at+struct.calcsize(field[1])] = struct.pack(field[1], value)
    with pytest.raises(Q2BNError, match=words): q2bn_parse(fix(data))


@pytest.mark.parametrize('i, stream, way, size, words', [
    (1, 0, 9, None, 'does not exist'), (1, 0, 2, None, 'table 0, which does not exist'), (1, 0, 1, None, 'zstd'), (1, 2, 0, 2**32-1, 'promised'), (1, 2, 0, 0, 'bytes where'),
    (1, 2, 0, 4, 'bytes where|more than its streams'), (5, 3, 0, 2, 'bytes where'), (5, 0, 1, None, 'zstd'), (5, 0, 255, None, 'does not exist')])
def test_lies_about_streams(i, stream, way, size, words):
    data = bytearray(q2bn_bytes(small_state(), {'note': 'x'}))
    at = heads(data, i) + 5*stream
    data[at] = way
    if size is not None: data[at+1:at+5] = struct.pack('<I', size)
    with pytest.raises(Q2BNError, match=words): q2bn_parse(fix(data))


def remeta(data, text, squeezed=False):
    z = q.squeeze(text) if squeezed else text
    return fix(data[:16] + struct.pack('<II', len(z), len(text)) + data[24:32] + z + data[records(data)[0][0]:])

def book(**kw): return {**Q2.to_dict(), **kw}

@pytest.mark.parametrize('codes', [
    [], None, {}, {'q2': 1}, {'q2': []}, {'q2': {}}, {'q2': book(levels=[1])}, {'q2': book(levels='abcd')}, {'q2': book(levels=[1, 2, 3, [4]])},
    {'q2': book(levels=[-1, 0, 1, 1e300])}, {'q2': book(levels=[1, 0, 2, 3])}, {'q2': book(levels=[True, 2, 3, 4])}, {'q2': book(cuts=[0])},
    {'q2': book(name='q3')}, {'q2': book(name=['q2'])}, {'q2': book(group=-1)}, {'q2': book(group=1.5)}, {'q2': book(group=10**30)}, {'q2': book(rule='best')},
    {'q2': book(rule=['rms'])}, {'q2': book(factor='x')}, {'q2': book(doc=5)}, {'q2': book(more=1)}, {'q2': book(), 'spare': book(name='spare')},
    {'q2': {k: v for k,v in book().items() if k != 'doc'}}, {'q2': book(levels=list(range(300)), cuts=[x+.5 for x in range(299)])},
    {'q2': book(factor=0.)}, {'q2': book(factor=-1.)}, {'q2': book(factor=True)}, {'q2': book(factor=10**400)}, {'q2': book(group=False)}, {'q2': book(group=0.)},
    {'q2': book(levels=[-2, -1, 1, 2])}, {'q2': book(levels=[-9., -8., -7., -6.])}, {'q2': book(levels=dict(first=-1.5, step=1., count=4))},
    {'q2': book(doc=eval('['*90 + ']'*90))}, {f'q{i}': book(name=f'q{i}') for i in range(300)}])
def test_bad_code_books(codes):
    data = q2bn_bytes({'w': coded(Q2, 2, 4)})
    assert remeta(data, q._meta_bytes({'codes': {'q2': Q2.to_dict()}, 'tables': []}), True) == data
    assert refused(remeta(data, q._meta_bytes({'codes': codes, 'tables': []})))

@pytest.mark.parametrize('change', [
    lambda t: b'', lambda t: b'[]', lambda t: b'7', lambda t: t[:-1], lambda t: t + b' ', lambda t: t.replace(b':', b': '), lambda t: b'\xff' + t,
    lambda t: t[:-1] + b',"codes":{}}', lambda t: t[:-1] + b',"x":NaN}', lambda t: t[:-1] + b',"x":1e999}', lambda t: t[:-1] + b',"x":' + b'9'*5000 + b'}',
    lambda t: b'['*100000, lambda t: b'{"a":'*50000, lambda t: t.decode().encode('utf-16'), lambda t: t[:-1] + b',"a":1}', lambda t: t[:-1] + b',"x":1.50}'])
def test_bad_meta_text(change):
    data = q2bn_bytes({'w': coded(Q2, 2, 4)})
    assert refused(remeta(data, change(q._meta_bytes({'codes': {'q2': Q2.to_dict()}, 'tables': []}))))


@pytest.mark.parametrize('tables', [None, {}, 7, [[]], [[1]*256], [[16.]*256], [[4096]], [[4096] + [0]*254], [[4097, -1] + [0]*254], [[True]*256], [[16]*256]*255, [['16']*256]])
def test_bad_tables(tables):
    data = q2bn_bytes({'w': coded(Q2, 2, 4)})
    assert not refused(remeta(data, q._meta_bytes({'codes': {'q2': Q2.to_dict()}, 'tables': [[16]*256]})))
    assert refused(remeta(data, q._meta_bytes({'codes': {'q2': Q2.to_dict()}, 'tables': tables})))
    assert refused(remeta(data, q._meta_bytes({'codes': {'q2': Q2.to_dict()}})))

def test_a_squeezed_meta_block_cannot_explode():
    data = q2bn_bytes({'w': coded(Q2, 2, 4)})
    def text(a): return q._meta_bytes({'a': a, 'codes': {'q2': Q2.to_dict()}, 'tables': []})
    def refuses(text, claim):
        z = q.squeeze(text)
        with little_memory(256 << 20): return refused(fix(data[:16] + struct.pack('<II', len(z), claim) + data[24:32] + z + data[records(data)[0][0]:]))
    good = text(random.Random(0).randbytes(200_000).hex())
    assert not refuses(good, len(good))
    for claim in (len(good)-1, len(good)+1, q._META_MAX, q._META_MAX+1, 2**32-1, len(q.squeeze(good)), 0): assert refuses(good, claim)
    for n in (1 << 18, 1 << 20, 12 << 20): assert refuses(text('x'*n), len(text('x'*n)))
    assert not refused(q2bn_bytes({'w': torch.ones(1)}, {'a': 'x'*(1 << 20)}))  # a writer leaves such a text as it is

def test_few_bytes_cannot_claim_terabytes():
    "A constant stream takes next to nothing; what it may stand for is bounded by the size of the file"
    flat = [4096] + [0]*255
    def lying(n):
        z = rans_encode(np.zeros(64, 'uint8'), np.array(flat, 'uint16'))
        return q._file({'codes': {'q2': Q2.to_dict()}, 'tables': [flat]}, [q._record('w', 'coded', 0, (1, n), [(0, b'\0'), (0, b'\x3c'), (2, z)])])
    for n in (2**23, 2**28, 2**32-1):
        with little_memory(256 << 20), pytest.raises(Q2BNError, match='claims more'): q2bn_parse(lying(n))

def test_a_matrix_of_equal_weights_is_written_all_the_same():
    c = Coded(TERNARY, torch.ones(3000, 3000).byte(), torch.ones(3000, 1).half(), (3000, 3000))
    data = q2bn_bytes({'w': c})
    assert len(data) > 3000*600 and set(ways(data)) == {0}           # stored raw: squeezed it would claim too much
    same(q2bn_parse(data)[0], {'w': c})
    assert len(q2bn_bytes({'w': Coded(TERNARY, torch.ones(300, 3000).byte(), torch.ones(300, 1).half(), (300, 3000))})) < 1000


@pytest.mark.parametrize('change', [
    lambda d: d, lambda d: [*range(-127, 128)], lambda d: [float(x) for x in range(-127, 128)], lambda d: {**d, 'count': 10**15}, lambda d: {**d, 'count': 255.}, lambda d: {**d, 'count': 254},
    lambda d: {**d, 'count': -1}, lambda d: {**d, 'step': 0.}, lambda d: {**d, 'step': 1}, lambda d: {**d, 'step': -1.}, lambda d: {**d, 'step': 1e308}, lambda d: {**d, 'first': 'x'},
    lambda d: {**d, 'more': 1}, lambda d: {'count': 255}])
def test_evenly_spaced_levels_are_written_in_one_way(change):
    code = codebook('int8')
    good, data = code.to_dict(), q2bn_bytes({'w': coded(code, 2, 4)})
    assert good['levels'] == dict(first=-127., step=1., count=255)
    levels = change(good['levels'])
    with little_memory(256 << 20): assert refused(remeta(data, q._meta_bytes({'codes': {'int8': {**good, 'levels': levels}}, 'tables': []}))) == (levels != good['levels'] or repr(levels) != repr(good['levels']))


def test_a_code_book_cannot_hide_behind_a_kind():
    "A spare code book with the name of a plain kind counts as unused"
    data = q2bn_bytes({'w': torch.ones(3), 'v': 'w'})
    for name in ('float32', 'alias'): assert refused(remeta(data, q._meta_bytes({'codes': {name: book(name=name)}, 'tables': []})))


def test_two_names_and_spare_records():
    data = q2bn_bytes({'a': torch.ones(1), 'b': torch.ones(2)})
    (a0, a1), (b0, b1) = records(data)
    twice = bytearray(data); twice[b0+24:b0+25] = b'a'
    assert 'comes twice' in str(pytest.raises(Q2BNError, q2bn_parse, fix(twice)).value)
    assert refused(fix(data[:a1] + data[a0:a1] + data[b0:])) and refused(fix(data[:b0] + data[b1:]))
    for n in (0, 1, 3, 2**32-1): assert refused(fix(data[:24] + struct.pack('<I', n) + data[28:]))


# ---- a structured fuzz: what is accepted must be exactly what the writer would have written

NUMBERS = [0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 2**15, 2**16-1, 2**31-1, 2**31, 2**32-1, 2**40, 2**63-1, 2**63, 2**64-1]

def mutate(r, data):
    d, recs, f = bytearray(data), records(data), r.randrange(9)
    k = r.randrange(len(recs))
    a, b = recs[k]
    first = recs[0][0]
    if f == 0: # a few flips anywhere
        for _ in range(r.randint(1, 6)): d[r.randrange(len(d))] ^= 1 << r.randrange(8)
    elif f == 1: d = d[:r.randrange(len(d))] if r.random() < .7 else d + r.randbytes(r.randint(1, 200))
    elif f == 2: # a number anywhere in the headers
        at, fmt = r.choice([8, 16, 20, 24, a+4, a+6, a+7, a+8, a+12, a+20, a+24]), r.choice('BHIQ')
        d[at:at+struct.calcsize('<'+fmt)] = struct.pack('<'+fmt, r.choice(NUMBERS) & (1 << 8*struct.calcsize('<'+fmt))-1)
    elif f == 3: # data of a record
        for _ in range(r.randint(1, 4)): d[r.randrange(a, b)] = r.choice([0, 1, 0x7c, 0x7f, 0x80, 0xff, r.randrange(256)])
    elif f == 4: # records cut out, doubled, exchanged
        c, e = r.choice(recs)
        d = d[:a] + d[c:e] + (d[b:] if r.random() < .5 else d[a:])
        if r.random() < .5: d[24:28] = struct.pack('<I', max(0, struct.unpack('<I', d[24:28])[0] + r.randint(-2, 2)))
    elif f == 5: # the meta text
        for _ in range(r.randint(1, 3)): d[r.randrange(32, first)] = r.choice(b'0123456789-+.eE[]{},:"\\nNtfI ') if r.random() < .9 else r.randrange(256)
    elif f == 6: # kinds, codes, aliases and shapes
        d[a+6] = r.choice([0, 1, 2, 3]); d[a+8] = r.randrange(9)
        if r.random() < .5: d[a+20+4*r.randrange(3)] = r.randrange(12)
    elif f == 7: # pieces moved about
        x, y, n = r.randrange(len(d)), r.randrange(len(d)), r.randint(1, 64)
        d[x:x+n] = d[y:y+n]
    elif data[4] == 4 and data[a+6] < 2: # how a stream is stored, how long it is, the first bytes of the streams
        at = heads(data, k) + 5*r.randrange(3)
        if r.random() < .7: d[at] = r.choice([0, 1, 2, 3, 4, 255])
        if r.random() < .4: d[at+1:at+5] = struct.pack('<I', r.choice(NUMBERS) & 2**32-1 if r.random() < .5 else r.randrange(40))
        if r.random() < .5:
            for _ in range(3): d[r.randrange(at, min(at+60, b))] = r.randrange(256)
    return bytes(d)

def mutate2(r, data):
    d, f = bytearray(data), r.randrange(4)
    if f == 0: d[r.randrange(len(d))] ^= 1 << r.randrange(8)
    elif f == 1: d = d[:r.randrange(len(d))] + (r.randbytes(r.randint(0, 40)) if r.random() < .5 else b'')
    elif f == 2:
        at, fmt = r.randrange(4, len(d)-8), r.choice('BHIQ')
        d[at:at+struct.calcsize('>'+fmt)] = struct.pack('>'+fmt, r.choice(NUMBERS) & (1 << 8*struct.calcsize('>'+fmt))-1)
    else:
        x, y, n = r.randrange(len(d)), r.randrange(5, len(d)), r.randint(1, 64)
        d[x:x+n] = d[y:y+n]
    return bytes(d)

@contextmanager
def little_memory(extra):
    "Any allocation that takes the process more than `extra` bytes above where it is now fails"
    try:
        import resource
        now = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    except (ImportError, OSError): yield; return
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now+extra, old[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_AS, old)


def test_little_memory_would_notice():
    with little_memory(256 << 20), pytest.raises((RuntimeError, MemoryError)): torch.zeros(1 << 30, dtype=torch.uint8)


def bases():
    states = [(small_state(), {'note': 'x'}), ({'a': torch.ones(1), 'b': 'a', 'w': coded(Q2, 3, 5)}, {}), ({'w': coded(codebook('int8'), 2, 3)}, {}),
              ({k: v for k,v in skewed().items() if k != 's2'}, {}), ({'z': torch.zeros(99), 'w': coded(Q2, 2, 4)}, {'config': {'x': [1]*99}})]
    files = [q2bn_bytes(*s) for s in states]
    plain = [remeta(f, q._meta_bytes(q._front(q._Cursor(f))[0])) for f in files] # the same with a meta block that a mutation can reach
    return files + plain + [V3]

def fuzz(seed, n):
    r, bad, deep, base = random.Random(seed), 0, set(), bases()
    assert {0, 1, 2} <= {w for f in base[:-1] for w in ways(f)}
    with little_memory(256 << 20):
        for _ in range(n):
            d = mutate(r, r.choice(base))
            if r.random() < .8: d = fix(d)
            try: state, meta = q2bn_parse(d)
            except Q2BNError as e: bad += 1; deep.add(str(e).split(';')[0][-12:]); assert '\n' not in str(e); continue
            assert d == fix(d) and len(d) == struct.unpack('<Q', d[8:16])[0] # accepted, then every checksum is right
            again, m = q2bn_parse(q2bn_bytes(state, meta))
            same(state, again); assert m == meta
    assert bad > n*.5 and len(deep) > 20 # most were refused, for many different reasons

@pytest.mark.parametrize('seed', range(5))
def test_fuzz(seed): fuzz(seed, int(os.environ.get('PI2NB_FUZZ', 4000)))

def test_no_lie_about_a_size_makes_anyone_allocate_it():
    tracemalloc.start()
    fuzz(99, 500)
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert peak < 32 << 20


def test_fuzz_v2():
    r, n = random.Random(0), int(os.environ.get('PI2NB_FUZZ', 2000))
    base = [GOLDEN, v2_bytes({'a.b': coded(Q2, 3, 2, 5), 'v': torch.arange(3.), 'c': 'a.b', 's': torch.tensor(1.)})]
    with little_memory(256 << 20):
        for _ in range(n):
            d = mutate2(r, r.choice(base))
            try: state = v2_parse(d)
            except Q2BNError as e: assert '\n' not in str(e); continue
            for t in decode_state(state).values(): assert t.isfinite().all()
            assert v2_parse(v2_bytes(state)).keys() == state.keys()


# ---- disk

def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    f = tmp_path/'m.q2bin'
    write_q2bn(f, {'w': torch.ones(3)})
    old = f.read_bytes()
    def full(*a): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError, match='No space left'): write_q2bn(f, {'w': torch.zeros(3)})
    assert f.read_bytes() == old and os.listdir(tmp_path) == ['m.q2bin']
    write_q2bn(f, {'w': torch.zeros(3)})
    assert read_q2bn(f)[0]['w'].tolist() == [0, 0, 0]


def test_paths(tmp_path):
    for read in (read_q2bn, read_v2, inspect_q2bn, q.load_model):
        with pytest.raises(FileNotFoundError, match='does not exist; give'): read(tmp_path/'no.q2bin')
        with pytest.raises(Q2BNError, match='not a regular file'): read(tmp_path)
    n = write_q2bn(tmp_path/'new'/'folder'/'a.q2bin', {'w': torch.ones(3)})
    assert (tmp_path/'new'/'folder'/'a.q2bin').stat().st_size == n
    with pytest.raises(Q2BNError, match='a.q2bin: this is a version 4 file; read it with read_q2bn'): read_v2(tmp_path/'new'/'folder'/'a.q2bin')
    with pytest.raises(Q2BNError, match='read_v2'): write_v2(tmp_path/'b', TIED); read_q2bn(tmp_path/'b')


def test_report(tmp_path):
    write_q2bn(tmp_path/'a.q2bin', small_state(), {'note': 'hello'})
    r = inspect_q2bn(tmp_path/'a.q2bin')
    assert r.version == 4 and r.weights == 35+18+16+12+3+1 and r.size == (tmp_path/'a.q2bin').stat().st_size == sum(r.streams().values())
    assert r.sha256 == hashlib.sha256((tmp_path/'a.q2bin').read_bytes()).hexdigest()
    t = str(r)
    assert '9 checksums good' in t and 'hello' in t and '= embed' in t and 'a.weight' in t and 'bits each' in t
    assert next(x for x in r.records if x.name == 'b').streams == {'scales': 8, 'symbols': 4} and r.kinds()['q2-g4'] == (1, 16, 12) and r.identity in t
    write_q2bn(tmp_path/'a.q2bin', {'w': torch.ones(1)}, {'\x1b[2J\n\ud800': '\x1b\u202e'})
    assert all(x.isprintable() for x in str(inspect_q2bn(tmp_path/'a.q2bin')).split('\n'))


# ---- a model in a file

@pytest.fixture(scope='module')
def model():
    from pi2nb.model import LM, LMConfig
    from pi2nb.tokenizer import ByteTokenizer
    torch.manual_seed(1)
    return LM(LMConfig(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=16)), ByteTokenizer()

def test_model_is_bit_identical_and_leaves_the_random_state_alone(model, tmp_path):
    lm, tok = model
    q.save_model(lm, tok, tmp_path/'m', {'note': 1})
    before = torch.get_rng_state()
    lm2, tok2, meta = q.load_model(tmp_path/'m')
    assert torch.equal(before, torch.get_rng_state()) and tok2 == tok and meta['note'] == 1 and lm2.config == lm.config
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.equal(lm(ids)[0], lm2(ids)[0])
    assert not lm2.training and not any(p.requires_grad for p in lm2.parameters())
    q.save_model(lm2, tok2, tmp_path/'n', {'note': 1})
    assert (tmp_path/'m').read_bytes() == (tmp_path/'n').read_bytes()

def test_tied_and_dense_models(model, tmp_path):
    from pi2nb.model import LM, LMConfig
    ids = torch.arange(20)[None]
    for kw in (dict(tied=True), dict(code=None, gate_code=None, embed_code=None), dict(code='q2-quartile', embed_code='int6')):
        lm = LM(LMConfig(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=16, **kw))
        q.save_model(lm, model[1], tmp_path/'m')
        with torch.no_grad(): assert torch.equal(lm(ids)[0], q.load_model(tmp_path/'m')[0](ids)[0])
    assert inspect_q2bn(tmp_path/'m').weights == lm.n_params()

@pytest.mark.parametrize('change', [dict(dim=2**40), dict(dim=2**20), dict(dim='x'), dict(dim=-1), dict(dim=0), dict(layout='CfC, GQA'), dict(layout='GQA*4000'),
    dict(layout=5), dict(layout='['*9999), dict(heads=0), dict(vocab=2**40), dict(mlp_ratio=1e300), dict(mlp_ratio=None), dict(mlp='no'), dict(nope=1),
    dict(code='int8'), dict(code=None), dict(code=7), dict(embed_code='q2'), dict(tied=7), dict(tied=True)])
def test_lying_configurations(model, change, tmp_path):
    q.save_model(*model, tmp_path/'m')
    state, meta = read_q2bn(tmp_path/'m')
    write_q2bn(tmp_path/'m', state, {**meta, 'config': {**meta['config'], **change}})
    with little_memory(512 << 20), pytest.raises(Q2BNError) as e: q.load_model(tmp_path/'m')
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('change', [dict(window=1.5), dict(window=True), dict(tied=0), dict(code=7), dict(code=False), dict(gate_code={}), dict(embed_code=[]), dict(vocab=17)])
def test_configurations_that_would_only_fail_later(model, change, tmp_path):
    from pi2nb.model import LM, LMConfig
    vocab = change.get('vocab', 256)
    lm = LM(LMConfig(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=16, vocab=vocab, code=None, gate_code=None, embed_code=None))
    q.save_model(lm, model[1], tmp_path/'m')
    state, meta = read_q2bn(tmp_path/'m')
    write_q2bn(tmp_path/'m', state, {**meta, 'config': {**meta['config'], **change}})
    with pytest.raises(Q2BNError): q.load_model(tmp_path/'m')

def test_the_file_says_what_its_symbols_mean(model, tmp_path):
    "Also in a head that shares its weights with the embedding: the code books of the file, not of the library"
    from dataclasses import replace
    from pi2nb.model import LM, LMConfig
    q.save_model(LM(LMConfig(layout='CfC', dim=32, tied=True)), model[1], tmp_path/'m')
    state, meta = read_q2bn(tmp_path/'m')
    name, code = next((k, v.code) for k,v in state.items() if isinstance(v, Coded) and v.code.name == 'int8')
    new = replace(code, levels=tuple(2*x for x in code.levels), cuts=tuple(2*x for x in code.cuts), doc='twice')
    state = {k: Coded(new, v.z, v.s, v.shape) if isinstance(v, Coded) and v.code == code else v for k,v in state.items()}
    write_q2bn(tmp_path/'n', state, meta)
    lm = q.load_model(tmp_path/'n')[0]
    assert lm.head.code == lm.embed.code == new and torch.equal(lm.head.weight, state[name].decode())
    q.save_model(lm, model[1], tmp_path/'o')
    assert (tmp_path/'n').read_bytes() == (tmp_path/'o').read_bytes()

@pytest.mark.parametrize('gone', [dict(config=None), dict(config=[]), dict(config={'dim': 1}), dict(tokenizer=None), dict(tokenizer={'name': 'x'}), dict(tokenizer=3)])
def test_files_without_a_model(model, gone, tmp_path):
    q.save_model(*model, tmp_path/'m')
    state, meta = read_q2bn(tmp_path/'m')
    write_q2bn(tmp_path/'m', state, {**meta, **gone})
    with pytest.raises(Q2BNError): q.load_model(tmp_path/'m')
    write_q2bn(tmp_path/'m', {'w': torch.ones(2)}, meta)
    with pytest.raises(Q2BNError): q.load_model(tmp_path/'m')
    with pytest.raises(ValueError, match='config'): q.save_model(*model, tmp_path/'m', {'config': 1})


# ---- what is read is what was written, in every code and every recipe

@pytest.mark.parametrize('code', CODES)
def test_every_code_comes_back_exactly(code):
    for i, changes in enumerate(({}, dict(group=16), dict(group=-1))):
        for shape in ((5, 16), (3, 48), (64, 80)):
            c = coded(codebook(code, **changes), *shape, seed=i)
            data = q2bn_bytes({'w': c})
            same(q2bn_parse(data)[0], {'w': c})
            assert torch.equal(q2bn_parse(data)[0]['w'].decode(), c.decode())

def test_every_recipe_comes_back_exactly(tmp_path):
    from pi2nb.model import LM, RECIPES
    from pi2nb.tokenizer import ByteTokenizer
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    for name, r in RECIPES.items():
        torch.manual_seed(0)
        lm = LM(r.config(dim=32)).eval()
        q.save_model(lm, ByteTokenizer(), tmp_path/'m')
        back = q.load_model(tmp_path/'m')[0]
        with torch.no_grad(): gap = (lm(ids)[0] - back(ids)[0]).abs().max().item()
        assert gap == 0, name


# ---- identity

def test_identity(model, tmp_path):
    q.save_model(*model, tmp_path/'a'); q.save_model(*model, tmp_path/'b', {'note': 1})
    name = identity(tmp_path/'a')
    assert name == identity(tmp_path/'b') == identity(read_q2bn(tmp_path/'a')) == inspect_q2bn(tmp_path/'a').identity
    assert (tmp_path/'a').read_bytes() != (tmp_path/'b').read_bytes()
    state, meta = read_q2bn(tmp_path/'a')
    def but(**kw): return identity((state, meta | kw))
    assert but(config=meta['config'] | {'window': 17}) != name != but(tokenizer={'name': 'x'}) and but(pi2nb='9') == name
    config = dict(meta['config']); del config['slots']               # a setting that an older release did not know
    assert but(config=config) == name
    k, v = next((k, v) for k,v in state.items() if isinstance(v, Coded))
    z = v.z.clone(); z[0, 0] = (z[0, 0] + 1) % 4
    for other in (Coded(v.code, z, v.s, v.shape), Coded(v.code, v.z, v.s*2, v.shape)): assert identity((state | {k: other}, meta)) != name


# ---- a process that dies

def test_killed_while_saving(tmp_path):
    f, r, seen = tmp_path/'m.q2bin', random.Random(0), set()
    states = [{'w': coded(Q2, 200, 400, seed=i)} for i in (0, 1)]
    fork = multiprocessing.get_context('fork')
    def save(k, wrote):
        torch.set_num_threads(1)
        for i in range(k, 10**6): write_q2bn(f, states[i % 2]); wrote.set()
    for k in range(20):
        wrote = fork.Event()
        p = fork.Process(target=save, args=(k, wrote))
        p.start(); wrote.wait(); time.sleep(r.random()*.05); p.kill(); p.join()
        z = q2bn_parse(f.read_bytes())[0]['w'].z
        seen |= {i for i in (0, 1) if torch.equal(z, states[i]['w'].z)}
        assert f.read_bytes() in [q2bn_bytes(s) for s in states]
    assert seen == {0, 1}                                            # otherwise the writes changed nothing
