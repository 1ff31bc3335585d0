"Properties of chapter 14: layers that compute from the bytes of their weights"
import shutil
from copy import deepcopy

import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from pi2nb.codebook import CODES, codebook, hold
from pi2nb.gray import pack_bits, pack_symbols
from pi2nb.model import LM, LMConfig, MIXERS
from pi2nb.packed import KERNELS, PackedEmbedding, PackedLinear, PackedWeight, decode_packed, pack_model
from pi2nb.quantlinear import Pi2RMSNorm, QuantEmbedding, QuantLinear, frozen_copy
import pi2nb.packed as chapter

VARIANTS = [*CODES, 'q2, group=3', 'int6, group=-1', 'phase-2, group=-1', 'q2-hadamard, group=1']
some_code, size = st.sampled_from(VARIANTS), st.integers(0, 13)


def fits(name, cols): return (g := codebook(name).group) < 1 or cols % g == 0


@given(some_code, size, size, st.booleans())
@settings(max_examples=60, deadline=None)
def test_linear_gives_the_bits_of_the_frozen_layer(name, rows, cols, autocast):
    if not fits(name, cols): cols = 3*cols
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        m = QuantLinear(cols, rows, name, bias=True)
        packed, ice = PackedLinear.from_layer(m), frozen_copy(m)
        for shape in ((4, cols), (cols,), (0, cols), (2, 1, cols)):
            x = torch.randn(shape)
            for f in (ice, m, PackedLinear.from_layer(ice), PackedLinear.from_layer(m, 'blocks')):
                y = f(x)
                assert torch.equal(packed(x), y) and packed(x).dtype == y.dtype
        assert packed.weight.symbols.shape == (rows, -(-cols*m.code.bits//8))


@given(some_code, st.integers(1, 9), size, st.lists(st.integers(0, 8), max_size=6))
@settings(max_examples=60, deadline=None)
def test_embedding_decodes_the_rows_that_are_asked_for(name, rows, cols, ids):
    if not fits(name, cols): cols = 3*cols
    table = QuantEmbedding(rows, cols, name)
    packed, ids = PackedEmbedding.from_layer(table), torch.tensor([i % rows for i in ids], dtype=torch.int64)
    for x in (ids, ids.int(), ids[None, :, None], torch.tensor(rows-1)): assert torch.equal(packed(x), table(x))
    for bad in (-1, rows):
        with pytest.raises((IndexError, RuntimeError)): packed(torch.tensor([bad]))


@pytest.mark.parametrize('name', VARIANTS)
def test_many_blocks_are_one_block(name, monkeypatch):
    m = QuantLinear(21, 43, name, bias=True)
    x, packed = torch.randn(3, 21), PackedLinear.from_layer(m)
    y = m(x)
    for block in (1, 70, 200):
        monkeypatch.setattr(chapter, '_BLOCK', block)
        assert torch.equal(packed(x), y)
        packed.kernel = 'blocks'
        assert torch.allclose(packed(x), y, atol=1e-5)
        packed.kernel = 'whole'


@pytest.mark.parametrize('name', VARIANTS)
def test_bytes_are_those_of_the_file(name):
    h = hold(torch.randn(5, 9), codebook(name))
    w = PackedWeight(h)
    assert torch.equal(w.symbols, pack_symbols(h.z) if h.code.bits == 2 else pack_bits(h.z, h.code.bits))
    assert w.scales.dtype == torch.float16 and not list(w.parameters())
    back = w.coded()
    assert torch.equal(back.z, h.z) and torch.equal(back.s, h.s) and (back.code, back.shape) == (h.code, h.shape)
    assert torch.equal(decode_packed(w.symbols, w.scales, h.code, 9), h.decode())


@pytest.mark.parametrize('name', ['q2-lloyd', 'int8', 'pi2-5'])
def test_moves_do_not_touch_the_bytes(name):
    m = QuantLinear(10, 6, name)
    packed = PackedLinear.from_layer(m)
    before = packed.weight.coded()
    for move in (lambda p: p.bfloat16().float(), lambda p: p.half(), lambda p: p.double(), deepcopy, lambda p: p.to('cpu', torch.bfloat16)):
        w = move(deepcopy(packed)).weight.coded()
        assert torch.equal(w.z, before.z) and torch.equal(w.s, before.s)
    x = torch.randn(2, 10).bfloat16()
    assert torch.equal(deepcopy(packed).bfloat16()(x), frozen_copy(m).bfloat16()(x))
    table = PackedEmbedding.from_layer(QuantEmbedding(4, 6, name)).bfloat16()
    assert table(torch.arange(4)).dtype == torch.bfloat16
    meta = deepcopy(packed).to('meta')
    assert meta.weight.symbols.is_meta and meta.weight.scales.dtype == torch.float16
    empty = meta.to_empty(device='cpu')
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x.float()), packed(x.float()))


