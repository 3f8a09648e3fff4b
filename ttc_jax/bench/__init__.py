"""Training speed beside the machine's and PyTorch's: a command."""
