"use strict";
(() => {
  const byId = id => document.getElementById(id);
  const runs = JSON.parse(byId("heat-data").textContent);
  const grid = byId("heat-grid"), canvas = byId("heat-canvas"), scale = byId("heat-scale");
  const out = byId("heat-value"), pickRun = byId("heat-run"), pickMetric = byId("heat-metric");
  const PALETTE = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
  const MISSING = "rgba(128,128,128,.35)";
  let run, metric, limits, block = 0, step = 0;

  const show = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3
    ? v.toExponential(2).replace("e+", "e") : String(Number(v.toPrecision(4)));

  function fill(select, names) {
    select.replaceChildren(...names.map((name, i) => new Option(name, i)));
  }

  function findLimits() {
    const known = metric.values.flat().filter(v => typeof v === "number" && (!metric.log || v > 0));
    return known.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
  }

  function colour(value) {
    const f = metric.log ? Math.log : v => v;
    const [low, high] = limits.map(f);
    const t = high > low ? Math.min(1, Math.max(0, (f(value) - low) / (high - low))) : .5;
    const at = Math.min(PALETTE.length - 2, Math.floor(t * (PALETTE.length - 1)));
    const part = t * (PALETTE.length - 1) - at;
    return `rgb(${PALETTE[at].map((c, i) => Math.round(c + part * (PALETTE[at + 1][i] - c))).join()})`;
  }

  function paper(element) {
    const ratio = window.devicePixelRatio || 1, { width, height } = element.getBoundingClientRect();
    element.width = Math.round(width * ratio);
    element.height = Math.round(height * ratio);
    const pen = element.getContext("2d");
    pen.scale(ratio, ratio);
    return [pen, width, height];
  }

  function stripes(pen) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const brush = tile.getContext("2d");
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, 8, 8);
    brush.strokeStyle = "#a63a00";
    brush.lineWidth = 2;
    for (const x of [-4, 4, 12]) {
      brush.moveTo(x - 5, 9); brush.lineTo(x + 5, -1);
    }
    brush.stroke();
    return pen.createPattern(tile, "repeat");
  }

  function cell(pen, w, h, b, s, lost) {
    const value = metric.values[b][s];
    pen.fillStyle = value === "x" ? lost : value === null ? MISSING : colour(value);
    // half a pixel over the edge: anti-aliased neighbours would show a line between them
    pen.fillRect(s * w, (run.blocks.length - 1 - b) * h, w + (value === null ? 0 : .5), h + (value === null ? 0 : .5));
  }

  function draw() {
    const [pen, width, height] = paper(canvas);
    const w = width / run.steps.length, h = height / run.blocks.length;
    const lost = stripes(pen);
    for (let b = 0; b < run.blocks.length; b++)
      for (let s = 0; s < run.steps.length; s++) cell(pen, w, h, b, s, lost);
    // inside the cell, where it is large enough: the canvas would cut a frame around it
    const y = (run.blocks.length - 1 - block) * h, dx = Math.min(2, w / 4), dy = Math.min(2, h / 4);
    for (const [thick, ink] of [[4, "#000"], [2, "#fff"]]) {
      pen.lineWidth = thick; pen.strokeStyle = ink;
      pen.strokeRect(step * w + dx, y + dy, w - 2 * dx, h - 2 * dy);
    }
    drawScale();
  }

  function drawScale() {
    const [pen, width, height] = paper(scale);
    const known = Number.isFinite(limits[0]);
    const at = t => metric.log ? limits[0] * (limits[1] / limits[0]) ** t : limits[0] + t * (limits[1] - limits[0]);
    for (let x = 0; known && x < width; x++) {
      pen.fillStyle = colour(at(x / width));
      pen.fillRect(x, 0, 1.5, height);
    }
    byId("heat-low").textContent = known ? show(limits[0]) : "no finite value";
    byId("heat-high").textContent = known ? show(limits[1]) : "";
  }

  function words(value) {
    return value === "x" ? "not finite" : value === null ? "not recorded" : show(value);
  }

  function say() {
    const name = run.blocks[block] ? ` (${run.blocks[block]})` : "";
    out.textContent = `step ${run.steps[step]}, block ${block}${name}: ${metric.label} ${words(metric.values[block][step])}`;
  }

  function choose() {
    const before = metric && metric.id;
    if (run !== runs[pickRun.value]) {
      run = runs[pickRun.value];
      fill(pickMetric, run.metrics.map(m => m.label));
      pickMetric.value = Math.max(0, run.metrics.findIndex(m => m.id === before));
      byId("heat-first").textContent = `step ${run.steps[0]}`;
      byId("heat-last").textContent = `step ${run.steps[run.steps.length - 1]}`;
    }
    metric = run.metrics[pickMetric.value];
    limits = findLimits();
    move(block, step);
  }

  function move(b, s) {
    block = Math.min(run.blocks.length - 1, Math.max(0, b));
    step = Math.min(run.steps.length - 1, Math.max(0, s));
    draw();
    say();
  }

  const KEYS = {
    ArrowLeft: () => move(block, step - 1), ArrowRight: () => move(block, step + 1),
    ArrowUp: () => move(block + 1, step), ArrowDown: () => move(block - 1, step),
    Home: () => move(block, 0), End: () => move(block, run.steps.length - 1),
    PageUp: () => move(run.blocks.length - 1, step), PageDown: () => move(0, step),
  };
  grid.addEventListener("keydown", event => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  canvas.addEventListener("pointermove", pick);
  canvas.addEventListener("pointerdown", pick);
  function pick(event) {
    const box = canvas.getBoundingClientRect();
    const s = Math.floor((event.clientX - box.left) / box.width * run.steps.length);
    const b = run.blocks.length - 1 - Math.floor((event.clientY - box.top) / box.height * run.blocks.length);
    if (s !== step || b !== block) move(b, s);
  }

  fill(pickRun, runs.map(r => r.name));
  byId("heat-runs").hidden = runs.length < 2;
  byId("heat").hidden = false;
  pickRun.addEventListener("change", choose);
  pickMetric.addEventListener("change", choose);
  new ResizeObserver(draw).observe(canvas);
  const [sample] = paper(byId("heat-lost"));
  sample.fillStyle = stripes(sample);
  sample.fillRect(0, 0, 99, 99);
  choose();
})();
