"Chapter 13: indices that neither wrap nor jump, votes that are kept until they are spent, layers that copy and load"
from copy import deepcopy

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn

from pi2nb.ghost import (GhostLinear, GhostQuantFunction, apply_votes, cast_votes, gradient_units, inject_noise, manifold, nearest_index,
                         ordered_dither)
from pi2nb.quantlinear import coded_state

LOW, TOP = -32768, 32767
kinds = pytest.mark.parametrize('kind', ['linear', 'prime'])
shapes = pytest.mark.parametrize('shape', [(0, 5), (5, 0), (1, 1), (3, 7), (1, 33)])
fast = settings(max_examples=60, deadline=None)


def row(*x, dtype=torch.int16): return torch.tensor([x], dtype=dtype)


@kinds
def test_tables_ascend_and_mirror(kind):
    t = manifold(kind)
    assert t.shape == (65536,) and t.dtype == torch.float32 and (t.diff() > 0).all()
    assert torch.equal(t[1:32768], -t[32769:].flip(0)) and (t[0], t[32768]) == (-1, 0)
    manifold(kind)[0] = 5.                                               # a copy: the next caller does not see it
    assert manifold(kind)[0] == -1


def test_prime_table_holds_its_ingredients():
    t = manifold('prime')
    for v in (2**-1.05, 59_999**-1.05, 1/(1.2*9_999), 5/8192): assert (t == torch.tensor(v, dtype=torch.float32)).any()


@kinds
@fast
@given(st.lists(st.floats(-1.5, 1.5, width=32), max_size=20))
def test_nearest_is_nearest(kind, xs):
    t, w = manifold(kind), torch.tensor(xs, dtype=torch.float32)
    i = nearest_index(w, t)
    assert i.dtype == torch.int16 and i.shape == w.shape
    for x,k in zip(w.double(), i): assert (t[k.int()+32768].double()-x).abs() <= (t.double()-x).abs().min() + 1e-7*x.abs()


@kinds
def test_every_index_comes_back(kind):
    t = manifold(kind)
    assert torch.equal(nearest_index(t, t).int(), torch.arange(LOW, TOP+1))
    assert nearest_index(torch.tensor([-9., -float('inf'), float('inf'), 9.]), t).tolist() == [LOW, LOW, TOP, TOP]
    assert nearest_index(torch.zeros(2, 3, 4, 1), t).shape == (2, 3, 4, 1)
    with pytest.raises(ValueError, match='NaN'): nearest_index(torch.tensor([float('nan')]), t)


def test_dither_keeps_its_numbers():
    assert ordered_dither((2, 4), 0, 4).tolist() == [[0, 10, 5, 0], [13, 7, 2, 13]]
    assert ordered_dither((2, 3), 1000, 16).tolist() == [[14736, 58692, 37112], [2881, 46837, 25257]]
    assert ordered_dither((1, 1), 10**9, 16).item() == 10**9*35994 % 65536
    assert ordered_dither((70_000, 2), 5, 8).aminmax() == (0, 255)


@shapes
@pytest.mark.parametrize('bits', [1, 4, 16])
def test_dither_shapes(shape, bits):
    t = ordered_dither(shape, 3, bits)
    assert t.shape == shape and t.dtype == torch.int32 and ((t >= 0) & (t < 2**bits)).all()


