"""Which stage counts of Triton MoE GEMM kernels fit, why, and what they cost.

``import moelab`` loads neither torch nor triton; the modules that need them do.
"""

__version__ = "0.1.0"
