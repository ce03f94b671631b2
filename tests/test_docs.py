"""What the site and the README say is so: code runs, commands are there, every public name is in the reference."""

import ast
import doctest
import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fastclstm
from fastclstm import commands

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")] + sorted(
    page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts and "gallery" not in page.parts
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FENCE = re.compile(r"^(```+)([^\n]*)\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"# needs (.+)")
PACKAGES = {"torch": "torch", "keras": "keras", "jax": "jax", "onnx": "onnx", "xarray": "xarray", "h5": "h5py"}
"""What is imported where an extra is there; other words of a line "# needs" are imported as they are."""
SHOWN = {"text"}
"""Kinds of blocks that are neither code nor commands."""


def blocks(page, kind=None):
    """Return the fenced blocks of a page: kind, content, and the line that each begins in."""
    text = page.read_text()
    found = [(match[2].strip(), match[3], text.count("\n", 0, match.start()) + 1) for match in FENCE.finditer(text)]
    return found if kind is None else [block for block in found if block[0] == kind]


def needs(code):
    """Return the packages that a block says it needs."""
    told = NEEDS.match(code)
    if told is None:
        return []
    names = set(re.findall(r"fastclstm\[(\w+)\]", told[1]))
    names |= {word for word in told[1].split(",")[0].split() if word.isidentifier() and word not in ("pip", "install")}
    return sorted(PACKAGES.get(name, name) for name in names)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def with_marks(page):
    extra = any(needs(code) for _, code, _ in blocks(page, "python"))
    return pytest.param(page, id=name_of(page), marks=pytest.mark.extra if extra else ())


@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES if blocks(page, "python")])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    names, left_out = {"__name__": "__main__"}, []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for _, code, line in blocks(page, "python"):
        missing = [package for package in needs(code) if importlib.util.find_spec(package) is None]
        if "keras" in needs(code) and importlib.util.find_spec("torch") is None:
            missing.append("torch")
        if missing:
            left_out.append(f"line {line} needs {' and '.join(missing)}")
        elif ">>>" in code:
            examples = doctest.DocTestParser().get_doctest(code, names, name_of(page), str(page), line)
            told = []
            runner.run(examples, out=told.append, clear_globs=False)
            assert runner.failures == 0, "".join(told)
            names = examples.globs
        else:
            padded = "\n" * line + code  # so that a traceback has the page's own lines
            exec(compile(padded, str(page), "exec"), names)
    if left_out:
        pytest.skip(f"the rest ran; {'; '.join(left_out)}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_of_a_kind_that_nobody_looks_at(page):
    kinds = {kind for kind, _, _ in blocks(page)}
    directives = {kind for kind in kinds if kind.startswith("{")}
    assert kinds - directives <= {"python", "console", *SHOWN} | ({""} if page.parent == ROOT else set())
    assert not {kind for kind in directives if kind.startswith(("{code", "{doctest", "{testcode"))}


LINK = re.compile(r"\]\(([^)\s#]+)(?:#[\w-]+)?\)")


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent in (ROOT, ROOT / "bench")], ids=name_of)
def test_links_of_a_page_that_is_not_of_the_site_lead_somewhere(page):
    """Sphinx checks those of the site's own pages."""
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert [link for link in links if not (page.parent / link).exists()] == []


# Commands


def commands_of(page):
    for _, content, line in blocks(page, "console"):
        lines = content.replace("\\\n", " ").splitlines()
        assert all(each.startswith("$ ") for each in lines), f"{name_of(page)}:{line}: a line without $ is no command"
        for each in lines:
            yield from (part.strip() for part in each.partition("    #")[0].removeprefix("$ ").split("&&"))


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})
HELP = {}


def help_of(*command):
    """Return what a command says of its options."""
    if command not in HELP:
        if command[:1] == ("fastclstm",):
            told = CliRunner(env={"COLUMNS": "300", "NO_COLOR": "1"}).invoke(commands.app, [*command[1:], "--help"])
            assert told.exit_code == 0, told.exception or told.output
            HELP[command] = told.output
        else:
            run = subprocess.run([sys.executable, "-m", *command, "--help"], cwd=ROOT, capture_output=True, text=True)
            if missing := re.search(r"No module named '(\w+)'", run.stderr):
                pytest.skip(f"{' '.join(command)} needs {missing[1]}")
            assert run.returncode == 0, run.stderr
            HELP[command] = run.stdout
    return HELP[command]


