"Reading other people's models: files that are right, files that are wrong, and what a text costs"
import struct

import gguf, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pi2nb.bpe import ScoreTokenizer
from pi2nb.pretrained import (cut_windows, load_gguf, load_llama2c, min_max, next_token_nats, relative_error, round_model,
                             rounding_grid)

KINDS = {'input_layernorm': 'attn_norm', 'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
         'self_attn.o_proj': 'attn_output', 'post_attention_layernorm': 'ffn_norm', 'mlp.gate_proj': 'ffn_gate',
         'mlp.down_proj': 'ffn_down', 'mlp.up_proj': 'ffn_up'}


def llama(heads=4, kv=2, tied=True, layers=2, hidden=48):
    torch.manual_seed(heads + 10*kv + layers)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=tied)).eval().requires_grad_(False)
    for p in model.parameters(): p.normal_(0, .3)
    return model


def stored(model, name):  # the weight as both formats keep it, neighbours turned together
    c, w = model.config, model.get_parameter(name)
    heads = c.num_attention_heads if 'q_proj' in name else c.num_key_value_heads if 'k_proj' in name else 0
    if heads:
        half = w.shape[0]//heads//2
        w = w[[h*2*half + i + half*j for h in range(heads) for i in range(half) for j in (0, 1)]]
    return w.numpy()


def write_llama2c(path, model):
    c, out = model.config, [stored(model, 'model.embed_tokens.weight')]
    out += [stored(model, f'model.layers.{i}.{k}.weight') for k in KINDS for i in range(c.num_hidden_layers)]
    out += [stored(model, 'model.norm.weight'), np.zeros(c.max_position_embeddings*c.hidden_size//c.num_attention_heads, np.float32)]
    if not c.tie_word_embeddings: out.append(stored(model, 'lm_head.weight'))
    sizes = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
             c.vocab_size if c.tie_word_embeddings else -c.vocab_size, c.max_position_embeddings)
    path.write_bytes(struct.pack('<7i', *sizes) + b''.join(a.tobytes() for a in out))
    return path


def write_gguf(path, model, arch='llama', drop=(), without=(), qtype=None, **extra):
    c, w = model.config, gguf.GGUFWriter(path, arch)
    for k, add in dict(embedding_length=c.hidden_size, feed_forward_length=c.intermediate_size, block_count=c.num_hidden_layers,
                       context_length=c.max_position_embeddings, head_count=c.num_attention_heads,
                       head_count_kv=c.num_key_value_heads, layer_norm_rms_eps=c.rms_norm_eps).items():
        if k not in drop: getattr(w, f'add_{k}')(add)
    for k, v in extra.items(): getattr(w, f'add_{k}')(v)
    names = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight'}
    names |= {f'blk.{i}.{g}.weight': f'model.layers.{i}.{k}.weight' for k, g in KINDS.items() for i in range(c.num_hidden_layers)}
    if not c.tie_word_embeddings: names['output.weight'] = 'lm_head.weight'
    for g, n in names.items():
        a = stored(model, n)
        if g in without: continue
        if qtype and a.ndim == 2: w.add_tensor(g, gguf.quantize(a, qtype), raw_dtype=qtype)
        else: w.add_tensor(g, a)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


def logits(model): return model(torch.arange(20)[None]).logits.detach()


def test_transformers_own_reader_agrees(tmp_path):
    path = write_gguf(tmp_path/'m.gguf', llama(hidden=64), qtype=gguf.GGMLQuantizationType.Q4_1, name='m')
    got = load_gguf(path)
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=llama(hidden=64))['tensors']
    assert all(torch.equal(p, theirs[n]) for n, p in got.named_parameters())


shapes = pytest.mark.parametrize('model', [dict(), dict(kv=4), dict(kv=1, layers=1), dict(tied=False), dict(heads=1, kv=1)])


@shapes
@pytest.mark.parametrize('load, write', [(load_llama2c, write_llama2c), (load_gguf, write_gguf)])
def test_a_model_comes_back_as_it_was(model, load, write, tmp_path):
    m = llama(**model)
    got = load(write(tmp_path/'m', m))
    assert torch.equal(logits(got), logits(m)) and not got.training
    assert all(torch.equal(p, got.get_parameter(n)) for n, p in m.named_parameters())
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == model.get('tied', True)


