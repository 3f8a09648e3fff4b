"""Training speed, beside the machine's matrix products and PyTorch's.

  programs.py   what is timed: forward pass, training epochs, matrix products
  timing.py     times programs in turns, and compares them with the ceiling
  pipeline.py   reads a training set that streams, alone and with the step
  memory.py     the largest batch of a device, from compiled programs
  pytorch.py    eager PyTorch doing the same training step
  __main__.py   the command
"""
