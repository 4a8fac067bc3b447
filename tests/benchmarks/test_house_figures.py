"""The script that counts rooms, functions, loops and circles, on a small planted house."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "house_figures.py"

HOUSE = {
    "zoo/__init__.py": '"""A docstring is no statement."""\n',
    "zoo/start.py": """
        from dataclasses import replace
        from functools import partial
        from zoo.config import Config, Setting
        from zoo.train.loop import train

        def start(config: Config):
            setting = Setting(replace(config, seed=1))
            train(setting, steps=config.steps)
            finish(setting)

        def finish(setting: Setting):
            print(setting)
    """,
    "zoo/config.py": """
        from dataclasses import dataclass

        @dataclass
        class Config:
            seed: int = 0
            steps: int = 3

        @dataclass
        class Setting:
            config: Config
    """,
    "zoo/lists.py": "def count(steps):\n    yield from range(steps)\n",
    "train/loop.py": """
        from zoo.config import Setting
        from zoo.lists import count

        def train(setting: Setting, steps, task, optimizer):
            for step in count(setting.config.steps):
                differentiate(task)
                optimizer.step()

        def differentiate(task):
            task.loss().backward()

        def many(setting):
            for _ in range(3):
                train(setting, 1)

        def solve(solver, loss):
            for _ in range(3):
                loss().backward()
                solver.optimizer.step(loss)
    """,
    "train/top.py": "from zoo.train import bottom\n",
    "train/bottom.py": "def later():\n    import zoo.train.top\n",
    "train/left.py": "import zoo.train.right as right\n",
    "train/right.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from zoo.train.left import anything
    """,
    "train/long.py": "def long():\n" + "    print()\n" * 61 + "\n" * 440,
    "tests/test_it.py": "assert True\n",
    "benchmarks/one.py": "print()\n",
}


def lay_out(text: str) -> str:
    return "\n".join(line.removeprefix(" " * 8) for line in text.splitlines()) + "\n"


@pytest.fixture
def figures(tmp_path):
    for name, text in HOUSE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(lay_out(text))
    (tmp_path / "zoo" / "train").symlink_to("../train")

    def run(*options: str) -> tuple[dict, str]:
        out = tmp_path / "figures.json"
        command = [sys.executable, str(SCRIPT), str(tmp_path), "--json", str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(out.read_text()), done.stdout

    return run


def test_a_planted_house_has_the_figures_that_were_planted(figures):
    found, text = figures("--walk", "zoo.start.start:config")
    assert set(found["rooms"]) == {"zoo", "train"}  # the link is seen where it points
    assert (found["in all"]["files"], found["benchmarks"]["files"]) == (10, 1)
    assert found["rooms"]["train"]["long functions"] == {"train/long.py:1:long": 62}
    assert found["in all"]["long files"] == {"train/long.py": 502}
    assert found["in all"]["functions"] == 9
    assert found["rooms"]["zoo"]["statements"] == 8 + 1 + 3 + 1 + 2 + 3
    assert found["training loops"] == ["train/loop.py:train"]  # neither its caller nor a solver
    assert found["backward calls"] == {"train/loop.py": 2}
    assert "| train | 6 |" in text


def test_circles_are_counted_by_where_their_imports_stand(figures):
    found, text = figures()
    typed = ["zoo.train.left", "zoo.train.right"]
    inner = ["zoo.train.bottom", "zoo.train.top"]
    assert list(found["circles"].values()) == [[], [typed], [inner, typed]]
    assert "those inside functions: 2\n  - zoo.train.bottom, zoo.train.top" in text


def test_a_config_is_followed_through_what_holds_it_and_with_its_fields(figures):
    found, text = figures("--walk", "zoo.start.start:config")
    itself = found["walks"]["itself"]
    assert itself["rooms"] == ["zoo/start.py", "train/loop.py"]
    assert (itself["stays"], itself["climbs"]) == (3, 1)  # start, train, finish
    fields = found["walks"]["with its fields"]
    assert fields["rooms"] == ["zoo/start.py", "train/loop.py", "zoo/lists.py"]
    assert "itself visits 2 files, 1 climbs in 3 stays" in text

    found, text = figures("--walk", "zoo.start.gone:config")
    assert found["walks"] == {}
    assert "there is no `zoo.start.gone:config` to follow" in text
