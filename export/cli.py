"""``staindiffuser export``: graphs (torch), build and verify (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Export a checkpoint to verified engines and a model repository.")

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@app.command(
    epilog="Example: staindiffuser export graphs checkpoints/demo --output graphs",
)
def graphs(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder (model.safetensors, config.json).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the graphs; replaced as a whole.")],
    steps: Annotated[
        int | None, typer.Option(help="Sampler steps of the image branches: 1, 2 or 4; the checkpoint's by default.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Tile height and width, pixels; the checkpoint's by default.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of the trunk: fp32, fp16 or bf16.")] = "fp32",
    sample: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image of real H&E at the model's pixel size; its central tile becomes a golden sample. Repeatable."
        ),
    ] = None,
    noise: Annotated[
        bool,
        typer.Option(
            "--noise/--no-noise",
            help="Begin the one step of a branch at the noise, or at its mean: then nothing reads noise, and the seed "
            "changes nothing.",
        ),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Export ONNX graphs and golden samples from a checkpoint (needs torch)."""
    from staindiffuser.export.graphs import export_graphs

    exported = export_graphs(
        checkpoint, output, steps=steps, tile=tile, precision=precision, samples=sample or (), noise=noise
    )
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "graphs": str(output),
                    "model_version": exported.model_version,
                    "engines": sorted(exported.engines),
                    "steps": exported.steps,
                    "tile": exported.tile,
                    "precision": exported.precision,
                }
            )
        )
    else:
        typer.echo(f"{output}: {len(exported.engines)} graphs of {exported.name}, sampler steps: {exported.steps}")
        typer.echo(f"next: staindiffuser export build {output} --output REPO")


GraphsArgument = Annotated[Path, typer.Argument(help="Folder that `export graphs` wrote.")]


@app.command(
    epilog="Example: staindiffuser export quality graphs --tiles tiles",
)
def quality(
    graphs: GraphsArgument,
    tiles: Annotated[
        list[Path],
        typer.Option(help="Folder of paired tiles; its training split is the tissue that the model knows. Repeatable."),
    ],
    most: Annotated[int, typer.Option(min=1, help="Fields of a tile's size at most from each folder.")] = 400,
    quantile: Annotated[
        float,
        typer.Option(min=0.5, max=1, help="Share of new tissue of the same kind that is not to be flagged as unlike."),
    ] = 0.99,
    as_json: JsonOption = False,
) -> None:
    """Add engines that judge each tile: tissue, blur, similarity to training tissue, agreement of image and cells."""
    from dataclasses import asdict

    from staindiffuser.export.quality import add_quality

    found = add_quality(graphs, tiles, most=most, quantile=quantile).quality
    assert found is not None
    if as_json:
        typer.echo(json.dumps({"graphs": str(graphs), **asdict(found)}))
    else:
        limits = ", ".join(f"{name} {value:g}" for name, value in found.limits.items())
        typer.echo(f"{graphs}: judges tiles by {found.reference}; a tile is flagged above {limits}")
        typer.echo(f"next: staindiffuser export build {graphs} --output REPO")


@app.command(
    epilog="Example: staindiffuser export int8 graphs --tiles tiles",
)
def int8(
    graphs: GraphsArgument,
    tiles: Annotated[
        list[Path],
        typer.Option(help="Folder of paired tiles; its training split calibrates and judges. Repeatable."),
    ],
    most: Annotated[int, typer.Option(min=1, help="Fields of a tile's size at most from each folder.")] = 24,
) -> None:
    """Add copies of the graphs whose residual blocks compute in 8 bits, for the target openvino (needs NNCF)."""
    from staindiffuser.export.int8 import add_int8

    found = add_int8(graphs, tiles, most=most, progress=lambda message: typer.echo(message, err=True))
    dice = ", ".join(
        f"{name} {copy.dab_dice} ({copy.dab_dice_fp32})"
        for name, copy in found.int8.items()
        if copy.dab_dice is not None
    )
    left = sum(len(copy.float_layers) for copy in found.int8.values())
    typer.echo(f"{graphs}: 8 bits, {left} layers back in float; DAB-Dice, and in float32: {dice}")
    typer.echo(f"next: staindiffuser export build {graphs} --target openvino --precision int8 --output REPO")


BatchOption = Annotated[
    str, typer.Option(help="Batch sizes to optimise for, such as 1,8,32; clients may send at most the largest.")
]
CapabilityOption = Annotated[
    str, typer.Option(help="GPUs to compile for ahead of time (tensorrt-rtx), such as 8.9,12.0.")
]
WorkspaceOption = Annotated[
    int, typer.Option(help="Scratch memory that TensorRT may use while building, MiB; 0: no limit.")
]
VerbosityOption = Annotated[
    str, typer.Option(help="Layer information stored in TensorRT plans: none, names or detailed.")
]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    from staindiffuser.export.errors import ExportUsageError

    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ExportUsageError(f"{option} {text}: must be numbers with commas between them, such as 1,8,32") from None


