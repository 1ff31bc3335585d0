"One registry for everything that is found by name"
import pytest
from pi2nb.codebook import CODES
from pi2nb.model import MIXERS, RECIPES, Recipe, register_recipe
from pi2nb.optim import OPTIMIZERS
from pi2nb.packed import KERNELS
from pi2nb.registry import Registry
from pi2nb.sampler import SAMPLERS


@pytest.mark.parametrize('registry', [CODES, MIXERS, RECIPES, OPTIMIZERS, KERNELS, SAMPLERS], ids=lambda r: r.kind)
def test_unknown_names_are_answered_with_known_ones(registry):
    assert isinstance(registry, Registry) and registry
    with pytest.raises(ValueError, match=f'unknown {registry.kind} .no such..*{list(registry)[0]}'): registry['no such']
    assert 'no such' not in registry and registry.get('no such') is None


def test_a_taken_name_stays_with_its_owner():
    r = Registry('thing')
    def make():
        @r('a')
        def f(): pass
        return f
    assert make() is not make()                                    # a cell run twice
    with pytest.raises(ValueError, match='taken'): r('a')(print)
    r('b')(lambda: 1)
    with pytest.raises(ValueError, match='taken'): r('b')(lambda: 2)   # all lambdas share one name
    assert r['b']() == 1
    with pytest.raises(ValueError, match='taken'): register_recipe(Recipe('q2', 'another'))
    assert register_recipe(RECIPES['q2']) is RECIPES['q2']


def test_a_size_is_a_named_change():
    r = Recipe('r', 'doc', dict(dim=8), sizes=dict(big=dict(dim=16)))
    assert r.config(**r.sized('big')).dim == 16
    with pytest.raises(ValueError, match='no size .huge.; choose one of big'): r.sized('huge')
    with pytest.raises(ValueError, match='set dim'): RECIPES['dense'].sized('big')
