"A run gives the same file by SHA-256 however often it is interrupted, and never leaves a broken one behind."
import errno, hashlib, json, math, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from pi2nb.corpus import load_corpus
from pi2nb.evaluate import bits_per_byte
from pi2nb.governor import DeadRun
from pi2nb.model import LM, MIXERS, RECIPES, LMConfig, looks_ahead, recipe
from pi2nb.optim import trapezoid
from pi2nb.q2bn import load_model
from pi2nb.sampler import Sampler, generate
from pi2nb.train import Interrupted, Trainer, configure, resume, twin_of

TOY = dict(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=32, context=64, batch=4, steps=24, log_every=4, eval_every=8, eval_bytes=512, save_every=7)
WORDS = [f'{k}={v}' for k, v in TOY.items() if k != 'steps']


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    "A small text on disk, and as a corpus"
    path = tmp_path_factory.mktemp('text')/'small.txt'
    path.write_bytes(load_corpus('shakespeare').train[:60_000])
    return path, load_corpus(str(path))


def sha(folder): return hashlib.sha256((Path(folder)/'model.q2bin').read_bytes()).hexdigest()


def whole(tmp_path, corpus, name='whole', **changes):
    t = Trainer(configure(**TOY | changes), tmp_path/name, corpus, 'cpu')
    t.fit(show=False)
    assert t.pack()['logit_gap'] == 0
    return sha(tmp_path/name)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_same_seed_same_file_and_another_seed_another(tmp_path, text, precision):
    a = whole(tmp_path, text[1], 'a', precision=precision)
    assert a == whole(tmp_path, text[1], 'b', precision=precision) != whole(tmp_path, text[1], 'c', precision=precision, seed=1)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_interrupted_anywhere_same_file(tmp_path, text, precision):
    want, toy = whole(tmp_path, text[1], precision=precision), configure(**TOY | dict(precision=precision))
    for at in (1, 6, 7, 8, 12, 24):                                   # around checkpoints, log lines, evaluations, the end
        out = tmp_path/f'at{at}'
        t = Trainer(toy, out, text[1], 'cpu')
        step = t.train_step
        def stop_at(): r = step(); t.stopped = t.step == at; return r
        t.train_step = stop_at
        with pytest.raises(Interrupted, match=f'after step {at} and saved'): t.fit(show=False)
        again = resume(out, text[1], 'cpu')
        assert again.step == at
        again.fit(show=False)
        again.pack()
        assert sha(out) == want, f'interrupted after step {at}'
        assert [json.loads(l)['step'] for l in (out/'metrics.jsonl').read_text().splitlines()] == list(range(4, 25, 4))


@pytest.mark.parametrize('name, code', [('phase', 'phase-2'), ('q2', 'lsq'), ('q2', 'q2-hadamard, group=32')])
def test_other_codes_stop_and_go_on_to_the_same_file_and_write(tmp_path, text, name, code):
    cfg = configure(name, **TOY | dict(code=code))
    t = Trainer(cfg, tmp_path/'whole', text[1], 'cpu')
    t.fit(show=False)
    assert t.pack()['logit_gap'] == 0
    start = Trainer(cfg, tmp_path/'cut', text[1], 'cpu')
    for _ in range(11): start.train_step()
    start.save()
    again = resume(tmp_path/'cut', text[1], 'cpu')
    again.fit(show=False)
    again.pack()
    assert sha(tmp_path/'cut') == sha(tmp_path/'whole')
    lm, tok, meta = load_model(tmp_path/'cut'/'model.q2bin')
    assert lm.config.code == code and len(b''.join(generate(lm, tok, 'A', 5, Sampler(), seed=0))) == 5


@pytest.mark.parametrize('kind', ['bpe-400', 'unigram-400'])
def test_longer_pieces_stop_and_go_on_to_the_same_file_and_write(tmp_path, text, kind):
    want, cfg = whole(tmp_path, text[1], tokenizer=kind), configure(**TOY | dict(tokenizer=kind))
    start = Trainer(cfg, tmp_path/'cut', text[1], 'cpu')
    for _ in range(11): start.train_step()
    start.save()
    again = resume(tmp_path/'cut', text[1], 'cpu')
    again.fit(show=False)
    rep = again.finish(only=('unigram',))
    assert sha(tmp_path/'cut') == want and rep['tokenizer'] == kind and 0 < rep['test_bpb'] < 9
    lm, tok, _ = load_model(tmp_path/'cut'/'model.q2bin')
    assert tok == again.tok and lm.config.vocab == tok.vocab_size == 400
    assert bits_per_byte(lm, tok, text[1].test).bpb == rep['test_bpb']
    row = json.loads((tmp_path/'cut'/'metrics.jsonl').read_text().splitlines()[-1])
    assert row['bpb'] == pytest.approx(row['loss']/math.log(2)/again.token_bytes)
    assert len(list(generate(lm, tok, 'A', 5, Sampler(), seed=0))) == 5
    with pytest.raises(ValueError, match='no tokenizer'): configure(tokenizer='bpe-4')


