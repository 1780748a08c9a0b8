// The images: one OpenSeadragon viewer per panel, all looking at the same place.
/* global OpenSeadragon */

import { slidePath } from "./api.js";
import { Marks } from "./marks.js";
import { state } from "./state.js";

const ANIMATION = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 0.35;
const SIDE = 512;
const MAX_PIXEL_RATIO = 8;

export class Panels {
  // onMove(place): the view changed. drawRegion(context, projection): draws it over a panel; says whether there is one.
  constructor(container, { onMove, drawRegion, onMessage }) {
    this.container = container;
    this.onMove = onMove;
    this.drawRegion = drawRegion;
    this.onMessage = onMessage;
    this.list = [];
    this.made = 0;
    this.slide = null;
    this.marks = new Marks(() => this.list, (panel) => this.projection(panel));
    // Of each panel: one becomes smaller when the next is added, though their container stays as it is.
    this.sizes = new ResizeObserver((changes) => {
      for (const { target } of changes) {
        const panel = this.list.find((one) => one.element === target);
        if (panel) this.sizeCanvases(panel);
      }
    });
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
    this.sizes.disconnect();
    for (const panel of this.list) {
      panel.ready = false; // what was asked of it may still be answered
      panel.viewer.destroy();
    }
    this.list = [];
    this.container.replaceChildren();
  }

  // What each panel shows: title, images from the bottom up, and the classes of cells that belong to it.
  wanted() {
    const { slide } = this;
    const stains = slide.stains.filter((stain) => !state.hidden.has(stain.name));
    const he = slide.he ? [{ kind: "he", levels: slide.he.levels, sides: slide.he.sides }] : [];
    if (state.mode === "fluorescence") {
      const first = slide.stains[0];
      const names = ["nuclei", ...stains.map((stain) => stain.name)].join("~");
      const images = [{ kind: "fluorescence", name: names, levels: first.levels }];
      const title = [...stains.map((stain) => stain.label), "nuclei"].join(" + ");
      return [{ title: `${title} (virtual, as fluorescence)`, images, classes: null, dark: true }];
    }
    if (state.mode === "overlay") {
      const over = stains.map((stain) => stain.label).join(", ");
      const title = he.length ? (over ? `${over} (virtual) over H&E` : "H&E (input)") : `${over} (virtual)`;
      const names = stains.map((stain) => stain.name).join("~");
      const darkest = stains.length ? [{ kind: "stain", name: names, levels: stains[0].levels }] : [];
      const layered = he.length > 0 && stains.length > 0;
      return [{ title, images: [...he, ...darkest], classes: null, layered }];
    }
    const panels = he.length ? [{ title: "H&E (input)", images: he, classes: null }] : [];
    const other = slide.references.find((one) => one.name === state.compare);
    for (const stain of stains) {
      const image = { kind: "stain", name: stain.name, levels: stain.levels };
      panels.push({ title: `${stain.label} (virtual)`, images: [image], classes: [stain.label] });
      if (!other?.stains.includes(stain.name)) continue;
      for (const [kind, title] of [["reference", `${stain.label} (${other.label})`], ["difference", `${stain.label}: difference`]]) {
        const image = { kind: `${kind}/${encodeURIComponent(other.name)}`, name: stain.name, levels: stain.levels };
        panels.push({ title, images: [image], classes: [] });
      }
    }
    return panels;
  }

  make({ title, images, classes, dark = false, layered = false }) {
    const element = document.createElement("section");
    element.className = dark ? "panel dark" : "panel";
    element.setAttribute("aria-label", title);
    const image = document.createElement("div");
    image.className = "image";
    const [marks, region] = ["marks", "region"].map((name) => {
      const canvas = document.createElement("canvas");
      canvas.className = name;
      canvas.setAttribute("aria-hidden", "true");
      return canvas;
    });
    const heading = document.createElement("h3");
    heading.textContent = title;
    const scale = document.createElement("div");
    scale.className = "scale";
    scale.append(document.createElement("span"), document.createElement("i"));
    element.append(image, marks, region, heading, scale);
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
    const number = ++this.made;
    const panel = { number, element, marks, region, scale, viewer, title, classes, dark, layered, ready: false, renewed: 0 };
    viewer.addHandler("open", () => {
      panel.ready = true;
      this.put(panel, state.place ?? this.home());
      this.style(panel);
      this.marks.renew(panel);
      this.outline(panel);
      this.onMove(this.place(panel));
    });
    viewer.addHandler("viewport-change", () => this.moved(panel));
    viewer.addHandler("update-viewport", () => {
      this.marks.follow(panel);
      this.outline(panel);
    });
    viewer.addHandler("tile-load-failed", () => this.onMessage(`Part of ${title} could not be read.`));
    viewer.addHandler("open-failed", () => this.onMessage(`${title} could not be opened.`));
    // The H&E that a stain covers is not drawn, but loaded when the view rests: it may be uncovered at any time.
    const preload = (wanted) => layered && viewer.world.getItemAt(0)?.setPreload(wanted);
    viewer.addHandler("animation-start", () => preload(false));
    viewer.addHandler("animation-finish", () => preload(true));
    viewer.open(images.map((one, i) => ({ tileSource: this.source(one), width: 1, preload: layered && i === 0 })));
    this.sizes.observe(element);
    return panel;
  }

