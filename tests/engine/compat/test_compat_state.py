"""Tokens, eval and sample, and states that are saved and put back."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from engine.compat import Llama
from engine.engine import default_model

TEXT = "Once upon a time there was a cat."


def test_tokenize_takes_bytes_and_detokenize_gives_them_back(llama: Llama) -> None:
    ids = llama.tokenize(TEXT.encode())
    assert ids[0] == llama.token_bos()
    assert llama.tokenize(TEXT.encode(), add_bos=False) == ids[1:]
    assert llama.detokenize(ids) == TEXT.encode()
    assert b"".join(llama.detokenize([token], ids[:i]) for i, token in enumerate(ids)) == TEXT.encode()
    assert llama.detokenize(ids, special=True).endswith(TEXT.encode())
    with pytest.raises(TypeError, match="expected bytes"):
        llama.tokenize(TEXT)  # type: ignore[arg-type]


def test_special_tokens_are_parsed_only_if_asked_for(llama: Llama) -> None:
    eos = llama.detokenize([llama.token_eos()], special=True)
    assert llama.tokenize(eos, add_bos=False, special=True) == [llama.token_eos()]
    assert len(llama.tokenize(eos, add_bos=False)) > 1


def test_bytes_of_any_kind_are_tokenized(llama: Llama) -> None:
    assert llama.detokenize(llama.tokenize(b"a\xffb", add_bos=False)) == "a\ufffdb".encode()


def test_sizes_and_ids_are_the_models(llama: Llama) -> None:
    assert (llama.n_ctx(), llama.n_vocab(), llama.n_embd()) == (256, 4096, 256)
    assert llama.detokenize([llama.token_nl()]) == b"\n"
    assert llama.metadata["general.architecture"] == "deepseek2"
    assert llama.tokenizer().tokenize(b"cat") == llama.tokenize(b"cat")


def test_eval_appends_and_n_tokens_may_be_set_back(llama: Llama) -> None:
    ids = llama.tokenize(TEXT.encode())
    llama.eval(ids[:4])
    llama.eval([])
    llama.eval(ids[4:])
    assert llama.n_tokens == len(ids)
    assert list(llama.eval_tokens) == llama._input_ids.tolist() == ids
    llama.n_tokens = 4
    assert list(llama.eval_tokens) == ids[:4]
    with pytest.raises(ValueError, match=r"Requested tokens \(260\) exceed context window of 256"):
        llama.eval([5] * 256)
    assert llama.n_tokens == 4


@pytest.mark.parametrize("logits_all", [False, True])
def test_scores_are_of_all_tokens_or_of_the_last(logits_all: bool) -> None:
    llama = Llama(default_model(), n_ctx=64, logits_all=logits_all, verbose=False)
    ids = llama.tokenize(TEXT.encode())
    llama.eval(ids)
    expected = llama.engine.step(ids, "all")
    assert len(llama.eval_logits) == (len(ids) if logits_all else 1)
    np.testing.assert_allclose(llama.eval_logits[-1], expected[-1], rtol=1e-3, atol=1e-3)
    llama.close()


def test_sample_needs_logits_and_generate_goes_on_without_end(llama: Llama) -> None:
    with pytest.raises(ValueError, match="call eval"):
        llama.sample()
    with pytest.raises(ValueError, match="no tokens to start from"):
        next(llama.generate([]))
    ids = llama.tokenize(TEXT.encode())
    llama.eval(ids)
    first = llama.sample(temp=0.0)
    tokens = list(islice(llama.generate(ids, temp=0.0), 5))
    assert tokens[0] == first
    text = llama.create_completion(ids, max_tokens=5, temperature=0)["choices"][0]["text"]
    assert llama.detokenize(tokens, ids).decode() == text


def test_what_is_sent_into_generate_follows_the_token(llama: Llama) -> None:
    generator = llama.generate([5, 6, 7], temp=0.0)
    token = next(generator)
    generator.send([8, 9])
    assert list(llama.eval_tokens) == [5, 6, 7, token, 8, 9]
    generator.close()
    assert list(islice(llama.generate([10], reset=False, temp=0.0, stopping_criteria=lambda ids, x: True), 3)) == []
    assert list(llama.eval_tokens) == [5, 6, 7, token, 8, 9, 10]


def test_a_state_comes_back_with_its_logits(llama: Llama) -> None:
    ids = llama.tokenize(TEXT.encode())
    llama.eval(ids)
    state, token = llama.save_state(), llama.sample(temp=0.0)
    llama("Something else", max_tokens=3)
    llama.load_state(state)
    assert state.n_tokens == llama.n_tokens == len(ids)
    assert state.llama_state_size > 0
    assert llama.sample(temp=0.0) == token
    other = Llama(llama.model_path, n_ctx=64, verbose=False)
    other.load_state(state)
    assert other.sample(temp=0.0) == token
    other.close()


def test_a_state_that_does_not_fit_is_refused(llama: Llama) -> None:
    llama.eval(llama.tokenize(TEXT.encode()))
    state = llama.save_state()
    for arguments, match in (({"n_ctx": 8}, "exceed context window of 8"), ({"type_k": "q8"}, "another type_k")):
        other = Llama(llama.model_path, **{"n_ctx": 64, "verbose": False} | arguments)
        other.eval([5])
        with pytest.raises(ValueError, match=match):
            other.load_state(state)
        assert list(other.eval_tokens) == [5]
        other.close()
    with pytest.raises(ValueError, match="state is of type bytes"):
        llama.load_state(b"")  # type: ignore[arg-type]
