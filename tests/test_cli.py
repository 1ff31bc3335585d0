"Mistakes at the command line: one sentence, exit 1, and nothing lost"
import shlex, subprocess, sys
import pytest
from pi2nb.cli import main

@pytest.mark.parametrize('line,sentence', [
    ('compress memory.txt -m m.q2bin', 'memory.txt does not exist; give another path'), # 'memory' in a name is no lack of memory
    ('quantize memory.gguf -o x.q2bin', 'there is no memory.gguf; give a folder or file that holds a model'),
    ('compress folder -m m.q2bin', 'folder is a folder; give a file'),
    ('compress taken -m m.q2bin -o taken', 'taken exists; move it away or give another name with -o'),
    ('quantize memory.gguf -o taken', 'taken exists; move it away or give another name with -o'),
    ('export m.q2bin -o taken', 'taken exists; move it away or give another name with -o'),
    ('compress taken -m m.q2bin -o taken/x', 'nothing can be written in taken; give another name with -o')])
def test_one_sentence_and_nothing_lost(line, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'taken').write_bytes(b'mine')
    (tmp_path/'folder').mkdir()
    monkeypatch.setattr(sys, 'argv', ['pi2', *shlex.split(line)])
    with pytest.raises(SystemExit) as e: main()
    out = capsys.readouterr()
    assert (e.value.code, out.out, out.err) == (1, '', f'pi2: {sentence}\n')
    assert (tmp_path/'taken').read_bytes() == b'mine' and sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'taken']

def test_a_new_process_knows_every_tokenizer():
    "what `pi2 quantize` writes is read by commands that never import chapter 64a"
    code = "import pi2nb.q2bn; from pi2nb.tokenizer import TOKENIZERS; print(*TOKENIZERS); import pi2nb.llama, pi2nb.compensate; print(*TOKENIZERS)"
    alone, together = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert set(alone.split()) == set(together.split()) >= {'bytes', 'score', 'byte-bpe'}
