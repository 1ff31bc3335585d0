"Models of others brought in: the same answers from every format, one sentence for what cannot be represented, files that keep it"
import json, shutil
from dataclasses import replace

import gguf, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pi2nb.codebook import codebook
from pi2nb.export import to_gguf, to_huggingface
from pi2nb.llama import (METHODS, _BYTES, block_matrices, build_llama, llama_shape, quantize_lm, quantize_source, read_source,
                         register_method, round_weights)
from pi2nb.model import LM, LMConfig, recipe
from pi2nb.pretrained import next_token_nats
from pi2nb.q2bn import load_model, q2bn_bytes, read_q2bn, save_model
from pi2nb.quantlinear import coded_state, frozen_copy
from pi2nb.tokenizer import ByteTokenizer
from test_bpe import vocabulary
from test_pretrained import write_gguf, write_llama2c

VOCAB = ['<|end|>', *_BYTES, 'th', 'the', 'Ġthe']


def llama(dtype=torch.float32, **changes):
    torch.manual_seed(3)
    c = dict(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=40, rms_norm_eps=1e-3, bos_token_id=0, tie_word_embeddings=False) | changes
    m = LlamaForCausalLM(LlamaConfig(**c)).eval().requires_grad_(False)
    for p in m.parameters(): p.normal_(0, .3)
    return m.to(dtype)


def folder_of(path, m, **changes):  # a Hugging Face folder with a tokenizer
    m.save_pretrained(path)
    merges = [['t', 'h'], ['th', 'e'], ['Ġ', 'the']]
    d = dict(model=dict(type='BPE', vocab={t: i for i, t in enumerate(VOCAB)}, merges=merges), normalizer=None,
             pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, use_regex=True), added_tokens=[dict(id=0, content='<|end|>')])
    (path/'tokenizer.json').write_text(json.dumps(d | changes))
    return path


def answers(model, time=40): return model(torch.arange(2*time).view(2, time) % 250)[0].detach()


@pytest.mark.parametrize('changes', [dict(), dict(tie_word_embeddings=True), dict(num_key_value_heads=4), dict(num_key_value_heads=1),
                                     dict(rope_theta=1e6), dict(rms_norm_eps=1e-6), dict(num_hidden_layers=1), dict(intermediate_size=50)], ids=str)
def test_the_same_answers(tmp_path, changes):
    m = llama(**changes)
    lm, tok = read_source(folder_of(tmp_path, m))
    assert (answers(lm) - answers(m)).abs().max() < 3e-5*answers(m).abs().max()
    assert lm.n_params() == m.num_parameters() and lm.config.tied == m.config.tie_word_embeddings
    assert (lm.head.weight is lm.embed.weight) == lm.config.tied and tok.encode('the<|end|>').tolist() == [258, 0]


