"""From graphs to the model repository that Triton loads: build, check, publish.

Nothing here imports torch. A repository appears under its name only after every engine has passed parity, and is not
rebuilt when nothing has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import staindiffuser
from staindiffuser.export import builders, triton_config, wire
from staindiffuser.export.builders import Builder, BuildOptions, engine_key
from staindiffuser.export.choosing import AUTO, Choice, available, choice_key, fastest, measure
from staindiffuser.export.description import GraphSet
from staindiffuser.export.errors import BuilderMissingError, ExportUsageError, ManifestError, ParityError, UngatedError
from staindiffuser.export.loading import load_engines
from staindiffuser.export.manifest import MANIFEST_JSON, SAMPLER, EngineRecord, Manifest, PlanRecord, hash_files, verify
from staindiffuser.export.parity import EngineParity, Golden, check_parity
from staindiffuser.export.publishing import locked, staging_folder
from staindiffuser.files import file_sha256
from staindiffuser.triton_models import engine_files, noise_files, origin_files, pipeline_files

__all__ = ["BuildReport", "RepositoryBuild", "build", "build_repository", "prepare_build"]

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RepositoryBuild:
    """Everything that determines a repository, before anything is built."""

    graphs_dir: Path
    graphs: GraphSet
    builder: Builder
    options: BuildOptions
    keys: Mapping[str, str]
    """:func:`~staindiffuser.export.builders.engine_key` by engine name."""
    engine_files: Mapping[str, str]
    """File name of each engine, derived from its key, by engine name."""
    flavour: str
    configs: Mapping[str, str]
    """``config.pbtxt`` by model name."""
    sources: Mapping[str, tuple[Path, ...]]
    """Files copied into each model's version folder."""
    fingerprint: str
    """Hash of all of the above."""
    choice: Choice | None = None
    """How target ``auto`` came to this builder."""

    def engine_path(self, name: str) -> str:
        """Path of an engine's file relative to the repository."""
        model = wire.ENSEMBLE if self.flavour == "single" else name
        return f"{model}/{wire.version_folder(model, self.graphs)}/{self.engine_files[name]}"


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """The outcome of a build."""

    repository: Path
    manifest: Manifest
    built: tuple[str, ...]
    """Engines that were built; empty if the repository was up to date."""
    up_to_date: bool


def build_repository(
    graphs_dir: Path,
    output: Path,
    *,
    target: str = "onnxruntime",
    flavour: str = "",
    max_batch: int = 8,
    threads: int = 0,
) -> Path:
    """Build and publish a model repository; see :func:`build`. Returns ``output``."""
    options = BuildOptions(max_batch=max_batch, threads=threads)
    return build(graphs_dir, output, target=target, flavour=flavour, options=options).repository


def build(
    graphs_dir: Path,
    output: Path,
    *,
    target: str = "onnxruntime",
    flavour: str = "",
    options: BuildOptions | None = None,
    progress: Progress = lambda message: None,
    allow_ungated: bool = False,
) -> BuildReport:
    """Build engines, check them against the golden samples, and publish a model repository.

    Args:
        graphs_dir: what ``export graphs`` wrote.
        output: folder of the repository; an existing repository is replaced as a whole.
        target: one of :data:`staindiffuser.export.builders.TARGETS`, or ``auto``: the fastest CPU engines that pass,
            see :mod:`staindiffuser.export.choosing`.
        flavour: one of :data:`staindiffuser.export.triton_config.FLAVOURS`; by default ``single`` on a CPU and
            ``python`` on a GPU.
        options: batch sizes, threads and the target's own options.
        progress: called with one line per step.
        allow_ungated: build graphs of a checkpoint whose gate was not passed; every output says so.

    Raises:
        GraphsError, ManifestError: the graphs are missing, damaged or inconsistent.
        UngatedError: the gate of their checkpoint was not passed.
        ExportUsageError: unknown target, an option that it does not take, or an unwritable output.
        BuilderMissingError: the target's builder is not installed.
        ParityError: an engine is too far from torch; ``output`` is untouched.
    """
    options = options or BuildOptions()
    output = output.resolve()
    _refuse_foreign_folder(output)
    if any(GraphSet.load(graphs_dir).gate.values()) and not allow_ungated:
        raise UngatedError(
            f"{graphs_dir} comes from a checkpoint that did not pass its gate: distill it again, or build it with "
            "--allow-ungated; its outputs will say so"
        )
    if target == AUTO:
        return _build_fastest(graphs_dir, output, flavour or "single", options, progress)
    wanted = prepare_build(graphs_dir, target=target, flavour=flavour, options=options)
    with _writing(output):
        return _build(wanted, output, progress)


