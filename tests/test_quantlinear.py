"Chapter 11: layers are drop-ins for torch's own, whatever the code"
import os
from copy import deepcopy

import pytest, torch
from torch import nn
import torch.nn.functional as F

from pi2nb.codebook import CODES
from pi2nb.model import LM, LMConfig
from pi2nb.packed import pack_model
from pi2nb.q2bn import load_model, save_model
from pi2nb.quantlinear import (Pi2Embedding, Pi2Linear, Pi2RMSNorm, Q2Linear, QuantEmbedding, QuantLinear, coded_state, fake_quantize,
                               frozen_copy, load_coded_state)
from pi2nb.tokenizer import ByteTokenizer

codes = pytest.mark.parametrize('code', list(CODES))
makers = [lambda c: QuantLinear(10, 7, c, bias=True), lambda c: QuantEmbedding(9, 10, c, padding_idx=2)]


@codes
@pytest.mark.parametrize('make', makers, ids=['linear', 'embedding'])
def test_state_dict_and_copies(code, make):
    a, b = make(code), make(code)
    if a.gain is not None: torch.nn.init.uniform_(a.gain, .5, 2.)
    x = torch.randn(3, 10) if isinstance(a, nn.Linear) else torch.tensor([[0, 2, 8]])
    b.load_state_dict(a.state_dict())
    ice, c = frozen_copy(a), make(code)
    c.load_state_dict(ice.state_dict())
    for m in (b, deepcopy(a), ice, c, deepcopy(ice)): assert torch.equal(m(x), a(x))
    c.load_state_dict(a.state_dict())                                    # and back to learning
    assert c.scale is None and torch.equal(c(x), a(x))


def test_a_partial_or_foreign_state_changes_no_mode():
    ice, scale = frozen_copy(QuantLinear(16, 8, 'q2')), QuantLinear(16, 8, 'q2, group=4')
    y = ice(torch.eye(16))
    ice.load_state_dict({}, strict=False)
    with pytest.raises(RuntimeError): ice.load_state_dict(frozen_copy(QuantLinear(16, 7, 'q2')).state_dict())
    assert torch.equal(ice(torch.eye(16)), y)
    with pytest.raises(RuntimeError, match='scale'): ice.load_state_dict(frozen_copy(scale).state_dict())
    assert ice.scale.shape == (8, 1)
    with pytest.raises(RuntimeError, match='gain'): QuantLinear(16, 8, 'lsq').load_state_dict(QuantLinear(16, 8, 'q2').state_dict())
    with pytest.raises(RuntimeError, match='gain'): QuantLinear(16, 8, 'q2').load_state_dict(QuantLinear(16, 8, 'lsq').state_dict())


def test_an_optimizer_keeps_its_gain_through_frozen_times():
    m = QuantLinear(16, 8, 'lsq')
    gain, learning = m.gain, {k: v.clone() for k,v in m.state_dict().items()}
    m.load_state_dict(frozen_copy(m).state_dict())
    m.load_state_dict(learning)
    assert m.gain is gain and m.scale is None


@codes
def test_a_frozen_layer_keeps_its_scales_in_other_types(code):
    ice = frozen_copy(QuantLinear(16, 8, code))
    want = ice.coded()
    for m in (deepcopy(ice).float(), deepcopy(ice).bfloat16(), deepcopy(ice).double(), deepcopy(ice).bfloat16().float()):
        assert m.scale.dtype == torch.float16 and torch.equal(m.coded().z, want.z) and torch.equal(m.coded().decode(), want.decode())
    assert frozen_copy(QuantLinear(16, 8, code)).to('meta').scale.device.type == 'meta'


@codes
def test_a_packed_layer_has_the_type_of_its_layer(code):
    m = nn.Sequential(QuantEmbedding(9, 16, code), QuantLinear(16, 8, code, bias=True)).bfloat16()
    assert torch.equal(pack_model(frozen_copy(m))(torch.tensor([1, 8])), m(torch.tensor([1, 8])))


