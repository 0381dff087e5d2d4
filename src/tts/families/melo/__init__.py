"""MeloTTS without its front end's import: English text (english.py), the network (network.py)."""
