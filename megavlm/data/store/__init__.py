"""The format of packs on disk."""