def test_a_crash_between_checkpoints_loses_only_the_steps_since(tmp_path, text):
    want, out = whole(tmp_path, text[1]), tmp_path/'crash'
    t = Trainer(configure(**TOY), out, text[1], 'cpu')
    step = t.train_step
    def crash():
        if t.step == 18: raise MemoryError
        return step()
    t.train_step = crash
    with pytest.raises(MemoryError): t.fit(show=False)
    again = resume(out, text[1], 'cpu')
    assert again.step == 14
    again.fit(show=False)
    again.pack()
    assert sha(out) == want


def test_a_torn_line_of_metrics_is_dropped(tmp_path, text):
    t = Trainer(configure(**TOY), tmp_path, text[1], 'cpu')
    t.fit(show=False)
    with open(tmp_path/'metrics.jsonl', 'a') as f: f.write('{"step": 25, "lo')
    again = resume(tmp_path, text[1])
    again.fit(show=False)                                              # a finished run has nothing left to do
    assert again.step == 24 and len((tmp_path/'metrics.jsonl').read_text().splitlines()) == 6


def test_resume_brings_its_threads_back(tmp_path, text):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Trainer(configure(**TOY), tmp_path, text[1], 'cpu').save()
        torch.set_num_threads(1)
        resume(tmp_path, text[1])
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, text, monkeypatch):
    out = tmp_path/'full'
    t = Trainer(configure(**TOY), out, text[1], 'cpu')
    for _ in range(3): t.train_step()
    t.save()
    good = (out/'checkpoint.pt').read_bytes()
    def no_space(fd): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', no_space)
    t.train_step()
    with pytest.raises(OSError): t.save()
    assert (out/'checkpoint.pt').read_bytes() == good and [p.name for p in out.iterdir()] == ['checkpoint.pt']


@pytest.mark.parametrize('name', ['q2', 'pi2'])
def test_recomputed_is_kept_to_the_bit_and_warming_up_leaves_no_trace(tmp_path, text, name):
    ends = []
    for again in (False, True):
        t = Trainer(configure(name, **TOY | dict(recompute=again)), tmp_path, text[1], 'cpu')
        t.train_step()
        if again: t.warm_up()
        losses = [t.train_step()[0] for _ in range(3)]
        ends.append((losses, [p.detach().clone() for p in t.lm.parameters()]))
    assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))


def test_minutes_instead_of_steps(tmp_path, text):
    t = Trainer(configure(**TOY | dict(minutes=.02)), tmp_path, text[1], 'cpu')
    t.fit(show=False)
    assert t.progress == 1 and t.elapsed >= 1.2 and t.step > 1 and t.warm > 0
    again = Trainer(configure(**TOY | dict(minutes=.02)), tmp_path/'half', text[1], 'cpu')
    again.elapsed = .6                                                 # the rate follows the part of the time that is gone
    again.train_step()
    assert again.rate == trapezoid(.5)


def test_a_dead_run_stops(tmp_path, text):
    with pytest.raises(DeadRun, match='no weight of'): whole(tmp_path, text[1], lr=0., rest_lr=0., steps=200)
    with pytest.raises(DeadRun, match='letter frequencies'): whole(tmp_path, text[1], 'slow', lr=1e-3, rest_lr=3e-5, steps=110)


def test_another_text_cannot_be_resumed(tmp_path, text):
    t = Trainer(configure(**TOY), tmp_path, text[1], 'cpu')
    t.save()
    from dataclasses import replace
    with pytest.raises(ValueError, match='not the one this run started with'): resume(tmp_path, replace(text[1], train=text[1].train[:-1]))


def test_a_short_alphabet_is_not_a_dead_run(tmp_path, text):
    from dataclasses import replace
    whole(tmp_path, replace(text[1], train=b'abab\n'*9000, valid=b'abab\n'*99), steps=60)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(tmp_path, text):
    t = Trainer(configure(**TOY | dict(steps=60)), tmp_path, text[1], 'cuda')
    for _ in range(30): t.train_step()
    t.save()
    again = resume(tmp_path, text[1])
    assert again.device.type == 'cuda'
    again.fit(show=False)                                              # the guard looks at step 50
    assert again.pack()['logit_gap'] == 0


