"""The operators' Triton kernels, a module an operator: forward, backward, registration with PyTorch.

Nothing here is imported before an operator's Triton form first runs, so that :mod:`mae_kernels` loads without triton.
"""
