"""`konly verify`: is this file good, and do this machine's kernels compute what they should?

verdict.py      verify(): each layer beside engine/reference.py
   ├ weights.py     what in the file cannot be meant so
   └ ops.py         one op at a time, to find which is to blame
"""

from .verdict import verify as verify
