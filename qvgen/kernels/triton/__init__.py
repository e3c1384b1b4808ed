"""The triton backend: packed layers and the ops between them on NVIDIA GPUs. Importing this package imports no triton."""
