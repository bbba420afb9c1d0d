"""Dropout that a config.json states. No run drops so, of whatever family its model is: results
would depend on random states, and so on the layout. Whoever starts from such a model is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.schema import Init
from megavlm.convert.hf.hub_formats import hub_format_of
from megavlm.convert.hf.json_files import FILE_NAME, named, read_complete


def stated(settings: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield shares above 0 that a model drops in training, such as ``text_config.dropout 0.1``.

    Args:
        settings: of a config.json, or a section of it.
        section: its name.
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and name.endswith("_config"):
            yield from stated(value, named(section, name))
        elif "drop" in name and type(value) in (int, float) and value > 0:
            yield f"{named(section, name)} {value}"


def notes_on_model(folder: Path) -> list[str]:
    """Return what to say of the folder of a whole model, or of one of its parts' folders."""
    inside = hub_format_of(folder).folders.values()
    files = [folder / FILE_NAME, *(folder / name / FILE_NAME for name in inside)]
    return [note for path in files for note in _notes(path, stated(read_complete(path)))]


def notes_on_parts(init: Init) -> list[str]:
    """Return what to say of the folders of parts. Of a whole model that a part is taken from, that
    part's section counts.
    """
    sections = {
        "vision": "vision_config",
        "language": "",
        "connector": "qformer_config",
        "text": "qformer_config",
    }
    found = []
    for part, section in sections.items():
        folder = vars(init)[part]
        if folder:
            path = Path(folder) / FILE_NAME
            settings = read_complete(path)
            is_whole = isinstance(settings.get(section), Mapping)
            shares = stated(settings[section], section) if is_whole else stated(settings)
            found += _notes(path, shares)
    return list(dict.fromkeys(found))  # connector and text may be of one folder


def _notes(path: Path, shares: Iterator[str]) -> Iterator[str]:
    """Yield a sentence, if there are any shares."""
    if listed := ", ".join(shares):
        yield (
            f"{path}: {listed}: fine-tuning in transformers drops so, runs here do not;"
            " --training.drop_path drops paths of the vision encoder, --architecture.lora.dropout"
            " inputs of adapters"
        )
