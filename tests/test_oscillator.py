"Properties of chapters 20a and 23: the complex scan and the two oscillators"
import copy
from math import pi
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from strategies import pieces
from pi2nb.complex_scan import complex_loop, complex_scan, complex_step
from pi2nb.oscillator import DampedOscillator, OscillatorySSM
from pi2nb.rotation import QUARTER

quick = settings(max_examples=25, deadline=None)
KINDS = [OscillatorySSM, DampedOscillator]
kinds = pytest.mark.parametrize('kind', KINDS)


def inputs(n=2, T=20, c=3, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.randn(s, generator=g, dtype=dtype)
    return -rand(n, T, c).abs()/3, rand(n, T, c), rand(n, T, 2*c), rand(n, 2*c)


def make(kind, dim=8, seed=0, **kw):
    torch.manual_seed(seed)
    m = kind(dim, **(dict(code=None, gate_code=None) | kw))
    for name,p in m.named_parameters():
        if name in ('out.weight', 'skip.weight'): nn.init.normal_(p, std=.3)
    return m


# complex scan

@quick
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(0, 40), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans())
def test_scan_is_the_loop(seed, n, T, c, constant_decay, constant_turn, integers):
    log_r, turn, b, h0 = inputs(n, max(T, 1), c, seed)
    if integers: turn = torch.randint(-2**40, 2**40, turn.shape, generator=torch.Generator().manual_seed(seed))
    if constant_decay: log_r = log_r[0, 0]
    if constant_turn: turn = turn[0, 0]
    cut = lambda t: t[:, :T] if t.ndim == 3 else t
    got, want = (f(cut(log_r), cut(turn), b[:, :T], h0) for f in (complex_scan, complex_loop))
    assert got.shape == want.shape == (n, T, 2*c) and torch.allclose(got, want, atol=1e-5)


@quick
@given(pieces(20), st.integers(0, 100))
def test_scan_in_pieces(sizes, seed):
    log_r, turn, b, h = inputs(seed=seed)
    whole, out = complex_scan(log_r, turn, b, h), []
    for lr, t, x in zip(*(v.split(sizes, 1) for v in (log_r, turn, b))):
        out.append(complex_scan(lr, t, x, h))
        if x.shape[1]: h = out[-1][:, -1]
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5)


def test_scan_is_causal():
    log_r, turn, b, h0 = (t.requires_grad_() for t in inputs())
    for t in (0, 7, 19):
        for g in torch.autograd.grad(complex_scan(log_r, turn, b, h0)[:, t].square().sum(), (log_r, turn, b)):
            assert g[:, t+1:].abs().sum() == 0 and g[:, t].abs().sum() > 0


def unrounded(log_r, turn, b, h0):
    h, factor = torch.view_as_complex(h0.unflatten(-1, (-1, 2))), torch.polar(log_r.exp(), 2*pi*turn)
    states = [h := factor[..., t, :]*h + torch.view_as_complex(b[:, t].unflatten(-1, (-1, 2))) for t in range(b.shape[1])]
    return torch.view_as_real(torch.stack(states, 1)).flatten(-2)


@pytest.mark.parametrize('T', [1, 2, 7])
@pytest.mark.parametrize('constant', [False, True])
def test_scan_gradient(T, constant):
    log_r, turn, b, h0 = inputs(T=T, dtype=torch.float64)
    if constant: log_r, turn = log_r[0, 0], turn[0, 0]
    args = [t.requires_grad_() for t in (log_r, turn, b, h0)]
    assert torch.autograd.gradcheck(complex_scan, args, eps=1e-4)
    plain = lambda log_r, turn, b, h0: unrounded(*(t.expand(T, 3) if constant else t for t in (log_r, turn)), b, h0)
    grads = lambda f: torch.autograd.grad((f(*args)*b.detach().cos()).sum(), args)
    for x, y in zip(grads(complex_scan), grads(plain)): assert torch.allclose(x, y, atol=1e-6)


