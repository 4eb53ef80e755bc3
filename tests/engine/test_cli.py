"""The command line over a stub of the engine: options, streams, errors, Ctrl-C. The real one: test_cli_process.py."""

from __future__ import annotations

import json
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

import engine
from engine import cli, console, memory
from engine.errors import ModelFormatError
from engine.k_cache import TYPES_K, KCacheLayout
from engine.parts import PARTS
from engine.sampler import Sampling
from engine.stream import Stats


class StubEngine:
    """Keeps what it was given, and says what it was told to."""

    pieces: list[str] = ["Hello", ", wör", "ld"]
    reason = "stop"
    fails: BaseException | None = None  # raised after the pieces
    opened: StubEngine

    def __init__(self, path: str | None, **options: Any) -> None:
        if path == "broken.gguf":
            raise ModelFormatError("broken.gguf: key 'a\x1b[31m' is bad")
        if path == "old.gguf":
            warnings.warn("old.gguf: a key is\x07 missing", stacklevel=2)
        self.path, self.options, self.closed = path, options, False
        self.hparams = types.SimpleNamespace(n_ctx_train=4096)
        n_ctx = options["n_ctx"] or 4096
        self.cache = types.SimpleNamespace(layout=KCacheLayout(27, n_ctx, 512, 64, options["type_k"]))
        self.cache_bytes, self.n_ctx, self.type_k = 3 << 20, n_ctx, options["type_k"]
        self.stats = Stats(n_prompt=5, t_prompt=0.01, n_generated=64, t_generated=0.2, finish_reason=self.reason)
        StubEngine.opened = self

    def generate(self, prompt: str, **options: Any) -> Iterator[str]:
        self.prompt, self.generate_options = prompt, options
        yield from self.pieces
        if self.fails:
            raise self.fails

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubEngine]:
    monkeypatch.setattr(engine, "Engine", StubEngine, raising=False)
    monkeypatch.setattr(engine, "Sampling", Sampling, raising=False)
    monkeypatch.setattr(StubEngine, "fails", None)
    return StubEngine


def konly(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, input=stdin)


def test_run_prints_the_text_on_stdout_and_one_line_on_stderr() -> None:
    done = konly("run", "model.gguf", "-p", "Oh. ")
    assert done.exit_code == 0
    assert done.stdout == "Oh. Hello, wörld\n"
    assert done.stderr == "prompt 5 tokens, 500.0 t/s | generated 64 tokens, 315.0 t/s | K-cache 3.0 MiB (f16)\n"
    assert StubEngine.opened.path == "model.gguf"
    assert StubEngine.opened.prompt == "Oh. "
    assert StubEngine.opened.closed


def test_prompt_is_hidden_on_request() -> None:
    assert konly("run", "-p", "Oh. ", "--no-display-prompt").stdout == "Hello, wörld\n"


def test_defaults_are_left_to_the_engine() -> None:
    konly("run", "-p", "x")
    opened = StubEngine.opened
    assert opened.path is None
    assert callable(opened.options.pop("progress"))
    assert opened.options == {"n_ctx": None, "type_k": "f16", "n_threads": None, "n_ubatch": 512}
    assert opened.generate_options == {"max_tokens": None, "sampling": Sampling()}


def test_every_option_arrives() -> None:
    konly(*"run -m m.gguf -p x -n 7 -c 99 -t 3 -ub 64 -ctk q8 --temp 0 --top-k 5 --top-p 0.5 --min-p 0.1".split(),
          *"--repeat-penalty 1.1 --repeat-last-n -1 --seed 42".split())  # fmt: skip
    opened = StubEngine.opened
    opened.options.pop("progress")
    assert opened.path == "m.gguf"
    assert opened.options == {"n_ctx": 99, "type_k": "q8", "n_threads": 3, "n_ubatch": 64}
    assert opened.generate_options == {
        "max_tokens": 7,
        "sampling": Sampling(0.0, 5, 0.5, 0.1, repeat_penalty=1.1, repeat_last_n=-1, seed=42),
    }


