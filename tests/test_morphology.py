"Roots and affixes: lossless tokens, a segmentation that the words teach each other, an embedding that is causal and carries its state"
import copy, json, time
import numpy as np
import pytest
import torch
from pydoc_data.topics import topics
from hypothesis import given, settings, strategies as st
from pi2nb.morphology import *
from pi2nb.morphology import _best_cut, _CHUNK, _Spans, _tree
from pi2nb.quantlinear import coded_state, frozen_copy, load_coded_state
from pi2nb.tokenizer import *

MANUAL = '\n'.join(topics.values()).encode()
TEXT = MANUAL[:60_000]


@pytest.fixture(scope='module')
def tok(): return make_tokenizer('morph-700', TEXT)


# ---- the tokenizer

def test_lossless_on_ten_thousand_byte_strings(tok):
    rng = np.random.RandomState(0)
    for i in range(10_000):
        k, a = rng.randint(0, 40), rng.randint(len(TEXT))
        s = rng.bytes(k) if i % 2 else TEXT[a:a+k] + rng.bytes(i % 3)
        ids = tok.encode(s)
        assert tok.decode(ids) == s and tok.n_bytes(ids) == len(s)


@pytest.mark.parametrize('s', [b'', b'\n', b'   ', b'  a ', '▁été’s o’'.encode(), b'\xe2\x96', b'\x81 the', b'\0\0', b'\xc3', b'\xc3\xa9\xc3',
    b'\xff' * 100, b'a'*5000, b"'s 's' it's'", '日本語 한국 Ελληνικά 😀'.encode(), b'\r\n\t\x0b'])
def test_lossless_on_odd_texts(tok, s):
    ids = tok.encode(s)
    assert ids.dtype == np.uint16 and tok.decode(ids) == s and tok.n_bytes(ids) == len(s)
    assert b''.join(tok.decode([i]) for i in ids) == s


def test_tokens_stand_in_the_order_prefixes_root_suffixes(tok):
    for chunk in set(_CHUNK.findall(MANUAL[:20_000])):
        kinds = tok.kinds[tok.encode(chunk)].tolist()
        assert 1 in kinds and kinds[-1] != 0 and kinds[0] != 2
        for a, b in zip(kinds, kinds[1:]): assert (a, b) not in ((0, 2), (1, 0), (2, 0))


def test_pieces_keep_their_classes(tok):
    known = dict(prefix=set(tok.pieces[256:256 + tok.prefixes]), suffix=set(tok.pieces[256 + tok.prefixes:][:tok.suffixes]),
                 root=set(tok.pieces[256 + tok.prefixes + tok.suffixes:]))
    assert {b's', b'ing', b'ed'} <= known['suffix'] and {b' the', b' statement'} <= known['root'] and len(known['root']) > 300
    assert len(tok.encode(b' the statement')) == 2


def test_the_cut_is_the_cheapest_of_all():
    rng, letters = np.random.RandomState(1), [(bytes([b]), 1, 50) for b in b'abc']
    for _ in range(60):
        extra = [(bytes(rng.choice(list(b'abc'), rng.randint(1, 4)).tolist()), int(rng.randint(3)), int(rng.randint(1, 90))) for _ in range(12)]
        pieces, word = letters + extra, bytes(rng.choice(list(b'abc'), rng.randint(1, 8)).tolist())
        def cheapest(rest, last): # every way, with the order checked step by step
            if not rest: return 0 if last in (1, 2) else float('inf')
            return min((c + cheapest(rest[len(p):], k) for p, k, c in pieces if rest.startswith(p)
                        and (k == 1 or k == 0 and last in (None, 0) or k == 2 and last in (1, 2))), default=float('inf'))
        ids = _best_cut(word, _tree(pieces))
        assert b''.join(pieces[i][0] for i in ids) == word and sum(pieces[i][2] for i in ids) == cheapest(word, None)


