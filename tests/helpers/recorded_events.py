"""Keeps what long work reported."""

from scm_sdk._util.events import Silent


class Recorded(Silent):
    """Every event in order, and the same by kind."""

    def __init__(self) -> None:
        self.all: list[tuple[str, object]] = []
        self.stages: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.results: list[object] = []
        self.skipped: list[str] = []
        self.notes: list[str] = []

    def stage(self, title: str, /) -> None:
        self.all.append(("stage", title))
        self.stages.append(title)

    def step(self, text: str, done: int, total: int, /) -> None:
        self.all.append(("step", text))
        self.steps.append((text, done, total))

    def result(self, made: object, /) -> None:
        self.all.append(("result", made))
        self.results.append(made)

    def skip(self, reason: str, /) -> None:
        self.all.append(("skip", reason))
        self.skipped.append(reason)

    def note(self, text: str, /) -> None:
        self.all.append(("note", text))
        self.notes.append(text)
