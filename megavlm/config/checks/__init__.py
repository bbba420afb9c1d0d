"""Checks that span several settings; each problem names the flag to change."""