def _build_fastest(
    graphs_dir: Path, output: Path, flavour: str, options: BuildOptions, progress: Progress
) -> BuildReport:
    """Build what was chosen for the repository that is there, or else the fastest candidate that passes the gate."""
    if options.precision:
        raise ExportUsageError(f"--precision {options.precision}: target auto chooses the precision; name a target")
    graphs = GraphSet.load(graphs_dir)
    possible, _ = available(graphs, options)
    with _writing(output):  # from before the measurement on: what another process has chosen meanwhile holds
        current = _current(output)
        choice = current.choice if current is not None else None
        if current is not None and choice is not None and choice.key == choice_key(graphs, options, flavour):
            left = {f"{current.target} {current.precision}": 0.0}
        else:
            choice = measure(graphs_dir, options, flavour, progress)
            left = dict(choice.ms_per_tile)
        while True:
            name = fastest(left)
            progress(f"chosen for {choice.processor}: {name}")
            wanted = prepare_build(graphs_dir, target=name.split()[0], flavour=flavour, options=possible[name])
            try:
                return _build(dataclasses.replace(wanted, choice=choice), output, progress)
            except ParityError as error:
                del left[name]
                if not left:
                    raise
                progress(f"{name} does not pass: {error}")


def _build(wanted: RepositoryBuild, output: Path, progress: Progress) -> BuildReport:
    """Inside :func:`_writing`."""
    current = _current(output)
    if current is not None and (current.fingerprint, current.choice) == (wanted.fingerprint, wanted.choice):
        return BuildReport(repository=output, manifest=current, built=(), up_to_date=True)
    with staging_folder(output) as folder:
        others = _carry_others(wanted, folder, output)
        built = _write_models(wanted, folder, output, others, progress)
        parity = _run_parity(wanted, folder, progress)
        _manifest(wanted, folder, parity, others).save(folder)
        manifest = verify(folder)
    return BuildReport(repository=output, manifest=manifest, built=built, up_to_date=False)


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Be the only one that builds ``output``; says it if it cannot be written."""
    try:
        with locked(output):
            yield
    except OSError as error:
        raise ExportUsageError(
            f"{output} cannot be written: {error.strerror or error}: nothing was published"
        ) from error


def prepare_build(
    graphs_dir: Path, *, target: str = "onnxruntime", flavour: str = "", options: BuildOptions | None = None
) -> RepositoryBuild:
    """Work out everything that determines a repository, without building it; fast.

    Raises:
        See :func:`build`.
    """
    options = options or BuildOptions()
    builder = builders.get(target)
    builder.version()  # refuse a target that is not installed before anything else
    builder.check(options)
    graphs = GraphSet.load(graphs_dir)
    flavour = flavour or ("single" if builder.device().kind == "cpu" else "python")
    if flavour == "native":
        graphs = triton_config.without_stain_measures(graphs)
    if graphs.precision not in builder.precisions:
        accepted = ", ".join(builder.precisions)
        raise ExportUsageError(f"target {target} does not take {graphs.precision} graphs: export them as {accepted}")
    # What engines compute in decides the pixels, so it is part of the model's version.
    graphs = graphs.at(options.precision)
    keys = {name: engine_key(builder, engine, graphs.precision, options) for name, engine in graphs.engines.items()}
    files = {name: f"{key[:16]}{builder.suffix}" for name, key in keys.items()}
    capability = builder.device().compute_capability
    configs = triton_config.model_configs(
        graphs, builder, {name: {capability: file} for name, file in files.items()}, options, flavour
    )
    sources = _sources(graphs, builder, flavour)
    parts = {
        "staindiffuser": staindiffuser.__version__,
        "graphs": dataclasses.asdict(graphs),
        "target": [target, builder.version()],
        "flavour": flavour,
        "options": dataclasses.asdict(options),
        "keys": keys,
        "ensemble": wire.version_folder(wire.ENSEMBLE, graphs),
        "configs": configs,
        "sources": {model: {path.name: file_sha256(path) for path in paths} for model, paths in sources.items()},
    }
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return RepositoryBuild(
        graphs_dir=graphs_dir,
        graphs=graphs,
        builder=builder,
        options=options,
        keys=keys,
        engine_files=files,
        flavour=flavour,
        configs=configs,
        sources=sources,
        fingerprint=fingerprint,
    )


def _sources(graphs: GraphSet, builder: Builder, flavour: str) -> dict[str, tuple[Path, ...]]:
    """Files copied into each model's version folder."""
    if flavour == "single":
        return {wire.ENSEMBLE: pipeline_files(builder.runner)}
    sources = {triton_config.NOISE_MODEL: noise_files()} if wire.noise_read(graphs) else {}
    if flavour == "python":
        sources |= dict.fromkeys(graphs.engines, engine_files(builder.runner))
        if triton_config.NOISE_MODEL not in sources:
            sources[wire.ENCODER] += origin_files()
    return sources


