"""Numba kernels for MLA models on the CPU. A leaf: layouts arrive as integers, weights as bytes with a type id.

The names below are the vocabulary of ops (engine/backend.py draws it), and what runs them.
"""

from . import roofline as roofline
from .attention import mla_decode as mla_decode
from .ffn import swiglu as swiglu
from .k_cache import k_shift as k_shift
from .k_cache import k_store as k_store
from .k_cache import rotate_query as rotate_query
from .k_cache import unrotate_output as unrotate_output
from .matmul import embed_rows as embed_rows
from .matmul import matmul as matmul
from .matmul import matmul_heads as matmul_heads
from .moe import experts as experts
from .norm import rms_norm as rms_norm
from .prefill import mla_prefill as mla_prefill
from .rope import rope as rope
from .router import route as route
from .threads import Cancelled as Cancelled
from .threads import Run as Run
from .threads import prepare as prepare
