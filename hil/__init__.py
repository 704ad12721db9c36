"""hil: test AI computers as if they were already in orbit."""

__version__ = "0.1.0"