def test_shared_weights_share_their_code_and_gain():
    lm = LM(LMConfig(layout='GQA', dim=16, heads=2, kv_heads=1, tied=True, embed_code='lsq'))
    torch.nn.init.uniform_(lm.head.gain, .5, 2.)
    assert lm.embed.gain is lm.head.gain
    ids = torch.randint(0, 256, (1, 5))
    assert torch.equal(frozen_copy(lm)(ids)[0], lm(ids)[0])
    m = nn.Sequential(QuantEmbedding(5, 4, 'int8'), QuantLinear(4, 5, 'q2'))
    m[1].weight = m[0].weight
    with pytest.raises(ValueError, match='in another code'): coded_state(m)


def test_padding_stays_where_it_is():
    e = QuantEmbedding(6, 8, 'phase-2', padding_idx=2)
    before, opt = e.weight[2].detach().clone(), torch.optim.Adam(e.parameters(), lr=.01)
    for _ in range(5):
        opt.zero_grad()
        e(torch.arange(6)).square().sum().backward()
        opt.step()
    assert torch.equal(e.weight[2], before)


def test_modules_that_only_look_coded():
    m = nn.Module()
    m.code, m.lin = 'abc', nn.Linear(2, 2)
    assert set(coded_state(m)) == {'lin.weight', 'lin.bias'}
    with pytest.raises(ValueError, match='not supported'): QuantEmbedding.from_float(nn.Embedding(5, 4, max_norm=1.))
    with pytest.raises(ValueError, match='a code of its own'): Pi2Embedding.from_float(nn.Embedding(5, 4))


