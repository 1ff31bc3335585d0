"Banks and couplers: every registered one, complex and real, keeps the rules of a mixer"
from copy import deepcopy
import pytest, torch
from hypothesis import given, settings, strategies as st
from strategies import pieces
from pi2nb.banks import (BANKS, COUPLERS, BankConfig, Banks, Coupler, MeanCoupler, PhaseBank, RouterCoupler, register_bank,
                         register_coupler)
from pi2nb.quantlinear import coded_state, frozen_copy, hold_integers
from pi2nb.rotation import cos_sin, phase_mul

DIM = 8
OURS = ['semantic', 'context', 'emotion', 'language', 'morphology']
SIZES = dict(concepts=9, patterns=6, languages=3, emotions=3, window=4)
quick = settings(max_examples=8, deadline=None)
real = pytest.mark.parametrize('real', [False, True])
coupler = pytest.mark.parametrize('coupler', ['mean', 'document', 'router'])
both = pytest.mark.parametrize('code', [None, 'q2'])


def config(code=None, real=False, **kw): return BankConfig(DIM, code, code and 'int8', real, **SIZES | kw)


def layer(coupler='router', code=None, real=False, banks=', '.join(OURS), seed=0):
    "A layer whose output matrix and router are not zero, so that something can be seen"
    torch.manual_seed(seed)
    m = Banks(DIM, banks, coupler, code, code and 'int8', real, **SIZES)
    torch.nn.init.normal_(m.out.weight, std=.3)
    if hasattr(m.coupler, 'down'): torch.nn.init.normal_(m.coupler.down.weight)
    return m


def in_pieces(m, x, sizes):
    state, out = None, []
    for piece in x.split(sizes, 1): y, state = m(piece, state); out.append(y)
    return torch.cat(out, 1), state


def same_states(a, b): return all(torch.allclose(s, t, atol=1e-6) and s.dtype == t.dtype == torch.float32 for s, t in zip(a, b, strict=True))


def test_registered():
    assert [n for n in BANKS if n in OURS] == OURS and list(COUPLERS)[:3] == ['mean', 'document', 'router']
    assert COUPLERS['mean'] is MeanCoupler


@real
@coupler
@both
@quick
@given(sizes=pieces(12))
def test_pieces_are_the_whole(real, coupler, code, sizes):
    m, x = layer(coupler, code, real), torch.randn(2, 12, DIM)
    with torch.no_grad(): (whole, last), (out, state) = m(x), in_pieces(m, x, sizes)
    assert torch.allclose(out, whole, atol=1e-5) and same_states(state, last)
    assert [s.shape for s in state] == [(2, b.reach, DIM) for b in m.banks]


@real
@coupler
def test_token_by_token(real, coupler):
    m, x = layer(coupler, real=real), torch.randn(3, 9, DIM)
    out, state = in_pieces(m, x, [1]*9)
    assert torch.allclose(out, m(x)[0], atol=1e-5) and same_states(state, m(x)[1])
    assert m.banks[1].reach == 3 and torch.equal(state[1], x[:, -3:])


@real
@pytest.mark.parametrize('name', OURS)
def test_causal(real, name):
    torch.manual_seed(0)
    bank, x = BANKS[name](config(real=real)), torch.randn(2, 10, DIM, requires_grad=True)
    for t in range(10):
        g = torch.autograd.grad(bank(x)[0][:, t].sum(), x)[0]
        assert g[:, t+1:].abs().sum() == 0 and g[:, t].abs().sum() > 0
        assert g[:, :max(t-bank.reach, 0)].abs().sum() == 0


@coupler
def test_a_planted_leak_is_seen(coupler):
    class Leak(PhaseBank):
        def look(self, x): return x + x.mean(1, keepdim=True)
    m, x = layer(coupler), torch.randn(2, 10, DIM)
    later = x.clone(); later[:, 6:] += 1
    assert torch.allclose(m(later)[0][:, :6], m(x)[0][:, :6], atol=1e-6)
    m.banks[2] = Leak(config())
    assert not torch.allclose(m(later)[0][:, :6], m(x)[0][:, :6], atol=1e-3)


