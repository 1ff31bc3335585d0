"Leaving: every block type against the library that decodes it, every shape of Llama against the library that runs it"

import os, shutil, subprocess, sys
from dataclasses import replace

import gguf, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, LlamaForCausalLM

from pi2nb.codebook import CODES, Coded, codebook, hold
from pi2nb.bpe import SPLITS, ByteBPETokenizer, ScoreTokenizer
from pi2nb.export import GGUF_TYPES, gguf_blocks, llama_tensors, run_llama_cpp, to_gguf, to_huggingface
from pi2nb.llama import read_source
from pi2nb.model import LM, LMConfig, recipe
from pi2nb.pretrained import load_gguf
from pi2nb.tokenizer import BPETokenizer, ByteTokenizer, UnigramTokenizer

TEXT = 'To be, or not to be, that is the question:\nWhether ’tis nobler in the mind to suffer\n'*20


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(layout='GQA*2', dim=64, heads=4, kv_heads=2, mlp_ratio=1.5, window=32, rope_base=3e4, eps=1e-4) | changes
    lm = LM(recipe('llama').config(**shape)).eval().requires_grad_(False)
    for n, p in lm.named_parameters(): p.add_(torch.randn_like(p)*(.3 if 'norm' in n else .1))
    return lm


def decoded(b, kind): return gguf.dequantize(b, kind)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(list(CODES)), cols=st.sampled_from([16, 24, 32, 64, 96, 256, 512]), rows=st.integers(1, 5),
       group=st.sampled_from([-1, 0, 8, 16, 32, 64, 256]), digits=st.sampled_from([1, 3, 4, 6, 8, 11]),
       exponent=st.integers(-16, 12), seed=st.integers(0, 2**31))
def test_every_code_decodes_to_its_own_numbers(name, cols, rows, group, digits, exponent, seed):
    if group > 0 and cols % group: group = 0
    code = CODES[name]
    if code.digits != digits and code.cuts[-1] != 1-2**-20: code = replace(code, digits=digits)
    code = replace(code, group=group)
    t = hold(torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))*2.**exponent, code)
    b, kind = gguf_blocks(t)
    assert np.array_equal(decoded(b, kind), t.decode())
    smaller = GGUF_TYPES[:GGUF_TYPES.index(kind.name)]
    if smaller:
        with pytest.raises(ValueError, match='allow F32'): gguf_blocks(t, smaller)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from([('TQ1_0', -1, 1, 256), ('TQ2_0', -1, 1, 256), ('Q2_K', 0, 3, 256), ('Q4_0', -8, 7, 32),
                             ('Q6_K', -32, 31, 256), ('Q8_0', -127, 127, 32)]), seed=st.integers(0, 2**31))
def test_every_type_holds_its_whole_range_and_no_more(kind, seed):
    name, low, high, many = kind
    g, n = torch.Generator().manual_seed(seed), high - low + 1
    levels = tuple(float(x) for x in range(low, high + 1))
    code = codebook('q2', digits=3)
    code = replace(code, name='range', levels=levels, cuts=tuple(a + .5 for a in levels[:-1]))
    z = torch.randint(0, n, (3, 2*many), generator=g, dtype=torch.uint8)
    z[0, :2] = torch.tensor([0, n-1])
    t = Coded(code, z, torch.rand(3, 1, generator=g).add(.5).half(), (3, 2*many))
    b, k = gguf_blocks(t, (name,))
    assert k.name == name and np.array_equal(decoded(b, k), t.decode())
    if name == 'Q8_0': return                                          # a code has no more levels than that
    wide = replace(code, levels=(*levels, high + 1.), cuts=(*code.cuts, high + .5))
    t.z[1, 5] = n
    with pytest.raises(ValueError): gguf_blocks(Coded(wide, t.z, t.s, t.shape), (name,))


def test_scales_of_three_digits_share_a_step_and_six_digits_do_not():
    s = torch.tensor([[1., 1.25, 1.5, 1.75]]).half()
    z = torch.arange(256)[None].remainder(4).to(torch.uint8)
    code = codebook('q2', group=64)
    assert gguf_blocks(Coded(code, z, s, (1, 256)))[1].name == 'Q2_K'
    assert gguf_blocks(Coded(code, z, s*4, (1, 256)))[1].name == 'Q2_K'
    b, kind = gguf_blocks(Coded(code, z, s + torch.tensor([0, 0, 0, 2**-5]).half(), (1, 256)))
    assert kind.name == 'Q4_0' and b.nbytes == 144


