"Every planted death is caught within fifty steps, no healthy run is stopped, and a governor turns both ways."
import json, warnings
from math import log

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from pi2nb.corpus import load_corpus
from pi2nb.governor import DeadRun, DeadRunGuard, TrainingGovernor, draw_flips
from pi2nb.model import LM, LMConfig
from pi2nb.optim import CarrySnap, GhostVotes, IntegerRule, Muon, make_optimizers, split_params
from pi2nb.quantlinear import QuantLinear, hold_integers
from pi2nb.train import Trainer, configure, resume, twin_of

RULES = CarrySnap, GhostVotes
TOY = dict(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=32, context=32, batch=4, micro=2, log_every=4, eval_every=50, eval_bytes=256, precision='fp32')
CODES = dict.fromkeys(('code', 'gate_code', 'embed_code'), 'pi2-8')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp('text')/'small.txt'
    path.write_bytes(load_corpus('shakespeare').train[:20_000])
    return load_corpus(str(path))


def small(rule, **kw):
    torch.manual_seed(0)
    lm = hold_integers(LM(LMConfig(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, window=32, **CODES, **kw)))
    mats, rest = split_params(lm)
    extra = dict(orthogonal=True) if issubclass(rule, CarrySnap) else {}
    return lm, rule([dict(params=mats, lr=1., **extra), dict(params=rest, lr=2.)])


def live(text, lm, rule, steps=51):
    guard, data = DeadRunGuard(lm, log(256), 3.4, opts=[rule]), torch.tensor(list(text.train))
    for i in range(steps):
        x = data[torch.randint(0, 17_000, (8, 1), generator=torch.Generator().manual_seed(i)) + torch.arange(33)]
        F.cross_entropy(loss := lm(x[:, :-1])[0].flatten(0, 1), x[:, 1:].flatten()).backward()
        rule.gather()
        guard.check(F.cross_entropy(loss, x[:, 1:].flatten()).item(), rule.norm(), i/200)
        rule.step()
    return guard


def ints(rule): return [p for p,_,_ in rule._items() if not p.is_floating_point()]


def filled(k):
    def plant(rule):
        lm, r = small(rule)
        for p in ints(r): p.fill_(k)
        return lm, r
    return plant


def signed(rule):
    class Signed(rule):
        def _move(self, z, *args):
            moved = super()._move(z, *args)
            z.copy_(z.view(torch.int8).clamp(min=0))
            return moved
    return small(Signed)


def unclamped(rule):
    class Unclamped(rule):
        def _move(self, z, v, rate, st, gr, low, top):
            moved = super()._move(wide := z.int(), v, rate, st, gr, -2**20, 2**20)
            z.copy_(wide & 255)
            return moved
    return small(Unclamped)


def uphill(*where):
    def plant(rule):
        class Twice(rule):
            def _move(self, z, v, rate, st, *args): return super()._move(z, -v if st.get('twice') else v, rate, st, *args)
        lm, r = small(Twice)
        for p in [lm.get_parameter(w) for w in where] or ints(r): r.state[p]['twice'] = True
        return lm, r
    return plant


def reentrant(rule):
    lm, r = small(rule, tied=True)
    lm.embed.register_forward_hook(lambda m, args, out: out.detach())
    return under_checkpoint(lm), r


def under_checkpoint(lm):
    for b in lm.blocks: b.forward = lambda x, state=None, f=b.forward: (checkpoint(lambda x: f(x)[0], x, use_reentrant=True), None)
    return lm


def detached(rule):
    lm, r = small(rule)
    lm.blocks[0].mlp.register_forward_hook(lambda m, args, out: out.detach())
    return lm, r


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('plant, at, says', [
    (filled(127), 1, 'the grid was never filled'), (filled(0), 1, 'the grid was never filled'),
    (signed, 2, 'indices that wrap around'), (unclamped, 50, 'indices that wrap around'),
    (uphill('embed.weight'), 25, 'embed move with their gradient, uphill'), (uphill('blocks.0.mixer.q.weight'), 45, 'mixer.q move with their gradient'),
    (uphill(), 25, 'uphill'), (reentrant, 6, 'has received no gradient'), (detached, 6, 'blocks.0.mlp.up has received no gradient'),
], ids=['zeros', 'lowest', 'signed', 'unclamped', 'uphill embedding', 'uphill layer', 'uphill all', 'reentrant', 'detached'])
def test_planted_deaths_are_caught(text, rule, plant, at, says):
    with pytest.raises(DeadRun, match=says) as e, warnings.catch_warnings(action='ignore'): live(text, *plant(rule))
    assert int(str(e.value).split(':')[0].removeprefix('step ')) <= at <= 50


