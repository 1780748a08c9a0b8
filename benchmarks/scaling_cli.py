"""``staindiffuser bench scaling``: its options, its lines and its chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from staindiffuser.benchmarks.reporting import JsonFile, hand_over
from staindiffuser.files import check_file

if TYPE_CHECKING:
    from staindiffuser.benchmarks.scaling import Scale

__all__ = ["scaling"]


def scaling(
    server_rate: Annotated[
        float, typer.Option(min=1e-3, help="Tiles a second of one server (`bench serving`).", show_default=False)
    ],
    client_ms: Annotated[
        float, typer.Option(min=0, help="Client's processor time of a tile (`bench slide`).", show_default=False)
    ],
    client_cores: Annotated[int, typer.Option(min=1, help="Of a client's machine.")] = 2,
    network_gbit: Annotated[float, typer.Option(min=1e-3, help="Of a client's link, and of the storage's.")] = 10.0,
    tile: Annotated[int, typer.Option(min=16, help="Side of a tile, pixels.")] = 512,
    stains: Annotated[int, typer.Option(min=1, help="Each an image and a cell map.")] = 2,
    storage_kib: Annotated[float, typer.Option(min=0, help="Read and written per tile.")] = 300.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests to one server at a time.")] = 4,
    chart: Annotated[
        Path | None, typer.Option(callback=check_file, help="Write a PNG here (needs matplotlib).")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """One to 64 servers, simulated from measured service times: tiles a second, and what limits them."""
    import dataclasses

    from staindiffuser.benchmarks.scaling import Workload, simulate

    workload = Workload(
        server_ms=1e3 / server_rate,
        client_ms=client_ms,
        client_cores=client_cores,
        request_bytes=3 * tile * tile,
        response_bytes=4 * stains * tile * tile,
        storage_bytes=round(1024 * storage_kib),
        network_gbit=network_gbit,
        in_flight=in_flight,
    )
    ways = {
        "one client, one slide": simulate(workload, shared_client=True),
        "a client beside every server": simulate(workload, shared_client=False),
    }
    if chart is not None:
        _draw(ways, chart)
    report = {way: [dataclasses.asdict(scale) for scale in scales] for way, scales in ways.items()}
    if hand_over({"workload": dataclasses.asdict(workload), **report}, json_file):
        return
    for way, scales in ways.items():
        typer.echo(f"{way} (simulated)")
        for scale in scales:
            typer.echo(
                f"{scale.servers:4} servers: {scale.tiles_per_second:8.1f} tiles/s, "
                f"limited by {scale.bottleneck} (busy {scale.busy:.0%})"
            )


def _draw(ways: Mapping[str, Sequence[Scale]], path: Path) -> None:
    from matplotlib.figure import Figure

    from staindiffuser.files import replacing

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    first = next(iter(ways.values()))
    counts = [scale.servers for scale in first]
    axes.plot(counts, [first[0].tiles_per_second * n / counts[0] for n in counts], "--", color="0.7", label="ideal")
    for marker, (way, scales) in zip("os", ways.items(), strict=True):
        label = f"{way} (simulated); {counts[-1]} servers: limited by {scales[-1].bottleneck}"
        axes.plot(counts, [scale.tiles_per_second for scale in scales], marker=marker, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("servers")
    axes.set_ylabel("tiles per second")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
