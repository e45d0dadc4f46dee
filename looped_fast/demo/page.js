"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const controls = Object.fromEntries(
  ["play", "loop", "step", "trained", "prompts"].map((id) => [id, document.getElementById(id)]),
);
const scenes = { curve: drawCurve, plane: drawPlane };
const state = { loop: 1, prompt: 0, timer: null };
const MARGIN = { left: 44, right: 8, top: 8, bottom: 36 };
const MAP = { left: 34, right: 2, top: 2, bottom: 34 };

/** Numbers packed in Python: base64 of 8 or 16-bit integers, from low (0) to high (all bits). */
function unpack({ base64, bits, low, high }) {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const whole = bits === 8 ? bytes : new Uint16Array(bytes.buffer);
  return Float64Array.from(whole, (value) => low + (value / (2 ** bits - 1)) * (high - low));
}

/** The prompt on show, with the arrays that its drawings need. */
function current(scene) {
  const prompt = scene.prompts[state.prompt];
  prompt.arrays ??= { truth: unpack(prompt.truth), predictions: unpack(prompt.predictions) };
  const { truth, predictions } = prompt.arrays;
  const after = (loop) => predictions.subarray((loop - 1) * truth.length, loop * truth.length);
  return { ...prompt, truth, after };
}

/** The examples within the plot, each { x, y }. */
function inside(scene, prompt) {
  const [low, high] = scene.span;
  return prompt.ys
    .map((y, i) => ({ x: prompt.xs[i], y }))
    .filter(({ x }) => x.every((at) => at >= low && at <= high));
}

const loops = (count) => `${count} ${count === 1 ? "loop" : "loops"}`;
const number = (value) => String(value).replace("-", "\u2212");
const scale = (from, to) => (value) =>
  to[0] + ((value - from[0]) / (from[1] - from[0])) * (to[1] - to[0]);

/** Round numbers from low to high, some five of them. */
function ticks([low, high]) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toFixed(9));
  return found;
}

/** Axes of a plot that is as wide as its element: { x, y } map numbers to pixels. */
function axes(svg, height, spans, marks, titles, margin = MARGIN) {
  const width = svg.clientWidth;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const box = {
    left: margin.left,
    right: width - margin.right,
    top: margin.top,
    bottom: height - margin.bottom,
  };
  const x = scale(spans.x, [box.left, box.right]);
  const y = scale(spans.y, [box.bottom, box.top]);
  const lines = marks.y.map(
    ([at]) => `<line class="axis" x1="${box.left}" x2="${box.right}" y1="${y(at)}" y2="${y(at)}"/>`,
  );
  const beside = marks.y.map(
    ([at, text]) =>
      `<text x="${box.left - 6}" y="${y(at) + 4}" text-anchor="end">${text}</text>`,
  );
  const below = marks.x.map(
    ([at, text]) => `<text x="${x(at)}" y="${box.bottom + 16}" text-anchor="middle">${text}</text>`,
  );
  const names =
    `<text x="${(box.left + box.right) / 2}" y="${height - 4}" text-anchor="middle">${titles.x}</text>` +
    `<text x="0" y="${(box.top + box.bottom) / 2 + 4}">${titles.y}</text>`;
  return { x, y, box, lines: lines.join(""), texts: [...beside, ...below, names].join("") };
}

