"use strict";
// The page of runs: facts, curves, restored crops over time, classes, test scores; or a comparison.

const data = readData("data");
const METRICS = {
  loss: ["Loss", "The weighted sum that is trained; its parts follow"],
  restoration: [
    "Restoration",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  inpainting: [
    "Inpainting",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  shuffling: [
    "Shuffling",
    "Mean squared error of restored crops; dashed: the perturbed crop itself as the answer",
  ],
  mae: [
    "Masked autoencoding",
    "Mean squared error of hidden voxels; dashed: the mean of the visible ones as the answer",
  ],
  rotation: ["Rotation", "Cross-entropy of the rotation"],
  rubik: ["Rubik's cube", "Loss of order and rotations of sub-cubes"],
  classification: ["Classification", "Cross-entropy of the class, unweighted"],
  accuracy: ["Accuracy", "Share of crops whose class is named right"],
  rotation_accuracy: ["Accuracy of rotation"],
  order_accuracy: ["Accuracy of the order"],
  rotated_accuracy: ["Accuracy of rotated sub-cubes"],
  dice: ["Dice", "Of validation patches, mean over classes"],
  iou: ["IoU", "Intersection over union of validation patches"],
  auc: ["AUC", "Area under the ROC curve"],
  learning_rate: ["Learning rate"],
};
const SHARES = new Set([
  "accuracy",
  "rotation_accuracy",
  "order_accuracy",
  "rotated_accuracy",
  "dice",
  "iou",
  "auc",
]);
const settings = (text) => text.replaceAll("_", " ");
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  const s = Math.round(seconds),
    m = Math.round(s / 60);
  return s < 60
    ? `${s} s`
    : s < 3600
      ? `${Math.floor(s / 60)} min ${s % 60} s`
      : `${Math.floor(m / 60)} h ${m % 60} min`;
}
const value = (one) =>
  one === null || one === undefined
    ? "default"
    : one === true
      ? "yes"
      : one === false
        ? "no"
        : Array.isArray(one)
          ? one.join(", ") || "none"
          : String(one);

function header(title, sections) {
  const links = sections.map(([id, text]) => el("a", { href: `#${id}` }, text));
  document
    .getElementById("top")
    .replaceChildren(
      el("h1", {}, title),
      el("nav", { "aria-label": "Sections" }, links),
      el("span", { class: "spacer" }),
      el(
        "button",
        { type: "button", title: "Keys", "aria-label": "Keys", click: () => openKeys() },
        "?",
      ),
      themeButton(),
    );
}
const section = (id, title, ...parts) =>
  el(
    "section",
    { id, class: "stack", "aria-label": title },
    el("h2", {}, title),
    parts.flat(Infinity),
  );

// Runs

function runPage(runs) {
  const several = runs.length > 1;
  runs.forEach((run, i) => {
    run.colour = `var(--run-${i})`;
    run.name =
      several || run.label ? `${run.letter}${run.label ? `: ${run.label}` : ""}` : "The run";
  });
  const head = (run) => (several ? el("h3", {}, swatch(run.colour), run.name) : null);
  const of = (condition, draw) =>
    runs.filter(condition).map((run) => el("div", { class: "stack" }, head(run), draw(run)));
  // Of several runs, one at a time.
  const chosen = (condition, draw) => {
    const found = runs.filter(condition),
      holder = el("div", { class: "stack" });
    const turn = (letter) => {
      const run = found.find((one) => one.letter === letter);
      holder.replaceChildren(...[head(run), draw(run)].flat(Infinity).filter(Boolean));
    };
    if (found.length) turn(found[0].letter);
    return found.length > 1
      ? [
          choice(
            "Run",
            found.map((run) => [run.letter, run.name]),
            found[0].letter,
            turn,
          ),
          holder,
        ]
      : found.length
        ? [holder]
        : [];
  };
  const tuned = runs.every((run) => run.finetuning);
  const sections = [
    ["facts", "Facts", factsView(runs)],
    ["curves", "Curves", curvesView(runs)],
    [
      "samples",
      "Restored crops",
      runs.some((run) => run.samples.length)
        ? [
            el(
              "div",
              { class: "bars" },
              of((run) => run.samples.length, samplesView),
            ),
          ]
        : [],
    ],
    [
      "classes",
      "Classes and features",
      [
        ...chosen((run) => run.classes, classViews),
        ...runs
          .filter((run) => run.notMeasured)
          .map((run) =>
            el(
              "p",
              { class: "panel notmeasured" },
              several ? `${run.letter}: ` : "",
              `no confusion and no map of features: ${run.notMeasured}.`,
            ),
          ),
      ],
    ],
    ["test", "Test", chosen((run) => run.test, testView)],
  ].filter(([, , parts]) => parts.length);
  header(tuned ? "Fine-tuning" : several ? "Training runs" : "Training run", sections);
  show(
    el(
      "div",
      { class: "stack" },
      sections.map(([id, title, parts]) => section(id, title, ...parts)),
    ),
  );
}

function factsView(runs) {
  const rows = [
    [
      "Task",
      (f, run) =>
        run.finetuning
          ? "fine-tuning"
          : [f.task === "none" ? null : f.task, f.classify && "classes"]
              .filter(Boolean)
              .join(" and "),
    ],
    ["Net", (f) => f.net ?? "-"],
    [
      "Parameters",
      (f) =>
        f.parameters ? `${number(f.parameters / 1e6, f.parameters < 1e6 ? 3 : 1)} million` : "-",
    ],
    ["Steps", (f) => `${count(f.steps)}, each of ${plural(f.batch, "example")}`],
    ["Epochs", (f) => count(f.epochs)],
    [
      "Best validation",
      (f, run) =>
        run.best ? `loss ${cleared(run.best.loss)} at step ${count(run.best.step)}` : "-",
    ],
    ["Training time", (f) => duration(f.seconds)],
    [
      "Examples per second",
      (f) => (f.perSecond ? cleared(f.perSecond) : "-"),
      "Median; without validations",
    ],
    [
      "Waiting for data",
      (f) => (f.waiting === null ? "-" : percent(f.waiting)),
      "Mean share of the training time",
    ],
    ["Device", (f) => `${f.device ?? "-"}, ${f.precision}`],
    [
      "Values",
      (f) => f.values ?? "-",
      "What the net sees: the HU window mapped to 0..1, or z-scores",
    ],
    ["Excluded classes", (f) => (f.excluded?.length ? value(f.excluded) : "none")],
    [
      "Excluded members",
      (f) => count(f.excludedMembers),
      "Crops of single scans that were left out of a class",
    ],
    ["Fingerprint of the data", (f) => (f.fingerprint ? f.fingerprint.slice(0, 16) : "-")],
  ]
    .filter(
      ([name]) => name !== "Excluded classes" || runs.some((run) => run.facts.excluded?.length),
    )
    .filter(
      ([name]) => name !== "Excluded members" || runs.some((run) => run.facts.excludedMembers),
    )
    .filter(([name]) => name !== "Values" || runs.some((run) => run.facts.values));
  const names = [...new Set(runs.flatMap((run) => run.settings.map(([name]) => name)))];
  const heads = (text) =>
    runs.map((run) => (runs.length > 1 ? el("span", {}, swatch(run.colour), text(run)) : "Value"));
  const changed = names.map((name) => {
    const all = runs.map((run) => run.settings.find(([other]) => other === name)),
      standard = all.find(Boolean)[2];
    return [
      settings(name),
      ...all.map((one) => value(one ? one[1] : standard)),
      el("span", { class: "soft" }, value(standard)),
    ];
  });
  const facts = table(
    ["", ...heads((run) => run.name)],
    rows.map(([name, text, hint]) => [
      hint ? term(name, hint) : name,
      ...runs.map((run) => text(run.facts, run)),
    ]),
  );
  facts.classList.add("runs");
  return [
    el(
      "div",
      { class: runs.length > 2 ? "stack" : "bars" },
      el("div", { class: "panel" }, facts),
      el(
        "div",
        { class: "panel" },
        el("h3", {}, "Settings that differ from the defaults"),
        names.length
          ? table(["Setting", ...heads((run) => run.letter), "Default"], changed)
          : el("p", {}, "None."),
      ),
    ),
  ];
}

function curvesView(runs) {
  const state = recall("curves", { log: false, smoothing: 0, x: "steps" }),
    one = runs.length === 1;
  const xNames = { steps: "step", epochs: "epoch", crops: "examples" };
  const charts = new Charts({ log: state.log, smoothing: state.smoothing, xName: xNames[state.x] }),
    hidden = new Set();
  const factor = (run) =>
    ({ steps: 1, epochs: 1 / (run.stepsPerEpoch || 1), crops: run.facts.batch })[state.x];
  const found = new Set(runs.flatMap((run) => Object.keys(run.curves))),
    known = Object.keys(METRICS).filter((metric) => found.has(metric));
  const nodes = [
    ...known.filter((metric) => metric !== "learning_rate"),
    ...[...found].filter((metric) => !METRICS[metric]),
    ...known.filter((metric) => metric === "learning_rate"),
  ].map((metric) => {
    const series = runs.flatMap((run) =>
      ["train", "validation", "baseline"]
        .filter((kind) => run.curves[metric]?.[kind])
        .map((kind) => ({
          name: `${one ? "" : `${run.letter} `}${kind}`,
          kind,
          colour: one
            ? { train: "var(--train)", validation: "var(--validation)", baseline: "var(--soft)" }[
                kind
              ]
            : run.colour,
          points: () =>
            hidden.has(run.letter)
              ? []
              : run.curves[metric][kind].map(([x, y]) => [x * factor(run), y]),
        })),
    );
    const marks = () =>
      runs
        .filter((run) => run.warmupSteps && run.curves[metric] && !hidden.has(run.letter))
        .map((run) => [run.warmupSteps * factor(run), one ? "warm-up ends" : run.letter]);
    return charts.add({
      title: METRICS[metric]?.[0] ?? settings(metric),
      hint: METRICS[metric]?.[1],
      series,
      marks: metric === "learning_rate" ? () => [] : marks,
      percent: SHARES.has(metric),
    });
  });
  const change = (name, now) => {
    state[name] = now;
    remember("curves", state);
    Object.assign(charts.settings, {
      log: state.log,
      smoothing: state.smoothing,
      xName: xNames[state.x],
    });
    if (name === "x") charts.move(null);
    charts.draw();
  };
  const strength = el("output", {}, number(state.smoothing));
  const line = (kind, dash) =>
    el(
      "svg",
      { viewBox: "0 0 32 12" },
      el("line", {
        x1: 0,
        x2: 32,
        y1: 6,
        y2: 6,
        style: `stroke: ${one ? { train: "var(--train)", validation: "var(--validation)", baseline: "var(--soft)" }[kind] : "var(--text)"}; stroke-width: ${kind === "train" ? 1.2 : 2}`,
        "stroke-dasharray": dash,
      }),
      kind === "validation" &&
        el("circle", {
          cx: 16,
          cy: 6,
          r: 3.5,
          style: `fill: ${one ? "var(--validation)" : "var(--text)"}`,
        }),
    );
  return [
    el(
      "div",
      { class: "panel stack" },
      el(
        "div",
        { class: "row" },
        "Scale ",
        choice(
          "Scale",
          [
            ["linear", "Linear"],
            ["log", "Logarithmic"],
          ],
          state.log ? "log" : "linear",
          (now) => change("log", now === "log"),
        ),
        select(
          "Horizontal",
          { steps: "steps", epochs: "epochs", crops: "examples seen" },
          state.x,
          (now) => change("x", now),
          { id: "horizontal" },
        ),
        el(
          "label",
          { class: "row" },
          "Smoothing of training",
          el("input", {
            type: "range",
            id: "smoothing",
            min: 0,
            max: 0.98,
            step: 0.02,
            ".value": state.smoothing,
            input: (event) => {
              const now = Number(event.target.value);
              strength.textContent = number(now);
              change("smoothing", now);
            },
          }),
          strength,
        ),
      ),
      el(
        "div",
        { class: "legend" },
        el("span", {}, line("train"), "training"),
        el("span", {}, line("validation"), "validation"),
        runs.some((run) => Object.values(run.curves).some((kinds) => kinds.baseline)) &&
          el("span", {}, line("baseline", "5 4"), "trivial answer"),
        !one &&
          runs.map((run) =>
            el(
              "label",
              {},
              el("input", {
                type: "checkbox",
                ".checked": true,
                "data-run": run.letter,
                change: (event) => {
                  if (event.target.checked) hidden.delete(run.letter);
                  else hidden.add(run.letter);
                  charts.draw();
                },
              }),
              " ",
              swatch(run.colour),
              run.name,
            ),
          ),
      ),
    ),
    el("div", { class: "charts" }, nodes),
  ];
}

function samplesView(run) {
  const holder = el("div", { class: "samples" }),
    text = el("output", {});
  const draw = (index) => {
    const { step, captions, sheet: name } = run.samples[index],
      rows = 4;
    text.textContent = `step ${count(step)}`;
    holder.replaceChildren(
      ...captions.flatMap((caption, column) => [
        el("span", { class: "caption" }, caption),
        ...Array.from({ length: rows }, (_, row) =>
          picture(name, `${caption}, crop ${row + 1}, step ${step}`, (image) => {
            const [w, h] = [image.width / captions.length, image.height / rows];
            return [column * w, row * h, w, h];
          }),
        ),
      ]),
    );
  };
  const last = run.samples.length - 1;
  draw(last);
  return el(
    "div",
    { class: "panel stack" },
    el(
      "p",
      { class: "soft" },
      "The same four validation crops at each time, changed in the same way: the middle axial slice, in the range of HU that the net sees. More contrast shows soft tissue.",
    ),
    el(
      "div",
      { class: "row" },
      "Contrast ",
      choice(
        "Contrast",
        [
          ["1", "1×"],
          ["2", "2×"],
          ["4", "4×"],
        ],
        "1",
        (times) => {
          holder.style.filter = `contrast(${times})`;
        },
      ),
    ),
    el(
      "label",
      { class: "row" },
      "Time",
      el("input", {
        type: "range",
        class: "timeline",
        min: 0,
        max: last,
        ".value": last,
        "aria-label": "Time",
        input: (event) => draw(Number(event.target.value)),
      }),
      text,
    ),
    holder,
  );
}

function testView(run) {
  const { scores, cases, columns, classifies, pictures, numTest } = run.test;
  const means = Object.entries(scores).map(([name, score]) => [
    METRICS[name]?.[0] ?? name,
    score === null ? "-" : `${number(100 * score, 1)} %`,
  ]);
  const bar = (score) =>
    score === null
      ? "-"
      : el(
          "span",
          {},
          number(score, 3),
          classifies
            ? null
            : el("span", { class: "scorebar", style: `width: ${Math.round(60 * score)}px` }),
        );
  const rows = cases.map((one) => [
    one.leaked
      ? el("span", {}, one.name, " ", term("†", "The weights were pretrained on this scan"))
      : one.name,
    ...(classifies ? [columns[one.label]] : []),
    ...one.values.map(bar),
  ]);
  const perClass = columns.filter((name) => name.startsWith("dice "));
  return [
    el(
      "div",
      { class: "panel" },
      facts([...means, ["Test cases", count(numTest)]]),
      perClass.length
        ? [
            el("h3", {}, "Dice of each class"),
            table(
              ["Class", "Mean"],
              perClass.map((name) => {
                const known = cases
                  .map((one) => one.values[columns.indexOf(name)])
                  .filter((score) => score !== null);
                return [
                  name.slice(5),
                  bar(known.length ? known.reduce((a, b) => a + b) / known.length : null),
                ];
              }),
              [1],
            ),
          ]
        : null,
      rows.length
        ? [
            el("h3", {}, "Cases"),
            table(
              [
                "Case",
                ...(classifies ? ["True class"] : []),
                ...columns.map((name) => METRICS[name]?.[0] ?? name),
              ],
              rows,
            ),
          ]
        : null,
    ),
    pictures?.length
      ? el(
          "div",
          { class: "panel stack" },
          el(
            "p",
            {},
            "The axial slice with the largest true mask: the truth is outlined in green, the prediction in red.",
          ),
          el(
            "div",
            { class: "masks" },
            pictures.map((name, i) =>
              el(
                "figure",
                {},
                picture(name, `Masks of ${cases[i].name}`, (image) => [
                  0,
                  0,
                  image.width,
                  image.height,
                ]),
                el(
                  "figcaption",
                  {},
                  `${cases[i].name}: Dice ${number(cases[i].values[columns.indexOf("dice")])}`,
                ),
              ),
            ),
          ),
        )
      : null,
  ];
}

// A comparison

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
          tables
            .filter((block) => block.heading !== "Comparison")
            .map((block) =>
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

keys.view["← →"] = ["In a chart, heat map or map: move", () => {}];
if (data.comparison) comparisonPage(data.comparison);
else runPage(data.runs);
