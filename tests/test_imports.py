"""Which module may know which: arrows point one way, and nothing imports in a circle, not even inside a function."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import cupaged

PACKAGE = Path(cupaged.__file__).parent
ATTENTION = "cupaged.attention"
KERNEL_FILES = f"{ATTENTION}.kernels"


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(folder=PACKAGE):
    """Return what each module imports: modules of the package, and names of other packages; for types only, too."""
    files = {module_name(path): path for path in folder.rglob("*.py")}
    found = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found[name] |= imported(node, files) - {name}
    return found


def imported(node, modules):
    """Return the modules that a statement imports: of `from a import b`, a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    assert node.level == 0, "imports are absolute"
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in modules else node.module for name in names}


def circle(graph):
    """Return modules that import each other in a circle, the first once more at the end; None if there is none."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done or module not in graph:
            return None
        path.append(module)
        for other in sorted(graph[module]):
            if (found := visit(other)) is not None:
                return found
        done.add(path.pop())
        return None

    return next((found for module in sorted(graph) if (found := visit(module)) is not None), None)


def reach(module, graph):
    """Return all modules that a module imports, directly or through others."""
    found, todo = set(), [module]
    while todo:
        for other in graph.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def within(module, *rooms):
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_no_modules_import_each_other_in_a_circle():
    assert circle(imports()) is None


def test_a_circle_is_found_also_where_an_import_stands_in_a_function(tmp_path):
    (tmp_path / "a.py").write_text("from pkg import b\n")
    (tmp_path / "b.py").write_text("def f():\n    if True:\n        from pkg.c import name\n")
    (tmp_path / "c.py").write_text("import pkg.a\n")
    graph, modules = defaultdict(set), {"pkg.a", "pkg.b", "pkg.c"}
    for path in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            graph[f"pkg.{path.stem}"] |= imported(node, modules)
    assert circle(graph) == ["pkg.a", "pkg.b", "pkg.c", "pkg.a"]
    graph["pkg.c"] = set()
    assert circle(graph) is None


@pytest.mark.parametrize(
    ("rooms", "unknown"),
    [
        (["cupaged.memory"], ["cupaged.ops", ATTENTION, "cupaged.runtime", "cupaged.engine", "cupaged.bench", "cupy"]),
        (["cupaged.runtime"], ["cupaged.ops", ATTENTION, "cupaged.memory", "cupaged.engine", "cupaged.bench"]),
        (["cupaged.ops", "cupaged.kv_cache"], [ATTENTION, "cupaged.engine", "cupaged.bench"]),
        ([ATTENTION], ["cupaged.memory", "cupaged.engine", "cupaged.bench"]),
        (["cupaged.engine"], ["cupaged.bench"]),
        (["cupaged.config", "cupaged.layouts", "cupaged.errors"], ["cupaged.ops", ATTENTION, "cupaged.runtime"]),
    ],
    ids=lambda rooms: "+".join(rooms),
)
def test_arrows_point_one_way(rooms, unknown):
    modules = [module for module in imports() if within(module, *rooms)]
    assert modules
    wrong = {
        module: known
        for module in modules
        if (known := sorted(other for other in imports()[module] if within(other, *unknown)))
    }
    assert not wrong


def test_a_kernel_knows_a_call_and_no_other_kernel():
    graph = imports()
    files = [module for module in graph if within(module, KERNEL_FILES)]
    assert len(files) > 5
    for module in files:
        assert not [other for other in graph[module] if within(other, KERNEL_FILES)], module


def test_a_call_knows_no_kernel():
    graph = imports()
    for module in ("call", "mask", "logits"):
        known = {other for other in reach(f"{ATTENTION}.{module}", graph) if within(other, ATTENTION)}
        assert known <= {f"{ATTENTION}.{other}" for other in ("call", "mask", "logits")}
    for module in ("kernel", "plans"):
        assert not [other for other in reach(f"{ATTENTION}.{module}", graph) if within(other, KERNEL_FILES)]


def test_only_the_list_and_the_doors_know_kernels():
    knowing = {module for module, known in imports().items() if any(within(other, KERNEL_FILES) for other in known)}
    assert knowing == {f"{ATTENTION}.choose", f"{ATTENTION}.api"}


def test_the_memory_manager_works_without_cupy():
    """It reaches none of what runs kernels, through others either."""
    graph = imports()
    known = set().union(*(reach(module, graph) for module in graph if within(module, "cupaged.memory")))
    assert not [module for module in known if within(module, "cupaged.ops", ATTENTION, "cupaged.runtime", "cupy")]