const path = (xs, ys) => "M" + Array.from(xs, (x, i) => `${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("L");
const plain = (values) => values.map((value) => [value, number(value)]);

function drawCurve(root, scene, prompt) {
  const svg = root.querySelector(".plot");
  const grid = prompt.truth.map((_, i, all) => scale([0, all.length - 1], scene.span)(i));
  const spans = { x: scene.span, y: prompt.span };
  const titles = { x: "x", y: "y" };
  const { x, y, box, lines, texts } = axes(
    svg, 280, spans, { x: plain(ticks(spans.x)), y: plain(ticks(spans.y)) }, titles,
  );
  const line = (values, name, opacity = 1) =>
    `<path class="${name}" opacity="${opacity}" d="${path(Array.from(grid, x), Array.from(values, y))}"/>`;
  const earlier = [3, 2, 1]
    .filter((back) => state.loop > back)
    .map((back) => line(prompt.after(state.loop - back), "model earlier", 0.5 - back * 0.12));
  const dots = inside(scene, prompt).map(
    (example) => `<circle class="example" r="4" cx="${x(example.x[0])}" cy="${y(example.y)}"/>`,
  );
  svg.innerHTML =
    `<clipPath id="frame"><rect x="${box.left}" y="${box.top}" width="${box.right - box.left}" ` +
    `height="${box.bottom - box.top}"/></clipPath>${lines}${texts}<g clip-path="url(#frame)">` +
    `${line(prompt.truth, "true")}${earlier.join("")}` +
    `${line(prompt.after(state.loop), "model now")}</g>${dots.join("")}`;
  return svg;
}

/** 256 colours through the stops of --heat, each [red, green, blue]. */
function palette() {
  const stops = getComputedStyle(document.documentElement)
    .getPropertyValue("--heat")
    .split(",")
    .map((hex) => [1, 3, 5].map((i) => parseInt(hex.trim().slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const k = Math.min(Math.floor(at), stops.length - 2);
    return stops[k].map((from, c) => Math.round(from + (at - k) * (stops[k + 1][c] - from)));
  });
}

function drawPlane(root, scene, prompt) {
  const [low, high] = prompt.span;
  const colours = palette();
  const colour = (value) => {
    const at = Math.round(scale([low, high], [0, 255])(value));
    return colours[Math.max(0, Math.min(255, at))];
  };
  root.querySelector(".low").textContent = number(low.toFixed(1));
  root.querySelector(".high").textContent = number(high.toFixed(1));
  const shown = { model: prompt.after(state.loop), true: prompt.truth };
  for (const [name, values] of Object.entries(shown)) {
    const map = root.querySelector(`.${name} .map`);
    const [svg, canvas] = [map.querySelector("svg"), map.querySelector("canvas")];
    const marks = plain(ticks(scene.span));
    const height = svg.clientWidth - MAP.left - MAP.right + MAP.top + MAP.bottom;
    const { x, y, box, texts } = axes(
      svg, height, { x: scene.span, y: scene.span }, { x: marks, y: marks },
      { x: "x₁", y: "x₂" }, MAP,
    );
    const side = Math.sqrt(values.length);
    Object.assign(canvas, { width: side, height: side });
    Object.assign(canvas.style, {
      left: `${box.left}px`,
      top: `${box.top}px`,
      width: `${box.right - box.left}px`,
      height: `${box.bottom - box.top}px`,
    });
    const image = new ImageData(side, side);
    values.forEach((value, i) => image.data.set([...colour(value), 255], 4 * i));
    canvas.getContext("2d").putImageData(image, 0, 0);
    const dots = inside(scene, prompt).map(({ x: [x1, x2], y: value }) =>
      `<circle class="ring" r="4.5" cx="${x(x1)}" cy="${y(x2)}" fill="rgb(${colour(value)})"/>`,
    );
    svg.innerHTML = texts + dots.join("");
    svg.setAttribute("aria-label", name === "true" ? "The values of the true tree" : "");
  }
  return root.querySelector(".model svg");
}

function drawErrors(root, scene, prompt) {
  const svg = root.querySelector(".errors");
  const all = [scene.average, ...scene.prompts.map((each) => each.errors)].flat();
  const decades = [Math.floor(Math.log10(Math.min(...all))), Math.ceil(Math.log10(Math.max(...all)))];
  const powers = Array.from({ length: decades[1] - decades[0] + 1 }, (_, i) => decades[0] + i);
  const counts = Array.from({ length: data.loops }, (_, i) => i + 1);
  const shown = counts.filter((count) => count === 1 || count % scene.n_loops === 0);
  const { x, y, box, lines, texts } = axes(
    svg, 190, { x: [1, data.loops], y: decades },
    {
      x: shown.map((count) => [count, count]),
      y: powers.map((power) => [power, +(10 ** power).toPrecision(1)]),
    },
    { x: "loops", y: "" },
  );
  const line = (errors, name) =>
    `<path class="${name}" d="${path(counts.map(x), errors.map((each) => y(Math.log10(each))))}"/>`;
  const error = prompt.errors[state.loop - 1];
  const [b, at, up] = [x(scene.n_loops), x(state.loop), y(Math.log10(error))];
  const isLast = at > box.right - 60;
  const label = at + (isLast ? -10 : 10);
  // The number stands beside the marker, or else above the line that passes there.
  let above = up - 10;
  counts
    .filter((count) => Math.abs(x(count) - label - (isLast ? -25 : 25)) < 40)
    .flatMap((count) => [prompt.errors[count - 1], scene.average[count - 1]])
    .map((passing) => y(Math.log10(passing)))
    .sort((low, high) => high - low)
    .forEach((at) => (above = Math.abs(at - above + 5) < 11 ? at - 10 : above));
  svg.innerHTML =
    `<rect class="beyond" x="${b}" y="${box.top}" width="${box.right - b}" ` +
    `height="${box.bottom - box.top}"/>${lines}${texts}` +
    `<line class="trained" x1="${b}" x2="${b}" y1="${box.top}" y2="${box.bottom}"/>` +
    `<text x="${b + 6}" y="${box.top + 15}">trained with ${loops(scene.n_loops)}</text>` +
    `${line(scene.average, "average")}${line(prompt.errors, "model")}` +
    `<circle class="marker" r="6" cx="${at}" cy="${up}"/><text class="value" ` +
    `x="${label}" y="${above}" text-anchor="${isLast ? "end" : "start"}">` +
    `${error.toPrecision(3)}</text>`;
  svg.setAttribute("aria-label", `Error after ${loops(state.loop)}: ${error.toPrecision(3)}`);
}

function draw() {
  controls.loop.value = state.loop;
  controls.loop.setAttribute("aria-valuetext", `${loops(state.loop)} of ${data.loops}`);
  controls.step.textContent = state.loop;
  for (const [name, drawScene] of Object.entries(scenes)) {
    const [root, scene] = [document.getElementById(name), data[name]];
    const prompt = current(scene);
    root.querySelectorAll(".loops").forEach((each) => (each.textContent = loops(state.loop)));
    drawErrors(root, scene, prompt);
    const error = prompt.errors[state.loop - 1].toPrecision(3);
    drawScene(root, scene, prompt).setAttribute(
      "aria-label", `The model's prediction after ${loops(state.loop)}; its error is ${error}`,
    );
  }
}

