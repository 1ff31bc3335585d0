"Scan: every form computes the same recurrence and the same gradient, on every path, with and without a compiler"
import copy, os, subprocess, sys
import pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb import scan
from strategies import pieces, steps
from pi2nb.files import _processor, compile_c
from pi2nb.scan import scan_step, scan_loop, scan_chunked, linear_scan

quick = settings(max_examples=25, deadline=None)
PATHS = ['loop', 'compiled', 'chunked']
every_path = pytest.mark.parametrize('path', PATHS)
needs_compiler = pytest.mark.skipif(compile_c(scan._SCAN_C) is None, reason='no C compiler')


def close(x, y, tol=1e-5): return torch.allclose(x, y, atol=tol, rtol=tol)


@quick
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 80))
def test_forms_agree(seed, B, T, C, chunk):
    a, b, h0 = steps(seed, B, T, C)
    h, states = h0, []
    for t in range(T): h = scan_step(a[:, t], b[:, t], h); states.append(h)
    slow = torch.stack(states, 1)
    assert torch.equal(scan_loop(a, b, h0), slow) and torch.equal(linear_scan(a, b, h0, path='loop'), slow)
    for other in (linear_scan(a, b, h0), linear_scan(a, b, h0, path='compiled'), linear_scan(a, b, h0, path='chunked'),
                  scan_chunked(a, b, h0, chunk), scan_chunked(a.log(), b, h0, chunk, log=True)): assert close(other, slow)
    assert torch.equal(linear_scan(a, b), linear_scan(a, b, torch.zeros_like(h0)))


@quick
@given(st.integers(0, 10**6), pieces(23), st.sampled_from(['loop', 'compiled']))
def test_pieces_are_exact(seed, sizes, path):
    a, b, h = steps(seed)
    whole, out = linear_scan(a, b, h, path=path), []
    for x, y in zip(a.split(sizes, 1), b.split(sizes, 1)):
        out.append(linear_scan(x, y, h, path=path))
        if y.shape[1]: h = out[-1][:, -1]
    assert torch.equal(torch.cat(out, 1), whole)


@quick
@given(st.integers(0, 10**6), pieces(9), st.integers(1, 8), st.integers(0, 7), st.booleans())
def test_chunks_carry_exactly(seed, sizes, chunk, rest, log):
    "Cut where chunks end, the pieces are the whole, bit for bit; the last piece holds what fills no chunk"
    a, b, h = steps(seed, T=9*chunk + rest % chunk)
    if log: a = a.log()
    whole, out, sizes = scan_chunked(a, b, h, chunk, log), [], [*(n*chunk for n in sizes), rest % chunk]
    for x, y in zip(a.split(sizes, 1), b.split(sizes, 1)):
        out.append(scan_chunked(x, y, h, chunk, log))
        if y.shape[1]: h = out[-1][:, -1]
    assert torch.equal(torch.cat(out, 1), whole)


@every_path
@pytest.mark.parametrize('T', [0, 1, 2, 7])
def test_gradient(T, path):
    args = [t.requires_grad_() for t in steps(1, T=T, dtype=torch.float64)]
    f = lambda *t: linear_scan(*t, path=path)
    assert f(*args).shape == (2, T, 3)
    if T: assert torch.autograd.gradcheck(f, args)
    else: assert torch.autograd.grad(f(*args).sum(), args[2])[0].abs().sum() == 0


@pytest.mark.parametrize('T', [1, 2, 7])
def test_gradient_of_logarithms(T):
    a, b, h0 = steps(1, T=T, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: scan_chunked(*t, log=True), [t.requires_grad_() for t in (a.log(), b, h0)])


@every_path
def test_gradient_agrees_with_autograd(path):
    args = [t.requires_grad_() for t in steps(2, T=100, C=21)]
    weight = torch.randn(2, 100, 21)
    grads = lambda f, **k: torch.autograd.grad((f(*args, **k)*weight).sum(), args)
    for other in (grads(scan_loop), grads(scan_chunked)):
        for x, y in zip(grads(linear_scan, path=path), other): assert close(x, y, 1e-4)


@every_path
def test_gradient_once(path):
    a, b, h0 = (t.requires_grad_() for t in steps(2))
    g, = torch.autograd.grad(linear_scan(a, b, h0, path=path).square().sum(), b, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): g.sum().backward()


@every_path
def test_decays_at_the_ends(path):
    a, b, h0 = (t.requires_grad_() for t in (torch.tensor([0., 1., -1., 1e-30, 1., 0.])[None, :, None], torch.ones(1, 6, 1), torch.ones(1, 1)))
    h = linear_scan(a, b, h0, path=path)
    assert h.flatten().tolist() == [1, 2, -1, 1, 2, 1]
    for x, y in zip(torch.autograd.grad(h.sum(), (a, b, h0)), torch.autograd.grad(scan_loop(a, b, h0).sum(), (a, b, h0))): assert torch.equal(x, y)


def test_long_vanishing_products():
    a, b, h0 = torch.full((1, 5000, 2), .3), torch.randn(1, 5000, 2), torch.randn(1, 2)
    for log in (False, True):
        for chunk in (None, 1000): assert close(scan_chunked(a.log() if log else a, b, h0, chunk, log), scan_loop(a, b, h0))
    log_a = torch.full((1, 100, 2), -torch.inf).requires_grad_()
    h = scan_chunked(log_a, b[:, :100], h0, log=True)
    assert torch.equal(h, b[:, :100]) and torch.autograd.grad(h.sum(), log_a)[0].isfinite().all()


