"The recursive core: any depth, in pieces, causal, one set of weights; and the model around it"
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pi2nb.attention import GQABlock, MLP
from pi2nb.cfc import CfCBlock
from pi2nb.model import LM, LMConfig, looks_ahead
from pi2nb.optim import split_params
from pi2nb.quantlinear import coded_state, frozen_copy, load_coded_state
from pi2nb.recursion import RecursiveCore

DIM = 16
MIXERS = {'gqa': lambda code: GQABlock(DIM, 4, 2, window=4, code=code), 'cfc': lambda code: CfCBlock(DIM, code, code)}
quick = settings(max_examples=15, deadline=None)
depths, both = pytest.mark.parametrize('depth', [1, 2, 3, 8]), pytest.mark.parametrize('name', MIXERS)


def core(name='gqa', depth=3, code=None, stirred=True):
    torch.manual_seed(0)
    m = RecursiveCore(MIXERS[name](code), MLP(DIM, 24, code=code), depth)
    if stirred:
        for p in m.parameters():
            if p.ndim == 2: torch.nn.init.normal_(p, std=DIM**-.5)
    return m


def flat(state):
    for s in state: yield from s if isinstance(s, tuple) else [s]


def same(a, b): return all(x == y if isinstance(x, int) else torch.allclose(x, y, atol=1e-4, rtol=1e-3) for x, y in zip(flat(a), flat(b), strict=True))


@both
@depths
def test_it_is_a_stack_of_one_layer(name, depth):
    m, h = core(name, depth), torch.randn(2, 11, DIM)
    x, norm = h, lambda h: F.rms_norm(h, (DIM,))
    for _ in range(depth):
        h = h + m.mixer(norm(h))[0]
        h = h + m.mlp(norm(h))
    assert torch.allclose(x + m(x)[0], h, atol=1e-4, rtol=1e-4)


@depths
@pytest.mark.parametrize('code', [None, 'q2'])
def test_a_fresh_core_adds_nothing(depth, code):
    y, _ = core(depth=depth, code=code, stirred=False)(torch.randn(2, 9, DIM))
    assert y.abs().max() == 0 if code is None else y.abs().max() < .02*depth


@both
@quick
@given(cuts=st.lists(st.integers(0, 20), max_size=6), seed=st.integers(0, 99), depth=st.integers(1, 5))
def test_pieces_are_the_whole(name, cuts, seed, depth):
    m, x = core(name, depth), torch.randn(2, 20, DIM, generator=torch.Generator().manual_seed(seed))
    sizes = [b-a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 20])]
    with torch.no_grad():
        (whole, last), state, out = m(x), None, []
        for piece in x.split(sizes, 1): y, state = m(piece, state); out.append(y)
    assert torch.allclose(torch.cat(out, 1), whole, atol=1e-4, rtol=1e-3)
    assert len(state) == depth and same(state, last)


@both
@depths
def test_causal_and_how_far_it_sees(name, depth):
    m, x = core(name, depth), torch.randn(1, 20, DIM, requires_grad=True)
    for t in (0, 7, 19):
        g = torch.autograd.grad(m(x)[0][:, t].sum(), x)[0][0].abs().sum(1)
        assert g[t+1:].sum() == 0 and g[t] > 0
        if name == 'gqa': assert torch.equal(g[:t+1] > 0, torch.arange(t, -1, -1) <= 3*depth)


def test_depth_changes_at_run_time():
    m, x = core(), torch.randn(2, 6, DIM)
    (three, state), before = m(x), [p.clone() for p in m.parameters()]
    m.depth = 6
    assert not torch.allclose(m(x)[0], three)
    with pytest.raises(ValueError, match='3 passes and depth is now 6'): m(x, state)
    with pytest.raises(ValueError, match='0 passes'): m(x, [])
    m.depth = 3
    assert torch.equal(m(x)[0], three) and all(map(torch.equal, before, m.parameters()))
    m.depth = 0
    with pytest.raises(ValueError, match='depth must be'): m(x)


@pytest.mark.parametrize('depth', [0, -1, 257, 1.0, '4', None, True])
def test_refuses(depth):
    with pytest.raises(ValueError, match='from 1 to 256'): core(depth=depth)


def test_gradient_is_the_sum_over_passes():
    m, x = core().double(), torch.randn(2, 9, DIM, dtype=torch.float64)
    copies, z, y = [deepcopy(m) for _ in range(3)], 0, 0
    m(x)[0].square().sum().backward()
    for c in copies:
        z = z + c.mixer(F.rms_norm(x + y + z, (DIM,)))[0]
        y = y + c.mlp(F.rms_norm(x + y + z, (DIM,)))
    (y + z).square().sum().backward()
    for p, *each in zip(m.parameters(), *(c.parameters() for c in copies)):
        assert torch.allclose(p.grad, sum(q.grad for q in each), rtol=1e-8)


