"Rules that move integers: what they keep, what they refuse, and that they are integers"
import math, os, subprocess, sys
from copy import deepcopy
import pytest, torch
import pi2nb.optim
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn
from pi2nb.model import LM, LMConfig, MIXERS
from pi2nb.optim import (CarrySnap, FloatCount, GhostVotes, IntegerRule, Muon, OPTIMIZERS, _bit_length, _pack4, _shift, _unpack4, integer_matmul, integer_newton_schulz,
                         make_optimizers, newton_schulz, set_rate, split_params, static_bytes)
from pi2nb.ghost import GhostLinear
from pi2nb.quantlinear import QuantLinear, coded_state, frozen_copy, hold_integers, load_coded_state

GRID = dict(code='pi2-8', gate_code='pi2-8', embed_code='pi2-8')


def model(seed=0, **kw):
    torch.manual_seed(seed)
    return LM(LMConfig(**dict(layout='GQA, CfC', dim=32, heads=2, kv_heads=1) | GRID | kw))


def backward(lm, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (2, 17), generator=g)
    loss = nn.functional.cross_entropy(lm(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.item()


def feed(p, g): # give an integer weight a gradient
    p.leaf = torch.zeros(p.shape, requires_grad=True)
    p.leaf.grad, p.top = g, 254


@given(st.lists(st.integers(0, 2**31-1), min_size=1, max_size=20))
def test_bit_length(xs): assert _bit_length(torch.tensor(xs, dtype=torch.int32)).tolist() == [x.bit_length() for x in xs]


@pytest.mark.parametrize('by_bytes', [True, False])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_integer_products_are_exact_either_way(monkeypatch, by_bytes, r, k, c, seed):
    x = torch.full((64, 64), 127, dtype=torch.int8)
    if by_bytes and (torch._int_mm(x, x) != 64*127**2).any(): pytest.skip('this processor saturates')
    monkeypatch.setattr(pi2nb.optim, '_by_bytes', lambda device: by_bytes)
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randint(-16255, 16256, (r, k), generator=g, dtype=torch.int32), torch.randint(-16255, 16256, (k, c), generator=g, dtype=torch.int32)
    assert torch.equal(integer_matmul(a, b).long(), (a.long()@b.long() + 2**31) % 2**32 - 2**31)


@given(st.integers(-2**28, 2**28), st.integers(1, 20))
def test_shift_rounds_to_nearest(x, k): assert abs(_shift(torch.tensor(x), k).item() - x/2**k) <= .5


@given(st.integers(1, 9), st.integers(1, 9), st.randoms())
def test_nibbles(r, c, rnd):
    x = torch.tensor([[rnd.randint(-8, 7) for _ in range(c)] for _ in range(r)], dtype=torch.int32)
    assert torch.equal(_unpack4(_pack4(x), x.shape), x) and _pack4(x).numel() == math.ceil(r*c/2)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(-12, 0), st.integers(0, 10**6))
def test_normalised_gradient_does_not_depend_on_its_size(r, c, size, seed):
    torch.manual_seed(seed)
    w = hold_integers(QuantLinear(c, r, 'pi2-8')).weight
    g, rule = (torch.rand(r, c)*.8 + .2)*torch.randn(r, c).sign()*10**size, IntegerRule([w], lr=1., clip=4)
    for _ in range(8):                                                 # the exponent finds its place
        feed(w, g.clone())
        rule.gather()
        state = rule.state[w]
        v = rule._normalised(state.pop('sum'), state, 4)
    a = g.abs()
    want = (g*a.mean()/(a.mean(1, keepdim=True)*a.mean(0))).clamp(-4, 4)
    assert ((v/256 - want).abs() < .05 + .2*want.abs()).all()          # the means began coarse
    assert v.dtype == torch.int32


@pytest.mark.parametrize('bits', [8, 4, 0])
def test_nothing_is_lost(bits):
    w = hold_integers(QuantLinear(6, 5, 'pi2-8')).weight
    w.fill_(200)
    rule = CarrySnap([w], lr=.013, momentum=0, carry=bits)
    for _ in range(3000):
        feed(w, torch.full((5, 6), .5))
        rule.step()
    gone = 200 - w.int() - (0 if not bits else (_unpack4(rule.state[w]['carry'], w.shape) if bits == 4 else rule.state[w]['carry'])/2**bits)
    assert (gone - 3000*.013).abs().max() < (5 if not bits else 5/2**bits + .2)


@pytest.mark.parametrize('rule', [CarrySnap, GhostVotes])
def test_ends_of_the_grid_hold(rule):
    w = hold_integers(QuantLinear(4, 4, 'pi2-8')).weight
    for value, sign in ((254, -1.), (0, 1.)):
        w.fill_(value)
        opt = rule([w], lr=50.)
        for _ in range(5): feed(w, torch.full((4, 4), sign)); opt.step()
        assert (w == value).all()


@pytest.mark.parametrize('name', ['carry', 'votes'])
def test_learns_and_goes_through_state_dict(name):
    lm = model()
    rule, = make_optimizers(lm, name, 1., 2.)
    losses = []
    for i in range(12): losses.append(backward(lm)); rule.step()
    assert losses[-1] < losses[0] - .5
    twin = model(1)
    other, = make_optimizers(twin, name, 1., 2.)
    twin.load_state_dict(lm.state_dict())
    other.load_state_dict(deepcopy(rule.state_dict()))
    for i in range(3): backward(lm, i), rule.step(), backward(twin, i), other.step()
    for a, b in zip(lm.parameters(), twin.parameters()): assert torch.equal(a, b)
    assert all(not t.is_floating_point() for s in rule.state.values() for t in s.values() if isinstance(t, torch.Tensor))


def test_a_file_can_learn_on():
    lm = model()
    rule, = make_optimizers(lm, 'carry', 1., 2.)
    for i in range(3): backward(lm, i), rule.step()
    ice, ids = frozen_copy(lm), torch.arange(20)[None]
    again, = make_optimizers(ice, 'carry', 1., 2.)
    assert torch.equal(ice(ids)[0], lm(ids)[0])
    for a, b in zip(ice.parameters(), lm.parameters()): assert torch.equal(a, b)
    backward(ice), again.step()


def test_tied_weights_move_once_and_together():
    lm = model(tied=True)
    rule, = make_optimizers(lm, 'votes', 1., 1.)
    assert lm.embed.weight is lm.head.weight and lm.embed.weight.dtype == torch.uint8
    backward(lm), rule.step()
    x = torch.arange(5)[None]
    assert torch.equal(frozen_copy(lm)(x)[0], lm(x)[0])


def test_zero_gradient_moves_nothing_for_ever():
    w = hold_integers(QuantLinear(4, 4, 'pi2-8')).weight
    before, rule = w.clone(), GhostVotes([w])
    for _ in range(40): feed(w, torch.zeros(4, 4)); rule.step()
    assert torch.equal(w, before) and abs(rule.state[w]['exponent']) <= 60


def test_refusals():
    w = hold_integers(QuantLinear(4, 4, 'pi2-8')).weight
    with pytest.raises(ValueError, match='hold_integers'): CarrySnap([nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(ValueError, match='8, 4 or 0'): CarrySnap([w], carry=3)
    with pytest.raises(ValueError, match='momentum'): CarrySnap([w], momentum=1.)
    with pytest.raises(ValueError, match='unknown optimizer'): make_optimizers(nn.Linear(2, 2), 'adam')
    for bad in (math.nan, math.inf):
        g = torch.ones(4, 4); g[1, 2] = bad
        feed(w, g)
        with pytest.raises(ValueError, match='NaN or infinity'): CarrySnap([w]).step()
    with pytest.raises(ValueError, match='turns weights'): make_optimizers(model(code='q2-hadamard'), 'carry', 1., 1.)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_exact_newton_schulz_does_not_depend_on_order(r, c, seed):
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(-1024, 1025, (r, c), generator=g, dtype=torch.int32)
    i, j = torch.randperm(r, generator=g), torch.randperm(c, generator=g)
    u = integer_newton_schulz(t)
    assert torch.equal(integer_newton_schulz(t[i][:, j]), u[i][:, j])
    assert r == c or torch.equal(integer_newton_schulz(t.T), u.T)         # a square is multiplied from the left
    assert integer_newton_schulz(torch.zeros(r, c).int()).count_nonzero() == 0


def test_counts_and_bytes():
    lm = model(dim=128)
    rule, = make_optimizers(lm, 'votes', 1., 1.)
    for i in range(2):
        backward(lm, i)
        rule.gather()
        with FloatCount() as c: rule._advance()
    assert not c.ops and 3 < static_bytes(lm, [rule])/lm.n_params() < 4
    with FloatCount() as c: torch.ones(3)*2
    assert c.ops['aten::mul'] == 1
    lm = model(dim=128)
    rule, = make_optimizers(lm, 'carry', 1., 1.)
    backward(lm), rule.step()
    assert static_bytes(lm, [rule])/lm.n_params() < 3


@pytest.mark.parametrize('rows', [0, .9])
def test_a_batch_is_one_by_one(rows):
    g = torch.Generator().manual_seed(0)
    shapes = [(6, 9), (9, 6), (6, 9), (7, 7), (9, 6)]
    ps, qs = ([nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2))
    together, each = Muon(ps, .1, rows=rows), [Muon([q], .1, rows=rows) for q in qs]
    for _ in range(3):
        for p, q in zip(ps, qs): p.grad = q.grad = torch.randn(p.shape, generator=g)
        for o in (together, *each): o.step()
    for p, q in zip(ps, qs): assert torch.allclose(p, q, atol=1e-6)
    again = Muon(qs, 9., rows=rows)
    again.load_state_dict(deepcopy(together.state_dict()))
    for p, q in zip(ps, qs): p.grad = q.grad = torch.randn(p.shape, generator=g)
    together.step(), again.step()
    for p, q in zip(ps, qs): assert torch.allclose(p, q, atol=1e-6)


def test_options_behind_the_name():
    lm = model(code='q2', gate_code='int8', embed_code='int8')
    muon, adam = make_optimizers(lm, 'muon, steps=5, rows=.9, int8=.5, head=2, vectors=.1', 1., .1)
    assert [(g['lr'], g['steps'], g['rows']) for g in muon.param_groups] == [(.5, 5, .9), (1., 5, .9)]
    rates = {id(p): g['lr'] for o in (muon, adam) for g in o.param_groups for p in g['params']}
    of = lambda name: rates[id(lm.get_parameter(name))]
    assert (of('blocks.1.mixer.rate.weight'), of('blocks.0.mlp.up.weight'), of('head.weight'), of('embed.weight')) == (.5, 1., .2, .1)
    assert len(rates) == len(list(lm.parameters())) and {g['peak'] for g in adam.param_groups} == set(rates.values()) - {.5, 1.}
    for bad, says in {'muon, q3=2': 'nothing in this model is called', 'muon, steps': 'no option of muon', 'carry, steps=5': "carry has no option 'steps'", 'muon, rows=1': 'at least one step'}.items():
        with pytest.raises(ValueError, match=says): make_optimizers(model(code='q2'), bad)


def test_schedule_and_registry():
    assert {'muon', 'adamw', 'carry', 'votes'} <= OPTIMIZERS.keys()
    lm = model()
    rule, = make_optimizers(lm, 'carry', 1., 2.)
    set_rate([rule], .25)
    assert [g['lr'] for g in rule.param_groups] == [.25, .5]
    mats, rest = split_params(lm)
    assert [len(g['params']) for g in rule.param_groups] == [len(mats), len(rest)]
    sched = torch.optim.lr_scheduler.LinearLR(rule, 1., .5, 2)       # torch's own schedulers too
    backward(lm), rule.step(), sched.step()
    assert rule.param_groups[0]['lr'] < .25


def test_exact_newton_schulz_is_newton_schulz():
    g = torch.Generator().manual_seed(0)
    for shape, size in (((1, 2), 1), ((1, 3), 1), ((3, 40), 2), ((40, 3), 900), ((64, 64), 1000)):
        t = torch.randint(-size, size + 1, shape, generator=g, dtype=torch.int32)
        t[0, 0] = size
        want = newton_schulz(t.double())*256*max(shape)**.5
        assert (integer_newton_schulz(t) - want).abs().max() < 12


def test_a_processor_that_saturates_gets_exact_products(): # an old processor, as oneDNN would see it
    code = ('import torch; from pi2nb.optim import integer_matmul; a = torch.randint(-16000, 16001, (64, 64), dtype=torch.int32);'
            'assert torch.equal(integer_matmul(a, a.T), (a.long()@a.T.long()).int())')
    subprocess.run([sys.executable, '-c', code], check=True, env=os.environ | dict(ONEDNN_MAX_CPU_ISA='AVX2'))


def test_large_rates_do_not_wrap():
    for orthogonal in (True, False):
        w = hold_integers(QuantLinear(256, 256, 'pi2-8')).weight
        w.fill_(127)
        rule = CarrySnap([w], lr=64., orthogonal=orthogonal)
        feed(w, torch.eye(256))
        rule.step()
        assert (w.diagonal() < 100).all()


def test_rounding_has_no_bias():
    w = hold_integers(QuantLinear(64, 64, 'pi2-8')).weight
    rule, g = IntegerRule([w], lr=1., clip=4), torch.Generator().manual_seed(0)
    total = 0
    for _ in range(100):
        x = (torch.randn(64, 64, generator=g)*2**12).int()
        total = total + rule._normalised(x, dict(exponent=20), 4) + rule._normalised(-x, dict(exponent=20), 4)
    assert abs(total.float().mean().item()/200) < .1  # of 256


def test_a_rolled_back_layer_computes_with_what_was_loaded():
    lm, x = model(), torch.arange(9)[None]
    rule, = make_optimizers(lm, 'carry', 1., 2.)
    best, want = coded_state(lm), lm(x)[0]
    for i in range(3): backward(lm, i), rule.step()
    assert not torch.equal(lm(x)[0], want)                             # and the snapshot has not moved with the model
    hold_integers(load_coded_state(lm, best))
    assert torch.equal(lm(x)[0], want)


def test_a_loaded_model_trains_its_vectors():
    ice = frozen_copy(hold_integers(model()))
    rule, = make_optimizers(ice, 'votes', 1., 1.)
    before = {n: p.detach().clone() for n, p in ice.named_parameters()}
    for i in range(3): backward(ice, i), rule.step()
    assert all(not torch.equal(p, before[n]) for n, p in ice.named_parameters() if p.is_floating_point())


def test_votes_at_rate_zero_and_ghost_layers():
    w = hold_integers(QuantLinear(4, 4, 'pi2-8')).weight
    before, rule = w.clone(), GhostVotes([w], lr=0.)
    for _ in range(50): feed(w, torch.ones(4, 4)); rule.step()
    assert torch.equal(w, before)
    for rule in (GhostVotes, CarrySnap): # 16-bit indices of chapter 13
        layer = GhostLinear(8, 4)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        opt, losses = rule([layer.weight], lr=16.), []
        for _ in range(150):
            loss = (layer(x) - x[:, :4]).square().mean()
            loss.backward(), opt.step()
            losses.append(loss.item())
        assert losses[-1] < .7*losses[0]


@pytest.mark.parametrize('rule', ['carry', 'votes'])
@pytest.mark.parametrize('mixer', MIXERS)
def test_every_mixer_learns_in_integers(mixer, rule):
    torch.manual_seed(0)
    grid = dict.fromkeys(('code', 'gate_code', 'embed_code'), 'pi2-8')
    lm, ids = LM(LMConfig(layout=mixer, dim=16, heads=2, kv_heads=1, window=8, slots=8, **grid)), torch.randint(0, 256, (2, 12))
    opts = make_optimizers(lm, rule, 1., 4.)
    before = {n: p.detach().clone() for n, p in lm.named_parameters()}
    for _ in range(3):
        torch.nn.functional.cross_entropy(lm(ids)[0].flatten(0, 1), ids.flatten()).backward()
        for o in opts: o.gather(); o.step()
        lm.zero_grad(set_to_none=True)
    assert any(not torch.equal(p, before[n]) for n, p in lm.named_parameters() if p.dtype == torch.uint8)