@pytest.mark.parametrize('rule', RULES)
def test_a_healthy_run_passes_under_checkpointing_too(text, rule):
    lm, r = small(rule)
    guard = live(text, under_checkpoint(lm), r)
    assert min(guard.changed.values()) > .1 and not any(guard.uphill.values()) and guard.mean < 4


@pytest.mark.parametrize('name', ['pi2', 'ghost', 'q2', 'dense'])
def test_no_recipe_is_stopped(tmp_path, text, name):
    t = Trainer(configure(name, **TOY | dict(steps=101)), tmp_path, text, 'cpu')
    for _ in range(56): t.train_step()
    assert t.guard.changed


def test_shadow_weights_without_gradient_are_named(text):
    torch.manual_seed(0)
    lm = nn.Sequential(QuantLinear(8, 8), QuantLinear(8, 8))
    guard = DeadRunGuard(lm, 1e3, 0., opts=[Muon(lm.parameters())])
    with pytest.raises(DeadRun, match='step 6: 0 has received no gradient'):
        for _ in range(6):
            lm[1](lm[0](torch.randn(4, 8)).detach()).square().mean().backward()
            guard.check(1., 1., 0.)


def test_what_no_optimizer_trains_may_go_without():
    lm = nn.Sequential(QuantLinear(8, 8), QuantLinear(8, 8))
    guard = DeadRunGuard(lm, 1e3, 0., opts=[Muon(lm[1].parameters())])
    for _ in range(12):
        lm[1](lm[0](torch.randn(4, 8)).detach()).square().mean().backward()
        guard.check(1., 1., 0.)


# Gauges and governor

class Told(IntegerRule):
    "Reports the flips that it is told"
    def __init__(self, layer): super().__init__(layer.parameters(), lr=1.)
    def tell(self, n, places=None):
        self.moves = {p: (torch.tensor(n), torch.tensor(n if places is None else places)) for p in ints(self)}


def told(target, shape=(10, 10), **kw):
    layer = hold_integers(nn.Sequential(QuantLinear(shape[1], shape[0], 'pi2-8')))
    layer[0].held_weight()
    rule = Told(layer)
    return rule, TrainingGovernor(layer, [rule], target, **kw), layer[0].weight


@given(st.lists(st.integers(0, 100), min_size=1, max_size=60), st.sampled_from([.001, .1, .9]))
@settings(max_examples=30, deadline=None)
def test_gears_move_towards_the_target_and_stay_in_bounds(flips, target):
    rule, gov, w = told(target, every=1)
    for n in flips:
        before = rule.state[w].get('gear', 1.)
        rule.tell(n)
        gov.observe()
        after = rule.state[w].get('gear', 1.)
        assert 2**-12 <= after <= 8 and before/4.1 <= after <= before*2.1
        if n/100 > 1.5*target: assert after < before or after == 2**-12
        elif n/100 < target/1.5: assert after > before or after == 8
        else: assert after == before


def test_it_recovers_and_follows_the_schedule():
    rule, gov, w = told(.2)
    def feel(n, factor, steps=100):
        for _ in range(steps):
            rule.tell(round(min(100, n*rule.state[w].get('gear', 1.))))
            gov.observe(factor)
        return rule.state[w].get('gear', 1.)
    assert feel(20, 1.) == 1 and feel(90, 1.) < .5 and feel(20, 1.) > .6
    assert .3 < feel(2, .1)*2/2 < 1.5                                # a cooldown lowers flips and goal alike


def test_counts_only_without_a_target():
    rule, gov, w = told(None)
    for _ in range(30):
        rule.tell(50, 100)
        gov.observe()
    assert 'gear' not in rule.state[w] and (r := gov.report())['flips'] == .5 and r['stride'] == 2 and 'gears' not in r and gov.report() == {}


