"Compensation: the error falls, the symbols survive, one walk through any model, and what is refused"
from copy import deepcopy
from dataclasses import replace

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from test_llama import folder_of, llama

from pi2nb.codebook import CODES, codebook, hold
from pi2nb.compensate import _damped, _descend, _refit, _walk, _factor, compensate, compensate_model, heal, output_error
from pi2nb.cli import main
from pi2nb.model import LM, recipe
from pi2nb.q2bn import load_model
from pi2nb.quantlinear import QuantLinear, coded_state, load_coded_state


def task(seed=0, rows=12, cols=32, causes=5):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    x = r(400, causes)@r(causes, cols) + r(400, cols)
    return r(rows, cols), x.T@x


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([c for c in CODES if CODES[c].rotation != 'pairs']), st.sampled_from([0, 8, 16, -1]), st.integers(0, 99),
       st.booleans(), st.integers(0, 2))
def test_every_code_gives_its_symbols_back(name, group, seed, ordered, sweeps):
    code = replace(CODES[name], group=group, learned=False)
    w, h = task(seed)
    q = compensate(w, h, code, sweeps, ordered)
    assert q.z.dtype == torch.uint8 and q.s.dtype == torch.float16 and q.shape == w.shape
    assert int(q.z.max()) < len(code.levels) and q.s.shape == code.scale_shape(*w.shape)
    again = hold(q.decode(), code, q.s)
    assert torch.equal(again.z, q.z) and torch.equal(again.decode(), q.decode())


@pytest.mark.parametrize('name', ['binary', 'ternary', 'q2', 'q2-hadamard', 'q3', 'int4', 'int6'])
@pytest.mark.parametrize('group', [0, 8, -1])
def test_the_outputs_gain_what_the_weights_lose(name, group):
    code, (w, h) = replace(codebook(name), group=group), task(3)
    near, q = hold(w, replace(code, rule='mse')).decode(), compensate(w, h, code).decode()
    assert output_error(q, w, h) < output_error(near, w, h)
    if len(code.levels) <= 8: assert (q - w).norm() > (near - w).norm()


def test_without_correlation_there_is_nothing_to_make_up_for():
    w, code = task(1)[0], codebook('q2', rule='mse', group=8)
    assert torch.equal(compensate(w, torch.eye(32), code, sweeps=0, ordered=False).z, hold(w, code).z)


def test_weights_on_the_grid_stay_where_they_are():
    w, h = task(2)
    code = codebook('int8')                                   # its scale is the one the weights came from
    on = hold(w, code)
    assert torch.equal(compensate(on.decode(), h, code).decode(), on.decode())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([4, 8, 32]))
def test_sweeps_never_raise_the_error(seed, g):
    w, h = task(seed)
    code, x, h = codebook('q2', group=g, digits=11), w.T.contiguous(), _damped(h, .01)
    z, s = _walk(x.clone(), _factor(h), code, g)
    h = h.float()
    size = lambda: ((h@(e := code._values(z)*s.repeat_interleave(g, 0) - x))*e).sum().item()
    last = size()
    for _ in range(3):
        s = _refit(x, z, s, h, code, g)
        assert (now := size()) <= last*(1 + 1e-4); last = now
        _descend(x, z, s, h, code, g)
        assert (now := size()) <= last*(1 + 1e-4); last = now


def test_dead_inputs_and_few_tokens_do_no_harm():
    w, _ = task()
    x = torch.randn(3, 32); x[:, 5] = 0                        # three tokens for 32 columns, one column never used
    for h in (x.T@x, torch.zeros(32, 32)):
        q = compensate(w, h, codebook('q2', group=8))
        assert q.decode().isfinite().all()
    big = torch.diag(torch.logspace(-6, 6, 32))
    assert output_error(compensate(w, big, codebook('q4')).decode(), w, big) < .05


def test_what_is_refused():
    w, h = task()
    for bad, says in ((lambda: compensate(w, h, codebook('phase-1')), 'mixes two rows'),
                      (lambda: compensate(w[0], h, codebook('q2')), 'does not fit'),
                      (lambda: compensate(w, h*float('inf'), codebook('q2')), 'NaN or infinity'),
                      (lambda: compensate(w, h, codebook('q2', group=24)), 'do not divide')):
        with pytest.raises(ValueError, match=says): bad()


def float_lm(name='q2', **kw):
    torch.manual_seed(0)
    lm = LM(recipe(name).config(**dict(dim=32, heads=4 if name == 'llama' else 2, code=None, gate_code=None, embed_code=None, window=16) | kw))
    for p in lm.parameters(): p.data.copy_(torch.randn_like(p)*.2)
    return lm.eval().requires_grad_(False)


def windows(n=6, time=12, vocab=256): return list(torch.randint(vocab, (n, time), generator=torch.Generator().manual_seed(5)))
def matrices(model, where='blocks.'): return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and where in n]


