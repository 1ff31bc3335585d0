"The tasks ask what they show, every layer runs in them, and a score does not depend on the pieces a text comes in"
import json
import pytest, torch
from hypothesis import given, settings, strategies as st
from pi2nb.recall import (recall_task, parity_task, memory_model, learn_stages, memory_score, memory_run, memory_marks,
                          memory_grid, _LAYERS, _PAIRS, _NEEDLE)

seeded = lambda s: torch.Generator().manual_seed(s)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 9), st.integers(1, 30))
def test_every_question_has_its_answer_in_the_text(seed, pairs, quiet, rest):
    x, y = recall_task(3, 2*pairs+quiet+rest, pairs, quiet, generator=seeded(seed))
    for text, labels in zip(x.tolist(), y.tolist()):
        shown = dict(zip(text[:2*pairs:2], text[1:2*pairs:2]))
        assert len(shown) == pairs and set(labels[:2*pairs+quiet]) == {-100}
        for t, v in zip(text[2*pairs:], labels[2*pairs:]): assert v == shown.get(t, -100)
    again = recall_task(3, 2*pairs+quiet+rest, pairs, quiet, generator=seeded(seed))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and x.max() < 256


def test_stages_fit():
    for s in _PAIRS + _NEEDLE: assert (recall_task(4, *s)[1] >= 0).any()


@pytest.mark.parametrize('length', [1, 2, 33])
def test_parity(length):
    x, y = parity_task(4, length, seeded(length))
    for row, labels in zip(x.tolist(), y.tolist()):
        assert row[0] == 2 and labels == [sum(row[1:i+1]) % 2 for i in range(length)]


def test_refuses():
    for bad in ((1, 8, 4), (1, 8, 0), (1, 300, 97), (1, 8, 1, -1), (1, 8, 1, 6)):
        with pytest.raises(ValueError, match='do not fit'): recall_task(*bad)
    with pytest.raises(ValueError, match='at least one token'): parity_task(1, 0)
    with pytest.raises(ValueError, match='choose one of delta'): memory_model('x')
    with pytest.raises(ValueError, match='choose one of pairs'): memory_run('delta', 'x', .02)


@pytest.mark.parametrize('name', _LAYERS)
def test_every_layer(name):
    torch.manual_seed(0)
    lm = memory_model(name, dim=16)
    seen = learn_stages(lm, recall_task, [(16, 2), (24, 4)], .02, 2, tokens=32)
    assert len(seen) == 2 and all(s == 0 and 0 <= a <= 1 for s, a in seen)
    x, y = recall_task(2, 40, 3, generator=seeded(1))
    with torch.no_grad():
        whole, state, out = lm(x)[0], None, []
        for piece in x.split([1, 7, 20, 12], 1): logits, state = lm(piece, state); out.append(logits)
    assert (torch.cat(out, 1)-whole).abs().max() < 1e-4
    assert sum(memory_score(lm, x, y, piece=7)) == sum(memory_score(lm, x, y))


def test_a_stage_is_left_when_it_is_solved():
    class Knows(torch.nn.Module): # says the label, which the task hides in the token
        def __init__(self): super().__init__(); self.p = torch.nn.Parameter(torch.zeros(2))
        def forward(self, x, state=None): return torch.nn.functional.one_hot(x, 2).float() + 0*self.p, state
    task = lambda batch, n, generator: (lambda x: (x, x))(torch.randint(2, (batch, n), generator=generator))
    seen = learn_stages(Knows(), task, [(4,), (8,)], .02, 20, tokens=16)
    assert seen[0][0] == 0 and seen[-1][0] == 1 and all(a == 1 for _, a in seen)


def test_grid(tmp_path, monkeypatch):
    import pi2nb.recall as r
    run = r.memory_run
    monkeypatch.setattr(r, 'memory_run', lambda name, kind, lr, seed: run(name, kind, lr, seed, steps=1))
    memory_grid(tmp_path/'a.json', 'parity', ['leaky channels'], [16], rates=[.02, .04], more={'leaky channels': [1]}, batch=2)
    d = json.loads((tmp_path/'a.json').read_text())
    assert [r['seed'] for r in d['runs']] == [0, 0, 1] and d['seeds'] == [0, 1] and d['task'] == 'parity'
    assert memory_marks(memory_model('leaky channels', vocab=3), 'parity', [16], batch=2)[16] <= 1
