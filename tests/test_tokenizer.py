"Trained tokenizers: lossless on anything, the same after a round trip through a dict, and known to runs by one word"
import copy, json
import numpy as np
import pytest
from pydoc_data.topics import topics
from pi2nb.tokenizer import *
from pi2nb.tokenizer import _tokenizer_spec

TEXT = '\n'.join(topics.values())[:100_000].encode()
NASTY = [b'', b'\n', b' ', b'  a ', '▁'.encode(), '▁▁ ▁a▁'.encode(), b'\xe2\x96', b'\x81 the', b'\0', b'<unk>', b'<s> </s>', b'<0x0A>',
         '\ufeffthe \ufffd'.encode(), 'ﬁ ① Å Å'.encode(), b'\xff\xfe the \xc3\xa9\xc3', b'a'*5000, b'\r\n\t\x0b\x0c\x85\xc2\xa0 \xe3\x80\x80']


@pytest.fixture(scope='module', params=['unigram-600', 'bpe-600'])
def tok(request): return make_tokenizer(request.param, TEXT)


def random_texts(n, seed=0):
    rng, out = np.random.RandomState(seed), []
    for i in range(n):
        k = rng.randint(0, 40)
        if i % 2: out.append(rng.bytes(k))
        else: a = rng.randint(len(TEXT)); out.append(TEXT[a:a+k] + rng.bytes(i % 3))
    return out


def test_lossless_on_ten_thousand_byte_strings(tok):
    for s in random_texts(10_000):
        ids = tok.encode(s)
        assert tok.decode(ids) == s and tok.n_bytes(ids) == len(s)


@pytest.mark.parametrize('s', NASTY)
def test_lossless_on_what_others_tidy_away(tok, s):
    ids = tok.encode(s)
    assert ids.dtype == np.uint16 and tok.decode(ids) == s and tok.n_bytes(ids) == len(s)
    assert b''.join(tok.decode([i]) for i in ids) == s, 'a token alone stands for the same bytes'


def test_many_lines(tok):
    long = b'\n'.join([b'to be', b'\xff', b''])*12_000
    ids = tok.encode(long)
    assert tok.decode(ids) == long and (ids[:9] == tok.encode(long[:99])[:9]).all()


def test_str_and_bytes_are_cut_alike(tok):
    s = TEXT[:3000].decode()
    assert (tok.encode(s) == tok.encode(s.encode())).all() and len(tok.encode(s)) < 2000
    assert tok.decode(tok.encode('a\udcffb')) == b'a\xffb'


def test_dict_copy_and_equality(tok):
    back = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    assert back == tok and (back.encode(TEXT) == tok.encode(TEXT)).all() and back.vocab_size == tok.vocab_size
    assert tok != ByteTokenizer() and tok.decode([tok.bos]) == b'\n'


def test_training_is_repeatable(tok): assert type(tok).train(TEXT, 600) == tok


def test_ids_are_checked(tok):
    for bad in ([-1], [tok.vocab_size]):
        with pytest.raises(ValueError, match='from 0 to'): tok.decode(bad)
        with pytest.raises(ValueError, match='from 0 to'): tok.n_bytes(bad)
    with pytest.raises(ValueError, match='integers'): tok.decode([1.5])
    with pytest.raises(TypeError): tok.encode(7)
    assert tok.decode([]) == b'' and tok.n_bytes([]) == 0


@pytest.mark.parametrize('spec', ['', 'byte', 'bytes-', 'bytes-512', 'bpe', 'bpe-', 'bpe-12', 'bpe-70000', 'bpe-1e3', 'morse-512', '-512', 'bpe--512'])
def test_impossible_specs(spec):
    with pytest.raises(ValueError, match='choose one of'): _tokenizer_spec(spec)


@pytest.mark.parametrize('d', [dict(name='bpe'), dict(name='unigram', model=''), dict(name='bpe', model='AAAA'), dict(name='bpe', model=7), dict(name='bpe', model='é')])
def test_damaged_models(d):
    with pytest.raises((ValueError, TypeError)): tokenizer_from_dict(d)


def test_a_vocabulary_may_come_out_smaller():
    t = UnigramTokenizer.train(b'to be or not to be\n'*5, 2000)
    assert t.vocab_size < 2000 and t.decode(t.encode(b'\xffbe')) == b'\xffbe'