@real
@coupler
@pytest.mark.parametrize('T', [0, 1, 2, 5])
def test_short_texts_and_one_bank(real, coupler, T):
    m = layer(coupler, real=real, banks='context')
    y, state = m(torch.randn(2, T, DIM))
    assert y.shape == (2, T, DIM) and state[0].shape == (2, 3, DIM)
    assert m.coupler.loss([torch.randn(2, 3, DIM)]).item() == 0


def test_a_piece_of_nothing_changes_nothing():
    m, x = layer(), torch.randn(2, 5, DIM)
    _, state = m(x)
    y, again = m(x[:, :0], state)
    assert y.shape == (2, 0, DIM) and same_states(state, again)


def test_batch_rows_do_not_meet():
    m, x = layer(), torch.randn(3, 7, DIM)
    assert torch.allclose(m(x)[0][1:2], m(x[1:2])[0], atol=1e-5)


@real
@coupler
@both
def test_a_fresh_layer_adds_nothing(real, coupler, code):
    m = Banks(DIM, ','.join(OURS), coupler, code, code and 'int8', real, **SIZES)
    assert m(torch.randn(2, 6, DIM))[0].abs().max() < (.05 if code else 1e-9)


@real
@coupler
@both
def test_every_parameter_learns(real, coupler, code):
    m, x = layer(coupler, code, real), torch.randn(2, 12, DIM)
    (m(x)[0].square().sum() + m.coupler.loss([b(x)[0] for b in m.banks])).backward()
    dead = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.isfinite().all() or p.grad.abs().sum() == 0]
    assert not dead


@real
@coupler
def test_gradient(real, coupler):
    m, x = layer(coupler, real=real, banks='semantic, context').double(), torch.randn(1, 5, DIM, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(1, b.reach, DIM, dtype=torch.float64, requires_grad=True) for b in m.banks]
    assert torch.autograd.gradcheck(lambda x, s: m(x, [state[0], s])[0], (x, state[1]))
    assert torch.autograd.gradcheck(lambda x: m.coupler.loss([b(x)[0] for b in m.banks]), (x,))


def test_gradient_reaches_through_the_state():
    m, x = layer(), torch.randn(1, 8, DIM, requires_grad=True)
    g, = torch.autograd.grad(m(x[:, 5:], m(x[:, :5])[1])[0].sum(), x)
    assert g[:, 2:5].abs().sum() > 0 and g[:, :2].abs().sum() == 0


def test_zero_inputs_are_no_trouble():
    for r in (False, True):
        m, x = layer(real=r), torch.zeros(1, 4, DIM, requires_grad=True)
        (m(x)[0].sum() + m.coupler.loss([b(x)[0] for b in m.banks])).backward()
        assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in m.parameters())


@real
@coupler
def test_mixed_precision(real, coupler):
    m, x = layer(coupler, real=real), torch.randn(2, 9, DIM)
    with torch.autocast('cpu', torch.bfloat16):
        for v in (x, x.bfloat16()):
            y, state = m(v)
            out, again = in_pieces(m, v, [4, 5])
            assert same_states(state, again) and torch.allclose(out.float(), y.float(), atol=.05)
    assert (y.float() - m(x)[0]).abs().max() < .1*m(x)[0].abs().max() + .02
    y.float().sum().backward()


@coupler
def test_copies_and_files(coupler):
    m, x = layer(coupler, 'q2'), torch.randn(2, 6, DIM)
    new = layer(coupler, 'q2', seed=1)
    assert not torch.allclose(new(x)[0], m(x)[0], atol=1e-3)
    new.load_state_dict(m.state_dict())
    for other in (new, deepcopy(m), frozen_copy(m)): assert torch.allclose(other(x)[0], m(x)[0], atol=1e-5)
    assert all(len(v.shape) == 1 or v.code for v in coded_state(m).values())


