// Begins here: reads the address, fetches slides, and connects images, controls and keys.

import { fetchJson, slidePath } from "./api.js";
import { say, showCells, showList, showRegion, showSlide, showStains } from "./controls.js";
import { scaleBar } from "./format.js";
import { bindKeys } from "./keys.js";
import { Panels } from "./panels.js";
import { RegionTool, rectangle } from "./regions.js";
import { MODES, address, readAddress, remember, rememberNow, state } from "./state.js";

const $ = (id) => document.getElementById(id);
const READING_AGAIN = 700; // ms until it is asked again whether the cells have been read
const TELL = 80; // ms after which numbers follow a view that moves: text in every frame costs frames

let slides = [];
let slide = null;
let aboutCells = { state: "reading", problem: "", classes: [] };
let asked = 0; // number of the newest question about a region

const panels = new Panels($("panels"), { onMove: moved, drawRegion: (...where) => tool.draw(...where), onMessage: say });
const tool = new RegionTool(panels, regionChanged);

async function start() {
  readAddress();
  ({ slides } = await fetchJson("/api/slides"));
  const first = slides.find((one) => !one.error);
  if (!first) {
    showList(slides, null);
    say("There is nothing to show: every slide failed.");
    return;
  }
  if (!slides.some((one) => one.name === state.slide && !one.error)) state.slide = first.name;
  await openSlide();
}

async function openSlide() {
  const name = state.slide;
  showList(slides, name);
  const opened = await fetchJson(`/api${slidePath(name)}`);
  if (state.slide !== name) return;
  slide = opened;
  aboutCells = { state: "reading", problem: "", classes: [] };
  panels.marks.open(slide);
  showSlide(slide);
  showLayers();
  showCells(aboutCells, redrawMarks);
  regionChanged();
  attempt(readCells);
}

async function readCells() {
  const wanted = slide;
  const about = await fetchJson(`/api${slidePath(wanted.name)}/cells`);
  if (slide !== wanted) return;
  aboutCells = about;
  showCells(about, redrawMarks);
  if (about.state === "reading") setTimeout(() => slide === wanted && attempt(readCells), READING_AGAIN);
  if (about.state !== "ready") return;
  panels.marks.openCells(about);
  panels.redraw();
  if (state.region) scoreRegion();
}

function showLayers() {
  showStains(slide, showPanels);
  showPanels();
}

function showPanels() {
  panels.show(slide);
  tool.attach();
  remember();
}

function cellsChanged() {
  showCells(aboutCells, redrawMarks);
  redrawMarks();
}

// Draws again what lies over the images.
function redrawMarks() {
  panels.redraw();
  remember();
}

function regionChanged() {
  for (const kind of ["rectangle", "polygon"]) {
    $(`draw-${kind}`).setAttribute("aria-pressed", String(tool.kind === kind));
  }
  panels.redraw();
  showRegion(null);
  remember();
  if (state.region) scoreRegion();
}

async function scoreRegion() {
  const question = ++asked;
  try {
    const path = `/api${slidePath(slide.name)}/region`;
    const scores = await fetchJson(path, {
      polygon: state.region,
      threshold: state.threshold,
      reference: slide.references.some((one) => one.name === state.compare) ? state.compare : null,
    });
    if (question === asked) showRegion(scores);
  } catch (error) {
    if (question === asked) showRegion(null, error.message);
  }
}

let telling = 0;

function moved(place) {
  state.place = place;
  remember();
  telling ||= setTimeout(tell, TELL);
}

// Where the view is, in numbers and scale bars.
function tell() {
  telling = 0;
  const { place } = state;
  if (!place || !slide) return;
  const [x, y] = [place.x * slide.mpp[0], place.y * slide.mpp[1]];
  $("coordinates").textContent = `Centre: ${x.toFixed(0)} µm, ${y.toFixed(0)} µm`;
  $("magnification").textContent = `${(slide.objective * place.scale).toPrecision(3)}×`;
  for (const panel of panels.list) if (panel.ready) showScale(panel);
}

function showScale(panel) {
  const { scale, width } = panels.projection(panel);
  const [text, bar] = panel.scale.children;
  const { pixels, text: length } = scaleBar(slide.mpp[0] / scale, Math.min(140, width / 3));
  if (text.textContent !== length) text.textContent = length;
  bar.style.width = `${pixels.toFixed(1)}px`;
}

function setMode(mode) {
  state.mode = mode;
  showLayers();
}

function scoreView() {
  const [panel] = panels.list;
  if (!panel?.ready) return;
  const { x, y, scale, width, height } = panels.projection(panel);
  const [w, h] = slide.size;
  const inside = (value, most) => Math.min(most, Math.max(0, value));
  const corner = [inside(-x / scale, w), inside(-y / scale, h)];
  state.region = rectangle(corner, [inside((width - x) / scale, w), inside((height - y) / scale, h)]);
  regionChanged();
}

