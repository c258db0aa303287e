"""All that pip needs to know is in pyproject.toml; compiled parts, once there are any, are declared here."""

from setuptools import setup

setup()
