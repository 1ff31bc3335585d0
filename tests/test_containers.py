"Containers: what says it is exact is exact, for every code and shape; and the record holds what the order asks for"
import json
from pathlib import Path
import numpy as np, pytest, torch
from pi2nb.codebook import codebook, hold
from pi2nb.containers import CONTAINERS, count_weights, floor_bits, main_matrices, measure_containers, measure_contexts, measure_speed

REC = json.loads((Path(__file__).parent.parent/'nbs'/'runs'/'72h_containers.json').read_text())


@pytest.mark.parametrize('code', ['binary', 'ternary-absmean', 'q2', 'quinary', 'int4', 'int6', 'int8'])
def test_every_container_of_ours_reads_back_exactly(code):
    g = torch.Generator().manual_seed(0)
    coded = {n: hold(torch.randn(*s, generator=g), codebook(code)) for n,s in dict(a=(3, 7), b=(1, 1), c=(65, 130)).items()}
    rows = measure_containers(coded)
    for name, r in rows.items():
        if name.startswith('GGUF'): assert r == dict(bits=None, share=0, error=None)       # no row is a multiple of 256
        else: assert r['error'] == 0 and r['share'] == 1, name
    assert floor_bits(coded)['symbols'] <= np.log2(len(codebook(code).levels)) + 1e-9


def test_gguf_takes_the_rows_that_fit():
    g = torch.Generator().manual_seed(0)
    coded = {n: hold(torch.randn(4, c, generator=g), codebook('q2')) for n,c in dict(a=256, b=512, c=100).items()}
    rows = measure_containers(coded)
    assert rows['GGUF Q2_K'] == dict(bits=2.625, share=768/868, error=0) and rows['GGUF TQ2_0']['error'] > .1


def test_the_main_code_is_the_one_with_most_weights():
    state = dict(a=hold(torch.randn(4, 4), codebook('q2')), b=hold(torch.randn(9, 9), codebook('int8')), c=torch.ones(1000), d='a')
    assert list(main_matrices(state)) == ['b'] and count_weights(main_matrices(state)) == 81
    with pytest.raises(ValueError, match='no matrix'): main_matrices(dict(c=torch.ones(3)))


def test_contexts_find_what_is_there():
    g = torch.Generator().manual_seed(0)
    w, weak = torch.randn(200, 200, generator=g), torch.linspace(.2, 2, 200)
    bits = {k: measure_contexts({'w': hold(x, codebook('q2'))}) for k,x in dict(even=w, columns=w*weak).items()}
    assert min(bits['even'], key=bits['even'].get) == 'nothing'
    assert min(bits['columns'], key=bits['columns'].get) == 'column' and bits['columns']['column'] < bits['columns']['nothing'] - .05


def test_jobs_take_turns():
    seen = []
    took = measure_speed({k: lambda k=k: seen.append(k) for k in 'ab'}, 3)
    assert seen == list('abababab') and took.keys() == {'a', 'b'} and min(took.values()) >= 0     # the first round is not counted


def test_the_record():
    m = REC['models']['q2']
    assert m['code'] == 'q2' and m['weights'] > 10**6 and len(m['sha256']) == 64
    assert m['containers']['Q2BN file']['bits'] <= 1.93 and m['containers']['Q2BN file']['error'] == 0
    assert set(m['containers']) == set(CONTAINERS)
    for r in REC['models'].values():
        assert r['floor']['both'] < r['containers']['rANS, one table']['bits'] < r['floor']['both'] + .02
        assert all(v['error'] == 0 for k,v in r['containers'].items() if not k.startswith('GGUF'))
    rate = {k: REC['symbols']/v for k,v in REC['seconds'].items()}
    assert rate['rANS, decode to symbols'] > 5e8 and rate['no coding: ungroup'] > 2e9
    assert rate['rANS, encode from symbols'] > rate['rANS, decode to symbols']/4
