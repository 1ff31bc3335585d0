"Properties of chapter 00: exact multiples of π/2, one and many, and when rounding moves a weight"
from fractions import Fraction
from math import log2
import pytest, torch
from hypothesis import given, strategies as st
from pi2nb.cancellation import HALF_PI, Pi2, Pi2Tensor, levels_to_bits, moves

LIMIT = 2**51
ints = st.integers(-10**40, 10**40)
counts = st.integers(-LIMIT, LIMIT)
small = st.lists(st.integers(-10**6, 10**6), max_size=40)
def i64(x): return torch.tensor(x, dtype=torch.int64)
def many(x): return Pi2Tensor(i64(x))


@given(ints, ints, ints)
def test_one_obeys_the_laws_of_integers(a, b, k):
    x, y = Pi2(a), Pi2(b)
    assert (x + y - y == x) and (x - x == Pi2(0)) and -x == Pi2(-a)
    assert k*(x + y) == x*k + y*k == Pi2(k*(a + b))
    assert (x < y) == (a < b) and (hash(x) == hash(y)) == (a == b)
    if b: assert x/y == Fraction(a, b)


@pytest.mark.parametrize('bad', [1., '1', None, True, Fraction(1)])
def test_only_integers_count(bad):
    with pytest.raises(ValueError, match='whole numbers'): Pi2(bad)


@pytest.mark.parametrize('call', [lambda x: x*x, lambda x: x+1, lambda x: 1-x, lambda x: x*.5, lambda x: x/2, lambda x: x < 1])
def test_what_leaves_the_set_is_a_type_error(call):
    with pytest.raises(TypeError): call(Pi2(3))


def test_float_is_the_edge():
    assert float(Pi2(1)) == HALF_PI and float(Pi2(-2)) == -2*HALF_PI and float(Pi2(0)) == 0
    with pytest.raises(ZeroDivisionError): Pi2(1)/Pi2(0)


@given(small, small, st.integers(-1000, 1000))
def test_many_is_a_list_of_ones(a, b, k):
    m = min(len(a), len(b))
    a, b = a[:m], [y or 1 for y in b[:m]]
    A, B, xs, ys = many(a), many(b), [Pi2(n) for n in a], [Pi2(n) for n in b]
    assert (A + k*B - A*2).n.tolist() == [(x + k*y - x*2).n for x, y in zip(xs, ys)]
    assert (-A).n.tolist() == [-n for n in a]
    assert A.sum().n.item() == sum(a)
    p, q = A.ratio(B)
    want = [x/y for x, y in zip(xs, ys)]
    assert (p.tolist(), q.tolist()) == ([f.numerator for f in want], [f.denominator for f in want])


@given(st.lists(counts, max_size=60))
def test_a_sum_is_right_or_refused(a):
    a += [-n for n in a[::2]]
    total = sum(a)
    if abs(total) <= LIMIT: assert many(a).sum().n.item() == total
    else:
        with pytest.raises(ValueError, match='beyond'): many(a).sum()


@given(counts, counts, st.integers(-2**53, 2**53) | st.integers(-9, 9))
def test_growth_is_right_or_refused(a, b, k):
    for want, call in ((a + b, lambda: many([a]) + many([b])), (a - b, lambda: many([a]) - many([b])), (k*a, lambda: k*many([a]))):
        if abs(want) <= LIMIT and (abs(k) <= LIMIT or want != k*a): assert call().n.item() == want
        elif abs(want) > LIMIT:
            with pytest.raises(ValueError, match='beyond'): call()


@pytest.mark.parametrize('shape', [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4), (2, 1, 3, 5)])
def test_shapes(shape):
    torch.manual_seed(0)
    t = Pi2Tensor(torch.randint(-50, 51, shape))
    assert (t + t).n.shape == shape and (3*t).n.shape == shape and t.to_float().shape == shape
    assert torch.equal(Pi2Tensor.from_float(t.to_float(torch.bfloat16)).n, t.n)
    assert t.sum().n.shape == () and torch.equal(t.sum().n, t.n.sum())
    if shape: assert torch.equal(t.sum(-1).n, t.n.sum(-1)) and torch.equal((t + many([7])).n, t.n + 7)


@given(counts)
def test_float64_brings_every_count_back(n):
    assert Pi2Tensor.from_float(many(n).to_float(torch.float64)).n.item() == n


@given(st.data())
def test_a_format_of_p_bits_brings_counts_below_half_its_range_back(data):
    dtype, p = data.draw(st.sampled_from([(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)]))
    n = data.draw(st.integers(-2**(p-1)+1, 2**(p-1)-1))
    assert Pi2Tensor.from_float(many(n).to_float(dtype)).n.item() == n


def test_the_nearest_multiple():
    x = torch.tensor([0., .78, .79, -.79, 3.2, -1e-9], dtype=torch.float64)
    assert Pi2Tensor.from_float(x).n.tolist() == [0, 0, 1, -1, 2, 0]
    assert many([1]).to_float().dtype == torch.float32 and many([1]).to_float(torch.float64).item() == HALF_PI


@pytest.mark.parametrize('call', [
    lambda: Pi2Tensor(torch.zeros(2)), lambda: Pi2Tensor(torch.zeros(2, dtype=torch.int8)), lambda: many([LIMIT+1]), lambda: many([-2**63]),
    lambda: Pi2Tensor.from_float(i64([1])), lambda: many([1]).ratio(many([0])), lambda: many([0])*2**70,
    *[lambda v=v: Pi2Tensor.from_float(torch.tensor([v])) for v in (float('nan'), float('inf'), -float('inf'), 1e30)],
    lambda: moves(torch.tensor([.5]), torch.tensor([0.])), lambda: moves(torch.tensor([float('nan')]), torch.tensor([0.])),
    lambda: moves(torch.zeros(1), torch.tensor([float('nan')])), lambda: moves(torch.zeros(1), torch.tensor([float('inf')])),
    lambda: levels_to_bits(0), lambda: levels_to_bits(2.), lambda: levels_to_bits(True)])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(ValueError) as e: call()
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('call', [lambda t: t*.5, lambda t: t*t, lambda t: t+1, lambda t: t-.5])
def test_what_leaves_the_set_is_a_type_error_for_tensors_too(call):
    with pytest.raises(TypeError): call(many([1, 2]))


@given(st.integers(1, 10**9))
def test_bits(k): assert levels_to_bits(k) == log2(k) and levels_to_bits(2*k) == pytest.approx(levels_to_bits(k) + 1)


@given(st.integers(-1000, 1000), st.floats(-3, 3, width=32), st.sampled_from([torch.float32, torch.float64, torch.int64]))
def test_a_weight_moves_past_half_a_step(n, u, dtype):
    got = moves(torch.tensor([n], dtype=dtype), torch.tensor([u])).item()
    assert got == (round(Fraction(n) - Fraction(u)) != n)
    assert got or abs(u) <= .5
    assert not got or abs(u) >= .5
    assert moves(torch.tensor([n]), torch.tensor([.5])).item() == (n % 2 == 1)


def test_no_weights_no_moves(): assert moves(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)
