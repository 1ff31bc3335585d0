"The gated delta rule: chunks, steps and pieces agree, nothing looks ahead, nothing but tokens enters the memory"
from copy import deepcopy
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from pi2nb.rotation import QUARTER
from pi2nb.delta import delta_step, delta_chunked, turn_sum, short_conv, DeltaMemory

quick = settings(max_examples=20, deadline=None)
KINDS = {'complex': {}, 'real': dict(real=True), 'dense': dict(code=None, gate_code=None), 'turning': dict(turn=1),
         'quarters': dict(code=None, gate_code=None, turn=QUARTER), 'weak': dict(strength=1.)}
every = pytest.mark.parametrize('kind', KINDS)


def make(kind, dim=16, heads=2):
    "A layer that says something and turns"
    torch.manual_seed(0)
    m = DeltaMemory(dim, heads, **KINDS[kind])
    torch.nn.init.normal_(m.out.weight, std=dim**-.5)
    return m


def example(seed, T, n=4, m=3, dtype=torch.complex128, B=2, H=2):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s, dtype=dtype: torch.randn(*s, generator=g, dtype=dtype)
    wide = torch.zeros(0, dtype=dtype).real.dtype
    k = r(B, H, T, n)
    log_a, b = -r(B, H, T, dtype=wide).exp(), 2*torch.rand(B, H, T, generator=g, dtype=wide)
    return [r(B, H, T, n), k/k.norm(dim=-1, keepdim=True), r(B, H, T, m), log_a, b, r(B, H, m, n)]


def by_steps(q, k, v, log_a, b, S):
    out = []
    for t in range(k.shape[2]):
        y, S = delta_step(*(x[:, :, t] for x in (q, k, v, log_a, b)), S)
        out.append(y)
    return torch.stack(out, 2), S


def same_state(a, b, tol=1e-5):
    for x, y in zip(a[:2], b[:2]): assert torch.allclose(x, y, atol=tol, rtol=1e-4)
    assert (((a[2]-b[2]+2**31) % 2**32) - 2**31).abs().sum() < 2**32*1e-5


@quick
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 50), st.sampled_from([torch.complex128, torch.float64]))
def test_chunks_are_steps(seed, T, chunk, dtype):
    args = example(seed, T, dtype=dtype)
    for a, b in zip(delta_chunked(*args, chunk=chunk), by_steps(*args)): assert torch.allclose(a, b, atol=1e-11)


def test_single_precision():
    args = example(0, 200, 16, 16, torch.complex64)
    for a, b in zip(delta_chunked(*args), by_steps(*args)): assert (a-b).abs().max() < 1e-5*b.abs().max()


@pytest.mark.parametrize('dtype', [torch.complex128, torch.float64])
def test_gradient(dtype):
    args = [t.requires_grad_() for t in example(1, 5, 2, 2, dtype, B=1, H=1)]
    assert torch.autograd.gradcheck(lambda *a: delta_chunked(*a, chunk=3), args)
    grads = lambda f: torch.autograd.grad(sum(t.abs().square().sum() for t in f(*args)), args)
    for a, b in zip(grads(delta_chunked), grads(by_steps)): assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize('strength', [1., 1.99, 2.])
def test_one_key_again_and_again(strength):
    q, k, v, log_a, b, S = example(2, 1000, dtype=torch.complex64)
    k, b, log_a = k[:, :, :1].expand_as(k), torch.full_like(b, strength), 0*log_a
    for a, s in zip(delta_chunked(q, k, v, log_a, b, S, chunk=64), by_steps(q, k, v, log_a, b, S)):
        assert a.isfinite().all() and (a-s).abs().max() < 1e-4*s.abs().max()


def test_a_memory_that_forgets_at_once():
    q, k, v, log_a, b, S = (t.requires_grad_() for t in example(3, 40, dtype=torch.float64))
    y, end = delta_chunked(q, k, v, log_a*1e4, b, S)
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v, log_a, b)) and (end - (b[..., None, None]*v[..., None]*k[..., None, :])[:, :, -1]).abs().max() < 1e-9


def test_no_filling_enters_the_memory():
    args = example(4, 37)
    S = by_steps(*args)[1]
    for chunk in (32, 36, 37, 38, 64): assert (delta_chunked(*args, chunk=chunk)[1]-S).abs().max() < 1e-12
    keep = [t for t in args]; keep[3], keep[4] = 0*args[3], 0*args[4]
    assert torch.allclose(delta_chunked(*keep, chunk=10)[1], args[5], atol=1e-14)


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(0, 30), max_size=4))
def test_turns_in_pieces_are_exact(seed, cuts):
    d = 3*torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(seed))
    whole, end = turn_sum(d)
    at, out = None, []
    for piece in d.tensor_split(sorted(cuts), 1): z, at = turn_sum(piece, at); out.append(z)
    assert torch.equal(torch.cat(out, 1), whole) and torch.equal(at, end) and (0 <= end).all() and (end < 2**32).all()


