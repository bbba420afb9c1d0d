"""The rules that keep the code readable. Each rule is a function from sources to complaints, and is
shown a bad file of its own first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.style.source import Source, folder_of, reaches, sources

ORDER = (
    "config",
    "config/recipes",
    "config/checks",
    "io",
    "checkpoint",
    "planner",
    "data/records",
    "data/text",
    "data",
    "data/store",
    "data/images",
    "data/packing",
    "data/loading",
    "data/inspect",
    "parallel",
    "model/triton_kernels",
    "model",
    "model/connector",
    "model/objective",
    "convert/weights",
    "convert/weights/families",
    "convert",
    "convert/hf",
    "evaluate",
    "report",
    "health",
    "train",
    "score",
)
# Folders whose modules import each other: a table and the rows that it is made of.
TOGETHER = {
    frozenset(("config", "config/recipes")),
    frozenset(("convert/weights", "convert/weights/families")),
    frozenset(("model", "model/connector")),
    frozenset(("model", "model/objective")),
}
# Stands above the folders of settings alone: `planner` needs no torch, no data and no parallel
# code.
IMPORTS_ONLY = {"megavlm/planner/": ("megavlm.planner", "megavlm.config")}
# The offline jobs, and the modules that may import them beside scripts: what training needs of
# packing must be somewhere else. One door leads to it, which the entry script alone opens.
FOR_SCRIPTS = {
    "megavlm.data.packing": ("megavlm.data.packing", "megavlm.score", "megavlm.pack_first"),
    "megavlm.score": ("megavlm.score",),
    "megavlm.pack_first": (),
}

# Who may import what: each dependency has one door, so that another version changes one place.
DOORS = {
    "megatron.core.parallel_state": {"megavlm/parallel/process_groups.py"},
    "transformer_engine": {
        "megavlm/model/transformer_engine.py",
        "megavlm/model/precision.py",
        "megavlm/health/doctor.py",
    },
    "triton": {"megavlm/model/triton_kernels/"},
    "transformers": {
        "megavlm/data/text/tokenizer.py",
        "megavlm/data/text/chat_tokens.py",
        "megavlm/convert/",
    },
    "PIL": {"megavlm/data/images/"},
    "av": {"megavlm/data/images/container.py"},
    "pyarrow": {"megavlm/data/records/parquet_reader.py"},
    "jsonargparse": {"megavlm/config/"},
    "huggingface_hub": {"megavlm/config/hub_cache.py", "megavlm/convert/hf/push.py"},
    "megatron.training": set(),
}
# Folders without torch, and the files in them that make tensors.
WITHOUT_TORCH = ("megavlm/config/", "megavlm/data/")
TORCH_IN_DATA = {"megavlm/data/loading/batch.py", "megavlm/data/loading/loader.py"}
# Puts stand-ins for CUDA's functions into torch and megatron-core, by name.
MAY_SET = {"megavlm/parallel/cpu_backend.py"}
# The training loop reads like the algorithm, from top to bottom.
LONG_FUNCTIONS = {"megavlm/train/loop.py": 120}
# None at the moment; a new entry needs its reason beside it.
LONG_FILES: dict[str, int] = {}


def import_order(files: Iterable[Source]) -> Iterator[str]:
    """Report imports of folders that come later in the order."""
    files = list(files)
    modules = [file.module for file in files]
    for file in files:
        for line, name in file.imports():
            target = folder_of(name, modules)
            if (
                file.folder in ORDER
                and target in ORDER
                and frozenset((file.folder, target)) not in TOGETHER
            ):
                if ORDER.index(target) > ORDER.index(file.folder):
                    yield (
                        f"{file.path}:{line}: {file.folder} imports {name}, but {' < '.join(ORDER)}"
                    )
            elif file.folder and name.split(".")[0] in (
                "tools",
                "tests",
                "examples",
                "pretrain_vlm",
            ):
                yield f"{file.path}:{line}: the package imports {name}"


def narrow_imports(files: Iterable[Source]) -> Iterator[str]:
    """Report imports of the planner beside config, and of packing by anything but
    itself and its door.
    """
    for file in files:
        for line, name in file.imports():
            for folder, allowed in IMPORTS_ONLY.items():
                own = name.split(".")[0] in ("megavlm", "torch", "megatron")
                if (
                    file.path.startswith(folder)
                    and own
                    and not any(reaches(name, base) for base in allowed)
                ):
                    yield f"{file.path}:{line}: imports {name}; only {', '.join(allowed)} may be"
            if any(
                reaches(name, job) and not any(reaches(file.module, own) for own in allowed)
                for job, allowed in FOR_SCRIPTS.items()
            ):
                yield f"{file.path}:{line}: imports {name}, which is for scripts alone"


def known_folders(files: Iterable[Source]) -> Iterator[str]:
    """Every folder has its place in the order, and none is a drawer for everything."""
    for file in files:
        if file.folder and file.folder not in ORDER:
            yield f"{file.path}: folder {file.folder} has no place in {' < '.join(ORDER)}"
        for part in file.path.removesuffix(".py").split("/"):
            if re.fullmatch(r"(utils?|helpers?|common|misc|tools)", part):
                yield f"{file.path}: {part} says nothing about what is in it"


def cycles(files: Iterable[Source]) -> Iterator[str]:
    """Modules do not import each other in a circle."""
    files = list(files)
    modules = {file.module for file in files}

    def target(name: str) -> str | None:
        return (
            name
            if name in modules
            else (parent if (parent := name.rpartition(".")[0]) in modules else None)
        )

    graph = {
        file.module: {target(name) for _, name in file.imports()} - {None, file.module}
        for file in files
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield " -> ".join(error.args[1])


def one_door(files: Iterable[Source]) -> Iterator[str]:
    """Report imports of a dependency anywhere but at its door."""
    for file in files:
        for line, name in file.imports():
            for dependency, doors in DOORS.items():
                if reaches(name, dependency) and not any(
                    file.path.startswith(door) for door in doors
                ):
                    yield (
                        f"{file.path}:{line}: imports {name}; only"
                        f" {', '.join(sorted(doors)) or 'nobody'} may"
                    )


def no_torch(files: Iterable[Source]) -> Iterator[str]:
    """Report torch and megatron-core in configuration and data, but for the tensors of a batch."""
    for file in files:
        if file.path.startswith(WITHOUT_TORCH) and file.path not in TORCH_IN_DATA:
            for line, name in file.imports():
                if reaches(name, "torch") or reaches(name, "megatron"):
                    yield f"{file.path}:{line}: imports {name}"


def offline(files: Iterable[Source]) -> Iterator[str]:
    """Report imports of torch that the command line or the packer reaches, however far: both start
    without torch.
    """
    by_module = {file.module: file for file in files}
    reached = [
        module
        for module in ("megavlm.config.cli", "megavlm.data.packing.job")
        if module in by_module
    ]
    for module in reached:
        for line, name in by_module[module].imports():
            if reaches(name, "torch"):
                yield f"{by_module[module].path}:{line}: imports {name}"
            reached += [
                found
                for found in (name, name.rpartition(".")[0])
                if found in by_module and found not in reached
            ]


def no_waiting(files: Iterable[Source]) -> Iterator[str]:
    """Report calls in the step that wait for the device."""
    for file in files:
        in_step = file.path.startswith("megavlm/model/") or file.path == "megavlm/train/step.py"
        if in_step:
            for line, name in file.calls():
                if name in ("item", "cpu", "tolist"):
                    yield f"{file.path}:{line}: .{name}() waits for the device"


def file_length(files: Iterable[Source]) -> Iterator[str]:
    """Files are short, scripts shorter."""
    for file in files:
        usual = 140 if re.fullmatch(r"tools/[^/]+\.py", file.path) else 400
        most = LONG_FILES.get(file.path, usual)
        if (lines := file.text.count("\n")) > most:
            yield f"{file.path}: {lines} lines; {most} are allowed"


def function_length(files: Iterable[Source]) -> Iterator[str]:
    """Functions are short."""
    for file in files:
        most = LONG_FUNCTIONS.get(file.path, 60)
        yield from (
            f"{file.path}: {name} has {lines} lines; {most} are allowed"
            for name, lines in file.functions()
            if lines > most
        )


def unfinished(files: Iterable[Source]) -> Iterator[str]:
    """Nothing is left for later in the code."""
    for file in files:
        for number, line in enumerate(file.text.splitlines(), start=1):
            if re.search(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b", line):
                yield f"{file.path}:{number}: {line.strip()}"


def guessing(files: Iterable[Source]) -> Iterator[str]:
    """Types say what an object has; nobody asks it."""
    for file in files:
        for line, name in file.calls():
            if name in ("hasattr", "setattr", "globals", "locals") and file.path not in MAY_SET:
                yield f"{file.path}:{line}: {name}"
    asked = [
        f"{file.path}:{line}" for file in files for line, name in file.calls() if name == "getattr"
    ]
    if len(asked) > 12:
        yield f"getattr {len(asked)} times, 12 are allowed: {', '.join(asked)}"


def no_globals(files: Iterable[Source]) -> Iterator[str]:
    """Functions do not change their module."""
    for file in files:
        for number, line in enumerate(file.text.splitlines(), start=1):
            if re.match(r"\s+global \w", line):
                yield f"{file.path}:{number}: {line.strip()}"


def stage_names(files: Iterable[Source]) -> Iterator[str]:
    """Report names of stages outside their recipe, whose readers ask it what a stage does."""
    name = "1" + ".5"
    for file in files:
        if not file.path.startswith("megavlm/config/recipes/"):
            yield from (
                f"{file.path}:{line}: {text!r}"
                for line, text in file.texts()
                if re.search(rf"(?<![\d.]){re.escape(name)}(?!\d)", text)
            )
            mentions = re.finditer(
                rf"\bstages?\W+(\S+\W+(and|or|to)\W+)?{re.escape(name)}", file.text, re.IGNORECASE
            )
            yield from (f"{file.path}: says {mention[0]!r}" for mention in mentions)


PACKAGE = ("megavlm",)
EVERYTHING = ("megavlm", "tools", "tests", "examples")

# The rule, where it holds, and a file that breaks it.
RULES: list[tuple[Callable[[Iterable[Source]], Iterator[str]], tuple[str, ...], str, str]] = [
    (
        import_order,
        PACKAGE,
        "megavlm/data/bad.py",
        "def late():\n    from megavlm.model import vlm\n",
    ),
    (import_order, PACKAGE, "megavlm/config/bad.py", "import megavlm.data.store.pack_format\n"),
    (
        import_order,
        PACKAGE,
        "megavlm/train/bad.py",
        "from ..model.vlm import x\nfrom tests.style import source\n",
    ),
    (
        import_order,
        PACKAGE,
        "megavlm/data/store/bad.py",
        "from megavlm.data.loading import order\n",
    ),
    (narrow_imports, PACKAGE, "megavlm/planner/bad.py", "from megavlm.data.sample import Sample\n"),
    (narrow_imports, PACKAGE, "megavlm/planner/bad.py", "def late():\n    import torch\n"),
    (
        narrow_imports,
        PACKAGE,
        "megavlm/train/bad.py",
        "from megavlm.data.packing.job import pack_dataset\n",
    ),
    (
        narrow_imports,
        PACKAGE,
        "megavlm/train/bad.py",
        "from megavlm.pack_first import pack_annotations\n",
    ),
    (
        narrow_imports,
        PACKAGE,
        "megavlm/train/bad.py",
        "from megavlm.score.job import score_dataset\n",
    ),
    (known_folders, ("megavlm", "tests", "examples"), "megavlm/shapes/bad.py", ""),
    (known_folders, ("megavlm", "tests", "examples"), "megavlm/data/utils.py", ""),
    (cycles, PACKAGE, "megavlm/data/bad.py", "def late():\n    from megavlm.data.worse import y\n"),
    (one_door, PACKAGE, "megavlm/model/bad.py", "from megatron.core import parallel_state\n"),
    (one_door, PACKAGE, "megavlm/model/vlm.py", "import transformer_engine.pytorch as te\n"),
    (one_door, PACKAGE, "megavlm/train/bad.py", "from transformers import AutoTokenizer\n"),
    (one_door, PACKAGE, "megavlm/data/bad.py", "from PIL.Image import open\n"),
    (one_door, PACKAGE, "megavlm/train/launch.py", "from megatron.training import get_args\n"),
    (no_torch, PACKAGE, "megavlm/config/bad.py", "import torch.nn\n"),
    (no_torch, PACKAGE, "megavlm/data/bad.py", "def late():\n    from megatron.core import x\n"),
    (offline, PACKAGE, "megavlm/data/packing/job.py", "import megavlm.data.worse\n"),
    (no_waiting, PACKAGE, "megavlm/model/bad.py", "def f(loss):\n    return loss.sum().item()\n"),
    (no_waiting, PACKAGE, "megavlm/train/step.py", "def f(loss):\n    return loss.cpu()\n"),
    (file_length, EVERYTHING, "tests/bad.py", "x = 1\n" * 401),
    (file_length, EVERYTHING, "tools/bad.py", "x = 1\n" * 141),
    (function_length, EVERYTHING, "megavlm/data/bad.py", "def f():\n" + "    x = 1\n" * 60),
    (function_length, EVERYTHING, "megavlm/train/loop.py", "def f():\n" + "    x = 1\n" * 120),
    (unfinished, EVERYTHING, "megavlm/data/bad.py", "x = 1  # TO" + "DO later\n"),
    (guessing, PACKAGE, "megavlm/data/bad.py", "x = hasattr(str, 'lower')\n"),
    (guessing, PACKAGE, "megavlm/data/bad.py", "x = getattr(str, 'lower')\n" * 13),
    (no_globals, PACKAGE, "megavlm/data/bad.py", "def f():\n    global x\n    x = 1\n"),
    (
        stage_names,
        (*PACKAGE, "tools"),
        "megavlm/train/bad.py",
        'if stage == "1' + '.5":\n    pass\n',
    ),
    (
        stage_names,
        (*PACKAGE, "tools"),
        "megavlm/train/bad.py",
        '"""Runs stages 1 and 1' + '.5."""\n',
    ),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"), [(rule, path, text) for rule, _, path, text in RULES]
)
def test_the_rule_sees_a_bad_file(rule: Callable, path: str, text: str):
    partners = [
        Source("megavlm/data/worse.py", "import torch\nfrom megavlm.data import bad\n"),
        *(Source(f"megavlm/{folder}/__init__.py", "") for folder in ORDER),
        *(Source(f"megavlm/{name}.py", "") for name in ("model/vlm", "data/loading/order")),
    ]
    partners = [partner for partner in partners if partner.path != path]
    assert list(rule([Source(path, text), *partners])), "the rule lets this through"


@pytest.mark.parametrize(
    ("rule", "folders"),
    sorted({(rule, folders) for rule, folders, _, _ in RULES}, key=lambda pair: pair[0].__name__),
)
def test_the_project_keeps_the_rule(rule: Callable, folders: tuple[str, ...]):
    complaints = list(rule(sources(*folders)))
    assert not complaints, f"{rule.__doc__}\n" + "\n".join(complaints)


def test_the_files_are_found():
    paths = {source.path for source in sources(*EVERYTHING)}
    assert {"megavlm/config/schema.py", "tests/style/source.py"} <= paths
    assert {source.folder for source in sources("megavlm")} <= {"", *ORDER}
