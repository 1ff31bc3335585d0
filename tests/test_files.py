"Files: the old content or the new one under the name, whatever happens in between; a library is compiled once"
import errno, os, random, resource, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
import pytest
from pi2nb import files
from pi2nb.files import compile_c, write_atomic

needs_compiler = pytest.mark.skipif(compile_c('int one(void) { return 1; }') is None, reason='no C compiler')


# ---- write_atomic

@pytest.mark.parametrize('data', [b'abc', bytearray(b'abc'), memoryview(b'abc'), [b'a', b'', b'bc'], iter([b'ab', b'c']), lambda f: f.write(b'abc')])
def test_what_can_be_written(tmp_path, data):
    f = tmp_path/'new'/'folder'/'x'
    assert write_atomic(f, data) == 3 and f.read_bytes() == b'abc' and os.listdir(f.parent) == ['x']


def test_nothing_can_be_written(tmp_path):
    for nothing in (b'', [], lambda f: None): assert write_atomic(tmp_path/'x', nothing) == 0 and (tmp_path/'x').read_bytes() == b''


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'), KeyboardInterrupt()])
@pytest.mark.parametrize('step', ['data', 'fsync', 'replace'])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch, error, step):
    f = tmp_path/'x'
    write_atomic(f, b'old')
    def fail(*a): raise error
    def parts(): yield b'new'; fail()
    if step != 'data': monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)): write_atomic(f, parts() if step == 'data' else b'new')
    assert f.read_bytes() == b'old' and os.listdir(tmp_path) == ['x']


def child(code, f, **kw): return subprocess.Popen([sys.executable, '-c', 'import sys\nfrom pi2nb.files import write_atomic\n' + code, f], stdout=subprocess.PIPE, text=True, **kw)


def test_a_file_system_that_takes_no_more(tmp_path): # a real write that fails in the middle: no file may grow past 100 KB
    write_atomic(f := tmp_path/'x', b'old')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
    said, _ = child("try: write_atomic(sys.argv[1], [bytes(30000)]*9)\nexcept OSError: print('refused')", f, preexec_fn=limit).communicate()
    assert said.split() == ['refused'] and f.read_bytes() == b'old' and os.listdir(tmp_path) == ['x']


def test_killed_at_any_moment(tmp_path):
    code = """
for i in range(10**9):
    write_atomic(sys.argv[1], (bytes([65+i%26])*2**14 for _ in range(16)))
    if not i: print(flush=True)
"""
    f, r, left = tmp_path/'x', random.Random(0), 0
    for _ in range(30):
        p = child(code, f)
        p.stdout.readline()
        time.sleep(r.random()*.02)
        p.kill(); p.communicate()
        data = f.read_bytes()
        assert len(data) == 2**18 and len(set(data)) == 1
        assert (n := len(os.listdir(tmp_path)) - 1) <= 1         # the next process swept up what this one was killed over
        left += n
    assert left                                                  # otherwise no kill ever hit a write, and this tested nothing
    write_atomic(f, b'end')
    assert f.read_bytes() == b'end' and os.listdir(tmp_path) == ['x']


def test_only_litter_of_this_file_is_swept(tmp_path):
    for n in ('.x.123.tmp', '.xy.123.tmp', '.x.tmp', 'x.tmp', '.[x].1.tmp'): (tmp_path/n).write_text('')
    write_atomic(tmp_path/'x', b'')
    assert sorted(os.listdir(tmp_path)) == ['.[x].1.tmp', '.x.tmp', '.xy.123.tmp', 'x', 'x.tmp']
    write_atomic(tmp_path/'[x]', b'')
    assert '.[x].1.tmp' not in os.listdir(tmp_path)


def test_many_writers_of_one_file(tmp_path):
    f = tmp_path/'x'
    def write(i):
        write_atomic(f, (bytes([i])*2**12 for _ in range(4)))
        data = f.read_bytes()
        return len(data) == 2**14 and len(set(data)) == 1
    with ThreadPoolExecutor(8) as pool: assert all(pool.map(write, range(200)))
    assert os.listdir(tmp_path) == ['x']


def test_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'flock', None)
    (tmp_path/'.x.1.tmp').write_text('')
    assert write_atomic(tmp_path/'x', b'abc') == 3 and sorted(os.listdir(tmp_path)) == ['.x.1.tmp', 'x']


# ---- compile_c

@needs_compiler
def test_library_is_kept(tmp_path, monkeypatch):
    source = 'int three(void) { return 3; }'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    build = compile_c.__wrapped__
    with ThreadPoolExecutor(4) as pool: assert [lib.three() for lib in pool.map(build, [source]*4)] == [3]*4   # at once
    kept, = (tmp_path/'pi2nb').iterdir()
    stamp = kept.stat().st_mtime_ns
    assert kept.suffix == '.so' and build(source).three() == 3 and kept.stat().st_mtime_ns == stamp


@needs_compiler
def test_library_without_a_place_to_keep_it(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'file'))
    assert compile_c.__wrapped__('int four(void) { return 4; }').four() == 4


@needs_compiler
def test_a_broken_library_is_not_used(tmp_path, monkeypatch):
    source = 'int five(void) { return 5; }'
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert compile_c.__wrapped__(source).five() == 5
    kept, = (tmp_path/'pi2nb').iterdir()
    kept.unlink(); kept.write_bytes(b'no library')
    assert compile_c.__wrapped__(source).five() == 5


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(files.shutil, 'which', lambda name: None)
    with pytest.warns(UserWarning, match='install one') as told: assert compile_c.__wrapped__('int six(void) { return 6; }') is None
    assert len(told) == 1
    monkeypatch.setenv('PI2NB_NO_COMPILER', '1')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert compile_c.__wrapped__('int six(void) { return 6; }') is None
