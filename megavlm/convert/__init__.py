"""Weights and settings of a model, to and from Hugging Face, exactly."""
