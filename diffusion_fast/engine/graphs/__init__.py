"""CUDA graphs of the sampling loop: which one a run uses, how it is captured, what is kept."""