def test_in_pieces_too(tmp_path):
    m = llama()
    lm, ids = read_source(folder_of(tmp_path, m))[0], torch.arange(40)[None]
    state, out = None, []
    for piece in ids.split([1, 7, 31, 1], 1):
        y, state = lm(piece, state)
        out.append(y)
    assert (torch.cat(out, 1) - m(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_files(tmp_path, dtype):
    lm, m = read_source(folder_of(tmp_path, llama(dtype)))[0], llama()
    for p in m.parameters(): p.copy_(p.to(dtype))
    assert all(p.dtype == torch.float32 for p in lm.parameters()) and torch.equal(lm.head.weight, m.lm_head.weight)
    assert (answers(lm) - answers(m)).abs().max() < 1e-4


def test_llama2c(tmp_path):
    m = llama(vocab_size=268, tie_word_embeddings=True, rms_norm_eps=1e-5)
    path = write_llama2c(tmp_path/'m.bin', m)
    with pytest.raises(ValueError, match='name one with --tokenizer'): read_source(path)
    (tmp_path/'tokenizer.bin').write_bytes(vocabulary())
    lm, tok = read_source(path)
    assert (answers(lm) - answers(m)).abs().max() < 1e-4 and (tok.name, tok.bos, tok.prefix) == ('score', 1, b' ')


def tokens_of_gguf(w, kind):
    if kind == 'llama': tokens, types = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', 'a', '▁a'], [2, 3, 3, *[6]*256, 1, 1, 1]
    else: tokens, types = VOCAB, [3] + [1]*(len(VOCAB) - 1)
    w.add_tokenizer_model(kind); w.add_token_list(tokens); w.add_token_types(types); w.add_bos_token_id(1)
    if kind == 'llama': w.add_token_scores([0.]*len(tokens))
    else: w.add_token_merges(['t h', 'th e', 'Ġ the']); w.add_tokenizer_pre('smollm')


@pytest.mark.parametrize('kind', ['llama', 'gpt2'])
def test_gguf(tmp_path, kind, monkeypatch):
    m = llama(vocab_size=262 if kind == 'llama' else 260)
    header = gguf.GGUFWriter.write_header_to_file
    def both(w, *args): tokens_of_gguf(w, kind); return header(w, *args)
    monkeypatch.setattr(gguf.GGUFWriter, 'write_header_to_file', both)
    lm, tok = read_source(write_gguf(tmp_path/'m.gguf', m))
    assert (answers(lm) - answers(m)).abs().max() < 1e-4 and tok.bos == 1
    assert [tok.pieces[i] for i in tok.encode(' a' if kind == 'llama' else 'the 7')] == ([b' a'] if kind == 'llama' else [b'the', b' ', b'7'])


def test_a_gguf_without_a_tokenizer_we_know(tmp_path):
    with pytest.raises(ValueError, match='a tokenizer of kind None'): read_source(write_gguf(tmp_path/'m.gguf', llama()))


@pytest.mark.parametrize('change, says', [
    (dict(model_type='gpt2'), "of kind 'gpt2'"), (dict(model_type='qwen2'), "of kind 'qwen2'"), (dict(attention_bias=True), 'has biases'),
    (dict(mlp_bias=True), 'has biases'), (dict(rope_scaling=dict(rope_type='llama3', factor=8.)), 'scales its rotary'),
    (dict(rope_scaling=dict(type='linear', factor=2.)), 'scales its rotary'), (dict(rope_parameters=dict(rope_type='yarn')), 'scales its rotary'),
    (dict(partial_rotary_factor=.5), 'part of a head'), (dict(hidden_act='gelu'), "bends with 'gelu'"), (dict(head_dim=16), 'do not add up'),
    (dict(quantization_config=dict(bits=4)), 'quantised already'), (dict(hidden_size=None), 'does not say its hidden_size'),
    (dict(num_hidden_layers=0), 'does not say its num_hidden_layers'), (dict(num_attention_heads=5, head_dim=None), 'do not add up')])
def test_what_is_refused(change, says):
    said = llama().config.to_dict()
    assert isinstance(llama_shape(said), LMConfig)
    with pytest.raises(ValueError, match=says): llama_shape(said | change)


def test_a_sliding_window_is_a_window():
    said = llama().config.to_dict() | dict(model_type='mistral')
    assert [llama_shape(said | dict(sliding_window=w)).window for w in (None, 9, 99)] == [40, 9, 40]


def damage(d, name, value):
    if value is None: del d[name]
    else: d[name] = value
    return d


@pytest.mark.parametrize('name, value, says', [
    ('model.layers.1.mlp.up_proj.weight', None, 'lacks the tensor'), ('model.norm.weight', torch.full((32,), torch.inf), 'NaN or infinity'),
    ('model.layers.0.self_attn.q_proj.bias', torch.zeros(32), 'has no place'), ('model.layers.2.mlp.down_proj.weight', torch.zeros(48, 32), 'cannot become'),
    ('model.layers.0.self_attn.v_proj.weight', torch.zeros(15, 32), 'cannot become'), ('model.norm.weight', torch.ones(32, dtype=torch.int8), 'as torch.int8'),
    ('model.layers.3.input_layernorm.weight', torch.ones(32), 'has no place')])
def test_damaged_tensors(tmp_path, name, value, says):
    folder_of(tmp_path, llama())
    d = load_file(tmp_path/'model.safetensors')
    save_file(damage(d, name, value), tmp_path/'model.safetensors')
    with pytest.raises(ValueError, match=says): read_source(tmp_path)


def test_damaged_folders(tmp_path):
    whole = folder_of(tmp_path/'whole', llama())
    def fails(says, change):
        bad = shutil.copytree(whole, tmp_path/'bad', dirs_exist_ok=True)
        change(bad)
        with pytest.raises(ValueError, match=says) as e: read_source(bad)
        assert len(str(e.value).splitlines()) == 1
        shutil.rmtree(bad)
    fails('cut short', lambda d: (d/'model.safetensors').write_bytes((d/'model.safetensors').read_bytes()[:-1]))
    fails('cut short', lambda d: (d/'model.safetensors').write_bytes(b'12345'))
    fails('holds no .safetensors', lambda d: (d/'model.safetensors').unlink())
    fails('no config.json', lambda d: (d/'config.json').unlink())
    fails('is no JSON', lambda d: (d/'config.json').write_text('{'))
    fails('no tokenizer.json', lambda d: (d/'tokenizer.json').unlink())
    fails('no tokenizer of pairs', lambda d: (d/'tokenizer.json').write_text('{"model": {"type": "WordPiece"}}'))
    fails('is missing, cut short', lambda d: (d/'model.safetensors.index.json').write_text('{"weight_map": {"a": "model-00001.safetensors"}}'))
    fails('changes or cuts text', lambda d: folder_of(d, llama(), normalizer=dict(type='NFC')))
    fails('changes or cuts text', lambda d: folder_of(d, llama(), pre_tokenizer=dict(type='Whitespace')))
    fails('is no token of it', lambda d: folder_of(d, llama(), model=dict(vocab={t: i for i, t in enumerate(VOCAB)}, merges=['x qq'])))


def test_a_byte_without_a_token_gets_the_mean_row(tmp_path):
    few = [t for t in VOCAB if t not in ('\u0104', '\u0105')]            # the bytes 4 and 5
    m = llama(vocab_size=len(few))
    folder_of(tmp_path, m, model=dict(vocab={t: i for i, t in enumerate(few)}, merges=[]))
    lm, tok = read_source(tmp_path)
    assert tok.vocab_size == lm.config.vocab == len(few) + 2 and tok.decode(tok.encode(b'\4\5\4')) == b'\4\5\4'
    y = answers(lm)
    assert (y[..., :len(few)] - answers(m)).abs().max() < 1e-4
    assert y.softmax(-1)[..., len(few):].max() < 1/len(few) and torch.equal(lm.embed.weight[-1], m.model.embed_tokens.weight.mean(0))
    save_model(lm, tok, tmp_path/'m.q2bin')
    assert torch.equal(answers(load_model(tmp_path/'m.q2bin')[0]), y)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('code, embed', [('q2', 'int8'), ('int4, group=16', None), ('ternary', 'q2'), ('q2-hadamard', 'int6'), ('pi2-3', 'int8'), ('phase-2', 'int8')])
def test_a_rounded_model_is_its_file(tmp_path, code, embed, tied):
    lm, tok = read_source(folder_of(tmp_path, llama(tie_word_embeddings=tied)))
    want = {n: codebook(code)(m.weight)[0] for n, m in block_matrices(lm).items()}
    lm = quantize_lm(lm, code, embed)
    for n, m in block_matrices(lm).items(): assert torch.equal(m.held_weight(), want[n])
    assert len(want) == 5*3 and lm.config == replace(lm.config, code=code, embed_code=embed)
    save_model(lm, tok, tmp_path/'m.q2bin')
    back, again, _ = load_model(tmp_path/'m.q2bin')
    assert again == tok and back.config == lm.config and torch.equal(answers(back), answers(lm))


def test_groups_and_names_that_do_not_fit(tmp_path):
    lm, _ = read_source(folder_of(tmp_path, llama()))
    before = answers(lm)
    for args, says in ((('q2, group=64',), 'rows of 32 and 48 weights; choose 16 or 0 for whole rows'), (('q9',), "unknown code 'q9'"), (('q2', 'q9'), "unknown code"),
                       (('q2', 'int8', 'wish'), "unknown method 'wish'"), (('q2', 'int8, group=24'), 'do not divide rows of 32 weights')):
        with pytest.raises(ValueError, match=says): quantize_lm(lm, *args)
    assert torch.equal(answers(lm), before), 'a refusal leaves the model as it was'


def test_a_method_is_one_function(tmp_path):
    seen = []
    @register_method('test-negate')
    def negate(lm, code, calibration):
        seen.append(calibration)
        for m in block_matrices(lm).values(): m.weight.neg_()
        return round_weights(lm, code)
    try:
        report = quantize_source(folder_of(tmp_path, llama()), tmp_path/'m.q2bin', 'int8', method='test-negate', calibrate=b'the then '*40, window=16)
        lm, w = load_model(tmp_path/'m.q2bin')[0], llama().model.layers[0].self_attn.q_proj.weight
        assert len(seen[0]) > 5 and all(len(x) == 16 for x in seen[0]) and (lm.blocks[0].mixer.q.weight + w).abs().max() < .02
        assert report.before is None and 'perplexity' not in str(report)
    finally: METHODS.pop('test-negate')


def test_what_is_reported_is_what_the_file_scores(tmp_path):
    path = folder_of(tmp_path, llama())
    r = quantize_source(path, tmp_path/'m.q2bin', 'q2', text=b'the one the other '*30, windows=3, window=24)
    lm, tok, meta = load_model(tmp_path/'m.q2bin')
    windows = list(torch.from_numpy(tok.encode(b'the one the other '*30).astype('int64'))[:72].view(3, 24))
    assert next_token_nats(lm, windows).mean().item() == r.after == meta['quantized']['nats_after']
    assert next_token_nats(read_source(path)[0], windows).mean().item() == r.before != r.after
    assert (r.tokens, r.size) == (69, (tmp_path/'m.q2bin').stat().st_size) and r.bytes_scored == sum(tok.n_bytes(w[1:]) for w in windows)
    assert sum(n for _, _, n, _ in r.held) == r.params


def test_files_written_before_llamas_came(tmp_path):
    torch.manual_seed(0)
    lm = LM(recipe('q2').config(dim=32, layout='GQA, CfC'))
    save_model(lm, ByteTokenizer(), tmp_path/'new.q2bin')
    state, meta = read_q2bn(tmp_path/'new.q2bin')
    for k in ('gains', 'eps', 'qk_norm', 'rope_base'): del meta['config'][k]
    meta.pop('codes')
    (tmp_path/'old.q2bin').write_bytes(q2bn_bytes(state, meta))
    old, new = (load_model(tmp_path/f'{k}.q2bin')[0] for k in ('old', 'new'))
    assert old.config == new.config == lm.config and torch.equal(answers(old), answers(new))
    assert coded_state(lm).keys() == state.keys() and not any('norm' in k for k in state)


@pytest.mark.parametrize('tied', [True, False])
def test_what_leaves_comes_back(tmp_path, tied):
    torch.manual_seed(0)
    lm = LM(recipe('llama').config(dim=256, layout='GQA*2', mlp_ratio=1., tied=tied))
    for p in lm.parameters(): p.data.add_(torch.randn_like(p)*.1)
    lm = frozen_copy(lm)
    to_huggingface(lm, ByteTokenizer(), tmp_path)
    to_gguf(lm, ByteTokenizer(), tmp_path/'m.gguf')
    for path in (tmp_path, tmp_path/'m.gguf'):
        back, tok = read_source(path)
        assert torch.equal(answers(back), answers(lm)) and tok.decode(tok.encode(b'\0 to be \xff')) == b'\0 to be \xff'
        assert tok.bos == ByteTokenizer.bos and tok.encode('to be 12').tolist() == list(b'to be 12')
