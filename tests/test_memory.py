"Slot memory: pieces as the whole, no look ahead, writing, shards, and what memorizing may touch"
import hashlib
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from torch import nn
from hypothesis import given, settings, strategies as st
from pi2nb.memory import fading_top, Shard, SlotMemory, remember, memorize
from pi2nb.quantlinear import QuantEmbedding, QuantLinear, frozen_copy
from pi2nb.packed import pack_model
from pi2nb.cfc import CfCBlock
from pi2nb.tokenizer import ByteTokenizer

quick = settings(max_examples=8, deadline=None)
DIM = 12
KINDS = {'coded': {}, 'dense': dict(code=None, gate_code=None), 'few slots': dict(slots=3, top=8), 'one slot': dict(slots=1, top=1, room=0)}
each = pytest.mark.parametrize('kind', KINDS)


def make(kind='dense', written=5, seed=0, **more):
    torch.manual_seed(seed)
    m = SlotMemory(DIM, **dict(slots=20, top=4, room=8) | KINDS[kind] | more)
    nn.init.normal_(m.out.weight, std=.3)
    if written and len(m.importance): m.write(*torch.randn(2, written, DIM))
    return m


class Tiny(nn.Module):
    def __init__(self, room=16):
        super().__init__()
        self.embed, self.head = QuantEmbedding(256, DIM, None), QuantLinear(DIM, 256, None)
        self.parts = nn.ModuleList([SlotMemory(DIM, 8, 4, None, None, room), CfCBlock(DIM, None, None), SlotMemory(DIM, 8, 4, None, None, room)])
        for p in self.parts: nn.init.normal_(p.out.weight, std=.3)

    def forward(self, ids, state=None):
        x, new = self.embed(ids), []
        for p, s in zip(self.parts, state or [None]*3):
            y, s = p(F.rms_norm(x, (DIM,)), s)
            x = x + y; new.append(s)
        return self.head(x), new


def checksum(m): return hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in m.parameters())).hexdigest()


@quick
@given(st.integers(0, 10**6), st.lists(st.integers(0, 23), max_size=6))
@pytest.mark.parametrize('kind', KINDS)
def test_pieces_are_the_whole(kind, seed, cuts):
    m = make(kind, seed=seed)
    x = torch.randn(2, 23, DIM)
    whole, state = m(x)
    sizes = [b-a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 23])]
    for split in (sizes, [1]*23):
        out, s = [], None
        for p in x.split(split, 1): y, s = m(p, s); out.append(y)
        assert (torch.cat(out, 1) - whole).abs().max() < 1e-5
        assert s.shape == state.shape == (2, 0) and s.dtype == torch.float32


@each
def test_no_look_ahead_and_nothing_moves(kind):
    m = make(kind)
    x = torch.randn(1, 9, DIM, requires_grad=True)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    for t in range(9): assert torch.autograd.grad(m(x)[0][0, t].sum(), x)[0][0, t+1:].abs().sum() == 0
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


def test_a_planted_look_ahead_is_seen():
    class Peeks(SlotMemory):
        def forward(self, x, state=None):
            self.write(self.query(x).flatten(0, 1), x.flatten(0, 1))
            return super().forward(x, state)
    torch.manual_seed(0)
    m = Peeks(DIM, 20, 4, None, None)
    nn.init.normal_(m.out.weight)
    a = torch.randn(1, 9, DIM)
    b = torch.cat([a[:, :5], torch.randn(1, 4, DIM)], 1)
    runs = []
    for x in (a, b): m.forget(); runs.append(m(x)[0][:, :5])
    assert (runs[0] - runs[1]).abs().max() > 1e-3


@pytest.mark.parametrize('T', [0, 1])
def test_gradient(T):
    m = make().double()
    x = torch.randn(1, T, DIM, dtype=torch.float64, requires_grad=True)
    if T: assert torch.autograd.gradcheck(lambda *a: m(a[0])[0], (x, m.sharp, m.trust, m.keys.weight, m.values.weight, m.query.weight))
    else: assert m(x)[0].shape == (1, 0, DIM)


@each
def test_every_parameter_learns(kind):
    m = make(kind)
    m(torch.randn(2, 50, DIM))[0].square().sum().backward()
    for n, p in m.named_parameters(): assert p.grad is not None and p.grad.isfinite().all(), n


def test_fresh_is_the_identity():
    assert SlotMemory(DIM)(torch.randn(1, 4, DIM))[0].abs().max() < 1e-3
    assert SlotMemory(DIM, code=None)(torch.randn(1, 4, DIM))[0].abs().max() == 0


def test_autocast():
    m = make('coded')
    x = torch.randn(2, 7, DIM)
    with torch.autocast('cpu', torch.bfloat16): y, s = m(x)
    assert s.dtype == torch.float32 and (y.float() - m(x)[0]).abs().max() < .05


def test_copies_and_state_dict():
    m, x = make(), torch.randn(1, 6, DIM)
    m.attach(m.create_shard(2))
    assert torch.equal(deepcopy(m)(x)[0], m(x)[0])
    other = make(written=0, seed=5)
    other.load_state_dict(m.state_dict())
    assert not torch.equal(other(x)[0], m(x)[0])            # shards are files of their own
    m.detach()
    assert torch.equal(other(x)[0], m(x)[0])
    assert (frozen_copy(make('coded'))(x)[0] - make('coded')(x)[0]).abs().max() < 1e-5


