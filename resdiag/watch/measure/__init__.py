"""Pure functions from tensors to scalars, each with formula and source.

Squares of float32 values overflow at 2e19 and vanish below 1e-23 although the values themselves are
finite. Every sum of squares here is exact in that range too: the fast float32 reduction is kept
where it can be trusted and redone in float64 where it cannot. On the CPU trust is a look at the
value, which is already in host memory; on an accelerator a look would stall the queue, so the
reduction runs in float64 there from the start. So a scalar is a plain number on the CPU, where
arithmetic on 0-d tensors costs more than many a measurement, and stays a tensor elsewhere.

No device tensor is kept at module level: it would outlive its monitor and a CUDA graph's pool.
Kernels make it of a number (`torch.full`); `torch.tensor(..., device=)` would make the host wait.
"""
