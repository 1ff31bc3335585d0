"Turned and interleaved models: turns add up and come off, merges keep every part, and the record says what it must"
import json
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb.corpus import Corpus, load_corpus
from pi2nb.evaluate import bits_per_byte
from pi2nb.interleave import AverageLM, interleave_arms, merge_lms, turn_embedding, turn_layers
from pi2nb.model import LM, LMConfig, looks_ahead
from pi2nb.q2bn import load_model, save_model
from pi2nb.rotation import QUARTER, latent_rotation
from pi2nb.tokenizer import ByteTokenizer

PAIRS = [f'{s} | {t}' for s in ('own', 'same') for t in ('none', 'document', 'built in')] + ['table | none']
RECORD = json.loads((Path(__file__).resolve().parent.parent/'nbs'/'runs'/'65_interleave.json').read_text())
IDS = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))


def model(seed=0, **kw):
    torch.manual_seed(seed)
    kw = dict(layout='GQA, CfC', dim=16, heads=2, kv_heads=1, window=8, code=None, gate_code=None, embed_code=None) | kw
    lm = LM(LMConfig(**kw))
    with torch.no_grad():
        for p in lm.parameters(): p.add_(torch.randn_like(p)*.1)
    return lm


def logits(lm, ids=IDS):
    with torch.no_grad(): return lm(ids)[0]


@settings(max_examples=25, deadline=None)
@given(turns=st.lists(st.integers(-9, 9), max_size=3), which=st.sampled_from([turn_embedding, turn_layers]))
def test_turns_add_up(turns, which):
    many, one = model(), which(model(), sum(turns))
    for k in turns: assert which(many, k) is many
    assert torch.equal(logits(many), logits(one))
    if sum(turns) % 4 == 0: assert torch.equal(logits(many), logits(model()))
    else: assert not torch.allclose(logits(many), logits(model()), atol=1e-3)


@pytest.mark.parametrize('k', range(-1, 5))
def test_a_turned_embedding_is_a_turned_table(k):
    by_hand = model()
    with torch.no_grad(): by_hand.embed.weight.copy_(latent_rotation(by_hand.embed.weight, k*QUARTER))
    assert torch.equal(logits(turn_embedding(model(), k)), logits(by_hand))


@pytest.mark.parametrize('k', [.5, 1., '1', None, True, torch.tensor(1)])
@pytest.mark.parametrize('which', [turn_embedding, turn_layers])
def test_a_phase_is_an_integer(k, which):
    with pytest.raises(ValueError, match='whole number of quarter turns'): which(model(), k)


@pytest.mark.parametrize('which', [turn_embedding, turn_layers])
def test_an_odd_width_has_no_pairs(which):
    with pytest.raises(ValueError, match='dim must be even'): logits(which(model(layout='CfC', dim=5), 1))


def test_a_turn_does_nothing_to_layers_that_do_nothing():
    fresh = LM(model().config)
    assert torch.equal(logits(turn_layers(deepcopy(fresh), 1)), logits(fresh))


@pytest.mark.parametrize('every', [slice(0, 0), slice(1, None, 2), slice(None)])
def test_turned_layers_read_in_pieces_and_never_ahead(every):
    lm = turn_layers(model(layout='GQA, CfC, GQA'), 1, every)
    if every == slice(0, 0): assert torch.equal(logits(lm), logits(model(layout='GQA, CfC, GQA')))
    with torch.no_grad():
        (a, state), whole = lm(IDS[:, :4]), lm(IDS)[0]
        assert torch.allclose(torch.cat([a, lm(IDS[:, 4:], state)[0]], 1), whole, atol=1e-5)
    assert looks_ahead(lm) == 0


def test_a_gradient_passes_a_turn():
    lm = turn_layers(turn_embedding(model(), 1), 3)
    lm(IDS)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())


