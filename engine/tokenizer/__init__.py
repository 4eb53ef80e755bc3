"""Tokenizer: text to token ids and back.

tokenizer.py    special tokens, bytes, UTF-8
   ├ bpe.py ─ pretokenizers.py   the regexes that cut text before it is merged
   └ spm.py
"""

from .tokenizer import Tokenizer as Tokenizer
