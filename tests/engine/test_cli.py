"""The command line over a stub of the engine: options, streams, errors, Ctrl-C. The real one: test_cli_process.py."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

import engine
from engine import cli, console, memory
from engine.backend import BACKENDS
from engine.commands import bench, options, sampling, text
from engine.errors import ModelFormatError
from engine.grammar import Grammar
from engine.k_cache import DEFAULT_TYPE_K, TYPES_K, KCacheLayout
from engine.parts import PARTS
from engine.sampling import Sampling
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
        self.backend = "cpu"
        self.stats = Stats(n_prompt=5, t_prompt=0.01, n_generated=64, t_generated=0.2, finish_reason=self.reason)
        StubEngine.opened = self

    def generate(self, prompt: str, **options: Any) -> Iterator[str]:
        assert callable(options.pop("progress"))
        self.prompt, self.generate_options = prompt, options
        yield from self.pieces
        if self.fails:
            raise self.fails

    def tokenize(self, text: str) -> list[int]:
        return list(range(len(text.split())))

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
    assert done.stderr == "prompt 5 tokens, 500.0 t/s | generated 64 tokens, 315.0 t/s | K-cache 3.0 MiB (q8)\n"
    assert StubEngine.opened.path == "model.gguf"
    assert StubEngine.opened.prompt == "Oh. "
    assert StubEngine.opened.closed


def test_prompt_is_hidden_on_request() -> None:
    assert konly("run", "-p", "Oh. ", "--no-display-prompt").stdout == "Hello, wörld\n"


def test_defaults_are_left_to_the_engine() -> None:
    konly("run", "-p", "x")
    opened = StubEngine.opened
    assert opened.path is None
    assert callable(opened.options.pop("progress")) and callable(opened.options.pop("loading"))
    sizes = {"n_ctx": None, "type_k": DEFAULT_TYPE_K, "n_threads": None, "n_ubatch": None}
    assert opened.options == {**sizes, "backend": "cpu", "experts": None}
    assert opened.generate_options == {"max_tokens": None, "sampling": Sampling()}


def test_every_option_arrives() -> None:
    konly(*"run -m m.gguf -p x -n 7 -c 99 -t 3 -ub 64 -ctk q8 --backend gpu --experts cpu".split())
    opened = StubEngine.opened
    del opened.options["progress"], opened.options["loading"]
    assert opened.path == "m.gguf"
    sizes = {"n_ctx": 99, "type_k": "q8", "n_threads": 3, "n_ubatch": 64}
    assert opened.options == {**sizes, "backend": "gpu", "experts": "cpu"}
    assert opened.generate_options == {"max_tokens": 7, "sampling": Sampling()}


def test_every_sampling_option_arrives() -> None:
    given: dict[str, Any] = {}
    words = []
    for i, (option, field, default, _) in enumerate(sampling.NUMBERS):
        value = (
            2 if field == "mirostat" else type(default)(round(0.5 + i / 100, 2) if isinstance(default, float) else i)
        )
        given[field] = value
        words += [option, str(value)]
    konly("run", "-p", "x", *words, *"--seed 42 --ignore-eos -l 5+1.5 -l 7-inf --dry-sequence-breaker".split(), "\\n")
    expected = Sampling(
        **given, seed=42, ignore_eos=True, logit_bias={5: 1.5, 7: -math.inf}, dry_sequence_breakers=("\n",)
    )
    assert StubEngine.opened.generate_options["sampling"] == expected
    fields = {field.name for field in dataclasses.fields(Sampling)}
    assert fields - set(given) == {"seed", "ignore_eos", "logit_bias", "dry_sequence_breakers", "min_keep"}


def test_no_breaker_stops_dry_where_none_is_given() -> None:
    konly("run", "-p", "x", "--dry-sequence-breaker", "none")
    assert tuple(StubEngine.opened.generate_options["sampling"].dry_sequence_breakers) == ()


def test_options_of_the_text_arrive(tmp_path: Any) -> None:
    konly("run", "-p", "x", "-r", "User:", "-r", "\\n\\n", "--context-shift", "--keep", "3", "--draft-ngram")
    options = StubEngine.opened.generate_options
    del options["sampling"], options["max_tokens"]
    assert options == {"stop": ["User:", "\n\n"], "context_shift": True, "n_keep": 3, "speculate": True}
    konly("run", "-p", "four words of prompt", "--keep", "-1")
    assert StubEngine.opened.generate_options["n_keep"] == 4


@pytest.mark.parametrize("kind", ["json_schema", "json_schema in a file", "regex", "lark"])
def test_a_grammar_arrives(tmp_path: Any, kind: str) -> None:
    schema, lark, file = '{"type": "object"}', 'start: "a"+', tmp_path / "given"
    file.write_text((lark if kind == "lark" else schema) + "\n", encoding="utf-8")
    option, value = {
        "json_schema": ("--json-schema", schema),
        "json_schema in a file": ("--json-schema", str(file)),
        "regex": ("--regex", "a+"),
        "lark": ("--grammar-file", str(file)),
    }[kind]
    assert konly("run", "-p", "x", option, value).exit_code == 0
    expected = {"regex": Grammar.regex("a+"), "lark": Grammar.lark(lark)}.get(kind, Grammar.json_schema(schema))
    assert StubEngine.opened.generate_options["grammar"] == expected


@pytest.mark.parametrize(
    ("text", "meant"), [("a", "a"), ("\\n", "\n"), ("a\\\\n\\t", "a\\n\t"), ("\\d\\", "\\d\\"), ('\\"', '"')]
)
def test_escapes_in_options_are_llama_cpps(text: str, meant: str) -> None:
    assert sampling.unescaped(text) == meant


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
        (("run", "-p", ""), "the prompt is empty; give one by"),
        (("run", "-p", "x", "-f", "y"), "two prompts"),
        (("run", "a.gguf", "-m", "b.gguf", "-p", "x"), "two models"),
        (("run", "-f", "/nowhere/prompt.txt"), "prompt.txt: cannot be read"),
        (("run", "-p", "x", "-ctk", "q4"), "'f16', 'bf16', 'q8'"),
        (("run", "-p", "x", "-n", "-2"), "-1"),
        (("run", "-p", "x", "-l", "word+1"), "expected a token id and a bias like 15043-1.5"),
        (("run", "-p", "x", "--regex", "a", "--json-schema", "{}"), "two grammars: --json-schema and --regex"),
        (("run", "-p", "x", "--json-schema", "/nowhere/schema"), "schema: cannot be read"),
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
    beyond, short = konly("run", "-p", "x", "-c", "400000", "-ctk", "f16").stderr.splitlines()[:2]
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


def test_what_was_drafted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drafting(StubEngine):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.stats.n_drafted, self.stats.n_accepted = 1000, 900

    monkeypatch.setattr(engine, "Engine", Drafting, raising=False)
    assert konly("run", "-p", "x").stderr.endswith("| drafted 1,000, right 900\n")


def test_rates_without_tokens_are_not_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.rate(0, 0.0) == console.rate(-1, 0.1) == "- t/s"


def test_defaults_are_those_of_the_engine() -> None:
    konly("run", "-p", "x")
    assert StubEngine.opened.generate_options["sampling"] == Sampling()
    assert (options.TYPES_K, options.DEFAULT_TYPE_K, bench.PARTS) == (TYPES_K, DEFAULT_TYPE_K, PARTS)
    assert options.BACKENDS == BACKENDS


def test_help_names_the_commands() -> None:
    done = konly("-h")
    assert all(f"  {name} " in done.stdout for name in cli.main.commands)


def test_compiling_is_told_in_two_lines_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.CompileProgress() as progress:
        progress(0, 0, "nothing to do")
        for done in range(3):
            progress(done, 2, "mla_decode[f16]")
        progress(2, 2, "again")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "compiling 2 kernels for this machine …"
    assert second.startswith("compiled 2 kernels for this machine in ")


def test_bench_passes_lists_and_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    case = {"type_k": "q8", "threads": 2, "depth": 4096}
    shares = {"of_read": 0.25, "of_peak": 0.5}
    parts = {name: {"ms": 5.0, **shares} for name in PARTS}
    parts["rest"] = {"ms": 0.125, "of_read": None, "of_peak": None}
    result = {
        "model": "m.gguf",
        "backend": "cpu",
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
    assert callable(given.pop("progress")) and callable(given.pop("tell"))
    lists = {"n_prompt": [512], "depths": [0, 4096], "threads": [1, 2], "type_k": ["f16", "q8"]}
    assert given == {"path": "m.gguf", "n_gen": 8, "n_ubatch": None, "backend": "cpu", "experts": None, **lists}
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_is_shown_on_a_terminal_and_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with console.Counter("reading", unit="t", patience=0.0) as counter:
        counter(0, 100)
        counter._timer.join()  # type: ignore[union-attr]
        assert counter._bar is not None
        counter(50, 100)
        (task,) = counter._bar.tasks
        assert (task.completed, task.total) == (50, 100) and task.fields["note"].endswith(" t/s")
        counter(100, 100)
        assert counter._bar is None
    assert "reading" in sys.stderr.getvalue()


def test_what_is_soon_done_or_not_on_a_terminal_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stderr)
        with console.Counter("reading", patience=60.0 if stderr.isatty() else 0.0) as counter:
            counter(0, 2)
            timer = counter._timer
            counter(1, 2)
        assert stderr.getvalue() == ""
        assert counter._timer is None
        if timer is not None:
            timer.join()  # it was cancelled


def test_the_prompt_waits_for_the_first_piece(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pieces() -> Iterator[str]:
        assert capsys.readouterr().out == ""
        yield "b"
        assert capsys.readouterr().out == "ab"

    assert text.show(pieces(), "a") is False
    assert capsys.readouterr().out == "\n"
