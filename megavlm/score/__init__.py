"""The offline job behind ``tools/score_dataset.py``: how similar images and texts of records are."""
