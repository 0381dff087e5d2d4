"""A streaming HTTP speech server: line, answers, audio, and what holds over all of them."""
