"Bits per byte against answers that are known beforehand, and the bars that a model must beat"
from collections import Counter
from math import lgamma, log, log2

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from pi2nb.corpus import load_corpus
from pi2nb.evaluate import BASELINES, Score, baselines, bits_per_byte, ngram_bits, token_nats, unigram_nats
from pi2nb.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
PLAYS = load_corpus('shakespeare')
TEXT = PLAYS.test[:2500]
READINGS = [dict(chunk=300), dict(chunk=300, reading='chunked'), dict(chunk=300, stride=70),
            dict(chunk=64, reading='sliding', batch=3)]


class PairLM(nn.Module):
    def __init__(self, table): super().__init__(); self.table = nn.Parameter(table)
    def forward(self, ids, state=None): return self.table[ids], state


class CountingLM:
    def __call__(self, ids, state=None):
        seen = F.one_hot(ids, 256).double().cumsum(1) + (1 if state is None else state)
        return seen.log(), seen[:, -1:]


class TinyGRU(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(256, 12), nn.GRU(12, 12, batch_first=True), nn.Linear(12, 256)
    def forward(self, ids, state=None):
        y, state = self.gru(self.embed(ids), state)
        return self.head(y), state


@pytest.mark.parametrize('kw', READINGS)
def test_uniform_is_eight(kw):
    s = bits_per_byte(PairLM(torch.zeros(256, 256)), TOK, TEXT, **kw)
    assert (s.tokens, s.bytes) == (2500, 2500) and abs(s.bpb - 8) < 1e-12


@pytest.mark.parametrize('kw', READINGS)
def test_pair_table_is_its_cross_entropy(kw):
    row = bytes([TOK.bos]) + TEXT
    pairs, firsts = Counter(zip(row, row[1:])), Counter(row[:-1])
    known = -sum(n*log2(n/firsts[a]) for (a,_),n in pairs.items())/len(TEXT)
    table = torch.full((256, 256), -torch.inf)
    for (a,b),n in pairs.items(): table[a, b] = log(n/firsts[a])
    assert abs(bits_per_byte(PairLM(table), TOK, TEXT, **kw).bpb - known) < 1e-6
    wrong = bits_per_byte(PairLM(table.T.contiguous()), TOK, TEXT, **kw).bpb # answers and questions swapped
    assert wrong > known + 1


@pytest.mark.parametrize('kw', READINGS)
def test_no_looking_ahead(kw):
    assert bits_per_byte(PairLM(torch.eye(256)*30), TOK, TEXT, **kw).bpb > 30


@pytest.mark.parametrize('chunk', [1, 7, 1000, 5000])
def test_stream_is_the_closed_form(chunk):
    start, n = 1 + np.eye(256)[TOK.bos], np.bincount(list(TEXT), minlength=256)
    nats = lgamma(len(TEXT) + 257) - lgamma(257) - sum(lgamma(a + k) - lgamma(a) for a,k in zip(start, n))
    assert abs(bits_per_byte(CountingLM(), TOK, TEXT, chunk=chunk).nats/nats - 1) < 1e-12


def test_stream_is_one_forward():
    torch.manual_seed(0)
    gru = TinyGRU()
    ids = torch.tensor([TOK.bos, *TEXT])
    one = F.cross_entropy(gru(ids[None, :-1])[0][0].double(), ids[1:], reduction='none').detach()
    for chunk in (5, 333, 2500, 9999):
        torch.testing.assert_close(token_nats(gru, TOK, TEXT, chunk=chunk), one, rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 60), chunk=st.integers(1, 20), stride=st.integers(1, 20), batch=st.integers(1, 5))
def test_windows_score_each_token_once_with_context(n, chunk, stride, batch):
    "A model whose logits hold how much of the window it has read shows the context of every token"
    class Depth:
        def __call__(self, ids, state=None):
            depth = torch.arange(1, ids.shape[1] + 1)[None, :, None].expand(*ids.shape, 1)
            return torch.cat([torch.zeros(*ids.shape, 255), torch.log(255*(torch.exp(depth.float()) - 1))], -1), None
    stride = min(stride, chunk)
    nats = token_nats(Depth(), TOK, b'\0'*n, chunk=chunk, stride=stride, batch=batch)
    depth = nats - log(255) # the answer 0 costs log(255) + depth
    assert len(nats) == n
    want = [i + 1 if i < chunk else chunk - stride + 1 + (i - chunk) % stride for i in range(n)]
    assert depth.tolist() == pytest.approx(want, abs=1e-3)


def test_sliding_by_a_whole_window_is_chunked():
    torch.manual_seed(1)
    gru = TinyGRU()
    cut = token_nats(gru, TOK, TEXT, chunk=100, reading='chunked')
    assert torch.equal(token_nats(gru, TOK, TEXT, chunk=100, stride=100), cut)
    assert not torch.equal(token_nats(gru, TOK, TEXT, chunk=100, stride=30), cut)


def test_model_is_left_as_it_was():
    gru = TinyGRU().train()
    nats = token_nats(gru, TOK, TEXT[:100])
    assert gru.training and nats.dtype == torch.float64 and not nats.requires_grad
    nats += 1 # an ordinary tensor


