"""XTTS-v2: loading without side effects, a view for each piece (stream.py), text by language."""