@pytest.mark.parametrize('changes', [
    dict(), dict(tied=True), dict(kv_heads=4), dict(kv_heads=1, heads=2), dict(dim=256, mlp_ratio=2.), dict(code='ternary', dim=256, mlp_ratio=1.),
    dict(code=None, embed_code=None, gate_code=None), dict(code='q2-hadamard'), dict(code='phase-2'), dict(code='q2, group=-1'),
    dict(code='q2, group=16, digits=3'), dict(code='pi2-8', embed_code='pi2-8'), dict(eps=None), dict(dim=48, heads=2, mlp_ratio=1.1)])
def test_a_llama_leaves_unchanged(changes, tmp_path):
    lm = llama(**changes)
    ids = torch.randint(0, 256, (2, 32))
    want, _ = lm(ids)
    report = to_gguf(lm, ByteTokenizer(), tmp_path/'m.gguf')
    assert max(r[-1] for r in report.rows) == 0 and report.size == (tmp_path/'m.gguf').stat().st_size
    assert sum(r[4] for r in report.rows) == lm.n_params()
    to_huggingface(lm, ByteTokenizer(), tmp_path/'hf')
    for model in (load_gguf(tmp_path/'m.gguf'), LlamaForCausalLM.from_pretrained(tmp_path/'hf').eval()):
        assert want.std() > .1 and (model(ids).logits - want).abs().max() < 2e-5*want.abs().max()
    mine = llama_tensors(lm)
    for k, p in model.named_parameters():
        if k in mine: assert np.array_equal(p.detach(), mine[k].decode() if isinstance(mine[k], Coded) else mine[k])


@pytest.mark.parametrize('changes,reason', [
    (dict(layout='GQA, CfC'), 'layers of attention only'), (dict(mlp='relu2'), 'gated MLP'), (dict(gains=False), 'norms with gains'),
    (dict(qk_norm=True), 'no norm of queries')])
def test_what_is_no_llama_is_named(changes, reason, tmp_path):
    lm = llama(**changes)
    for leave in (to_gguf, to_huggingface):
        with pytest.raises(ValueError, match=f'{reason}.*--recipe llama'): leave(lm, ByteTokenizer(), tmp_path/'x')
    assert not list(tmp_path.iterdir())


def test_a_number_that_came_back_changed_stops_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr('pi2nb.export._half', lambda x: (np.asarray(x, '<f2')*np.float16(2)).view(np.uint8))
    b, kind = gguf_blocks(hold(torch.randn(2, 64), codebook('q2')))
    assert kind.name == 'F16'                                          # wrong blocks are not taken
    monkeypatch.setattr('pi2nb.export.gguf_blocks', lambda t, types: (np.zeros((t.shape), np.float32), gguf.GGMLQuantizationType.F32))
    (tmp_path/'m.gguf').write_bytes(b'old')
    with pytest.raises(ValueError, match='came back changed'): to_gguf(llama(), ByteTokenizer(), tmp_path/'m.gguf')
    assert (tmp_path/'m.gguf').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def field(path, key):
    f = gguf.GGUFReader(path).get_field(f'tokenizer.ggml.{key}')
    return f.contents()


def test_bytes_keep_their_numbers(tmp_path):
    to_gguf(llama(vocab=260), ByteTokenizer(), tmp_path/'m.gguf')
    tokens = field(tmp_path/'m.gguf', 'tokens')
    assert len(set(tokens)) == 260 and field(tmp_path/'m.gguf', 'token_type') == [1]*256 + [5]*4
    assert field(tmp_path/'m.gguf', 'bos_token_id') == 10 and tokens[ord('A')] == 'A' and tokens[32] == 'Ġ'
    to_huggingface(llama(), ByteTokenizer(), tmp_path/'hf')
    tok = AutoTokenizer.from_pretrained(tmp_path/'hf')
    s = 'Ġ ’tis\t\n  😀\0 x'
    assert tok.encode(s) == list(s.encode()) and tok.decode(list(s.encode())) == s


