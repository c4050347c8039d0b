"""Kernels for bfloat16 on a CPU, written in Python and compiled by numba for the processor that they run on.

Torch has no single operator for what they do, so it takes several passes over memory, each with a hand-over to its
threads.
"""
