"""Speed and memory, against limits of the machine measured in the same run: see ``__main__.py``."""
