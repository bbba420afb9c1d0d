"""The offline job behind ``tools/score_dataset.py``: how similar image and text of records are."""