function show(changes) {
  Object.assign(state, changes);
  draw();
}

function pause() {
  clearInterval(state.timer);
  state.timer = null;
  controls.play.textContent = "Play";
  controls.play.setAttribute("aria-pressed", "false");
}

function play() {
  if (state.loop === data.loops) show({ loop: 1 });
  controls.play.textContent = "Pause";
  controls.play.setAttribute("aria-pressed", "true");
  state.timer = setInterval(() => {
    show({ loop: state.loop + 1 });
    if (state.loop === data.loops) pause();
  }, 350);
}

function start() {
  controls.loop.max = data.loops;
  controls.loop.addEventListener("input", () => {
    pause();
    show({ loop: controls.loop.valueAsNumber });
  });
  controls.play.addEventListener("click", () => (state.timer === null ? play() : pause()));
  const b = data.curve.n_loops;
  const share = (b - 1) / (data.loops - 1);
  controls.trained.innerHTML =
    `<span style="left: calc(10px + (100% - 20px) * ${share})">trained with ${b}</span>`;
  data.curve.prompts.forEach((_, i) => {
    const label = document.createElement("label");
    label.innerHTML =
      `<input type="radio" name="prompt" value="${i}" aria-label="Prompt ${i + 1}"` +
      `${i === 0 ? " checked" : ""}><span>${i + 1}</span>`;
    label.firstChild.addEventListener("change", () => show({ prompt: i }));
    controls.prompts.append(label);
  });
  for (const name of Object.keys(scenes)) {
    const root = document.getElementById(name);
    root.querySelector(".examples").textContent = data[name].n_examples;
    root.querySelector(".averaged").textContent = data.averaged;
    root.querySelector(".note").textContent = data[name].note;
  }
  for (const name of ["command", "version"])
    document.querySelector(`footer .${name}`).textContent = data[name];
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(draw).observe(document.getElementById("scenes"));
  draw();
}

start();