@pytest.mark.parametrize('change, says', [
    (lambda b: b[:-4], 'cut short'), (lambda b: b[:29], 'cut short'), (lambda b: b + b'x', 'cut that off'), (lambda b: b'', 'seven sizes'),
    (lambda b: b[:20], 'seven sizes'), (lambda b: b'ak42' + b[4:], 'llama2.c'), (lambda b: bytes(28) + b[28:], 'seven sizes'),
    (lambda b: struct.pack('<7i', 32, 48, 2, 3, 3, 40, 32) + b[28:], 'seven sizes'),
    (lambda b: struct.pack('<7i', 32, 48, -2, 4, 2, 40, 32) + b[28:], 'seven sizes'),
    (lambda b: struct.pack('<7i', 32, 48, 2, 4, 2, -40, 32) + b[28:], 'cut short'),
    (lambda b: struct.pack('<7i', 2**30, 2**30, 2**30, 4, 2, 2**30, 2**30) + b[28:], 'cut short')])
def test_a_damaged_llama2c_file_is_refused(change, says, tmp_path):
    path = write_llama2c(tmp_path/'m.bin', llama())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=says) as e: load_llama2c(path)
    assert 'm.bin' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('load', [load_llama2c, load_gguf, ScoreTokenizer.load])
def test_a_missing_file_is_named(load, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no file .*none'): load(tmp_path/'none')
    with pytest.raises(FileNotFoundError, match='there is no file'): load(str(tmp_path))


@pytest.mark.parametrize('how, says', [
    (dict(arch='gemma'), "kind 'gemma'"), (dict(drop=('context_length',)), 'context_length'), (dict(without=('blk.1.attn_q.weight',)), 'blk.1.attn_q'),
    (dict(rope_dimension_count=4), 'rotary'), (dict(rope_scaling_type=gguf.RopeScalingType.LINEAR), 'rotary')])
def test_a_gguf_file_that_is_no_plain_llama_is_refused(how, says, tmp_path):
    with pytest.raises(ValueError, match=says): load_gguf(write_gguf(tmp_path/'m.gguf', llama(), **how))


def test_sizes_that_contradict_the_tensors_are_refused(tmp_path):
    path = write_gguf(tmp_path/'m.gguf', llama(), drop=('feed_forward_length',), feed_forward_length=64)
    with pytest.raises(ValueError, match='gate_proj.* has 1,536 weights and should have 2,048'): load_gguf(path)


@pytest.mark.parametrize('cut', [0, 3, 4, 20, 200, 1000, -1])
def test_a_cut_gguf_file_is_refused(cut, tmp_path):
    path = write_gguf(tmp_path/'m.gguf', llama())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match='m.gguf is (not a GGUF file|a damaged GGUF file)'): load_gguf(path)


@pytest.mark.parametrize('kind, gap', [('F16', 1e-3), ('Q8_0', 1e-2), ('Q4_1', .3)])
def test_packed_weights_are_unpacked(kind, gap, tmp_path):
    m = llama(hidden=64)
    got = load_gguf(write_gguf(tmp_path/'m.gguf', m, qtype=gguf.GGMLQuantizationType[kind]))
    for n, p in m.named_parameters(): assert (p - got.get_parameter(n)).abs().max() <= gap*p.abs().max()


