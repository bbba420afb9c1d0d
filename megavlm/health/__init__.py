"""Checks before and beside a run: preflight, speed, hangs."""
