"""Parler-TTS: the package step by step (engine.py), its codec in windows (frames.py)."""
