"""Sampling: from logits to the next token.

settings.py     Sampling: what a user may set, checked
sampler.py      Sampler: chooses
   ├ penalties.py   for what was said already
   └ cuts.py        which tokens stay candidates
logprobs.py     what the model said of a token, before all that
"""

from .logprobs import TokenLogprobs as TokenLogprobs
from .logprobs import token_logprobs as token_logprobs
from .sampler import LogitsProcessor as LogitsProcessor
from .sampler import Sampler as Sampler
from .settings import Sampling as Sampling
