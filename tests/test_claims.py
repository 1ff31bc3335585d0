"The ledger: what a row must have, that every verdict bites, that the table is Markdown"
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pi2nb.claims import DOCUMENTS, LEDGER, Claim, Ledger, claim

nbs = Path(__file__).resolve().parent.parent/'nbs'
settled = [c for c in LEDGER.values() if c.word != 'open']
VERDICTS = {'holds': True, 'holds if it rains': (False, True), 'does not hold': False}


def row(verdict, answer=None, chapter='02_gray'):
    return Claim('Q2', 'a claim', verdict, chapter, None if answer is None else lambda: (answer, 'figures'))


@pytest.fixture
def empty():
    kept = dict(LEDGER)
    LEDGER.clear()
    yield LEDGER
    LEDGER.clear()
    LEDGER.update(kept)


@pytest.fixture
def at_nbs(monkeypatch): monkeypatch.chdir(nbs)


@pytest.mark.parametrize('verdict, word', [('holds', 'holds'), ('does not hold', 'does not hold'), ('holds if a | b', 'holds if'), ('open: 07', 'open')])
def test_word(verdict, word): assert row(verdict).word == word


@pytest.mark.parametrize('verdict', ['', 'Holds', 'holds ', 'holds if', 'holds if ', 'open', 'open: ', 'open: 7', 'open: 123', 'open: 60+', 'holds\n', 'false'])
def test_unknown_verdict(verdict):
    with pytest.raises(ValueError, match='write holds'): row(verdict)


def test_parts():
    with pytest.raises(ValueError, match='choose one of π/2 training'): Claim('Q3', 'x', 'holds', '02_gray')
    with pytest.raises(ValueError, match='names the chapter'): Claim('Q2', 'x', 'holds')
    for text in ('', 'a\nb'):
        with pytest.raises(ValueError, match='one line'): Claim('Q2', text, 'holds', '02_gray')
    assert Claim('Q2', 'x', 'open: 60').settle() == ''


@pytest.mark.parametrize('verdict', VERDICTS)
@pytest.mark.parametrize('truth', VERDICTS)
def test_only_the_true_verdict_settles(verdict, truth):
    c = row(verdict, VERDICTS[truth])
    if verdict == truth: assert c.settle() == 'figures'
    else:
        with pytest.raises(AssertionError, match=f'says {c.word}, the check finds'): c.settle()


def test_a_condition_must_be_needed():
    with pytest.raises(AssertionError, match='finds holds '): row('holds if it rains', (True, True)).settle()
    with pytest.raises(AssertionError, match='finds does not hold'): row('holds if it rains', (False, False)).settle()


def test_no_check_and_a_check_that_breaks():
    with pytest.raises(AssertionError, match='nothing checks it'): row('holds').settle()
    c = Claim('Q2', 'a claim', 'holds', '02_gray', lambda: 1/0)
    with pytest.raises(ZeroDivisionError): c.settle()


def test_a_check_runs_once():
    ran = []
    c = Claim('Q2', 'a claim', 'holds', '02_gray', lambda: (ran.append(1) or True, 'figures'))
    assert [c.settle(), c.settle()] == ['figures']*2 and len(ran) == 1


def test_claim_registers_and_replaces(empty):
    assert claim('Q2', 'a', 'open: 60') is None

    @claim('Q2', 'a', 'holds', '02_gray 10_codebook')
    def check(): return True, 'x | y'

    assert check() == (True, 'x | y') and len(empty) == 1
    table = empty.settle()._repr_markdown_()
    assert table.splitlines() == ['**The Q2 document**: holds 1', '', '| claim | verdict | what was run | shown in |', '|---|---|---|---|',
                                  r'| a | holds | x \| y | [02](02_gray.ipynb) [10](10_codebook.ipynb) |']


def test_settle_lists_every_wrong_row(empty):
    claim('Q2', 'first', 'holds', '02_gray')(lambda: (False, '1'))
    claim('Q2', 'second', 'does not hold', '02_gray')(lambda: (True, '2'))
    claim('Ghost', 'third', 'holds', '02_gray')(lambda: (True, '3'))
    with pytest.raises(AssertionError, match="(?s)'first'.*'second'") as e: empty.settle()
    assert 'third' not in str(e.value)
    with pytest.raises(AssertionError): empty._repr_markdown_()
    assert empty.of('Ghost').settle().counts() == {'holds': 1}


def test_empty_and_unknown(empty):
    assert empty._repr_markdown_() == '' and empty.settle() is empty and not empty.counts() and repr(empty) == 'Ledger of 0 claims'
    with pytest.raises(ValueError, match='nothing of'): empty.of('Q2')


def test_documents_in_order_and_links():
    assert {d for d,_ in LEDGER} == set(DOCUMENTS)
    assert [(nbs/f'{n}.ipynb').exists() for c in LEDGER.values() for n in c.chapter.split()].count(False) == 0
    assert all(c.check for c in settled) and not any(c.check for c in LEDGER.values() if c.word == 'open')


def test_the_whole_table(at_nbs):
    table = LEDGER.settle()._repr_markdown_()
    rows = [re.split(r'(?<!\\)\|', l) for l in table.splitlines() if l.startswith('|')]
    assert {len(r) for r in rows} == {6} and len(rows) == len(LEDGER) + 2*len(DOCUMENTS)
    assert [DOCUMENTS[d] for d in DOCUMENTS] == re.findall(r'^\*\*(.*)\*\*', table, re.M)
    for c in settled:                                    # whatever else were written there would be refused
        for verdict in VERDICTS:
            wrong = replace(c, verdict=verdict, check=lambda: c.found)
            if wrong.word == c.word: continue
            with pytest.raises(AssertionError, match=f'finds {c.word}'): wrong.settle()


def test_missing_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = next(c for c in settled if c.text.startswith('two bits cost'))
    with pytest.raises(FileNotFoundError, match='in the folder nbs'): replace(c).settle()
