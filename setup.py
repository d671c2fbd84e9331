"""Everything is declared in pyproject.toml; this file is where a compiled extension would be added."""

from setuptools import setup

setup()