@codes
def test_gradients_reach_every_parameter(code):
    m = QuantLinear(16, 8, code, bias=True)
    m(torch.randn(4, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in m.parameters())


@codes
@pytest.mark.parametrize('shape', [(1, 1), (5, 3), (1, 7), (6, 0), (0, 4)])
def test_odd_sizes(code, shape):
    m = QuantLinear(shape[1], shape[0], code)
    assert m(torch.randn(2, shape[1])).shape == (2, shape[0]) and torch.equal(frozen_copy(m).weight, m.held_weight())


def test_straight_through_is_the_gradient_of_the_turned_weights():
    w, g = torch.randn(4, 64, requires_grad=True), torch.randn(4, 64)
    for n in ('q2', 'q2-hadamard', 'phase-2'):
        w.grad = None
        (fake_quantize(w, CODES[n], trust=float('inf'))*g).sum().backward()
        assert torch.allclose(w.grad, g, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types(dtype):
    m = QuantLinear(8, 4, 'q2', bias=True).to(dtype)
    assert m(torch.randn(2, 8, dtype=dtype)).dtype == dtype and m.held_weight().dtype == dtype


@codes
def test_autocast_computes_with_the_held_weights(code):
    m = QuantLinear(16, 8, code)
    x = torch.eye(16)
    with torch.autocast('cpu', torch.bfloat16): y = m(x)
    assert torch.equal(y.float().T, m.held_weight())


@pytest.mark.parametrize('code', ['q2', 'int8', 'lsq', 'phase-2', 'q2-hadamard', 'pi2-8'])
def test_compiled_layers_give_the_same(code):
    torch.compiler.reset()
    m = nn.Sequential(QuantLinear(16, 8, code), nn.ReLU(), QuantLinear(8, 3, code))
    x, fast = torch.randn(5, 16), torch.compile(m, backend='aot_eager')
    m(x).sum().backward()
    want = [p.grad.clone() for p in m.parameters()]
    m.zero_grad()
    y = fast(x)
    y.sum().backward()
    assert torch.equal(y, m(x)) and all(torch.allclose(p.grad, g) for p,g in zip(m.parameters(), want))
    ice = frozen_copy(m)
    assert torch.equal(torch.compile(ice, backend='aot_eager')(x), m(x))


def test_compiled_by_inductor():
    m = QuantLinear(16, 8, 'q2')
    x = torch.randn(5, 16)
    assert torch.allclose(torch.compile(m)(x), m(x), atol=1e-6)


def test_wrapped_for_distributed_training(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/ranks', rank=0, world_size=1)
    try:
        m = nn.Sequential(QuantEmbedding(9, 8), QuantLinear(8, 4, 'phase-2', bias=True), QuantLinear(4, 3, 'lsq'))
        ids, wrapped = torch.tensor([[0, 8]]), DistributedDataParallel(deepcopy(m))
        wrapped(ids).sum().backward()
        m(ids).sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p,q in zip(m.parameters(), wrapped.parameters()))
    finally: dist.destroy_process_group()


def test_from_float_shares_and_keeps():
    lin, emb = nn.Linear(6, 4, dtype=torch.float64).eval(), nn.Embedding(5, 6, padding_idx=1)
    q, e = QuantLinear.from_float(lin), QuantEmbedding.from_float(emb)
    assert q.weight is lin.weight and q.bias is lin.bias and not q.training and e.weight is emb.weight and e.padding_idx == 1
    assert torch.equal(QuantLinear.from_float(lin, None)(lin.weight), lin(lin.weight))


def test_named_layers():
    assert Q2Linear(4, 3, bias=True).code.name == 'q2' and Pi2Linear(4, 3, bits=4).code.name == 'pi2-4'
    assert Pi2Embedding(4, 3)(torch.tensor([1])).shape == (1, 3)
    norm, x = Pi2RMSNorm(6, bits=4), torch.randn(2, 6)
    with torch.no_grad(): norm.weight.copy_(torch.linspace(.5, 2, 6))
    assert torch.equal(frozen_copy(norm)(x), norm(x)) and torch.allclose(norm(x), F.rms_norm(x, (6,), norm.weight, 1e-6), atol=.5)
    assert coded_state(nn.Sequential(norm))['0.weight'].z.shape == (1, 6)
    with pytest.raises(ValueError, match='unknown code'): Pi2Linear(4, 3, bits=7)


@pytest.mark.parametrize('code', [*CODES, 'q2, group=8', 'q2, group=-1'])
def test_a_language_model_in_any_code_and_its_file(code, tmp_path):
    torch.manual_seed(0)
    lm = LM(LMConfig(layout='GQA, CfC', dim=16, heads=2, kv_heads=1, window=8, mlp_ratio=2., code=code))
    with torch.no_grad():
        for p in lm.parameters(): p.add_(torch.randn_like(p)*.1)
    ids = torch.randint(0, 256, (2, 12))
    save_model(lm, ByteTokenizer(), tmp_path/'m.q2bin')
    back, _, _ = load_model(tmp_path/'m.q2bin')
    for half in (False, True):
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=half): assert torch.equal(lm(ids)[0], back(ids)[0])


def test_one_module_under_two_names_and_packed_models_are_written():
    m = nn.Module()
    m.a = m.b = QuantLinear(4, 3, 'q2')
    assert coded_state(m)['b.weight'] == 'a.weight'
    want, packed = coded_state(m)['a.weight'], pack_model(deepcopy(m))
    assert torch.equal(coded_state(packed)['a.weight'].z, want.z) and coded_state(packed)['b.weight'] == 'a.weight'
    with pytest.raises(ValueError, match='lies packed'): load_coded_state(packed, coded_state(m))


def test_a_state_must_belong():
    a = nn.Sequential(QuantLinear(4, 3, 'lsq'))
    with pytest.raises(ValueError, match='do not belong'): load_coded_state(a, {})
    with pytest.raises(ValueError, match='shape'): load_coded_state(a, coded_state(nn.Sequential(QuantLinear(4, 2, 'lsq'))))
    with torch.no_grad(): a[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='0.weight holds NaN'): coded_state(a)
