"""Turn images, videos and texts into a packed dataset for training."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megavlm.data.packing.asked_job import make_job
from megavlm.data.packing.asked_stage import (
    form_warnings,
    model_warnings,
    other_templates,
    taken_settings,
)
from megavlm.data.packing.command_line import parse
from megavlm.io.early_end import allow_early_end
from megavlm.io.full_disk import in_words
from megavlm.model_source import image_model, stated_tiles


def main() -> int:
    """Run the command line; returns the exit status."""
    options = parse()
    try:
        model = image_model(options.model)
        job = make_job(options, model, stated_tiles(options.model))
        if settings := taken_settings(options):
            others = " or ".join(other_templates(options))
            more = f"; it also takes --template {others}" if others else ""
            print(f"pack_dataset: packs as the stage has them: {settings}{more}", file=sys.stderr)
        for warning in (*form_warnings(options), *model_warnings(options, model)):
            print(f"pack_dataset: warning: {warning}", file=sys.stderr)
        # Only now: help and mistakes on the command line should not wait for transformers.
        from megavlm.data.packing.job import pack_dataset, plan_dataset

        report = (plan_dataset if options.dry_run else pack_dataset)(job)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"pack_dataset: error: {in_words(error, '--out', options.out)}", file=sys.stderr)
        return 2
    print(report.text())
    try:
        if options.json:
            options.json.write_text(report.to_json(), encoding="utf-8")
        if options.picture:
            from megavlm.data.packing.report_plot import draw_report

            draw_report(report, options.picture)
    except OSError as error:
        print(f"pack_dataset: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    with allow_early_end():
        sys.exit(main())