def test_byte_pairs_keep_their_pieces(tmp_path):
    tok = BPETokenizer.train(TEXT, 300)
    lm = llama(vocab=tok.vocab_size)
    to_gguf(lm, tok, tmp_path/'m.gguf')
    tokens, kind = field(tmp_path/'m.gguf', 'tokens'), field(tmp_path/'m.gguf', 'token_type')
    for i, (p, k) in enumerate(zip(tokens, kind)):
        assert (bytes([int(p[3:5], 16)]) if k == 6 else b'' if k in (2, 3) else p.replace('▁', ' ').encode()) == tok.decode([i])
    with pytest.raises(ValueError, match="cuts a text as 'unigram' does"): to_gguf(lm, UnigramTokenizer.train(TEXT, 290), tmp_path/'u.gguf')


PAIRS = [chr(b) for b in range(256)] + ['th', 'the', ' the', '  ', 'he', '\xc3\xa9', '12', '<|end|>', '']
MERGES = [ord('t'), ord('h'), 256, ord('e'), ord(' '), 257, 32, 32, ord('h'), ord('e'), 0xc3, 0xa9, ord('1'), ord('2')]
SCORED = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), ' t', 'he', ' the', ' the ', 'é', *' thex12', '']
TOKENIZERS = {'bytes': lambda: ByteTokenizer(), 'bpe': lambda: BPETokenizer.train(TEXT, 300),
              **{s: lambda s=s: ByteBPETokenizer(PAIRS, MERGES, [263], s, 263, s == 'llama-3') for s in SPLITS},
              **{f'score{p}': lambda p=p: ScoreTokenizer(SCORED, [-float(i) for i in range(len(SCORED))], p) for p in ('', ' ')}}


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_a_text_is_cut_alike_by_the_libraries_that_read_our_vocabulary(kind, tmp_path):
    tok = TOKENIZERS[kind]()
    lm = llama(vocab=tok.vocab_size + 3)
    to_huggingface(lm, tok, tmp_path/'hf')
    if kind != 'none': to_gguf(lm, tok, tmp_path/'m.gguf')
    else:
        with pytest.raises(ValueError, match='no name for the way'): to_gguf(lm, tok, tmp_path/'m.gguf')
    theirs, prefix = AutoTokenizer.from_pretrained(tmp_path/'hf'), getattr(tok, 'prefix', b'').decode()
    home, back = read_source(tmp_path/'m.gguf') if kind not in ('bpe', 'none') else (None, None)  # 64a wants the bytes of a scored vocabulary in Llama's places

    @settings(max_examples=60, deadline=None)
    @given(st.text(st.sampled_from(' \n\tthexé你12’.!')) | st.text(st.characters(exclude_categories=['Cs'], exclude_characters='▁')))
    def same(s):
        want = tok.encode(prefix + s).tolist() if s else []
        assert theirs.encode(s, add_special_tokens=False) == want
        if back: assert back.encode(s).tolist() == tok.encode(s).tolist()
    same()
    if home: assert torch.equal(home(torch.arange(20)[None])[0][..., :tok.vocab_size], lm(torch.arange(20)[None])[0][..., :tok.vocab_size])


PEER = os.environ.get('LLAMA_CPP_PYTHON', sys.executable)
there = shutil.which(PEER) and not subprocess.run([PEER, '-c', 'import llama_cpp'], capture_output=True).returncode


@pytest.mark.skipif(not there, reason='llama-cpp-python is not here; see run_llama_cpp')
@pytest.mark.parametrize('kind', TOKENIZERS)
def test_llama_cpp_itself_agrees(kind, tmp_path):
    tok = TOKENIZERS[kind]()
    lm = llama(vocab=tok.vocab_size, window=256)
    windows = [[tok.bos, *range(3, 63)]]*2
    want = lm(torch.tensor(windows))[0].numpy()
    text = '  the é 12\n\n“Whether ’tis nobler” 你好 thethe x'
    for types, most in ((('F32',), 1e-5), (GGUF_TYPES, .1)):
        to_gguf(lm, tok, tmp_path/'m.gguf', types)
        r = run_llama_cpp(tmp_path/'m.gguf', windows, text, 3)
        assert np.abs(r['logits'] - want).max() < most*np.abs(want).max() and len(r['new']) == 3
        assert r['prompt'] == [tok.bos, *tok.encode(getattr(tok, 'prefix', b'').decode() + text)]


def test_llama_cpp_that_is_not_there_is_one_sentence():
    with pytest.raises(ImportError, match='no such program; pip install llama-cpp-python'): run_llama_cpp('m.gguf', [], python='no-such-python')
    with pytest.raises(ImportError, match='did not run'): run_llama_cpp('m.gguf', [], python='false')
