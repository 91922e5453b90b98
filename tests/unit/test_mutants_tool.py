"""tools/mutants itself: it finds its lines, and tells caught from survived from not run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
from shares import taken

TOOL = Path(__file__).resolve().parents[2] / "tools" / "mutants"


@pytest.fixture(scope="module")
def mutants():
    loader = importlib.machinery.SourceFileLoader("extsnap_mutants_tool", str(TOOL))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    writing, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writing
    yield module
    del sys.modules[loader.name]


@pytest.fixture
def checkout(mutants, tmp_path, monkeypatch):
    """A tiny checkout with one function and one test."""
    (tmp_path / "extsnap").mkdir()
    (tmp_path / "extsnap" / "__init__.py").write_text("def double(x):\n    return 2 * x\n\n\ndef other():\n    pass\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "from extsnap import double\n\n\ndef test_double():\n    assert double(0) == 0 and double(3) == 6\n\n\n"
        "def test_weak():\n    assert double(0) == 0\n"
    )
    (tmp_path / "tools").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(mutants, "CHECKOUT", tmp_path)
    return tmp_path


def make(mutants, **changes):
    fields = {
        "name": "triple",
        "file": "extsnap/__init__.py",
        "old": "return 2 * x",
        "new": "return 3 * x",
        "breaks": "doubling",
        "tests": ("tests/test_it.py::test_double",),
    }
    return mutants.Mutant(**{**fields, **changes})


def test_the_list_fits_the_source_and_the_document(mutants):
    found = mutants.load(mutants.LIST)
    assert len(found) >= 10
    assert mutants.table(found) in (mutants.CHECKOUT / "docs" / "TESTING.md").read_text(), "run tools/mutants --list"


def test_as_many_shares_are_all(mutants):
    found = [mutants.share(list(range(10)), 3, number) for number in (7, 8, 9)]
    assert sorted(name for part in found for name in part) == list(range(10))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_ci_takes_a_part_and_a_sabotage_has_all(monkeypatch):
    for variable, length in (("EXTSNAP_CI", 4), ("EXTSNAP_MUTANT", 12)):
        monkeypatch.delenv("EXTSNAP_MUTANT", raising=False)
        monkeypatch.delenv("EXTSNAP_CI", raising=False)
        assert len(taken(range(12), 3)) == 12
        monkeypatch.setenv("EXTSNAP_CI", "true")
        monkeypatch.setenv(variable, "1")
        assert len(taken(range(12), 3)) == length


def test_lines_are_replaced_with_their_indentation(mutants):
    source = "if a:\n    b()\n    c()\nd()\n"
    assert make(mutants, old="b()", new="x()\ny()").apply(source) == "if a:\n    x()\n    y()\n    c()\nd()\n"
    assert make(mutants, old="b()\nc()", new="x()").apply(source) == "if a:\n    x()\nd()\n"


@pytest.mark.parametrize("source", ["", "return 2 * x\nreturn 2 * x\n", "return 2 * x  # changed\n"])
def test_a_line_that_is_not_there_once_is_an_error(mutants, source):
    with pytest.raises(ValueError, match="not once"):
        make(mutants).apply(source)


def test_caught_survived_and_not_run(mutants, checkout):
    assert mutants.judge(make(mutants), 60)[1]
    assert "SURVIVED" in mutants.judge(make(mutants, tests=("tests/test_it.py::test_weak",)), 60)[2]
    _, caught, how = mutants.judge(make(mutants, tests=("tests/test_it.py::test_none",)), 60)
    assert not caught
    assert "did not run" in how
    _, caught, how = mutants.judge(make(mutants, new="return (", tests=("tests/test_it.py",)), 60)
    assert not caught
    assert "return 2 * x" in (checkout / "extsnap" / "__init__.py").read_text()


def test_a_hang_is_caught(mutants, checkout):
    caught, how = mutants.judge(make(mutants, new="while True: pass"), 4)[1:]
    assert caught
    assert "hang" in how