def test_scan_gradient_at_the_edges():
    log_r, turn, b, h0 = (t.requires_grad_() for t in inputs())
    for g in torch.autograd.grad(complex_scan(log_r[:, :0], turn[:, :0], b[:, :0], h0).sum(), (log_r, turn, b, h0)): assert g.abs().sum() == 0
    whole = (turn.detach()*2**32).long()
    assert all(g.isfinite().all() for g in torch.autograd.grad(complex_scan(log_r, whole, b, h0).sum(), (log_r, b, h0)))
    none = torch.full((3,), float('-inf'), requires_grad=True)                     # nothing is kept
    h = complex_scan(none, turn, b, h0)
    assert torch.allclose(h, b, atol=1e-6) and torch.autograd.grad(h.sum(), none)[0].abs().sum() == 0


@quick
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.integers(0, 100))
def test_quarters_are_exact(k, seed):
    b = torch.randint(-9, 10, (1, len(k), 2), generator=torch.Generator().manual_seed(seed)).float()
    turn = torch.tensor(k).view(1, -1, 1)*QUARTER
    h, z = complex_scan(torch.zeros(1), turn, b), 0
    for t,(re, im) in zip(k, b[0].tolist()): z = 1j**(t % 4)*z + complex(re, im)
    assert h[0, -1].tolist() == [z.real, z.imag]


def test_turns_do_not_drift():
    n, unit = 2**14, 123_456_789
    h = complex_scan(torch.zeros(1), torch.tensor([unit]), torch.zeros(1, n, 2), torch.tensor([[1., 0.]]))[0, -1]
    angle = torch.tensor(n*unit % 2**32/2**32*2*pi, dtype=torch.float64)
    assert torch.allclose(h.double(), torch.stack([angle.cos(), angle.sin()]), atol=1e-6)


def test_types():
    log_r, turn, b, h0 = inputs()
    for dtype in (torch.float16, torch.bfloat16):
        h = complex_scan(log_r.to(dtype), turn.to(dtype), b.to(dtype), h0)
        assert h.dtype == torch.float32
        assert torch.allclose(h, complex_loop(log_r.to(dtype).float(), turn.to(dtype).float(), b.to(dtype).float(), h0), atol=1e-5)
    assert complex_scan(log_r, turn, b.double(), h0).dtype == torch.float64
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(complex_scan(log_r, turn, b, h0), complex_scan(log_r, turn, b, h0).float())
    assert complex_step(log_r[:, 0], turn[:, 0], b[:, 0], h0).dtype == torch.float32


@pytest.mark.parametrize('f', [complex_loop, complex_scan])
def test_scan_refuses(f):
    log_r, turn, b, h0 = inputs()
    for bad in (b[0], b[..., :5]):
        with pytest.raises(ValueError, match='pairs of features'): f(log_r, turn, bad, h0)
    for bad in (turn[:, :1], turn[..., :2], turn[0], turn[0, 0, :2]):
        with pytest.raises(ValueError, match='turn must be'): f(log_r, bad, b, h0)
        with pytest.raises(ValueError, match='log_r must be'): f(bad, turn, b, h0)
    with pytest.raises(ValueError, match='h0 must be'): f(log_r, turn, b, h0[:1])


# oscillators

@kinds
def test_a_fresh_layer_adds_nothing(kind):
    for code in (None, 'q2'):
        y, state = kind(8, code=code)(torch.randn(2, 5, 8))
        assert y.abs().max() == 0 if code is None else y.abs().max() < .05
        assert state.shape == (2, 8) and state.abs().sum() > 0


@kinds
@quick
@given(sizes=pieces(20), seed=st.integers(0, 100))
def test_pieces_are_the_whole(kind, sizes, seed):
    m, x, state, out = make(kind), torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(seed)), None, []
    with torch.no_grad():
        whole, last = m(x)
        for piece in x.split(sizes, 1): y, state = m(piece, state); out.append(y)
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5) and torch.allclose(state, last, atol=1e-5)


