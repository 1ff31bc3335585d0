"""The rules of the house, as checks that name what breaks them.

    python tools/house.py      # every rule, every problem; exit 1 if there is one

Each rule is a function `root -> list of problems`. `tests/test_house.py` asserts that the lists are empty, and breaks
each rule once in a copy to see that it bites.
"""
import ast, json, os, re, shutil, subprocess, sys, tempfile
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import yaml
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.process import extract_directives

import readme as readme_tool

MAX_CELLS, MAX_LINES = 80, 20  # of a chapter (about 70, says the design); of an exported cell, directives, comments, blank lines and docments not counted
RULES = {}
_exports = {'export', 'exports', 'exporti'}


def rule(f): RULES[f.__name__] = f; return f


def settings(root):
    cfg = ConfigParser()
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']


def notebooks(root): return sorted((root/'nbs').glob('*.ipynb'))
def chapters(root): return [p for p in notebooks(root) if p.name[0].isdigit()]


def number(path): return path.stem.split('_', 1)[0]
def module(path): return path.stem.split('_', 1)[1]


@lru_cache(256)
def _cells(path, mtime):
    cells = read_nb(path).cells
    for c in cells: c.directives_ = extract_directives(c, remove=False) if c.cell_type == 'code' else {}
    return cells


def cells(path): return _cells(path, path.stat().st_mtime_ns)


def code(path):
    "(index, cell, parsed source) of every Python cell"
    for i, c in enumerate(cells(path)):
        if c.cell_type == 'code' and c.source.strip():
            src = re.sub(r'^\s*[%!].*$', 'pass', c.source, flags=re.M)
            yield i, c, ast.parse(src)


def imported(tree, package):
    "The modules of `package` that a piece of code imports, wherever the import stands"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name.split('.')[1] for a in n.names if a.name.startswith(f'{package}.'))
        elif isinstance(n, ast.ImportFrom):
            parts = (n.module or '').split('.')
            if n.level: parts = [package] + [p for p in parts if p]
            if parts[0] != package: continue
            yield from parts[1:2] if len(parts) > 1 else (a.name for a in n.names)


@rule
def floors(root):
    "A chapter imports only chapters with a smaller number"
    floor, bad, lib = {module(p): number(p) for p in chapters(root)}, [], settings(root)['lib_path']
    for p in chapters(root):
        for i, _, tree in code(p):
            for m in imported(tree, lib):
                if m in ('__version__', '_modidx'): continue
                if m not in floor: bad.append(f'{p.name}, cell {i}: imports {m}, which no chapter makes')
                elif floor[m] >= number(p): bad.append(f'{p.name}, cell {i}: imports {m} of floor {floor[m]}; only smaller numbers are allowed')
    return bad


@rule
def shape(root):
    "A chapter opens and ends as CONTRIBUTING.md says, and is one idea long"
    bad = []
    for p in chapters(root):
        say = lambda what: bad.append(f'{p.name}: {what}')
        cs, first = cells(p), cells(p)[0]
        if first.directives_.get('default_exp') != [module(p)]: say(f'the first cell must be `#| default_exp {module(p)}`')
        md = [c.source.strip() for c in cs if c.cell_type == 'markdown']
        lines = (md[0] if md else '').splitlines() + ['', '']
        if not lines[0].startswith('# '): say('the first markdown cell must start with `# Title`')
        if not lines[1].startswith('> '): say('the line after the title must be `> what it is, in one line`')
        if re.search(r'[$\\]', lines[1]): say('the `>` line becomes a docstring: no `$` and no backslash in it')
        if any(l.strip() and not l.startswith('- ') for l in lines[2:]):
            say('the title cell holds only `# Title` and the `>` line (the site drops the rest); start a new cell below, or run tools/run.py, which does')
        if len(' '.join(md[:2]).split()) < 25: say('after the title come two to four sentences: the question, what is built, what came before')
        heads = [h.strip() for s in md for h in re.findall(r'^## (.*)$', s, re.M)]
        if not heads or heads[-1].lower() != 'what we saw': say('the last section must be `## What we saw`')
        last = cs[-1]
        if not ('nbdev_export()' in last.source and 'hide' in last.directives_ and last.directives_.get('eval:') == ['false']):
            say('the last cell must be `#| hide`, `#| eval: false`, `import nbdev; nbdev.nbdev_export()`')
        if len(cs) > MAX_CELLS: say(f'{len(cs)} cells; about 70 are one idea, more than {MAX_CELLS} are two: split it')
    names = [module(p) for p in chapters(root)] + [number(p) for p in chapters(root)]
    return bad + [f'two chapters share {n}' for n in sorted(set(names)) if names.count(n) > 1]


