"The coder: any bytes come back, whatever the road; damage, another model and a cut file are refused"
import random, struct, zlib
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb import coder
from pi2nb.cli import app
from pi2nb.coder import (RansReader, compress, decode_tokens, decompress, encode_tokens, frequency_table, prove, rans_push, table_bits,
                         _cut, _measure, _push, _read)
from pi2nb.corpus import load_corpus
from pi2nb.exactlm import ExactLM, uncompiled
from pi2nb.model import LM, LMConfig
from pi2nb.q2bn import save_model
from pi2nb.quantlinear import frozen_copy
from pi2nb.tokenizer import ByteTokenizer, UnigramTokenizer
from typer.testing import CliRunner

TEXT, TOK = load_corpus('shakespeare').test, ByteTokenizer()


def model(seed=0, **kw):
    torch.manual_seed(seed)
    return frozen_copy(LM(LMConfig(**dict(layout='GQA, CfC', dim=16, heads=2, kv_heads=1, window=16) | kw)))


def by_model(data, lm, tok, **kw): # without training a model is no help, and Zstandard would take its place
    with pytest.MonkeyPatch.context() as m:
        m.setattr(coder, '_plain', lambda data: bytes(99*len(data) + 99))
        return compress(data, lm, tok, **kw)


LM0 = model()
SMALL = by_model(TEXT[:200], LM0, TOK)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 600), st.integers(1, 40), st.floats(0, 60), st.integers(0, 2**30))
def test_tables_sum_exactly_and_code_any_tokens(vocab, rows, spread, seed):
    g = torch.Generator().manual_seed(seed)
    x, want, bits = torch.randn(rows, vocab, generator=g)*spread, torch.randint(0, vocab, (rows,), generator=g), table_bits(vocab)
    f = frequency_table(x)
    assert f.min() >= 1 and (f.sum(1) == 2**bits).all()
    start, freq = _measure(x, want.int())
    at = torch.arange(rows), want
    assert start.tolist() == (f.cumsum(1) - f)[at].tolist() and freq.tolist() == f[at].tolist()
    data = _push(start, freq, bits)
    assert data == rans_push(start, freq, bits)
    for read in (_read, lambda r, x: r.pop(frequency_table(x), bits)):
        r = RansReader(data)
        assert torch.equal(read(r, x).long(), want) and r.done()


def test_a_large_vocabulary():
    x, want = torch.randn(3, 49152)*9, torch.tensor([0, 49151, 7])
    f, (start, freq) = frequency_table(x), _measure(x, want.int())
    assert (f.sum(1) == 2**28).all() and freq.tolist() == f[torch.arange(3), want].tolist()
    assert torch.equal(_read(RansReader(_push(start, freq, 28)), x).long(), want)


@pytest.mark.parametrize('data', [b'', b'x', bytes(range(256)), b'\0'*5000, TEXT[:9000], random.Random(1).randbytes(3000), TEXT[:400] + b'\xff\xfe' + TEXT[:300]],
                         ids='empty one all zeros lanes noise mixed'.split())
def test_bytes_come_back(data):
    small = compress(data, LM0, TOK)
    assert decompress(small, LM0, TOK) == data == decompress(by_model(data, LM0, TOK), LM0, TOK)
    assert len(small) <= len(data) + 90


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_come_back_with_any_tokenizer(data):
    for lm in ((LM0, TOK), PIECES):
        for work in (compress, by_model): assert decompress(work(data, *lm), *lm) == data


TOK2 = UnigramTokenizer.train(TEXT, 400)
PIECES = model(vocab=TOK2.vocab_size), TOK2


def test_the_model_is_used():
    assert SMALL[49] == 1 and compress(TEXT[:200], LM0, TOK)[49] == 0
    for lm, tok in ((LM0, TOK), PIECES):
        ids = tok.encode(TEXT[:3000])
        stream = encode_tokens(ExactLM(lm), tok, ids)
        assert np.array_equal(decode_tokens(ExactLM(lm), tok, stream, len(ids)), ids)
        assert len(stream) < 1.05*len(ids)*np.log2(tok.vocab_size)/8 + 8


