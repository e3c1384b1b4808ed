"""Compiled CPU kernels: a C++ library without Python or libtorch inside, and the backend that calls it."""
