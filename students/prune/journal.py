"""What a search has found so far, so that one that was killed goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

from zoo.files import written_whole
from zoo.students.prune.candidates import Candidate
from zoo.students.prune.cost import Cost

NAME = "search.jsonl"


class Journal:
    """A file of JSON lines: the request, the candidates, and a line for each result.

    It is written anew, whole, with each line.

    Args:
        folder: None keeps it in memory.
        request: What the search was asked for; a file of another one is refused.

    Raises:
        ValueError: the folder holds the search of another request.
    """

    def __init__(self, folder: Path | None, request: dict[str, Any]):
        self.path = folder / NAME if folder else None
        self.lines: list[dict[str, Any]] = [dict(request=request)]
        if self.path and self.path.exists():
            self.lines = [json.loads(line) for line in self.path.read_text().splitlines()]
            theirs = self.lines[0]["request"]
            differs = [key for key in {**theirs, **request} if theirs.get(key) != request.get(key)]
            if differs:
                asked = ", ".join(f"{k} {theirs.get(k)}, now {request.get(k)}" for k in differs)
                raise ValueError(
                    f"{self.path.parent} holds another search ({asked}); ask for the same to go on "
                    "with it, or name another --search.dir."
                )

    def candidates(self) -> tuple[Candidate, list[Candidate]] | None:
        """Return the parent and the candidates that were chosen, if they were."""
        if len(self.lines) < 2:
            return None
        parent, *found = (
            Candidate(c["words"], Cost(**c["cost"]), c["latency_ms"])
            for c in self.lines[1]["candidates"]
        )
        return parent, found

    def choose(self, parent: Candidate, candidates: list[Candidate]) -> None:
        """Note the candidates."""
        self._add(dict(candidates=[c.as_json() for c in (parent, *candidates)]))

    def distance(self, words: str, steps: int) -> float | None:
        """Return how far a candidate was from its parent after so many steps, if it is known."""
        for line in self.lines:
            if line.get("words") == words and line.get("steps") == steps:
                return line["distance"]
        return None

    def note(self, words: str, steps: int, distance: float) -> None:
        """Note how far a candidate is from its parent."""
        self._add(dict(words=words, steps=steps, distance=distance))

    def _add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self.path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.lines))
