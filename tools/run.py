"""Export a chapter, run it top to bottom in a fresh shell, and write its outputs back.

    python tools/run.py nbs/10_codebook.ipynb
    python tools/run.py nbs/71_full_training_cuda.ipynb --flags cuda

The cells that run are the cells that the tests run: those under a flag of `tst_flags` (settings.ini), `eval: false`
and the export cell are left alone and keep the outputs they have; `--flags` runs the flagged ones as well.
Text under the title that stands in the title's cell is moved to a cell below: the site would not show it.
"""
import argparse, os, re, subprocess, sys, time
from pathlib import Path

for k, v in dict(TQDM_DISABLE='1', MPLBACKEND='agg').items(): os.environ.setdefault(k, v)
from execnb.nbio import NbCell, nb2str, read_nb
from execnb.shell import CaptureShell
from fastcore.basics import str2bool
from nbdev.clean import _nbdev_clean
from nbdev.config import get_config
from nbdev.export import nb_export
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor, extract_directives


def skipped(cell, skip):
    "Is this a cell that `nbdev_test` would not run? `skip` is the set of flags that were not asked for"
    if cell.cell_type != 'code' or not cell.source.strip() or 'nbdev_export(' in cell.source: return True
    d = extract_directives(cell, remove=False)
    return d.get('eval:', [''])[0].lower() == 'false' or bool(skip & d.keys())


def split_title(nb):
    "Give what follows `# Title` and its `>` line a cell of its own: nbdev's pages show nothing else of the title cell"
    i, c = next(((i, c) for i, c in enumerate(nb.cells) if c.cell_type == 'markdown'), (0, None))
    if c is None or not c.source.startswith('# '): return
    m = re.match(r'# [^\n]*\n+(?:> [^\n]*(?:\n|$))?(?:- [^\n]*:[^\n]*(?:\n|$))*', c.source)
    if m and (rest := c.source[m.end():].strip()):
        c.source = m[0].strip()
        nb.cells.insert(i+1, NbCell(i+1, dict(cell_type='markdown', id=f'{c.id}-text', metadata={}, source=rest)))


def write_atomically(text, path):
    "Write next to `path`, then rename: a reader sees the old file or the new one, never half of one"
    tmp = path.with_name(f'.{path.name}.{os.getpid()}')
    tmp.write_text(text, encoding='utf-8')
    os.replace(tmp, path)


def run(path, flags=()):
    "Run one notebook; True if every cell ran. A notebook with a cell that fails is left as it was"
    path = Path(path).resolve()
    os.chdir(path.parent)
    cfg, nb = get_config(), read_nb(path)
    split_title(nb)
    if any('default_exp' in extract_directives(c, remove=False) for c in nb.cells if c.cell_type == 'code'):
        nb_export(path, lib_path=cfg.lib_path)
    front = NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_
    if str2bool(front.get('skip_exec', False)):
        print(f'{path.name}: skip_exec, nothing run')
        return True
    skip = set(cfg.tst_flags.split()) - set(flags)
    sys.path.insert(0, str(cfg.config_path))
    os.environ |= dict(IN_TEST='1', PYTHONPATH=os.pathsep.join([str(cfg.config_path), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep))
    shell, start, times = CaptureShell(mpl_format='png'), time.time(), []
    for i, cell in enumerate(nb.cells):
        if skipped(cell, skip): continue
        t = time.time()
        shell._cell_idx = i
        cell.outputs = shell.run(cell.source)
        times.append((time.time() - t, i))
        if shell.exc:
            print(f'{path.name}, cell {i} failed; the notebook is left as it was\n{"-"*60}\n{cell.source}\n{"-"*60}', file=sys.stderr)
            print(shell.prettytb(fname=path.name), file=sys.stderr)
            return False
        for o in cell.outputs:
            if o.get('name') == 'stderr':
                print(f'{path.name}, cell {i} wrote to stderr (the tests refuse this):\n{"".join(o["text"])}', file=sys.stderr)
    _nbdev_clean(nb)
    write_atomically(nb2str(nb), path)
    slow = ', '.join(f'cell {i} {t:.1f} s' for t, i in sorted(times, reverse=True)[:3])
    print(f'{path.name}: {len(times)} cells in {time.time() - start:.1f} s (slowest: {slow})')
    return True


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('notebooks', nargs='+', help='one process each, so that no chapter sees what another one left behind')
    p.add_argument('--flags', default='', help='test flags to run as well, e.g. --flags "cuda slow"')
    a = p.parse_args()
    if len(a.notebooks) == 1: sys.exit(not run(a.notebooks[0], a.flags.split()))
    failed = [nb for nb in a.notebooks if subprocess.call([sys.executable, __file__, nb, '--flags', a.flags])]
    sys.exit(f'failed: {" ".join(failed)}' if failed else 0)
