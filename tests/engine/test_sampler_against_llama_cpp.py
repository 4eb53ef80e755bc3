"""Our chain against llama.cpp's own samplers, called through ctypes on the same logits: what is left, and how probable.

llama.cpp computes in f32 and we decide in f64, so a token whose sum falls within 1e-6 of a bound could be kept by one
and not by the other; none of these cases has one.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Iterator, Sequence
from importlib.resources import files

import llama_cpp_peer
import numpy as np
import pytest
from compare import assert_close
from llama_cpp_peer import LlamaCpp

from engine import Engine, Sampling
from engine.sampling import Sampler
from engine.sampling.penalties import breakers_of
from engine.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("llama_cpp")
_P, _I, _U, _F, _Z = C.c_void_p, C.c_int32, C.c_uint32, C.c_float, C.c_size_t
TINY = 1e-30  # f32 holds little less
ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}  # nothing is cut off


class _Token(C.Structure):
    _fields_ = [("id", _I), ("logit", _F), ("p", _F)]


class _Tokens(C.Structure):
    _fields_ = [("data", C.POINTER(_Token)), ("size", _Z), ("selected", C.c_int64), ("sorted", C.c_bool)]


class _Bias(C.Structure):
    _fields_ = [("token", _I), ("bias", _F)]


_ARGUMENTS = {
    "logit_bias": (_I, _I, C.POINTER(_Bias)),
    "penalties": (_I, _I, _F, _F, _F),
    "dry": (_P, _F, _F, _I, _I, C.POINTER(C.c_char_p), _Z),
    "top_n_sigma": (_F,),
    "top_k": (_I,),
    "typical": (_F, _Z),
    "top_p": (_F, _Z),
    "min_p": (_F, _Z),
    "xtc": (_F, _F, _Z, _U),
    "temp": (_F,),
    "temp_ext": (_F, _F, _F),
    "mirostat_v2": (_U, _F, _F),
    "dist": (_U,),
}


def peer_sampler(name: str, *arguments: object) -> int:
    init = getattr(llama_cpp_peer._library(), f"llama_sampler_init_{name}")
    init.restype, init.argtypes = _P, _ARGUMENTS[name]
    return init(*arguments)


def peer_candidates(
    names: Sequence[tuple[object, ...]], logits: np.ndarray, history: Sequence[int] = ()
) -> tuple[dict[int, float], int]:
    """({id: probability} after these samplers, those below TINY left out; id drawn or -1)."""
    lib = llama_cpp_peer._library()
    for function in ("apply", "accept", "free"):
        getattr(lib, f"llama_sampler_{function}").restype = None
    lib.llama_sampler_apply.argtypes = _P, C.POINTER(_Tokens)
    lib.llama_sampler_accept.argtypes = _P, _I
    lib.llama_sampler_free.argtypes = (_P,)
    data = (_Token * len(logits))(*((i, value, 0.0) for i, value in enumerate(logits.tolist())))
    tokens = _Tokens(data, len(logits), -1, False)
    for name in names:
        sampler = peer_sampler(*name)  # type: ignore[arg-type]
        for token in history:
            lib.llama_sampler_accept(sampler, token)
        lib.llama_sampler_apply(sampler, C.byref(tokens))
        lib.llama_sampler_free(sampler)
    found = {tokens.data[i].id: tokens.data[i].p for i in range(tokens.size) if tokens.data[i].p > TINY}
    return found, tokens.data[tokens.selected].id if tokens.selected >= 0 else -1


def chain(s: Sampling, n_vocab: int, vocab: int | None = None) -> list[tuple[object, ...]]:
    """The samplers that llama.cpp's common_sampler_init makes of these settings."""
    made: list[tuple[object, ...]] = []
    if s.logit_bias:
        biases = (_Bias * len(s.logit_bias))(*s.logit_bias.items())
        made.append(("logit_bias", n_vocab, len(biases), biases))
    last_n = s.repeat_last_n if s.repeat_last_n >= 0 else 4096
    made.append(("penalties", n_vocab, last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty))
    if vocab is not None:
        texts = [text.encode() for text in s.dry_sequence_breakers]
        breakers = (C.c_char_p * len(texts))(*texts)
        last_n = s.dry_penalty_last_n if s.dry_penalty_last_n >= 0 else 4096
        made.append(("dry", vocab, s.dry_multiplier, s.dry_base, s.dry_allowed_length, last_n, breakers, len(texts)))
    if s.mirostat:
        return [*made, ("temp", s.temperature), ("mirostat_v2", 1, s.mirostat_tau, s.mirostat_eta)]
    return [
        *made,
        ("top_n_sigma", s.top_n_sigma),
        ("top_k", s.top_k),
        ("typical", s.typical_p, s.min_keep),
        ("top_p", s.top_p, s.min_keep),
        ("min_p", s.min_p, s.min_keep),
        ("xtc", s.xtc_probability, s.xtc_threshold, s.min_keep, 1),
        ("temp_ext", s.temperature, s.dynatemp_range, s.dynatemp_exponent),
        ("dist", 1),
    ]


