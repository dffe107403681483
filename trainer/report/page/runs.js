"use strict";
// Training runs: facts, curves, restored crops over time.

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
    const { step, captions, rows, sheet: name } = run.samples[index];
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
      "The same validation crops at each time, changed in the same way: the middle axial slice, in the range of HU that the net sees. More contrast shows soft tissue.",
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