@both
@pytest.mark.parametrize('shape', [(1, 1), (1, 0), (0, 3), (3, 7)])
def test_shapes(name, shape):
    m, x = core(name), torch.randn(*shape, DIM)
    y, state = m(x)
    assert y.shape == x.shape
    y, again = m(x[:, :0], state)
    assert y.shape == (shape[0], 0, DIM) and same(state, again)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    m, x = core(), torch.randn(2, 12, DIM)
    y = deepcopy(m).to(dtype)(x.to(dtype))[0]
    assert y.dtype == dtype and (y-m(x)[0]).abs().max() < (.2 if dtype == torch.bfloat16 else 1e-4)*m(x)[0].abs().max()


@both
def test_mixed_precision(name):
    m, x = core(name), torch.randn(2, 12, DIM)
    with torch.autocast('cpu', torch.bfloat16): y, state = m(x); y2, _ = m(x, state); y2.float().sum().backward()
    assert y.dtype == torch.float32 and (y-m(x)[0]).abs().max() < .2*m(x)[0].abs().max()


# the model around it

TOY = dict(dim=16, heads=2, kv_heads=1, window=8, vocab=40)


def stirred(**kw):
    torch.manual_seed(1)
    lm = LM(LMConfig(**TOY | kw))
    with torch.no_grad():
        for p in lm.parameters(): p.add_(torch.randn_like(p)*.1)
    return lm


@pytest.mark.parametrize('code', ['q2', 'lsq', 'phase-2', None])
def test_weights_count_once(code):
    one = stirred(layout='GQA', code=code)
    for depth in (1, 4, 9):
        lm = stirred(layout='Recursive', depth=depth, code=code)
        assert lm.n_params() == one.n_params() and lm.holdings() == one.holdings()
        assert len(split_params(lm)[0]) == len(split_params(one)[0]) == 5


def test_one_pass_is_an_attention_block():
    lm, one, ids = stirred(layout='Recursive', depth=1), stirred(layout='GQA'), torch.arange(20)[None]
    for p, q in zip(lm.parameters(), one.parameters(), strict=True): assert torch.equal(p, q)   # the same seed, the same weights
    assert torch.allclose(lm(ids)[0], one(ids)[0], atol=1e-4)


@pytest.mark.parametrize('layout', ['Recursive', 'CfC, Recursive*2, GQA'])
def test_frozen_pieces_and_file_state(layout):
    lm, ids = stirred(layout=layout, depth=3), torch.randint(40, (2, 20))
    frozen = frozen_copy(lm)
    whole, _ = frozen(ids)
    assert torch.equal(whole, lm(ids)[0]) and looks_ahead(frozen) == 0
    assert torch.equal(load_coded_state(LM(lm.config), coded_state(lm))(ids)[0], whole)
    state, parts = None, []
    for piece in ids.split([3, 1, 16], 1): y, state = frozen(piece, state); parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_description_from_before_has_the_default_depth(tmp_path):
    from pi2nb.q2bn import load_model, q2bn_parse, save_model, write_q2bn
    from pi2nb.tokenizer import ByteTokenizer
    lm = stirred(layout='CfC', vocab=256)
    save_model(lm, ByteTokenizer(), tmp_path/'m')
    state, meta = q2bn_parse((tmp_path/'m').read_bytes())
    del meta['config']['depth']
    write_q2bn(tmp_path/'old', state, meta)
    assert load_model(tmp_path/'old')[0].config == lm.config
    for depth in (4., '4', 0, 300):
        write_q2bn(tmp_path/'bad', state, meta | dict(config=meta['config'] | dict(depth=depth, layout='Recursive')))
        with pytest.raises(ValueError, match='does not describe a model'): load_model(tmp_path/'bad')


def test_file_keeps_the_depth(tmp_path):
    from pi2nb.q2bn import load_model, save_model
    from pi2nb.tokenizer import ByteTokenizer
    lm, ids = stirred(layout='Recursive', depth=5, vocab=256), torch.randint(256, (1, 9))
    save_model(lm, ByteTokenizer(), tmp_path/'m')
    back = load_model(tmp_path/'m')[0]
    assert back.config.depth == back.blocks[0].mixer.depth == 5 and torch.equal(back(ids)[0], lm(ids)[0])