def assert_same(ours: tuple[np.ndarray, np.ndarray], peer: dict[int, float], case: object) -> None:
    ids, probabilities = ours
    kept = probabilities > TINY
    assert sorted(ids[kept].tolist()) == sorted(peer), case
    assert_close(probabilities[kept], np.array([peer[i] for i in ids[kept].tolist()]), rtol=2e-4, atol=1e-9)


def logits_of(n_vocab: int, spread: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * spread).astype(np.float32)


ONE_AT_A_TIME = [
    *({"top_k": k} for k in (1, 7, 300, 5000)),
    *({"top_p": p} for p in (0.0, 0.3, 0.9, 0.99)),
    *({"top_p": 0.1, "min_keep": n} for n in (1, 5, 900)),
    *({"min_p": p} for p in (0.01, 0.3, 1.0)),
    *({"min_p": 0.9, "min_keep": n} for n in (1, 5, 900)),
    *({"typical_p": p} for p in (0.0, 0.2, 0.7, 0.95)),
    *({"typical_p": 0.2, "min_keep": n} for n in (1, 5, 900)),
    *({"top_n_sigma": n} for n in (0.3, 1.0, 2.5, 50.0)),
    *({"xtc_probability": 1.0, "xtc_threshold": t} for t in (0.001, 0.01, 0.1, 0.5, 0.6)),
    *({"xtc_probability": 1.0, "xtc_threshold": 0.01, "top_k": 12, "min_keep": n} for n in (1, 11, 12)),
    *({"temperature": t} for t in (0.2, 1.7)),
    *({"temperature": t, "dynatemp_range": r} for t, r in ((0.8, 0.5), (0.3, 0.6), (1.0, 1.0))),
    {"temperature": 1.2, "dynatemp_range": 0.7, "dynatemp_exponent": 2.5},
]


@pytest.mark.parametrize("case", ONE_AT_A_TIME, ids=str)
def test_each_sampler_leaves_what_llama_cpp_leaves(case: dict[str, float]) -> None:
    s = Sampling(**{**ALL, **case})  # type: ignore[arg-type]
    for i, (n_vocab, spread) in enumerate([(1, 1.0), (2, 1.0), (37, 2.0), (1000, 1.0), (1000, 5.0), (4096, 3.0)]):
        logits = logits_of(n_vocab, spread, seed=i)
        peer, _ = peer_candidates(chain(s, n_vocab), logits)
        assert_same(Sampler(s, n_vocab).candidates(logits), peer, (n_vocab, spread))


def test_the_chain_in_its_order_leaves_what_llama_cpp_leaves() -> None:
    rng = np.random.default_rng(11)

    def pick(*values: float) -> float:
        return values[rng.integers(len(values))]

    for i in range(300):
        # llama.cpp's typical_p takes the logarithm of excluded tokens' zeros, and then sorts NaN: anything may happen
        excludes = rng.random() < 0.5
        s = Sampling(
            logit_bias={3: pick(-2.0, 4.0), 5: -np.inf if excludes else 1.0} if rng.random() < 0.3 else None,
            repeat_penalty=pick(1.0, 1.0, 1.3, 0.8),
            presence_penalty=pick(0.0, 0.5),
            frequency_penalty=pick(0.0, 0.3, -0.1),
            repeat_last_n=int(pick(-1, 0, 3, 64)),
            top_n_sigma=pick(1.5, 3.0) if excludes else -1.0,
            top_k=int(pick(0, 5, 40, 500)),
            typical_p=1.0 if excludes else pick(1.0, 0.9, 0.5),
            top_p=pick(1.0, 0.95, 0.5),
            min_p=pick(0.0, 0.05, 0.2),
            xtc_probability=pick(0.0, 1.0),
            xtc_threshold=pick(0.02, 0.1, 0.3),
            min_keep=int(pick(0, 1, 3)),
            temperature=pick(0.5, 1.0, 1.5),
            dynatemp_range=0.0,
        )
        logits = logits_of(600, pick(1.0, 3.0), seed=i)
        history = rng.integers(0, 600, 90).tolist() + [1, 2, 3, 1, 1]
        peer, _ = peer_candidates(chain(s, 600), logits, history)
        assert_same(Sampler(s, 600).candidates(logits, history), peer, s)