@rule
def exported_cells(root):
    "Exported cells are short, and every public function and class says in one line what it is"
    bad = []
    for p in chapters(root):
        for i, c, tree in code(p):
            if not c.directives_.keys() & _exports: continue
            n = sum(bool(l.strip()) and not l.lstrip().startswith('#') for l in c.source.splitlines()) - _signatures(tree)
            if n > MAX_LINES: bad.append(f'{p.name}, cell {i}: {n} lines are exported, more than {MAX_LINES}; grow it with `@patch`')
            for d in tree.body:
                if isinstance(d, (ast.FunctionDef, ast.ClassDef)) and d.name[0] != '_' and not ast.get_docstring(d) and not _is_property(d):
                    bad.append(f'{p.name}, cell {i}: {d.name} has no docstring')
    return bad


def _signatures(tree):
    "How many lines docments add: a signature, or the fields of a class, count as one line, however many stand on lines of their own"
    fields = sum(max(0, sum(isinstance(x, ast.AnnAssign) for x in d.body) - 1) for d in ast.walk(tree) if isinstance(d, ast.ClassDef))
    return fields + sum(d.body[0].lineno - d.lineno - 1 for d in ast.walk(tree) if isinstance(d, ast.FunctionDef) and d.body[0].lineno > d.lineno)


def _is_property(d): return any(k.arg == 'as_prop' for x in d.decorator_list if isinstance(x, ast.Call) for k in x.keywords)


@rule
def imports_alone(root):
    "Imports have cells of their own: building the site runs every cell that imports something, and nothing else"
    bad = []
    for p in notebooks(root):
        for i, c, tree in code(p):
            if c.directives_.keys() & _exports or c.directives_.get('eval:') == ['false']: continue
            is_imp = lambda n: isinstance(n, (ast.Import, ast.ImportFrom))
            if any(map(is_imp, ast.walk(tree))) and not all(is_imp(n) or isinstance(n, ast.Pass) for n in tree.body):
                bad.append(f'{p.name}, cell {i}: imports and other code in one cell')
    return bad


@rule
def clean(root):
    "Notebooks are stored as nbdev_clean leaves them, and no two cells of one share an id"
    bad, cfg = [], settings(root)
    for p in notebooks(root):
        nb = read_nb(p)
        ids = [c['id'] for c in nb.cells]
        bad += [f'{p.name}: two cells share the id {i}; give one another' for i in sorted(set(ids)) if ids.count(i) > 1]
        keys = (cfg[f'allowed_{k}metadata_keys'].split() for k in ('', 'cell_'))
        clean_nb(nb, cfg.getboolean('clear_all'), *keys, cfg.getboolean('clean_ids'))
        if nb2str(nb) != p.read_text(encoding='utf-8'): bad.append(f'{p.name} is not clean; run nbdev_clean')
    return bad


_private = re.compile(r'/(home|Users)/\w+|/root/|/tmp/|/content/|/mnt/|site-packages|dist-packages|[A-Z]:\\\\?Users|\bat 0x[0-9a-f]{6,}')
_noise = re.compile(r'Traceback \(most recent call last\)|\w*Warning:|\x1b\[')


@rule
def outputs(root):
    "Stored outputs and sources hold no machine paths; outputs hold no warnings, tracebacks or terminal codes"
    bad = []
    for p in notebooks(root):
        for i, c in enumerate(cells(p)):
            if m := re.search(r'/home/\w+/|/root/', c.source): bad.append(f'{p.name}, cell {i}: machine path {m[0]} in the source')
            for o in c.get('outputs', []):
                if o['output_type'] == 'error': bad.append(f'{p.name}, cell {i}: an error is stored')
                if o.get('name') == 'stderr': bad.append(f'{p.name}, cell {i}: something written to stderr is stored')
                texts = [o.get('text', '')] + [v for k, v in o.get('data', {}).items() if k.startswith('text/')]
                text = ''.join(t if isinstance(t, str) else ''.join(t) for t in texts)
                bad += [f'{p.name}, cell {i}: {what} {m[0]!r} in an output' for what, pat in (('machine path or address', _private), ('noise', _noise))
                        if (m := pat.search(text))]
    return bad


