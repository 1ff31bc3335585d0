"Runs that repeat to the last bit: any number of workers, any order of micro-batches, any interruption, one thread or two"
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from pi2nb.corpus import load_corpus
from pi2nb.train import Trainer, configure

TORCHRUN, PI2 = (str(Path(sys.executable).parent/n) for n in ('torchrun', 'pi2'))
SHAPE = dict(dim=32, layout='GQA, CfC', heads=2, kv_heads=1, window=32, context=64, batch=8, eval_bytes=512, save_every=4)
SETS = [a for k, v in SHAPE.items() for a in ('--set', f'{k}={v}')]


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp('exact')
    (path/'small.txt').write_bytes(load_corpus('shakespeare').train[:60_000])
    return path


def launch(path, workers, *args, threads=1, **env):
    head = [TORCHRUN, '--standalone', '--nproc-per-node', str(workers)] if workers else []
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), CUDA_VISIBLE_DEVICES='') | env
    return subprocess.Popen([*head, PI2, 'train', *map(str, args)], cwd=path, env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def trained(path, workers, out, *args, **kw):
    run = launch(path, workers, *args, '-o', out, **kw)
    printed, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert 'largest logit difference 0' in printed
    return hashlib.sha256((path/out/'model.q2bin').read_bytes()).hexdigest()


def new(recipe, steps=12, precision='auto'):
    return ['--recipe', recipe, '--data', 'small.txt', '--steps', steps, '--set', f'precision={precision}', *SETS]


@pytest.mark.parametrize('recipe', ['pi2', 'ghost'])
def test_any_number_of_workers_writes_the_same_file(small, recipe):
    files = {w: trained(small, w, f'{recipe}{w}', *new(recipe)) for w in (0, 2, 4)}
    assert len(set(files.values())) == 1, files
    assert trained(small, 0, f'{recipe}-else', *new(recipe), '--seed', 1) != files[0]


@pytest.mark.parametrize('recipe, all_of_them', [('pi2', True), ('ghost', False)])
def test_killed_and_resumed_with_more_workers(small, recipe, all_of_them):
    whole = trained(small, 0, f'{recipe}-whole', *new(recipe, 60))
    run = launch(small, 2, *new(recipe, 60), '-o', f'{recipe}-killed')
    while not (small/f'{recipe}-killed'/'checkpoint.pt').exists():
        assert run.poll() is None
        time.sleep(.01)
    found = {}                                                         # the launcher and both workers
    for p in Path('/proc').iterdir():
        try:
            if p.name.isdigit() and f'{recipe}-killed' in (p/'cmdline').read_text().split('\0'): found[int(p.name)] = (p/'environ').read_text()
        except OSError: pass
    for pid, env in found.items():
        if all_of_them or '\0RANK=1\0' in f'\0{env}': os.kill(pid, signal.SIGKILL)
    said = run.communicate(timeout=120)[1]
    if not all_of_them: assert said.count('pi2: another worker has gone') == 1 and 'start the workers again with --resume' in said, said
    assert not (small/f'{recipe}-killed'/'model.q2bin').exists()
    assert trained(small, 4, f'{recipe}-killed', '--resume') == whole


INTEL, AMX = 'GenuineIntel' in Path('/proc/cpuinfo').read_text(), torch.cpu._is_amx_tile_supported()

@pytest.mark.parametrize('precision', [
    pytest.param('fp32', marks=pytest.mark.skipif(not INTEL, reason='MKL promises this on processors of Intel')),
    pytest.param('bf16', marks=pytest.mark.skipif(not AMX, reason='seen with AMX only'))])
def test_one_thread_or_two(small, precision):
    # MKL keeps the order of its sums if asked to; oneDNN's bfloat16 products keep it unasked
    env = dict(MKL_CBWR='AVX2,STRICT')
    files = [trained(small, 0, f'{precision}{n}', *new('pi2', precision=precision), threads=n, **env) for n in (1, 2)]
    assert files[0] == files[1]


def in_order(order, recipe, text, out): # the parameters after a run that takes the micro-batches of a step in that order
    t = Trainer(configure(recipe, data=str(text), steps=8, micro=4, **SHAPE), out)
    plain = t.windows.batch_at
    t.windows.batch_at = lambda step: tuple(torch.cat([v.chunk(4)[i] for i in order]) for v in plain(step))
    t.fit(show=False)
    return [p.detach().clone() for p in t.lm.parameters()]


@pytest.mark.parametrize('recipe, same', [('pi2', True), ('ghost', True), ('q2', False)]) # q2 is the control
def test_the_order_of_micro_batches_leaves_no_trace(small, tmp_path, recipe, same):
    a, b = (in_order(o, recipe, small/'small.txt', tmp_path/str(o[0])) for o in ([0, 1, 2, 3], [2, 0, 3, 1]))
    assert all(map(torch.equal, a, b)) == same


BOTH = """
import sys, torch.distributed as dist
from pi2nb.train import Interrupted, Trainer, configure, resume
for shard in (False, True):
    t = Trainer(configure('q2', data='small.txt', steps=5, micro=2, shard=shard, log_every=1, **eval(sys.argv[1])), f'q2-{shard}')
    step = t.train_step
    def stop_at(): r = step(); t.stopped = t.step == 3; return r
    t.train_step = stop_at
    try: t.fit(show=False)
    except Interrupted: dist.barrier()                                # until the first worker has written the checkpoint
    t = resume(f'q2-{shard}')
    assert t.step == 3 and t.parts == shard
    t.fit(show=False)
    if not t.rank: t.pack()
t = Trainer(configure('q2', data='small.txt', minutes=.01, micro=2, **eval(sys.argv[1])), 'minutes')
t.fit(show=False)                                                      # would wait for ever if the two did not stop together
assert t.step and t.progress == 1 and t.warm > 0
"""

def test_float_weights_whole_or_in_parts(small): # two workers of q2, interrupted and resumed, each with the whole model or with half of it
    one = Trainer(configure('q2', data=str(small/'small.txt'), steps=5, micro=2, shard=True, log_every=1, **SHAPE), small/'q2')
    one.fit(show=False)
    (small/'both.py').write_text(BOTH)
    env = os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    run = subprocess.run([TORCHRUN, '--standalone', '--nproc-per-node', '2', 'both.py', repr(SHAPE)], cwd=small, env=env, text=True, capture_output=True)
    assert run.returncode == 0 and 'Warning' not in run.stderr, run.stderr
    def rows(out): return [json.loads(line) for line in (small/out/'metrics.jsonl').read_text().splitlines()]
    for out in ('q2-False', 'q2-True'):
        for a, b in zip(rows('q2'), rows(out), strict=True): assert abs(a['loss'] - b['loss']) < 1e-6 and abs(a.get('valid_bpb', 0) - b.get('valid_bpb', 0)) < 1e-6


def test_more_workers_than_micro_batches(small):
    run = launch(small, 2, '--recipe', 'pi2', '--data', 'small.txt', '--steps', 4, '-o', 'few', '--set', 'micro=1', *SETS)
    _, said = run.communicate(timeout=120)
    assert run.returncode and '2 workers cannot share 1 micro-batches; set micro=2, or a multiple of it' in said
