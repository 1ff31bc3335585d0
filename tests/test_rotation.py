"Properties of chapter 01: quarter turns, turns, complex pairs, Cayley's rotation, latent rotation, interleaved models"
import math
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.autograd import gradcheck
from pi2nb.rotation import (QUARTER, cayley, coherence, cos_sin, interleave_models, latent_rotation, phase_abs, phase_conj, phase_mul,
                            quarter_turn, radians_to_turns, turns_of, turns_to_radians)

quick = settings(max_examples=50, deadline=None)
SHAPES = [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 3, 4)]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
shapes, floats = pytest.mark.parametrize('shape', SHAPES), pytest.mark.parametrize('dtype', FLOATS)
any_turn = st.integers(-2**31, 2**31-1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def signed(n): return (n + 2**31) % 2**32 - 2**31  # what int32 makes of an integer


# quarter turns

@floats
@shapes
def test_quarter_turns_are_the_group_of_four(shape, dtype):
    x = normal(*shape, 2, dtype=dtype)
    for i in range(-5, 6):
        y = quarter_turn(x, i)
        assert y.shape == x.shape and y.dtype == dtype
        assert torch.equal(y, quarter_turn(x, i % 4)) and torch.equal(quarter_turn(y, -i), x)
        for j in range(4): assert torch.equal(quarter_turn(y, j), quarter_turn(x, i + j))
    assert torch.equal(quarter_turn(x, 2), -x)


@quick
@given(st.integers(-10**30, 10**30))
def test_any_count_of_quarters(k):
    assert torch.equal(quarter_turn(torch.tensor([3, 1]), k), torch.tensor([[3, 1], [-1, 3], [-3, -1], [1, -3]][k % 4]))


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint32])
def test_a_tensor_of_quarters_broadcasts(dtype):
    x, k = normal(3, 4, 2), torch.arange(4).to(dtype)
    y = quarter_turn(x, k)
    for i in range(4): assert torch.equal(y[:, i], quarter_turn(x[:, i], i))
    assert quarter_turn(x[0, 0], k).shape == (4, 2)


def test_quarters_carry_what_is_not_finite():
    y = quarter_turn(torch.tensor([math.inf, math.nan]), 1)
    assert y[0].isnan() and y[1] == math.inf


# turns

@quick
@given(st.lists(any_turn, min_size=1, max_size=30), st.integers(-10**9, 10**9))
def test_turns_are_integers_modulo_a_circle(ts, n):
    t = torch.tensor(ts, dtype=torch.int32)
    assert t.sum(dtype=torch.int32).item() == signed(sum(ts))
    assert t.cumsum(0, dtype=torch.int32)[-1].item() == signed(sum(ts))
    assert (t*n).tolist() == [signed(x*n) for x in ts]
    assert torch.equal(cos_sin(t.long() + 2**32*n), cos_sin(t))  # integers of any width


@quick
@given(any_turn)
def test_turns_survive_the_way_there_and_back(t):
    assert turns_of(cos_sin(t, torch.float64)).item() == t
    assert radians_to_turns(turns_to_radians(t, torch.float64)).item() == t
    assert turns_of(quarter_turn(cos_sin(t, torch.float64), 1)).item() == signed(t + QUARTER)


@quick
@given(any_turn)
def test_cos_sin_is_cosine_and_sine(t):
    angle = t*2*math.pi/2**32
    for dtype, eps in (torch.float64, 1e-15), (torch.float32, 1.3e-7), (torch.bfloat16, 4e-3):
        c, s = cos_sin(t, dtype)
        assert c.dtype == dtype and abs(c.item() - math.cos(angle)) <= eps and abs(s.item() - math.sin(angle)) <= eps


@floats
def test_cos_sin_is_exact_at_the_quarters(dtype):
    t = torch.arange(-8, 9)*QUARTER
    assert cos_sin(t, dtype).tolist() == [[[1, 0], [0, 1], [-1, 0], [0, -1]][k % 4] for k in range(-8, 9)]


@quick
@given(st.floats(-1e6, 1e6))
def test_radians_to_turns_is_the_nearest(x):
    t = radians_to_turns(x).item()
    gap = (t/2**32 - x/(2*math.pi) + .5) % 1 - .5
    assert abs(gap) <= .51/2**32 + 1e-10*abs(x)/1e6


