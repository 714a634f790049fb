"""The version, where any module can read it."""

__version__ = "0.1.0"