@settings(max_examples=30)
@given(n=st.integers(0, 50), window=st.integers(0, 12))
def test_windows_do_not_overlap(n, window):
    if window < 2 or n < window:
        with pytest.raises(ValueError): cut_windows(range(n), window)
    else: assert torch.cat(cut_windows(range(n), window)).tolist() == list(range(n//window*window))


@pytest.mark.parametrize('ids', [torch.rand(8), torch.ones(8, dtype=torch.bool), [.5]*8])
def test_windows_are_made_of_integers(ids):
    with pytest.raises(ValueError, match='token ids are integers'): cut_windows(ids, 4)


@pytest.mark.parametrize('bad', [40, -1])
def test_a_foreign_token_is_refused(bad):
    with pytest.raises(ValueError, match='vocabulary of 40'): next_token_nats(llama(), [torch.tensor([1, 2]), torch.tensor([3, bad])])


def test_costs_are_those_of_the_plain_formula():
    m, w = llama(), [torch.tensor([1, 5, 9, 2]), torch.tensor([7, 7])]
    want = [-m(x[None]).logits[0].double().log_softmax(-1)[i, x[i+1]].item() for x in w for i in range(len(x)-1)]
    got = next_token_nats(m, w)
    assert got.dtype == torch.float64 and got.tolist() == pytest.approx(want, rel=1e-5)


def test_nothing_to_score_and_no_number():
    m = llama()
    for w in ([], [torch.tensor([3])]):
        with pytest.raises(ValueError, match='nothing to predict'): next_token_nats(m, w)
    m.model.norm.weight.fill_(float('nan'))
    with pytest.raises(ValueError, match='no number for token 0'): next_token_nats(m, cut_windows(range(8), 4))


@settings(max_examples=30)
@given(rows=st.integers(1, 4), groups=st.integers(1, 3), group=st.integers(1, 5), bits=st.integers(1, 8), flat=st.booleans())
def test_min_max_keeps_the_ends_and_half_a_step(rows, groups, group, bits, flat):
    w = torch.zeros(rows, groups*group) if flat else torch.randn(rows, groups*group)
    q = min_max(w, bits, group)
    x, y = (t.view(rows, groups, group) for t in (w, q))
    step = (x.amax(-1) - x.amin(-1))/(2**bits - 1)
    assert q.shape == w.shape and ((y - x).abs().amax(-1) <= step/2 + 1e-6).all()
    assert torch.allclose(y.amin(-1), x.amin(-1)) and torch.allclose(y.amax(-1), x.amax(-1))


@pytest.mark.parametrize('bits, group', [(0, 0), (4, 3), (4, -2)])
def test_min_max_refuses_what_does_not_fit(bits, group):
    with pytest.raises(ValueError, match='do not fit 8 columns'): min_max(torch.randn(2, 8), bits, group)


@pytest.mark.parametrize('shape', [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_min_max_wants_a_matrix(shape):
    with pytest.raises(ValueError, match='give a matrix'): min_max(torch.zeros(shape), 4)


def test_relative_error_in_units_of_the_row_variance():
    w = torch.tensor([[1., 3.], [10., 30.]])
    assert relative_error(w, w) == relative_error(w*0, w*0) == 0 and relative_error(w.mean(1, keepdim=True).expand(2, 2), w) == pytest.approx(1)


@pytest.mark.parametrize('code', ['q2', 'pi2-4', 'phase-2', 'min-max-3', 'int4, rule=mse'])
@pytest.mark.parametrize('tied', [True, False])
def test_rounding_changes_what_it_should(code, tied):
    for everything in (False, True):
        m, old = llama(tied=tied), llama(tied=tied)
        new, bits = round_model(m, code, group=16, everything=everything)
        changed = {n for n, p in old.named_parameters() if not torch.equal(p, new.get_parameter(n))}
        assert changed == {n for n, p in old.named_parameters() if p.ndim == 2 and (everything or '.layers.' in n)}
        assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied
        assert bits == {'q2': 3, 'pi2-4': 5, 'phase-2': 3, 'min-max-3': 5}.get(code, 5)


def test_a_group_that_does_not_divide_the_columns_becomes_a_row():
    for code, bits in (('q2', 2), ('min-max-2', 2)):
        each = 16 if code == 'q2' else 32
        rows32, rows48 = 32 + 2*16 + 32 + 2*48, 32
        _, got = round_model(llama(layers=1), code, group=32)
        assert got == pytest.approx(bits + each*(rows32 + rows48)/(32*rows32 + 48*rows48))


@pytest.mark.parametrize('code', ['q17', 'q2, colour=3', 'min-max-', 'min-max-0', 'min-max-two'])
def test_an_unknown_code_is_refused(code):
    with pytest.raises(ValueError): round_model(llama(), code)


def test_the_grid_leaves_the_model_alone_and_pairs_the_tokens():
    m, old = llama(), llama()
    windows = cut_windows(torch.arange(64) % 40, 16)
    grid = rounding_grid(m, windows, ('min-max-8', 'q2'), 16)
    assert torch.equal(logits(m), logits(old)) and grid['tokens'] == 60 and len(grid['rows']) == 8
    for r in grid['rows'].values(): assert r['nats'] - r['lost'] == pytest.approx(grid['nats'], abs=1e-9) and r['seconds'] > 0
    assert abs(grid['rows']['min-max-8 | group | all']['lost']) < abs(grid['rows']['q2 | group | all']['lost'])