def expect_options(words, told):
    for word in words:
        option = word.partition("=")[0]
        if re.match("--?[a-zA-Z]", option):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", told), f"there is no {option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_is_there(command):
    words = shlex.split(command)
    while "=" in words[0]:  # variables of the environment
        words.pop(0)
    if words[:2] == ["python", "-m"]:
        module, *words = words[2:]
        if module == "fastclstm":
            name, *words = words
            assert name in commands.COMMANDS
            expect_options(words, help_of("fastclstm", name))
        elif module.startswith("bench"):
            expect_options(words, help_of(module))
        else:
            assert module == "sphinx"
            assert any(line.startswith("sphinx") for line in PROJECT["optional-dependencies"]["docs"])
    elif words[:2] == ["pip", "install"]:
        for wanted in words[2:]:
            extras = re.findall(r"\[(.*)\]", wanted)
            assert all(extra in PROJECT["optional-dependencies"] for extra in ",".join(extras).split(",") if extra)
    elif words[0] == "pytest":
        expect_pytest(words[1:])
    else:
        known = {"ruff": ["check", "format"], "mypy": [""], "pre-commit": ["install"], "bash": [".ci/run"]}
        assert words[0] in known
        assert ([*words[1:], ""])[0] in known[words[0]]
    for word in words:
        if re.fullmatch(r"(tests|bench|examples|docs)/[\w/.-]+\.(py|md)", word) or word == ".ci/run":
            assert (ROOT / word).is_file(), f"there is no {word}"


def expect_pytest(words):
    declared = "".join(path.read_text() for path in (ROOT / "tests/conftest.py", ROOT / "bench/conftest.py"))
    usual = {"-n", "--dist", "-m", "-k", "--benchmark-json", "--benchmark-disable"}
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("-") or option in usual or f'"{option}"' in declared, f"there is no {option}"


# Reference


def public_names():
    """Yield every public name: by __all__, or what a module without one has of its own."""
    rooms = [fastclstm, *(importlib.import_module(f"fastclstm.{room}") for room in ROOMS)]
    rooms += [
        importlib.import_module(f"fastclstm.nn.{module.name}") for module in pkgutil.iter_modules(fastclstm.nn.__path__)
    ]
    rooms += [importlib.import_module(f"fastclstm.convert.{name}") for name in ("flax", "keras", "onnx", "torch")]
    for room in rooms:
        names = getattr(room, "__all__", None) or own(room)
        yield from (f"{room.__name__}.{name}" for name in names if not name.startswith("__"))
    for module in ("torch", "keras", "jax", "xarray"):  # read, not imported: their packages may not be there
        source = (ROOT / f"fastclstm/adapters/{module}.py").read_text()
        yield from (f"fastclstm.adapters.{module}.{name}" for name in told_by(ast.parse(source)))


def told_by(tree):
    """Return the public names of a module: those in its __all__, those imported on first use, or what it defines."""
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    if "__all__" in assigned:
        return ast.literal_eval(assigned["__all__"])
    if "__getattr__" in assigned:  # the last argument of `moved`: names, and the modules that they are in
        strings = [node.value for node in ast.walk(assigned["__getattr__"].args[-1]) if isinstance(node, ast.Constant)]
        return [string for string in strings if "." not in string]
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return [name for name in names if not name.startswith("_")]


def own(room):
    """Return the classes and functions that a module has, and has not from elsewhere."""
    return [
        name
        for name, value in vars(room).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", "") == room.__name__
    ]


def documented_names():
    """Yield what stands in the lists of the reference."""
    for page in sorted((ROOT / "docs/reference").glob("*.rst")):
        module, listing = "", False
        for line in page.read_text().splitlines():
            if told := re.match(r"\.\. (?:current)?module:: (\S+)", line):
                module = told[1]
            if line.strip() and not line.startswith(" "):
                listing = line.startswith(".. autosummary::")
            elif listing and re.fullmatch(r"   [\w.]+", line):
                yield f"{module}.{line.strip()}"


def thing(path):
    """Return what a path names, or the path where it cannot be imported here."""
    home, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(home), name)
    except (ImportError, ModuleNotFoundError):
        return path
    except AttributeError:
        return getattr(thing(home), name)


PARTS = {"adapters", "convert", "io", "nn"}
"""Modules of fastclstm whose modules are what is public."""
ROOMS = [name for name, home in fastclstm._HOME.items() if home == f"fastclstm.{name}" and name not in PARTS]
APART = {"DIALECTS", "GRU_DIALECTS", "OPSET"}
"""Tables and numbers, which the page on compatibility shows."""
INNER = {
    "fastclstm.adapters.jax.run", "fastclstm.convert.torch.state_dict_of", "fastclstm.convert.torch.layer_of",
    "fastclstm.nn.described", "fastclstm.nn.names", "fastclstm.nn.activations.is_bounded",
    "fastclstm.nn.activations.is_named",
    "fastclstm.nn.initializers.fans", "fastclstm.nn.losses.class_weights", "fastclstm.nn.losses.real_array",
    "fastclstm.nn.losses.without", "fastclstm.nn.metrics.counted", "fastclstm.nn.metrics.knows_valid",
}  # fmt: skip
"""What other rooms of the package call, and users need not."""


def test_every_public_name_is_in_the_reference():
    listed = list(documented_names())
    assert len(listed) == len(set(listed))
    there = [thing(path) for path in listed]  # an AttributeError: the reference has a name that is not there
    missing = [
        path for path in public_names()
        if path.rpartition(".")[2] not in {*PARTS, *ROOMS, *APART}
        and path not in INNER
        and path.rpartition(".")[0] not in INNER
        and path not in listed
        and not any(thing(path) is each for each in there)
    ]  # fmt: skip
    assert missing == []


def test_the_headline_is_that_of_the_landscape():
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "**all**" in line or "at least 1.3×" in line
    ]
    landscape = (ROOT / "docs/benchmarks/index.md").read_text()
    assert len(rows) == 2
    assert all(row in landscape for row in rows)


@pytest.mark.extra
def test_the_tables_of_the_site_link_to_what_is_public(monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    tables = importlib.import_module("tables")
    cells = [cell for function in tables.REGISTRIES.values() for row in function()[1] for cell in row]
    linked = set(re.findall(r":obj:`~fastclstm\.([\w.]+)`", " ".join(cells)))
    assert {"ConvLSTM2D", "Dense", "Activation"} <= linked
    assert linked <= set(fastclstm.__all__)


@pytest.mark.extra
def test_the_site_shows_what_constructors_take(monkeypatch):
    """Not what their __new__ looks at."""
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
    assert '"signatures"' in (ROOT / "docs" / "conf.py").read_text()
    shown, _ = importlib.import_module("signatures").of_constructor(
        None, "class", "fastclstm.Dropout", fastclstm.Dropout, None, "(*args, **options)", None
    )
    assert shown == "(rate, *, name=None, noise_shape=None, seed=None)"
