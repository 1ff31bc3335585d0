"Shards, streams and what is made ahead: no token lost or doubled, no document skipped, one sentence per mistake"
import hashlib, json, struct, sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pi2nb import shards
from pi2nb.cli import main
from pi2nb.corpus import Corpus, load_corpus
from pi2nb.evaluate import bits_per_byte
from pi2nb.shards import (Packed, Prefetch, StreamSampler, TokenFiles, map_shard, open_corpus, pack_documents, read_shards, text_of,
                          write_shard, write_shards)
from pi2nb.tokenizer import BPETokenizer, ByteTokenizer
from pi2nb.train import Interrupted, Trainer, configure, resume

TOK = ByteTokenizer()
TOY = dict(layout='GQA, CfC', dim=16, heads=2, kv_heads=1, window=16, context=16, batch=6, micro=6, steps=12, log_every=4, eval_every=12, eval_bytes=64, save_every=5)


class Marked(ByteTokenizer):
    "Writes a byte before every document that is no text"
    name, bos = 'marked', 0


@pytest.fixture(scope='module')
def small():
    plays = load_corpus('shakespeare')
    return Corpus('small', plays.train[:30_000], plays.valid[:2000], plays.test[:2000])


@pytest.fixture
def stream(tmp_path):
    "A data set of numbered documents, with parts of its own, and its name"
    for part, ids in dict(train=range(100, 180), validation=range(300, 320), test=range(400, 420)).items():
        rows = [json.dumps(dict(text=f'<{i}> ' + 'word '*(i % 9), id=i)) for i in ids]
        for k in range(2 if part == 'train' else 1):
            (tmp_path/'set').mkdir(exist_ok=True)
            (tmp_path/f'set/{part}-{k}.jsonl').write_text('\n'.join(rows[k::2] if part == 'train' else rows) + '\n')
    return f'stream:{tmp_path}/set'


def refused(f, *words, error=ValueError):
    with pytest.raises(error) as e: f()
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), e.value


# files

@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=9), min_size=1, max_size=5), a=st.integers(-3, 40), b=st.integers(-3, 40))
def test_files_are_one_row(tmp_path_factory, rows, a, b):
    folder = tmp_path_factory.mktemp('rows')
    for i, r in enumerate(rows):
        write_shard(folder/f'{i}.bin', r)
        assert (folder/f'{i}.bin').read_bytes() == struct.pack('<256i', 20240520, 1, len(r), *[0]*253) + struct.pack(f'<{len(r)}H', *r)
        assert map_shard(folder/f'{i}.bin').tolist() == r
    files, row = TokenFiles([folder/f'{i}.bin' for i in range(len(rows))]), sum(rows, [])
    assert files[a:b].tolist() == row[a:b] and files[a:b].dtype == np.uint16 and len(files) == len(row)
    assert files.tail()[a:b].tolist() == row[1:][a:b] and files[:].tolist() == row


@pytest.mark.parametrize('data', [b'', b'\x88\xd7\x34\x01', struct.pack('<3i', 20240520, 1, 2), struct.pack('<256i', 20240521, 1, 0, *[0]*253),
    struct.pack('<256i', 20240520, 2, 1, *[0]*253) + b'ab', struct.pack('<256i', 20240520, 1, 2, *[0]*253) + b'abc',
    struct.pack('<256i', 20240520, 1, -1, *[0]*253), struct.pack('<256i', 20240520, 1, 0, *[0]*253), struct.pack('<256i', 20240520, 1, 1, *[0]*253) + b'abc'])
def test_what_is_no_shard_is_refused(tmp_path, data):
    (tmp_path/'x.bin').write_bytes(data)
    refused(lambda: map_shard(tmp_path/'x.bin'), 'x.bin')


# documents

