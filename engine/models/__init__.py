"""Architectures: one file per general.architecture, each with build(hparams, file, ops) -> a model with forward()."""

from __future__ import annotations

from types import ModuleType

from ..gguf_file import GGUFFile
from ..hparams import HParams
from . import deepseek2

_BUILDERS = {"deepseek2": deepseek2.DeepSeek2}  # HParams refuses architectures that are not here


def build(hparams: HParams, file: GGUFFile, ops: ModuleType) -> deepseek2.DeepSeek2:
    return _BUILDERS[hparams.arch](hparams, file, ops)
