"""Blocks between `# == same: NAME (a b c) ==` and `# == end ==` are alike, byte for byte, in the files that they
name."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START, END = re.compile(rb"^ *# == same: (\w[\w -]*) \(([\w ]+)\) ==$"), b"# == end =="


def blocks(file):
    """{name: (the files it names, its bytes)}. A block that is not closed, or opened in another one, is an error."""
    found, name = {}, None
    for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
        where, start = f"{file.name}:{number}", START.match(line)
        if start:
            assert name is None, f"{where}: opened inside {name}"
            name, files, body = start[1].decode(), start[2].decode().split(), [line]
            assert name not in found, f"{where}: {name} a second time"
            assert file.stem in files, f"{where}: {name} does not name {file.stem}"
        elif line.strip() == END:
            assert name is not None, f"{where}: nothing to end"
            found[name], name = (files, b"\n".join(body)), None
        elif name:
            body.append(line)
        else:
            assert not line.lstrip().startswith(b"# == same"), f"{where}: not of the form # == same: NAME (a b) =="
    assert name is None, f"{file.name}: {name} has no end"
    return found


def check(root):
    """Compare all blocks of a folder's files; a file that is named and exists must have the block. Returns their
    number."""
    found = {file.stem: blocks(file) for file in root.glob("*.py")}
    for stem, own in found.items():
        for name, (files, body) in own.items():
            for other in files:
                if other in found:
                    assert name in found[other], f"{other}.py lacks the block {name} of {stem}.py"
                    assert found[other][name][1] == body, f"the block {name} differs in {stem}.py and {other}.py"
    return sum(map(len, found.values()))


def test_fenced_blocks_are_alike():
    assert check(ROOT) >= 4


def test_slas_is_grpo_in_all_but_its_own_functions():
    """All fenced blocks of the one are the other's, and between them they hold every function that both have but train
    and main."""
    grpo, slas = (blocks(ROOT / f"{name}.py") for name in ("grpo", "slas"))
    assert grpo == slas and set(grpo) == {"advantage", "log-prob", "policy loss", "KL", "sampler", "rollout"}
    fenced = b"".join(body for _, body in slas.values())
    functions = re.findall(rb"^def (\w+)", (ROOT / "grpo.py").read_bytes(), re.M)
    assert [name for name in functions if b"def " + name not in fenced] == [b"train", b"main"]


@pytest.mark.parametrize("a, b, problem", (
    ("# == same: x (a b) ==\n1\n# == end ==\n", "# == same: x (a b) ==\n2\n# == end ==\n", "differs"),
    ("# == same: x (a b) ==\n1\n# == end ==\n", "# == same: x (a b) ==\n1 \n# == end ==\n", "differs"),
    ("# == same: x (a b) ==\n1\n# == end ==\n", "# == same: x (b a) ==\n1\n# == end ==\n", "differs"),
    ("# == same: x (a b) ==\n1\n# == end ==\n", "1\n", "lacks"),
    ("# == same: x (a) ==\n1\n", "", "no end"),
    ("# == same: x (b) ==\n1\n# == end ==\n", "", "does not name"),
    ("# == same x (a b) ==\n1\n", "", "not of the form"),
    ("# == end ==\n", "", "nothing to end")))
def test_the_check_sees(a, b, problem, tmp_path):
    (tmp_path / "a.py").write_text(a)
    (tmp_path / "b.py").write_text(b)
    with pytest.raises(AssertionError, match=problem):
        check(tmp_path)


def test_a_named_file_may_be_yet_to_come(tmp_path):
    (tmp_path / "a.py").write_text("# == same: x (a later) ==\n1\n# == end ==\n")
    assert check(tmp_path) == 1
