"""The corpus of the default model is part of its recipe: the same seed must give the same text, for ever."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).resolve().parents[1] / "scripts" / "default_model"
SHA256 = "b2a2456877b85e8088a76b640c4edc58e463b45be083ca346b6d53e0ef0752a4"


def test_grammar_gives_the_text_that_the_model_was_trained_on(tmp_path: Path) -> None:
    out = tmp_path / "tales.txt"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}  # it imports its neighbours
    subprocess.run([sys.executable, str(RECIPE / "gen_corpus.py"), str(out), "200", "11"], check=True, env=env)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == SHA256