@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (1, 700), (300, 77)])
def test_odd_shapes_are_measured(shape):
    rule, gov, w = told(None, shape)
    rule.tell(w.numel())
    w.add_(1).clamp_(max=254)
    gov.observe()
    r = gov.report()
    assert r['flips'] == r['stride'] == 1 and r['churn'] < .05 and 0 < r['occupancy'] <= 1


def test_states_are_copies():
    rule, gov, w = told(.1)
    state = gov.state_dict()
    rule.tell(3)
    gov.observe()
    _, other, _ = told(.1)
    other.load_state_dict(state)
    assert other.steps == 0 and not other.total.any() and gov.total.any()


@pytest.mark.parametrize('kw', [dict(target=0.), dict(target=1.), dict(target=float('nan')), dict(target=.1, band=1.), dict(target=.1, every=0)])
def test_bad_settings_are_refused(kw):
    with pytest.raises(ValueError, match='a governor needs'): told(**kw)


def test_shadow_weights_cannot_be_governed(tmp_path, text):
    lm = LM(LMConfig(layout='GQA', dim=32))
    assert TrainingGovernor(lm, make_optimizers(lm)).report() == {}
    with pytest.raises(ValueError, match='needs integer weights'): TrainingGovernor(lm, make_optimizers(lm), .1)
    with pytest.raises(ValueError, match='governor is 1.5'): configure('pi2', governor=1.5)
    assert configure('pi2', governor='none').governor is None and twin_of(configure('pi2', governor=.1)).governor is None


def test_a_governed_run_stops_and_goes_on_to_the_same_file(tmp_path, text):
    cfg = configure('ghost', **TOY | dict(steps=24, governor=.05))
    t = Trainer(cfg, tmp_path/'whole', text, 'cpu')
    t.fit(show=False)
    start = Trainer(cfg, tmp_path/'cut', text, 'cpu')
    start._open_log()
    for _ in range(11): start.train_step()
    start.save()
    again = resume(tmp_path/'cut', text, 'cpu')
    again.fit(show=False)
    for a, b in zip(t.lm.state_dict().values(), again.lm.state_dict().values()): assert a.equal(b)
    pick = ('flips', 'stride', 'layers', 'gears', 'goal')
    assert [{k: r[k] for k in pick} for r in t.rows[3:]] == [{k: r[k] for k in pick} for r in again.rows[1:]]
    assert min(t.rows[-1]['gears'].values()) < 1
    row = json.loads((tmp_path/'whole'/'metrics.jsonl').read_text().splitlines()[-1])
    assert row['layers'].keys() == row['gears'].keys() and len(row['layers']) == 12


def test_counting_changes_nothing(text):
    def weights(watch):
        lm, r = small(CarrySnap)
        r.watch = watch
        live(text, lm, r, 5)
        return [p.clone() for p in ints(r)]
    for a, b in zip(weights(False), weights(True)): assert a.equal(b)


def test_flips_are_drawn():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    draw_flips(ax, [dict(step=1), *(dict(step=i, flips=.1, layers=dict(a=.1, b=0.), goal=.1) for i in (2, 3))])
    assert [l.get_label() for l in ax.get_lines()][2:] == ['mean of the layers', 'target'] and ax.get_xlabel() == 'step'
    draw_flips(Figure().subplots(), [])


def test_workers_add_up_once_a_step(monkeypatch):
    import pi2nb.optim as optim
    calls = []
    monkeypatch.setattr(optim.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(optim.dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(optim.dist, 'all_reduce', lambda t: calls.append(t.mul_(2)))
    layer = hold_integers(nn.Sequential(QuantLinear(4, 4, 'pi2-8')))
    rule = CarrySnap(layer.parameters())
    for n in (1, 2, 3):
        layer(torch.randn(2, 4)).sum().backward()
        rule.gather()
        rule.reduce()
        assert rule.norm() > 0
        rule.step()
        assert len(calls) == n
    layer(torch.randn(2, 4)).sum().backward()
    rule.gather()
    rule.reduce()
    rule.zero_grad()                                                   # a step that is thrown away
    layer(torch.randn(2, 4)).sum().backward()
    rule.step()
    assert len(calls) == 5
