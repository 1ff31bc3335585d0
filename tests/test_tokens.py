"The arms of chapter 72e are models like any other, and words are charged for the tokens that touch them"
import copy
import numpy as np
import pytest
import torch
from pi2nb.model import LMConfig, looks_ahead
from pi2nb.quantlinear import frozen_copy
from pi2nb.tokenizer import ByteTokenizer, make_tokenizer
from pi2nb.tokens import *

SHAPE = dict(layout='GQA, CfC', dim=16, heads=2, kv_heads=1, vocab=300)


def model(**arm):
    torch.manual_seed(0)
    lm = MorphLM(LMConfig(**SHAPE), 3, 4, **arm)
    for p in lm.parameters():
        if p.requires_grad and not p.abs().sum(): torch.nn.init.normal_(p, std=.1)
    return lm


@pytest.mark.parametrize('arm', [{}, dict(rows=False), dict(turn=False)])
def test_chunks_steps_and_whole_agree_and_nothing_leaks(arm):
    lm, ids = model(**arm), torch.randint(250, 270, (2, 33), generator=torch.Generator().manual_seed(1))
    whole, end = lm(ids)
    for sizes in ([1]*33, [0, 5, 0, 20, 8]):
        out, s = [], None
        for piece in ids.split(sizes, 1):
            y, s = lm(piece, s)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=2e-5)
    assert looks_ahead(lm) == 0 and (model(turn=False).embed.turns == 0).all()
    for other in (copy.deepcopy(lm), frozen_copy(lm)): torch.testing.assert_close(other(ids)[0], whole, rtol=0, atol=1e-6)


def test_turning_changes_suffixes_only():
    a, b = model(), model(turn=False)
    b.embed.load_state_dict(a.embed.state_dict() | dict(turns=torch.zeros(7, 8)))
    ids = torch.tensor([[280, 97, 259, 260, 281]])
    same = (a.embed(ids)[0] - b.embed(ids)[0]).abs().sum(-1)[0] == 0
    assert same.tolist() == [True, True, False, False, True]


def test_the_cost_of_all_spans_is_the_cost_of_the_text():
    rng = np.random.RandomState(0)
    lengths, nats = rng.randint(1, 6, 200), rng.rand(200)
    end = np.cumsum(lengths)
    assert cost_at(nats, lengths, [(0, int(end[-1]))]) == pytest.approx(nats.sum())
    assert cost_at(nats, lengths, list(zip(end - lengths, end))) == pytest.approx(nats.sum())
    assert cost_at(nats, lengths, []) == 0


def test_inflections_are_new_words_of_known_roots():
    verbs = b' '.join(b'%b %bed %bs %bing' % (v, v, v, v) for v in b'load turn play fold kick walk'.split())
    text = b'He loads it. Snoring, he unfolds, plays and folder-wise walks; walkings\n'
    words = [text[a:b].strip().lower() for a, b in held_out_inflections(verbs, text)]
    assert set(words) <= {b'walkings', b'unfolds', b'folder', b'plays', b'loads'} and b'snoring' not in words and b'walks' not in words
    assert held_out_inflections(verbs, b'load turn\n') == []


def test_every_arm_learns():
    text = b' '.join(b'%b %bed %bs %bing' % (v, v, v, v) for v in b'load turn play fold kick walk'.split())*200
    tok = make_tokenizer('morph-300', text)
    for arm in (None, {}, dict(rows=False), dict(turn=False)):
        lm = train_on(tok, text, LMConfig(**SHAPE, code=None, gate_code=None, embed_code=None), arm, steps=12, batch=2, window=64)
        ids = torch.from_numpy(tok.encode(text[:200]).astype(np.int64))[None]
        assert torch.nn.functional.cross_entropy(lm(ids[:, :-1])[0][0], ids[0, 1:]) < .9*np.log(tok.vocab_size)
