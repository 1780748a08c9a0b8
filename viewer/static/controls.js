// Everything beside the images: slides, layers, scores, provenance. Reads the state and changes it.

import { slidePath } from "./api.js";
import { element, number, percent, swatch, table } from "./format.js";
import { state } from "./state.js";

const $ = (id) => document.getElementById(id);

export function showList(slides, current) {
  $("slide-list").replaceChildren(...slides.map((slide) => listItem(slide, slide.name === current)));
}

function listItem(slide, isCurrent) {
  if (slide.error) {
    return element("li", {}, element("div", { className: "failed" }, element("strong", {}, slide.title), element("br"), slide.error));
  }
  const link = element("a", { href: `#slide=${encodeURIComponent(slide.name)}` });
  if (isCurrent) link.setAttribute("aria-current", "true");
  const image = element("img", { src: `${slidePath(slide.name)}/thumbnail.jpg`, alt: "", loading: "lazy" });
  const scores = slide.scores.map((score) => `${score.label}: ${number(score.cells)} cells`).join(", ");
  link.append(image, slide.title, element("br"), element("span", { className: "numbers" }, scores));
  return element("li", {}, link);
}

export function showSlide(slide) {
  document.title = `${slide.title} · StainDiffuser`;
  $("title").textContent = slide.title;
  const { model } = slide;
  $("model").textContent =
    `${slide.notice} Model ${model.name} ${model.version.slice(0, 12)}, ` +
    `${model.steps} ${model.steps === 1 ? "step" : "steps"}; gate: ${slide.gate}.`;
  const alerts = [...slide.warnings];
  if (slide.he_problem) alerts.unshift(`H&E is not shown: ${slide.he_problem}`);
  if (slide.damaged) alerts.push(`${slide.damaged} damaged regions of the slide were left out and are white.`);
  if (slide.flags?.summary) alerts.unshift(slide.flags.summary);
  showFlags(slide.flags);
  $("alerts").replaceChildren(...alerts.map((text) => element("p", {}, text)));
  $("slide-scores").replaceChildren(
    table(
      ["", "cells", "/mm²", "positive", "area"],
      slide.scores.map((one) => [
        one.label,
        number(one.cells),
        number(one.cells_per_mm2),
        percent(one.positive_share),
        percent(one.positive_area_share),
      ]),
    ),
    element(
      "p",
      {},
      `On ${number(slide.tissue_mm2, 2)} mm² of tissue. Positive: share of the nuclei in the H&E; area: where the cell map is at least one half.`,
    ),
  );
  const facts = { Model: `${model.name} ${model.version}`, ...slide.provenance };
  $("provenance").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))]),
  );
}

function showFlags(flags) {
  const found = flags?.tiles.length > 0;
  $("flags").hidden = !found;
  if (!found) return;
  const counts = new Map();
  for (const [, , , , reasons] of flags.tiles) for (const one of reasons) counts.set(one, (counts.get(one) ?? 0) + 1);
  $("flag-reasons").replaceChildren(
    ...[...counts].map(([one, count]) => element("li", {}, `${number(count)} ${flags.reasons[one] ?? one}`)),
  );
}

export function showStains(slide, onChange) {
  const boxes = slide.stains.map((stain, i) =>
    checkbox(
      !state.hidden.has(stain.name),
      [swatch(state.mode === "fluorescence" ? stain.bright : stain.dark), `${stain.label} (${i + 1})`],
      (checked) => {
        state.hidden[checked ? "delete" : "add"](stain.name);
        onChange();
      },
    ),
  );
  $("stains").replaceChildren(...boxes);
  showCompare(slide);
  $("flags-on").checked = state.flags;
  $("overlay-controls").hidden = state.mode !== "overlay" || !slide.he;
  $("opacity").value = Math.round(100 * state.opacity);
  $("swipe-on").checked = state.swipe !== null;
  $("swipe").value = Math.round(100 * (state.swipe ?? 0.5));
  $("swipe").disabled = state.swipe === null;
  for (const button of document.querySelectorAll("#modes button")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
  }
}

function showCompare(slide) {
  const usable = slide.references.length > 0 && state.mode === "side";
  $("compare-controls").hidden = !usable;
  const options = slide.references.map(({ name, label }) => element("option", { value: name, selected: name === state.compare }, label));
  $("compare").replaceChildren(element("option", { value: "", selected: !state.compare }, "nothing"), ...options);
  $("compare-legend").hidden = !state.compare;
}

export function showCells(about, onChange) {
  const text = { reading: "The cells are being read …", none: about.problem, ready: "" }[about.state];
  $("cells-state").textContent = about.state === "ready" && !about.classes.length ? "No cells were found." : text;
  const boxes = about.classes.map((one) =>
    checkbox(
      state.cells && !state.hiddenClasses.has(one.name),
      [swatch(one.dark), `${one.name}: ${number(one.count)}`],
      (checked) => {
        if (!state.cells) about.classes.forEach((other) => state.hiddenClasses.add(other.name));
        state.cells = true;
        state.hiddenClasses[checked ? "delete" : "add"](one.name);
        onChange();
      },
    ),
  );
  $("cell-classes").replaceChildren(...boxes);
  $("threshold").value = state.threshold;
  $("threshold").disabled = about.state !== "ready";
  $("threshold-value").textContent = state.threshold.toFixed(2);
}

function checkbox(checked, label, onChange) {
  const box = element("input", { type: "checkbox", checked });
  box.addEventListener("change", () => onChange(box.checked));
  return element("label", {}, box, " ", ...label);
}

export function showRegion(scores, problem) {
  $("region").hidden = state.region === null;
  if (problem) $("region-scores").replaceChildren(element("p", {}, problem));
  else if (scores) {
    const least = state.threshold ? `, cells of probability ${state.threshold.toFixed(2)} or more` : "";
    $("region-scores").replaceChildren(
      element("p", {}, `${number(scores.area_mm2, 3)} mm²${least}`),
      table(
        ["", "cells", "/mm²", "area"],
        scores.stains.map((one) => [
          one.label,
          number(one.cells),
          number(one.cells_per_mm2),
          percent(one.positive_area_share),
        ]),
      ),
    );
    const compared = scores.stains.filter((one) => one.agreement);
    if (compared.length) {
      $("region-scores").append(
        table(
          ["", "Dice", "here", "there", "corr."],
          compared.map(({ label, agreement: found }) => [
            label,
            number(found.dice, 2),
            percent(found.virtual_share),
            percent(found.other_share),
            number(found.correlation, 2),
          ]),
        ),
        element("p", {}, "Brown (DAB) pixels: Dice of both, share of the region here and there, correlation of density."),
      );
    }
  } else $("region-scores").replaceChildren(element("p", {}, "Counting …"));
}

let clearing = 0;

export function say(text) {
  clearTimeout(clearing);
  $("message").textContent = text;
  clearing = setTimeout(() => ($("message").textContent = ""), 8000);
}
