// The images: one OpenSeadragon viewer per panel, all looking at the same place.
/* global OpenSeadragon */

import { slidePath } from "./api.js";
import { state } from "./state.js";

const ANIMATION = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.35;
const SIDE = 512;
const MAX_PIXEL_RATIO = 8;

// Lights add up; of several stains over one another the darker pixel shows, so that none hides the brown of another.
function blending({ kind }, position) {
  if (kind === "fluorescence") return "lighter";
  return kind === "stain" && position > 1 ? "darken" : undefined;
}

export class Panels {
  // onMove(place): the view changed. draw(panel): time to draw marks over a panel.
  constructor(container, { onMove, draw, onMessage }) {
    this.container = container;
    this.onMove = onMove;
    this.drawMarks = draw;
    this.onMessage = onMessage;
    this.list = [];
    this.slide = null;
    new ResizeObserver(() => this.list.forEach((panel) => this.sizeMarks(panel))).observe(container);
  }

  // Shows a slide as the state says, at the same place as before if it is the same slide.
  show(slide) {
    const place = state.place;
    this.clear();
    this.slide = slide;
    const wanted = this.wanted();
    const columns = this.columns(wanted.length);
    this.container.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;
    this.container.classList.toggle("single", wanted.length === 1);
    for (const one of wanted) this.list.push(this.make(one));
    if (place) this.list.forEach((panel) => this.put(panel, place));
  }

  // Columns in which the whole slide appears largest; one where the page is narrow.
  columns(count) {
    if (matchMedia("(max-width: 760px)").matches) return 1;
    const { clientWidth, clientHeight } = this.container;
    const [width, height] = this.slide.size;
    const scale = (columns) =>
      Math.min(clientWidth / columns / width, clientHeight / Math.ceil(count / columns) / height);
    let best = 1;
    for (let columns = 2; columns <= count; columns++) if (scale(columns) > scale(best)) best = columns;
    return best;
  }

  clear() {
    for (const panel of this.list) panel.viewer.destroy();
    this.list = [];
    this.container.replaceChildren();
  }

  // What each panel shows: title, images from the bottom up, and the classes of cells that belong to it.
  wanted() {
    const { slide } = this;
    const stains = slide.stains.filter((stain) => !state.hidden.has(stain.name));
    const he = slide.he ? [{ kind: "he", levels: slide.he.levels }] : [];
    if (state.mode === "fluorescence") {
      const first = slide.stains[0];
      const images = [{ kind: "fluorescence", name: "nuclei", levels: first.levels }];
      images.push(...stains.map((stain) => ({ kind: "fluorescence", name: stain.name, levels: stain.levels })));
      const title = [...stains.map((stain) => stain.label), "nuclei"].join(" + ");
      return [{ title: `${title} (virtual, as fluorescence)`, images, classes: null, dark: true }];
    }
    const pictures = stains.map((stain) => ({ kind: "stain", name: stain.name, levels: stain.levels }));
    if (state.mode === "overlay") {
      const over = stains.map((stain) => stain.label).join(", ");
      const title = he.length ? (over ? `${over} (virtual) over H&E` : "H&E (input)") : `${over} (virtual)`;
      return [{ title, images: [...he, ...pictures], classes: null, layered: he.length > 0 }];
    }
    const panels = he.length ? [{ title: "H&E (input)", images: he, classes: null }] : [];
    const other = slide.references.find((one) => one.name === state.compare);
    stains.forEach((stain, i) => {
      panels.push({ title: `${stain.label} (virtual)`, images: [pictures[i]], classes: [stain.label] });
      if (!other?.stains.includes(stain.name)) return;
      for (const [kind, title] of [["reference", `${stain.label} (${other.label})`], ["difference", `${stain.label}: difference`]]) {
        const image = { kind: `${kind}/${encodeURIComponent(other.name)}`, name: stain.name, levels: stain.levels };
        panels.push({ title, images: [image], classes: [] });
      }
    });
    return panels;
  }

  make({ title, images, classes, dark = false, layered = false }) {
    const element = document.createElement("section");
    element.className = dark ? "panel dark" : "panel";
    element.setAttribute("aria-label", title);
    const image = document.createElement("div");
    image.className = "image";
    const marks = document.createElement("canvas");
    marks.className = "marks";
    marks.setAttribute("aria-hidden", "true");
    const heading = document.createElement("h3");
    heading.textContent = title;
    const scale = document.createElement("div");
    scale.className = "scale";
    scale.append(document.createElement("span"), document.createElement("i"));
    element.append(image, marks, heading, scale);
    this.container.append(element);

    const viewer = OpenSeadragon({
      element: image,
      drawer: "canvas",
      showNavigationControl: false,
      keyboardNavEnabled: false,
      animationTime: ANIMATION,
      springStiffness: 8,
      blendTime: 0,
      maxZoomPixelRatio: MAX_PIXEL_RATIO,
      minZoomImageRatio: 0.6,
      visibilityRatio: 0.2,
      zoomPerScroll: 1.3,
      imageLoaderLimit: 6,
      maxImageCacheCount: 300,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      silenceMultiImageWarnings: true,
    });
    viewer.canvas.setAttribute("aria-label", `${title}: image, move with the arrow keys, zoom with plus and minus`);
    viewer.canvas.setAttribute("role", "img");
    const panel = { element, marks, scale, viewer, title, classes, dark, layered, ready: false, layers: images };
    viewer.addHandler("open", () => {
      panel.ready = true;
      this.put(panel, state.place ?? this.home());
      this.style(panel);
    });
    viewer.addHandler("viewport-change", () => this.moved(panel));
    viewer.addHandler("update-viewport", () => this.drawMarks(panel));
    viewer.addHandler("tile-load-failed", () => this.onMessage(`Part of ${title} could not be read.`));
    viewer.addHandler("open-failed", () => this.onMessage(`${title} could not be opened.`));
    viewer.open(
      images.map((one, i) => ({
        tileSource: this.source(one),
        width: 1,
        compositeOperation: blending(one, i),
      })),
    );
    this.sizeMarks(panel);
    return panel;
  }

