"Byte-pair vocabularies of others: the tokens of their libraries, no byte lost, nothing damaged let in"
import io, json, struct

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from pi2nb.bpe import SPLITS, ByteBPETokenizer, ScoreTokenizer, cut_words, join_pairs
from pi2nb.llama import _BYTES, _of_json, _of_model
from pi2nb.tokenizer import UnigramTokenizer, _tokenizer_spec, tokenizer_from_dict

TEXT = "It's the first of 1234 tests, they'll see; naïve café — 你好, мир!  don't\n\n  stop:\tthe the then\r\n x=42;".split(' ')
STEPS = {'none': lambda: pre_tokenizers.ByteLevel(False, use_regex=False), 'gpt-2': lambda: pre_tokenizers.ByteLevel(False),
         'smollm': lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
         'llama-3': lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS['llama-3'][0]), 'isolated'), pre_tokenizers.ByteLevel(False, use_regex=False)])}


def trained(split):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = STEPS[split]()
    t.train_from_iterator([' '.join(TEXT)]*3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=list(_BYTES), special_tokens=['<|end|>', '<|en'], show_progress=False))
    return t


@pytest.fixture(scope='module', params=SPLITS)
def both(request, tmp_path_factory):
    t, path = trained(request.param), tmp_path_factory.mktemp('tok')/'tokenizer.json'
    t.save(str(path))
    return t, _of_json(path, 0)


words = st.lists(st.one_of(st.sampled_from(TEXT), st.sampled_from(['<|end|>', '<|en', '\u2003', '\x1c', '\x85', '½', '٣', "'S", '\n', '\r\n ', '\U0001f999', '\u0300']), st.text(max_size=4)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(words=words, sep=st.sampled_from(['', ' ', '  ']))
def test_the_tokens_of_the_library(both, words, sep):
    theirs, ours = both
    s = sep.join(words)
    assert ours.encode(s).tolist() == theirs.encode(s).ids


def test_the_way_to_cut_is_recognised(both):
    theirs, ours = both
    assert ours.split in SPLITS and ours.vocab_size == theirs.get_vocab_size() and ours.bos == 0


@settings(max_examples=200, deadline=None)
@given(s=st.one_of(st.binary(max_size=60), words.map(lambda w: ' '.join(w).encode())))
def test_no_byte_is_lost(both, s):
    tok = both[1]
    for t in (tok, SCORED):
        ids = t.encode(s)
        assert t.decode(ids) == s and t.n_bytes(ids) == len(s) and b''.join(t.decode([i]) for i in ids) == s


def test_a_file_keeps_it(both):
    for t in (both[1], SCORED):
        back = tokenizer_from_dict(json.loads(json.dumps(t.to_dict())))
        assert back == t and back != ByteBPETokenizer(list(map(chr, range(256))), []) and (back.encode('the naïve') == t.encode('the naïve')).all()


@settings(max_examples=200)
@given(st.text(max_size=30), st.sampled_from(list(SPLITS)))
def test_words_add_up(s, split): assert ''.join(cut_words(s, split)) == s


@given(st.lists(st.integers(0, 5), max_size=40), st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.integers(0, 4), max_size=30))
def test_the_heap_joins_as_the_loop_does(word, orders):
    table = {(a, b): (n, 10*max(a, b) + 10 + i % 10) for i, ((a, b), n) in enumerate(orders.items())}
    ids = list(word)
    while found := [(table[p][0], i, table[p][1]) for i, p in enumerate(zip(ids, ids[1:])) if p in table]:
        _, i, new = min(found)
        ids[i:i+2] = [new]
    assert join_pairs(word, lambda a, b: table.get((a, b))) == ids


def test_long_words_do_not_cost_their_square():
    looked = 0
    def pair(a, b):
        nonlocal looked
        looked += 1
        return (a, a + 1) if a == b < 12 else None
    assert join_pairs([0]*4096, pair) == [12] and looked < 4*4096


def test_a_missing_byte_is_refused():
    with pytest.raises(ValueError, match='the byte 65 is no token'): ByteBPETokenizer([chr(b) for b in range(256) if b != 65], [])


@pytest.mark.parametrize('change, says', [(dict(merges=[1, 2]), 'joins into no token'), (dict(merges=[1, 999]), 'joins into no token'), (dict(merges=[-1, 2]), 'joins into no token'),
                                          (dict(merges=[1]), 'shorter'), (dict(split='gpt-9'), 'no way to cut'), (dict(bos=256), 'is not in a vocabulary'), (dict(tokens=['€']*256), 'codec')])
def test_damaged_pairs_are_refused(change, says):
    d = dict(name='byte-bpe', tokens=list(map(chr, range(256))), merges=[], specials=[], split='gpt-2', bos=0, whole=False)
    assert tokenizer_from_dict(d).vocab_size == 256
    with pytest.raises(ValueError, match=says): tokenizer_from_dict(d | change)


def test_runs_cannot_ask_for_what_is_only_read():
    for spec in ('byte-bpe', 'score', 'byte-bpe-512'):
        with pytest.raises(ValueError, match='choose one of bytes, unigram-SIZE, bpe-SIZE'): _tokenizer_spec(spec)


PIECES = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), *' abc', 'ab', 'bc', 'abc', ' a', 'é']
SCORES = [0.]*263 + [-1., -1., -3., -2., 0.]
SCORED = ScoreTokenizer(PIECES, SCORES)


