"The peers of the integer rules, and the walk that tunes them all"
import math
import pytest, torch
import pi2nb.runs
from pi2nb.optim import OPTIMIZERS
from pi2nb.peers import ARMS, memory, peak_bytes, tune
from pi2nb.train import Trainer, configure

TINY = dict(dim=16, heads=2, kv_heads=1, window=16, context=16, batch=4, steps=30, eval_bytes=64)


@pytest.mark.parametrize('arm', ARMS)
def test_every_arm_takes_steps(tmp_path, arm):
    settings, rule, lr, rest, _ = ARMS[arm]
    if arm == 'bf16-sr': pytest.importorskip('torchao')
    t = Trainer(configure(**settings | dict(optimizer=rule, lr=lr, rest_lr=rest) | TINY), tmp_path)
    before = [p.detach().clone() for p in t.lm.parameters()]
    losses = [t.train_step()[0] for _ in range(12)]
    assert all(map(math.isfinite, losses))
    moved = sum(not torch.equal(a, b) for a, b in zip(before, t.lm.parameters()))
    assert moved < 6 if arm == 'literal' else losses[-1] < losses[0]   # the rule of the document stands still


def test_the_walk_ends_at_the_best_point_and_adds_seeds(monkeypatch):
    def pretend(path, jobs, job): # a bowl with its bottom at (.5, 16)
        assert job == 'pi2nb.peers:grid_job'
        return {k: dict(valid=[(1, (math.log2(v['lr']) + 1)**2 + (math.log2(v['rest_lr']) - 4)**2)], asked=v) for k, v in jobs.items()}
    monkeypatch.setattr(pi2nb.runs, 'run_grid', pretend)
    runs = tune('nowhere', ['pi2'], data='x')
    assert {f'pi2, lr 0.5, rest 16, seed {s}' for s in range(3)} <= runs.keys()
    assert {'pi2, lr 1, rest 16, seed 0', 'pi2, lr 0.25, rest 16, seed 0', 'pi2, lr 0.5, rest 32, seed 0', 'pi2, lr 0.5, rest 8, seed 0'} <= runs.keys()
    assert all(v['asked']['data'] == 'x' for v in runs.values())
    tied = tune('nowhere', ['pi2'], apart=False)
    assert {v['asked']['rest_lr'] for v in tied.values()} == {ARMS['pi2'][3]}


def test_an_arm_that_learns_nothing_is_an_answer(monkeypatch): # as the rule of the document
    monkeypatch.setattr(pi2nb.runs, 'run_grid', lambda path, jobs, job: {k: dict(valid=[(1, math.inf)], asked=v) for k, v in jobs.items()})
    assert {(v['asked']['lr'], v['asked']['seed']) for v in tune('nowhere', ['literal']).values()} == {(.01, 0), (.02, 0), (.04, 0)}


def test_memory(tmp_path):
    assert peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) == 12_000
    got = memory(Trainer(configure(**ARMS['adamw'][0] | dict(optimizer='adamw') | TINY), tmp_path))
    assert abs(got['static'] - 12) < .1 and got['peak'] > 16


def test_registry():
    assert {rule for _, rule, *_ in ARMS.values()} <= OPTIMIZERS.keys()
