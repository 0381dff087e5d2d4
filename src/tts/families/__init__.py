"""What the adapters are made of: a package for each family that is more than its adapter.

joins        segments that were spoken apart, as one
settings     what a session or a catalog entry may set, and how it is read
torch_host   devices, weights and memory, for every family that runs on torch
"""
