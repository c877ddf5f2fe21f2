"""The blocks that PyTorch computes, each in the file of its ``kind``."""