class Nibbles(ByteTokenizer):
    name, vocab_size, bos = 'nibbles', 16, 0
    def encode(self, s): b = super().encode(s); return np.stack([b >> 4, b & 15], -1).reshape(-1)
    def n_bytes(self, ids): return len(ids)//2


def test_other_tokenizers():
    s = bits_per_byte(PairLM(torch.zeros(16, 16)), Nibbles(), 'Prospéro')
    assert (s.tokens, s.bytes) == (18, 9) and abs(s.bpb - 8) < 1e-12 and abs(s.nats_per_token - log(16)) < 1e-12
    class Deaf(Nibbles):
        def encode(self, s): return super().encode(s[1:])
    with pytest.raises(ValueError, match='changes the text'): bits_per_byte(PairLM(torch.zeros(16, 16)), Deaf(), TEXT)


@pytest.mark.parametrize('kw', [dict(data=b''), dict(chunk=0), dict(batch=0), dict(stride=0), dict(stride=5, chunk=4),
                                dict(stride=2, reading='chunked'), dict(reading='x')])
def test_impossible_requests(kw):
    with pytest.raises(ValueError) as e: bits_per_byte(PairLM(torch.zeros(256, 256)), TOK, **{'data': TEXT, **kw})
    assert '\n' not in str(e.value)


def test_nan_is_refused_and_impossible_is_infinite():
    sick = PairLM(torch.full((256, 256), torch.nan))
    with pytest.raises(ValueError, match='no number for token 0'): bits_per_byte(sick, TOK, TEXT)
    never = torch.zeros(256, 256); never[:, ord('e')] = -torch.inf
    assert bits_per_byte(PairLM(never), TOK, TEXT).bpb == float('inf')


def test_score():
    s = Score(8*log(2)*10, 5, 10)
    assert abs(s.bpb - 8) < 1e-12 and abs(s.nats_per_token - 16*log(2)) < 1e-12
    assert str(s).startswith('8.0000 bits per byte')


# counting

def slow_ngram(train, held, order):
    n = order - 1
    train, held, cost = b'\n'*n + train, b'\n'*n + held, 0
    for i in range(n, len(held)):
        p = 1/256
        for k in range(order):
            after = Counter(train[j] for j in range(n, len(train)) if train[j-k:j] == held[i-k:i])
            if after: p = (after[held[i]] + len(after)*p)/(after.total() + len(after))
        cost -= log2(p)
    return cost/(len(held) - n)


some = st.text('ab\n', max_size=40).map(str.encode) | st.binary(max_size=20)

@settings(max_examples=100, deadline=None)
@given(train=some, held=some.filter(len), order=st.integers(1, 5))
def test_ngrams_agree_with_the_slow_way(train, held, order):
    assert ngram_bits(train, held, order) == pytest.approx(slow_ngram(train, held, order), rel=1e-9)


def test_ngram_probabilities_sum_to_one():
    for context in (b'th', b'\xff\xfe', b'qu'):
        bits = [ngram_bits(TEXT, context + bytes([c]), 3)*3 - ngram_bits(TEXT, context, 3)*2 for c in range(256)]
        assert sum(2**-b for b in bits) == pytest.approx(1, abs=1e-9)


def test_unigram_nats():
    assert unigram_nats(b'aabb') == pytest.approx(log(2)) and unigram_nats(np.array([3, 3])) == 0
    assert unigram_nats(PLAYS.train)/log(2) == pytest.approx(4.765, abs=2e-3)
    with pytest.raises(ValueError): unigram_nats(b'')


def test_bars_on_the_held_out_plays():
    cheap = ['unigram', 'bigram', 'trigram', 'zstd-22', 'xz-9e']
    known = {PLAYS.test: (4.776, 3.552, 2.820, 2.939, 2.907), PLAYS.valid: (4.764, 3.644, 2.872, 2.896, 2.866)}
    for held,want in known.items():
        got = baselines(PLAYS.train, held, only=cheap)
        assert list(got) == cheap and list(got.values()) == pytest.approx(want, abs=.01)


def test_primed_compressors_know_what_they_read():
    train, held = PLAYS.train[:300_000], PLAYS.train[100_000:110_000]
    got = baselines(train, held)
    assert tuple(got) == BASELINES and got['uniform'] == 8
    assert got['xz-9e primed'] < .1 and got['zstd-22 primed'] < .1 and min(got['xz-9e'], got['zstd-22']) > 2
    assert baselines(train, held, only=['zstd-22 primed'], prime=50_000)['zstd-22 primed'] > 1


def test_baselines_without_training_text():
    got = baselines(b'', b'full fathom five')
    assert got['6-gram'] == pytest.approx(8) and got['zstd-22'] == got['zstd-22 primed'] and set(got) == set(BASELINES)
    with pytest.raises(ValueError, match='unigram'): baselines(b'a', b'b', only=['gzip'])
    with pytest.raises(ValueError): baselines(b'a', b'')