function otherSlide(step) {
  const usable = slides.filter((one) => !one.error);
  const at = usable.findIndex((one) => one.name === state.slide);
  const next = usable[at + step];
  if (next) location.hash = `#slide=${encodeURIComponent(next.name)}`;
}

async function copyLink() {
  rememberNow();
  const link = location.href.split("#")[0] + address();
  try {
    await navigator.clipboard.writeText(link);
    say("The link to this place is in the clipboard.");
  } catch {
    say(link); // no clipboard over plain HTTP from another machine
  }
}

function startDrawing(kind) {
  tool.start(kind);
  for (const one of ["rectangle", "polygon"]) $(`draw-${one}`).setAttribute("aria-pressed", String(tool.kind === one));
  if (tool.kind) $("panels").focus(); // else Enter would press the button again
  if (tool.kind === "rectangle") say("Drag a rectangle over the image.");
  if (tool.kind === "polygon") say("Click the corners; a double click or Enter closes the polygon.");
}

function clearRegion() {
  state.region = null;
  asked++;
  regionChanged();
}

const actions = {
  pan: (dx, dy) => panels.pan(dx, dy),
  zoom: (factor) => panels.zoom(factor),
  home: () => panels.list.length && panels.go(panels.home()),
  nextMode: () => setMode(MODES[(MODES.indexOf(state.mode) + 1) % MODES.length]),
  toggleStain: (number) => {
    const stain = slide.stains[number - 1];
    if (!stain) return;
    state.hidden[state.hidden.has(stain.name) ? "delete" : "add"](stain.name);
    showLayers();
  },
  toggleCells: () => {
    state.cells = !state.cells;
    if (state.cells) state.hiddenClasses.clear();
    cellsChanged();
  },
  toggleFlags: () => setFlags(!state.flags),
  toggleSwipe: () => {
    if (state.mode !== "overlay") {
      state.mode = "overlay";
      state.swipe ??= 0.5;
      showLayers();
    } else setSwipe(state.swipe === null ? 0.5 : null);
  },
  moveSwipe: (by) => state.swipe !== null && setSwipe(Math.min(1, Math.max(0, state.swipe + by))),
  draw: startDrawing,
  closePolygon: () => tool.kind === "polygon" && tool.close(),
  scoreView,
  escape: () => {
    if (tool.kind) startDrawing(tool.kind);
    else if (state.region) clearRegion();
  },
  otherSlide,
  copyLink: () => attempt(copyLink),
  help: () => $("help").showModal(),
};

function setFlags(shown) {
  state.flags = shown;
  $("flags-on").checked = shown;
  redrawMarks();
}

function setSwipe(position) {
  state.swipe = position;
  showStains(slide, showPanels);
  panels.styleAll();
  remember();
}

function connect() {
  const on = (id, event, action) => $(id).addEventListener(event, action);
  for (const button of document.querySelectorAll("#modes button")) {
    button.addEventListener("click", () => setMode(button.dataset.mode));
  }
  document.querySelector("a.skip").addEventListener("click", (event) => {
    event.preventDefault(); // the address behind "#" is the place that is shown
    $("panels").focus();
  });
  on("zoom-in", "click", () => actions.zoom(2));
  on("zoom-out", "click", () => actions.zoom(0.5));
  on("zoom-home", "click", actions.home);
  on("draw-rectangle", "click", () => startDrawing("rectangle"));
  on("draw-polygon", "click", () => startDrawing("polygon"));
  on("score-view", "click", scoreView);
  on("copy-link", "click", actions.copyLink);
  on("open-help", "click", actions.help);
  on("clear-region", "click", clearRegion);
  on("opacity", "input", () => {
    state.opacity = $("opacity").value / 100;
    panels.styleAll();
    remember();
  });
  on("compare", "change", () => {
    state.compare = $("compare").value || null;
    showLayers();
    if (state.region) scoreRegion();
  });
  on("flags-on", "change", () => setFlags($("flags-on").checked));
  on("swipe-on", "change", () => setSwipe($("swipe-on").checked ? 0.5 : null));
  on("swipe", "input", () => setSwipe($("swipe").value / 100));
  on("threshold", "input", () => {
    state.threshold = Number($("threshold").value);
    $("threshold-value").textContent = state.threshold.toFixed(2);
    redrawMarks();
  });
  on("threshold", "change", () => state.region && scoreRegion());
  bindKeys(actions);
  addEventListener("hashchange", () => {
    readAddress();
    if (!slides.some((one) => one.name === state.slide)) state.slide = slide?.name ?? null;
    attempt(openSlide);
  });
}

// Runs something that asks the server; what goes wrong is said on the page.
async function attempt(action) {
  try {
    await action();
  } catch (error) {
    say(error.message);
  }
}

connect();
attempt(start);
