"""Where modules and names of zoo went: what was moved or renamed is found, with a warning.

Saved configurations of mmdet and mmseg, pickles and other people's scripts name modules of zoo. A
former name imports what it stands for today, and a DeprecationWarning says how that is called.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

from zoo.import_hook import ImportHook

MODULES = {
    "zoo.benchmark": "zoo.commands.bench.models",
    "zoo.benchmark_distill": "zoo.commands.bench.distill",
    "zoo.cache": "zoo.files",
    "zoo.checkpoint": "zoo.weights",
    "zoo.cost_model": "zoo.train.cost",
    "zoo.detect_command": "zoo.commands.detect",
    "zoo.detect_config": "zoo.commands.openmmlab",
    "zoo.detection": "zoo.commands.detect",
    "zoo.distill_speed": "zoo.commands.bench.step_parts",
    "zoo.dry_run": "zoo.commands.distill.plan",
    "zoo.embedding": "zoo.commands.embed",
    "zoo.eval.correspondence": "zoo.eval.dense.correspondence",
    "zoo.eval.crops": "zoo.data.crops",
    "zoo.eval.depth": "zoo.eval.dense.depth",
    "zoo.eval.detect.mmcv_ops": "zoo.eval.openmmlab.mmcv_ops",
    "zoo.eval.detect.mmdet_config": "zoo.eval.openmmlab.mmdet_config",
    "zoo.eval.detect.mmdet_plugin": "zoo.eval.openmmlab.mmdet_plugin",
    "zoo.eval.detect.mmdet_tool": "zoo.eval.openmmlab.mmdet_tool",
    "zoo.eval.detect.mmengine_config": "zoo.eval.openmmlab.mmengine_config",
    "zoo.eval.growth": "zoo.eval.speed.growth",
    "zoo.eval.kernels": "zoo.eval.speed.kernels",
    "zoo.eval.maps": "zoo.eval.report.maps",
    "zoo.eval.mean_iou": "zoo.eval.dense.mean_iou",
    "zoo.eval.mmseg_config": "zoo.eval.openmmlab.mmseg_config",
    "zoo.eval.mmseg_plugin": "zoo.eval.openmmlab.mmseg_plugin",
    "zoo.eval.mmseg_tool": "zoo.eval.openmmlab.mmseg_tool",
    "zoo.eval.pareto": "zoo.eval.speed.pareto",
    "zoo.eval.sam_masks": "zoo.eval.dense.sam_masks",
    "zoo.eval.segment": "zoo.eval.dense.segment",
    "zoo.eval.segment_classes": "zoo.eval.dense.segment_classes",
    "zoo.eval.segment_data": "zoo.eval.dense.segment_data",
    "zoo.eval.sgd_probe": "zoo.eval.linear",
    "zoo.eval.speed": "zoo.eval.speed.models",
    "zoo.eval.square": "zoo.eval.dense.square",
    "zoo.eval.throughput": "zoo.eval.speed.throughput",
    "zoo.eval.upernet": "zoo.eval.dense.upernet",
    "zoo.eval.windows": "zoo.eval.dense.windows",
    "zoo.evaluation": "zoo.commands.evaluate.run",
    "zoo.experiments.phi_s": "zoo.experiments.phi_s.run",
    "zoo.experiments.phi_s_config": "zoo.experiments.phi_s.config",
    "zoo.experiments.phi_s_figure": "zoo.experiments.phi_s.figure",
    "zoo.experiments.phi_s_plan": "zoo.experiments.phi_s.plan",
    "zoo.experiments.phi_s_result": "zoo.experiments.phi_s.result",
    "zoo.experiments.students": "zoo.experiments.students.run",
    "zoo.experiments.students_result": "zoo.experiments.students.result",
    "zoo.layers.attention_op": "zoo.kernels.attention",
    "zoo.layers.attention_tiles_triton": "zoo.kernels.attention_tiles_triton",
    "zoo.layers.attention_triton": "zoo.kernels.attention_triton",
    "zoo.layers.batch_norm_op": "zoo.kernels.batch_norm",
    "zoo.layers.batch_norm_triton": "zoo.kernels.batch_norm_triton",
    "zoo.layers.cudnn_attention": "zoo.kernels.cudnn_attention",
    "zoo.layers.fused": "zoo.kernels.available",
    "zoo.layers.neighbours": "zoo.layers.short_conv",
    "zoo.layers.neighbours_op": "zoo.kernels.short_conv",
    "zoo.layers.neighbours_triton": "zoo.kernels.short_conv_triton",
    "zoo.layers.recompute": "zoo.layers.checkpointed",
    "zoo.layers.scan_blocks": "zoo.kernels.scan_blocks_triton",
    "zoo.layers.scan_lanes": "zoo.kernels.scan_lanes_triton",
    "zoo.layers.scan_op": "zoo.kernels.scan",
    "zoo.layers.scan_triton": "zoo.kernels.scan_triton",
    "zoo.layers.sigmoid_triton": "zoo.kernels.sigmoid_triton",
    "zoo.layers.sum_rows_triton": "zoo.kernels.sum_rows_triton",
    "zoo.measure_commands": "zoo.commands.evaluate.args",
    "zoo.parse": "zoo.commands.parse",
    "zoo.pipeline": "zoo.commands.distill.run",
    "zoo.run_speed": "zoo.train.distill.caching",
    "zoo.segment_config": "zoo.commands.openmmlab",
    "zoo.teachers.eight_bits": "zoo.teachers.quantize",
    "zoo.teachers.int8_kernel": "zoo.kernels.int8_triton",
    "zoo.teachers.int8_product": "zoo.kernels.int8",
    "zoo.train.caching": "zoo.train.distill.caching",
    "zoo.train.calibrate": "zoo.train.distill.calibrate",
    "zoo.train.data": "zoo.data.sources",
    "zoo.train.distill": "zoo.train.distill.step",
    "zoo.train.embedded": "zoo.data.embedded",
    "zoo.train.engine": "zoo.train.distill.teachers",
    "zoo.train.follow": "zoo.train.distill.sizes",
    "zoo.train.hadamard": "zoo.train.distill.hadamard",
    "zoo.train.losses": "zoo.train.distill.losses",
    "zoo.train.phi_s": "zoo.train.distill.phi_s",
    "zoo.train.plan": "zoo.data.plan",
    "zoo.train.recipes": "zoo.train.distill.recipes",
    "zoo.train.shift": "zoo.train.distill.shift",
    "zoo.train.tiny": "zoo.train.distill.tiny",
    "zoo.train.turn": "zoo.train.distill.plan_step",
    "zoo.train.weighting": "zoo.train.distill.weighting",
}
"""Former module -> module. Some of the former ones are packages today."""

COMMANDS = """
distill_args=distill.args stages=distill.stages plan=distill.plan on_gpus=distill.on_gpus
distill_text_args=distill.text_args distill_text=distill.text plan_text=distill.text_plan
text_samples=distill.text_samples train_lm_args=distill.train_lm_args
distill_image_text_args=distill.image_text_args distill_image_text=distill.image_text
plan_image_text=distill.image_text_plan image_text_stages=distill.image_text_stages
evaluate_args=evaluate.args evaluate_subject=evaluate.subject evaluate_suite=evaluate.suite
evaluate_plan=evaluate.plan evaluate_compare=evaluate.compare
evaluate_failures=evaluate.failures
prune_args=prune.args prune_request=prune.request prune_search=prune.search
prune_data=prune.data prune_depth=prune.depth prune_distill=prune.distill
prune_halving=prune.halving prune_image_text=prune.image_text prune_write=prune.write
elastic_args=elastic.args elastic_adaptive=elastic.adaptive elastic_images=elastic.images
elastic_sizes=elastic.sizes
mask_args=mask.args mask_images=mask.images mask_text=mask.text
export_args=export.args export_checkpoint=export.checkpoint export_forms=export.forms
export_text=export.text model_card=export.model_card
bench_models_args=bench.models_args bench_models=bench.models
bench_distill_args=bench.distill_args bench_distill=bench.distill bench_data=bench.data
bench_links=bench.links links=bench.collectives step_parts=bench.step_parts
cluster_plan_args=cluster.plan_args cluster_plan=cluster.plan cluster_words=cluster.words
launch=cluster.launch
"""
"""Files of `zoo.commands` that went into the folder of their command."""
MODULES |= {
    f"zoo.commands.{former}": f"zoo.commands.{today}"
    for former, _, today in (pair.partition("=") for pair in COMMANDS.split())
}

NAMES = (
    ("zoo.benchmark", "zoo.commands.bench.models_args", "PEERS"),
    ("zoo.checkpoint", "zoo.files", "save_whole written_whole"),
    ("zoo.cli", "zoo", "list_models"),
    ("zoo.cli", "zoo.commands.bench.args", "BENCHES bench=main"),
    ("zoo.cli", "zoo.commands.bench.distill_args", "StepArgs"),
    ("zoo.cli", "zoo.commands.bench.models_args", "SpeedArgs=ModelArgs"),
    ("zoo.cli", "zoo.commands.convert", "ConvertArgs"),
    ("zoo.cli", "zoo.commands.distill.args", "distill=main"),
    ("zoo.cli", "zoo.commands.experiment", "experiment=main"),
    ("zoo.cli", "zoo.commands.list", "ListArgs list_recipes"),
    ("zoo.cli", "zoo.commands.openmmlab", "detect_config segment_config"),
    ("zoo.commands.bench", "zoo.commands.bench.args", "BENCHES main"),
    ("zoo.commands.distill", "zoo.commands.distill.run", "Work distill"),
    ("zoo.commands.elastic", "zoo.commands.elastic.run", "elastic"),
    ("zoo.commands.evaluate", "zoo.commands.evaluate.run", "call evaluate"),
    ("zoo.commands.export", "zoo.commands.export.run", "export"),
    ("zoo.commands.mask", "zoo.commands.mask.run", "mask"),
    ("zoo.commands.prune", "zoo.commands.prune.run", "prune_model"),
    ("zoo.detect_command", "zoo.commands.detect_args", "Args=DetectArgs detect=main"),
    ("zoo.detect_config", "zoo.commands.openmmlab", "asked_backbone=read_backbone"),
    ("zoo.detection", "zoo.commands.detect", "open_splits print_plan train_detector=detect"),
    ("zoo.detection", "zoo.commands.detect_args", "read_config"),
    ("zoo.detection", "zoo.eval.detect.config", "DRAWN Detect tiny"),
    ("zoo.detection", "zoo.train.device", "device_of"),
    (
        "zoo.distill_speed",
        "zoo.commands.bench.step_parts",
        "Pool=ModelPool Seen=StepTiming photographs=pink_noise",
    ),
    ("zoo.dry_run", "zoo.commands.distill.plan", "print_plan"),
    ("zoo.dry_run", "zoo.train.distill.plan_cost", "Cost image_flops matmul_rate plan=model_costs"),
    ("zoo.embedding", "zoo.commands.embed_request", "Embed"),
    (
        "zoo.embedding",
        "zoo.eval.stored",
        "Format INDEX PARTS about_features read_features=load_features read_part",
    ),
    ("zoo.eradio", "zoo.eradio", "Neighbours=ResidualConv"),
    ("zoo.eval.correspondence", "zoo.eval.dense.correspondence", "Pair=ImagePair"),
    ("zoo.eval.correspondence", "zoo.eval.settings", "Correspondence=CorrespondenceSettings"),
    ("zoo.eval.crops", "zoo.data.crops", "Crop=CropSpec"),
    ("zoo.eval.depth", "zoo.eval.settings", "Depth=DepthSettings"),
    ("zoo.eval.detect.benchmark", "zoo.eval.detect.config", "Detect=DetectSettings"),
    ("zoo.eval.detect.benchmark", "zoo.eval.detect.training", "TORCHVISION spec_of"),
    ("zoo.eval.detect.detector", "zoo.eval.detect.config", "Kind"),
    (
        "zoo.eval.detect.detector",
        "zoo.eval.detect.spec",
        "Detector Source=BackboneSource Spec=DetectorSpec",
    ),
    (
        "zoo.eval.detect.torchvision_detector",
        "zoo.eval.detect.torchvision_detector",
        "Pyramid=FeaturePyramid",
    ),
    ("zoo.eval.detect.training", "zoo.eval.detect.config", "Training=DetectTraining"),
    ("zoo.eval.detect.training", "zoo.train.state", "Trainee=TrainState"),
    ("zoo.eval.fewshot", "zoo.eval.settings", "Fewshot=FewshotSettings"),
    ("zoo.eval.knn", "zoo.eval.knn", "nearest_classes=predict_knn"),
    ("zoo.eval.knn", "zoo.eval.settings", "Knn=KnnSettings"),
    (
        "zoo.eval.linear",
        "zoo.eval.linear",
        "linear_classes=predict_linear ridge_classes=predict_ridge said_by=predict_rows",
    ),
    ("zoo.eval.linear", "zoo.eval.settings", "Linear=LinearSettings Solver"),
    ("zoo.eval.paired", "zoo.eval.paired", "Paired=PairedDifference"),
    (
        "zoo.eval.registry",
        "zoo.eval.benchmarks",
        "BENCHMARKS Benchmark Run=BenchmarkFunction find headlines load",
    ),
    ("zoo.eval.report.page", "zoo.eval.report.page", "Speed=SpeedPanel"),
    ("zoo.eval.report.page", "zoo.eval.report.parts", "Pair=MapPair Picture=PageImage"),
    ("zoo.eval.retrieval", "zoo.eval.settings", "Retrieval=RetrievalSettings"),
    ("zoo.eval.sam_masks", "zoo.eval.settings", "SamMasks=SamMasksSettings"),
    ("zoo.eval.segment", "zoo.eval.dense.segment", "linear_eyes=frozen_features"),
    ("zoo.eval.segment", "zoo.eval.settings", "Segment=SegmentSettings"),
    ("zoo.eval.sgd_probe", "zoo.eval.linear", "sgd_classes=predict_sgd"),
    ("zoo.eval.speed", "zoo.eval.speed.environment", "surroundings=environment"),
    ("zoo.eval.throughput", "zoo.eval.settings", "Speed=SpeedSettings"),
    ("zoo.eval.upernet", "zoo.eval.dense.upernet", "ConvNorm=ConvNormRelu Pyramid=BackbonePyramid"),
    ("zoo.eval.zeroshot", "zoo.eval.settings", "ZeroShot=ZeroShotSettings"),
    ("zoo.evaluation", "zoo.eval.benchmarks", "DEFAULT"),
    (
        "zoo.evaluation",
        "zoo.eval.subject",
        "Asked=EvalRequest about_model is_run_folder open_student open_subject",
    ),
    ("zoo.evaluation", "zoo.eval.detect.detector", "detector_backbone=load_backbone"),
    ("zoo.experiments.intervals", "zoo.experiments.intervals", "Paired=SeedDifference"),
    ("zoo.experiments.phi_s_result", "zoo.experiments.phi_s.figure", "Rows teachers_of"),
    ("zoo.experiments.pictures", "zoo.experiments.pictures", "Crop=RandomCrop"),
    ("zoo.experiments.phi_s_config", "zoo.experiments.phi_s.networks", "networks"),
    (
        "zoo.experiments.students",
        "zoo.experiments.students.config",
        "FAMILIES Family StudentsExperiment TINY_FAMILIES full tiny",
    ),
    ("zoo.features", "zoo.features", "read_ladder=read_intermediates"),
    ("zoo.layers.neighbours", "zoo.layers.short_conv", "neighbours_silu=short_conv_silu"),
    ("zoo.layers.neighbours_op", "zoo.kernels.short_conv", "neighbours_silu=short_conv_silu"),
    ("zoo.layers.position", "zoo.layers.position", "FromPlaces=FromCoords cell_places=cell_coords"),
    ("zoo.layers.recompute", "zoo.layers.checkpointed", "recomputed=checkpointed"),
    (
        "zoo.layers.scan_op",
        "zoo.kernels.scan_shapes",
        "BLOCK MAX_STATES padded_states shape_of_borders=saved_states_shape",
    ),
    ("zoo.layers.scan_triton", "zoo.kernels.scan_triton", "Plan=ScanPlan"),
    ("zoo.measure_commands", "zoo.commands.embed_args", "embed=main"),
    ("zoo.measure_commands", "zoo.commands.evaluate.args", "evaluate=main"),
    ("zoo.measure_commands", "zoo.commands.report", "ReportArgs report=main"),
    ("zoo.pipeline", "zoo.train.device", "autocast device_of machine"),
    (
        "zoo.pipeline",
        "zoo.train.distill.calibrate",
        "Balances=Normalizers LEAST_SPREAD=LEAST_BASELINE Spreads=BaselineLosses "
        "fit_balances=fit_normalizers",
    ),
    ("zoo.pipeline", "zoo.train.distill.fold", "folded"),
    (
        "zoo.pipeline",
        "zoo.train.distill.setup",
        "Setting=Setup backbone_options check_names new_student open_data open_teachers prepare "
        "widths",
    ),
    ("zoo.pipeline", "zoo.train.distill.same", "check_same_teachers"),
    ("zoo.run_speed", "zoo.train.distill.calibrate", "Balances=Normalizers"),
    (
        "zoo.run_speed",
        "zoo.train.distill.teachers",
        "SAMPLE first_batch quicken_teachers=optimize_run_teachers teacher_precision",
    ),
    ("zoo.students", "zoo.students.build", "build_student"),
    ("zoo.students", "zoo.students.student", "Student"),
    (
        "zoo.students.student",
        "zoo.students.build",
        "build_student read_options read_pairs student_grids",
    ),
    ("zoo.teachers", "zoo.teachers.name", "TeacherName"),
    ("zoo.teachers", "zoo.teachers.open", "open_teacher"),
    ("zoo.teachers", "zoo.teachers.teacher", "Teacher"),
    ("zoo.teachers.cache", "zoo.teachers.cache", "Holds=CacheManifest quantised=quantize_tokens"),
    (
        "zoo.teachers.eight_bits",
        "zoo.teachers.quantize",
        "Eight=QuantKind EightBitLinear=QuantizedLinear EightBits=QuantReport "
        "to_eight_bits=quantize_linears",
    ),
    ("zoo.teachers.teacher", "zoo.teachers.name", "FOLDER KINDS SLASHED TeacherName unknown_name"),
    ("zoo.teachers.teacher", "zoo.teachers.open", "EXTRAS open_teacher"),
    ("zoo.teachers.teacher", "zoo.train.distill.setup", "check_losses"),
    (
        "zoo.teachers.teacher",
        "zoo.teachers.teacher",
        "drawn_alike=seeded_init half_weights=bf16_weights looking=size_errors",
    ),
    ("zoo.train.config", "zoo.train.distill.config", "Distill Heads Losses Normalise TeacherSpec"),
    ("zoo.train.data", "zoo.data.loader", "PlanSampler eval_batches train_batches"),
    ("zoo.train.data", "zoo.data.unreadable", "TRIES UNREADABLE"),
    ("zoo.train.data", "zoo.data.views", "View Views collate"),
    ("zoo.train.distill", "zoo.train.distill.plan_step", "Align"),
    ("zoo.train.distill", "zoo.train.task", "Loss"),
    ("zoo.train.engine", "zoo.train.device", "tensor_cores"),
    ("zoo.train.engine", "zoo.train.distill.teachers", "Look=Model quicken=optimize_teachers"),
    (
        "zoo.train.follow",
        "zoo.train.distill.sizes",
        "Following=MultiSizeTeacher follow=match_student_size",
    ),
    ("zoo.train.loop", "zoo.train.distill.plan_step", "view_of"),
    ("zoo.train.loop", "zoo.train.state", "Trainee=TrainState"),
    ("zoo.train.phi_s", "zoo.train.distill.phi_s", "Balance=Normalizer"),
    ("zoo.train.progress", "zoo.train.progress", "Watch=Progress"),
    (
        "zoo.train.turn",
        "zoo.train.distill.plan_step",
        "Turn=StepPlan check_turns=check_step_plans take_turn=plan_step",
    ),
)
"""Former module, module, and names in it; `Former=Today` where a name changed as well."""


def find_name(module: str, name: str) -> tuple[str, str] | None:
    """Return module and name of today for a former name, or nothing if there was none."""
    for former, place, names in NAMES:
        for pair in names.split() if former == module else ():
            old, _, new = pair.partition("=")
            if old == name:
                return place, new or old
    if module in MODULES and not name.startswith("_"):
        return MODULES[module], name
    return None


def find_former_names() -> None:
    """Let former names be imported from now on."""
    renaming = {former for former, _, _ in NAMES} | MODULES.keys()
    ImportHook(renaming.__contains__, _with_former_names).install()
    sys.meta_path.append(_FormerModules())  # asked last: for what nobody else finds


@contextmanager
def _with_former_names(module: ModuleType) -> Iterator[None]:
    """Let a module that is still there find names that it once had."""
    yield
    if not hasattr(module, "__getattr__"):
        name = module.__name__
        setattr(module, "__getattr__", lambda attribute: _former(name, attribute))  # noqa: B010


def _former(module: str, name: str) -> Any:
    found = find_name(module, name)
    if found is not None:
        place = import_module(found[0])
        if hasattr(place, found[1]):
            _warn(f"{module}.{name}", ".".join(found))
            return getattr(place, found[1])
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _FormerModules(MetaPathFinder, Loader):
    """Finds modules that are gone: empty ones, that look names up where they are today."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        _warn(name, MODULES[name])
        import_module(MODULES[name])  # for what it registers
        setattr(module, "__getattr__", lambda attribute: _former(name, attribute))  # noqa: B010

    def get_code(self, name: str) -> CodeType | None:
        """Return what `python -m NAME` runs; warnings about it would not be shown."""
        print(f"{name} is called {MODULES[name]} now.", file=sys.stderr)
        spec = find_spec(MODULES[name])
        loader: Any = spec and spec.loader
        return loader.get_code(MODULES[name])


def _warn(former: str, today: str) -> None:
    """Warn at the line that says a former name."""
    frame = sys._getframe(1)
    own = (__name__, "zoo.import_hook", "zoo")
    while frame.f_back and (
        frame.f_globals.get("__name__") in own
        or frame.f_globals.get("__name__", "").startswith(("importlib", "contextlib"))
    ):
        frame = frame.f_back
    warnings.warn_explicit(
        f"{former} is called {today} now.",
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
