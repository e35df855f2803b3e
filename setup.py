"""Metadata lives in pyproject.toml; this file only exists to build the CUDA extension when asked to."""

from setuptools import setup

setup()
