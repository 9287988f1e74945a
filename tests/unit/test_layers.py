"""A module imports only from rows above its own (DESIGN, section 5)."""

import ast
from pathlib import Path

import pytest

import mpisave

PACKAGE = Path(mpisave.__file__).parent

ROWS = (
    ("errors", "dtypes", "cuda_trial", "watchdog", "garbage", "device_checksum"),
    ("cupy_devices",),
    ("devices",),
    ("arrays", "checksum", "cuda_aware", "deadlines", "fileobject", "room", "staging"),
    ("threads",),
    ("comms", "storage", "source"),
    ("collective", "placement"),
    ("shards", "tree", "choosing"),
    ("metadata", "state_types"),
    ("merging",),
    # `arguments` asks `state_types` which names there are.
    ("arguments", "plan", "weave", "replicas", "report"),
    ("formats", "transport", "election"),
    ("parts", "wanted", "selection", "blocks"),
    ("to_device",),
    # What is read for all ranks is checked as what each reads for itself.
    ("reading", "finding", "skeleton"),
    ("sharing", "regrouping", "opening"),
    ("moving",),
    ("saving", "loading", "verifying"),
    ("bench", "testing"),
)
ROW_OF = {name: number for number, row in enumerate(ROWS) for name in row}
FOLDERS = ("formats", "transport", "bench")

# `mpisave` itself is no row: the names that it offers come from all over.
# saving writes the version into files, bench measures the public functions.
MAY_IMPORT_MPISAVE = {"saving": "in a function", "bench": "anywhere"}

# At run time, a folder with all that is in it. bench measures the same work done with
# these libraries.
MAY_IMPORT = {
    # cuda_trial is a program: a process of its own.
    "cupy": {"cupy_devices", "cuda_trial", "bench"},
    "h5py": {"formats.hdf5", "formats.hdf5_inspection", "bench"},
    "mpi4py": {
        *("deadlines", "comms", "placement", "transport"),
        *("sharing", "regrouping", "bench", "choosing", "cuda_trial"),
    },
    "ml_dtypes": {"dtypes"},
    "crc32c": {"checksum"},
}
PURE = (
    *("tree", "shards", "metadata", "merging", "state_types", "arguments"),
    *("plan", "weave"),
    *("replicas", "parts", "wanted", "selection", "checksum", "blocks"),
)
IMPURE = {
    *("mpi4py", "h5py", "cupy", "time", "socket", "tempfile", "threading"),
    *("mmap", "concurrent", "fcntl"),
}


def dotted(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
    dotted(path): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def imports_of(tree):
    """Yield each imported name, with whether it is typing's and whether a function's.

    ``from a import b`` counts as ``a.b``: it may be a module.
    """

    def walk(node, is_typing, is_local):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, is_typing, is_local
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", is_typing, is_local
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from walk(child, True, is_local)
            for child in node.orelse:
                yield from walk(child, is_typing, is_local)
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            for child in ast.iter_child_nodes(node):
                yield from walk(child, is_typing, is_local or inside)

    yield from walk(tree, False, False)


def imports_of_ours(tree):
    for name, is_typing, is_local in imports_of(tree):
        top, _, rest = name.partition(".")
        if top == "mpisave":
            yield rest, is_typing, is_local


def top_of(module):
    return module.partition(".")[0]


def row_of(module):
    return ROW_OF[top_of(module)]


def folder_of(module):
    return top_of(module) if top_of(module) in FOLDERS else None


def test_table_names_every_module_that_exists():
    existing = {top_of(name) for name in MODULES}

    assert existing == set(ROW_OF)


def test_folders_hold_no_folders_and_their_init_files_import_nothing():
    for folder in FOLDERS:
        init = PACKAGE / folder / "__init__.py"

        assert list(imports_of(ast.parse(init.read_text(encoding="utf-8")))) == []
        assert all(name.count(".") <= 1 for name in MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_rows_above_its_own(module):
    wrong = [
        name
        for name, is_typing, _ in imports_of_ours(MODULES[module])
        if name
        and not is_typing
        and not (folder_of(module) and folder_of(module) == folder_of(name))
        and row_of(name) >= row_of(module)
    ]

    assert wrong == []


@pytest.mark.parametrize("module", MODULES)
def test_package_itself_is_imported_only_where_the_table_says(module):
    found = [local for name, _, local in imports_of_ours(MODULES[module]) if not name]

    where = MAY_IMPORT_MPISAVE.get(top_of(module))
    assert where is not None or not found
    assert where != "in a function" or all(found)


@pytest.mark.parametrize(
    "module", [m for m in MODULES if top_of(m) in ("formats", "transport")]
)
def test_formats_and_transport_never_meet(module):
    met = {folder_of(name) for name, _, _ in imports_of_ours(MODULES[module])}

    assert met <= {None, folder_of(module)}


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_library_is_imported_only_by_its_border(library):
    importers = {
        module
        for module, tree in MODULES.items()
        for name, is_typing, _ in imports_of(tree)
        if name.partition(".")[0] == library and not is_typing
    }

    outside = {m for m in importers if not {m, top_of(m)} & MAY_IMPORT[library]}
    assert outside == set()


@pytest.mark.parametrize("module", MODULES)
def test_optional_library_is_imported_within_functions(module):
    at_the_top = {
        name.partition(".")[0]
        for name, is_typing, is_local in imports_of(MODULES[module])
        if not is_typing and not is_local
    }

    assert not at_the_top & {"cupy", "h5py", "mpi4py", "ml_dtypes"}


@pytest.mark.parametrize("module", PURE)
def test_pure_module_knows_no_mpi_no_files_and_no_clock(module):
    imported = {
        name.partition(".")[0]
        for name, is_typing, _ in imports_of(MODULES[module])
        if not is_typing
    }

    assert not imported & IMPURE


def test_imports_in_functions_and_under_type_checking_are_told_apart():
    source = (
        "import a\n"
        "if TYPE_CHECKING:\n    from b import c\nelse:\n    import d\n"
        "def f():\n    from e import g\n"
    )

    found = list(imports_of(ast.parse(source)))

    assert found == [
        ("a", False, False),
        ("b.c", True, False),
        ("d", False, False),
        ("e.g", False, True),
    ]