@shapes
def test_shapes_of_turns(shape):
    t = radians_to_turns(normal(*shape))
    assert t.shape == shape and t.dtype == torch.int32
    assert turns_to_radians(t).shape == shape and cos_sin(t).shape == (*shape, 2)
    assert turns_of(cos_sin(t)).shape == shape and turns_of(cos_sin(t)).dtype == torch.int32


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_an_angle_must_be_finite(bad):
    with pytest.raises(ValueError, match='not a number'): radians_to_turns(torch.tensor([1., bad]))
    with pytest.raises(ValueError, match='not a number'): turns_of(torch.tensor([math.nan, 1.]))


@pytest.mark.parametrize('bad', [1.5, torch.tensor(1.), torch.tensor(True), torch.tensor(1j)])
def test_turns_must_be_integers(bad):
    x = torch.ones(2)
    for f in (turns_to_radians, cos_sin, lambda t: quarter_turn(x, t), lambda t: latent_rotation(x, t)):
        with pytest.raises(ValueError, match='radians_to_turns'): f(bad)


# pairs

@shapes
def test_pairs_are_complex_numbers(shape):
    a, b = (normal(*shape, 2, seed=s, dtype=torch.float64) for s in (1, 2))
    c = torch.view_as_complex
    assert torch.allclose(c(phase_mul(a, b)), c(a)*c(b)) and torch.equal(c(phase_conj(a)), c(a).conj().resolve_conj())
    assert torch.allclose(phase_abs(a), c(a).abs())
    assert torch.equal(phase_mul(a, torch.tensor([0., 1.])), quarter_turn(a, 1))


@pytest.mark.parametrize('f', [phase_conj, phase_abs, turns_of, lambda z: phase_mul(z, z), lambda z: quarter_turn(z, 1), lambda z: coherence(z, z)])
@pytest.mark.parametrize('shape', [(), (3,), (2, 1), (2, 2, 4)])
def test_pairs_are_needed(f, shape):
    with pytest.raises(ValueError, match='pairs'): f(torch.ones(shape))


@quick
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_coherence_is_bounded_and_one_for_equals(seed, dim, scale):
    a, b = normal(7, dim, 2, seed=seed), normal(7, dim, 2, seed=seed+1)
    v = coherence(a, b)
    assert v.shape == (7,) and v.abs().max() <= 1 and coherence(a, a).max() <= 1
    assert torch.allclose(coherence(a, a), torch.ones(7), atol=1e-5) and torch.allclose(coherence(a, -a*scale), -torch.ones(7), atol=1e-5)
    assert torch.allclose(v, torch.cosine_similarity(a.flatten(1), b.flatten(1)), atol=1e-5) and torch.allclose(v, coherence(b, a))


def test_coherence_of_edges():
    one, zero = torch.ones(3, 2), torch.zeros(3, 2, requires_grad=True)
    assert coherence(one, zero) == 0 and coherence(one[:0], one[:0]) == 0
    assert torch.autograd.grad(coherence(zero, one), zero)[0].isfinite().all()
    assert coherence(torch.full((3, 2), math.nan), one).isnan()
    assert torch.equal(coherence(normal(5, 1, 3, 2), normal(4, 3, 2)), torch.stack([coherence(a, normal(4, 3, 2)) for a in normal(5, 1, 3, 2)]))
    with pytest.raises(ValueError, match='dim'): coherence(one, torch.ones(1, 2))


# Cayley

@quick
@given(st.floats(-1e30, 1e30))
def test_cayley_is_a_rotation_by_twice_the_arctangent(a):
    c, s = cayley(torch.tensor(a, dtype=torch.float32))
    assert abs(c - math.cos(2*math.atan(a))) < 1e-6 and abs(s - math.sin(2*math.atan(a))) < 1e-6


@pytest.mark.parametrize('a', [0., 1., 1e10, 1e30, -1e38])
def test_cayley_has_a_finite_gradient(a):
    a = torch.tensor(a, requires_grad=True)
    assert torch.autograd.grad(cayley(a).sum(), a)[0].isfinite()


# latent rotation

@floats
@pytest.mark.parametrize('shape', [(0,), (2,), (6,), (3, 4), (2, 3, 8), (2, 1, 3, 4), (0, 4)])
def test_latent_rotation_by_quarters_is_exact(shape, dtype):
    x = normal(*shape, dtype=dtype)
    for k in range(-4, 5):
        y = latent_rotation(x, k*QUARTER)
        assert y.shape == x.shape and y.dtype == dtype
        assert torch.equal(y, quarter_turn(x.unflatten(-1, (-1, 2)), k).flatten(-2) if x.numel() else x)


