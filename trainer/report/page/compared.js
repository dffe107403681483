"use strict";
// A comparison: bars, intervals, curves and tables.

function comparisonPage({ tables, tasks, trials }) {
  const id = (index) => `task-${index}`;
  header("Comparison", [...tasks.map((task, i) => [id(i), task.name]), ["tables", "Tables"]]);
  const text = (cell) => {
    const bold = /^\*\*(.*)\*\*(.*)$/.exec(cell);
    return bold ? el("span", {}, el("strong", {}, bold[1]), bold[2]) : cell;
  };
  show(
    el(
      "div",
      { class: "stack" },
      el("p", {}, `${plural(trials, "trial")} done.`),
      tasks.map((task, i) => section(id(i), task.name, taskView(task))),
      section(
        "tables",
        "Tables",
        el(
          "div",
          { class: "panel" },
          tables.map((block) =>
            block.heading
              ? el("h3", {}, block.heading)
              : block.text
                ? el("p", { class: "soft" }, block.text)
                : table(
                    block.head,
                    block.rows.map((row) => row.map(text)),
                  ),
          ),
        ),
      ),
    ),
  );
}

function taskView({ metric: id, starts, fractions, curves }) {
  const metric = METRICS[id]?.[0] ?? id;
  const colour = (name) =>
    `var(--run-${
      Math.max(
        0,
        starts.findIndex((one) => one.name === name),
      ) % 8
    })`;
  const charts = new Charts({ log: false, smoothing: 0, xName: "step" }),
    shares = new Charts({ log: false, smoothing: 0, xName: "training patients used (%)" });
  const series = (lines, scale = 1) =>
    lines.map((one) => ({
      name: one.name,
      colour: colour(one.name),
      kind: "validation",
      points: () => one.points.map(([x, y]) => [x * scale, 100 * y]),
    }));
  return [
    el(
      "div",
      { class: "bars" },
      el(
        "div",
        { class: "panel plot" },
        el("h3", {}, `${metric} (%) of each starting point`),
        barsOf(starts),
        el(
          "p",
          { class: "soft small" },
          "Bars: means; lines: one standard deviation; dots: trials. Green: the best, and those not significantly different from it.",
        ),
      ),
      starts.some((one) => one.gap) &&
        el(
          "div",
          { class: "panel plot" },
          el("h3", {}, `Difference to the best (points of ${metric})`),
          gapsOf(starts),
          el(
            "p",
            { class: "soft small" },
            "Dots: difference of means; lines: its 95 % interval (Welch). An interval that reaches 0 does not tell a difference.",
          ),
        ),
    ),
    curves.length || fractions.length
      ? el(
          "div",
          { class: "charts" },
          curves.length
            ? charts.add({
                title: `Validation ${metric} (%)`,
                hint: "Mean over trials",
                series: series(curves),
                legend: true,
              })
            : null,
          fractions.length
            ? shares.add({
                title: `Fewer labels: ${metric} (%)`,
                hint: "Mean over trials",
                series: series(fractions, 100),
                legend: true,
              })
            : null,
        )
      : null,
  ];
}

// Rows of a horizontal plot: names on the left, an axis below. draw(one, x, y) -> marks.
function rowsOf(starts, [low, high], draw, extra = () => []) {
  const width = roomy(520),
    step = 34,
    left = width < 450 ? 112 : 150,
    right = 30,
    bottom = 28,
    height = starts.length * step + bottom;
  const x = (now) => left + ((now - low) / (high - low || 1)) * (width - left - right);
  return el(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": "The numbers are in the tables below",
    },
    ticks(low, high, 5).flatMap((now) => [
      el("line", { class: "grid", x1: x(now), x2: x(now), y1: 0, y2: height - bottom }),
      el("text", { x: x(now), y: height - 9, "text-anchor": "middle" }, cleared(now)),
    ]),
    extra(x, height - bottom),
    starts.flatMap((one, i) => {
      const y = i * step + step / 2,
        text = one.name.length > left / 7.5 ? `${one.name.slice(0, left / 7.5 - 1)}…` : one.name;
      return [
        el(
          "text",
          { class: "name", x: left - 8, y: y + 4, "text-anchor": "end" },
          text,
          el("title", {}, one.name),
        ),
        ...draw(one, x, y),
      ];
    }),
  );
}
const whisker = (x, low, high, y) => [
  el("line", { class: "whisker", x1: x(low), x2: x(high), y1: y, y2: y }),
  ...[low, high].map((end) =>
    el("line", { class: "whisker", x1: x(end), x2: x(end), y1: y - 5, y2: y + 5 }),
  ),
];

function barsOf(starts) {
  const top = Math.max(
    ...starts.flatMap((one) => [
      100 * (one.mean + (one.std ?? 0)),
      ...one.scores.map((score) => 100 * score),
    ]),
  );
  return rowsOf(starts, [0, Math.max(top, 1e-6)], (one, x, y) => [
    el(
      "rect",
      {
        class: `bar${one.best || one.equivalent ? " best" : ""}`,
        x: x(0),
        y: y - 10,
        width: Math.max(0, x(100 * one.mean) - x(0)),
        height: 20,
      },
      el(
        "title",
        {},
        `${one.name}: ${number(100 * one.mean)} ${one.std === null ? "" : `± ${number(100 * one.std)}`}`,
      ),
    ),
    ...(one.std === null
      ? []
      : whisker(x, Math.max(0, 100 * (one.mean - one.std)), 100 * (one.mean + one.std), y)),
    ...one.scores.map((score) => el("circle", { class: "dot", cx: x(100 * score), cy: y, r: 2.5 })),
  ]);
}
function gapsOf(starts) {
  const all = starts.filter((one) => one.gap),
    ends = all.flatMap((one) => [
      100 * one.gap.mean,
      100 * (one.gap.low ?? one.gap.mean),
      100 * (one.gap.high ?? one.gap.mean),
    ]);
  const low = Math.min(0, ...ends),
    high = Math.max(0, ...ends),
    pad = (high - low) * 0.08 || 1;
  return rowsOf(
    all,
    [low - pad, high + pad],
    (one, x, y) => [
      ...(one.gap.low === null ? [] : whisker(x, 100 * one.gap.low, 100 * one.gap.high, y)),
      el("circle", { class: "dot", cx: x(100 * one.gap.mean), cy: y, r: 4.5 }),
    ],
    (x, bottom) => [
      el("line", { class: "axis", x1: x(0), x2: x(0), y1: 0, y2: bottom, "stroke-width": 2 }),
    ],
  );
}