  source({ kind, name, levels }) {
    const base = slidePath(this.slide.name) + (kind === "he" ? "/he" : `/${kind}/${name}`);
    const top = levels.length - 1;
    return {
      width: levels[0][0],
      height: levels[0][1],
      tileSize: SIDE,
      tileOverlap: 0,
      minLevel: 0,
      maxLevel: top,
      getTileUrl: (level, x, y) => `${base}/${top - level}/${x}_${y}.jpg?v=${this.slide.version}`,
    };
  }

  // Opacity and swipe line of the stains that lie over the H&E.
  style(panel) {
    const { world, viewport } = panel.viewer;
    const line = panel.element.querySelector(".swipe");
    const swipes = panel.layered && state.swipe !== null;
    if (line) line.hidden = !swipes;
    if (!panel.layered || !panel.ready) return;
    if (swipes && !line) panel.element.append(this.swipeLine(panel));
    if (swipes) panel.element.querySelector(".swipe").style.left = `${100 * state.swipe}%`;
    const width = panel.viewer.container.clientWidth;
    for (let i = 1; i < world.getItemCount(); i++) {
      const item = world.getItemAt(i);
      item.setOpacity(state.opacity);
      if (!swipes) {
        if (item.getClip()) item.setClip(null);
        continue;
      }
      const edge = viewport.pointFromPixel(new OpenSeadragon.Point(state.swipe * width, 0), true).x * item.source.dimensions.x;
      const left = Math.min(item.source.dimensions.x, Math.max(0, edge));
      item.setClip(new OpenSeadragon.Rect(left, 0, item.source.dimensions.x - left, item.source.dimensions.y));
    }
  }

  swipeLine(panel) {
    const line = document.createElement("div");
    line.className = "swipe"; // by keyboard: the slider beside the images
    line.addEventListener("pointerdown", (event) => {
      line.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    line.addEventListener("pointermove", (event) => {
      if (!line.hasPointerCapture(event.pointerId)) return;
      const box = panel.element.getBoundingClientRect();
      state.swipe = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
      this.style(panel);
      this.onMove(this.place(panel));
    });
    return line;
  }

  styleAll() {
    this.list.forEach((panel) => this.style(panel));
  }

  redraw() {
    this.list.forEach((panel) => panel.ready && panel.viewer.forceRedraw());
  }

  // Where a panel looks: centre in level-0 pixels, and screen pixels per level-0 pixel.
  place(panel) {
    const { viewport, container } = panel.viewer;
    const centre = viewport.getCenter(true);
    const width = this.slide.size[0];
    return { x: centre.x * width, y: centre.y * width, scale: (viewport.getZoom(true) * container.clientWidth) / width };
  }

  put(panel, { x, y, scale }, immediately = true) {
    if (!panel.ready) return;
    const { viewport, container } = panel.viewer;
    const width = this.slide.size[0];
    viewport.zoomTo((scale * width) / container.clientWidth, null, immediately);
    viewport.panTo(new OpenSeadragon.Point(x / width, y / width), immediately);
    if (immediately) viewport.applyConstraints(true);
  }

  home() {
    const [width, height] = this.slide.size;
    const { clientWidth, clientHeight } = this.list[0].viewer.container;
    return { x: width / 2, y: height / 2, scale: 0.97 * Math.min(clientWidth / width, clientHeight / height) };
  }

  // Moves all panels; smoothly, unless the user wants no motion.
  go(place) {
    const [first] = this.list;
    if (first) this.put(first, place, ANIMATION === 0);
  }

  pan(dx, dy) {
    const place = this.target();
    if (place) this.go({ ...place, x: place.x + dx / place.scale, y: place.y + dy / place.scale });
  }

  zoom(factor) {
    const place = this.target();
    if (place) this.go({ ...place, scale: place.scale * factor });
  }

  // Where the first panel is going: keys that follow one another add up.
  target() {
    const [panel] = this.list;
    if (!panel?.ready) return null;
    const { viewport, container } = panel.viewer;
    const centre = viewport.getCenter(false);
    const width = this.slide.size[0];
    return { x: centre.x * width, y: centre.y * width, scale: (viewport.getZoom(false) * container.clientWidth) / width };
  }

  moved(panel) {
    if (this.following || !panel.ready) return;
    const place = this.place(panel);
    this.following = true;
    for (const other of this.list) if (other !== panel) this.put(other, place);
    this.following = false;
    this.styleAll();
    this.onMove(place);
  }

  // Position of a level-0 pixel on a panel's screen, and the scale.
  projection(panel) {
    const { viewport, container } = panel.viewer;
    const origin = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const scale = (viewport.getZoom(true) * container.clientWidth) / this.slide.size[0];
    return { x: origin.x, y: origin.y, scale, width: container.clientWidth, height: container.clientHeight };
  }

  sizeMarks(panel) {
    const ratio = devicePixelRatio || 1;
    panel.marks.width = Math.round(panel.element.clientWidth * ratio);
    panel.marks.height = Math.round(panel.element.clientHeight * ratio);
    if (panel.ready) this.drawMarks(panel);
  }
}
