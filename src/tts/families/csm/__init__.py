"""Sesame CSM for many live sessions at once: one thread, one frame of 80 ms for all a tick.

ports        what the engine asks of a model; host arrays only
scheduler    which slots get text, which draw a frame (pure)
context      one slot's positions: voice prompt, history, re-base (pure)
speaker      one slot on the engine's thread: what it reads, how much it may still draw
outlet       one slot between two threads: texts one way, frames the other, bounded
ticker       begin, read, draw: one step for all slots, without a thread
admission    slots by order of arrival
engine       the thread, and what others call
weights      a voice pack on disk to modules in memory, strictly
frame_loop   backbone and depth decoder over slots; sampling
mimi_stream  codes to sound, a frame at a time, exactly as in one go
voices       a reference recording to a voice that costs nothing to start
lora         adapters, several on one base in one batch
device_model all of that behind the port, eager or as CUDA graphs
tiny         a small random model of the true architecture, for tests and dry runs
"""
