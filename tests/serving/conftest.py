"""The server that every file here asks."""

from tiny_server import served

__all__ = ["served"]  # a fixture
