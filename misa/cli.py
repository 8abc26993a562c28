"""The command line: `misa <command>`, the same as `python -m misa <command>`.

Exit status: 0 done, 2 wrong input (one sentence on standard error), 1 failure.
"""

import argparse
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from misa.errors import DIVERGED, Diverged, Stopped, UserError
from misa.machine import Machine, is_main_process
from misa.parameters import at_least

_HELP = {
    "row": "table:row, for example demo:box or experiments/demo.py:box",
    "data_root": "a COCO-layout folder; for the embedded data, the folder to write it into",
    "work_dir": "the run folder (default: runs/<row>-seed<seed>)",
    "seed": "of weights, order and augmentation",
    "epochs": "instead of the row's",
    "batch": "images a step over all GPUs, instead of the row's",
    "gpus": "0 for the CPU, more for as many GPUs (default: a GPU if there is one)",
    "per_gpu": "images that a GPU sees at a time; the batch is accumulated from these (default: its whole part)",
    "scale_lr": "with another batch, the learning rate in proportion",
    "precision": "of the networks: float32, bfloat16, float16 (default: as the row says)",
    "loggers": "wandb, mlflow or both, beside TensorBoard",
    "workers": "processes that load images",
    "threads": "of torch on the CPU",
    "resume": "go on from the last checkpoint of the run folder",
    "smoke": "two steps on small images, to see that a row runs",
    "interactive": "a progress bar instead of lines",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # names of files and classes need not fit the terminal's encoding
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    # These have arguments of their own.
    if arguments[:1] == ["doctor"]:
        from misa.doctor import main as doctor

        return doctor(arguments[1:])
    if arguments[:1] == ["gallery"]:
        from misa.gallery import main as gallery

        try:
            return gallery(arguments[1:])
        except UserError as error:
            print(f"misa gallery: {error}", file=sys.stderr)
            return 2
    if arguments[:1] == ["profile"]:
        from misa.engine.training.profile import main as profile

        return profile(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except UserError as error:
        if is_main_process():
            print(f"misa {options.command}: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        if str(error):
            print(f"misa {options.command}: {error}", file=sys.stderr)
        return error.status
    except Diverged as error:
        print(f"misa {options.command}: {DIVERGED}{error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a file system that went away
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        print(f"misa {options.command}: {what}; mend that, and the same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was stopped.", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="misa", description="Box-supervised instance segmentation (MISA, IJCAI-24).", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("doctor", help="look at the installation and say what is missing", add_help=False)
    commands.add_parser("profile", help="where a training step goes, part by part", add_help=False)
    commands.add_parser("gallery", help="execute the notebooks and make pages of them", add_help=False)

    train = commands.add_parser(
        "train",
        help="train a row, score it, leave a run folder",
        epilog="example: misa train demo:box --work-dir runs/demo",
    )
    _add_train_options(train)
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="score a run's checkpoint on its validation data, or on other data",
        epilog="example: misa evaluate runs/demo",
    )
    evaluate.add_argument("run_folder", help="a run folder made by misa train")
    evaluate.add_argument("--checkpoint", help="default: the run's last; 'none' for the untrained network")
    evaluate.add_argument("--data-root", help="default: the run's own")
    evaluate.add_argument("--miou", action="store_true", help="also mean IoU, a student's instances merged (Figure 1)")
    evaluate.add_argument("--merge-score", type=float, default=0.3, help="least score of an instance to be merged")
    evaluate.add_argument(
        "--separation", action="store_true", help="of a teacher: does S tell objects apart where color does not?"
    )
    evaluate.add_argument("--per-class", action="store_true", help="also the AP of every class")
    evaluate.add_argument(
        "--boundary", action="store_true", help="also boundary AP (needs the package faster-coco-eval)"
    )
    evaluate.add_argument(
        "--test-dev",
        metavar="FOLDER",
        help="instead: COCO test-dev results as json and zip into this new folder; --data-root is COCO's",
    )
    evaluate.add_argument("--predictions", help="keep the detections here, as a COCO results file")
    for name in ("gpus", "workers", "threads"):
        default = {"gpus": None, "workers": 0, "threads": 1}[name]
        evaluate.add_argument(f"--{name}", type=int, default=default, help=_HELP[name])
    evaluate.set_defaults(run=_evaluate)

    _add_predict(commands)
    _add_tables(commands)
    _add_figures(commands)
    _add_guidance(commands)

    check = commands.add_parser(
        "check",
        help="read a data set's annotations and images and list what is wrong with them",
        epilog="example: misa check path/to/data --picture check.png",
    )
    check.add_argument("data_root", help="a folder in COCO layout, of VOC xml or csv; or one COCO json, or one csv")
    check.add_argument("--images", help="of one COCO json: the folder of its images (default: beside it)")
    check.add_argument("--picture", help="draw 16 images with their boxes here (default: runs/check-<data>.png)")
    check.add_argument("--no-picture", action="store_true", help="draw nothing")
    check.set_defaults(run=_check)
    _add_data(commands)
    _add_estimate(commands)
    return parser


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="bring a data set into the layout that misa reads")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="kind")
    voc = kinds.add_parser(
        "voc",
        help="PASCAL VOC 2012, with SBD for train_aug, as COCO annotations",
        epilog="example: misa data voc VOCdevkit/VOC2012 --sbd benchmark_RELEASE/dataset --out datasets/voc",
    )
    voc.add_argument("devkit", help="VOC2012 or a folder that holds it; with --download, where to fetch it to")
    voc.add_argument("--out", required=True, help="the new data folder")
    voc.add_argument("--sbd", help="SBD's folder with inst/ and the lists, for train_aug")
    voc.add_argument("--train", default="", help="the list to train on (default: train_aug with SBD, train without)")
    voc.add_argument("--val", default="val", help="the list to score on (default: val)")
    voc.add_argument("--download", action="store_true", help="fetch VOC and SBD first, about 3.4 GB")
    voc.set_defaults(run=_data_voc)
    coco = kinds.add_parser(
        "coco",
        help="COCO 2017: which of its files are in a folder, and whether they are whole",
        epilog="example: misa data coco datasets/coco",
    )
    coco.add_argument("root", help="the folder with annotations/ and the image folders")
    coco.set_defaults(run=_data_coco)


def _add_estimate(commands: Any) -> None:
    estimate = commands.add_parser(
        "estimate",
        help="step time, memory and days of a row on other GPUs, from two small steps measured here",
        epilog="example: misa estimate table1_coco:misa_r50 --gpus 8 --gpu H100",
    )
    estimate.add_argument("row", help=_HELP["row"])
    estimate.add_argument("--gpus", type=at_least(1), default=1, help="how many (default 1)")
    estimate.add_argument("--gpu", default="H100", help="their kind (default H100)")
    estimate.add_argument("--per-gpu", type=at_least(1), help=_HELP["per_gpu"])
    estimate.add_argument("--precision", default="", help=_HELP["precision"])
    estimate.add_argument("--images", type=at_least(1), help="training images (default: the published number)")
    estimate.add_argument("--utilization", type=float, help="share of the GPU's peak (default: measured, or 0.3)")
    estimate.set_defaults(run=_estimate)


def _estimate(options: argparse.Namespace) -> int:
    import torch

    from misa.engine.training.estimate import estimate, measure, require_known
    from misa.engine.training.train import experiment_of
    from misa.parameters import TrainParameters

    experiment = experiment_of(TrainParameters(row=options.row, precision=options.precision))
    require_known(options.gpu)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"measuring steps of {options.row} on this machine's {device}; minutes on a CPU", flush=True)
    work = measure(experiment, device=device)
    names = ("gpus", "gpu", "per_gpu", "images", "utilization")
    print(estimate(experiment, work, **{name: getattr(options, name) for name in names}))
    print("the formula and what it leaves out: misa/engine/training/estimate.py")
    return 0


def _data_voc(options: argparse.Namespace) -> int:
    from misa.data.formats.voc import download_voc, write_voc

    devkit, sbd = options.devkit, options.sbd
    if options.download:
        devkit, sbd = download_voc(devkit)
    print(*write_voc(devkit, options.out, sbd=sbd, train=options.train, val=options.val), sep="\n")
    print(f"now: misa train table2_voc:misa_r50 --data-root {options.out}")
    return 0


def _data_coco(options: argparse.Namespace) -> int:
    from misa.data.formats.coco2017 import look_at_coco

    splits = look_at_coco(options.root)
    print(*splits, sep="\n")
    return 0 if all(split.whole for split in splits if split.needed) else 2


def _add_figures(commands: Any) -> None:
    """`misa figures` and `misa whence`."""
    from misa.parameters import FiguresParameters

    default = FiguresParameters()
    figures = commands.add_parser(
        "figures",
        help="Figures 1, 3, 4 and 5 from run folders, as PDF and PNG that say where they come from",
        epilog="example: misa figures runs/demo-misa-seed0 --out figures --images 3,17",
    )
    figures.add_argument("runs", nargs="+", help="run folders; the teachers beside students are found")
    figures.add_argument("--out", default=default.out, help="their folder (default: runs/figures/<run>)")
    figures.add_argument("--only", default=default.only, help=f"which figures (default: {default.only})")
    figures.add_argument("--images", default=default.images, help="ids of images to show in any case, as 3,17")
    figures.add_argument("--random", type=int, default=default.random, help="how many more are drawn by chance")
    figures.add_argument("--worst", type=int, default=default.worst, help="how many of the worst Figure 5 adds")
    figures.add_argument("--seed", type=int, default=default.seed, help="of the images drawn by chance")
    figures.add_argument("--channel", type=int, default=default.channel, help="of the features in Figure 3")
    figures.add_argument(
        "--semantic-scale",
        type=float,
        default=default.semantic_scale,
        help="bandwidth in σ of S, in Figure 4 (0: as trained)",
    )
    figures.add_argument("--form", default=default.form, help="of SEPA in Figure 4: sum, product (default: as trained)")
    figures.set_defaults(run=_figures)
    origin = commands.add_parser(
        "whence",
        help="what a figure was made from, and the command that makes it again",
        epilog="example: misa whence runs/figures/demo/figure4.pdf",
    )
    origin.add_argument("file", help="a PDF or PNG made by misa figures")
    origin.set_defaults(run=_whence)


def _add_guidance(commands: Any) -> None:
    """`misa guidance`."""
    guidance = commands.add_parser(
        "guidance",
        help="what each affinity would pull a student's masks to: towards the truth, or away from it?",
        epilog="example: misa guidance runs/demo-misa-seed0 --images 60 --out runs/guidance",
    )
    guidance.add_argument("run_folder", metavar="RUN", help="the run folder of a student trained from boxes")
    guidance.add_argument("--teacher", help="the run folder of a teacher in place of the student's own, or of none")
    guidance.add_argument("--split", choices=("val", "train"), default="val", help="whose images (default: val)")
    guidance.add_argument("--images", type=int, default=60, help="how many, with objects (default: 60)")
    guidance.add_argument("--group", default="all", help="print objects of this class, size or mode, such as small")
    guidance.add_argument("--only", default="", help="readings whose name has one of these words, commas between")
    guidance.add_argument("--out", help="write the table of all groups (csv) and the figure into this folder")
    guidance.add_argument("--data-root", default=None, help=_HELP["data_root"])
    guidance.add_argument("--seed", type=int, default=0, help="of the images drawn by chance (default: 0)")
    guidance.set_defaults(run=_guidance)


def _guidance(options: argparse.Namespace) -> int:
    from misa.engine.reports.guidance import READINGS, measure_guidance, write_guidance

    words = [word.strip() for word in options.only.split(",") if word.strip()]
    readings = {name: value for name, value in READINGS.items() if not words or any(word in name for word in words)}
    if not readings:
        raise UserError(f"no reading has {options.only!r} in its name; they are {'; '.join(READINGS)}.")
    if options.images < 1:
        raise UserError(f"images is {options.images}; it must be at least 1.")
    measured = measure_guidance(
        options.run_folder,
        teacher=options.teacher,
        readings=readings,
        split=options.split,
        images=options.images,
        data_root=options.data_root,
        seed=options.seed,
    )
    print(measured.text(options.group))
    if options.out:
        print(*write_guidance(measured, options.out), sep="\n")
    return 0


def _add_tables(commands: Any) -> None:
    """`misa tables`."""
    tables = commands.add_parser(
        "tables",
        help="the paper's ablation tables: what it prints, what was measured here, what was not run",
        epilog="example: misa tables 3 --data demo --seeds 5 --run",
    )
    tables.add_argument("table", help="3, 4 or 5, or rows to compare with the first: teacher:demo,teacher:demo_boxes")
    tables.add_argument("--data", default="demo", help="demo, voc, coco_mini or photos (default: demo)")
    tables.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    tables.add_argument(
        "--run", dest="train", action="store_true", help="train what is missing, go on with what was interrupted"
    )
    tables.add_argument("--slots", type=int, default=1, help="trainings at a time on this machine")
    tables.add_argument("--cluster", default="", help="submit the trainings through submitit instead, such as slurm")
    tables.add_argument(
        "--cluster-options",
        default="",
        metavar="NAME=VALUE,...",
        help="for submitit: timeout_min=1440,gpus_per_node=1,slurm_partition=gpu; timeout_min is of one training",
    )
    tables.add_argument("--data-root", default="datasets", help=_HELP["data_root"])
    tables.add_argument("--root", default="runs/tables", help="where the runs are (default: runs/tables)")
    tables.add_argument("--format", choices=("text", "html", "latex", "csv"), default="text")
    tables.add_argument("--save", help="also write HTML, LaTeX and CSV into this folder")
    tables.add_argument("--smoke", action="store_true", help="two steps a training, to see that the rows run")
    for name in ("gpus", "workers", "threads"):
        tables.add_argument(f"--{name}", type=int, default=getattr(Machine(), name), help=_HELP[name])
    tables.set_defaults(run=_tables)


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """One option a field of TrainParameters, so that notebook and command line cannot drift apart."""
    from misa.parameters import TrainParameters

    hints = typing.get_type_hints(TrainParameters)
    for field in dataclasses.fields(TrainParameters):
        kinds: tuple[Any, ...] = typing.get_args(hints[field.name]) or (hints[field.name],)
        option = "--" + field.name.replace("_", "-")
        keys: dict[str, Any] = {"help": _HELP[field.name], "default": field.default}
        if kinds[0] is bool:
            keys["action"] = argparse.BooleanOptionalAction
        else:
            keys["type"] = kinds[0]
        if field.name == "row":
            parser.add_argument("row", help=keys["help"])
        else:
            parser.add_argument(option, **keys)


def _add_predict(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="masks for images, folders and videos, without any annotation file",
        epilog="example: misa predict runs/demo photos/ --out results",
    )
    predict.add_argument("checkpoint", help="a run folder, a checkpoint in it, or a file made by misa export")
    predict.add_argument("inputs", nargs="+", help="images, folders of images, videos")
    predict.add_argument("--out", required=True, help="the folder of the results; the same command again goes on")
    predict.add_argument("--boxes", help="known boxes (COCO json, csv, or a folder of VOC xml): a mask for each")
    predict.add_argument("--score", type=float, default=0.3, help="least score of an instance (default 0.3)")
    predict.add_argument("--mask", type=float, help="least probability of a mask's pixel (default: the row's)")
    predict.add_argument("--batch", type=int, default=1, help="images at a time")
    predict.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    predict.add_argument("--threads", type=int, default=1, help=_HELP["threads"])
    predict.add_argument("--tile", type=int, help="very large images in tiles of so many pixels")
    predict.add_argument("--overlap", type=int, default=128, help="pixels that neighbouring tiles share (default 128)")
    predict.add_argument("--every", type=int, default=1, help="of a video: each so many frames")
    predict.add_argument(
        "--masks", choices=("map", "each", "none"), default="map", help="one PNG an image, one an instance, or none"
    )
    predict.add_argument("--overlay", action=argparse.BooleanOptionalAction, default=True, help="pictures to look at")
    predict.set_defaults(run=_predict)

    inspect = commands.add_parser(
        "inspect",
        help="where a run fails: worst images, failures by kind, intervals, on one page",
        epilog="example: misa inspect runs/demo",
    )
    inspect.add_argument("run_folder", help="a finished student's run folder")
    inspect.add_argument("--predictions", help="another COCO results file (default: the run's own)")
    inspect.add_argument("--data-root", help="default: the run's own")
    inspect.add_argument("--out", default="", help="the page (default: inspection.html in the run folder)")
    inspect.add_argument("--threshold", type=float, default=0.3, help="least score of a detection taken seriously")
    inspect.add_argument("--good", type=float, default=0.5, help="IoU from which on an object is found (default 0.5)")
    inspect.add_argument("--resamples", type=int, default=1000, help="of the images, for the intervals")
    inspect.set_defaults(run=_inspect)

    export = commands.add_parser(
        "export",
        help="a student as one file with its row and class names, without teacher and optimiser",
        epilog="example: misa export runs/demo student.pth",
    )
    export.add_argument("checkpoint", help="a run folder, or a checkpoint in it")
    export.add_argument("out", help="the new file")
    export.add_argument("--torchscript", action="store_true", help="the dense part of a SOLOv2 as a program instead")
    export.set_defaults(run=_export)


def _inspect(options: argparse.Namespace) -> int:
    from misa.engine.reports.inspection import inspect_run, summary

    names = ("predictions", "data_root", "out", "threshold", "good", "resamples")
    found = inspect_run(options.run_folder, **{name: getattr(options, name) for name in names})
    print(f"{summary(found)}\n\nthe page: {found.page}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from misa.engine.prediction.export import export_student, export_torchscript

    if options.torchscript:
        made = export_torchscript(options.checkpoint, options.out)
        path, more = made.path, f"; at most {made.difference:.1e} from the student, at several sizes"
    else:
        path, more = export_student(options.checkpoint, options.out), ""
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB{more}")
    return 0


def _predict(options: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from misa.data.formats.convert import read_boxes
    from misa.engine.prediction.predict import Boxes, predict

    torch.set_num_threads(max(options.threads, 1))
    names = ("out", "score", "mask", "batch", "device", "tile", "overlap", "every", "masks", "overlay")
    boxes = None
    if options.boxes:
        boxes = {name: Boxes(np.array(box), label) for name, (box, label) in read_boxes(options.boxes).items()}
    done = predict(options.checkpoint, options.inputs, boxes=boxes, **{name: getattr(options, name) for name in names})
    print(f"{done.folder}: {done.instances} instances in {done.images} images")
    if done.failed:
        first = next(iter(done.failed.values()))
        more = f" ({len(done.failed) - 1} more like it)" if len(done.failed) > 1 else ""
        others = "the other images are done, but " if done.images else ""
        raise UserError(f"{others}{first}{more}")
    return 0


def _train(options: argparse.Namespace) -> int:
    from misa.engine.training.train import train_from
    from misa.parameters import TrainParameters

    names = [field.name for field in dataclasses.fields(TrainParameters)]
    run = train_from(TrainParameters(**{name: getattr(options, name) for name in names}))
    if is_main_process():
        print(run.table())
        print(f"run folder: {run.folder}")
    return 0


def _figures(options: argparse.Namespace) -> int:
    from misa.engine.reports.figures import factory_from
    from misa.parameters import FiguresParameters

    names = ("out", "only", "images", "random", "worst", "seed", "channel", "semantic_scale", "form")
    given = {name: getattr(options, name) for name in names}
    parameters = FiguresParameters(runs=",".join(options.runs), **given)
    written = factory_from(parameters).make(parameters.out)
    print(*written, sep="\n")
    return 0 if written else 2


def _whence(options: argparse.Namespace) -> int:
    from misa.figures.provenance import as_text, provenance_of

    print(as_text(provenance_of(options.file)))
    return 0


def _tables(options: argparse.Namespace) -> int:
    from misa.engine.reports.tables import open_table, summary
    from misa.engine.training import sweep

    if options.seeds < 1 or options.slots < 1:
        raise UserError(f"seeds and slots must be 1 or more: they are {options.seeds} and {options.slots}.")
    table = open_table(options.table, data=options.data, seeds=options.seeds, root=options.root, smoke=options.smoke)
    if options.train:
        names = ("slots", "cluster", "cluster_options", "data_root")
        sweep.run(table.every_job(), machine=_machine(options), **{name: getattr(options, name) for name in names})
    print(table.render(options.format))
    if options.format == "text":
        print(summary(table.every_job()))
    if options.save:
        name = re.sub(r"[^\w.-]+", "_", f"table{options.table}_{options.data}")
        for path in table.save(options.save, name):
            print(path)
    return 0


def _machine(options: argparse.Namespace) -> Machine:
    return Machine(gpus=options.gpus, workers=options.workers, threads=options.threads)


def _check(options: argparse.Namespace) -> int:
    from misa.engine.reports.checkup import check_data

    name = Path(options.data_root).expanduser().resolve().stem
    picture = None if options.no_picture else options.picture or f"runs/check-{name}.png"
    found = check_data(options.data_root, images=options.images, picture=picture)
    print(found)
    return 0 if found.usable else 2


def _evaluate(options: argparse.Namespace) -> int:
    from misa.engine.reports.evaluate import evaluate

    if options.separation:
        from misa.engine.reports.separation import teacher_separation
        from misa.engine.runs.folder import score_table

        print(score_table(teacher_separation(options.run_folder, data_root=options.data_root)))
        return 0
    if options.test_dev:
        from misa.engine.reports.submission import NOTE, submit

        where = options.run_folder, options.data_root or "datasets/coco", options.test_dev
        print(submit(*where, checkpoint=options.checkpoint, machine=_machine(options)))
        print(NOTE)
        return 0
    result = evaluate(
        options.run_folder,
        checkpoint=options.checkpoint,
        data_root=options.data_root,
        merged=options.miou,
        merge_score=options.merge_score,
        details=options.per_class,
        boundary=options.boundary,
        predictions=options.predictions,
        machine=_machine(options),
    )
    print(result.table())
    return 0
