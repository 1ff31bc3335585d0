"Every notebook runs in a process and a copy of its own, as `nbdev_test` runs it, and leaves nothing behind in `nbs/`."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').glob('*.ipynb'), key=lambda p: -p.stat().st_size)  # long ones first, so that workers end together
LIMIT = 300  # seconds; a chapter is meant to take less than 60 on one busy core
RUN = 'import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=0)'


def tree(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if not {'__pycache__', '.hypothesis'} & set(p.parts)}


def run(nb, work, tmp_path):
    "Run the notebook `nb` of the project copy `work` as `nbdev_test` does -> what went wrong, or ''"
    tmp, before = tmp_path/'tmp', tree(work)
    tmp.mkdir()
    path = os.pathsep.join([str(work), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)  # for commands that a chapter starts
    env = os.environ | dict(PYTHONPATH=path, OMP_NUM_THREADS='1', MPLBACKEND='agg', TQDM_DISABLE='1',
                            TMPDIR=str(tmp), HF_HOME=str(tmp/'hf'), HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
    try: r = subprocess.run([sys.executable, '-c', RUN, str(work/'nbs'/nb)], cwd=work, env=env, text=True, errors='replace', timeout=LIMIT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except subprocess.TimeoutExpired as e: return f'{nb} took more than {LIMIT} s\n{tail(e.stdout or "")}'
    if r.returncode or 'Success.' not in r.stdout: return f'{nb} failed (exit {r.returncode})\n{tail(r.stdout)}'
    left = sorted(tree(work) - before)
    return f'{nb} left files behind, write to a temporary folder: {left}' if left else ''


def tail(text, n=60):
    text = text.decode(errors='replace') if isinstance(text, bytes) else text
    return '\n'.join(text.splitlines()[-n:])


def copy_project(work):
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '.hypothesis')
    for d in ('nbs', 'pi2nb'): shutil.copytree(root/d, work/d, symlinks=True, ignore=skip)
    for f in ('settings.ini', '_quarto.yml'): shutil.copy(root/f, work)
    return work


@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_chapter(nb, tmp_path):
    if wrong := run(nb.name, copy_project(tmp_path/'project'), tmp_path): pytest.fail(wrong, pytrace=False)


@pytest.mark.parametrize('src, says', [('assert 1 == 2', 'AssertionError'), ("open('left.txt', 'w').close()", "left files behind, write to a temporary folder: ['nbs/left.txt']"),
                                       ('#| slow\nassert 1 == 2', '')])
def test_a_broken_chapter_is_seen(src, says, tmp_path):
    work = tmp_path/'project'
    (work/'nbs').mkdir(parents=True)
    shutil.copy(root/'settings.ini', work)
    nb = dict(cells=[dict(cell_type='code', id='a', execution_count=None, metadata={}, outputs=[], source=[src])], metadata={}, nbformat=4, nbformat_minor=5)
    (work/'nbs'/'00_toy.ipynb').write_text(json.dumps(nb))
    wrong = run('00_toy.ipynb', work, tmp_path)
    assert says in wrong and bool(says) == bool(wrong)