def test_turns():
    d = torch.rand(2, 6, 2, dtype=torch.float64).requires_grad_()
    f = lambda z: (z*torch.arange(6)[:, None]).real.sum() + z.imag.square().sum()
    a, = torch.autograd.grad(f(turn_sum(d)[0]), d)
    b, = torch.autograd.grad(f(torch.exp(2j*torch.pi*d.cumsum(1))), d)
    assert torch.allclose(a, b, atol=1e-6)
    assert set((turn_sum(5*d.detach(), grain=QUARTER)[1] % QUARTER).flatten().tolist()) == {0}


@quick
@given(st.integers(0, 9), st.integers(0, 9))
def test_conv(T, cut):
    g = torch.Generator().manual_seed(T)
    x, past, w = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, T, 3), (2, 3, 3), (3, 4)))
    y, last = short_conv(x, past, w)
    all_of_it = torch.cat([past, x], 1)
    assert torch.equal(last, all_of_it[:, -3:])
    assert torch.allclose(y, F.silu(F.conv1d(all_of_it.mT, w[:, None], groups=3).mT) if T else x)
    a, p = short_conv(x[:, :cut], past, w)
    b, p = short_conv(x[:, cut:], p, w)
    assert torch.allclose(torch.cat([a, b], 1), y) and torch.equal(p, last)


def test_conv_gradient():
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 5, 3), (2, 3, 3), (3, 4))]
    assert torch.autograd.gradcheck(short_conv, args)


@every
def test_a_fresh_layer_adds_nothing(kind):
    m = DeltaMemory(16, 2, **KINDS[kind])
    assert m(torch.randn(2, 9, 16))[0].abs().max() < .05


@every
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 75), max_size=6))
def test_pieces_are_the_whole(kind, cuts):
    m, x = make(kind), torch.randn(2, 75, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (whole, last), state, out = m(x), None, []
        for piece in x.tensor_split(sorted(cuts), 1): y, state = m(piece, state); out.append(y)
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5, rtol=1e-4)
    same_state(state, last)


@every
def test_token_by_token(kind):
    m, x, state, out = make(kind), torch.randn(2, 40, 16), None, []
    with torch.no_grad():
        whole, last = m(x)
        for t in range(40): y, state = m(x[:, t:t+1], state); out.append(y)
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5, rtol=1e-4)
    same_state(state, last)


@every
def test_causal(kind):
    m, x = make(kind), torch.randn(2, 40, 16, requires_grad=True)
    for t in (0, 13, 31, 32, 39):
        g = torch.autograd.grad(m(x)[0][:, t].sum(), x)[0]
        assert g[:, t+1:].abs().sum() == 0 and g[:, t].abs().sum() > 0
    later = x.detach().clone()
    later[:, 23:] = 1e3
    assert torch.equal(m(later)[0][:, :23], m(x)[0][:, :23])


@every
def test_state(kind):
    m, x = make(kind), torch.randn(2, 12, 16)
    y, state = m(x[:, :0])
    assert y.shape == (2, 0, 16) and torch.allclose(m(x, state)[0], m(x)[0])
    _, state = m(x)
    y, same = m(x[:, :0], state)
    for a, b in zip(state, same): assert torch.equal(a, b)
    assert [t.shape for t in m(x[:, :1], state)[1]] == [t.shape for t in state]
    x.requires_grad_()
    _, state = m(x[:, :8])
    assert torch.autograd.grad(m(x[:, 8:], state)[0].sum(), x)[0][:, :8].abs().sum() > 0
    assert torch.allclose(m(x)[0][1:], m(x[1:])[0], atol=1e-5)


@every
def test_mixed_precision(kind):
    m, x = make(kind), torch.randn(2, 40, 16)
    with torch.autocast('cpu', torch.bfloat16): y, state = m(x); z, _ = m(x, state); z.float().sum().backward()
    assert state[0].dtype == state[1].dtype == torch.float32 and state[2].dtype == torch.int64
    if kind != 'quarters': assert (y-m(x)[0]).abs().max() < .2*m(x)[0].abs().max()


@every
def test_every_parameter_learns(kind):
    m = make(kind)
    m(torch.randn(2, 12, 16))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@every
def test_copies(kind):
    m, x = make(kind), torch.randn(1, 9, 16)
    other = DeltaMemory(16, 2, **KINDS[kind])
    other.load_state_dict(m.state_dict())
    for c in (deepcopy(m), other): assert torch.equal(c(x)[0], m(x)[0])


def test_refuses():
    for bad in ((10, 4), (6, 2), (0, 1), (8, 0)):
        with pytest.raises(ValueError, match='heads'): DeltaMemory(*bad)
    with pytest.raises(ValueError, match='no angle'): DeltaMemory(8, 2, real=True, turn=1)
    args = example(0, 5)
    with pytest.raises(ValueError, match='q and k must be'): delta_chunked(args[0][..., :2], *args[1:])
    with pytest.raises(ValueError, match='q and k must be'): delta_chunked(*args[:3], args[3][..., None], *args[4:])
    with pytest.raises(ValueError, match='S must be'): delta_chunked(*args[:5], args[5][..., :1])
    with pytest.raises(ValueError, match='chunk'): delta_chunked(*args, chunk=0)
    with pytest.raises(ValueError, match='start must be'): turn_sum(torch.zeros(2, 3, 1), torch.zeros(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match='d must be'): turn_sum(torch.zeros(2))
    with pytest.raises(ValueError, match='past'): short_conv(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), torch.zeros(4, 4))
