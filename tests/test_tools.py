"tools/run.py writes back what ran and keeps what did not; tools/readme.py shows text, pictures and links."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
import readme

OLD = dict(name='stdout', output_type='stream', text=['kept\n'])
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='


@pytest.fixture
def project(tmp_path):
    (tmp_path/'nbs').mkdir()
    (tmp_path/'pi2nb').mkdir()
    shutil.copy(root/'settings.ini', tmp_path)
    return tmp_path


def write_nb(path, *cells):
    "A notebook; a cell is markdown (starts with a `!`), or code, or (code, outputs)"
    def mk(i, c):
        if isinstance(c, str) and c.startswith('!'): return dict(cell_type='markdown', id=f'c{i}', metadata={}, source=c[1:].splitlines(True))
        src, outs = c if isinstance(c, tuple) else (c, [])
        return dict(cell_type='code', id=f'c{i}', execution_count=None, metadata={}, outputs=outs, source=src.splitlines(True))
    path.write_text(json.dumps(dict(cells=[mk(*o) for o in enumerate(cells)], metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')


def outputs(path): return [c.get('outputs', []) for c in json.loads(path.read_text())['cells']]


def run(project, *args):
    return subprocess.run([sys.executable, root/'tools'/'run.py', *map(str, args)], cwd=project, env=os.environ | {'MPLBACKEND': 'agg'}, text=True, capture_output=True)


def test_run_writes_outputs_and_keeps_skipped_ones(project):
    nb = project/'nbs'/'00_toy.ipynb'
    write_nb(nb, '#| default_exp toy', '#| export\nx = 40', 'x + 2', ('#| slow\n1/0', [OLD]), ('#| cuda\nx', [OLD]), ('#| eval: false\n1/0', [OLD]),
             'import matplotlib.pyplot as plt', 'plt.plot([1, 2]);', 'import nbdev; nbdev.nbdev_export()')
    r = run(project, nb)
    assert r.returncode == 0, r.stderr
    o = outputs(nb)
    assert o[2][0]['data']['text/plain'] == ['42'] and o[3] == o[4] == o[5] == [OLD] and o[8] == []
    assert 'image/png' in o[7][0]['data'] and len(o[7][0]['data']['image/png']) < 60_000
    assert 'x = 40' in (project/'pi2nb'/'toy.py').read_text()
    assert sorted(p.name for p in (project/'nbs').iterdir()) == ['00_toy.ipynb'] and not (project/'pi2nb'/'_modidx.py').exists()
    before = nb.read_bytes()
    assert run(project, nb).returncode == 0 and nb.read_bytes() == before, 'a second run must change nothing'
    r = run(project, nb, '--flags', 'cuda')
    assert r.returncode == 0 and outputs(nb)[4][0]['data']['text/plain'] == ['40'] and outputs(nb)[3] == [OLD]


def test_run_gives_the_text_under_a_title_its_own_cell(project):
    nb = project/'nbs'/'00_toy.ipynb'
    write_nb(nb, '!# T\n> line\n\nThe question.\n\nMore.', '1')
    assert run(project, nb).returncode == 0
    src = [''.join(c['source']) for c in json.loads(nb.read_text())['cells']]
    assert src == ['# T\n> line', 'The question.\n\nMore.', '1']
    before = nb.read_bytes()
    assert run(project, nb).returncode == 0 and nb.read_bytes() == before


def test_run_leaves_a_failing_notebook_alone(project):
    bad, good = project/'nbs'/'01_bad.ipynb', project/'nbs'/'02_good.ipynb'
    write_nb(bad, '1', '1/0')
    write_nb(good, "import warnings", "warnings.warn('careful')")
    before = bad.read_bytes()
    r = run(project, bad, good)
    assert r.returncode == 1 and bad.read_bytes() == before
    assert 'cell 1 failed' in r.stderr and 'ZeroDivisionError' in r.stderr and '01_bad' in r.stderr.splitlines()[-1]
    assert 'careful' in r.stderr and '02_good.ipynb, cell 1 wrote to stderr' in r.stderr


def test_readme_shows_text_pictures_and_links(project):
    nb = project/'nbs'/'index.ipynb'
    write_nb(nb, '!# T\n\n> one line\n\n[a](02_gray.ipynb) [b](../LICENSE) [c](https://x.y/z) [d](#e) ![f](g.png)\n\n```sh\n[a](b)\n```',
             ('#| hide\nhidden', [OLD]), ('#| echo: false\nx', [OLD]), ('1 + 1', [dict(data={'image/png': PNG, 'text/plain': ['<Figure>']}, metadata={}, output_type='display_data')]))
    text, files = readme.readme(project)
    assert text.startswith('# T\n\n<!-- WARNING') and '\n> one line\n' in text
    assert '[a](nbs/02_gray.ipynb) [b](LICENSE) [c](https://x.y/z) [d](#e) ![f](nbs/g.png)' in text and '```sh\n[a](b)\n```' in text
    assert 'hidden' not in text and text.count('    kept') == 1 and '```python\n1 + 1\n```\n\n![](README_files/c3-0.png)\n' in text and '<Figure>' not in text
    assert list(files) == ['c3-0.png'] and files['c3-0.png'].startswith(b'\x89PNG')
    cmd = [sys.executable, root/'tools'/'readme.py', '--root', project]
    assert subprocess.call(cmd + ['--check']) == 1 and subprocess.call(cmd) == 0 and subprocess.call(cmd + ['--check']) == 0
    (project/'README_files'/'c3-0.png').write_bytes(b'other')
    assert subprocess.call(cmd + ['--check']) == 1 and subprocess.call(cmd) == 0 and subprocess.call(cmd + ['--check']) == 0
