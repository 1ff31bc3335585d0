"Chapter 12: phases read from symbols, and quantize_model on modules of all kinds"
from copy import deepcopy

import pytest, torch
from torch import nn

from pi2nb.codebook import CODES, codebook, hold
from pi2nb.phase import Pi2QuantizedEmbedding, Pi2QuantizedLinear, Pi2QuantizedWeight, coded_phases, quantize_model
from pi2nb.quantlinear import QuantEmbedding, QuantLinear, coded_state


@pytest.mark.parametrize('stages', [1, 2])
@pytest.mark.parametrize('shape, group', [((2, 2), 0), ((6, 10), 0), ((4, 32), 8), ((4, 8), -1)])
def test_phases_are_the_symbols_in_another_spelling(stages, shape, group):
    w = torch.randn(shape)
    c = hold(w, codebook(f'phase-{stages}', group=group))
    k, size = coded_phases(c)
    each = size.repeat_interleave(k.shape[2]//size.shape[2], 2)          # the magnitude of every complex weight
    u = (torch.tensor([1, 1j, -1, -1j])[k.long()]*each).sum(0)
    a, b = u[0::2], u[1::2]
    z = torch.randn(shape[1])
    zc = torch.complex(z[0::2], z[1::2])
    y = a@zc + b@zc.conj()
    want = c.decode()@z
    assert torch.allclose(torch.stack([y.real, y.imag], 1).flatten(), want, atol=.05*want.abs().max().item() + 1e-3)


def test_no_phases_in_other_codes_or_odd_sizes():
    with pytest.raises(ValueError, match='no phases'): coded_phases(hold(torch.randn(4, 4), codebook('q2')))
    with pytest.raises(ValueError, match='no phases'): coded_phases(hold(torch.randn(3, 4), codebook('phase-2')))
    for n in ('ternary, rotation=pairs', 'lsq, rotation=pairs', 'int5, rotation=pairs', 'phase-2, group=1'):
        with pytest.raises(ValueError, match='no phases'): coded_phases(hold(torch.randn(4, 4), codebook(n)))
    for w in (torch.randn(3), torch.randn(2, 2, 2), torch.full((2, 2), float('nan'))):
        with pytest.raises(ValueError, match='finite'): Pi2QuantizedWeight(w, 'real')
    assert Pi2QuantizedWeight(torch.randn(2, 2)).half()().dtype == torch.float16
    with pytest.raises(ValueError, match="'complex' or 'real'"): Pi2QuantizedWeight(torch.randn(2, 2), 'imaginary')


@pytest.mark.parametrize('reading', ['complex', 'real'])
def test_only_magnitudes_learn(reading):
    m = Pi2QuantizedWeight(torch.randn(6, 8), reading)
    assert [n for n,_ in m.named_parameters()] == ['magnitude'] and [n for n,_ in m.named_buffers()] == ['phase']
    before = m().detach().clone()
    m().square().sum().backward()
    assert m.magnitude.grad.any()
    again = Pi2QuantizedWeight(torch.randn(6, 8), reading)
    again.load_state_dict(m.state_dict())
    assert torch.equal(again(), before) and torch.equal(deepcopy(m)(), before)


def test_layers_by_reading():
    assert [Pi2QuantizedLinear(4, 2, stages=s).code.name for s in (1, 2)] == ['phase-1', 'phase-2']
    assert Pi2QuantizedEmbedding(4, 2, reading='real').code.name == 'phase-real'
    with pytest.raises(ValueError, match='not known'): Pi2QuantizedLinear(4, 2, reading='both')


def conv_net(): return nn.Sequential(nn.Conv1d(3, 8, 3), nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.mark.parametrize('code', list(CODES))
def test_any_code_on_any_model(code):
    m = conv_net().eval()
    x = torch.randn(2, 3, 8)
    learn, _ = quantize_model(deepcopy(m), code, train=True)
    froze, rep = quantize_model(deepcopy(m), code)
    assert torch.equal(learn(x), froze(x)) and type(froze[0]) is nn.Conv1d and type(froze[2]) is QuantLinear
    assert rep.before == sum(p.numel()*4 for p in m.parameters()) and rep.after == sum(b for *_, b in rep.held)
    assert [r[0] for r in rep.rows] == ['0.weight', '2.weight', '4.weight'] and 'left alone' in rep.rows[0][3]
    learn(x).sum().backward()
    assert learn[2].weight.grad is not None


def test_rules_and_groups():
    m = nn.ModuleDict(dict(a=nn.Linear(64, 4), b=nn.Linear(10, 4), head=nn.Linear(64, 4), emb=nn.Embedding(3, 64)))
    _, rep = quantize_model(m, codebook('q2', group=16), None, {'h*': 'int8'})
    assert {r[0]: r[2] for r in rep.rows} == {'a.weight': 'q2, group=16', 'b.weight': 'q2, group=16, group=0', 'head.weight': 'int8', 'emb.weight': None}
    assert 'groups of 16 do not fit' in str(rep) and 'as asked' in str(rep)
    assert codebook('q2, group=16, group=0').group == 0


def test_ties_are_kept_and_a_subclass_holds_both_back():
    class Odd(nn.Linear): pass
    for head, codes in ((nn.Linear, ['int8', 'int8']), (Odd, [None, None])):
        m = nn.ModuleDict(dict(emb=nn.Embedding(5, 4), head=head(4, 5, bias=False), other=nn.Linear(4, 4)))
        m['head'].weight = m['emb'].weight
        _, rep = quantize_model(m, 'q2')
        assert m['head'].weight is m['emb'].weight and [r[2] for r in rep.rows][:2] == codes
        if codes[0]: assert torch.equal(m['head'].held_weight(), m['emb'].held_weight()) and isinstance(coded_state(m)['head.weight'], str)


def test_half_precision_models():
    m = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)).to(torch.bfloat16)
    quantize_model(m, 'phase-2')
    assert m(torch.tensor([1, 2])).dtype == torch.bfloat16 and isinstance(m[0], QuantEmbedding)