@fast
@given(st.integers(-32767, 32767), st.integers(0, 10**6))
def test_a_weighted_vote_rounds_to_a_neighbour(v, step):
    vote = cast_votes(torch.tensor([[v]], dtype=torch.int32), step).item()
    assert abs(vote + v/16) < 1 and (v % 16 or vote == -v//16)


def test_votes_without_weight():
    assert cast_votes(row(307, 308, -308, 0, dtype=torch.int32), 9, weighted=False).tolist() == [[0, -16, 16, 0]]


moves = st.lists(st.tuples(st.integers(LOW, TOP), st.integers(-32767, 32767)), min_size=1, max_size=12)


@fast
@given(moves, st.integers(1, 2000), st.integers(0, 15))
def test_votes_are_conserved_away_from_the_ends(pairs, threshold, power):
    index, votes = (torch.tensor([c], dtype=torch.int16) for c in zip(*pairs))
    before, cast, stride = index.int(), votes.int(), 2**power
    moved = apply_votes(index, votes, threshold, LOW, TOP, stride)
    assert torch.equal(index.int(), before + moved) and (votes.abs() < threshold).all()
    free = before + (cast-votes)//threshold*stride                       # where the index would be without an end
    assert torch.equal(index.int(), free.clamp(LOW, TOP))
    inside = free == index
    assert torch.equal((index.long()*threshold + votes.long()*stride)[inside], (before.long()*threshold + cast.long()*stride)[inside])


@fast
@given(st.lists(st.integers(-60, 60), min_size=1, max_size=40), st.integers(1, 30), st.integers(1, 5))
def test_rest_delays_and_loses_nothing(cast, threshold, cooldown):
    index, votes, rest, last = row(0), row(0), row(0, dtype=torch.int8), -99
    for step,c in enumerate(cast):
        votes += c
        if apply_votes(index, votes, threshold, LOW, TOP, 4, rest, cooldown).item():
            assert step - last > cooldown
            last = step
        assert index.item()*threshold + votes.item()*4 == 4*sum(cast[:step+1])


@pytest.mark.parametrize('dtype, low, top', [(torch.int16, LOW, TOP), (torch.int16, -5, 5), (torch.uint8, 0, 254), (torch.uint8, 0, 255)])
def test_both_ends_and_the_middle(dtype, low, top):
    middle = (low+top)//2
    index, votes = row(low, top, middle, middle+1, low, top, dtype=dtype), row(-1, 1, 1, -1, -32767, 32767)
    moved = apply_votes(index, votes, 1, low, top)
    assert index.tolist() == [[low, top, middle+1, middle, low, top]] and moved.tolist() == [[0, 0, 1, -1, 0, 0]]
    assert apply_votes(index, row(*[32767, -32767]*3), 1, low, top, 2**15).dtype == torch.int32
    assert index.tolist() == [[top, low]*3]


@shapes
def test_empty_and_odd_shapes(shape):
    index, votes = torch.zeros(shape, dtype=torch.int16), torch.full(shape, 7, dtype=torch.int16)
    assert apply_votes(index, votes, 3, LOW, TOP).shape == shape and (index == 2).all() and (votes == 1).all()
    assert inject_noise(votes, 2, 1) is votes
    assert gradient_units(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize('kw, says', [(dict(threshold=0), 'a flip takes'), (dict(threshold=40_000), 'a flip takes'), (dict(low=-1), 'does not fit'),
                                      (dict(top=256), 'does not fit'), (dict(stride=0), 'stride'), (dict(stride=6), 'stride'),
                                      (dict(rest=torch.zeros(1, 2)), 'int8'), (dict(rest=row(0, 0, dtype=torch.int8), cooldown=128), '127'),
                                      (dict(votes=row(1)), 'one vote for each'), (dict(votes=torch.zeros(1, 2)), 'give integers')])
def test_flips_refuse(kw, says):
    with pytest.raises(ValueError, match=says):
        apply_votes(**dict(index=row(3, 3, dtype=torch.uint8), votes=row(0, 0), threshold=1, low=0, top=255) | kw)


def test_noise_is_even_saturates_and_repeats():
    z = lambda: torch.zeros(32, 32, dtype=torch.int16)
    many = torch.stack([inject_noise(z(), 3, s) for s in range(40)]).int()
    assert many.aminmax() == (-3, 3) and many.float().mean().abs() < .01
    assert torch.equal(inject_noise(z(), 3, 5), inject_noise(z(), 3, 5)) and not torch.equal(many[5], many[6])
    assert not inject_noise(z(), 0, 1).any()
    assert inject_noise(z()+32767, 4096, 1).max() == 32767               # no wrap
    for bad in (lambda: inject_noise(torch.zeros(2, 2), 2, 0), lambda: inject_noise(z(), -1, 0)):
        with pytest.raises(ValueError, match='integer'): bad()


def test_units():
    g = torch.randn(9, 9)
    u = gradient_units(g)
    assert abs(u.float().square().mean().sqrt()-256) < 1 and torch.equal(gradient_units(g*1e-6), u) and torch.equal(gradient_units(g*1e6), u)
    assert gradient_units(torch.tensor([1e6] + [0.]*10**6)).max() == 32767


def test_function_votes_and_its_box_is_full_at_the_end():
    scale, votes = torch.ones(1, 1, requires_grad=True), row(32767, -32767, 0)
    w = GhostQuantFunction.apply(row(LOW, TOP, 0), scale, manifold(), votes, 0.)
    assert w.tolist() == [[-1., 32767/32768, 0.]]
    (w*torch.tensor([-5., 5., .1])).sum().backward()
    assert votes.tolist() == [[32767, -32767, 0]]
    assert scale.grad.item() == 5 + 5*32767/32768


@kinds
def test_layer_copies_loads_and_changes_type(kind):
    m, x = GhostLinear(10, 4, kind, bias=True), torch.randn(2, 3, 10)
    y = m(x)
    for c in (deepcopy(m), deepcopy(m).bfloat16().float(), deepcopy(m).double().float(), deepcopy(m).to('cpu')):
        assert torch.equal(c(x), y) and c.weight.dtype == torch.int16 and c.scale.dtype == torch.float32
    other = GhostLinear(10, 4, kind, bias=True)
    other(x)                                                             # it has a leaf, which loading makes old
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), y) and set(m.state_dict()) == {'weight', 'scale', 'bias'}
    assert torch.equal(m.to_float()(x), y)
    coded_state(m.to_float())
    with pytest.raises(ValueError, match='weight holds integers'): coded_state(m)  # a file of bare indices would mean nothing
    with pytest.raises(ValueError, match='from_float'): m.load_state_dict(nn.Linear(10, 4).state_dict())


