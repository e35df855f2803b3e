"""What this project measures: single ops, whole models, loading, training.

Installed, as ``diffusion_fast.benchmarks``, are ``lib`` and ``models`` alone, which the command
``diffusion-fast bench`` runs; the rest needs a checkout.
"""
