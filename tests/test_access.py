"Chapters 50b and 50c: one tensor at a time, notes, safetensors both ways, and a file against a limit"
import errno, json, os, random
import pytest, torch
from safetensors.torch import load_file, save_file
from pi2nb.access import Q2BN, append_meta, from_safetensors, to_safetensors
from pi2nb.budget import budget, size_in_blocks, size_in_code, size_in_shape
from pi2nb.codebook import CODES, Coded, codebook, hold
from pi2nb.q2bn import Q2BNError, decode_state, identity, inspect_q2bn, read_q2bn, save_model, write_q2bn, write_v2
from test_q2bn import V3, bases, coded, fix, little_memory, mutate, same, skewed, small_state


@pytest.fixture
def f(tmp_path):
    write_q2bn(tmp_path/'f', small_state() | skewed(), {'config': {'dim': 7}, 'note': 'x'})
    return tmp_path/'f'

def equal(a, b): same({'x': a}, {'x': b})


def test_one_tensor_at_a_time(f):
    state, meta = read_q2bn(f)
    q = Q2BN(f)
    assert list(q) == list(q.keys()) == list(state) and len(q) == len(state) and q.meta['note'] == 'x'
    for k, v in state.items():
        v = state[v] if isinstance(v, str) else v
        assert q.shape(k) == tuple(v.shape)
        equal(q[k], v)
        assert torch.equal(q.decode(k), decode_state({k: v})[k])
    with pytest.raises(KeyError): q['no such']


def test_damage_is_found_where_it_is(f, tmp_path):
    data = f.read_bytes()
    q, state = Q2BN(f), read_q2bn(f)[0]
    starts = sorted((at, k) for k, (at, *_) in q.heads.items()) + [(len(data)-32, None)]
    for (at, k), (end, _) in zip(starts, starts[1:]):
        for i in {at, at+4, at+5, at+13, end-1, random.Random(at).randrange(at, end)}:
            (tmp_path/'g').write_bytes(data[:i] + bytes([data[i] ^ 16]) + data[i+1:])
            try: q = Q2BN(tmp_path/'g')
            except Q2BNError: continue                                   # a length or a name that cannot be
            touched = [n for n in q if n == k or state.get(n) == k or n not in state]
            for n in touched:
                with pytest.raises((Q2BNError, KeyError)): q[n]; q[k]
            for n in set(q) & set(state) - {k}:
                if state[n] != k: equal(q[n], Q2BN(f)[n])
    for n in (*range(0, 400, 7), len(data)-1):
        (tmp_path/'g').write_bytes(data[:n])
        with pytest.raises(Q2BNError): Q2BN(tmp_path/'g')


def test_mapped_fuzz(tmp_path):
    r, base, bad = random.Random(0), bases()[:-1], 0
    with little_memory(256 << 20):
        for _ in range(300):
            (tmp_path/'g').write_bytes(fix(mutate(r, r.choice(base))))
            try:
                q = Q2BN(tmp_path/'g')
                for k in q: assert q[k] is not None
            except Q2BNError as e: bad += 1; assert '\n' not in str(e)
    assert 100 < bad < 300


def test_only_version_4_is_mapped(tmp_path):
    (tmp_path/'old').write_bytes(V3); write_v2(tmp_path/'older', {'w': torch.ones(1, 4)}); (tmp_path/'none').write_bytes(b'')
    for n, words in (('old', 'only version 4'), ('older', 'only version 4'), ('none', 'not a Q2BN file')):
        with pytest.raises(Q2BNError, match=words): Q2BN(tmp_path/n)
    with pytest.raises(FileNotFoundError): Q2BN(tmp_path/'nowhere')
    with pytest.raises(Q2BNError, match='only version 4'): append_meta(tmp_path/'old', a=1)


def test_memory_stays_small_while_all_tensors_are_read(tmp_path):
    try: anon = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))*1024; anon()
    except (OSError, StopIteration): pytest.skip('this system does not say how much memory a process holds')
    write_q2bn(tmp_path/'f', {f'w{i}': coded(codebook('int8'), 512, 2048, seed=i) for i in range(24)})
    q = Q2BN(tmp_path/'f'); q['w0']
    before, whole = anon(), 24*512*2048
    for k in q: v = q[k]; grown = anon() - before; assert grown < whole/3, k
    assert v.z.shape == (512, 2048)