def test_a_copy_has_a_leaf_of_its_own():
    m = GhostLinear(3, 2)
    a = m.held_weight()
    c = deepcopy(m)
    assert c.held_weight() is not a and m.held_weight() is a
    c.weight += 1
    assert torch.equal(m.held_weight(), a) and not torch.equal(c.held_weight(), a)
    with torch.no_grad(): assert c.held_weight().requires_grad
    with torch.inference_mode(): c.weight.leaf = None; c(torch.ones(3))
    c(torch.ones(3)).sum().backward()
    assert c.weight.leaf.grad is not None


@kinds
@pytest.mark.parametrize('shape', [(1, 1), (3, 7), (0, 4), (4, 0)])
@pytest.mark.filterwarnings('ignore:Initializing zero-element')
def test_from_float(kind, shape):
    old = nn.Linear(shape[1], shape[0], bias=False)
    new = GhostLinear.from_float(old, kind)
    assert new.weight.shape == shape and new.scale.shape == (shape[0], 1)
    assert ((new.held_weight()-old.weight).abs() <= new.scale*4e-5).all()
    assert ((GhostLinear.from_float(old, kind, room=1.).held_weight()-old.weight).abs() <= new.scale*4e-5).all() # the largest weight fits


def test_from_float_refuses():
    old = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='room'): GhostLinear.from_float(old, room=float('nan'))
    with pytest.raises(ValueError, match='no table'): GhostLinear(2, 2, 'cubic')
    with torch.no_grad(): old.weight[0, 0] = float('inf')
    with pytest.raises(ValueError, match='infinity'): GhostLinear.from_float(old)


def test_a_few_votes_lower_an_error():
    torch.manual_seed(0)
    m, target, x = GhostLinear(8, 4), torch.randn(4, 8)/3, torch.randn(64, 8)
    votes, errors = torch.zeros(4, 8, dtype=torch.int16), []
    for step in range(200):
        loss = (m(x) - x@target.T).square().mean()
        loss.backward()
        errors.append(loss.item())
        m.vote(votes, step, stride=1024 >> step//20)
    assert errors[-1] < errors[0]/1000
    with pytest.raises(ValueError, match='no gradient'): m.vote(votes, 200)
