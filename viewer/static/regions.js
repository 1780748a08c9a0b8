// Drawing a region by hand: a rectangle by dragging, a polygon by clicking its corners.

import { state } from "./state.js";

export class RegionTool {
  // onDone(): state.region changed.
  constructor(panels, onDone) {
    this.panels = panels;
    this.onDone = onDone;
    this.kind = null;
    this.corners = [];
    this.pointer = null;
  }

  start(kind) {
    this.kind = this.kind === kind ? null : kind;
    this.corners = [];
    this.attach();
    this.panels.redraw();
  }

  stop() {
    if (!this.kind) return false;
    this.start(this.kind);
    return true;
  }

  // The canvases over the images take the pointer while something is drawn.
  attach() {
    for (const panel of this.panels.list) {
      panel.element.classList.toggle("drawing", this.kind !== null);
      if (panel.hasTool) continue;
      panel.hasTool = true;
      panel.region.addEventListener("pointerdown", (event) => this.down(panel, event));
      panel.region.addEventListener("pointermove", (event) => this.move(panel, event));
      panel.region.addEventListener("pointerup", (event) => this.up(panel, event));
      panel.region.addEventListener("dblclick", () => this.close());
    }
  }

  point(panel, event) {
    const box = panel.region.getBoundingClientRect();
    const { x, y, scale } = this.panels.projection(panel);
    return [(event.clientX - box.left - x) / scale, (event.clientY - box.top - y) / scale];
  }

  down(panel, event) {
    if (!this.kind) return;
    event.preventDefault();
    panel.region.setPointerCapture(event.pointerId);
    const point = this.point(panel, event);
    if (this.kind === "rectangle") this.corners = [point, point];
    else this.corners.push(point);
    this.panels.redraw();
  }

  move(panel, event) {
    if (!this.kind || !this.corners.length) return;
    this.pointer = this.point(panel, event);
    if (this.kind === "rectangle" && event.buttons) this.corners[1] = this.pointer;
    this.panels.redraw();
  }

  up() {
    if (this.kind === "rectangle" && this.corners.length === 2) this.close();
  }

  close() {
    const corners = this.kind === "rectangle" ? rectangle(...this.corners) : distinct(this.corners);
    if (corners.length >= 3) state.region = corners;
    this.kind = null;
    this.corners = [];
    this.attach();
    this.onDone();
  }

  // Draws the region, or what is drawn of it so far; says whether the canvas is needed.
  draw(context, projection) {
    const open = this.kind === "rectangle" ? (this.corners.length ? rectangle(...this.corners) : []) : [...this.corners];
    if (this.kind === "polygon" && this.pointer && open.length) open.push(this.pointer);
    this.line(context, projection, open, this.kind === "rectangle");
    if (state.region) this.line(context, projection, state.region, true);
    return this.kind !== null || state.region !== null;
  }

  line(context, { x, y, scale }, corners, closed) {
    if (!corners.length) return;
    context.beginPath();
    corners.forEach(([px, py], i) => context[i ? "lineTo" : "moveTo"](x + px * scale, y + py * scale));
    if (closed) context.closePath();
    context.setLineDash([]);
    for (const [colour, width] of [["#fff", 4], ["#111", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke();
    }
  }
}

export function rectangle([x0, y0], [x1, y1]) {
  if (x0 === x1 || y0 === y1) return [];
  return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];
}

// A double click adds its corner twice.
function distinct(corners) {
  return corners.filter(([x, y], i) => i === 0 || x !== corners[i - 1][0] || y !== corners[i - 1][1]);
}
