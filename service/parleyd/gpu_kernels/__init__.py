"""A GPU's attention to the blocks of a paged KV cache where they lie: what kernels/paged.py asks of a kernel."""
