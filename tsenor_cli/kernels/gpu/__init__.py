"""The mask kernels in Triton. Only this folder imports it, and it is imported only when a kernel is to run."""