DOCS = st.lists(st.binary(max_size=12) | st.sampled_from([b'a\n', b'\n', b'\n\n', b'two\nlines']), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(docs=DOCS, size=st.integers(4, 20))
def test_nothing_is_lost_or_doubled_on_the_way_to_disk(tmp_path_factory, docs, size):
    folder, starts, text = tmp_path_factory.mktemp('docs'), [], b''
    for d in filter(None, docs): # as chapter 32 lays them
        text += b'\n'*(not text.endswith(b'\n') and bool(text))
        starts.append(len(text))
        text += d
    if not text: return
    c = Corpus('drawn', text, b'valid', b'test', starts=dict(train=starts))
    about = write_shards(c, TOK, folder, size=size)
    back = read_shards(folder)
    assert {k: text_of(p) for k, p in back.parts.items()} == c.parts and back.tokenizer('bytes') == TOK
    assert [len(p) for p in back.parts.values()] == [about['parts'][k]['bytes'] for k in c.parts] == [len(t) for t in c.parts.values()]
    assert all(len(map_shard(f)) == size for f in back.files['train'][:-1]) and len(back.train.ids) == len(text) + 1
    marked = np.concatenate(list(pack_documents(docs, Marked())))
    assert marked.tobytes() == b''.join(b'\0' + d for d in docs if d)


def test_shards_train_to_the_same_weights_as_the_text(tmp_path, small):
    tok = small.tokenizer('bpe-400')
    write_shards(small, tok, tmp_path/'tokens', size=7000)
    ran = []
    for i, corpus in enumerate((small, open_corpus(tmp_path/'tokens'))):
        t = Trainer(configure(**TOY | dict(steps=5), tokenizer='bpe-400'), tmp_path/f'{i}', corpus, 'cpu')
        t.fit(show=False)
        ran.append((t.lm.state_dict(), t.rows[-1]['bpb'], bits_per_byte(t.lm, t.tok, corpus.test), [len(p) for p in corpus.parts.values()]))
    a, b = ran
    assert a[1:] == b[1:] and all(torch.equal(v, b[0][k]) for k, v in a[0].items())


def test_a_boundary_that_is_no_text_costs_and_counts_nothing(tmp_path):
    import sentencepiece
    docs = [f'{i} men went  to mow, {i*i} went to mow a meadow.' for i in range(300)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(docs), model_prefix=str(tmp_path/'sp'), model_type='bpe', vocab_size=330, byte_fallback=True,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, add_dummy_prefix=False, hard_vocab_limit=False, minloglevel=2)
    sp = sentencepiece.SentencePieceProcessor(f'{tmp_path}/sp.model')
    for part, some in dict(train=docs[20:], val=docs[:20]).items():
        write_shard(tmp_path/f'fineweb_{part}_000000.bin', [i for d in some for i in [1, *sp.encode(d)]])
    c = read_shards(tmp_path)
    for ask in (lambda: c.valid, lambda: c.tokenizer('bytes'), lambda: c.tokenizer('bpe-300')): refused(ask, '--set tokenizer=FILE.model')
    tok = c.tokenizer(f'{tmp_path}/sp.model')
    text = ''.join(sp.decode(sp.encode(d)) for d in docs[:20]) # two blanks became one when the shards were written
    assert text_of(c.valid).decode() == text_of(c.test).decode() == text and tok.encode(docs[0]).tolist() != sp.encode(docs[0])
    def uniform(x, state=None): return torch.zeros(*x.shape, tok.vocab_size), state
    score = bits_per_byte(uniform, tok, c.valid)
    assert (score.tokens, score.bytes) == (len(c.valid.ids) - 1, len(text.encode()))
    assert score.nats == pytest.approx(score.tokens*np.log(tok.vocab_size))
    assert c.windows(tok, 2, 8, 0).token_bytes == pytest.approx(len(c.train)/(len(c.train.ids) - 1))


def test_a_folder_that_is_not_whole(tmp_path, small):
    write_shards(small, TOK, tmp_path/'a', size=9000)
    part = read_shards(tmp_path/'a/*_[vt]*_*0.bin')                    # some of the shards, by a pattern
    assert len(part.train) == 8999 and part.train.ids[1:9].tobytes() == small.train[:8].decode().encode('utf-16-le')
    write_shard(tmp_path/'a/text_test_000000.bin', [1, 2])
    refused(lambda: read_shards(tmp_path/'a').test, '2 tokens instead of 2,001')
    (tmp_path/'a/text_train_000001.bin').unlink()
    refused(lambda: read_shards(tmp_path/'a'), 'text_train_000001.bin', 'write them again')
    for other in ('[]', '{}', '{"parts":'):
        (tmp_path/'a/text.json').write_text(other)
        refused(lambda: read_shards(tmp_path/'a/text_*.bin'), 'does not describe shards')
    (tmp_path/'a/other_train_000001.bin').write_bytes((tmp_path/'a/text_train_000000.bin').read_bytes())
    refused(lambda: read_shards(tmp_path/'a'), 'other, text')
    (tmp_path/'a/text_val_000000.bin').unlink()
    refused(lambda: read_shards(tmp_path/'a'), 'valid', error=FileNotFoundError)
    refused(lambda: write_shards(Corpus('hollow', b'text', b'', b'text'), TOK, tmp_path/'c'), 'no document for text_val')
    (tmp_path/'b').mkdir()
    refused(lambda: open_corpus(tmp_path/'b'), 'holds no', error=FileNotFoundError)


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path, small, monkeypatch):
    real, n = shards.write_atomic, []
    def full(path, data):
        n.append(path)
        if len(n) == 3: raise OSError(28, 'No space left on device')
        return real(path, data)
    monkeypatch.setattr(shards, 'write_atomic', full)
    with pytest.raises(OSError): write_shards(small, TOK, tmp_path/'a', size=9000)
    assert sorted(p.name for p in (tmp_path/'a').iterdir()) == ['text_train_000000.bin', 'text_train_000001.bin']


