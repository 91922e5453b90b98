"""An import goes down only (docs/DESIGN.md, Layers), and the help does not wait for numpy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import extsnap

PACKAGE = Path(extsnap.__file__).resolve().parent
# Modules that every layer may import: they import at most each other.
SHARED = {"errors", "arrays", "sparsebits"}
# What each layer may import of extsnap, besides itself and the shared modules.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "arrays": set(),
    "sparsebits": {"arrays"},
    "ondisk": set(),
    "blockdev": {"ondisk"},
    "ext": {"ondisk", "blockdev"},
    "snapshot": {"ondisk", "blockdev", "ext"},
    "serve": {"ondisk", "blockdev", "ext", "snapshot"},
    "cli": {"ondisk", "blockdev", "ext", "snapshot", "serve"},
    "": {"ondisk", "blockdev", "ext", "snapshot"},  # the package itself: the Python API
}
# Modules that only these layers may know.
ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli"},
    "click": {"cli"},
    "construct": {"ondisk", "snapshot"},
    "socket": {"serve"},
    "subprocess": {"serve", "cli"},
}
# `ondisk` is bytes and values: it does no input or output.
NOT_IN_ONDISK = {"os", "io", "pathlib", "mmap", "fcntl", "tempfile", "shutil"}
HEAVY = ("numpy", "construct", "bitarray", "crc32c", "hypothesis", "asyncio")


def layer_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) > 1:
        return parts[0]
    return "" if parts[0] in ("__init__.py", "__main__.py") else Path(parts[0]).stem


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import in a file, wherever it stands; ``from a import b`` as ``a.b``."""
    found = []
    inside = ("extsnap", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(inside[: len(inside) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_layer_is_known():
    assert {layer_of(path) for path in FILES} <= set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    layer = layer_of(path)
    wrong = []
    for line, module in imports(path):
        top, _, rest = module.partition(".")
        if top == "extsnap":
            target = rest.split(".")[0]
            public = target in ("", "__version__", "open", "ExtsnapError") and layer in ("cli", "")
            shared = target in SHARED and layer not in SHARED
            if target not in ALLOWED[layer] | {layer} and not shared and not public:
                wrong.append(f"line {line}: {layer or 'extsnap'} imports {module}")
        elif top in ONLY_IN and layer not in ONLY_IN[top]:
            wrong.append(f"line {line}: {layer or 'extsnap'} imports {top}")
        elif layer == "ondisk" and top in NOT_IN_ONDISK:
            wrong.append(f"line {line}: ondisk imports {top}")
    assert not wrong


def loaded_after(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has after running some code."""
    script = f"import sys, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    {code}\n"
    script += "sys.stderr.write('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split("\n"))


@pytest.mark.parametrize(
    "code",
    [
        "import extsnap",
        "from extsnap.cli.app import main; main(['--help'])",
        "from extsnap.cli.app import main; main(['create', '--help'])",
        "from extsnap.cli.app import main; main(['--version'])",
    ],
)
def test_help_stays_light(code):
    modules = loaded_after(code)
    assert not [name for name in HEAVY if name in modules]
    assert not [name for name in modules if name.startswith(("extsnap.snapshot", "extsnap.ext", "extsnap.ondisk"))]


def test_the_map_names_every_module() -> None:
    """docs/DESIGN.md, Layers and modules."""
    text = (PACKAGE.parent / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    text = text[text.index("## Layers and modules") : text.index("## What ondisk offers")]
    layer, named = "", set()
    for line in text.splitlines():
        if line.startswith("    ") and line[4] != " ":
            layer = line.split()[0].rstrip("/")
            named.add(layer)
        named |= {(layer, word) for word in re.findall(r"[a-z_]+", line)}
    modules = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
    missing = [
        str(path.relative_to(PACKAGE))
        for path in modules
        if (path.stem if path.parent == PACKAGE else (layer_of(path), path.stem)) not in named
    ]
    assert missing == []