@pytest.mark.parametrize("arguments", [("-p", "-"), ()])
def test_prompt_comes_from_standard_input(arguments: tuple[str, ...]) -> None:
    konly("run", *arguments, stdin="Öne\ntwo\n")
    assert StubEngine.opened.prompt == "Öne\ntwo"


def test_prompt_comes_from_a_file(tmp_path: Any) -> None:
    (tmp_path / "prompt.txt").write_bytes("Öne\n\n".encode())
    konly("run", "-f", str(tmp_path / "prompt.txt"))
    assert StubEngine.opened.prompt == "Öne\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "-p", ""), "no prompt; give one by"),
        (("run", "-p", "x", "-f", "y"), "two prompts"),
        (("run", "a.gguf", "-m", "b.gguf", "-p", "x"), "two models"),
        (("run", "-f", "/nowhere/prompt.txt"), "prompt.txt: cannot be read"),
        (("run", "-p", "x", "-ctk", "q4"), "'f16', 'bf16', 'q8'"),
        (("run", "-p", "x", "-n", "-2"), "-1"),
        (("bench", "-d", "0,many"), "expected numbers"),
        (("bench", "-ctk", "f16,q4"), "q4; expected f16, bf16, q8"),
    ],
)
def test_wrong_usage_is_explained(arguments: tuple[str, ...], message: str) -> None:
    done = konly(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_arguments_that_the_locale_could_not_decode_are_utf8() -> None:
    konly("run", "-p", "Gr\udcc3\udcbc\udcc3\udc9fe")
    assert StubEngine.opened.prompt == "Grüße"
    done = konly("run", "-p", "a\udcff")
    assert (done.exit_code, "the prompt is not UTF-8 (at byte 1)" in done.stderr) == (2, True)


def test_prompt_which_is_no_text_is_refused() -> None:
    done = konly("run", stdin=b"abc\xff")
    assert done.exit_code == 2
    assert "standard input is not UTF-8 (at byte 3)" in done.stderr


def test_errors_of_the_engine_are_one_line_without_control_characters() -> None:
    done = konly("run", "broken.gguf", "-p", "x")
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr == "Error: broken.gguf: key 'a\\x1b[31m' is bad\n"


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line() -> None:
    assert konly("run", "old.gguf", "-p", "x").stderr.startswith("Warning: old.gguf: a key is\\x07 missing\nprompt 5")


def test_a_disk_that_is_full_is_one_line(stub: type[StubEngine]) -> None:
    stub.fails = OSError(28, "No space left on device")
    done = konly("run", "-p", "x")
    assert (done.exit_code, done.stderr) == (1, "Error: cannot write: No space left on device\n")


def test_contexts_beyond_training_or_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 8 << 30)
    assert "Note" not in konly("run", "-p", "x").stderr
    beyond, short = konly("run", "-p", "x", "-c", "400000").stderr.splitlines()[:2]
    assert beyond == "Note: n_ctx = 400,000 is more than the 4,096 tokens that the model was trained for"
    assert short == "Note: 400,000 tokens in the K-cache take 11.6 GiB; 8.0 GiB of memory are available"


def test_error_while_generating_leaves_the_text_and_is_one_line(stub: type[StubEngine]) -> None:
    stub.fails = ModelFormatError("no more")
    done = konly("run", "-p", "x ")
    assert done.exit_code == 1
    assert done.stdout == "x Hello, wörld\n"
    assert done.stderr == "Error: no more\n"
    assert StubEngine.opened.closed


def test_ctrl_c_ends_the_line_and_still_sums_up(stub: type[StubEngine]) -> None:
    stub.fails = KeyboardInterrupt()
    done = konly("run", "-p", "x ")
    assert done.exit_code == 130
    assert done.stdout == "x Hello, wörld\n"
    assert done.stderr.startswith("prompt 5 tokens")
    assert StubEngine.opened.closed


