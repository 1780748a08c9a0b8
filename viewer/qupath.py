"""A script for QuPath that opens everything of a result: images with names and types, cells with their classes."""

from __future__ import annotations

import json
from pathlib import Path

from staindiffuser.client.result_files import CELLS_FILE, image_file
from staindiffuser.client.run_record import SYNTHETIC, RunRecord
from staindiffuser.files import replacing

__all__ = ["QUPATH_FILE", "qupath_script", "write_qupath_script"]

QUPATH_FILE = "open-in-qupath.groovy"

_SCRIPT = """\
// {notice}
// QuPath 0.5 or newer: Automate > Script editor, open this file, Run. Or: QuPath script {name}
// Makes a project in the folder "qupath" beside this result, which QuPath opens.

import java.awt.geom.AffineTransform
import java.awt.image.BufferedImage
import java.util.zip.GZIPInputStream
import qupath.lib.gui.QuPathGUI
import qupath.lib.images.ImageData
import qupath.lib.images.servers.ImageServerProvider
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import qupath.lib.projects.Projects

// name, file, type, pixels of the slide per pixel of the image, class of the cells that belong to it ("": all)
def images = [
{images}
]
def cells = new File({cells})
def folder = new File({folder})

if (folder.list()) {{
    println "The folder " + folder + " holds something already: open its project.qpproj, or remove it"
    return
}}
folder.mkdirs()
def project = Projects.createProject(folder, BufferedImage.class)
def objects = []
if (cells.exists())
    objects = new GZIPInputStream(new FileInputStream(cells)).withCloseable {{ PathIO.readObjectsFromGeoJSON(it) }}

for (image in images) {{
    def (name, path, type, scaleX, scaleY, wanted) = image
    def file = new File(path)
    if (!file.exists()) {{
        println "Not there: " + file
        continue
    }}
    def support = ImageServerProvider.getPreferredUriImageSupport(BufferedImage.class, file.toURI().toString())
    if (support == null || support.getBuilders().isEmpty()) {{
        println "QuPath cannot read " + file
        continue
    }}
    def entry = project.addImage(support.getBuilders().get(0))
    entry.setImageName(name)
    def data = entry.readImageData()
    data.setImageType(ImageData.ImageType.valueOf(type))
    def mine = objects.findAll {{ wanted == "" || it.getPathClass()?.toString() == wanted }}
    // The cells are in pixels of the slide.
    def toImage = AffineTransform.getScaleInstance(1d / scaleX, 1d / scaleY)
    data.getHierarchy().addObjects(mine.collect {{ PathObjectTools.transformObject(it, toImage, true) }})
    entry.saveImageData(data)
    println name + ": " + mine.size() + " cells"
}}
project.syncChanges()
def gui = QuPathGUI.getInstance()
if (gui != null)
    javafx.application.Platform.runLater {{ gui.setProject(project) }}
"""


def qupath_script(folder: Path, run: RunRecord, slide: Path | None) -> str:
    """The script of a result.

    Args:
        folder: of the result.
        run: its record.
        slide: its H&E slide; None to leave it out.
    """
    folder = folder.resolve()
    (width, height), (own_width, own_height) = run.input.size, run.result.size
    images: list[list[str | float]] = []
    if slide is not None:
        images.append(["H&E", str(slide.resolve()), "BRIGHTFIELD_H_E", 1.0, 1.0, ""])
    images += [
        [
            f"{stain.label} (virtual, research use only)",
            str(folder / image_file(stain)),
            "BRIGHTFIELD_H_DAB",
            width / own_width,
            height / own_height,
            stain.label,
        ]
        for stain in run.stains
    ]
    rows = ",\n".join("    [" + ", ".join(_groovy(value) for value in image) + "]" for image in images)
    return _SCRIPT.format(
        notice=" ".join(f"{SYNTHETIC} {run.model.notice}".split()),
        name=QUPATH_FILE,
        images=rows,
        cells=_groovy(str(folder / CELLS_FILE)),
        folder=_groovy(str(folder / "qupath")),
    )


def write_qupath_script(folder: Path, run: RunRecord, slide: Path | None) -> Path:
    """Write the script into the result's folder; returns its path.

    Raises:
        UsageError: it cannot be written.
    """
    path = folder / QUPATH_FILE
    with replacing(path) as temporary:
        temporary.write_text(qupath_script(folder, run, slide), encoding="utf-8")
    return path


def _groovy(value: str | float) -> str:
    """A literal: JSON's strings are Groovy's, but for the dollar sign, which begins an expression."""
    return json.dumps(value).replace("$", "\\$")
