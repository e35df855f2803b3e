"""Metadata lives in pyproject.toml; this file builds the CUDA extension when asked to."""

from setuptools import setup

setup()
