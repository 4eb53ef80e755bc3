"""The tokenizer, byte-level BPE of 4,096 tokens with GPT-2's pre-tokenizer; and texts as token ids.

python build_tokenizer.py train TOKENIZER.json TEXT.txt…
python build_tokenizer.py pack TOKENIZER.json NAME FOLDER TEXT.txt [N_VALIDATION]
    writes FOLDER/train_NAME.bin and, of the last N_VALIDATION documents, FOLDER/val_NAME.bin: uint16 ids
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from corpus import read_documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_ID, EOS_ID = 0, 1
N_VOCAB = 4096


def train(out: str, *sources: str) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for source in sources for text in read_documents(source)), trainer)
    tokenizer.save(out)
    print("vocabulary of", tokenizer.get_vocab_size())


def pack(path: str, name: str, folder: str, source: str, n_validation: str = "0") -> None:
    tokenizer = Tokenizer.from_file(path)
    documents = read_documents(source)
    n_train = len(documents) - int(n_validation)
    for kind, part in (("val", documents[n_train:]), ("train", documents[:n_train])):
        if part:
            ids = _encode(tokenizer, part)
            ids.tofile(Path(folder) / f"{kind}_{name}.bin")
            print(kind, name, len(part), "documents,", len(ids), "tokens")


def _encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """(n,) uint16: each document between BOS and EOS."""
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(documents):
        ids += [BOS_ID, *encoded.ids, EOS_ID]
    return np.array(ids, dtype=np.uint16)


if __name__ == "__main__":
    {"train": train, "pack": pack}[sys.argv[1]](*sys.argv[2:])
