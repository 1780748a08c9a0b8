// Draws flagged tiles and cells for the panels, beside the page's own thread: a view that moves waits for nothing here.

import { Cells } from "./cells.js";
import { drawFlags } from "./flags.js";

const cells = new Cells(() => postMessage({ changed: true }));
let flagged = [];

const tasks = {
  slide: ({ tiles }) => {
    cells.forget();
    flagged = tiles;
  },
  cells: ({ slide, about }) => cells.open(slide, about),
  // Answers with an image of the size asked for; null where there is nothing to draw.
  draw: ({ panel, size, projection, flags, ...wanted }) => {
    let image = null;
    if ((flags && flagged.length) || wanted.classes.length) {
      const canvas = new OffscreenCanvas(...size);
      const context = canvas.getContext("2d");
      context.scale(size[0] / projection.width, size[1] / projection.height);
      if (flags && flagged.length) drawFlags(context, projection, flagged);
      cells.draw(context, projection, wanted);
      image = canvas.transferToImageBitmap();
    }
    postMessage({ panel, projection, image }, image ? [image] : []);
  },
};

addEventListener("message", ({ data }) => tasks[data.task](data));
