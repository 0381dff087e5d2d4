"""CosyVoice 2 through its sources: how they are loaded (opening.py), one step (engine.py)."""
