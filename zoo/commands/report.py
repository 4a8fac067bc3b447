"""`zoo report`: one page about a run, or about many."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.commands.parse import parse


@dataclass(frozen=True, kw_only=True)
class ReportArgs:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, finished or not, and result files of zoo eval."""
    add: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Results of mmdet or mmseg as DATA:FILE.json. May be given several times."""
    out: Path | None = None
    """File of the joined page; ./report.html by default. With .md or .tex it is a table of the
    headlines, with .csv or .json all numbers, with .png one picture: a run's feature maps, or
    many models' speed against the first headline."""


def main(argv: list[str]) -> None:
    """Write RUN/report.html of one run, or join runs and result files into one page.

    Of a folder of zoo prune, it shows what stayed. Examples:
    zoo report runs/mine      zoo report runs/a runs/b results.jsonl --out all.html
    zoo report results.jsonl --add coco:work_dirs/mask_rcnn/results.json --out table.tex
    zoo report runs/mine --out maps.png
    """
    args = parse(ReportArgs, argv, "report", main.__doc__ or "", several=("--add",))
    if not args.runs and not args.add:
        raise ValueError("Name at least one run's folder or result file of zoo eval.")
    from zoo.eval.report.imported import read_added
    from zoo.eval.report.joined import build_joined
    from zoo.eval.report.picture import write_picture
    from zoo.eval.report.pruned import build_pruned, is_pruned
    from zoo.eval.report.questions import build_questions, is_image_text
    from zoo.eval.report.tables import FORMS, write_table
    from zoo.eval.report.training import build_page

    added = [read_added(word) for word in args.add]
    if args.out is not None and args.out.suffix in FORMS:
        written, notes = write_table(args.runs, args.out, added)
        print(written.resolve())
        for note in notes:
            print(note, file=sys.stderr)
    elif args.out is not None and args.out.suffix == ".png" and not added:
        print(write_picture(args.runs, args.out).resolve())
    elif added:
        print(build_joined(args.runs, args.out or Path("report.html"), added).resolve())
    elif len(args.runs) == 1 and is_pruned(args.runs[0]):
        print(build_pruned(args.runs[0]).resolve())
    elif len(args.runs) == 1 and is_image_text(args.runs[0]):
        print(build_questions(args.runs[0]).resolve())
    elif len(args.runs) == 1 and args.runs[0].suffix != ".jsonl" and args.out is None:
        print(build_page(args.runs[0]).resolve())
    else:
        print(build_joined(args.runs, args.out or Path("report.html")).resolve())