@pytest.mark.parametrize('layout, twice', [('GQA', 'GQA*2'), ('CfC*3', 'CfC*6'), ('GQA, CfC', 'GQA*2, CfC*2'), ('[GQA, CfC]*2', '[GQA*2, CfC*2]*2')])
def test_merge(layout, twice):
    a, b = model(0, layout=layout), model(1, layout=layout)
    before, m = [logits(a), logits(b)], merge_lms(a, b)
    assert m.config == replace(a.config, layout=twice) and len(m.blocks) == 2*len(a.blocks)
    for i, block in enumerate(m.blocks):
        for p, q in zip(block.parameters(), (a, b)[i % 2].blocks[i//2].parameters()): assert torch.equal(p, q) and p is not q
    assert torch.equal(m.embed.weight, a.embed.weight) and torch.equal(m.head.weight, a.head.weight)
    with torch.no_grad(): [p.zero_() for p in m.parameters()]
    assert torch.equal(logits(a), before[0]) and torch.equal(logits(b), before[1])


def test_merge_carries_turns_of_layers_and_not_of_the_embedding():
    a, b = model(0), model(1)
    assert torch.equal(logits(merge_lms(a, turn_embedding(deepcopy(b), 1))), logits(merge_lms(a, b)))
    turned = merge_lms(a, turn_layers(deepcopy(b), 1))
    assert torch.equal(logits(turned), logits(turn_layers(merge_lms(a, b), 1, slice(1, None, 2))))


@pytest.mark.parametrize('other', [dict(dim=32), dict(layout='GQA*2'), dict(window=4), dict(embed_code='int8'), dict(heads=1)])
def test_only_twins_merge(other):
    with pytest.raises(ValueError, match='differ in configuration'): merge_lms(model(), model(**other))


def test_a_merged_model_is_a_model(tmp_path):
    m = merge_lms(model(0, code='pi2-8'), model(1, code='pi2-8'))
    save_model(m, ByteTokenizer(), tmp_path/'m.q2bin')
    assert torch.equal(logits(load_model(tmp_path/'m.q2bin')[0]), logits(m))


def test_the_average_is_a_distribution_and_never_worse_than_the_mean():
    a, b, text = model(0), model(1), b'To be, or not to be: that is the question'
    both = AverageLM(a, b)
    assert torch.allclose(logits(both).exp().sum(-1), torch.ones(2, 11), atol=1e-5)
    assert torch.allclose(logits(AverageLM(a, a)), logits(a).log_softmax(-1), atol=1e-5)
    with torch.no_grad():
        x, state = both(IDS[:, :5])
        assert torch.allclose(torch.cat([x, both(IDS[:, 5:], state)[0]], 1), logits(both), atol=1e-5)
    score = [bits_per_byte(m, ByteTokenizer(), text).bpb for m in (both, a, b)]
    assert score[0] <= sum(score[1:])/2 and score[0] <= min(score[1:]) + 1


def test_one_token_and_an_empty_text():
    lm = merge_lms(turn_layers(model(0), 1), model(1))
    assert logits(lm, IDS[:1, :1]).shape == (1, 1, 256) and logits(lm, IDS[:0]).shape == (0, 11, 256)


TOY = dict(layout='GQA', dim=8, heads=1, kv_heads=1, context=16, batch=1)
TEXT = Corpus('toy', b'abcab '*200, b'abcab '*9, b'bcabc '*9)


def test_the_experiment_repeats():
    a, b = (interleave_arms(TEXT, 3, 1, 1, **TOY) for _ in range(2))
    assert {k: v for k, v in a.items() if k != 'cpu_s'} == {k: v for k, v in b.items() if k != 'cpu_s'}
    assert list(a['arms']) == PAIRS + ['itself', 'fresh', 'A goes on']
    assert all(len(v['curve']) == len(v['valid']) == 1 for v in a['arms'].values())


@pytest.mark.parametrize('wrong', [dict(width=3), dict(layout='LSTM'), dict(heal=0), dict(dim='wide')])
def test_the_experiment_refuses(wrong):
    with pytest.raises(ValueError): interleave_arms(TEXT, 0, **dict(steps=1, heal=1) | TOY | wrong)


def test_the_record():
    assert RECORD['seeds'] == [r['seed'] for r in RECORD['runs']] == [0, 1, 2] and 'dirty' not in RECORD['commit']
    assert RECORD['text'] == load_corpus('shakespeare').sha256() and RECORD['threads'] == 1
    for r in RECORD['runs']:
        arms = r['arms']
        assert list(arms) == PAIRS + ['itself', 'fresh', 'A goes on']
        for v in arms.values():
            assert all(isfinite(v[k]) and 0 < v[k] < 12 for k in ('alone', 'untouched', 'healed'))
            assert len(v['curve']) == r['heal']/10 and v['healed'] < v['untouched']
        assert arms['fresh']['untouched'] == arms['itself']['alone'] == arms['A goes on']['untouched'] == r['alone']
        assert r['settings']['model']['code'] == 'pi2-8' and r['settings']['steps'] == r['steps'] + r['heal']
    assert all(set(v['valid']) == {'1.0', '0.3', '3.0'} for v in RECORD['runs'][0]['arms'].values())
