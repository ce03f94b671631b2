"""What is compiled: kernels on LLVM vectors, and the functions that they are made of."""