@every_path
def test_any_layout_in_memory(path):
    a, b, h0 = steps(3, C=18)
    turned = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)
    inner = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    for layout in (turned, inner): assert torch.equal(linear_scan(layout(a), layout(b), inner(h0), path=path), linear_scan(a, b, h0, path=path))
    same, wide = a[:, :1, :1], a[:, :1, :1].expand(a.shape)
    assert torch.equal(linear_scan(wide, b, h0, path=path), linear_scan(same.repeat(1, 23, 18), b, h0, path=path))
    b.requires_grad_()
    linear_scan(a, b, h0, path=path).sum().backward()   # the gradient that arrives is an expanded scalar
    assert close(b.grad, torch.autograd.grad(scan_loop(a, b, h0).sum(), b)[0])


def test_wide_in_mixed_precision():
    a, b, h0 = (t.bfloat16() for t in steps(4))
    exact = scan_loop(a.float(), b.float(), h0.float())
    with torch.autocast('cpu', torch.bfloat16):
        for f in (scan_loop, scan_chunked, *(lambda *t, p=p: linear_scan(*t, path=p) for p in PATHS)):
            assert f(a, b, h0).dtype == torch.float32 and close(f(a, b, h0), exact)
        x = a.clone().requires_grad_()
        linear_scan(x, b, h0).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert linear_scan(a, b.double(), h0).dtype == torch.float64


@pytest.mark.parametrize('f', [scan_loop, scan_chunked, linear_scan])
def test_refuses(f):
    a, b, h0 = steps(5)
    for bad in ((a[0], b[0]), (a[..., :1], b), (a[:, :1], b)):
        with pytest.raises(ValueError, match='must both be'): f(*bad)
    for h in (h0[:1], h0[:, :1], h0[:, None]):
        with pytest.raises(ValueError, match='h0 must be'): f(a, b, h)
    with pytest.raises(ValueError, match='must be real'): f(a+0j, b, h0)
    with pytest.raises(ValueError, match='one device'): f(a, b, h0.to('meta'))


def test_refuses_options(monkeypatch):
    a, b, h0 = steps(5)
    with pytest.raises(ValueError, match='path must be one of'): linear_scan(a, b, path='fast')
    with pytest.raises(ValueError, match='at least 1 step'): scan_chunked(a, b, chunk=0)
    monkeypatch.setattr(scan, 'triton', None)
    with pytest.raises(ValueError, match='needs triton'): linear_scan(a, b, path='triton')


@pytest.mark.parametrize('shape', [(0, 5, 3), (2, 5, 0), (2, 0, 3)])
@every_path
def test_empty(shape, path):
    a, b = torch.rand(shape, requires_grad=True), torch.rand(shape, requires_grad=True)
    h = linear_scan(a, b, path=path)
    assert h.shape == shape
    assert torch.autograd.grad(h.sum(), b)[0].shape == shape


def test_other_devices():
    assert linear_scan(*(t.to('meta') for t in steps(6))).shape == (2, 23, 3)   # chunks, nothing of the CPU's


# the compiled path

@needs_compiler
@pytest.mark.parametrize('B, T, C', [(1, 9, 5), (3, 50, 2111), (8, 40, 130), (5, 700, 33)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_bits_do_not_depend_on_threads(B, T, C, dtype):
    a, b, h0 = (t.requires_grad_() for t in steps(7, B, T, C, dtype))
    g, before, results = torch.randn(B, T, C, dtype=dtype), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            h = linear_scan(a, b, h0, path='compiled')
            results.append([h, *torch.autograd.grad(h, (a, b, h0), g)])
    finally: torch.set_num_threads(before)
    for r in results[1:]: assert all(map(torch.equal, r, results[0]))
    h = linear_scan(a, b, h0, path='loop')
    loop = [h, *torch.autograd.grad(h, (a, b, h0), g)]
    assert all(close(x, y) for x, y in zip(loop, results[0]))
    if 'model name' in ''.join(_processor()) and ' fma ' in ' '.join(_processor()): # an x86 with fused multiply-add, as torch uses it
        assert all(map(torch.equal, loop, results[0]))


def other_process(code, **env):
    r = subprocess.run([sys.executable, '-c', code], env=os.environ | env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return r


def test_without_a_compiler_the_loop_is_taken_and_the_user_told_once():
    code = ("import torch; from pi2nb.scan import linear_scan, scan_loop\n"
            "a, b = torch.rand(2, 5, 3), torch.rand(2, 5, 3)\n"
            "for _ in range(3): assert torch.equal(linear_scan(a, b), scan_loop(a, b))")
    assert other_process(code, PATH='').stderr.count('UserWarning') == 1


# the Triton path

@pytest.mark.skipif(scan.triton is None, reason='no triton')
def test_triton_in_its_interpreter():
    other_process('''
import torch
from pi2nb.scan import linear_scan
for dtype in (torch.float32, torch.float64):
    for B, T, C in ((2, 5, 40), (1, 1, 3), (2, 0, 3), (1, 9, 32), (3, 2, 1), (0, 2, 2)):
        a, b, g, h0 = *torch.randn(3, B, T, C, dtype=dtype), torch.randn(B, C, dtype=dtype)
        x, out = [t.requires_grad_() for t in (a, b, h0)], []
        for path in ('triton', 'loop'):
            h = linear_scan(*x, path=path)
            out.append([h, *torch.autograd.grad(h, x, g)])
        for p, q in zip(*out): assert p.dtype == dtype and torch.allclose(p, q, atol=1e-5), (dtype, B, T, C)
''', TRITON_INTERPRET='1')


def test_under_torch_compile():
    a, b, h0 = (t.requires_grad_() for t in steps(8, T=9))
    f = torch.compile(linear_scan, backend='eager', fullgraph=True)
    for x, y in zip(torch.autograd.grad(f(a, b, h0).sum(), (a, b, h0)), torch.autograd.grad(scan_loop(a, b, h0).sum(), (a, b, h0))): assert close(x, y)
    torch.compiler.reset()