  source({ kind, name, levels, sides }) {
    const base = slidePath(this.slide.name) + (kind === "he" ? "/he" : `/${kind}/${name}`);
    const top = levels.length - 1;
    const source = new OpenSeadragon.TileSource({
      width: levels[0][0],
      height: levels[0][1],
      tileSize: SIDE,
      tileOverlap: 0,
      minLevel: 0,
      maxLevel: top,
    });
    source.getTileUrl = (level, x, y) => `${base}/${top - level}/${x}_${y}.jpg?v=${this.slide.version}`;
    // A slide's own tiles have its own size.
    if (sides) source.getTileWidth = source.getTileHeight = (level) => sides[top - level];
    source.downloadTileStart = fetchTile;
    source.downloadTileAbort = (job) => job.userData.stop.abort();
    return source;
  }

  // Opacity and swipe line of the stains that lie over the H&E; what they cover is not drawn.
  style(panel) {
    if (!panel.layered || !panel.ready) return;
    const { world, viewport } = panel.viewer;
    const [below, above] = [world.getItemAt(0), world.getItemAt(1)];
    if (!below || !above) return;
    const swipes = state.swipe !== null;
    let line = panel.element.querySelector(".swipe");
    if (swipes && !line) panel.element.append((line = this.swipeLine(panel)));
    if (line) line.hidden = !swipes;
    if (swipes) line.style.left = `${100 * state.swipe}%`;
    const covers = state.opacity === 1;
    above.setOpacity(state.opacity);
    below.setOpacity(covers && !swipes ? 0 : 1);
    if (!swipes) {
      for (const item of [below, above]) if (item.getClip()) item.setClip(null);
      return;
    }
    const place = new OpenSeadragon.Point(state.swipe * viewport.getContainerSize().x, 0);
    const share = Math.min(1, Math.max(0, viewport.pointFromPixel(place, true).x));
    const clip = (item, from, to) => {
      const { x, y } = item.source.dimensions;
      item.setClip(new OpenSeadragon.Rect(from * x, 0, (to - from) * x, y));
    };
    clip(above, share, 1);
    clip(below, 0, covers ? share : 1);
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

  // What lies over the images changed.
  redraw() {
    for (const panel of this.list) {
      this.marks.renew(panel);
      this.outline(panel);
    }
  }

  // Draws the region.
  outline(panel) {
    if (!panel.ready) return;
    const { region } = panel;
    const projection = this.projection(panel);
    const context = region.getContext("2d");
    context.resetTransform();
    context.clearRect(0, 0, region.width, region.height);
    context.scale(region.width / projection.width, region.height / projection.height);
    const anything = this.drawRegion(context, projection);
    if (region.hidden === anything) region.hidden = !anything;
  }

  // Where a panel looks: centre in level-0 pixels, and screen pixels per level-0 pixel.
  place(panel, current = true) {
    const { viewport } = panel.viewer;
    const centre = viewport.getCenter(current);
    const width = this.slide.size[0];
    // Not the element's clientWidth: asking for it makes the browser lay out the page, in every frame.
    return { x: centre.x * width, y: centre.y * width, scale: (viewport.getZoom(current) * viewport.getContainerSize().x) / width };
  }

  put(panel, { x, y, scale }, immediately = true) {
    if (!panel.ready) return;
    const { viewport } = panel.viewer;
    const width = this.slide.size[0];
    viewport.zoomTo((scale * width) / viewport.getContainerSize().x, null, immediately);
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
    return panel?.ready ? this.place(panel, false) : null;
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
    const { viewport } = panel.viewer;
    const origin = viewport.pixelFromPoint(new OpenSeadragon.Point(0, 0), true);
    const { x: width, y: height } = viewport.getContainerSize();
    return { x: origin.x, y: origin.y, scale: (viewport.getZoom(true) * width) / this.slide.size[0], width, height };
  }

  sizeCanvases(panel) {
    const ratio = devicePixelRatio || 1;
    for (const canvas of [panel.marks, panel.region]) {
      canvas.width = Math.round(panel.element.clientWidth * ratio);
      canvas.height = Math.round(panel.element.clientHeight * ratio);
    }
    panel.drawn = null;
    this.marks.renew(panel);
    this.outline(panel);
  }
}

// OpenSeadragon's own way decodes a tile where it is first drawn, in the middle of a frame; a bitmap comes decoded.
async function fetchTile(job) {
  const stop = (job.userData.stop = new AbortController());
  try {
    const answer = await fetch(job.src, { signal: stop.signal });
    if (!answer.ok) throw new Error(`the server answers with status ${answer.status}`);
    job.finish(await createImageBitmap(await answer.blob()), null, "imageBitmap");
  } catch (error) {
    if (!stop.signal.aborted) job.fail(error.message, null);
  }
}
