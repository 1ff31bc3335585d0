"""The site, from the notebooks to `_docs`, without Quarto and without a network.

    python tools/site.py                  # stage, render strictly, check links
    python tools/site.py --katex DIR      # take KaTeX from DIR (the `dist` of npm's katex) instead of its CDN: formulas offline

nbdev stages the notebooks (it runs their import and export cells for the signature cards), this file makes the pages link
to each other and adds the *Open in Colab* line, smalldocs renders. With Quarto installed, `nbdev_docs` makes the same site.
"""
import argparse, json, os, re, shutil, subprocess, sys
from pathlib import Path

for k, v in dict(TQDM_DISABLE='1', MPLBACKEND='agg').items(): os.environ.setdefault(k, v)
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))
os.chdir(root)

import nbdev.doclinks, nbdev.quarto, nbdev.serve
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html


def refuse(why): sys.exit(f'tools/site.py: {why}')


def page_name(nb):
    "02_gray.ipynb -> gray.ipynb, the name that nbdev's links expect"
    return _nbpath2html(Path(nb)).with_suffix('.ipynb').name


def chapter_links(nb, cfg):
    "The line under a chapter's title: where to open it, where its source is"
    at = f'{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{nb}'
    n = nb.split('_')[0]
    return f'::: {{.chapter-links}}\nChapter {n} · [Open in Colab](https://colab.research.google.com/github/{at}), where you first run ' \
           f'`%pip install "pi2nb[demo,pretrained] @ git+{cfg.git_url}"` · [The notebook](https://github.com/{at})\n:::'


def relink(text, names, cfg):
    "Links between notebooks, doclinks and links out of `nbs/`, as the rendered site needs them"
    text = re.sub(r'\]\((?:\./)?([\w.-]+\.ipynb)(#[^)]*)?\)', lambda m: f']({names.get(m[1], m[1])}{m[2] or ""})', text)
    text = re.sub(r'\]\(\.\./([^)]+)\)', rf']({cfg.git_url}/blob/{cfg.branch}/\1)', text)
    return text.replace(f'{cfg.doc_host}{cfg.doc_baseurl}'.rstrip('/') + '/', '')


def relinked(x, names, cfg):
    "`relink` on a notebook's source or output, which may be a string or a list of lines"
    s = relink(x if isinstance(x, str) else ''.join(x), names, cfg)
    return s if isinstance(x, str) else s.splitlines(True)


def stage_page(path, names, cfg):
    "Rewrite one staged notebook and give it its page name"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': c['source'] = relinked(c['source'], names, cfg)
        for o in c.get('outputs', []):
            for k in ('text/markdown', 'text/html'):
                if k in o.get('data', {}): o['data'][k] = relinked(o['data'][k], names, cfg)
    front = nb['cells'][0]
    if front['cell_type'] != 'raw': refuse(f'{path.name} has no title; its first markdown cell must start with "# "')
    front['source'] = re.sub(r'^output-file:.*\n', '', ''.join(front['source']), flags=re.M)
    if path.name[0].isdigit():
        nb['cells'].insert(1, dict(cell_type='markdown', id='chapter-links', metadata={}, source=chapter_links(path.name, cfg)))
    path.unlink()
    path.with_name(names[path.name]).write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')


def stage(cfg, dest):
    "Notebooks -> `dest`, a folder that smalldocs can render"
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    proc = nbdev.serve.proc_nbs(n_workers=0, force=True)
    shutil.rmtree(dest, ignore_errors=True)
    shutil.move(proc, dest)
    pages = sorted(dest.glob('*.ipynb'))
    names = {p.name: page_name(p.name) for p in pages}
    if len(set(names.values())) < len(names): refuse(f'two notebooks would become one page: {sorted(names)}')
    for p in pages: stage_page(p, names, cfg)
    yml = (dest/'_quarto.yml').read_text(encoding='utf-8')
    (dest/'_quarto.yml').write_text(re.sub(r'[\w.-]+\.ipynb', lambda m: names.get(m[0], m[0]), yml), encoding='utf-8')


def own_katex(docs, katex):
    "Copy KaTeX into the site and point its pages there"
    if not (katex/'katex.min.js').is_file(): refuse(f'{katex} holds no katex.min.js; give the `dist` folder of the npm package katex')
    shutil.copytree(katex, docs/'site_libs'/'katex')
    for p in docs.rglob('*.html'):
        up = '../'*(len(p.relative_to(docs).parts)-1)
        p.write_text(re.sub(r'https://cdn\.jsdelivr\.net/npm/katex@[^/]+/dist', f'{up}site_libs/katex', p.read_text(encoding='utf-8')), encoding='utf-8')


def smalldocs(*args):
    if rc := subprocess.call([sys.executable, '-c', 'import sys; from smalldocs.cli import main; sys.exit(main())', *map(str, args)]):
        refuse(f'smalldocs {args[0]} found something to repair (above)')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--katex', type=Path, help="folder with KaTeX, for formulas without a network")
    p.add_argument('--keep', action='store_true', help='keep _stage/, the notebooks as smalldocs sees them')
    a = p.parse_args()
    cfg, dest = get_config(), root/'_stage'
    stage(cfg, dest)
    smalldocs('render', '--strict', dest)
    smalldocs('check', dest)
    shutil.rmtree(cfg.doc_path, ignore_errors=True)
    shutil.move(dest/cfg.doc_path.name, cfg.doc_path)
    if a.katex: own_katex(cfg.doc_path, a.katex)
    (cfg.doc_path/'.nojekyll').touch()
    if not a.keep: shutil.rmtree(dest)
    print(f'{len(list(cfg.doc_path.glob("*.html")))} pages in {cfg.doc_path.name}/')
