// What is looked at, and how: kept in the address behind "#", so that a link opens the same place again.

export const MODES = ["side", "overlay", "fluorescence"];

export const state = {
  slide: null, // name of the slide
  mode: "side",
  hidden: new Set(), // names of stains that are switched off
  compare: null, // name of what the stains are compared with
  opacity: 1,
  swipe: null, // position of the swipe line, 0 … 1; null: off
  flags: true, // flagged tiles are hatched
  cells: true,
  hiddenClasses: new Set(), // names of classes of cells that are switched off
  threshold: 0, // mean probability below which cells are left out
  place: null, // {x, y: centre in level-0 pixels, scale: screen pixels per level-0 pixel}
  region: null, // corners [[x, y], …] in level-0 pixels
};

export function readAddress(hash = location.hash) {
  const given = new URLSearchParams(hash.slice(1));
  const number = (name, low, high, otherwise) => {
    const value = Number.parseFloat(given.get(name));
    return Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : otherwise;
  };
  const names = (name) => new Set((given.get(name) ?? "").split("~").filter(Boolean));
  state.slide = given.get("slide");
  state.mode = MODES.includes(given.get("view")) ? given.get("view") : "side";
  state.hidden = names("off");
  state.compare = given.get("compare");
  state.opacity = number("opacity", 0, 1, 1);
  state.swipe = number("swipe", 0, 1, null);
  state.cells = given.get("cells") !== "off";
  state.flags = given.get("flags") !== "off";
  state.hiddenClasses = names("classes-off");
  state.threshold = number("p", 0, 1, 0);
  const x = number("x", -1e9, 1e9, null);
  const y = number("y", -1e9, 1e9, null);
  const scale = number("scale", 1e-6, 100, null);
  state.place = x === null || y === null || scale === null ? null : { x, y, scale };
  state.region = corners(given.get("region"));
}

export function address() {
  const given = new URLSearchParams();
  if (state.slide) given.set("slide", state.slide);
  if (state.place) {
    given.set("x", state.place.x.toFixed(1));
    given.set("y", state.place.y.toFixed(1));
    given.set("scale", state.place.scale.toPrecision(5));
  }
  if (state.mode !== "side") given.set("view", state.mode);
  if (state.hidden.size) given.set("off", [...state.hidden].join("~"));
  if (state.compare) given.set("compare", state.compare);
  if (state.opacity !== 1) given.set("opacity", state.opacity.toString());
  if (state.swipe !== null) given.set("swipe", state.swipe.toFixed(3));
  if (!state.flags) given.set("flags", "off");
  if (!state.cells) given.set("cells", "off");
  if (state.hiddenClasses.size) given.set("classes-off", [...state.hiddenClasses].join("~"));
  if (state.threshold) given.set("p", state.threshold.toString());
  if (state.region) given.set("region", state.region.map((point) => point.map((v) => v.toFixed(0)).join(",")).join(";"));
  return "#" + given.toString();
}

let pending = 0;

// Writes the address soon: browsers limit how often it may change.
export function remember() {
  clearTimeout(pending);
  pending = setTimeout(rememberNow, 250);
}

export function rememberNow() {
  clearTimeout(pending);
  history.replaceState(null, "", address());
}

function corners(text) {
  const points = (text ?? "").split(";").map((point) => point.split(",").map(Number));
  const usable = points.length >= 3 && points.every((p) => p.length === 2 && p.every(Number.isFinite));
  return usable ? points : null;
}
