"Attention, closed-form continuous time and layouts: the properties that every mixer must keep"
import pytest, torch
from hypothesis import given, settings, strategies as st
from strategies import pieces, steps
from pi2nb.attention import rope, banded_attention, MLP, GQABlock
from pi2nb.cfc import plain_cfc_gates, cfc_gates, CfCBlock
from pi2nb.geode import parse_layout, format_layout

quick = settings(max_examples=25, deadline=None)
DIM = 16
MIXERS = {
    'gqa': lambda: GQABlock(DIM, 4, 2, window=6),
    'gqa, window of one': lambda: GQABlock(DIM, 4, 4, window=1),
    'gqa, wide window, dense': lambda: GQABlock(DIM, 2, 1, window=500, code=None),
    'cfc': lambda: CfCBlock(DIM),
    'cfc, dense': lambda: CfCBlock(DIM, code=None, gate_code=None)}
both = pytest.mark.parametrize('name', MIXERS)


def make(name, seed=0):
    "A mixer whose output matrix is not zero, so that something can be seen"
    torch.manual_seed(seed)
    m = MIXERS[name]()
    for n, p in m.named_parameters():
        if p.ndim == 2: torch.nn.init.normal_(p, std=DIM**-.5)
    return m


# every mixer

@both
def test_a_fresh_mixer_adds_nothing(name):
    torch.manual_seed(0)
    y, _ = MIXERS[name]()(torch.randn(2, 9, DIM))
    assert y.abs().max() < .05 and ('dense' not in name or y.abs().max() == 0)


@both
@quick
@given(sizes=pieces(20), seed=st.integers(0, 100))
def test_pieces_are_the_whole(name, sizes, seed):
    m, x = make(name), torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        (whole, last), state, out = m(x), None, []
        for piece in x.split(sizes, 1): y, state = m(piece, state); out.append(y)
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-5, rtol=1e-4)
    for a, b in zip(state, last): assert a == b if isinstance(a, int) else torch.allclose(a, b, atol=1e-5, rtol=1e-4)


@both
def test_causal(name):
    m, x = make(name), torch.randn(2, 20, DIM, requires_grad=True)
    for t in range(20):
        g = torch.autograd.grad(m(x)[0][:, t].sum(), x)[0]
        assert g[:, t+1:].abs().sum() == 0 and g[:, t].abs().sum() > 0
    y, later = m(x)[0], x.detach().clone()
    later[:, 13:] = 1e3
    assert torch.equal(m(later)[0][:, :13], y[:, :13])


@both
def test_batch_rows_do_not_meet(name):
    m, x = make(name), torch.randn(3, 11, DIM)
    assert torch.allclose(m(x)[0][1:2], m(x[1:2])[0], atol=1e-5)


@both
def test_no_time_at_all(name):
    m, x = make(name), torch.randn(2, 5, DIM)
    y, state = m(x[:, :0])
    assert y.shape == (2, 0, DIM)
    assert torch.allclose(m(x, state)[0], m(x)[0], atol=1e-6)
    _, state = m(x)
    y, same = m(x[:, :0], state)
    assert y.shape == (2, 0, DIM)
    for a, b in zip(state, same): assert a == b if isinstance(a, int) else torch.equal(a, b)


@both
def test_every_parameter_learns(name):
    m = make(name)
    m(torch.randn(2, 12, DIM))[0].square().sum().backward()
    if name != 'gqa, window of one': assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in m.parameters())


@both
def test_gradient_reaches_through_the_state(name):
    m, x = make(name), torch.randn(1, 12, DIM, requires_grad=True)
    _, state = m(x[:, :8])
    g = torch.autograd.grad(m(x[:, 8:], state)[0].sum(), x)[0]
    assert (g[:, :8].abs().sum() > 0) == ('window of one' not in name)


@both
def test_mixed_precision(name):
    m, x = make(name), torch.randn(2, 12, DIM)
    with torch.autocast('cpu', torch.bfloat16): y, state = m(x); y2, _ = m(x, state); y2.float().sum().backward()
    assert (y-m(x)[0]).abs().max() < .2*m(x)[0].abs().max()
    if 'cfc' in name: assert state.dtype == torch.float32


def test_state_does_not_grow():
    m, state = make('gqa'), None
    with torch.no_grad():
        for _ in range(20): _, state = m(torch.randn(1, 1, DIM), state)
    assert state[0].shape == state[1].shape == (1, 2, 5, 4) and state[2] == 20


# attention

@quick
@given(st.integers(1, 25), st.integers(1, 25), st.integers(1, 30), st.integers(1, 30))
def test_banded_attention_is_masked_attention(n, m, window, block):
    n, m = sorted((n, m))
    g = torch.Generator().manual_seed(n*31+m)
    q, k, v = torch.randn(1, 4, n, 8, generator=g), *torch.randn(2, 1, 2, m, 8, generator=g)
    back = torch.arange(m-n, m)[:, None]-torch.arange(m)
    match = (q@k.repeat_interleave(2, 1).transpose(-1, -2)*8**-.5).masked_fill((back < 0) | (back >= window), float('-inf'))
    slow = match.softmax(-1)@v.repeat_interleave(2, 1)
    assert torch.allclose(banded_attention(q, k, v, window, block=block), slow, atol=1e-5)


