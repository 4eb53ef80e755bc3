"""CUDA kernels of konly, run through CuPy: the vocabulary of cpu_kernels over the same K-cache rows.

A leaf: CuPy and NumPy only, and CuPy not before a kernel is asked for, so that it can be imported on a machine without
a driver. It knows nothing of engine: layouts reach it as plain integers. device.check() says whether there is a GPU.
"""

from . import arrays as arrays
from . import device as device
from . import roofline as roofline
from .attention import mla_decode as mla_decode
from .device import GpuError as GpuError
from .dry import DryRun as DryRun
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
from .stream import Cancelled as Cancelled
from .stream import Queue as Queue
from .stream import Run as Run
from .stream import prepare as prepare
from .streamed import can_stream as can_stream
from .streamed import experts_streamed as experts_streamed
from .weights import upload as upload
