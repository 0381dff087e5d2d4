"""Piper's network asked for its durations, and words out of them."""
