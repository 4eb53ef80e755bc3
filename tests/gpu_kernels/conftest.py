"""Makes shim.py importable: these folders are no packages, for tests/gpu_kernels would stand before gpu_kernels."""

import os
import sys
from pathlib import Path

from gpu_kernels import _compile

sys.path.append(str(Path(__file__).parent))
if "KONLY_CUDA" in os.environ:  # other sources than the package's: mutants.py
    _compile.CUDA = Path(os.environ["KONLY_CUDA"])
