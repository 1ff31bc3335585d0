"Objectives: what each counts, what padding does, the line of text, and that the model is left as it was"
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pi2nb.banks import Banks
from pi2nb.model import LM, LMConfig
from pi2nb.objectives import OBJECTIVES, ModelPass, Objective, observe, register_objective
from pi2nb.recursion import RecursiveCore

quick = settings(max_examples=30, deadline=None)
EVERYTHING = 'ce + .01*coherence + .001*energy + .1*coupling'
NAMES = ['ce', 'coherence', 'energy', 'coupling']


def model(coupler='router', dim=8, layers=2):
    torch.manual_seed(0)
    lm = LM(LMConfig(f'CfC*{layers}', dim, vocab=12, mlp_ratio=1, code=None, gate_code=None, embed_code=None))
    for b in lm.blocks[1:]: b.mixer = Banks(dim, 'semantic, context', coupler, None, None, concepts=5, window=3)
    for p in lm.parameters():
        if p.ndim == 2: torch.nn.init.normal_(p, std=.4)
    return lm


def data(B=2, T=7, seed=0):
    return torch.randint(0, 12, (2, B, T), generator=torch.Generator().manual_seed(seed)).unbind()


def grads(lm, loss): return torch.autograd.grad(loss, list(lm.parameters()), allow_unused=True, materialize_grads=True)
def show(hidden, targets=None): return ModelPass(None, torch.zeros(hidden.shape[:2]) if targets is None else targets, hidden, [])


def test_registered(): assert list(OBJECTIVES)[:4] == NAMES


@pytest.mark.parametrize('seed', range(5))
def test_ce_alone_is_the_plain_line_to_the_bit(seed):
    lm, (ids, targets) = model(), data(B=1 + seed, T=3 + 7*seed, seed=seed)
    loss, parts = Objective()(lm, ids, targets)
    plain = F.cross_entropy(lm(ids)[0].flatten(0, 1), targets.flatten())
    assert torch.equal(loss, plain) and torch.equal(parts['ce'], plain) and list(parts) == ['ce'] and not parts['ce'].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(grads(lm, loss), grads(lm, plain)))


@quick
@given(st.integers(1, 300), st.integers(2, 60), st.integers(0, 10**6))
def test_the_mean_is_the_plain_mean_to_the_bit(n, vocab, seed):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(1, n, vocab, generator=g).mul_(3).requires_grad_()
    t = torch.randint(0, vocab, (1, n), generator=g)
    mine, plain = OBJECTIVES['ce'](ModelPass(a, t, None, [])), F.cross_entropy(a[0], t[0])
    assert torch.equal(mine, plain) and torch.equal(*(torch.autograd.grad(l, a)[0] for l in (mine, plain)))


@pytest.mark.parametrize('line', ['ce', EVERYTHING])
@pytest.mark.parametrize('half', [False, True])
def test_many_logits_are_never_there_together(monkeypatch, half, line):
    lm, (ids, targets) = model(), data(3, 11)
    targets[1, 5:] = -1
    found = []
    for most in (10**6, 24):                                            # two positions at once
        monkeypatch.setattr('pi2nb.objectives.AT_ONCE', most)
        with torch.autocast('cpu', torch.bfloat16, enabled=half): loss, parts = Objective(line)(lm, ids, targets)
        found.append((loss, [*parts.values()], grads(lm, 3*loss)))
    seen = observe(lm, ids, targets)
    assert seen._logits is None and torch.allclose(seen.logits, lm(ids)[0])
    (a, ps, gs), (b, qs, hs) = found
    tol = dict(rtol=.05, atol=.02) if half else dict(rtol=1e-4, atol=1e-6)
    assert torch.allclose(a, b, **tol) and all(torch.allclose(x, y, **tol) for x, y in zip([*ps, *gs], [*qs, *hs]))
    with torch.no_grad(): assert torch.allclose(Objective(line)(lm, ids, targets)[0], found[1][0], **tol)


@pytest.mark.parametrize('pad', [-1, -100, -7])
def test_padding_is_nothing(pad):
    "Logits, features and lengths where the target is padding do not matter, neither in value nor in gradient"
    hidden, logits = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 12, requires_grad=True)
    targets = data(T=6)[1]
    targets[0, 4:] = targets[1, 2:] = pad
    p = ModelPass(logits, targets, hidden, [])
    for n in ('ce', 'coherence', 'energy'):
        g, = torch.autograd.grad(OBJECTIVES[n](p), logits if n == 'ce' else hidden)
        assert g[0, 4:].abs().sum() == 0 and g[1, 2:].abs().sum() == 0 and g[0, :4].abs().sum() > 0
    for n, k in (('ce', 'logits'), ('energy', 'hidden'), ('coherence', 'hidden')):   # a row cut short is the row padded
        cut = ModelPass(logits[:1, :4], targets[:1, :4], hidden[:1, :4], [])
        row = ModelPass(logits[:1], targets[:1], hidden[:1], [])
        assert torch.allclose(OBJECTIVES[n](row), OBJECTIVES[n](cut), atol=1e-6)


def test_nothing_but_padding():
    lm, (ids, targets) = model(), data()
    loss, parts = Objective('ce + coherence + energy')(lm, ids, targets*0 - 1)
    assert loss.item() == 0 and all(g.abs().sum() == 0 for g in grads(lm, loss))