def _capabilities(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


@app.command(
    epilog="Examples: staindiffuser export build graphs --output models --max-batch 8\n\n"
    "staindiffuser export build graphs --target openvino --precision bf16 --output models",
)
def build(
    graphs: GraphsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The model repository; replaced as a whole.")],
    target: Annotated[
        str,
        typer.Option(
            help="What runs the engines: onnxruntime (any CPU), openvino (CPU), tensorrt, tensorrt-rtx or torch; auto: "
            "the fastest on this CPU, measured now."
        ),
    ] = "onnxruntime",
    flavour: Annotated[
        str,
        typer.Option(
            help="single: one process for all engines (default on a CPU); python: one for each (default on a GPU); "
            "native: TensorRT backend, in the container."
        ),
    ] = "",
    max_batch: Annotated[int, typer.Option(help="Largest batch of tiles that a client may send.")] = 8,
    batch: BatchOption = "",
    threads: Annotated[int, typer.Option(help="Threads of each CPU engine; 0: all cores that the server may use.")] = 0,
    compute_capability: CapabilityOption = "",
    precision: Annotated[
        str,
        typer.Option(
            help="Compute float32 graphs in less (openvino): bf16, int8. By default, in the graphs' precision."
        ),
    ] = "",
    workspace: WorkspaceOption = 0,
    verbosity: VerbosityOption = "names",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Build plans that later TensorRT releases can run.")
    ] = False,
    weight_stripped: Annotated[
        bool, typer.Option("--weight-stripped", help="Build plans without weights; they are refitted on loading.")
    ] = False,
    queue_length: Annotated[
        int | None,
        typer.Option(
            help="Requests that may wait (flavours single and native); more are refused as unavailable. (default: 64)"
        ),
    ] = None,
    queue_seconds: Annotated[
        float | None, typer.Option(help="Longest wait of a request; then it is refused as well. (default: 30)")
    ] = None,
    allow_ungated: Annotated[
        bool,
        typer.Option("--allow-ungated", help="Build graphs whose checkpoint failed its gate; outputs say so."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Build engines, check them against the golden samples and publish a model repository (no torch)."""
    import time

    from staindiffuser.export import repository
    from staindiffuser.export.builders import BuildOptions

    start = time.perf_counter()
    report = repository.build(
        graphs,
        output,
        target=target,
        flavour=flavour,
        options=BuildOptions(
            max_batch=max_batch,
            batches=_numbers(batch, "--batch"),
            threads=threads,
            precision=precision,
            compute_capabilities=_capabilities(compute_capability),
            workspace_mib=workspace,
            verbosity=verbosity,
            version_compatible=version_compatible,
            weight_stripped=weight_stripped,
            queue_length=queue_length,
            queue_seconds=queue_seconds,
        ),
        progress=lambda message: typer.echo(message, err=True),
        allow_ungated=allow_ungated,
    )
    seconds = time.perf_counter() - start
    manifest = report.manifest
    worst = max(entry.max_levels for engine in manifest.engines.values() for entry in engine.parity)
    if as_json:
        result = {
            "repository": str(report.repository),
            "up_to_date": report.up_to_date,
            "built": list(report.built),
            "seconds": round(seconds, 3),
            "model_version": manifest.model_version,
            "target": manifest.target,
            "engines": {name: engine.sha256 for name, engine in manifest.engines.items()},
            "max_levels": worst,
        }
        typer.echo(json.dumps(result))
    elif report.up_to_date:
        typer.echo(f"{output}: up to date, nothing built ({seconds:.1f} s)")
    else:
        kept = len(manifest.engines) - len(report.built)
        typer.echo(
            f"{output}: {len(report.built)} engines built, {kept} kept, at most {worst} grey levels from torch "
            f"({seconds:.1f} s)"
        )
        typer.echo(f"next: staindiffuser serve {output}")


@app.command(
    epilog="Example: staindiffuser export compile graphs --compute-capability 8.9,12.0 --output engines",
)
def compile(
    graphs: GraphsArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the engines; replaced as a whole.")],
    batch: BatchOption = "",
    compute_capability: CapabilityOption = "",
    workspace: WorkspaceOption = 0,
    verbosity: VerbosityOption = "names",
    as_json: JsonOption = False,
) -> None:
    """Compile TensorRT-RTX engines without a GPU, to check the graphs; the result cannot be served."""
    from staindiffuser.export.builders import BuildOptions
    from staindiffuser.export.compiling import compile_engines

    engines = compile_engines(
        graphs,
        output,
        BuildOptions(
            batches=_numbers(batch, "--batch"),
            compute_capabilities=_capabilities(compute_capability),
            workspace_mib=workspace,
            verbosity=verbosity,
        ),
        progress=lambda message: typer.echo(message, err=True),
    )
    if as_json:
        typer.echo(json.dumps({"engines": {name: path.stat().st_size for name, path in engines.items()}}))
    else:
        for name, path in engines.items():
            typer.echo(f"{name}: {path.stat().st_size / 1e6:.1f} MB")
        typer.echo(f"{output}: not checked against the golden samples, which needs a GPU")


@app.command(
    epilog="Example: staindiffuser export verify models --checkpoint checkpoints/demo",
)
def verify(
    repository: Annotated[Path, typer.Argument(help="Model repository that `export build` wrote.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Also require that the engines come from this checkpoint.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check every file and field of a model repository against its manifest (no torch)."""
    from staindiffuser.export import manifest as manifests

    manifest = manifests.verify(repository, checkpoint=checkpoint)
    if as_json:
        result = {
            "repository": str(repository),
            "verified": True,
            "model_version": manifest.model_version,
            "files": len(manifest.files),
            "engines": sorted(manifest.engines),
        }
        typer.echo(json.dumps(result))
    else:
        typer.echo(
            f"{repository}: {len(manifest.files)} files match, {len(manifest.engines)} engines, {manifest.target}"
        )
        typer.echo(f"model {manifest.model_name} {manifest.model_version}")
