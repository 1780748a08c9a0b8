// Everything by keyboard, from anywhere on the page.

const STEP = 120; // screen pixels

export function bindKeys(actions) {
  const keys = {
    ArrowLeft: () => actions.pan(-STEP, 0),
    ArrowRight: () => actions.pan(STEP, 0),
    ArrowUp: () => actions.pan(0, -STEP),
    ArrowDown: () => actions.pan(0, STEP),
    "+": () => actions.zoom(1.5),
    "=": () => actions.zoom(1.5),
    "-": () => actions.zoom(1 / 1.5),
    0: actions.home,
    m: actions.nextMode,
    f: actions.toggleFlags,
    c: actions.toggleCells,
    s: actions.toggleSwipe,
    ",": () => actions.moveSwipe(-0.05),
    ".": () => actions.moveSwipe(0.05),
    r: () => actions.draw("rectangle"),
    p: () => actions.draw("polygon"),
    v: actions.scoreView,
    l: actions.copyLink,
    "?": actions.help,
    "[": () => actions.otherSlide(-1),
    "]": () => actions.otherSlide(1),
    Enter: actions.closePolygon,
    Escape: actions.escape,
  };
  for (let number = 1; number <= 9; number++) keys[number] = () => actions.toggleStain(number);

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches?.("select")) return;
    // Sliders move by arrow keys, and Enter presses what has the focus.
    if (event.key.startsWith("Arrow") && event.target.matches?.("input")) return;
    if (event.key === "Enter" && event.target.matches?.("button, a, summary, input")) return;
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    if (event.key !== "Enter") event.preventDefault();
    action();
  });
}
