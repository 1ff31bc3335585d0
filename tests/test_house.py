"The rules of the house hold, and each of them bites: broken once in a copy, it names the chapter that breaks it."
import json, shutil, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import house

A, B = '02_gray.ipynb', '10_codebook.ipynb'


@pytest.mark.parametrize('rule', house.RULES)
def test_rule(rule):
    bad = house.RULES[rule](root)
    assert not bad, '\n'.join(bad)


def edit(path, f):
    "Change a stored notebook with `f(cells)`"
    nb = json.loads(path.read_text(encoding='utf-8'))
    f(nb['cells'])
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def cell(src, *outputs): return dict(cell_type='code', execution_count=None, id='planted', metadata={}, outputs=list(outputs), source=[src])
def stream(text, name='stdout'): return dict(name=name, output_type='stream', text=[text])
def planted(src, *outputs, nb=A): return lambda r: edit(r/'nbs'/nb, lambda cs: cs.insert(3, cell(src, *outputs)))
def in_cell(old, new, nb=A):
    def f(cs):
        c = next(c for c in cs if old in ''.join(c['source']))
        c['source'] = [''.join(c['source']).replace(old, new, 1)]
    return lambda r: edit(r/'nbs'/nb, f)
def drop(nb, which): return lambda r: edit(r/'nbs'/nb, lambda cs: cs.pop(which))
def in_file(name, old, new):
    def f(r):
        s = (r/name).read_text(encoding='utf-8')
        assert old in s
        (r/name).write_text(s.replace(old, new, 1), encoding='utf-8')
    return f
def write(name, text): return lambda r: (r/name).write_text(text, encoding='utf-8')