@pytest.mark.parametrize('spoil, says', [(float('nan'), 'NaN'), (1e38, '65504')])
def test_a_failure_leaves_the_model_as_it_was(spoil, says):
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad(): m[1].weight[0, 0] = spoil
    kept = list(m)
    with pytest.raises(ValueError, match=says) as e: quantize_model(m, 'int8')
    assert '\n' not in str(e.value) and all(a is b for a,b in zip(m, kept))


@pytest.mark.parametrize('model', [nn.Sequential(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Conv1d(3, 3, 1)])
def test_nothing_to_replace(model):
    with pytest.raises(ValueError, match='nothing to replace'): quantize_model(model)


def test_a_table_with_a_maximal_norm_is_left_alone():
    m = nn.Sequential(nn.Embedding(5, 4, max_norm=1.), nn.Linear(4, 4))
    assert 'no coded form' in str(quantize_model(m)[1]) and type(m[0]) is nn.Embedding


def test_one_layer_under_two_names_is_replaced_under_both():
    m = nn.Module()
    m.a = m.b = nn.Linear(8, 8)
    quantize_model(m, 'lsq', train=True)
    assert m.a is m.b and type(m.a) is QuantLinear


@pytest.mark.filterwarnings('ignore')
def test_layers_that_others_reach_into_are_left_alone():
    m = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.nn.utils.weight_norm(nn.Linear(8, 8)))
    m[0].register_forward_hook(lambda *a: None)
    m.append(nn.Linear(8, 3))
    x = torch.randn(2, 4, 8)
    _, rep = quantize_model(m.eval(), 'binary', train=True)
    assert [n for n, q in m.named_modules() if isinstance(q, QuantLinear)] == ['3'] and 'hooks' in str(rep) and 'reads it directly' in str(rep)
    with torch.no_grad(): fast = m(x)
    assert torch.allclose(fast, m(x), atol=1e-5)
    with pytest.raises(ValueError, match='is no code'): quantize_model(nn.Sequential(nn.Linear(2, 2)), 3)


def test_held_weights_are_fixed_and_learning_ones_are_not():
    m, _ = quantize_model(nn.Sequential(nn.Linear(4, 4)), 'q2')
    assert not m[0].weight.requires_grad and m[0].bias.requires_grad
    assert quantize_model(nn.Sequential(nn.Linear(4, 4)), 'q2', train=True)[0][0].weight.requires_grad


def test_a_rule_that_a_tie_overrules_is_said():
    m = nn.ModuleDict(dict(emb=nn.Embedding(5, 4), head=nn.Linear(4, 5, bias=False)))
    m['head'].weight = m['emb'].weight
    assert 'tied to' in str(quantize_model(m, rules={'head': 'int6'})[1])
