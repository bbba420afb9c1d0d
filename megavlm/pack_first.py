"""Pack annotation files that ``--data.train`` and ``--data.valid`` name, at their first use, into a
folder that the next run finds. This is the one door from training to the packing job, for
``pretrain_vlm.py`` alone.

All of it happens before the process group exists, so no timeout of a collective runs meanwhile. The
first process of each machine packs; those of several machines take turns at the lock of the cache
folder if they share it, and the first one's packs are everybody's.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from megavlm import job_checks
from megavlm.config import torchrun
from megavlm.config.recipes import recipe
from megavlm.config.schema import ANY, Config
from megavlm.config.stages import is_of_start, starting_like
from megavlm.data.records.readers import is_annotation
from megavlm.io import atomic
from megavlm.io.remote import file_state, is_remote, open_file
from megavlm.model_source import stated_tiles

if TYPE_CHECKING:
    from megavlm.data.packing.settings import Job

# What a run decides, or what is for the tool alone.
OWN_OPTIONS = ("recipe", "stage", "model", "meta", "jsonl", "out", "dry_run", "json", "picture")
READ_BYTES = 2**20
# Who waits looks this often at first, then less and less: a thousand processes may wait, and one
# file system answers them all.
POLL_SECONDS = 0.5
MOST_POLL_SECONDS = 10.0
POLL_SHARE = 0.05
LOG_INTERVAL_SECONDS = 30.0
# Without anyone who packs, a process waits so long for the first one of its machine to begin.
PATIENCE_SECONDS = 300.0
# Of the folder of a tokenizer, which may hold a model's weights too.
TOKENIZER_ENDINGS = (".json", ".model", ".txt", ".jinja")


def problems(config: Config, world_size: int) -> list[str]:
    """Return what ``job_checks.problems`` finds, and what keeps annotation files from being packed.
    Only a run that names one waits for the packer's imports.
    """
    found = job_checks.problems(config, world_size)
    annotations = _annotations(config)
    for option in ("packing", "cache"):
        if vars(config.data)[option] and not annotations:
            found.append(
                f"--data.{option} has no effect: neither --data.train nor --data.valid names"
                " annotations"
            )
    for flag, name in annotations:
        try:
            _job(config, name).check()
        except (ValueError, OSError) as error:
            found.append(f"{flag} {name}: {error}")
    return found


def pack_annotations(config: Config, first: Config | None = None) -> Config:
    """Return the configuration with folders of packs in the place of annotation files. Those that
    no earlier run has packed are packed now. An error ends the process with status 2.

    Args:
        config: the run of a stage.
        first: the run of the first stage of the command, whose tokenizer is that of all; none:
            this one.
    """
    if not _annotations(config):
        return config
    data = config.data
    is_first = first is None or config is first
    asked = config if is_first else starting_like(config, first)
    try:
        train = ",".join(_folder(asked, name) for name in data.train_folders)
        valid = _folder(asked, data.valid)
    except (ValueError, OSError, RuntimeError) as error:
        _refuse(f"error: packing for --data.train and --data.valid: {error}")
    packed = dataclasses.replace(data, train=train, valid=valid, packing="", cache="")
    asked = dataclasses.replace(asked, data=packed)
    found = job_checks.problems(asked, torchrun.world_size())
    if found := [problem for problem in found if is_first or not is_of_start(problem)]:
        _refuse("\n  ".join(["error: the packs do not fit the configuration:", *found]))
    return dataclasses.replace(config, data=packed)


def _refuse(text: str) -> NoReturn:
    torchrun.refuse(text, is_printed=torchrun.local_rank() == 0)
    raise SystemExit(2)


def _annotations(config: Config) -> list[tuple[str, str]]:
    """Return the flag and the name of what has to be packed."""
    named = [
        *(("--data.train", name) for name in config.data.train_folders),
        ("--data.valid", config.data.valid),
    ]
    return [(flag, name) for flag, name in named if is_annotation(name)]


def _folder(config: Config, name: str) -> str:
    """Return the folder of packs that a name means: itself, or what its annotations become."""
    if not is_annotation(name):
        return name
    job = _job(config, name)
    cache = Path(config.data.cache or _home()).expanduser().absolute()
    out = cache / f"{Path(name).stem}-{_key(job)}"
    cache.mkdir(parents=True, exist_ok=True)
    job = dataclasses.replace(job, out=str(out))
    with open(out.with_name(f"{out.name}.lock"), "a+", encoding="utf-8") as lock:
        _pack_or_wait(lock, out, lambda: _pack(job, name))
    return str(out)


def _pack_or_wait(lock: IO[str], out: Path, pack: Callable[[], None]) -> None:
    """Return when a folder is there: let the first process of a machine pack, as soon as no other
    one does, and the others wait for it.

    Raises:
        RuntimeError: the first process of this machine does not begin to pack.
    """
    packs = torchrun.local_rank() == 0
    told = -LOG_INTERVAL_SECONDS
    begun = time.monotonic()
    idle_since = begun
    while not out.exists():
        if _lock(lock, fcntl.LOCK_EX if packs else fcntl.LOCK_SH):
            try:
                if packs and not out.exists():
                    lock.truncate(0)
                    lock.write(torchrun.name_of_rank())
                    lock.flush()
                    pack()
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
            if time.monotonic() - idle_since > PATIENCE_SECONDS:
                raise RuntimeError(
                    f"the first process of this machine has not begun to pack {out} for"
                    f" {PATIENCE_SECONDS:.0f} s; what it says tells why"
                )
        else:
            idle_since = time.monotonic()
            if packs and idle_since - told > LOG_INTERVAL_SECONDS:
                told = idle_since
                lock.seek(0)
                _log(f"waits for {lock.read() or 'another process'}, which packs into {out}")
        if not out.exists():
            waited = time.monotonic() - begun
            time.sleep(max(POLL_SECONDS, min(POLL_SHARE * waited, MOST_POLL_SECONDS)))


def _lock(lock: IO[str], kind: int) -> bool:
    """Try to take a lock, which ends with its process, however that ends.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(
            f"{lock.name}: the file system has no locks ({error.strerror}); name a folder on"
            " another one: --data.cache"
        ) from None
    return True