def net(code='q2', table='int8'):
    n = nn.ModuleDict(dict(embed=QuantEmbedding(9, 6, table), up=QuantLinear(6, 10, code, bias=True), dense=QuantLinear(10, 6, None),
                           norm=Pi2RMSNorm(6), plain=nn.Linear(6, 6), deep=nn.Sequential(nn.ReLU(), QuantLinear(6, 6, code)),
                           head=QuantLinear(6, 9, table)))
    n['head'].weight = n['embed'].weight
    return n


def run(n, ids): return n['head'](n['deep'](n['norm'](n['plain'](n['dense'](n['up'](n['embed'](ids)))))))


@pytest.mark.parametrize('code, table', [('q2', 'int8'), ('lsq', 'lsq'), ('phase-2', 'phase-2'), ('int5', 'int6')])
def test_pack_model(code, table):
    n, ids = net(code, table), torch.arange(9)
    want = run(n, ids)
    for source in (n, frozen_copy(n)):
        p = pack_model(deepcopy(source))
        assert torch.equal(run(p, ids), want)
        assert type(p['deep'][1]) is PackedLinear and p['up'].training == source.training
        assert [type(p[k]) for k in ('dense', 'norm', 'plain')] == [QuantLinear, Pi2RMSNorm, nn.Linear]
        assert (p['embed'].weight is p['head'].weight) or source['embed'].gain is not None  # two learned factors, two weights
        q = deepcopy(p)
        assert (q['embed'].weight is q['head'].weight) == (p['embed'].weight is p['head'].weight)
        other = pack_model(frozen_copy(net(code, table))) if source is not n else pack_model(net(code, table))
        other.load_state_dict(p.state_dict())
        assert torch.equal(run(other, ids), want)
    twice = nn.Sequential(layer := QuantLinear(3, 3), layer)         # one module under two names
    assert pack_model(twice)[0] is twice[1] and type(twice[1]) is PackedLinear
    alone = pack_model(QuantLinear(3, 3))
    assert type(alone) is PackedLinear
    assert type(pack_model(nn.Linear(3, 3))) is nn.Linear


def test_tied_layers_with_different_codes_keep_their_own_bytes():
    n = net()
    n['head'] = QuantLinear.from_float(n['head'], 'q2')
    p = pack_model(deepcopy(n))
    assert p['embed'].weight is not p['head'].weight
    assert torch.equal(run(p, torch.arange(9)), run(n, torch.arange(9)))


@pytest.mark.parametrize('tied', [False, True])
def test_a_language_model(tied):
    lm = LM(LMConfig(layout='GQA, CfC', dim=32, heads=2, kv_heads=1, vocab=61, tied=tied))
    for m in lm.modules():
        if isinstance(m, QuantLinear): nn.init.normal_(m.weight)     # a fresh model has zeros in its last matrices
    ids, packed = torch.randint(0, 61, (2, 12)), pack_model(frozen_copy(lm))
    assert not any(isinstance(m, (QuantLinear, QuantEmbedding)) for m in packed.modules())
    got, want = packed(ids), lm(ids)
    assert torch.equal(got[0], want[0]) if isinstance(want, tuple) else torch.equal(got, want)