@quick
@given(any_turn, any_turn)
def test_latent_rotations_add_up_and_keep_lengths(s, t):
    x = normal(3, 8, dtype=torch.float64)
    y = latent_rotation(latent_rotation(x, s), t)
    assert torch.allclose(y, latent_rotation(x, s + t), atol=1e-12) and torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


def test_every_pair_may_have_its_own_turn():
    x, t = normal(5, 6), radians_to_turns(normal(5, 3, seed=1))
    y = latent_rotation(x, t)
    for i in range(5):
        for k in range(3): assert torch.allclose(y[i, 2*k:2*k+2], latent_rotation(x[i, 2*k:2*k+2], t[i, k]))


@pytest.mark.parametrize('x', [torch.ones(3), torch.ones(2, 5), torch.tensor(1.), torch.ones(4, dtype=torch.int64)])
def test_latent_rotation_refuses(x):
    with pytest.raises(ValueError, match='must be even'): latent_rotation(x, 0)


# gradients and graphs

def test_gradients():
    z, w, x, a = (normal(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(((3, 4, 2), (4, 2), (3, 8), (5,))))
    k, t = torch.arange(4), torch.tensor([0, QUARTER, 123456789, -5])
    for f, args in ((lambda z: quarter_turn(z, k), (z,)), (phase_mul, (z, w)), (phase_conj, (z,)), (phase_abs, (z,)), (coherence, (z, w)),
                    (cayley, (a,)), (lambda x: latent_rotation(x, t), (x,)), (lambda z, a: phase_mul(z, cayley(a[:4])), (z, a))):
        assert gradcheck(f, args)


def test_one_graph():
    def all_of_it(x, t, a):
        z = quarter_turn(latent_rotation(x, t).unflatten(-1, (-1, 2)), t >> 30)
        z = phase_mul(phase_conj(z), cayley(a))
        return coherence(z, cos_sin(t)) + phase_abs(z).sum(-1) + turns_to_radians(t).sum(-1)
    x, t, a = normal(2, 8), radians_to_turns(normal(2, 4, seed=1)), normal(4)
    assert torch.allclose(torch.compile(all_of_it, fullgraph=True, backend='aot_eager')(x, t, a), all_of_it(x, t, a))


# interleaving

class Net(nn.Module):
    def __init__(self, n, dim=4):
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, dim), nn.Module()
        self.inner.layers = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Tanh()) for _ in range(n))
        self.head = nn.Linear(dim, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.inner.layers: x = x + layer(x)
        return self.head(x)


@pytest.mark.parametrize('n', [0, 1, 3])
def test_interleaved_layers(n):
    a, b, ids = Net(n), Net(n), torch.arange(7)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    merged = interleave_models(a, b, 'inner.layers')
    x = a.embed(ids)
    for p, q in zip(a.inner.layers, b.inner.layers): x = x + p(x); x = x + q(x)
    assert torch.equal(merged(ids), a.head(x)) and merged.head.weight is merged.embed.weight
    merged(ids).sum().backward()
    with torch.no_grad():
        for p in merged.parameters(): p.zero_()
    for m, old in zip((a, b), before):
        assert all(p.grad is None for p in m.parameters()) and all(torch.equal(v, old[k]) for k, v in m.state_dict().items())
    lists = interleave_models(a.inner.layers, b.inner.layers)
    assert isinstance(lists, nn.ModuleList) and len(lists) == 2*n
    assert all(torch.equal(lists[2*i+j][0].weight, m.inner.layers[i][0].weight) for i in range(n) for j, m in enumerate((a, b)))


@pytest.mark.parametrize('b', [Net(3), Net(2, 6)])
def test_models_of_another_shape(b):
    with pytest.raises(ValueError, match='one configuration'): interleave_models(Net(2), b, 'inner.layers')


def test_layers_of_another_kind():
    a, b = nn.ModuleList([nn.ReLU()]), nn.ModuleList([nn.GELU()])
    with pytest.raises(ValueError, match='one configuration'): interleave_models(a, b)


@pytest.mark.parametrize('path', ['', 'blocks', 'embed', 'inner'])
def test_a_list_must_be_named(path):
    with pytest.raises(ValueError, match='no nn.ModuleList'): interleave_models(Net(1), Net(1), path)