def test_the_twin_differs_in_codes_and_rates_only():
    cfg = configure('q2', dim=32, steps=7, seed=3)
    twin = twin_of(cfg)
    a, b = (recipe(c.recipe).config(**c.model).to_dict() for c in (cfg, twin))
    assert {k for k in a if a[k] != b[k]} == {'code', 'gate_code', 'embed_code'} and (twin.steps, twin.seed) == (7, 3)


@pytest.mark.parametrize('config', [recipe(n).config(dim=32) for n in RECIPES] + [LMConfig(layout=f'{m}*2', dim=32, window=8) for m in MIXERS],
    ids=[*RECIPES, *MIXERS])
@pytest.mark.parametrize('at', [1, 9, 23])
def test_no_prediction_looks_ahead(config, at):
    lm = LM(config)
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.1) for p in lm.parameters()]
    assert looks_ahead(lm, 24, at) == 0


@pytest.mark.parametrize('config', [LMConfig(layout=f'{m}*2', dim=32, window=8, code=None, gate_code=None, embed_code=None) for m in MIXERS], ids=list(MIXERS))
def test_pieces_are_the_whole_and_the_state_does_not_grow(config):
    torch.manual_seed(1)
    lm, ids = LM(config), torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        [p.add_(torch.randn_like(p)*.1) for p in lm.parameters()]
        state, out, sizes = None, [], set()
        for n, piece in enumerate(ids.split([20, 1, 0, 19], 1)):
            y, state = lm(piece, state)
            out.append(y)
            flat, todo = [], [state]
            while todo: s = todo.pop(); todo.extend(s) if isinstance(s, (list, tuple)) else flat.append(s)
            sizes.add(sum(t.numel() for t in flat if torch.is_tensor(t)))
        assert len(sizes) == 1 and all(t.dtype != torch.bfloat16 for t in flat if torch.is_tensor(t))
        assert torch.allclose(torch.cat(out, 1), lm(ids)[0], atol=1e-4)


# The command, in processes of its own

def pi2(*args, cwd, **kw):
    return subprocess.run([sys.executable, '-c', 'from pi2nb.cli import main; main()', *map(str, args)], cwd=cwd, text=True, capture_output=True, **kw)


def train_args(text, out, *more): return ['train', '--data', text, '-o', out, *(w for s in WORDS for w in ('--set', s)), *more]


def test_command_end_to_end(tmp_path, text):
    r = pi2(*train_args(text[0], 'run', '--steps', 24, '--twin'), cwd=tmp_path)
    assert r.returncode == 0, r.stderr
    for words in ('bits per byte', 'xz-9e', 'float32 twin', 'largest logit difference 0\n', 'it writes', 'run/model.q2bin'): assert words in r.stdout
    assert {p.name for p in (tmp_path/'run').iterdir()} == {'model.q2bin', 'metrics.jsonl', 'loss.png', 'report.json', 'checkpoint.pt', 'twin'}
    assert sha(tmp_path/'run') == whole(tmp_path, text[1], precision='auto')
    report = json.loads((tmp_path/'run'/'report.json').read_text())
    r = pi2('eval', 'run/model.q2bin', '--data', text[0], cwd=tmp_path)
    assert r.returncode == 0 and r.stdout.startswith(f"{report['test_bpb']:.4f} bits per byte"), r.stderr
    r = pi2('eval', 'run/model.q2bin', '--data', text[0], '--stride', 32, '--chunk', 64, '--part', 'all', cwd=tmp_path)
    assert r.returncode == 0 and '60,000 bytes' in r.stdout, r.stderr
    a, b = (pi2('generate', 'run/model.q2bin', '--prompt', 'Hé', '--tokens', 40, '--seed', 5, cwd=tmp_path) for _ in range(2))
    assert a.returncode == 0 and a.stdout == b.stdout and a.stdout.startswith('Hé'), a.stderr
    r = pi2('inspect', 'run/model.q2bin', cwd=tmp_path)
    assert r.returncode == 0 and 'blocks.1.mixer.rate.weight' in r.stdout
    assert pi2('recipes', cwd=tmp_path).stdout.startswith('q2 ')


