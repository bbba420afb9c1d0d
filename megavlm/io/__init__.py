"""Files: local and remote storage, record files, progress."""
