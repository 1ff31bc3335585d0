"Learning a second text: what each way may touch, and that the comparison leaves the model as it was"
from copy import deepcopy
import pytest, torch
from pi2nb.corpus import Corpus
from pi2nb.incremental import learn_writing, absorb, fine_tune, Primed, gain_and_loss
from pi2nb.memory import _slot_memories

TEXT = b'On the first day the river rose, on the second day it fell, on the third the boats came back. '*20
CORPUS = Corpus('river', TEXT*4, TEXT[:300], TEXT[:300])
MINI = dict(dim=16, steps=6, batch=2, context=32, heads=2)
BITS = torch.tensor([list(TEXT[:40])])


@pytest.fixture(scope='module')
def lm(): return learn_writing(CORPUS, 0, **MINI)


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_the_slots_are_empty_and_the_weights_frozen(lm):
    assert not any((m.importance > 0).any() for m in _slot_memories(lm))
    assert not any(p.requires_grad for p in lm.parameters()) and not lm.training


def test_writing_in_training_changes_the_result_and_is_repeatable(lm):
    assert same(learn_writing(CORPUS, 0, **MINI), lm)
    assert not same(learn_writing(CORPUS, 0, writes=False, **MINI), lm)


def test_absorb_moves_no_weight(lm):
    m = absorb(lm, TEXT[:600], piece=200)
    assert not any(len(s.shard_keys) for s in _slot_memories(lm))
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), lm.parameters()))
    assert all(len(s.shard_keys) and not (s.importance > 0).any() for s in _slot_memories(m))
    assert not torch.equal(m(BITS)[0], lm(BITS)[0])
    for s in _slot_memories(m): s.detach()
    assert torch.equal(m(BITS)[0], lm(BITS)[0])


def test_fine_tuning_works_on_a_copy(lm):
    before = deepcopy(lm)
    new = fine_tune(lm, TEXT, 1e-2, batch=2, context=32)
    assert same(before, lm) and not same(new, lm)
    cost = lambda m: torch.nn.functional.cross_entropy(m(BITS)[0][0, :-1], BITS[0, 1:])
    assert cost(new) < cost(lm)


@pytest.mark.parametrize('layout', ['CfC, SlotMemory', 'CfC, Delta'])
def test_primed_goes_on(layout):
    lm = learn_writing(CORPUS, 0, writes=False, layout=layout, **MINI)
    whole = lm(BITS)[0]
    primed = Primed(lm, TEXT[:25])
    for _ in range(2): assert (primed(BITS[:, 25:])[0] - whole[:, 25:]).abs().max() < 1e-4   # twice: the state is not used up


def test_the_comparison_leaves_no_trace(lm):
    before = deepcopy(lm)
    rows = gain_and_loss(lm, TEXT[:100], CORPUS, sizes=[300], held=100)
    assert [r['way'] for r in rows][:3] == ['nothing', 'slots', 'state'] and len(rows) == 6
    assert rows[1]['slots'] > 0 and rows[2]['slots'] == 0
    assert same(before, lm) and not any(len(s.shard_keys) for s in _slot_memories(lm))