@real
def test_integers(real):
    "All matrices are held in a code, so the rules for integers take the whole layer"
    m = Banks(DIM, ', '.join(OURS), 'document', 'pi2-8', 'pi2-8', real, **SIZES)
    hold_integers(m)
    assert all(p.dtype == torch.uint8 or p.ndim < 2 for p in m.parameters())
    m(torch.randn(1, 3, DIM))


def test_what_turns_with_the_input():
    "The maps of the language bank, the layers and a fresh coupler know no angle: turning the input turns the output"
    c, x = config(), torch.randn(2, 4, DIM)
    turned = lambda x: phase_mul(x.unflatten(-1, (-1, 2)), cos_sin(987654321)).flatten(-2)
    for f in (c.matrix(DIM, DIM), c.act(), BANKS['semantic'](c).layers): assert torch.allclose(f(turned(x)), turned(f(x)), atol=1e-5)
    for n in ('mean', 'document', 'router'):
        k = COUPLERS[n](c, 2)
        assert torch.allclose(k([turned(x), turned(2*x)]), turned(k([x, 2*x])), atol=1e-5)


def test_router():
    m = RouterCoupler(config(), 3)
    said = [v*torch.randn(2, 5, DIM) for v in (1, 2, 3)]
    assert torch.allclose(m.weights(said), torch.full((2, 5, 3), 1/3))
    torch.nn.init.normal_(m.down.weight)
    w = m.weights(said)
    assert torch.allclose(w.sum(-1), torch.ones(2, 5)) and w.std() > .01
    silent = m.loss([said[0]]*3)                                     # same banks: coherence 1, half of it too much
    assert torch.allclose(silent, .05 - m.weights([said[0]]*3).flatten(0, 1).var(0, correction=0).mean(), atol=1e-6)


def test_a_bank_and_a_coupler_of_ones_own():
    @register_bank('test: sum of two')
    class Two(PhaseBank):
        def build(self, c): self.reach = 1
        def look(self, seen): return seen[:, 1:] + seen[:, :-1]

    @register_coupler('test: last')
    class Last(Coupler):
        def forward(self, said): return said[-1]
    try:
        m, x = layer('test: last', banks='context, test: sum of two'), torch.randn(1, 4, DIM)
        assert torch.allclose(m(x)[0], m.out(x + torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]), atol=1e-6)
        with pytest.raises(ValueError, match='taken by'): register_bank('context')(Two)
    finally: del BANKS['test: sum of two'], COUPLERS['test: last']


def test_config():
    c = config('q2', True)
    assert BankConfig(**c.to_dict()) == c and BankConfig(64).concepts == 512 and BankConfig(64).window == 8
    assert BANKS['semantic'](config(layers=0))(torch.randn(1, 2, DIM))[0].shape == (1, 2, DIM)
    assert Banks(DIM, 'context', window=1)(torch.randn(1, 2, DIM))[1][0].shape == (1, 0, DIM)


def test_refuses():
    for bad, says in ((dict(dim=7), 'even'), (dict(dim=0), 'even'), (dict(dim=8, concepts=0), 'concepts=0'), (dict(dim=8, layers=-1), 'layers=-1')):
        with pytest.raises(ValueError, match=says): BankConfig(**bad)
    for banks in ('semantic, smell', '', 'semantic,,context'):
        with pytest.raises(ValueError, match='unknown bank .*choose one of semantic'): Banks(DIM, banks)
    with pytest.raises(ValueError, match='unknown coupler'): Banks(DIM, coupler='glue')
    with pytest.raises(ValueError, match='unknown code'): Banks(DIM, code='q9')
    with pytest.raises(NotImplementedError, match='write one'): PhaseBank(config())(torch.randn(1, 1, DIM))
    class Long(PhaseBank):
        reach = 1
        def look(self, seen): return seen
    with pytest.raises(ValueError, match='for every new position'): Long(config())(torch.randn(1, 1, DIM))