# streams

def rows_of(docs): return datasets.IterableDataset.from_generator(lambda: ({'text': d} for d in docs))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), batch=st.integers(1, 4), context=st.integers(1, 12), buffer=st.integers(1, 5), seed=st.integers(0, 9), at=st.integers(0, 9))
def test_a_stream_is_read_once_an_epoch_and_from_any_place(n, batch, context, buffer, seed, at):
    docs = [f'{i}{"x"*(i*i % 7)}' for i in range(n)]
    a, b = (StreamSampler(rows_of(docs), TOK, batch, context, seed, buffer) for _ in range(2))
    xs, ys, states = [], [], []
    for i in range(10):
        states.append(json.loads(json.dumps(a.state_dict())))
        x, y = a.batch_at(i)
        xs.append(x.flatten()); ys.append(y.flatten())
    xs, ys = torch.cat(xs), torch.cat(ys)
    assert torch.equal(xs[1:], ys[:-1])                                 # every token is read once and predicted once
    words = bytes(xs.tolist()).split(b'\n')[1:-1]                       # the last one may be cut
    for e in range(0, len(words) - n + 1, n): assert sorted(words[e:e + n]) == sorted(d.encode() for d in docs)
    b.load_state_dict(states[at])
    assert torch.equal(torch.cat([b.batch_at(i)[0].flatten() for i in range(at, 10)]), xs[at*batch*context:])
    assert torch.equal(b.batch_at(at)[0].flatten(), xs[at*batch*context:(at + 1)*batch*context])      # a step back


def reading(t, rank, world):
    "What one worker of several reads in its next step, through the trainer's own code"
    seen, t.rank, t.world = [], rank, world
    def objective(lm, a, b):
        seen.append(a)
        return next(lm.parameters()).sum()*0, dict(ce=0.)
    t.objective = objective
    t._backward()
    t.step += 1
    return seen


