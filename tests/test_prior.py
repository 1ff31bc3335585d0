"A counted prior is a probability, documents do not know of each other, and dynamic evaluation never learns before it scores"
from math import log2
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from pi2nb import cli, dynamic
from pi2nb.dynamic import LEARNS, adaptable, document_bits, dynamic_bits, dynamic_nats
from pi2nb.evaluate import bits_per_byte, ngram_bits, token_nats
from pi2nb.model import LM, looks_ahead, recipe
from pi2nb.packed import PackedWeight
from pi2nb.prior import PriorLM, bigram_counts, bigram_prior, pack_prior, unpack_prior
from pi2nb.quantlinear import frozen_copy, hold_integers
from pi2nb.tokenizer import ByteTokenizer

TOK = ByteTokenizer()
TEXT = b"Full fathom five thy father lies; of his bones are coral made; those are pearls that were his eyes. "
tables = st.integers(1, 8).flatmap(lambda V: st.lists(st.sampled_from([0, 0, 0, 1, 2, 7, 1000, 10**9]), min_size=V*V, max_size=V*V).map(
    lambda c: np.array(c).reshape(V, V)))


def small(name='q2', **kw):
    torch.manual_seed(0)
    lm = LM(recipe(name).config(dim=32, heads=2, kv_heads=1, window=16, **kw))
    with torch.no_grad():
        for p in lm.parameters(): p.add_(torch.randn_like(p)*.1)
    return lm.eval()


@given(counts=tables, step=st.sampled_from([None, .125, .25, 1., 8.]))
def test_every_row_is_a_probability(counts, step):
    p = bigram_prior(counts if step is None else unpack_prior(pack_prior(counts, step)))
    assert p.min() > 0 and np.abs(p.sum(1) - 1).max() < 1e-12


@settings(deadline=None)
@given(train=st.binary(max_size=60), held=st.binary(min_size=1, max_size=20))
def test_prior_is_slow_counting(train, held):
    prior, cost = bigram_prior(bigram_counts(TOK, train)), 0
    for a, b in zip(b'\n' + held, held):
        p = 1/256
        for after in ([*train], [y for x, y in zip(b'\n' + train, train) if x == a]):
            N, T = len(after), len(set(after))
            if N: p = (after.count(b) + T*p)/(N + T)
        assert prior[a, b] == pytest.approx(p, rel=1e-12)
        cost -= log2(p)
    assert cost/len(held) == pytest.approx(ngram_bits(train, held, 2), rel=1e-9)


@given(counts=tables, step=st.floats(.13, 4))
def test_packed_counts_keep_what_occurred(counts, step):
    back = unpack_prior(pack_prior(counts, step))
    some = counts > 0
    assert (back > 0).tolist() == some.tolist()
    assert np.abs(np.log2(back[some]/counts[some])).max(initial=0) <= step/2*(1 + 1e-6)


