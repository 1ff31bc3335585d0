"Chapter 10: every code on every shape and type, rotations, names of variants, and what is refused"
import json
from dataclasses import replace
from math import log10

import pytest, torch
from hypothesis import given, settings, strategies as st

from pi2nb.codebook import CODES, Codebook, codebook, hadamard, hold, mix_pairs
from pi2nb.distortion import gaussian_distortion

codes = pytest.mark.parametrize('code', CODES.values(), ids=list(CODES))
shapes = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@codes
@given(shape=shapes, seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1., 300.]))
@settings(max_examples=25, deadline=None)
def test_decode_encode_is_idempotent_and_exact(code, shape, seed, spread):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))*spread
    h = hold(w, code)
    d = h.decode()
    again = hold(d, code, h.s)
    assert d.shape == w.shape and d.dtype == torch.float32 and d.isfinite().all()
    assert torch.equal(again.z, h.z) and torch.equal(again.decode(), d)
    if w.ndim == 2: assert torch.equal(code(w)[0], d) and torch.equal(code(w)[1], h.s)
    assert torch.equal(d.bfloat16().float(), d)


@codes
@pytest.mark.parametrize('change', [dict(rotation='hadamard'), dict(rotation='pairs'), dict(rotation=''), dict(held='bfloat16'),
                                    dict(held='float32'), dict(digits=11), dict(digits=4), dict(group=-1), dict(rule='mse')], ids=str)
def test_a_variant_is_idempotent_or_refused(code, change):
    try: c = codebook(code.name, **change)
    except ValueError as e: assert 'close to a cut' in str(e); return
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    h = hold(w, c)
    assert torch.equal(hold(h.decode(), c, h.s).z, h.z)


@codes
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type(code, dtype):
    w = torch.randn(5, 12).to(dtype)
    assert torch.equal(hold(w, code).decode(), hold(w.float(), code).decode())


@codes
@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_not_a_number_is_refused(code, bad):
    w = torch.randn(3, 4)
    w[1, 2] = bad
    with pytest.raises(ValueError, match='NaN or infinity') as e: hold(w, code)
    assert '\n' not in str(e.value)


def test_other_refusals():
    with pytest.raises(ValueError, match='65504'): hold(torch.full((1, 4), 1e30), codebook('q2'))
    with pytest.raises(ValueError, match='single number'): hold(torch.tensor(1.), codebook('q2'))
    with pytest.raises(ValueError, match='needs float16'): hold(torch.ones(2, 4), codebook('q2'), torch.ones(1, 1).half())
    with pytest.raises(ValueError, match='needs float16'): hold(torch.ones(2, 4), codebook('q2'), torch.ones(2, 1))
    for block in (0, 3, 8):
        with pytest.raises(ValueError, match='power of two'): hadamard(torch.ones(2, 12), block)
    for group in (2.5, None):
        with pytest.raises(ValueError, match='cannot be read'): codebook('q2', group=group)
    with pytest.raises(ValueError, match='close to a cut'): codebook('q2-unpack, rotation=hadamard')
    with pytest.raises(ValueError, match='do not divide'): hold(torch.ones(2, 10), codebook('q2', group=4))
    for kw in (dict(levels=(1., 0.)), dict(cuts=(5.,)), dict(rule='best'), dict(factor=0.), dict(group=-2), dict(digits=12), dict(rotation='spin'), dict(held='int8')):
        with pytest.raises(ValueError, match='damaged'): Codebook(**dict(name='x', levels=(0., 1.), cuts=(.5,), rule='rms') | kw)


@pytest.mark.parametrize('name', ['q9', '', 'q2,group=4', 'q2, group', 'q2, group=x', 'q2, colour=red', 'q2, name=x'])
def test_a_name_that_cannot_be_read(name):
    with pytest.raises(ValueError) as e: codebook(name)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['q2, group=64', 'pi2-4, group=-1, rule=mse', 'q2-hadamard, digits=6'])
def test_a_variant_is_found_by_its_name(name): assert codebook(name).name == name and codebook(codebook(name).name) == codebook(name)


@codes
def test_a_code_survives_json(code):
    assert Codebook.from_dict(json.loads(json.dumps(code.to_dict()))) == code


def test_codes_written_by_the_first_version_can_be_read():
    old = dict(name='q2', levels=[-1.5, -.5, .5, 1.5], cuts=[-1., 0., 1.], rule='rms', factor=.996, group=0, digits=6, doc='four even levels, least error on a bell curve')
    assert Codebook.from_dict(old) == codebook('q2') and codebook('q2').to_dict() == old


@given(rows=st.integers(0, 7), blocks=st.integers(0, 3), block=st.sampled_from([1, 2, 8, 64]), odd=st.integers(0, 1))
@settings(max_examples=30, deadline=None)
def test_rotations_keep_lengths_and_undo_themselves(rows, blocks, block, odd):
    x = torch.randn(rows, blocks*block, dtype=torch.float64)
    p = torch.randn(rows, 2*blocks + odd, dtype=torch.float64)
    for f, v in ((lambda t: hadamard(t, block), x), (mix_pairs, p)):
        assert torch.allclose(f(v).norm(), v.norm()) and torch.allclose(f(f(v)), v)


@codes
def test_groups_and_a_single_scale(code):
    w = torch.randn(6, 64)*torch.logspace(-1, 1, 6)[:, None]
    for g, shape in ((0, (6, 1)), (32, (6, 2)), (-1, (1, 1))):
        c = replace(code, name='g', group=g)
        h = hold(w, c)
        assert h.s.shape == shape == c.scale_shape(6, 64) and torch.equal(hold(h.decode(), c, h.s).z, h.z)


@pytest.mark.parametrize('name', ['q2', 'pi2-4', 'ternary', 'binary', 'q2-hadamard', 'phase-2'])
def test_searched_scales_lose_no_more_than_measured_ones(name):
    w = torch.distributions.StudentT(3.).sample((8, 512))
    err = lambda c: (c(w)[0]-w).square().mean().item()
    assert err(codebook(name, rule='mse')) <= err(codebook(name, rule='rms'))*1.001


def test_phase_codes_meet_the_best_four_levels():
    assert -10*log10(gaussian_distortion(codebook('phase-2'))[0]) >= 9.28
    assert gaussian_distortion(codebook('phase-2'))[0] == gaussian_distortion(replace(codebook('q2-lloyd'), held='float32'))[0]
    with pytest.raises(ValueError, match='give the scale'): gaussian_distortion(codebook('int8'))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@codes
def test_the_same_bits_on_a_gpu(code):
    w = torch.randn(33, 64)
    h, g = hold(w, code), hold(w.cuda(), code)
    assert torch.equal(code.decode(h.z.cuda(), h.s.cuda()).cpu(), h.decode()) and torch.equal(g.decode().cpu(), code.decode(g.z.cpu(), g.s.cpu()))