def _refuse_foreign_folder(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ExportUsageError(f"{output} is a file: choose a folder for the model repository")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST_JSON).is_file():
        raise ExportUsageError(f"{output} is neither empty nor a model repository: choose another folder")


def _current(output: Path, *, environment: bool = True) -> Manifest | None:
    """The manifest of an intact repository at ``output``, or None."""
    try:
        return verify(output, environment=environment)
    except (ManifestError, BuilderMissingError):
        return None


def _carry_others(wanted: RepositoryBuild, folder: Path, output: Path) -> dict[str, tuple[PlanRecord, ...]]:
    """Copy the TensorRT plans for other kinds of GPU from the repository being replaced (native flavour)."""
    others: dict[str, tuple[PlanRecord, ...]] = dict.fromkeys(wanted.graphs.engines, ())
    old = _current(output, environment=False) if wanted.flavour == "native" else None
    if old is None or old.flavour != wanted.flavour:
        return others
    here = wanted.builder.device()
    for name, graph in wanted.graphs.engines.items():
        record = old.engines.get(name)
        if record is None or (record.graph_sha256, record.builder, record.profiles) != (
            graph.graph_sha256,
            wanted.builder.version(),
            wanted.builder.profiles(wanted.options),
        ):
            continue
        found = {field.name: getattr(record, field.name) for field in dataclasses.fields(PlanRecord)}
        for other in (PlanRecord(**found), *record.others):
            if other.device.compute_capability != here.compute_capability:
                target = folder / other.file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(output / other.file, target)
                others[name] += (other,)
    return others


def _write_models(
    wanted: RepositoryBuild,
    folder: Path,
    output: Path,
    others: Mapping[str, tuple[PlanRecord, ...]],
    progress: Progress,
) -> tuple[str, ...]:
    built = []
    configs = wanted.configs
    if any(others.values()):
        here = wanted.builder.device().compute_capability
        files = {
            name: {here: file, **{o.device.compute_capability: Path(o.file).name for o in others[name]}}
            for name, file in wanted.engine_files.items()
        }
        configs = triton_config.model_configs(wanted.graphs, wanted.builder, files, wanted.options, wanted.flavour)
    for model, text in configs.items():
        version = folder / model / wire.version_folder(model, wanted.graphs)
        version.mkdir(parents=True, exist_ok=True)
        (folder / model / "config.pbtxt").write_text(text, encoding="utf-8")
        for source in wanted.sources.get(model, ()):
            shutil.copyfile(source, version / source.name)
        if model == wire.ENSEMBLE and not wanted.sources.get(model):
            (version / ".keep").touch()  # Triton needs the folder, and archives drop empty ones
    for name, graph in wanted.graphs.engines.items():
        target = folder / wanted.engine_path(name)
        if not _reuse(wanted, name, output, target):
            progress(f"building {name} ({wanted.builder.target})")
            wanted.builder.build(wanted.graphs_dir / graph.file, graph, target, wanted.options)
            built.append(name)
        if wanted.options.weight_stripped:
            shutil.copyfile(wanted.graphs_dir / graph.file, target.with_name("weights.onnx"))
    return tuple(built)


