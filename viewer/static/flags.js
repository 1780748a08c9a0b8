// Tiles that should not be believed: hatched, on by default.

const STEP = 9; // screen pixels between the lines

// tiles: [[left, top, width, height], …] in level-0 pixels.
export function drawFlags(context, { x, y, scale, width, height }, tiles) {
  context.save();
  context.beginPath();
  let small = false;
  for (const [left, top, w, h] of tiles) {
    const [px, py, pw, ph] = [x + left * scale, y + top * scale, w * scale, h * scale];
    if (px < width && py < height && px + pw > 0 && py + ph > 0) context.rect(px, py, pw, ph);
    small ||= pw < 2 * STEP;
  }
  if (small) {
    // From afar no line might cross a tile: it is red all over.
    context.fillStyle = "rgb(179 38 30 / .5)";
    context.fill();
  }
  context.clip();
  context.beginPath();
  // The lines move with the image.
  const offset = ((((x + y) % STEP) + STEP) % STEP) - STEP;
  for (let at = offset; at < width + height; at += STEP) {
    context.moveTo(at, 0);
    context.lineTo(at - height, height);
  }
  for (const [colour, line] of [["rgb(255 255 255 / .6)", 3], ["rgb(179 38 30 / .9)", 1.4]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.stroke();
  }
  context.restore();
}