@quick
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=9), st.integers(1, 10))
def test_fading_top(scores, top):
    s = torch.tensor(scores)
    w, where = fading_top(s, top)
    assert len(w) == min(top, len(s)) and (w >= 0).all() and w.sum() <= 1 + 1e-5
    if len(s) <= top: assert torch.allclose(w, s.softmax(0)[where], atol=1e-6)
    def dense(s): w, where = fading_top(s, top); return torch.zeros(len(s)).scatter(0, where, w)
    nudged = s + 1e-3*torch.linspace(-1, 1, len(s)).flip(0)
    assert (dense(nudged) - dense(s)).abs().max() < .01                        # also at a tie


def one_by_one(m, keys, values, near=.99, momentum=.9):
    K, V, I = m.written_keys.clone(), m.written_values.clone(), m.importance.clone()
    for k, v in zip(F.normalize(keys, dim=-1), values):
        like = torch.where(I > 0, K@k, -1.)
        i = int(like.argmax())
        if like[i] >= near: k, v = momentum*K[i] + (1-momentum)*k, momentum*V[i] + (1-momentum)*v
        else: i = int(I.argmin())
        K[i], V[i], I[i] = F.normalize(k, dim=0), v, 1.
    return K, V, I


@quick
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 4))
def test_writing_is_writing_one_by_one(seed, known, new):
    m = make(seed=seed)
    keys = torch.cat([m.written_keys[:known]*3 + .002*torch.randn(known, DIM), torch.randn(new, DIM)])
    values = torch.randn(len(keys), DIM)
    m.consolidate()
    plain = one_by_one(m, keys, values)
    m.write(keys, values)
    for a, b in zip((m.written_keys, m.written_values, m.importance), plain): assert torch.allclose(a, b, atol=1e-5)


def test_writing_at_the_edges():
    m = make(written=0)
    k, v = torch.randn(2, 30, DIM)
    m.write(k, v)                                            # more than there is room for: the last ones
    assert torch.allclose(m.written_values, v[-8:])
    m.forget()
    m.write(k[:1].expand(6, -1), v[:6])                      # six times the same key: one slot
    assert (m.importance > 0).sum() == 1
    m.write(k[:0], v[:0])
    assert (m.importance > 0).sum() == 1


@pytest.mark.parametrize('call, says', [
    (lambda m: m.write(torch.randn(3, DIM), torch.randn(2, DIM)), 'one value for each key'),
    (lambda m: m.write(torch.full((1, DIM), float('inf')), torch.randn(1, DIM)), 'finite'),
    (lambda m: m.write(torch.randn(3, 5), torch.randn(3, 5)), f'{DIM}'),
    (lambda m: make(room=0).write(torch.randn(3, DIM), torch.randn(3, DIM)), 'no room'),
    (lambda m: make(written=0).create_shard(), 'nothing is written'),
    (lambda m: m.create_shard(0), 'at least one slot'),
    (lambda m: SlotMemory(5).attach(m.create_shard()), 'width'),
    (lambda m: SlotMemory(0), 'at least 1'),
    (lambda m: SlotMemory(4, room=-1), 'at least 0'),
    (lambda m: Shard(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)), 'no shard'),
    (lambda m: memorize(Tiny(), ByteTokenizer(), b''), 'at least one byte'),
    (lambda m: memorize(nn.Linear(2, 2), ByteTokenizer(), b'a'), 'no slot memory'),
    (lambda m: memorize(Tiny(), ByteTokenizer(), b'a', share=2), 'up to 1')])
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says): call(make())


def test_shard_files(tmp_path):
    m, path = make(), tmp_path/'a.shard'
    with pytest.raises(FileNotFoundError): Shard.load(path)
    s = m.create_shard(3)
    s.save(path)
    back = Shard.load(str(path))
    assert all(torch.equal(a, b) for a, b in zip(vars(s).values(), vars(back).values()))
    data = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    for bad in (data[:len(data)//2], b'', b'hello', b'\0'*64, data[:-4] + b'\0\0\xc0\x7f'):   # the last: a NaN
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='damaged'): Shard.load(path)
    with pytest.raises(OSError): s.save(path/'a')                # a file stands where the folder should be


def test_memorizing_touches_no_parameter_and_reads_before_it_writes():
    torch.manual_seed(0)
    lm, tok, text = Tiny().eval().requires_grad_(False), ByteTokenizer(), b'the cat sat on the mat, the cat sat on the hat'
    clean, before = deepcopy(lm), checksum(lm)
    nats = memorize(lm, tok, text, share=.2, chunk=16)
    assert checksum(lm) == before and len(nats) == len(text)
    first, _ = remember(deepcopy(clean), torch.tensor([[tok.bos, *text[:15]]]), torch.tensor([list(text[:16])]))
    assert torch.allclose(nats[:16], first[0], atol=1e-5)     # what came first was read with empty slots
    for m, old in zip(lm.parts[::2], clean.parts[::2]):
        assert (m.importance > 0).any() and not (old.importance > 0).any()
    again = memorize(deepcopy(clean), tok, text, share=.2, chunk=16)
    assert torch.equal(again, nats)
    for m in lm.parts[::2]: m.forget()
    x = torch.tensor([list(text)])
    assert torch.equal(lm(x)[0], clean(x)[0])
    assert not any(m._forward_pre_hooks for m in lm.modules())


def test_packed_answers_alike():
    m, x = make('coded'), torch.randn(1, 5, DIM)
    y = m(x)[0]
    assert (pack_model(m)(x)[0] - y).abs().max() < 1e-5
