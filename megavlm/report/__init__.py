"""A page about runs: curves, settings, events, answers."""
