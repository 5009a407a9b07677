"""Triton kernels for CUDA devices: selection, the sparse products and their gradients, and the optimiser pass.

`operations` has the primitive operations under the names that every backend gives them; `selection` finds the active
pairs; `adam` updates. Importing this package imports no Triton; importing one of its modules does.
"""
