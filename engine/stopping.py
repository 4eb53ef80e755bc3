"""Stop strings in streamed text: nothing of one is ever shown."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import EngineError


class StopStrings:
    """push(text) -> what may be shown; the rest is held back while it could be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]):
        if any(not isinstance(s, str) or not s for s in stops):
            raise EngineError("stop: expected non-empty strings")
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        if self.found:
            return ""
        text = self._held + text
        ends = [at for at in (text.find(s) for s in self._stops) if at >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for s in self._stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back; the text is over."""
        text, self._held = self._held, ""
        return "" if self.found else text
