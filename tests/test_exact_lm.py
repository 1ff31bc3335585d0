"Canonical arithmetic: the same bits for any number of threads, batch, cut, order of texts, road of a product, and device"
from copy import deepcopy
import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from pi2nb import exactlm
from pi2nb.exact import exact_attention, exact_norm, exact_product, power_grid, whole_grid
from pi2nb.exactlm import ExactLinear, ExactLM, exact_layer, replay, uncompiled
from pi2nb.memory import SlotMemory
from pi2nb.model import LM, recipe
from pi2nb.quantlinear import QuantLinear, frozen_copy
from strategies import pieces

NAMES = 'q2', 'dense', 'phase', 'pi2', 'ghost', 'qpf', 'llama'
SHAPES = {n: dict(dim=32, heads=2, kv_heads=1) for n in NAMES} | dict(recursive=dict(dim=32, heads=2, kv_heads=2, layout='Recursive', depth=3),
          swiglu=dict(dim=48, heads=2, kv_heads=1, mlp='swiglu', window=9), tied=dict(dim=40, heads=5, kv_heads=5, tied=True, layout='GQA*2'),
          ternary=dict(dim=32, heads=2, kv_heads=1, code='ternary'), real=dict(dim=32, heads=2, layout='Delta, Damped', real=True))


def filled(name, **kw):
    torch.manual_seed(0)
    lm = LM(recipe(name if name in NAMES else 'q2').config(**dict(window=16) | SHAPES[name] | kw))
    for n, p in lm.named_parameters():
        if n.endswith('weight') and p.ndim == 2 and not p.any(): nn.init.normal_(p, std=p.shape[1]**-.5)
        if n.endswith('norm.weight'): nn.init.normal_(p, 1., .3)
    return frozen_copy(lm)


def read(lm, ids, sizes):
    state, out = None, []
    for piece in ids.split(sizes, 1):
        y, state = lm(piece, state)
        out.append(y)
    return torch.cat(out, 1)


IDS = torch.randint(0, 256, (64, 70), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=SHAPES)
def model(request): return (lm := filled(request.param)), ExactLM(lm)


def test_batch_and_order_do_not_matter(model):
    _, e = model
    few = IDS[:, :24]
    every = e(few)[0]
    for pick in ([0], [5, 0, 63], torch.randperm(64, generator=torch.Generator().manual_seed(2)).tolist()):
        assert torch.equal(e(few[pick])[0], every[pick])


@pytest.mark.parametrize('size', [1, 7, 64])
def test_the_cut_does_not_matter(model, size):
    _, e = model
    assert torch.equal(read(e, IDS[:2], size), e(IDS[:2])[0])


def test_threads_do_not_matter(model):
    _, e = model
    before, got = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            got.append(e(IDS[:33, :20])[0])
    finally: torch.set_num_threads(before)
    assert torch.equal(*got)


def test_compiled_code_gives_the_bits_of_torch(model):
    _, e = model
    fast = e(IDS[:3])[0]
    with uncompiled(): slow = e(IDS[:3])[0]
    assert torch.equal(fast, slow)


def test_close_to_the_float_model(model):
    lm, e = model
    with torch.inference_mode(): want = lm(IDS[:2])[0]
    got = e(IDS[:2])[0]
    assert (got - want).square().mean() < .02*want.square().mean()
    assert not torch.equal(got, want)


def test_one_call_for_all_layers_gives_the_same_bits(request, model):
    _, e = model
    taped = request.node.callspec.params['model'] in ('q2', 'pi2', 'ghost', 'tied', 'ternary')
    for n in (1, 2, 16):
        r = replay(e, 2, n)
        assert (r is not None) == taped
        if r: assert torch.equal(torch.cat([r(p).clone() for p in IDS[:2, :64].split(n, 1)], 1), e(IDS[:2, :64])[0])


def test_a_replay_goes_on_past_a_block_of_angles():
    e = ExactLM(filled('q2'))
    ids = torch.randint(0, 256, (1, 600), generator=torch.Generator().manual_seed(3))
    r = replay(e, 1, 8)
    assert torch.equal(torch.cat([r(p).clone() for p in ids.split(8, 1)], 1), e(ids)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_gives_the_bits_of_the_cpu(model):
    lm, e = model
    far = ExactLM(lm).cuda()
    assert torch.equal(far(IDS.cuda())[0].cpu(), e(IDS)[0])
    assert torch.equal(read(far, IDS[:3].cuda(), 7).cpu(), e(IDS[:3])[0])


def test_the_compiled_road_was_taken_here(): assert exactlm._kernels() is not None and ExactLinear(QuantLinear(8, 8)).fast


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 50), st.sampled_from(['q2', 'int8', 'ternary', 'quinary', 'int6', 'binary', None]),
       st.sampled_from([8, 14]), st.floats(1e-12, 1e12), st.booleans())
def test_a_layer_in_c_and_in_torch(rows, cols, batch, code, bits, size, bias):
    g = torch.Generator().manual_seed(rows*cols)
    m = QuantLinear(cols, rows, code, bias)
    x = torch.randn(batch, cols, generator=g)*size*torch.rand(batch, 1, generator=g)
    x[0] = 0
    e = ExactLinear(m, bits)
    for kw in ({}, dict(norm=(1e-6, torch.randn(cols, generator=g)), square=True, add=torch.randn(batch, rows, generator=g))):
        fast = e(x, **kw)
        with uncompiled(): assert torch.equal(fast, e(x, **kw))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 900), st.integers(0, 2**30))
def test_products_by_float32_and_float64(n, seed):
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, n, generator=g), torch.randint(-3, 4, (6, n), generator=g).float()
    q, _ = whole_grid(x, 127.)
    perm = torch.randperm(n, generator=g)
    assert torch.equal(exact_product(q, w, 127*3*n), exact_product(q[:, perm], w[:, perm], 2.**40))
    assert torch.equal(exact_norm(x)[:, perm], exact_norm(x[:, perm]))


@settings(max_examples=30, deadline=None)
@given(pieces(40), st.integers(1, 45), st.integers(0, 2**30))
def test_attention_in_any_pieces(sizes, window, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = ([*power_grid(torch.randn(2, h, 40, 8, generator=g), 2048.)] for h in (4, 2, 2))
    whole, at = exact_attention(q, k, v, window, .4), 0
    for n in sizes:
        if n: assert torch.equal(exact_attention([t[:, :, at:at+n] for t in q], *([t[:, :, :at+n] for t in x] for x in (k, v)), window, .4), whole[:, :, at:at+n])
        at += n


def test_a_state_is_continued_once():
    e = ExactLM(filled('q2'))
    _, state = e(IDS[:1, :9])
    kept = deepcopy(state)
    first = e(IDS[:1, 9:12], state)[0]
    with pytest.raises(ValueError, match='deepcopy'): e(IDS[:1, 9:12], state)
    assert torch.equal(e(IDS[:1, 9:12], kept)[0], first)


def test_what_has_no_canonical_form_is_refused():
    with pytest.raises(ValueError, match='SlotMemory has no canonical form'): exact_layer(SlotMemory(16))
    with pytest.raises(ValueError, match='no canonical form'): ExactLM(LM(recipe('q2').config(dim=16, heads=2, layout='Slots', slots=4)))
    with pytest.raises(ValueError, match='fewer bits'): exact_product(torch.ones(1, 1), torch.ones(1, 1), 2.**54)
