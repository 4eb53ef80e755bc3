"""What kernels become on another CPU: python assembly_for.py TRIPLE < [[name, module, factory, constants], …] as JSON.

NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say which. Prints {name: assembly} as JSON; nothing is run.
"""

from __future__ import annotations

import importlib
import json
import sys

import llvmlite.binding as llvm

if __name__ == "__main__":
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: sys.argv[1]  # Numba asks for it when it is imported
    codes = {}
    for name, module, factory, constants in json.load(sys.stdin):
        codes[name] = getattr(importlib.import_module(f"cpu_kernels.{module}"), factory)(**constants)
    json.dump({name: code.assembly() for name, code in codes.items()}, sys.stdout)
