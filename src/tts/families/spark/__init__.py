"""Spark-TTS: prompts, its language model (llm.py), its codec in windows, voices."""
