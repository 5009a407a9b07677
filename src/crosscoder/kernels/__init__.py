"""The arithmetic of encoding and decoding: a dense reference, and the sparse kernels that training uses."""
