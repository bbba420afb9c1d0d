"""Tools tell help and mistakes on the command line before they import what takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
SLOW = ("torch", "transformers", "megatron", "matplotlib")
# A command line with a folder or a file that does not exist, which the tool must name.
MISSING = {
    "chat.py": ["nowhere", "What?"],
    "convert_checkpoint.py": ["check", "--hf", "nowhere"],
    "evaluate.py": ["nowhere", "--tasks", "a.jsonl", "--out", "out"],
    "extend_tokenizer.py": ["--init.language", "nowhere", "--out", "out"],
    "inspect_dataset.py": ["nowhere"],
    "pack_dataset.py": ["--jsonl", "nowhere", "--tokenizer", ".", "--out", "out"],
    "plan_parallel.py": ["--stage", "1", "--model", "tiny", "--gpus", "8", "--data", "nowhere"],
    "plot_schedule.py": ["--stage", "1", "--config", "nowhere"],
    "report.py": ["mine=nowhere"],
    "score_dataset.py": ["--model", ".", "--jsonl", "nowhere", "--out", "out"],
    "show_parameters.py": ["--stage", "1", "--config", "nowhere"],
    "verify_export.py": ["--load", ".", "--hf", "nowhere", "--data", "."],
}
# Other mistakes, and what is told of them.
MISTAKES = (
    (
        ["chat.py", ".", "<image> or?", "--image", __file__, __file__],
        "the question has <image> 1",
    ),
    (["chat.py", ".", "what", "--video", "gone.mp4"], "gone.mp4: no such file or folder"),
    (["chat.py", ".", "what", "--video", __file__, __file__], "the question has <video> 0 times"),
    (["chat.py", ".", "what", "--frames", "3"], "--frames: 3 has no effect without --video"),
)
# Runs tools with their arguments, all in one process, and prints the status of each, what it
# printed and which of the slow modules were imported by then.
PROGRAM = """
import contextlib, io, json, runpy, sys
commands, names = map(json.loads, sys.argv[1:])
for tool, *words in commands:
    sys.argv = [tool, *words]
    told = io.StringIO()
    status = None
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            runpy.run_path(tool, run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    slow = [name for name in names if name in sys.modules]
    print(json.dumps([status, told.getvalue(), slow]))
"""


def test_help_and_mistakes_come_before_slow_imports(tmp_path: Path):
    assert sorted(MISSING) == TOOLS
    commands = [[name, "--help"] for name in TOOLS] + [[name, *MISSING[name]] for name in TOOLS]
    expected = ["usage:"] * len(TOOLS) + ["nowhere"] * len(TOOLS)
    for words, message in MISTAKES:
        commands.append(words)
        expected.append(message)
    asked = [[str(ROOT / "tools" / name), *words] for name, *words in commands]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked), json.dumps(SLOW)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    for command, message, line in zip(commands, expected, lines, strict=True):
        status, told, slow = json.loads(line)
        assert (status == 0) == (command[1] == "--help"), (command, told)
        assert message in " ".join(told.split()), (command, told)
        assert not slow, (command, slow)
