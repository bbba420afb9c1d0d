"""From JSONL and images to packs on disk, and from packs to batches."""