def test_other_workers_go_on_without_a_document_lost_or_read_twice(tmp_path, stream):
    cfg, worlds, rows = configure(**TOY, data=stream), (2, 2, 3, 1, 6, 2), []
    whole = Trainer(cfg, tmp_path/'whole', device='cpu')
    want = torch.cat([torch.cat(reading(whole, 0, 1)) for _ in worlds])
    Trainer(cfg, tmp_path/'run', device='cpu').save()
    for world in worlds:                                                # each step with another number of workers, from the checkpoint of the last
        shares = []
        for rank in range(world):
            t = resume(tmp_path/'run', device='cpu')
            shares.append(reading(t, rank, world))
            if rank == 0: first = t
        first.rank = 0
        first.save()
        for i in range(6): rows.append(shares[i % world][i//world])
    assert torch.equal(torch.cat(rows), want)
    ids = Counter(w for w in bytes(torch.cat(rows).flatten().tolist()).decode().split() if w[0] == '<')
    assert set(ids.values()) == {1} and all(100 <= int(w[1:-1]) < 180 for w in list(ids)[:-1]) and len(ids) > 15


def test_a_stream_stops_and_goes_on_to_the_same_file(tmp_path, stream):
    def run(out, stop=None):
        t = Trainer(configure(**TOY | dict(steps=6), data=stream), tmp_path/out, device='cpu')
        step = t.train_step
        def stop_at(): r = step(); t.stopped = t.step == stop; return r
        t.train_step = stop_at
        if stop:
            with pytest.raises(Interrupted): t.fit(show=False)
            t = resume(tmp_path/out, device='cpu')
        t.fit(show=False)
        return t, hashlib.sha256(Path(t.pack()['path']).read_bytes()).hexdigest()
    (t, want), (again, got) = run('whole'), run('stopped', 3)
    assert got == want and again.windows.bytes_read == t.windows.bytes_read
    (Path(stream[7:])/'train-0.jsonl').write_text(json.dumps(dict(text='another text', id=1)))
    refused(lambda: resume(tmp_path/'stopped', device='cpu'), 'not the one this run started with')


def test_a_stream_holds_documents_out(tmp_path):
    (tmp_path/'one.jsonl').write_text('\n'.join(json.dumps(dict(text=f'<{i}>')) for i in range(500)))
    c = shards.open_stream(str(tmp_path), held=300, sample=400)
    held = [w for p in (c.valid, c.test) for w in p.split()]
    assert held + b' '.join(c.documents('train')).split() == [b'<%d>' % i for i in range(500)] and c.train.split() == [b'<%d>' % i for i in range(len(held), len(held) + 80)]
    w = c.windows(TOK, 4, 60, 0)
    seen = b''.join(bytes(w.batch_at(i)[0].flatten().tolist()) for i in range(7)).split()[:-1]
    assert len(set(seen)) == len(seen) > 200 and not set(seen) & set(held)
    refused(lambda: shards.open_stream(str(tmp_path), held=10**6), 'nothing is left')
    write_shards(c, TOK, tmp_path/'shards', limit=1000)
    back = read_shards(tmp_path/'shards')
    assert text_of(back.valid).split() + text_of(back.test).split() == held and 1000 - 5 <= len(back.train) <= 1300


@pytest.mark.parametrize('name', ['some/name:config', 'fineweb-edu', 'hf:some/name'])
def test_the_hub_out_of_reach(monkeypatch, name):
    import huggingface_hub
    def info(self, name, **kw): raise OSError('Name or service not known')
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', info)
    refused(lambda: open_corpus(f'stream:{name}'), 'go online', error=ConnectionError)


def test_a_stream_that_breaks_says_so():
    def rows():
        yield {'text': 'one'}
        raise OSError('the line is dead\nand more')
    s = Prefetch(StreamSampler(datasets.IterableDataset.from_generator(rows), TOK, 1, 2, buffer=1, where='stream:x'))
    assert s.batch_at(0)[0].tolist() == [[10, 111]]
    refused(lambda: s.batch_at(1), 'stream:x cannot be read: the line is dead')


# ahead of time

def test_what_is_made_ahead_leaves_no_trace():
    docs = [f'document {i}' for i in range(20)]
    plain, ahead = (StreamSampler(rows_of(docs), TOK, 2, 5, buffer=3) for _ in range(2))
    p = Prefetch(ahead)
    for i in (0, 1, 1, 2, 3, 9, 4):
        assert all(map(torch.equal, p.batch_at(i), plain.batch_at(i)))
        assert p.batch_at(i) is p.batch_at(i) and p.state_dict()['step'] == i + 1
        if i != 1: assert p.state_dict() == plain.state_dict()
    q = Prefetch(StreamSampler(rows_of(docs), TOK, 2, 5, buffer=3))
    q.load_state_dict(p.state_dict())
    assert torch.equal(q.batch_at(5)[0], plain.batch_at(5)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_on_a_gpu(small):
    w = small.windows(TOK, 64, 256, 0)
    p = Prefetch(w, 'cuda')
    for i in range(20):
        x, y = p.batch_at(i)
        assert x.device.type == 'cuda' and torch.equal(x.cpu(), w.batch_at(i)[0]) and torch.equal(y.cpu(), w.batch_at(i)[1])


# the command

def pi2(monkeypatch, *line):
    monkeypatch.setattr(sys, 'argv', ['pi2', *map(str, line)])
    try: main()
    except SystemExit as e: return e.code or 0
    return 0


def test_the_command_from_text_to_score(tmp_path, small, stream, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('small.txt').write_bytes(small.train)
    sets = [a for k, v in TOY.items() if k != 'steps' for a in ('--set', f'{k}={v}')]
    assert pi2(monkeypatch, 'shard', 'small.txt', '-o', 'tokens', '--tokenizer', 'bpe-400') == 0
    assert '1,548 bytes of text' in (out := capsys.readouterr().out) and 'pi2 train --data tokens' in out
    assert pi2(monkeypatch, 'train', '--data', stream, '--steps', 6, '-o', 'run', *sets) == 0
    assert pi2(monkeypatch, 'eval', 'run/model.q2bin', '--data', stream, '--no-baselines') == 0
    assert f"{json.loads(Path('run/report.json').read_text())['test_bpb']:.4f} bits per byte" in capsys.readouterr().out
    assert pi2(monkeypatch, 'eval', 'run/model.q2bin', '--data', 'tokens', '--no-baselines') == 0   # bytes read the text of the tokens
    assert '1,548 bytes' in capsys.readouterr().out
    for line, sentence in {'shard small.txt -o tokens': 'tokens exists; move it away or give another name with -o',
                           'shard tokens -o other': 'tokens holds shards already; give a text',
                           'shard small.txt -o other --tokenizer bpe-9': "no tokenizer 'bpe-9'", 'shard small.txt -o other --tokenizer no.model': 'there is no tokenizer no.model',
                           'train --data tokens -o other --set tokenizer=bpe-500': 'leave the tokenizer out'}.items():
        assert pi2(monkeypatch, *line.split()) == 1
        out = capsys.readouterr()
        assert out.err.startswith('pi2: ') and sentence in out.err and out.err.count('\n') == 1 and not out.out and not Path('other').exists()
