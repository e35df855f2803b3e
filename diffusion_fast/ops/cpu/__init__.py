"""The C++ kernels of csrc/cpu: building them, and the ops that they compute."""