@pytest.mark.parametrize('name', ['phase-2', 'int6'])
def test_traced_whole(name):
    packed = pack_model(nn.Sequential(QuantEmbedding(7, 9, name), QuantLinear(9, 5, name, bias=True)).requires_grad_(False))
    ids = torch.arange(7)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend='aot_eager')(ids), packed(ids))
    torch.compiler.reset()


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_in_earnest_gives_the_same_bits():
    m = QuantLinear(9, 6, 'q2-lloyd')                                # a code that rounds to bfloat16
    packed, x = PackedLinear.from_layer(m), torch.randn(3, 9)
    with torch.no_grad(): assert torch.equal(torch.compile(packed, fullgraph=True)(x), packed(x))
    torch.compiler.reset()


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('kernel', KERNELS)
def test_gradient_of_magnitudes(name, kernel):
    h, x, g = hold(torch.randn(6, 9), codebook(name)), torch.randn(4, 9), torch.randn(4, 6)
    layer = PackedLinear(PackedWeight(h, magnitudes=True), kernel=kernel)
    assert torch.equal(layer(x), PackedLinear(h, kernel=kernel)(x))
    (layer(x)*g).sum().backward()
    s = h.s.double().requires_grad_()
    levels = torch.tensor(h.code.levels, dtype=torch.float64)[h.z.long()]
    w = h.code._turn((h.code._by_scale(levels)*s[..., None]).view(6, 9))
    (F.linear(x.double(), w)*g).sum().backward()
    assert layer.weight.scales.dtype == torch.float32 and torch.allclose(layer.weight.scales.grad.double(), s.grad, rtol=1e-4, atol=1e-4)
    assert [n for n,_ in layer.named_parameters()] == ['weight.scales']


def test_magnitudes_are_used_as_they_are_stored():
    w = PackedWeight(hold(torch.randn(5, 8), codebook('q2')), magnitudes=True)
    with torch.no_grad(): w.scales.copy_(torch.tensor([.1234567, -1., 0., 1e9, 1.])[:, None])
    c = w.coded()
    assert torch.equal(w.rows(torch.arange(5)), c.decode()) and torch.equal(w.stored_scales(), c.s.float())
    assert c.s.isfinite().all() and (c.s > 0).all()
    w.rows(torch.tensor([1, 1])).sum().backward()
    assert w.scales.grad[[0, 2, 3, 4]].eq(0).all()
    low = deepcopy(w).bfloat16()
    assert torch.equal(low.scales, w.scales) and low.scales.dtype == torch.float32


def test_gradient_reaches_the_input_and_the_bias():
    m = QuantLinear(7, 5, 'q2-hadamard', bias=True)
    x, y = (torch.ones(2, 7, requires_grad=True) for _ in range(2))
    for f,v in ((m, x), (pack_model(deepcopy(m)), y)): f(v).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize('call', [
    lambda: PackedLinear.from_layer(nn.Linear(2, 2)), lambda: PackedLinear.from_layer(QuantEmbedding(2, 2)), lambda: PackedLinear.from_layer(QuantLinear(2, 2, None)),
    lambda: PackedEmbedding.from_layer(QuantLinear(2, 2)), lambda: PackedLinear(torch.ones(2, 2)), lambda: PackedEmbedding(torch.ones(2, 2)),
    lambda: PackedWeight(hold(torch.ones(3), codebook('q2'))), lambda: PackedWeight(hold(torch.ones(3, 2, 2), codebook('q2'))),
    lambda: PackedLinear(hold(torch.ones(3, 2), codebook('q2')), kernel='fast'), lambda: pack_model(net(), kernel='fast'),
    lambda: pack_model(QuantLinear(2, 2).requires_grad_(False)._apply(lambda t: t*float('nan'))),
    lambda: decode_packed(torch.zeros(2, 3, dtype=torch.uint8), torch.ones(2, 1).half(), codebook('q2'), 13)])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(ValueError) as e: call()
    assert '\n' not in str(e.value)


def test_a_refused_model_stays_as_it_was():
    n = net()
    with pytest.raises(ValueError): pack_model(n, kernel='fast')
    assert type(n['up']) is QuantLinear and type(n['embed']) is QuantEmbedding


@pytest.mark.parametrize('mixer', MIXERS)
def test_every_mixer_packs_to_the_same_logits(mixer):
    torch.manual_seed(0)
    lm, ids = LM(LMConfig(layout=mixer, dim=32, window=8, slots=8)), torch.randint(0, 256, (1, 12))
    with torch.no_grad(): [p.add_(torch.randn_like(p)*.1) for p in lm.parameters()]
    ice = frozen_copy(lm)
    with torch.inference_mode(): assert torch.equal(pack_model(deepcopy(ice))(ids)[0], ice(ids)[0])
