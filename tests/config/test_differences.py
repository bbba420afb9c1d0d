"""In what two configurations differ."""

from __future__ import annotations

from dataclasses import replace

from megavlm.config.differences import changed, differing
from megavlm.config.models import MODELS
from megavlm.config.schema import NO_VISION, Loss

MODEL = MODELS["tiny"]


def test_every_field_that_differs_is_named_with_both_values() -> None:
    other = replace(
        MODEL,
        vision=replace(MODEL.vision, num_layers=9),
        language=replace(MODEL.language, rotary_base=1e5),
    )
    assert list(differing(MODEL, other, "architecture")) == [
        ("architecture.vision.num_layers", 4, 9),
        ("architecture.language.rotary_base", 1e4, 1e5),
    ]
    assert list(differing(MODEL, MODEL, "architecture")) == []


def test_numbers_are_compared_to_six_digits() -> None:
    mean = (0.48145466, 0.4578275, 0.40821073)
    assert list(differing(mean, (0.4814546, 0.4578275, 0.40821073), "mean")) == []
    assert len(list(differing(mean, (0.481454, 0.4578275, 0.40821073), "mean"))) == 1
    assert list(differing(1e-5, 9.999999747378752e-06, "eps")) == []
    assert list(differing(1e-5, 1.000001e-5, "eps")) == [("eps", 1e-5, 1.000001e-5)]
    assert list(differing(1e300, 2e300, "large")) == [("large", 1e300, 2e300)]
    assert list(differing(True, False, "switch")) == [("switch", True, False)]


def test_what_is_not_as_usual_is_named_with_its_value() -> None:
    loss = Loss(z_loss=0.1, vocabulary_block=8)
    assert changed(loss) == {"vocabulary_block": 8, "z_loss": 0.1}
    assert changed(loss, "z_loss", "label_smoothing") == {"z_loss": 0.1}
    other = replace(NO_VISION, hidden_size=7)
    assert changed(other, usual=NO_VISION) == {"hidden_size": 7}
