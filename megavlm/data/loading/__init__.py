"""From packs to batches: what training reads."""