@kinds
def test_token_by_token(kind):
    m, x, state, out = make(kind, code='q2', gate_code='int8'), torch.randn(2, 40, 8), None, []
    with torch.no_grad():
        for xt in x.split(1, 1): y, state = m(xt, state); out.append(y)
        assert torch.allclose(torch.cat(out, 1), m(x)[0], atol=1e-5)


@kinds
def test_layer_is_causal(kind):
    m, x = make(kind), torch.randn(2, 12, 8, requires_grad=True)
    for t in range(12):
        g = torch.autograd.grad(m(x)[0][:, t].sum(), x)[0]
        assert g[:, t+1:].abs().sum() == 0 and g[:, t].abs().sum() > 0


@kinds
def test_gradients(kind):
    m = make(kind, longest=20.)
    _, state = m(x := torch.randn(2, 12, 8, requires_grad=True))
    y, _ = m(torch.randn(2, 9, 8), state)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in (*m.parameters(), x))


@kinds
def test_gradcheck(kind):
    m, x, s = make(kind, 4, longest=20.).double(), torch.randn(1, 4, 4).double(), torch.randn(1, 4).double()
    assert torch.autograd.gradcheck(lambda x, s, *p: m(x, s)[0], [t.requires_grad_() for t in (x, s)] + list(m.parameters()), eps=1e-4, rtol=2e-3)


@kinds
def test_edges(kind):
    m, x = make(kind), torch.randn(2, 5, 8)
    y, none = m(x[:, :0])
    assert y.shape == (2, 0, 8) and torch.equal(none, torch.zeros(2, 8)) and torch.equal(m(x, none)[0], m(x)[0])
    _, state = m(x)
    assert torch.equal(m(x[:, :0], state)[1], state)
    assert make(kind, state=1)(x)[1].shape == (2, 2) and make(kind, state=5)(x)[0].shape == (2, 5, 8)
    large = m(1e4*x)
    assert all(t.isfinite().all() for t in large)
    large[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    assert make(DampedOscillator, 7)(torch.randn(1, 3, 7))[1].shape == (1, 6)


@kinds
def test_mixed_precision(kind):
    m, x = make(kind), torch.randn(2, 12, 8)
    with torch.autocast('cpu', torch.bfloat16): y, state = m(x); y2, _ = m(x, state); y2.float().sum().backward()
    assert state.dtype == torch.float32 and (y-m(x)[0]).abs().max() < .1*m(x)[0].abs().max()


@kinds
def test_copies(kind):
    m, x = make(kind, code='q2', gate_code='int8'), torch.randn(2, 6, 8)
    other = kind(8)
    other.load_state_dict(m.state_dict())
    before = {k: v.clone() for k,v in m.state_dict().items() if isinstance(v, torch.Tensor)}
    for c in (other, copy.deepcopy(m)): assert torch.equal(c(x)[0], m(x)[0])
    assert all(torch.equal(v, m.state_dict()[k]) for k,v in before.items())     # forward changes nothing


@quick
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_no_spring_explodes(half_life, period):
    m = make(DampedOscillator, 2, state=1)
    with torch.no_grad(): m.log_half_life.fill_(half_life); m.log_period.fill_(period)
    _, state = m(10*torch.randn(1, 50, 2))
    assert state.isfinite().all() and state.abs().max() < 1e3


def test_layers_refuse():
    with pytest.raises(ValueError, match='even'): OscillatorySSM(7)
    for kind in KINDS:
        for bad in (dict(dim=0), dict(dim=4, state=0)):
            with pytest.raises(ValueError, match='at least 1'): kind(**bad)
        with pytest.raises(ValueError, match='above 4'): kind(4, longest=1)
        with pytest.raises(ValueError, match='unknown code'): kind(4, gate_code='int9')
        with pytest.raises(ValueError, match='h0 must be'): kind(4)(torch.randn(2, 3, 4), torch.zeros(1, 4))
