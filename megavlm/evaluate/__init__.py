"""Questions that a model is asked, and the metrics that its answers are measured by."""
