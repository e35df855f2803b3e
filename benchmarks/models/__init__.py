"""Whole models, measured: U-Net step, loop, pipeline, and what each technique brings.

``diffusion-fast bench`` runs it. All weights are random, which changes no time and makes errors
comparable, and every output says so.
"""
