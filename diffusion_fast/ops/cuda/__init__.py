"""The CUDA kernels of csrc/: building them, and attention on them."""