@pytest.mark.parametrize('name', ['q2', 'qpf', 'llama'])
def test_every_shape_of_model_is_walked(name):
    lm = float_lm(name)
    before, code = deepcopy(lm), codebook('q2', group=16)
    state = compensate_model(lm, {n: code for n in matrices(lm)}, windows(), batch=4)
    assert list(sorted(state)) == sorted(matrices(lm))
    for n, q in state.items(): assert torch.equal(lm.get_submodule(n).weight, q.decode()), n
    for n, p in before.named_parameters():                     # nothing else has moved, and nothing was left behind
        if n[:-7] not in state: assert torch.equal(p, lm.get_parameter(n)), n
    assert not any('forward' in m.__dict__ or m._forward_pre_hooks for m in lm.modules())


def test_the_batches_are_only_a_way_to_read():
    a, b = (compensate_model(float_lm(), {n: codebook('int4') for n in matrices(float_lm())}, windows(), batch=k) for k in (2, 6))
    assert sum((a[n].z == b[n].z).float().mean().item() for n in a)/len(a) > .95  # sums are taken in another order


def test_a_llama_of_transformers_is_walked_alike():
    torch.manual_seed(0)
    m = LlamaForCausalLM(LlamaConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=2, max_position_embeddings=64)).eval().requires_grad_(False)
    for p in m.parameters(): p.normal_(0, .3)
    text, near, far = torch.stack(windows(8, 16, 48)), deepcopy(m), deepcopy(m)
    code = codebook('q3', group=16)
    names = matrices(m, '.layers.')
    state = compensate_model(near, {n: code for n in names}, list(text))
    for n in names: far.get_submodule(n).weight.copy_(hold(far.get_submodule(n).weight, code).decode())
    off = lambda q: (q(text).logits - m(text).logits).square().mean().item()
    assert len(state) == 14 and off(near) < off(far)


def test_a_code_for_the_whole_matrix_and_two_codes_in_one_stage():
    lm = float_lm('llama')
    plan = {n: codebook('q2', group=-1) if n.endswith('kv') else codebook('int4') for n in matrices(lm)}
    state = compensate_model(lm, plan, windows())
    assert all(state[n].code == plan[n] for n in plan)
    assert {tuple(q.s.shape) for n, q in state.items() if n.endswith('kv')} == {(1, 1)}


def test_model_errors():
    with pytest.raises(ValueError, match='no layer'): compensate_model(float_lm(), {'nowhere': codebook('q2')}, windows())
    with pytest.raises(ValueError, match='looks at data'): compensate_model(float_lm(), {}, [])


def test_healing_moves_scales_and_gains_and_nothing_else():
    teacher = float_lm('llama')
    lm, code = deepcopy(teacher), codebook('q2', group=16)
    state = compensate_model(deepcopy(teacher), {n: code for n in matrices(lm)}, windows())
    for n in state: lm.get_submodule(n).hold_in(code)
    load_coded_state(lm, coded_state(lm) | {n + '.weight': q for n, q in state.items()})
    old = coded_state(lm)
    losses = heal(lm, teacher, windows(), 12, batch=6)
    new = coded_state(lm)
    assert len(losses) == 12 and losses[-1] < losses[0]
    for n in state: assert torch.equal(new[n + '.weight'].z, old[n + '.weight'].z) and not torch.equal(new[n + '.weight'].s, old[n + '.weight'].s)
    for n in ('embed.weight', 'head.weight', 'norm.weight'): assert torch.equal(new[n], old[n])
    assert any(not torch.equal(new[n], old[n]) for n in new if n.endswith('_norm.weight'))
    assert all(isinstance(lm.get_submodule(n), QuantLinear) for n in state)
    with pytest.raises(ValueError, match='quantise it first'): heal(deepcopy(teacher), teacher, windows(), 1)


def test_the_command_compensates_turns_and_heals(tmp_path, monkeypatch, capsys):
    source, text, out = folder_of(tmp_path, llama()), tmp_path/'t.txt', tmp_path/'m.q2bin'
    text.write_bytes(b'the one the other then '*400)
    words = f'pi2 quantize {source} -o {out} --code q3 --group 16 --method compensate --rotate --heal 2 --windows 2'.split()
    monkeypatch.setattr('sys.argv', [*words, '--data', str(text)])
    try: main()
    except SystemExit as e: assert not e.code
    assert 'q3, group=16, rotation=hadamard' in capsys.readouterr().out
    lm, _, meta = load_model(out)
    assert meta['quantized']['method'] == 'compensate, heal=2' and lm.blocks[0].mixer.q.code.rotation == 'hadamard'
    out.unlink()
    monkeypatch.setattr('sys.argv', words)
    with pytest.raises(SystemExit) as e: main()
    assert e.value.code == 1 and 'looks at data' in capsys.readouterr().err
