// What lies over the images, flagged tiles and cells: a worker draws it, and what it drew moves with the view until it
// has drawn again.

import { state } from "./state.js";

const PAUSE = 150; // ms between two drawings while the view moves: the worker shares the processor with the images
const REST = 60; // ms after which a view that moved is at rest

export class Marks {
  // list(): the panels. projection(panel): where a panel looks.
  constructor(list, projection) {
    this.list = list;
    this.projection = projection;
    this.slide = null;
    this.classes = [];
    this.worker = new Worker("/static/marks-worker.js", { type: "module" });
    this.worker.addEventListener("message", ({ data }) => this.answered(data));
  }

  // Another slide: it has no cells yet.
  open(slide) {
    this.slide = slide;
    this.classes = [];
    this.worker.postMessage({ task: "slide", tiles: slide.flags?.tiles ?? [] });
  }

  // The slide's cells have been read; about: what the server says of them.
  openCells(about) {
    const { name, version, size, mpp } = this.slide;
    this.classes = about.classes;
    this.worker.postMessage({ task: "cells", slide: { name, version, size, mpp }, about });
  }

  // Draws a panel's marks as the state says.
  renew(panel) {
    clearTimeout(panel.resting);
    if (!panel.ready || !panel.marks.width) return;
    panel.outdated = panel.waits;
    if (panel.waits) return;
    panel.waits = true;
    this.worker.postMessage({
      task: "draw",
      panel: panel.number,
      size: [panel.marks.width, panel.marks.height],
      projection: this.projection(panel),
      flags: state.flags,
      classes: this.wanted(panel),
      threshold: state.threshold,
      dark: panel.dark,
    });
  }

  // The classes of cells that a panel shows, with their colours.
  wanted({ classes, dark }) {
    if (!state.cells) return [];
    const hidden = this.slide.stains.filter((stain) => state.hidden.has(stain.name)).map((stain) => stain.label);
    return this.classes
      .map((one, index) => ({ name: one.name, index, colour: dark ? one.bright : one.dark }))
      .filter(({ name }) => classes === null || classes.includes(name))
      .filter(({ name }) => !state.hiddenClasses.has(name) && !hidden.includes(name));
  }

  // The view moves, or more of the images has come.
  follow(panel) {
    if (!this.shift(panel)) return;
    if (!panel.waits && performance.now() - panel.renewed > PAUSE) this.renew(panel);
    clearTimeout(panel.resting);
    panel.resting = setTimeout(() => this.renew(panel), REST);
  }

  // Lays what was drawn where it belongs now; says whether it was drawn for another view, or not at all.
  shift(panel) {
    const { drawn, marks } = panel;
    if (!drawn) return true;
    const now = this.projection(panel);
    const times = now.scale / drawn.scale;
    const [left, top] = [now.x - times * drawn.x, now.y - times * drawn.y];
    const moved = times !== 1 || left !== 0 || top !== 0;
    marks.style.transform = moved ? `translate(${left}px, ${top}px) scale(${times})` : "";
    return moved || now.width !== drawn.width || now.height !== drawn.height;
  }

  answered({ changed, panel: number, projection, image }) {
    if (changed) {
      // Cells have come: at once where the view rests, else with the next drawing.
      for (const panel of this.list()) if (!panel.viewer.isAnimating()) this.renew(panel);
      return;
    }
    const panel = this.list().find((one) => one.number === number);
    if (!panel) return image?.close();
    panel.waits = false;
    panel.renewed = performance.now();
    const { marks } = panel;
    if (image && (image.width !== marks.width || image.height !== marks.height)) {
      panel.outdated = true; // the panel has another size by now
    } else {
      const context = marks.getContext("2d");
      context.clearRect(0, 0, marks.width, marks.height);
      if (image) context.drawImage(image, 0, 0);
      panel.drawn = projection;
      this.shift(panel);
      // Nothing on it: the browser need not lay it over the image in every frame.
      marks.hidden = !image;
    }
    image?.close();
    if (panel.outdated) this.renew(panel);
  }
}
