"""Folders of Hugging Face: configurations, files, processors."""