def test_temperature_0_takes_what_llama_cpp_takes() -> None:
    for i, case in enumerate([{}, {"typical_p": 0.5}, {"xtc_probability": 1.0, "xtc_threshold": 0.02}] * 5):
        s = Sampling(temperature=0.0, **case)
        logits = logits_of(500, 2.0, seed=i)
        assert Sampler(s, 500).sample(logits) == peer_candidates(chain(s, 500), logits)[1]


@pytest.mark.parametrize(("tau", "temperature"), [(5.0, 0.8), (2.0, 1.3), (0.1, 1.0), (9.0, 0.5)])
def test_mirostat_leaves_what_llama_cpp_leaves(tau: float, temperature: float) -> None:
    s = Sampling(mirostat=2, mirostat_tau=tau, temperature=temperature)
    for i, spread in enumerate((0.5, 2.0, 5.0)):
        logits = logits_of(4096, spread, seed=i)
        assert_same(Sampler(s, 4096).candidates(logits), peer_candidates(chain(s, 4096), logits)[0], spread)


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[Tokenizer, LlamaCpp]]:
    """The default model's tokenizer, here and there."""
    llama_cpp_peer.require_xllamacpp()
    with LlamaCpp(str(next(p for p in files("engine.data").iterdir() if p.name.endswith(".gguf")))) as peer:
        yield Engine().tokenizer, peer


DRY = [
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 0.8, "dry_allowed_length": 0},
    {"dry_multiplier": 2.0, "dry_base": 1.0, "dry_allowed_length": 1},
    {"dry_multiplier": 0.1, "dry_base": 3.0, "dry_allowed_length": 4},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": 17},
    {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": ["was", "\n", "!!", "ear old"]},
    {
        "dry_multiplier": 0.8,
        "dry_allowed_length": 1,
        "dry_sequence_breakers": ["a very long breaker of forty and more bytes"],
    },
    {"dry_multiplier": 0.8, "dry_base": 0.5},
]


@pytest.mark.parametrize("case", DRY, ids=str)
def test_dry_leaves_what_llama_cpp_leaves(model: tuple[Tokenizer, LlamaCpp], case: dict[str, float]) -> None:
    tokenizer, peer = model
    s = Sampling(**{**ALL, **case})  # type: ignore[arg-type]
    sampler = Sampler(s, tokenizer.n_vocab, tokenizer)
    rng = np.random.default_rng(2)
    words = tokenizer.encode('once upon a time: there "was" a year older cat.\n!', add_special=False)
    for i in range(40):
        letters = rng.choice(words, size=rng.integers(2, 6)) if i % 2 else np.array(words)
        history = rng.choice(letters, size=rng.integers(0, 120)).tolist()
        if i % 3 == 0:
            history += history[-20:] * 2 + words[:7] * 2
        logits = logits_of(tokenizer.n_vocab, 1.0, seed=i)
        expected, _ = peer_candidates(chain(s, tokenizer.n_vocab, peer._vocab), logits, history)
        assert_same(sampler.candidates(logits, history), expected, history)


def test_a_token_that_begins_a_breaker_is_completed_by_the_tokens_of_the_rest(
    model: tuple[Tokenizer, LlamaCpp],
) -> None:
    tokenizer, _ = model
    found = breakers_of(tokenizer, ["\nThe"])
    newline, the = (tokenizer.encode(text, add_special=False) for text in ("\n", "The"))
    assert tuple(the) in found[newline[0]]
    assert breakers_of(tokenizer, ["\nThe"]) is found  # 160,000 tokens are searched once