def _pack(job: Job, name: str) -> None:
    """Pack a dataset, or resume the packing of a run that was killed."""
    from megavlm.data.packing.job import pack_dataset
    from megavlm.data.packing.work_folder import JOB_NAME

    before = atomic.read_json(job.partial / JOB_NAME)
    sources = json.loads(json.dumps(job.identity("")))["sources"]
    if before is not None and before.get("sources") != sources:
        # The files have been written again since. Their content is the same, by the folder's name,
        # but the packer goes by their times.
        shutil.rmtree(job.partial)
    begins = "resumes packing" if job.partial.exists() else "packs"
    _log(f"{begins} {name} into {job.out}; the other ranks wait")
    report = pack_dataset(job)
    print(report.text(), file=sys.stderr, flush=True)


def _log(text: str) -> None:
    print(f"{torchrun.name_of_rank()} {text}", file=sys.stderr, flush=True)


def _job(config: Config, name: str) -> Job:
    """Return the packing that the configuration asks for.

    Raises:
        ValueError: ``--data.packing`` holds what cannot be there, or no tokenizer exists.
        FileNotFoundError: an annotation file that a meta file names does not exist.
    """
    from megavlm.data.packing.asked_job import make_job
    from megavlm.data.packing.command_line import make_parser

    def fail(message: str) -> NoReturn:
        raise ValueError(f"--data.packing {config.data.packing!r}: {message}")

    try:
        words = shlex.split(config.data.packing)
    except ValueError as error:
        fail(str(error))
    parser = make_parser()
    parser.error = fail  # instead of the usage of another program
    source = ["--meta" if _is_meta(name) else "--jsonl", name]
    first = [*source]
    tokenizer = _tokenizer(config)
    if tokenizer:
        first += ["--tokenizer", tokenizer]
    elif not any(word.split("=")[0] == "--tokenizer" for word in words):
        fail("name the language model's tokenizer: --tokenizer DIR")
    context = config.parallel.context_parallel_size
    if context > 1:
        first += ["--alignment", str(2 * context)]
    if config.architecture.needs.is_of_preferences:
        first.append("--preferences")
    if capacity := recipe(config.recipe).stage(config.stage).capacity:
        first += ["--capacity", str(capacity)]
    form = {"--template": config.data.template[:1], "--tiling": (config.data.tiling,)}
    for flag, values in form.items():
        for value in values:
            first += [] if value == ANY else [flag, value]
    alone = vars(parser.parse_args([*source, "--tokenizer", tokenizer]))
    asked = parser.parse_args([*first, *words])
    for option in OWN_OPTIONS:
        if vars(asked)[option] != alone[option]:
            fail(f"--{option} is not for a training run")
    if not Path(asked.tokenizer).is_dir():
        fail(f"--tokenizer {asked.tokenizer}: there is no such folder")
    return make_job(asked, config.architecture, stated_tiles(config.model))


def _tokenizer(config: Config) -> str:
    """Return the folder of the run's own tokenizer; empty if what it starts from has none."""
    folders = (config.init.tokenizer, config.init.language, config.model, config.checkpoint.load)
    names = ("tokenizer.json", "tokenizer.model")
    for folder in folders:
        if folder and any((Path(folder) / name).is_file() for name in names):
            return folder
    return ""


def _is_meta(name: str) -> bool:
    """Return whether a file is a list of annotation files, not one of them."""
    if not name.lower().endswith(".json") or not (is_remote(name) or Path(name).is_file()):
        return False
    with open_file(name) as file:
        content = file.read(READ_BYTES)
        if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return False
        content += file.read()
    try:
        entries = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        return False
    return all(isinstance(entry, dict) and "annotation" in entry for entry in entries.values())


def _key(job: Job) -> str:
    """Return a name of all that the packs depend on but the media files: the content of the
    annotation files and of the tokenizer, and the settings.
    """
    folders = (job.tokenizer, job.qformer_tokenizer_folder)
    facts = job.identity(*(_content(Path(folder)) if folder else "" for folder in folders))
    for source in facts["sources"]:
        del source["modified"]
        if is_remote(source["path"]):
            source["content"] = file_state(source["path"]).version
        else:
            source["content"] = _digest(Path(source["path"]))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _content(folder: Path) -> str:
    """Return what the files of a tokenizer hold."""
    files = {
        path.name: _digest(path)
        for path in sorted(folder.glob("*"))
        if path.suffix in TOKENIZER_ENDINGS and path.is_file()
    }
    return json.dumps(files)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _home() -> Path:
    """Return the folder of packs if none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "megavlm" / "packs"
