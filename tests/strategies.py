"What several test files draw: ways to cut a text, steps of a recurrence"
import torch
from hypothesis import strategies as st


def pieces(n):
    "Ways to cut n steps into pieces, empty ones included"
    return st.lists(st.integers(0, n), max_size=8).map(lambda cuts: [b-a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), n])])


def steps(seed, B=2, T=23, C=3, dtype=torch.float32):
    "Decays, inputs and a first state of a recurrence"
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g, dtype=dtype)
    return r(B, T, C).sigmoid(), r(B, T, C), r(B, C)
