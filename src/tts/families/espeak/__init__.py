"""eSpeak NG as a library."""
