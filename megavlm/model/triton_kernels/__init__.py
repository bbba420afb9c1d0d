"""Triton kernels, which are imported where tensors are on a GPU. Each does what a function of
``megavlm/model`` does by torch's operations.
"""