def test_coherence_and_energy():
    x = torch.randn(1, 1, 8)
    line = torch.cat([x, 2*x, -x], 1)                                   # alike, then opposite
    assert torch.allclose(OBJECTIVES['coherence'](show(line)), torch.tensor(1.), atol=1e-6)
    assert OBJECTIVES['coherence'](show(x)).item() == 0
    hidden = F.rms_norm(torch.randn(2, 5, 64), (64,))
    length = (hidden.unflatten(-1, (-1, 2))/2**.5).square().sum(-1).sqrt()
    assert torch.allclose(OBJECTIVES['energy'](show(hidden)), (length - 1).square().mean(), atol=1e-6)
    assert torch.allclose(OBJECTIVES['energy'](show(hidden)), 2 - 2*length.mean(), atol=1e-5)
    z = torch.randn(2, 4, 6, dtype=torch.float64)
    for n in ('coherence', 'energy'):
        h = z.float().requires_grad_()
        g, = torch.autograd.grad(OBJECTIVES[n](show(h)), h)
        d = torch.randn_like(z).float(); e = 1e-2
        slope = (OBJECTIVES[n](show(z.float() + e*d)) - OBJECTIVES[n](show(z.float() - e*d)))/(2*e)
        assert torch.allclose((g*d).sum(), slope, atol=1e-3)


@pytest.mark.parametrize('coupler', ['router', 'document', 'mean'])
def test_all_together(coupler):
    lm, (ids, targets) = model(coupler, layers=3), data()
    loss, parts = Objective(EVERYTHING)(lm, ids, targets)
    assert list(parts) == NAMES
    assert torch.allclose(loss, parts['ce'] + .01*parts['coherence'] + .001*parts['energy'] + .1*parts['coupling'])
    p = observe(lm, ids, targets)
    assert len(p.said) == 2 and torch.allclose(parts['coupling'], sum(c.loss(o) for c, o in p.said))
    assert torch.allclose(lm.head(p.hidden).float(), p.logits)
    assert all(g.isfinite().all() for g in grads(lm, loss))
    assert coupler != 'mean' or parts['coupling'] == 0


def test_a_layer_used_several_times_counts_each_time():
    lm = model()
    lm.blocks[1].mixer, lm.blocks[1].mlp = RecursiveCore(lm.blocks[1].mixer, lm.blocks[1].mlp, 3), None
    assert len(observe(lm, *data()).said) == 3


def test_the_model_is_left_as_it_was():
    lm, (ids, targets) = model(), data()
    names = {n: dict(vars(m)) .keys() for n, m in lm.named_modules()}
    loss, _ = Objective(EVERYTHING)(lm, ids, targets)
    loss.backward()
    with pytest.raises(IndexError): Objective(EVERYTHING)(lm, ids + 12, targets)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in lm.modules())
    assert names == {n: dict(vars(m)).keys() for n, m in lm.named_modules()}
    assert torch.equal(deepcopy(lm)(ids)[0], lm(ids)[0])


def test_the_model_runs_once():
    lm, calls = model(), []
    h = lm.register_forward_hook(lambda *a: calls.append(1))
    Objective(EVERYTHING)(lm, *data())
    h.remove()
    assert len(calls) == 1


def test_mixed_precision():
    lm, (ids, targets) = model(), data()
    exact, _ = Objective(EVERYTHING)(lm, ids, targets)
    with torch.autocast('cpu', torch.bfloat16): loss, parts = Objective(EVERYTHING)(lm, ids, targets)
    assert all(v.dtype == torch.float32 for v in parts.values()) and abs(loss - exact) < .1
    loss.backward()
    with torch.autocast('cpu', torch.bfloat16):
        a, b = Objective()(lm, ids, targets)[0], F.cross_entropy(lm(ids)[0].flatten(0, 1), targets.flatten())
    assert torch.equal(a, b)


def test_text():
    o = Objective(' ce+ 2 *energy +1e-3* coherence')
    assert o.weights == dict(ce=1, energy=2, coherence=1e-3) and repr(o) == 'ce + 2.0*energy + 0.001*coherence'
    assert Objective(repr(o)).weights == o.weights and deepcopy(o).weights == o.weights


@quick
@given(st.text('ce*+.1-naf ', max_size=12))
def test_the_reader_never_crashes(text):
    try: Objective(text)
    except ValueError as e: assert '\n' not in str(e) and str(e)


@pytest.mark.parametrize('text, says', [
    ('', 'no term'), ('+', 'no term'), ('ce +', 'no term'), ('ce - energy', 'no term'), ('ce + 2*', 'no term'),
    ('ce + beauty', "unknown objective 'beauty'; choose one of ce"), ('energy', 'has no ce'), ('ce + ce', 'twice'),
    *((f'ce + {w}*energy', 'positive number') for w in ('0', '-1', 'nan', 'inf', 'much', '')), ('0*ce', 'positive number'), ('-1*ce', 'positive')])
def test_text_refuses(text, says):
    with pytest.raises(ValueError, match=says): Objective(text)


def test_refuses():
    lm, (ids, targets) = model(), data()
    for bad in ((ids, targets[:, 1:]), (ids[:, :0], targets[:, :0]), (ids[0], targets)):
        with pytest.raises(ValueError, match='one shape'): Objective()(lm, *bad)
    plain = LM(LMConfig('CfC', 8, vocab=12, mlp_ratio=1))
    with pytest.raises(ValueError, match='no coupler'): Objective('ce + coupling')(plain, ids, targets)
    odd = LM(LMConfig('CfC', 7, vocab=12, mlp_ratio=1))
    for n in ('energy', 'coherence'):
        with pytest.raises(ValueError, match='even dim'): Objective(f'ce + {n}')(odd, ids, targets)
    Objective()(odd, ids, targets)


def test_ones_own():
    @register_objective('test_size')
    def size(p): return p.hidden.square().mean()
    try: assert Objective('ce + .1*test_size')(model(), *data())[1]['test_size'] > .9
    finally: del OBJECTIVES['test_size']