def test_threads_roads_and_lanes_write_one_file(monkeypatch):
    monkeypatch.setattr(coder, '_cut', lambda n, exact: (5, -(-n//5)))
    ids, before, got = TOK.encode(TEXT[:603]), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            got.append(encode_tokens(ExactLM(LM0), TOK, ids))
    finally: torch.set_num_threads(before)
    with uncompiled(): got.append(encode_tokens(ExactLM(LM0), TOK, ids))
    monkeypatch.setattr(coder, '_coder', lambda: None)
    got.append(encode_tokens(ExactLM(LM0), TOK, ids))
    assert len(set(got)) == 1
    with uncompiled(): assert np.array_equal(decode_tokens(ExactLM(LM0), TOK, got[0], 603), ids)


def test_long_files_are_cut_into_blocks(monkeypatch):
    monkeypatch.setattr(coder, '_BLOCK', 500)
    small = by_model(TEXT[:1234], LM0, TOK, verify=True)
    assert struct.unpack_from('<I', small, 45)[0] == 3
    assert decompress(small, LM0, TOK) == TEXT[:1234]


@pytest.mark.parametrize('bit', range(8))
def test_every_changed_bit_is_refused(bit):
    for i in range(len(SMALL)):
        hurt = bytearray(SMALL)
        hurt[i] ^= 1 << bit
        with pytest.raises(ValueError): decompress(bytes(hurt), LM0, TOK)


def test_cut_files_and_other_models_are_refused():
    for n in range(len(SMALL)):
        with pytest.raises(ValueError): decompress(SMALL[:n], LM0, TOK)
    with pytest.raises(ValueError, match='damaged'): decompress(SMALL + b'x', LM0, TOK)
    for other in (model(1), model(window=15)):
        with pytest.raises(ValueError, match='another model'): decompress(SMALL, other, TOK)
    with pytest.raises(ValueError, match='PI2C'): decompress(b'PK' + SMALL, LM0, TOK)


@settings(max_examples=60, deadline=None)
@given(st.integers(45, len(SMALL)-5), st.binary(min_size=1, max_size=9))
def test_forged_files_end_in_one_sentence(at, new):
    forged = bytearray(SMALL[:-4])
    forged[at:at+len(new)] = new[:len(forged)-at]
    forged += struct.pack('<I', zlib.crc32(forged))
    try: assert decompress(bytes(forged), LM0, TOK) == TEXT[:200]
    except ValueError as e: assert len(str(e).splitlines()) == 1


def test_a_proof_holds_and_a_bad_one_does_not():
    p = prove(LM0, TOK, TEXT[:6000])
    assert p.same and p.holds and p.bytes == 6000 and abs(p.gap) < .002
    Proof = coder.Proof
    assert not Proof(False, 2., 2., 1, 1000, 2.).holds
    for coded in (2.1, 1.9): assert not Proof(True, coded, 2., 1, 10000, 2.).holds
    assert Proof(True, 1.9, 2., 1, 10000, 1.9).foreign and not Proof(True, 1.9, 2., 1, 10000, 1.95).foreign


def test_a_text_that_the_model_thinks_impossible(): # a table asks no more than 24 bits for a token, so the file proves no such score
    lm = LM(LMConfig(layout='CfC', dim=16))
    torch.nn.init.normal_(lm.head.weight, std=20.)
    p = prove(frozen_copy(lm), TOK, TEXT[:3000])
    assert p.same and p.coded < 25 < p.score and p.foreign and not p.holds


def test_lanes_take_no_more_memory_than_they_may():
    for lm in (LM0, model(layout='Recursive', depth=2, kv_heads=2), model(layout='Damped, Delta', window=16)): # what a state really takes
        e, count = ExactLM(lm), lambda s: sum(map(count, s)) if isinstance(s, (list, tuple)) else s.nbytes if isinstance(s, torch.Tensor) else 0
        _, state = e(torch.zeros(3, 40, dtype=torch.long))
        assert 3*e.state_bytes*.8 <= count(state) <= 3*e.state_bytes*4
    block = ExactLM(model(layout='GQA', dim=576, heads=9, kv_heads=3, window=2048)).state_bytes                # of SmolLM2-135M, which has 30
    for lanes, n in ((128, e.state_bytes), (5, 30*block), (1, 4*30*block), (1, 2**40)):
        e.state_bytes = n
        assert _cut(2**24, e) == (lanes, 2**24//lanes + (2**24 % lanes > 0))
    assert [_cut(n, e) for n in (1, 4096, 9000)] == [(1, 1), (1, 4096), (1, 9000)]


def test_a_model_of_large_state_keeps_few_lanes(monkeypatch):
    monkeypatch.setattr(coder, '_STATE', 3*ExactLM(LM0).state_bytes)
    monkeypatch.setattr(coder, '_LANE', 100)
    ids = TOK.encode(TEXT[:1003])
    stream = encode_tokens(ExactLM(LM0), TOK, ids)
    assert _cut(1003, ExactLM(LM0)) == (3, 335) and np.array_equal(decode_tokens(ExactLM(LM0), TOK, stream, 1003), ids)
    with uncompiled(): assert encode_tokens(ExactLM(LM0), TOK, ids) == stream


def test_the_encoder_refuses_a_model_without_numbers():
    e = ExactLM(LM0)
    e.head.scale = e.head.scale*float('nan')
    with pytest.raises(ValueError, match='NaN'): encode_tokens(e, TOK, TOK.encode(b'abc'))


def test_the_command(tmp_path):
    save_model(LM0, TOK, tmp_path/'m.q2bin')
    (tmp_path/'a.txt').write_bytes(TEXT[:3000])
    run = lambda *a: CliRunner().invoke(app, [str(x) for x in a])
    m = '--model', tmp_path/'m.q2bin'
    assert run('compress', tmp_path/'a.txt', *m, '--verify').exit_code == 0
    assert isinstance(run('compress', tmp_path/'a.txt', *m).exception, ValueError)                  # never over a file that is there
    (tmp_path/'a.txt').unlink()
    assert run('decompress', tmp_path/'a.txt.pi2', *m).exit_code == 0
    assert (tmp_path/'a.txt').read_bytes() == TEXT[:3000]
    (tmp_path/'b.pi2').write_bytes((tmp_path/'a.txt.pi2').read_bytes()[:-1])
    assert isinstance(run('decompress', tmp_path/'b.pi2', *m).exception, ValueError) and not (tmp_path/'b').exists()
    shown = run('eval', tmp_path/'m.q2bin', '--data', tmp_path/'a.txt', '--part', 'all', '--no-baselines', '--prove')
    assert shown.exit_code == 0 and 'decoded again: the same' in shown.output
