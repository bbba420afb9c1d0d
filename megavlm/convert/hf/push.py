"""Upload exported folders to the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled


def make_repository(name: str, *, is_private: bool) -> str:
    """Make a repository for a model on the hub, unless it is there already, and return its address.

    This comes before an export, so that a wrong name, a missing token or no network is noticed
    before the work, not after it.

    Args:
        name: ``OWNER/NAME``.
        is_private: whether a new one is private; one that exists stays as it is.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    advice = "log in with `hf auth login`, or set HF_TOKEN; nothing was exported"
    with _told(name, advice):
        return str(HfApi().create_repo(name, private=is_private or None, exist_ok=True))


def push(folder: Path, name: str) -> str:
    """Upload a folder in one commit, and return the commit's address.

    Args:
        folder: of the export.
        name: ``OWNER/NAME`` of the repository.

    Raises:
        ValueError: the hub refuses, or cannot be reached; the folder stays.
    """
    advice = f"the export is in {folder}; upload it with: hf upload {name} {folder} ."
    with _told(name, advice):
        return (
            HfApi()
            .upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message="Upload a model exported by megavlm",
            )
            .commit_url
        )


@contextmanager
def _told(name: str, advice: str) -> Iterator[None]:
    """Turn errors of the hub into one of a line, with what to do."""
    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, ValueError, OSError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--push_to_hub {name}: {text:.300}; {advice}") from error