@pytest.mark.parametrize('text, want', [
    ('', []), (' a', [' a']), (' b', [' ', 'b']), (' abc', [' ', 'abc']), (' cab', [' ', 'c', 'ab']), (' ac', [' a', 'c']),
    ('é', ['é']), ('z', ['<0x7A>']), ('  a', [' ', ' a']), ('bcbc', ['bc', 'bc'])])
def test_text_is_joined_by_score(text, want): assert [PIECES[i] for i in SCORED.encode(text)] == want


def test_what_is_no_token_is_refused():
    for ids in ([-1], [268], [5, 10**9]):
        with pytest.raises(ValueError, match='a number from 0 to 267'): SCORED.decode(ids)


def test_special_tokens_have_no_text():
    assert SCORED.decode([1, *SCORED.encode('abc'), 2]) == b'abc' and SCORED.decode([]) == SCORED.decode([1]) == b''


def test_a_space_inside_a_token():
    t = ScoreTokenizer(PIECES + ['a b', 'a '], SCORES + [1., 2.])
    assert [t.tokens[i] for i in t.encode('ca bc')] == ['c', 'a b', 'c'] and t.decode(t.encode('ca bc')) == b'ca bc'


def vocabulary(pieces=PIECES, scores=SCORES):
    raw = [p.encode() for p in pieces]
    return struct.pack('<i', 9) + b''.join(struct.pack('<fi', s, len(p)) + p for p, s in zip(raw, scores))


def test_a_vocabulary_comes_back(tmp_path):
    (tmp_path/'tok.bin').write_bytes(vocabulary())
    got = ScoreTokenizer.load(tmp_path/'tok.bin')
    assert got == SCORED and (got.tokens, got.scores, got.vocab_size, got.bos, got.prefix) == (PIECES, SCORES, 268, 1, b' ')


@pytest.mark.parametrize('raw', [b'', b'abc', bytes(4), vocabulary()[:-1], vocabulary() + b'x', vocabulary()[:100], vocabulary(PIECES[:200]),
                                 vocabulary(PIECES[1:]), bytes(4) + struct.pack('<fi', 0, -9), bytes(4) + struct.pack('<fi', 0, 1) + b'\xff'])
def test_a_damaged_vocabulary_is_refused(tmp_path, raw):
    (tmp_path/'tok.bin').write_bytes(raw)
    with pytest.raises(ValueError, match='fetch it again'): ScoreTokenizer.load(tmp_path/'tok.bin')


@pytest.fixture(scope='module')
def sentences(tmp_path_factory):  # a vocabulary as Llama 2 has it, as SentencePiece and as `tokenizers` keep it
    import sentencepiece
    folder, out = tmp_path_factory.mktemp('spm'), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([' '.join(TEXT)]*3), model_writer=out, model_type='bpe', vocab_size=330, byte_fallback=True,
        character_coverage=.98, normalization_rule_name='identity', remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2)
    (folder/'tokenizer.model').write_bytes(out.getvalue())
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    vocab = {sp.id_to_piece(i): i for i in range(sp.get_piece_size())}
    pairs = sorted((vocab[t], t[:k], t[k:]) for t, i in vocab.items() if i > 258 for k in range(1, len(t)) if t[:k] in vocab and t[k:] in vocab)
    t = Tokenizer(models.BPE(vocab, [p[1:] for p in pairs], byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    t.save(str(folder/'tokenizer.json'))
    return sp, t, _of_model(folder/'tokenizer.model', 1), _of_json(folder/'tokenizer.json', 1)


@settings(max_examples=200, deadline=None)
@given(words=words.map(' '.join).filter(lambda s: s and '▁' not in s and '\0' not in s))
def test_scores_as_the_libraries_read_them(sentences, words):
    sp, theirs, a, b = sentences
    assert a.encode(' ' + words).tolist() == sp.encode(words) == theirs.encode(words).ids == b.encode(' ' + words).tolist()
    assert a.prefix == b.prefix == b' ' and a.decode(a.encode(words)) == words.encode()


def test_a_unigram_model_is_no_pair_model(tmp_path):
    import base64
    (tmp_path/'tokenizer.model').write_bytes(base64.b64decode(UnigramTokenizer.train(' '.join(TEXT), 320).model))
    with pytest.raises(ValueError, match='no byte-pair model'): _of_model(tmp_path/'tokenizer.model', 1)
    (tmp_path/'tokenizer.model').write_bytes(b'no')
    with pytest.raises(ValueError, match='no SentencePiece model'): _of_model(tmp_path/'tokenizer.model', 1)