@quick
@given(st.integers(0, 2**31), st.integers(0, 5000))
def test_rope_sees_distance_only(shift, d):
    q, k = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(d))
    match = lambda i, j: (rope(q, torch.tensor([i]))*rope(k, torch.tensor([j]))).sum()
    assert (match(d+shift, shift)-match(d, 0)).abs() < 1e-4


def test_attention_refuses():
    for args, says in (((10, 3, 1), 'does not divide'), ((9, 3, 1), 'odd size'), ((16, 4, 3), 'evenly'), ((16, 4, 2, 0), 'window'),
                       ((16, 0, 1), 'at least 1'), ((16, 4, 0), 'at least 1')):
        with pytest.raises(ValueError, match=says): GQABlock(*args)
    with pytest.raises(ValueError, match='relu2'): MLP(8, 16, 'gelu')
    with pytest.raises(ValueError, match='even'): rope(torch.randn(3, 5), torch.arange(3))


@pytest.mark.parametrize('kind', ['relu2', 'swiglu'])
def test_mlp(kind):
    m, x = MLP(8, 12, kind, code=None), torch.randn(2, 3, 8)
    assert torch.equal(m(x), torch.zeros(2, 3, 8))
    torch.nn.init.normal_(m.down.weight)
    u = x@m.up.weight.T
    u = u.relu()**2 if kind == 'relu2' else u[..., :12]*torch.nn.functional.silu(u[..., 12:])
    assert torch.allclose(m(x), u@m.down.weight.T, atol=1e-5)


# closed-form continuous time

def test_cfc_gates():
    r, u, log_dt = 2*steps(6, T=5, dtype=torch.float64)[1], steps(7, T=5, dtype=torch.float64)[1], torch.linspace(-6, .3, 3).double()
    assert torch.autograd.gradcheck(cfc_gates, [t.requires_grad_() for t in (r, u, log_dt)])
    r = r.detach(); r[0, 0] = torch.tensor([-40., 40., -14.])
    args = [r.requires_grad_(), u, log_dt]
    for x, y in zip(cfc_gates(*args), plain_cfc_gates(*args)): assert torch.allclose(x, y, rtol=1e-12)
    grads = lambda f: torch.autograd.grad(sum((t*t.detach().cos()).sum() for t in f(*args)), args)
    for x, y in zip(grads(cfc_gates), grads(plain_cfc_gates)): assert torch.allclose(x, y, rtol=1e-8)
    decay, drive = cfc_gates(*(t.float() for t in args))
    assert decay.min() >= 0 and decay.max() <= 1 and drive.isfinite().all()


def test_cfc_gates_at_the_ends():
    r = torch.tensor([-200., -90., 0., 90., 3e4]).requires_grad_()
    out = cfc_gates(r.view(1, 1, 5), torch.ones(1, 1, 5), torch.zeros(5))
    g, = torch.autograd.grad(sum(t.sum() for t in out), r)
    assert all(t.isfinite().all() for t in (*out, g))


def test_cfc_refuses():
    with pytest.raises(ValueError, match='at least 1'): CfCBlock(0)
    with pytest.raises(ValueError, match='unknown code'): CfCBlock(4, gate_code='int9')


# layouts

names = st.sampled_from(['GQA', 'CfC', 'A', 'b_2'])
items = st.recursive(names, lambda kids: st.tuples(
    st.lists(kids, min_size=1, max_size=3).map(lambda k: f"[{', '.join(k)}]"), st.integers(1, 3)).map(lambda t: f'{t[0]}*{t[1]}'), max_leaves=6)
texts = st.lists(items, min_size=1, max_size=3).map(', '.join).filter(lambda t: len(parse_layout(t)) < 80)


@quick
@given(st.lists(names, min_size=1, max_size=30))
def test_layout_round_trip(layers):
    text = format_layout(layers)
    assert parse_layout(text) == layers and len(text) <= len(', '.join(layers))


@quick
@given(texts)
def test_layout_is_shortest(text):
    short = format_layout(parse_layout(text))
    assert len(short) <= len(text) and parse_layout(short) == parse_layout(text) == parse_layout(text.replace(' ', '').replace('*', ' × '))


@settings(max_examples=300, deadline=None)
@given(st.text('AB[],*×2 90;', max_size=12))
def test_layout_reader_never_crashes(text):
    try: assert 1 <= len(parse_layout(text)) <= 256
    except ValueError as e: assert 'position' in str(e) and '\n' not in str(e)


@pytest.mark.parametrize('text, at', [('', 0), ('  ', 2), ('A,,B', 2), ('[A', 2), ('A]', 1), ('A B', 2), ('A*', 1), ('A*0', 1), ('A*300', 1),
                                      ('[A*200]*2', 7), ('A?', 1), ('*3', 0), ('['*50_000, 50_000), ('A*' + '9'*5000, 1), ('A,'*300 + 'A', 512)])
def test_layout_refuses(text, at):
    with pytest.raises(ValueError, match=f'position {at}: '): parse_layout(text)


def test_layout_names():
    assert parse_layout('[GQA, CfC*3]*4') == ['GQA', 'CfC', 'CfC', 'CfC']*4
    for bad in ([], ['A B'], ['A']*257):
        with pytest.raises(ValueError): format_layout(bad)