def _reuse(wanted: RepositoryBuild, name: str, output: Path, target: Path) -> bool:
    """Copy an intact engine with the same key from the repository being replaced, if it has one."""
    try:
        old = Manifest.load(output).engines.get(name)
    except ManifestError:
        return False
    records: list[EngineRecord | PlanRecord] = [old, *old.others] if old is not None else []
    same = [record for record in records if record.key == wanted.keys[name]]
    if not same:
        return False
    source = output / same[0].file
    if not source.is_file() or file_sha256(source) != same[0].sha256:
        return False
    shutil.copyfile(source, target)
    return True


def _run_parity(wanted: RepositoryBuild, folder: Path, progress: Progress) -> dict[str, list[EngineParity]]:
    golden = Golden.load(wanted.graphs_dir / wanted.graphs.golden)
    batches = wanted.options.corners(wanted.builder.profiles(wanted.options))
    progress(f"checking {golden.samples} golden samples at batch {', '.join(map(str, batches))}")
    files = {name: folder / wanted.engine_path(name) for name in wanted.graphs.engines}
    engines = load_engines(wanted.builder, files, threads=wanted.options.threads, flavour=wanted.flavour)
    try:
        return check_parity(engines, wanted.graphs, golden, batches)
    finally:
        for engine in set(engines.values()):
            engine.close()


def _manifest(
    wanted: RepositoryBuild,
    folder: Path,
    parity: Mapping[str, list[EngineParity]],
    others: Mapping[str, tuple[PlanRecord, ...]],
) -> Manifest:
    graphs = wanted.graphs
    files = hash_files(folder)
    engines = {}
    for name, graph in graphs.engines.items():
        file = wanted.engine_path(name)
        sampled = name.startswith(("stain_", "cells_"))
        # A cell map takes one step, from the highest noise level.
        steps = 0 if not sampled else 1 if name.startswith("cells_") else graphs.steps
        engines[name] = EngineRecord(
            file=file,
            sha256=files[file].sha256,
            bytes=files[file].bytes,
            key=wanted.keys[name],
            weights_sha256=graph.weights_sha256,
            graph_sha256=graph.graph_sha256,
            sampler=SAMPLER if sampled else "",
            steps=steps,
            sigmas=graphs.sigmas[:steps],
            inputs=graph.inputs,
            outputs=graph.outputs,
            profiles=wanted.builder.profiles(wanted.options),
            precision=graphs.precision,
            builder=wanted.builder.version(),
            device=wanted.builder.device(),
            parity=tuple(parity[name]),
            settings=dict(wanted.builder.settings(wanted.options)),
            others=others[name],
        )
    return Manifest(
        staindiffuser=staindiffuser.__version__,
        target=wanted.builder.target,
        flavour=wanted.flavour,
        fingerprint=wanted.fingerprint,
        model_name=graphs.name,
        model_version=graphs.model_version,
        notice=graphs.notice,
        gate=graphs.gate,
        thresholds=graphs.thresholds,
        checkpoint_sha256=graphs.checkpoint_sha256,
        golden_sha256=graphs.golden_sha256,
        tile=graphs.tile,
        margin=graphs.margin,
        mpp=graphs.mpp,
        steps=graphs.steps,
        sigmas=graphs.sigmas,
        precision=graphs.precision,
        max_batch=wanted.options.max_batch,
        batches=wanted.options.preferred,
        threads=wanted.options.threads,
        cuda_pool_bytes=0
        if wanted.builder.device().kind == "cpu"
        else triton_config.cuda_pool_bytes(graphs, wanted.options.max_batch),
        stains=graphs.stains,
        engines=engines,
        files=files,
        choice=wanted.choice,
        quality=graphs.quality,
    )
