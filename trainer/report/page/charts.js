"use strict";
// Line charts that share a cursor, a scale and a smoothing; pictures out of sheets.

const cleared = (value) =>
  Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(1)
    : String(Number(value.toPrecision(3)));
// Round values between two, about so many.
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step)
    found.push(Number(value.toPrecision(12)));
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  const inside = found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 6
    ? inside.filter((value) => /^1/.test(value.toExponential()))
    : inside.length > 1
      ? inside
      : [low, high];
}
// Exponential moving average that starts at the first value (debiased).
function smooth(points, weight) {
  let sum = 0,
    total = 0;
  return points.map(([x, y]) => {
    sum = weight * sum + (1 - weight) * y;
    total = weight * total + 1 - weight;
    return [x, sum / total];
  });
}
function nearest(points, x) {
  let low = 0,
    high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= x) low = middle;
    else high = middle;
  }
  return Math.abs(points[high]?.[0] - x) < Math.abs(points[low]?.[0] - x)
    ? points[high]
    : points[low];
}

const swatch = (colour) => el("span", { class: "swatch", style: `background: ${colour}` });

// Charts with one cursor. `settings`: {log, smoothing, xName}; call draw() after changing them.
class Charts {
  constructor(settings) {
    this.settings = settings;
    this.charts = [];
    this.cursor = null;
  }
  // series: {name, colour, kind (validation, train, baseline), points: () => [[x, y]...]}; marks: () => [[x, text]...]
  add({ title, hint, series, marks = () => [], percent: asPercent = false, legend = false }) {
    const chart = { title, legend, series, marks, asPercent, hidden: new Set() };
    chart.svg = el("svg", {
      role: "slider",
      tabindex: 0,
      "aria-label": `${title}: arrow keys move the cursor`,
      "aria-valuemin": 0,
    });
    chart.readout = el("div", { class: "readout" });
    chart.node = el(
      "div",
      { class: "chart panel" },
      el("h3", {}, hint ? term(title, hint) : title),
      chart.svg,
      chart.readout,
    );
    chart.svg.addEventListener("pointermove", (event) => this.point(chart, event));
    chart.svg.addEventListener("pointerdown", (event) => this.point(chart, event));
    chart.svg.addEventListener("pointerleave", () => this.move(null));
    chart.svg.addEventListener("focus", () => {
      if (this.cursor === null) this.move(this.steps(chart).at(-1));
    });
    chart.svg.addEventListener("keydown", (event) => this.key(chart, event));
    this.charts.push(chart);
    new ResizeObserver(() => this.drawOne(chart)).observe(chart.node);
    return chart.node;
  }
  steps(chart) {
    return [...new Set(chart.series.flatMap((one) => one.points().map(([x]) => x)))].sort(
      (a, b) => a - b,
    );
  }
  point(chart, event) {
    const box = chart.svg.getBoundingClientRect();
    if (!chart.x) return;
    const x = chart.x.invert(((event.clientX - box.left) * chart.width) / box.width),
      all = this.steps(chart);
    this.move(
      nearest(
        all.map((one) => [one]),
        x,
      )?.[0] ?? null,
    );
  }
  key(chart, event) {
    const all = this.steps(chart),
      stride = event.shiftKey ? 10 : 1;
    const at =
      this.cursor === null
        ? all.length - 1
        : all.indexOf(
            nearest(
              all.map((x) => [x]),
              this.cursor,
            )[0],
          );
    const to = {
      ArrowLeft: at - stride,
      ArrowRight: at + stride,
      ArrowDown: at - stride,
      ArrowUp: at + stride,
      Home: 0,
      End: all.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.move(all[Math.max(0, Math.min(all.length - 1, to))]);
  }
  move(x) {
    this.cursor = x;
    for (const chart of this.charts) this.drawCursor(chart);
  }
  draw() {
    for (const chart of this.charts) this.drawOne(chart);
  }
  drawOne(chart) {
    const width = Math.round(chart.svg.getBoundingClientRect().width) || 400,
      height = 230;
    if (!chart.node.isConnected) return;
    const { log, smoothing } = this.settings,
      percents = chart.asPercent;
    const lines = chart.series
      .map((one) => ({ ...one, raw: one.points() }))
      .filter((one) => one.raw.length);
    const values = lines.flatMap((one) => one.raw.map(([, y]) => y)),
      xs = lines.flatMap((one) => one.raw.map(([x]) => x));
    if (!values.length) {
      chart.lines = [];
      chart.svg.replaceChildren();
      chart.readout.replaceChildren();
      return;
    }
    const useLog = log && !percents && values.every((value) => value > 0);
    let low = Math.min(...values),
      high = Math.max(...values);
    if (percents) {
      low = 0;
      high = 1;
    } else if (low === high) {
      [low, high] = useLog
        ? [low / 2, 2 * high]
        : [Math.min(0, 2 * low), Math.max(0, 2 * high) || 1];
    } else if (!useLog) {
      const pad = (high - low) * 0.05;
      low = low >= 0 && low - pad < 0 ? 0 : low - pad;
      high += pad;
    }
    const left = 52,
      right = 12,
      top = 8,
      bottom = 40;
    const [x0, x1] = [Math.min(0, ...xs), Math.max(...xs) || 1];
    const scaled = useLog ? Math.log : (value) => value;
    chart.width = width;
    chart.x = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
    chart.x.invert = (at) => x0 + ((at - left) / (width - left - right)) * (x1 - x0);
    chart.y = (y) =>
      height -
      bottom -
      ((scaled(y) - scaled(low)) / (scaled(high) - scaled(low))) * (height - top - bottom);
    const path = (points) =>
      points.map(([x, y]) => `${chart.x(x).toFixed(1)},${chart.y(y).toFixed(1)}`).join(" ");
    const yTicks = useLog ? logTicks(low, high) : ticks(low, high, 5);
    chart.lines = lines.map((one) => ({
      ...one,
      shown: smoothing && one.kind === "train" ? smooth(one.raw, smoothing) : one.raw,
    }));
    chart.cursorLayer = el("g");
    chart.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    chart.svg.setAttribute("height", height);
    chart.svg.setAttribute("aria-valuemax", x1);
    chart.svg.dataset.scale = useLog ? "log" : "linear";
    chart.svg.replaceChildren(
      ...yTicks.flatMap((value) => [
        el("line", {
          class: "grid",
          x1: left,
          x2: width - right,
          y1: chart.y(value),
          y2: chart.y(value),
        }),
        el(
          "text",
          { x: left - 6, y: chart.y(value) + 4, "text-anchor": "end" },
          percents ? percent(value) : cleared(value),
        ),
      ]),
      ...ticks(x0, x1, width < 420 ? 4 : 7).map((value) =>
        el(
          "text",
          { x: chart.x(value), y: height - bottom + 16, "text-anchor": "middle" },
          count(value),
        ),
      ),
      el(
        "text",
        { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" },
        this.settings.xName,
      ),
      ...chart.marks().flatMap(([x, text]) => [
        el("line", {
          class: "mark",
          x1: chart.x(x),
          x2: chart.x(x),
          y1: top,
          y2: height - bottom,
        }),
        el("text", { x: chart.x(x) + 4, y: height - bottom - 6 }, text),
      ]),
      ...chart.lines.flatMap((one) =>
        [
          one.shown !== one.raw &&
            el("polyline", { class: "raw", points: path(one.raw), style: `stroke: ${one.colour}` }),
          el("polyline", {
            class: { train: "thin", baseline: "baseline" }[one.kind],
            points: path(one.shown),
            style: `stroke: ${one.colour}`,
          }),
          ...(one.kind === "validation" && one.shown.length <= 60
            ? one.shown.map(([x, y]) =>
                el("circle", {
                  cx: chart.x(x),
                  cy: chart.y(y),
                  r: 2.6,
                  style: `fill: ${one.colour}`,
                }),
              )
            : []),
        ].filter(Boolean),
      ),
      chart.cursorLayer,
    );
    this.drawCursor(chart);
  }
  drawCursor(chart) {
    if (!chart.lines?.length) return;
    const values =
      this.cursor === null
        ? []
        : chart.lines.map((one) => ({ ...one, at: nearest(one.shown, this.cursor) }));
    const text = (value) => (chart.asPercent ? `${number(100 * value, 1)} %` : cleared(value));
    chart.cursorLayer.replaceChildren(
      ...(this.cursor === null
        ? []
        : [
            el("line", {
              class: "cursor",
              x1: chart.x(this.cursor),
              x2: chart.x(this.cursor),
              y1: 8,
              y2: 190,
            }),
            ...values.map((one) =>
              el("circle", {
                cx: chart.x(one.at[0]),
                cy: chart.y(one.at[1]),
                r: 4,
                style: `fill: ${one.colour}`,
              }),
            ),
          ]),
    );
    const parts = values.map((one) => `${one.name} ${text(one.at[1])}`);
    const where =
      this.cursor === null
        ? ""
        : `${this.settings.xName} ${count(Math.round(this.cursor * 100) / 100)}`;
    chart.svg.setAttribute("aria-valuenow", this.cursor ?? 0);
    chart.svg.setAttribute("aria-valuetext", [where, ...parts].join(", "));
    chart.readout.replaceChildren(
      ...(this.cursor === null
        ? chart.legend
          ? chart.lines.map((one) => el("span", {}, swatch(one.colour), one.name))
          : [el("span", { class: "soft" }, "Point at the chart, or use the arrow keys.")]
        : [
            el("strong", {}, where),
            ...values.map((one, i) => el("span", {}, swatch(one.colour), parts[i])),
          ]),
    );
  }
}

// Pictures: a sheet is decoded once, a part of it drawn into a canvas.
const decoded = new Map();
function sheet(name) {
  if (!decoded.has(name))
    decoded.set(
      name,
      new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.src = `data:image/webp;base64,${document.getElementById(name).textContent}`;
      }),
    );
  return decoded.get(name);
}
// A canvas with a part of a sheet: box(image) -> [left, top, width, height]; `ratio`: height over width as shown.
function picture(name, label, box, ratio = null) {
  const canvas = el("canvas", { role: "img", "aria-label": label, width: 8, height: 8 });
  if (ratio) canvas.style.aspectRatio = `1 / ${ratio}`;
  sheet(name).then((image) => {
    const [left, top, width, height] = box(image);
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").drawImage(image, left, top, width, height, 0, 0, width, height);
    canvas.dataset.drawn = "true";
  });
  return canvas;
}
const tile = (name, label, side, columns, index, ratio) =>
  picture(
    name,
    label,
    () => [(index % columns) * side, Math.floor(index / columns) * side, side, side],
    ratio,
  );