def test_dict_and_equality(tok):
    back = tokenizer_from_dict(json.loads(json.dumps(tok.to_dict())))
    assert back == tok == copy.deepcopy(tok) and (back.encode(MANUAL[-9000:]) == tok.encode(MANUAL[-9000:])).all()
    assert MorphTokenizer.train(TEXT, 700) == tok, 'training is repeatable'


def test_bad_vocabularies(tok):
    d = tok.to_dict()
    for change in (dict(prefixes=10**6), dict(costs=[1]), dict(suffixes=-1), dict(pieces=['€']*len(d['pieces']))):
        with pytest.raises(ValueError): tokenizer_from_dict(d | change)
    with pytest.raises(ValueError, match='some text'): MorphTokenizer.train(b'', 700)
    with pytest.raises(ValueError, match='256 bytes'): MorphTokenizer.train(TEXT, 256)


@pytest.mark.parametrize('text', [b'\xff\xfe\xfd', b'12 34\n56', b'a', b'one two three', b'aaaa aaab '*3, bytes(range(256))])
def test_small_and_odd_training_texts(text):
    t = MorphTokenizer.train(text, 300)
    assert t.vocab_size <= 300 and t.decode(t.encode(text + MANUAL[:500])) == text + MANUAL[:500]


def test_a_megabyte_per_second(tok):
    fresh, best = tokenizer_from_dict(tok.to_dict()), 0
    for f in (fresh.encode, fresh.encode, lambda x: fresh.decode(fresh.encode(x))):
        start = time.perf_counter()
        f(MANUAL)
        best = max(best, len(MANUAL)/1e6/(time.perf_counter() - start))
    assert best > .5, 'far from the megabyte per second that an idle core reaches'


# ---- the segmentation

WORDS = [a + b for a in ('walk', 'talk', 'jump', 'kick', 'load', 'turn', 'play', 'fold') for b in ('', 's', 'ed', 'ing', 'er')] + \
        ['un' + b for b in ('loaded', 'turned', 'folded', 'played')]


def test_regular_words_are_cut_where_they_join():
    m = Morphology([w.encode() for w in WORDS])
    cuts = dict(zip(WORDS, m.segment([w.encode() for w in WORDS])))
    assert cuts['walking'] == [(b'walk', 1), (b'ing', 2)] and cuts['kicks'] == [(b'kick', 1), (b's', 2)] and cuts['turn'] == [(b'turn', 1)]
    assert cuts['unfolded'] == [(b'un', 0), (b'fold', 1), (b'ed', 2)]
    assert m.segment([b'blorping'])[0][-1] == (b'ing', 2), 'a root that nobody has seen keeps its suffix'


def test_cuts_join_to_their_words_in_order():
    words = sorted(set(_CHUNK.findall(TEXT.lower())))[:3000]
    words = [w.strip() for w in words if w.strip() and b'\0' not in w]
    for w, c in zip(words, Morphology(words[:1500]).segment(words)):
        assert b''.join(p for p, _ in c) == w and c[0][1] != 2 and c[-1][1] != 0


@pytest.mark.parametrize('words', [[b'a'], [b'ab', b'ab'], [b'x'*30, b'y'*31], [b'one', b'two', b'six'], [bytes([i, i + 1]) for i in range(1, 200)]])
def test_hopeless_lists_stay_finite(words):
    m = Morphology(words)
    assert np.isfinite(m.new) and np.isfinite(m.counts).all()
    assert [b''.join(p for p, _ in c) for c in m.segment(words + [b'', b'z'*99])[:len(words)]] == words


def test_bad_words():
    with pytest.raises(ValueError, match='no word'): Morphology([])
    with pytest.raises(ValueError, match='zero bytes'): Morphology(['text'])
    with pytest.raises(ValueError, match='zero bytes'): Morphology([b'a']).segment([b'a\0'])