def test_command_interrupted_and_resumed(tmp_path, text):
    want = pi2(*train_args(text[0], 'want', '--steps', 400), cwd=tmp_path)
    assert want.returncode == 0, want.stderr
    p = subprocess.Popen([sys.executable, '-c', 'from pi2nb.cli import main; main()', *map(str, train_args(text[0], 'run', '--steps', 400))],
        cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not (tmp_path/'run'/'checkpoint.pt').exists() and p.poll() is None: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'pi2 train --resume -o run' in err and 'Traceback' not in err and not out
    r = pi2('train', '--resume', '-o', 'run', cwd=tmp_path)
    assert r.returncode == 0 and sha(tmp_path/'run') == sha(tmp_path/'want'), r.stderr


def test_command_refuses_a_foreign_twin_and_a_dead_run(tmp_path, text):
    assert pi2(*train_args(text[0], 'run/twin', '--steps', 4), cwd=tmp_path).returncode == 0
    r = pi2(*train_args(text[0], 'run', '--steps', 4, '--twin'), cwd=tmp_path)
    assert r.returncode == 1 and 'other settings' in r.stderr and len(r.stderr.strip().splitlines()) == 1
    r = pi2(*train_args(text[0], 'dead', '--steps', 60, '--set', 'lr=0', '--set', 'rest_lr=0'), cwd=tmp_path)
    assert r.returncode == 1 and 'has changed since the start' in r.stderr and 'Traceback' not in r.stderr


@pytest.mark.parametrize('args, says', [
    (['eval', 'nowhere.q2bin'], 'does not exist'),
    (['eval', 'bad.q2bin'], 'not a Q2BN file'),
    (['generate', 'cut.q2bin'], 'cut.q2bin'),
    (['inspect', 'empty.txt'], 'empty.txt'),
    (['train', '--data', 'nowhere.txt'], 'does not exist'),
    (['train', '--data', 'empty.txt'], 'empty'),
    (['train', '--data', 'short.txt'], 'short.txt'),
    (['train', '--data', 'table.csv'], 'table.csv'),
    (['train', '--recipe', 'q9'], 'unknown recipe'),
    (['train', '--set', 'dim=31'], '31'),
    (['train', '--set', 'dim=0'], 'dim'),
    (['train', '--set', 'layout=GQA, LSTM'], 'LSTM'),
    (['train', '--set', 'layout=[GQA'], 'layout'),
    (['train', '--set', 'nonsense'], 'key=value'),
    (['train', '--minutes', '-1'], 'minutes'),
    (['train', '--minutes', 'inf'], 'minutes'),
    (['train', '--minutes', '1', '--steps', '1'], 'not both'),
    (['train', '--set', 'lr=-1'], 'lr'),
    (['train', '--set', 'vocab=9'], 'vocab'),
    (['train', '--set', 'mlp_ratio=0'], 'mlp_ratio'),
    (['train', '--set', 'code=q9'], 'q9'),
    (['train', '--set', 'heads=0'], 'heads'),
    (['train', '--set', 'window=0'], 'window'),
    (['train', '-o', 'empty.txt'], 'is a file'),
    (['train', '--recipe', 'dense', '--twin'], 'its own twin'),
    (['train', '--device', 'abacus'], 'abacus'),
    (['train', '--resume', '-o', 'nothing'], 'no checkpoint'),
    (['train', '--track'], 'pip install trackio'),
    (['train', '--set', 'compile=maybe'], 'compile'),
    (['train', '--set', 'shard=true', '--set', 'remember=.1'], 'shard'),
    (['train', '--set', 'optimizer=muon, gates=2'], 'a factor can be given for'),
    (['train', '--set', 'optimizer=muon, int8=-1'], 'finite number that is at least 0'),
    (['train', '--set', 'optimizer=muon, int8=nan'], 'finite number that is at least 0'),
    (['train', '--set', 'optimizer=moun'], "unknown optimizer 'moun'; choose one of"),
], ids=lambda v: ' '.join(v) if isinstance(v, list) else '')
def test_a_mistake_gets_one_sentence(tmp_path, text, monkeypatch, capsys, args, says):
    from pi2nb.cli import main
    t = Trainer(configure(**TOY), tmp_path, text[1], 'cpu')
    t.train_step(); t.pack()
    (tmp_path/'cut.q2bin').write_bytes((tmp_path/'model.q2bin').read_bytes()[:-100])
    (tmp_path/'bad.q2bin').write_bytes(b'GGUF'*99)
    (tmp_path/'empty.txt').touch(); (tmp_path/'short.txt').write_text('To be'); (tmp_path/'table.csv').write_text('a,b')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, 'trackio', None)                  # not installed
    monkeypatch.setattr(sys, 'argv', ['pi2', *args])
    with pytest.raises(SystemExit) as e: main()
    out, err = capsys.readouterr()
    assert e.value.code == 1 and says in err and err.startswith('pi2: ') and len(err.strip().splitlines()) == 1 and not out
