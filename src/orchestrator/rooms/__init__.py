"""LiveKit rooms as a way into a session, on the orchestrator's own event loop.

Nothing outside this package imports `livekit`, and nothing in it is imported unless rooms are on.
"""
