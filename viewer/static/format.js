// Numbers and elements, as the page writes them.

export const number = (value, digits = 0) =>
  value === null || value === undefined
    ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

export const percent = (share) => (share === null || share === undefined ? "–" : `${(100 * share).toFixed(1)}\u202f%`);

// element("p", { className: "x" }, "text", child …)
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function table(headings, rows) {
  const head = element("tr", {}, ...headings.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...rest]) =>
    element("tr", {}, element("th", { scope: "row" }, first), ...rest.map((text) => element("td", {}, text))),
  );
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}

export function swatch(colour) {
  const made = element("span", { className: "swatch" });
  made.style.backgroundColor = colour;
  made.setAttribute("aria-hidden", "true");
  return made;
}

// The scale bar: the longest of 1, 2, 5 × 10ⁿ µm that fits into a width in pixels.
export function scaleBar(micrometresPerPixel, longest) {
  const most = micrometresPerPixel * longest;
  const power = 10 ** Math.floor(Math.log10(most));
  const length = [5, 2, 1].map((step) => step * power).find((value) => value <= most * (1 + 1e-9));
  return { pixels: length / micrometresPerPixel, text: length >= 1000 ? `${length / 1000} mm` : `${length} µm` };
}