def test_spans_number_every_piece():
    words = [b'abab', b'b', b'ba', b'abc']
    s, name = _Spans(words), {}
    for (j, l), at in s.at.items():
        for i in range(s.first[j], s.N):
            p = s.words[i][j-l:j]
            assert name.setdefault(s.piece[at.start + i - s.first[j]], p) == p
    assert len(set(name.values())) == len(name) == len(s.keys)


# ---- the embedding

SIZES = dict(vocab=300, dim=8, prefixes=3, suffixes=4)

def embedding(code=None, seed=0):
    torch.manual_seed(seed)
    return MorphEmbedding(**SIZES, code=code)

def some_ids(seed, B, T): return torch.randint(250, 270, (B, T), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_chunks_steps_and_whole_agree(seed, B, sizes):
    emb, ids = embedding(), some_ids(seed, B, sum(sizes))
    whole, end = emb(ids)
    for parts in (sizes, [1]*sum(sizes)):
        state, out = None, [whole[:, :0]]
        for piece in ids.split(parts, 1) if sum(parts) else []:
            y, state = emb(piece, state)
            out.append(y)
        torch.testing.assert_close(torch.cat(out, 1), whole, rtol=0, atol=1e-5)
        if state: torch.testing.assert_close(state, end, rtol=0, atol=1e-5)


def test_causal_and_a_planted_leak_is_seen():
    emb, a = embedding(), some_ids(3, 2, 40)
    b = a.clone()
    b[:, 25:] = 250 + (b[:, 25:] - 249) % 20
    assert torch.equal(emb(a)[0][:, :25], emb(b)[0][:, :25])
    assert not torch.equal(emb(a.flip(1))[0].flip(1)[:, :25], emb(b.flip(1))[0].flip(1)[:, :25])


def test_words_far_apart_do_not_meet():
    "The turns of one word are not rounded by the thousands before it"
    emb, word = embedding(), torch.tensor([[256, 280, 259, 260]])
    far = torch.cat([some_ids(0, 1, 5000), torch.tensor([[97]]), word], 1)
    torch.testing.assert_close(emb(far)[0][:, -4:], emb(word)[0], rtol=0, atol=1e-6)


def test_state_is_float32_under_autocast_and_of_constant_size():
    emb = embedding('int8')
    with torch.autocast('cpu', torch.bfloat16):
        for T in (0, 1, 7):
            x, state = emb(some_ids(1, 2, T))
            assert x.shape == (2, T, 8) and [tuple(s.shape) for s in state] == [(2, 8), (2, 4), (2,)]
            assert all(s.dtype == torch.float32 for s in state)


def test_gradients():
    emb = embedding().double()
    ids = torch.tensor([[280, 259, 256, 257, 281, 260, 261, 97], [259, 256, 256, 280, 262, 99, 258, 282]])
    f = lambda w, t: torch.func.functional_call(emb, dict(weight=w, turns=t), (ids,))[0]
    assert torch.autograd.gradcheck(f, (emb.weight, emb.turns))


def test_copies_files_and_no_affixes():
    emb, ids = embedding('int8'), some_ids(5, 2, 9)
    twin = embedding('int8', seed=1)
    twin.load_state_dict(emb.state_dict())
    for other in (twin, copy.deepcopy(emb), frozen_copy(emb)): assert torch.equal(other(ids)[0], emb(ids)[0])
    assert torch.equal(load_coded_state(embedding('int8', seed=2), coded_state(emb))(ids)[0], emb(ids)[0])
    plain = MorphEmbedding(300, 8, 0, 0, code=None)
    assert torch.equal(plain(ids)[0], plain.weight[ids])


def test_bad_sizes():
    with pytest.raises(ValueError, match='even number'): MorphEmbedding(300, 7, 1, 1)
    for p, s in ((-1, 2), (40, 9)):
        with pytest.raises(ValueError, match='do not fit'): MorphEmbedding(300, 8, p, s)
