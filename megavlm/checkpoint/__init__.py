"""The checkpoint format on disk, without a model: one reader and one writer."""