@rule
def exports(root):
    "The package is what the notebooks export, byte for byte, index included, and there is nothing else in it"
    lib = settings(root)['lib_path']
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        (tmp/'nbs').mkdir()
        (tmp/lib).mkdir()
        shutil.copy(root/'settings.ini', tmp)
        shutil.copy(root/lib/'__init__.py', tmp/lib)
        for p in notebooks(root): shutil.copy(p, tmp/'nbs')
        env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
        r = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'], cwd=tmp, env=env, text=True, capture_output=True)
        if r.returncode: return [f'nbdev_export failed: {r.stderr.strip().splitlines()[-1]}']
        want, have = ({f.name: f.read_bytes() for f in (d/lib).glob('*.py')} for d in (tmp, root))
    advice = {(True, True): 'differs from its notebook; run nbdev_export, and edit the notebook, never the module',
              (True, False): 'was never exported; run nbdev_export', (False, True): 'comes from no notebook; remove it and run nbdev_export'}
    return [f'{lib}/{n} {advice[n in want, n in have]}' for n in sorted(want.keys() | have.keys()) if want.get(n) != have.get(n)]


@rule
def readme(root):
    "README.md and its pictures are what tools/readme.py makes of nbs/index.ipynb"
    return [f'{n} is out of date; run python tools/readme.py' for n in readme_tool.stale(root)[0]]


@rule
def site_config(root):
    "The sidebar lists every chapter once and in order; nbs/_quarto.yml is a symlink; nbs/nbdev.yml agrees with settings.ini"
    link, cfg, bad = root/'nbs'/'_quarto.yml', settings(root), []
    if not (link.is_symlink() and os.readlink(link) == '../_quarto.yml'): bad.append('nbs/_quarto.yml must be a symlink to ../_quarto.yml')
    text = (root/'_quarto.yml').read_text(encoding='utf-8')
    sections = yaml.safe_load(text)['website']['sidebar']['contents']
    pages = [p for s in sections for p in s.get('contents', [s])]
    listed = [p['href'] for p in pages]
    have = ['index.ipynb'] + [p.name for p in notebooks(root) if p.name != 'index.ipynb']
    if listed != have: bad.append(f'_quarto.yml: the sidebar must list the notebooks in order; off: {sorted(set(listed) ^ set(have)) or "the order"}')
    bad += [f'_quarto.yml: section "{s["section"]}" holds a chapter of another floor' for s in sections
            if 'section' in s and {p['href'][0] for p in s['contents']} != {s['section'][0]}]
    bad += [f'_quarto.yml: {p["href"]} is called "{p["text"]}"' for p in pages if p['href'][0].isdigit() and p['text'] != Path(p['href']).stem.replace('_', ' ', 1)]
    yml = yaml.safe_load((root/'nbs'/'nbdev.yml').read_text(encoding='utf-8'))
    want = dict(title=cfg['title'], description=cfg['description'], **{'site-url': cfg['doc_host'] + cfg['doc_baseurl'], 'repo-url': cfg['git_url'], 'repo-branch': cfg['branch']})
    if yml != {'project': {'output-dir': cfg['doc_path']}, 'website': want}: bad.append('nbs/nbdev.yml disagrees with settings.ini; run python tools/site.py')
    return bad


@rule
def versions(root):
    "settings.ini, the package and the newest CHANGELOG entry name one version"
    v = settings(root)['version']
    init = re.search(r'__version__ = "(.*)"', (root/'pi2nb'/'__init__.py').read_text())
    log = re.search(r'^## \[?v?([\d.]+)', (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    return [f'{name} says version {m and m[1]}, settings.ini says {v}' for name, m in (('pi2nb/__init__.py', init), ('CHANGELOG.md', log)) if not m or m[1] != v]


RECORD = 'hardware', 'versions', 'commit', 'seed', 'wall_s'


@rule
def records(root):
    "Every recorded run says on what, with what, from what and how long"
    bad = []
    for p in sorted((root/'nbs'/'runs').glob('*.json')):
        d = json.loads(p.read_text(encoding='utf-8'))
        missing = [k for k in RECORD if not (isinstance(d, dict) and (k in d or k == 'seed' and 'seeds' in d))]
        if missing: bad.append(f'nbs/runs/{p.name} does not say: {", ".join(missing)}')
    return bad


if __name__ == '__main__':
    root = Path(__file__).resolve().parent.parent
    found = {n: f(root) for n, f in RULES.items()}
    for n, bad in found.items(): print(f'{"ok " if not bad else "BAD"} {n}: {RULES[n].__doc__}', *(f'      {b}' for b in bad), sep='\n')
    sys.exit(any(found.values()))
