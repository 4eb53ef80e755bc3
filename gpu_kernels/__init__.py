"""CUDA kernels of konly, run through CuPy: the vocabulary of cpu_kernels over the same K-cache rows.

Empty so far. When it is filled it imports CuPy and NumPy only, and CuPy not before a kernel is asked for, so that it
can be imported on a machine without a driver. It knows nothing of engine: layouts reach it as plain integers.
"""