def test_damaged_priors_are_refused():
    good = pack_prior(bigram_counts(TOK, TEXT))
    for bad in (b'', good[:7], good[:-1], good + b'\0', b'\0'*8, good[:4] + b'\0\0\xc0\x7f' + good[8:]):
        with pytest.raises(ValueError): unpack_prior(bad)
    for bad in (np.ones((2, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan), np.zeros((0, 0))):
        with pytest.raises(ValueError, match='square table'): bigram_prior(bad)


def test_prior_stands_beside_the_logits_at_every_position():
    lm, prior = small(), bigram_prior(bigram_counts(TOK, TEXT))
    ids = torch.tensor([list(TEXT)])
    want = lm(ids)[0] + .5*torch.from_numpy(prior).log()[ids].float()
    helped = PriorLM(lm, prior, .5)
    torch.testing.assert_close(helped(ids)[0], want)
    assert looks_ahead(helped) == 0
    assert bits_per_byte(PriorLM(lm, np.full((256, 256), 1/256)), TOK, TEXT).bpb == pytest.approx(bits_per_byte(lm, TOK, TEXT).bpb, abs=1e-6)
    torch.testing.assert_close(frozen_copy(helped)(ids)[0], want)


@pytest.mark.parametrize('kw', [{}, dict(chunk=32, stride=8), dict(chunk=32, reading='chunked')])
def test_documents_do_not_know_of_each_other(kw):
    lm, cuts = small(), [0, 30, 31, 77, len(TEXT)]
    alone = [bits_per_byte(lm, TOK, TEXT[a:b], **kw) for a, b in zip(cuts, cuts[1:])]
    s = document_bits(lm, TOK, TEXT, cuts[1:-1], **kw)
    assert (s.nats, s.tokens, s.bytes) == (sum(a.nats for a in alone), len(TEXT), len(TEXT))
    assert abs(bits_per_byte(lm, TOK, TEXT, **kw).nats - s.nats) > 1e-3
    assert document_bits(lm, TOK, TEXT, [0], **kw) == bits_per_byte(lm, TOK, TEXT, **kw)


def test_documents_lie_inside_the_text():
    for starts in ([-1], [len(TEXT) + 1]):
        with pytest.raises(ValueError, match='cannot start at byte'): document_bits(small(), TOK, TEXT, starts)
    with pytest.raises(ValueError, match='no text'): document_bits(small(), TOK, b'', [])


@pytest.mark.parametrize('name', ['q2', 'phase', 'qpf', 'pi2', 'dense'])
def test_scored_before_learned(name):
    "The first chunk costs what it costs the static model; no cost changes with the text after its chunk; the model stays as it was"
    lm = frozen_copy(small(name))
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    kw = dict(chunk=20, rate=.02)
    nats, static = dynamic_nats(lm, TOK, TEXT, **kw), token_nats(lm, TOK, TEXT, chunk=20)
    assert torch.equal(nats[:20], static[:20]) and not torch.equal(nats[20:], static[20:])
    other = dynamic_nats(lm, TOK, TEXT[:50] + TEXT[:49:-1], **kw)        # another text from the middle of a chunk on
    assert torch.equal(other[:50], nats[:50]) and not torch.equal(other[50:], nats[50:])
    after = lm.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None and not p.requires_grad for p in lm.parameters())


def test_symbols_stay_and_scales_move(monkeypatch):
    seen, real = [], adaptable
    def spy(*a): seen.append(real(*a)); return seen[-1]
    monkeypatch.setattr(dynamic, 'adaptable', spy)
    lm = small()
    fresh, _ = real(lm)
    s = dynamic_bits(lm, TOK, TEXT*3, chunk=50)
    assert dynamic_bits(lm, TOK, TEXT*3, chunk=50) == s
    copy, free = seen[0]
    pairs = [(a, b) for a, b in zip(fresh.modules(), copy.modules()) if isinstance(a, PackedWeight)]
    assert pairs and all(torch.equal(a.symbols, b.symbols) for a, b in pairs)
    assert any(not torch.equal(a.scales, b.scales) for a, b in pairs) and {id(p) for p in copy.parameters() if p.requires_grad} == {id(p) for p in free}
    assert (s.tokens, s.bytes) == (3*len(TEXT), 3*len(TEXT)) and s.bpb < bits_per_byte(lm, TOK, TEXT*3).bpb


def test_what_may_learn():
    parts = [{id(p) for p in adaptable(lm, [w])[1]} for lm in [small()] for w in LEARNS]
    assert all(parts)
    ids = torch.tensor([list(TEXT)])
    for lm in (small(), hold_integers(small('pi2')), small(tied=True)):
        torch.testing.assert_close(adaptable(lm)[0](ids)[0], lm(ids)[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match='no scales'): adaptable(nn.Linear(2, 2), ['scales'])
    with pytest.raises(ValueError, match='cannot learn'): adaptable(small(), ['symbols'])
    with pytest.raises(ValueError, match='smaller rate'): dynamic_nats(small(), TOK, TEXT*2, chunk=20, rate=1e30)


def test_columns_of_the_command_line(capsys):
    lm, two = small(), SimpleNamespace(starts=dict(test=[0, 40]), parts=dict(test=TEXT))
    cli._documents(lm, TOK, two, 'test', 64, None)
    cli._dynamic(lm, TOK, TEXT)
    want = [document_bits(lm, TOK, TEXT, [40], 64).bpb, dynamic_bits(lm, TOK, TEXT).bpb]
    assert [line.split('   ')[0] for line in capsys.readouterr().out.splitlines()] == [f'{b:.4f} bits per byte' for b in want]
    with pytest.raises(ValueError, match='not known'): cli._documents(lm, TOK, two, 'all', 64, None)
