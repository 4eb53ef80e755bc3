"""Set up, then do the main job: python scripts/try.py "Once upon a time"

Makes .venv, installs konly into it (the first time; later runs start at once) and continues the prompt with the default
model, greedily, so that it writes the same story everywhere. For options: konly run --help.
"""

from __future__ import annotations

import signal
import subprocess
import sys

import environment


def main() -> int:
    words = sys.argv[1:]
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    environment.ensure()
    command = [str(environment.script("konly")), "run", "--temp", "0", "-n", "400"]
    command += ["-p", " ".join(words) or "Once upon a time"]
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is konly's to answer; we wait for it
    return subprocess.run(command, env=environment.environ(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