@pytest.mark.parametrize(("n_predict", "full"), [("-1", True), ("64", False), ("65", True)])
def test_a_full_context_is_told(monkeypatch: pytest.MonkeyPatch, n_predict: str, full: bool) -> None:
    monkeypatch.setattr(StubEngine, "reason", "length")
    done = konly("run", "-p", "x", "-n", n_predict)
    assert done.stderr.endswith("| stopped: n_ctx = 4,096 is full\n") == full


def test_rates_without_tokens_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli._rate(0, 0.0) == cli._rate(-1, 0.1) == "- t/s"


def test_sampling_defaults_are_those_of_the_engine() -> None:
    defaults = {option.name: option.default for option in cli.run.params}
    fields = {name: defaults[name] for name in ("top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n")}
    assert Sampling(temperature=defaults["temp"], **fields) == Sampling()
    assert defaults["seed"] == -1
    assert (cli.TYPES_K, cli.PARTS) == (TYPES_K, PARTS)


def test_help_names_the_commands() -> None:
    done = konly("-h")
    assert all(f"  {name} " in done.stdout for name in ("run", "inspect", "bench"))


def test_compiling_is_told_in_two_lines_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.CompileProgress() as progress:
        progress(0, 0, "nothing to do")
        for done in range(3):
            progress(done, 2, "mla_decode[f16]")
        progress(2, 2, "again")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "compiling 2 kernels for this CPU …"
    assert second.startswith("compiled 2 kernels for this CPU in ")


def test_bench_passes_lists_and_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    case = {"type_k": "q8", "threads": 2, "depth": 4096}
    shares = {"of_read": 0.25, "of_peak": 0.5}
    parts = {name: {"ms": 5.0, **shares} for name in PARTS}
    parts["rest"] = {"ms": 0.125, "of_read": None, "of_peak": None}
    result = {
        "model": "m.gguf",
        "limits": {"2": {"read_gb_s": 42.25, "f32_gmul_s": 240.0, "int8_gmul_s": 1000.0}},
        "prefill": [{**case, "tokens": 512, "tokens_per_s": 1234.56, "min": 1200.0, "max": 1300.0, "parts": parts}],
        "decode": [{**case, "ms_per_token": 20.0, "min": 19.5, "max": 21.25, "parts": parts}],
    }

    def run(path: str | None, **options: Any) -> dict[str, Any]:
        given.update(options, path=path)
        return result

    monkeypatch.setitem(sys.modules, "engine.bench", types.SimpleNamespace(run=run))
    monkeypatch.setattr(engine, "bench", types.SimpleNamespace(run=run), raising=False)
    done = konly(*"bench m.gguf -p 512 -n 8 -d 0,4096 -t 1,2 --type-k f16,q8".split())
    assert callable(given.pop("progress"))
    lists = {"n_prompt": [512], "depths": [0, 4096], "threads": [1, 2], "type_k": ["f16", "q8"]}
    assert given == {"path": "m.gguf", "n_gen": 8, **lists}
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "2 threads 42.2 240 1,000".split() in lines
    times = "5 50% 5 50% 5 50% 0.125".split()
    assert ["50", "t/s", "q8", "2", "4,096", "20", "(19.5-21.2)", *times] in lines
    assert ["512", "tokens", "q8", "2", "4,096", "1,235", "(1,200-1,300)", *times] in lines
    assert json.loads(konly("bench", "--json").stdout) == result


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain Ünïcode 👩‍💻", "plain Ünïcode 👩‍💻"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202eb", "a\\u202eb"),
        ("\x9b", "\\x9b"),
    ],
)
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    assert console.printable(text) == shown


@pytest.mark.parametrize(
    ("nbytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1152, "1.1 KiB"), (12 << 20, "12.0 MiB"), (3 << 40, "3,072.0 GiB")],
)
def test_sizes_are_for_people(nbytes: int, shown: str) -> None:
    assert console.size(nbytes) == shown