def test_notes_leave_the_records_alone(f, monkeypatch):
    before, name, state = f.read_bytes(), identity(f), read_q2bn(f)[0]
    append_meta(f, score={'bits_per_byte': 1.5}, note='y')
    new, meta = read_q2bn(f)
    same(new, state)
    assert meta['score'] == {'bits_per_byte': 1.5} and meta['note'] == 'y' and identity(f) == name
    at = {k: v[0] for k, v in Q2BN(f).heads.items()}
    start = min(at.values())
    assert f.read_bytes()[start:-32] == before[-32-len(f.read_bytes()[start:-32]):-32]
    now = f.read_bytes()
    for bad in (dict(config={}), dict(codes={}), dict(tables=[]), dict(tokenizer=1), dict(x=float('nan')), dict(x={1}), dict(x='a'*(1 << 25))):
        with pytest.raises(ValueError) as e: append_meta(f, **bad)
        assert '\n' not in str(e.value) and f.read_bytes() == now
    def full(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(OSError): append_meta(f, x=1)
    assert f.read_bytes() == now and os.listdir(f.parent) == ['f']
    f.write_bytes(now[:-40] + b'!' + now[-39:])
    with pytest.raises(Q2BNError, match='SHA-256'): append_meta(f, x=1)


def test_safetensors_and_back(f, tmp_path):
    to_safetensors(f, tmp_path/'s'); from_safetensors(tmp_path/'s', tmp_path/'g')
    assert (tmp_path/'g').read_bytes() == f.read_bytes()
    t = load_file(tmp_path/'s')
    state = read_q2bn(f)[0]
    assert torch.equal(t['a.weight.scales'], state['a.weight'].s) and t['a.weight.symbols'].dtype == torch.uint8
    to_safetensors(f, tmp_path/'d', decode=True)
    plain, want = load_file(tmp_path/'d'), decode_state(state)
    assert plain.keys() == want.keys() and all(torch.equal(plain[k], want[k]) for k in want)

@pytest.mark.parametrize('code', CODES)
def test_every_code_goes_through_safetensors(code, tmp_path):
    write_q2bn(tmp_path/'f', {'w': coded(codebook(code), 6, 10), 'v': coded(codebook(code), 7)})
    to_safetensors(tmp_path/'f', tmp_path/'s'); from_safetensors(tmp_path/'s', tmp_path/'g')
    assert (tmp_path/'g').read_bytes() == (tmp_path/'f').read_bytes()

def test_safetensors_that_are_not_ours(f, tmp_path):
    to_safetensors(f, tmp_path/'s'); data = (tmp_path/'s').read_bytes()
    from safetensors import safe_open
    with safe_open(tmp_path/'s', 'pt') as s: told, tensors = json.loads(s.metadata()['q2bn']), {k: s.get_tensor(k) for k in s.keys()}
    def saved(told, **changed): save_file(tensors | changed, tmp_path/'x', {'q2bn': told if isinstance(told, str) else json.dumps(told)})
    def refused():
        with pytest.raises(Q2BNError) as e: from_safetensors(tmp_path/'x', tmp_path/'y')
        assert '\n' not in str(e.value) and not (tmp_path/'y').exists()
    save_file({'w': torch.ones(2)}, tmp_path/'x'); refused()
    for bad in ('', '[]', '7', '{', '{"records":1}', '{"records":[],"codes":{}}', {**told, 'codes': {}}, {**told, 'records': told['records']*2}, {**told, 'records': [['a']]},
                {**told, 'records': [['no', 'raw']]}, {**told, 'records': [['a.weight', 'coded', 'q2', [3, 7]]]}, {**told, 'records': [['a.weight', 'coded', 'q2', 'x']]}):
        saved(bad); refused()
    saved(told, **{'a.weight.scales': tensors['a.weight.scales']*-1}); refused()
    saved(told, **{'a.weight.symbols': tensors['a.weight.symbols'] | 1}); refused()
    for n in (0, 5, 100, len(data)-1):
        (tmp_path/'x').write_bytes(data[:n]); refused()
    with pytest.raises(FileNotFoundError): from_safetensors(tmp_path/'no', tmp_path/'y')


def test_budget(tmp_path):
    from pi2nb.model import LM, LMConfig
    from pi2nb.tokenizer import ByteTokenizer
    torch.manual_seed(0)
    save_model(LM(LMConfig(layout='[GQA, CfC]*2', dim=32, heads=2, kv_heads=1)), ByteTokenizer(), tmp_path/'m')
    r = inspect_q2bn(tmp_path/'m')
    whole = budget(r, r.size)
    assert whole.fits and not whole.advice and sum(whole.parts.values()) == r.size and 'fits, 0 bytes are left' in str(whole)
    state, meta = read_q2bn(tmp_path/'m')
    narrow = {k: hold(v.decode(), codebook('int4')) if k.startswith(('embed', 'head')) else v for k, v in state.items()}
    assert size_in_code(r, 'int4', True) == write_q2bn(tmp_path/'n', narrow, meta) and size_in_code(r, 'q2', False) == r.size
    assert r.size == size_in_blocks(r, 4) > size_in_blocks(r, 3) > size_in_blocks(r, 0) and size_in_shape(r, dim=32) == r.size
    b = budget(r, r.size*3//4)
    assert not b.fits and f'{r.size - r.size*3//4:,} bytes too many' in str(b)
    sizes = dict(b.advice)
    assert all(n < r.size for n in sizes.values()) and sizes['embedding and head in int4'] == size_in_code(r, 'int4', True)
    dim, = [k for k in sizes if k.startswith('dim')]
    blocks, = [k for k in sizes if 'blocks' in k]
    assert sizes[dim] <= b.limit and sizes[blocks] <= b.limit and size_in_blocks(r, int(blocks[0])+1) > b.limit
    (tmp_path/'old').write_bytes(V3)
    old = budget(inspect_q2bn(tmp_path/'old'), 700)
    assert dict(old.advice)['written anew, as version 4'] < 1120 and not old.fits