BREAKS = [
    ('floors', 'imports codebook of floor 10', planted('from pi2nb.codebook import CODES')),
    ('floors', 'imports codebook of floor 10', planted('#| export\ndef f():\n    "late"\n    import pi2nb.codebook as c')),
    ('floors', 'imports codebook of floor 10', planted('from pi2nb import codebook')),
    ('floors', 'imports gray of floor 02', planted('#| export\nfrom .gray import gray')),
    ('floors', 'which no chapter makes', planted('from pi2nb.nowhere import x')),
    ('shape', 'default_exp gray', in_cell('default_exp gray', 'default_exp grey')),
    ('shape', 'must start with `# Title`', lambda r: edit(r/'nbs'/A, lambda cs: cs[1].update(source=['no title']))),
    ('shape', 'line after the title', in_cell('\n> ', '\n')),
    ('shape', 'no `$` and no backslash', in_cell('\n> ', '\n> $x$ ')),
    ('shape', 'the title cell holds only', lambda r: edit(r/'nbs'/A, lambda cs: cs[1]['source'].extend(['\n\nMore words.']))),
    ('shape', 'two to four sentences', lambda r: edit(r/'nbs'/A, lambda cs: cs.insert(1, dict(cell_type='markdown', id='p', metadata={}, source=['# Hm\n> hm'])) or cs.insert(2, dict(cell_type='markdown', id='q', metadata={}, source=['## Hm'])))),
    ('shape', 'last section', in_cell('## What we saw', '## The end')),
    ('shape', 'last cell', drop(A, -1)),
    ('shape', 'are one idea', lambda r: edit(r/'nbs'/A, lambda cs: cs.__setitem__(slice(3, 3), [cell('1')]*80))),
    ('shape', 'share 02', lambda r: shutil.copy(r/'nbs'/A, r/'nbs'/'02_other.ipynb')),
    ('exported_cells', 'lines are exported', planted('#| export\n' + '\n'.join(f'x{i} = {i}' for i in range(21)))),
    ('exported_cells', 'f has no docstring', planted('#| exports\ndef f(x): return x')),
    ('imports_alone', 'imports and other code', planted('import torch\ntorch.manual_seed(0)')),
    ('clean', 'not clean', lambda r: edit(r/'nbs'/A, lambda cs: cs[0].update(execution_count=3))),
    ('clean', 'share the id', lambda r: edit(r/'nbs'/A, lambda cs: cs[1].update(id=cs[0]['id']))),
    ('clean', 'not clean', lambda r: write(f'nbs/{A}', (r/'nbs'/A).read_text() + '\n')(r)),
    ('outputs', 'machine path', planted('1', stream('wrote /home/someone/x'))),
    ('outputs', 'machine path', planted('1', dict(data={'text/plain': ['</tmp/tmpabc>']}, metadata={}, output_type='execute_result', execution_count=None))),
    ('outputs', 'in the source', planted("open('/home/someone/x')")),
    ('outputs', 'noise', planted('1', stream('UserWarning: something'))),
    ('outputs', 'noise', planted('1', stream('Traceback (most recent call last):'))),
    ('outputs', 'stderr is stored', planted('1', stream('hm', 'stderr'))),
    ('outputs', 'an error is stored', planted('1', dict(ename='E', evalue='e', output_type='error', traceback=[]))),
    ('exports', 'gray.py differs', planted('#| export\n_planted = 1')),
    ('exports', 'gray.py differs', lambda r: write('pi2nb/gray.py', (r/'pi2nb'/'gray.py').read_text() + '\n')(r)),
    ('exports', 'comes from no notebook', write('pi2nb/stale.py', 'x = 1\n')),
    ('exports', 'was never exported', lambda r: (r/'pi2nb'/'gray.py').unlink()),
    ('exports', '_modidx.py differs', in_file('pi2nb/_modidx.py', 'gray.html', 'grey.html')),
    ('readme', 'README.md', in_file('README.md', '\n\n', '\n\nedited by hand\n\n')),
    ('readme', 'README_files/x.png', lambda r: ((r/'README_files').mkdir(exist_ok=True), (r/'README_files'/'x.png').write_bytes(b''))),
    ('readme', 'README.md', lambda r: edit(r/'nbs'/'index.ipynb', lambda cs: cs.append(cell('1 + 1')))),
    ('site_config', 'sidebar', in_file('_quarto.yml', f'href: {A}', f'href: {A[:-6]}x.ipynb')),
    ('site_config', 'is called "02 grey"', in_file('_quarto.yml', '"02 gray"', '"02 grey"')),
    ('site_config', 'another floor', in_file('_quarto.yml', '"0 · ', '"9 · ')),
    ('site_config', 'symlink', lambda r: ((r/'nbs'/'_quarto.yml').unlink(), shutil.copy(r/'_quarto.yml', r/'nbs'))),
    ('site_config', 'nbdev.yml', in_file('nbs/nbdev.yml', 'repo-branch: ', 'repo-branch: x')),
    ('versions', 'CHANGELOG.md', in_file('CHANGELOG.md', '## ', '## 9.9.9\n\n## ')),
    ('records', 'does not say: hardware, versions', lambda r: ((r/'nbs'/'runs').mkdir(exist_ok=True), write('nbs/runs/x.json', '{"loss": 1}')(r))),
]


@pytest.mark.parametrize('rule, says, break_it', BREAKS, ids=[f'{r}-{i}' for i, (r, *_) in enumerate(BREAKS)])
def test_rule_bites(rule, says, break_it, tmp_path):
    copy = tmp_path/'copy'
    ignore = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'runs')
    for d in ('nbs', 'pi2nb', 'README_files'):
        if (root/d).exists(): shutil.copytree(root/d, copy/d, symlinks=True, ignore=ignore)
    for f in ('settings.ini', '_quarto.yml', 'README.md', 'CHANGELOG.md'): shutil.copy(root/f, copy)
    break_it(copy)
    found = house.RULES[rule](copy)
    assert any(says in f for f in found), f'{rule} did not notice; it said {found}'


def test_every_rule_is_broken_once(): assert {r for r, *_ in BREAKS} == house.RULES.keys()
