"""Tests of the scoring of datasets."""
