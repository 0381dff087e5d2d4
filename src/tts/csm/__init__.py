"""Sesame CSM for many live sessions at once: one thread, one frame of 80 ms for all a tick.

ports        what the engine asks of a model; host arrays only
scheduler    which slots get text, which draw a frame (pure)
context      one slot's positions: voice prompt, history, re-base (pure)
engine       the thread, its slots and their bounded outlets
weights      a voice pack on disk to modules in memory, strictly
frame_loop   backbone and depth decoder over slots; sampling
mimi_stream  codes to sound, a frame at a time, exactly as in one go
prompt       a reference recording to a voice that costs nothing to start
lora         adapters, several on one base in one batch
device_model all of that behind the port, eager or as CUDA graphs
tiny         a small random model of the true architecture, for tests and dry runs
"""
