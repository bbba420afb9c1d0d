"""A page about runs: curves, settings, layout, data, events, answers."""
