// The cells in view: outlines near by, dots as large as their number from afar; fetched by block and kept while they are near.

import { fetchJson, slidePath } from "./api.js";

const OUTLINES_BELOW = 1.5; // µm per screen pixel: closer than this, single cells are drawn
const BIN_ON_SCREEN = 10; // least side of the square that a dot stands for, screen pixels
const DENSE = 5000; // cells per mm² whose dot fills its square
const UNCERTAIN = 0.65; // mean probability below which an outline is dashed
const KEPT = 240;
const AT_ONCE = 6;
const BINS = 32;

export class Cells {
  constructor(onChange) {
    this.onChange = onChange;
    this.forget();
  }

  forget() {
    this.slide = null;
    this.about = null;
    this.blocks = new Map();
    this.queue = [];
    this.running = 0;
  }

  open(slide, about) {
    this.forget();
    this.slide = slide;
    this.about = about;
  }

  // Draws the cells of these classes ([{index, colour}]) from a probability on; on dark ground without a white rim.
  draw(context, projection, { classes, threshold, dark }) {
    if (!this.about || !classes.length) return;
    this.threshold = threshold;
    const mpp = this.slide.mpp[0] / projection.scale;
    if (mpp <= OUTLINES_BELOW) this.drawOutlines(context, projection, classes, dark);
    else this.drawCounts(context, projection, classes);
  }

  drawOutlines(context, projection, wanted, dark) {
    for (const block of this.visible(projection, "outlines", this.about.block, "")) {
      this.trace(block);
      context.save();
      context.translate(projection.x + block.x * projection.scale, projection.y + block.y * projection.scale);
      context.scale(projection.scale, projection.scale);
      for (const { index, colour } of wanted) {
        for (const [certain, path] of [[true, block.paths.get(`${index}+`)], [false, block.paths.get(`${index}-`)]]) {
          if (!path) continue;
          context.setLineDash(certain ? [] : [3 / projection.scale, 3 / projection.scale]);
          if (!dark) {
            context.strokeStyle = "rgb(255 255 255 / .8)";
            context.lineWidth = 3.5 / projection.scale;
            context.stroke(path);
          }
          context.strokeStyle = colour;
          context.lineWidth = 1.8 / projection.scale;
          context.stroke(path);
        }
      }
      context.restore();
    }
  }

  // Paths of a block at the threshold, one per class and certainty.
  trace(block) {
    if (block.threshold === this.threshold) return;
    block.threshold = this.threshold;
    block.paths = new Map();
    const { kinds, probabilities, lengths, points } = block;
    let at = 0;
    for (let cell = 0; cell < kinds.length; cell++) {
      const [kind, probability, first] = [kinds[cell], probabilities[cell], at];
      at += 2 * lengths[cell];
      if (probability < this.threshold) continue;
      const name = `${kind}${probability < UNCERTAIN ? "-" : "+"}`;
      let path = block.paths.get(name);
      if (!path) block.paths.set(name, (path = new Path2D()));
      path.moveTo(points[first] / 10, points[first + 1] / 10);
      for (let i = first + 2; i < at; i += 2) path.lineTo(points[i] / 10, points[i + 1] / 10);
    }
  }

  drawCounts(context, projection, wanted) {
    let zoom = 0;
    while (((this.about.block / BINS) << zoom) * projection.scale < BIN_ON_SCREEN && zoom < 14) zoom++;
    const side = this.about.block * 2 ** zoom;
    const parameters = `?threshold=${this.threshold}`;
    for (const block of this.visible(projection, zoom, side, parameters)) {
      const square = block.side * projection.scale;
      const full = (DENSE * block.side ** 2 * this.slide.mpp[0] * this.slide.mpp[1]) / 1e6;
      wanted.forEach(({ index, colour }, position) => {
        const bins = block.bins[index];
        if (!bins) return;
        context.fillStyle = colour;
        context.beginPath();
        for (let i = 0; i < bins.length; i += 2) {
          const x = block.x + ((bins[i] % BINS) + (position + 1) / (wanted.length + 1)) * block.side;
          const y = block.y + (Math.floor(bins[i] / BINS) + 0.5) * block.side;
          const radius = Math.max(1, 0.42 * square * Math.sqrt(Math.min(1, bins[i + 1] / full)));
          const px = projection.x + Math.min(x, this.slide.size[0]) * projection.scale;
          const py = projection.y + Math.min(y, this.slide.size[1]) * projection.scale;
          context.moveTo(px + radius, py);
          context.arc(px, py, radius, 0, 7);
        }
        context.globalAlpha = 0.6;
        context.fill();
      });
      context.globalAlpha = 1;
    }
  }

  // The blocks in view that are here; those that are not are asked for.
  visible(projection, zoom, side, parameters) {
    const first = (offset) => Math.max(0, Math.floor(-offset / projection.scale / side));
    const last = (offset, length, size) =>
      Math.min(Math.ceil(size / side) - 1, Math.floor((length - offset) / projection.scale / side));
    const found = [];
    this.queue = this.queue.filter((key) => key.startsWith(`${zoom}/`));
    for (let row = first(projection.y); row <= last(projection.y, projection.height, this.slide.size[1]); row++) {
      for (let column = first(projection.x); column <= last(projection.x, projection.width, this.slide.size[0]); column++) {
        const key = `${zoom}/${column}_${row}.json${parameters}`;
        const block = this.blocks.get(key);
        if (block) {
          this.blocks.delete(key); // the most recently used last
          this.blocks.set(key, block);
          found.push(block);
        } else if (!this.queue.includes(key)) this.queue.push(key);
      }
    }
    this.pump();
    return found;
  }

  pump() {
    while (this.running < AT_ONCE && this.queue.length) {
      const key = this.queue.shift();
      if (this.blocks.has(key)) continue;
      const slide = this.slide;
      this.running++;
      this.blocks.set(key, null); // under way
      const version = key.includes("?") ? "&" : "?";
      fetchJson(`${slidePath(slide.name)}/cells/${key}${version}v=${slide.version}`)
        .then((block) => {
          if (this.slide !== slide) return;
          this.blocks.set(key, block);
          while (this.blocks.size > KEPT) this.blocks.delete(this.blocks.keys().next().value);
          this.onChange();
        })
        .catch(() => this.slide === slide && this.blocks.delete(key))
        .finally(() => {
          if (this.slide !== slide) return;
          this.running--;
          this.pump();
        });
    }
  }
}
