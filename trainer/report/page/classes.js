"use strict";
// Classes of a pretraining run: confusion as a sorted heat map, accuracy against consistency, a map of features.

// Width of a drawing: what it should have, or what there is on a narrow screen.
const roomy = (wanted) => Math.max(280, Math.min(wanted, main.clientWidth - 60));

// A plot of points with one chosen at a time: pointer or arrow keys. points: {x, y, name, fill?, hollow?}; choose(index).
function pointPlot({
  title,
  points,
  xName,
  yName,
  xRange,
  yRange,
  height = 420,
  grid = true,
  order,
  choose,
  percents = false,
}) {
  const width = roomy(640),
    left = grid ? 56 : 10,
    bottom = grid ? 42 : 10,
    top = 10,
    right = 12;
  const inset = 8,
    at = ([low, high], value, first, last) => {
      const by = Math.sign(last - first) * inset;
      return first + by + ((value - low) / (high - low || 1)) * (last - first - 2 * by);
    };
  const spots = points.map((one) => ({
    x: at(xRange, one.x, left, width - right),
    y: at(yRange, one.y, height - bottom, top),
  }));
  const circles = points.map((one, i) =>
    el("circle", {
      cx: spots[i].x.toFixed(1),
      cy: spots[i].y.toFixed(1),
      r: one.hollow ? 3.4 : 4.2,
      style: one.hollow
        ? `fill: none; stroke: ${one.fill}; stroke-width: 1.4`
        : `fill: ${one.fill}`,
    }),
  );
  const label = (value) => (percents ? percent(value) : String(value));
  const svg = el(
    "svg",
    {
      viewBox: `0 0 ${width} ${height}`,
      role: "slider",
      tabindex: 0,
      "aria-label": `${title}: arrow keys choose a point`,
      "aria-valuemin": 1,
      "aria-valuemax": points.length,
      "aria-valuenow": 1,
    },
    grid
      ? [
          ...ticks(...xRange, 5).flatMap((v) => [
            el("line", {
              class: "grid",
              x1: at(xRange, v, left, width - right),
              x2: at(xRange, v, left, width - right),
              y1: top,
              y2: height - bottom,
            }),
            el(
              "text",
              {
                x: at(xRange, v, left, width - right),
                y: height - bottom + 17,
                "text-anchor": "middle",
              },
              label(v),
            ),
          ]),
          ...ticks(...yRange, 5).flatMap((v) => [
            el("line", {
              class: "grid",
              x1: left,
              x2: width - right,
              y1: at(yRange, v, height - bottom, top),
              y2: at(yRange, v, height - bottom, top),
            }),
            el(
              "text",
              { x: left - 7, y: at(yRange, v, height - bottom, top) + 4, "text-anchor": "end" },
              label(v),
            ),
          ]),
        ]
      : [],
    grid
      ? [
          el("text", { x: (left + width) / 2, y: height - 8, "text-anchor": "middle" }, xName),
          el(
            "text",
            {
              x: 14,
              y: height / 2 - 16,
              "text-anchor": "middle",
              transform: `rotate(-90 14 ${height / 2 - 16})`,
            },
            yName,
          ),
        ]
      : [],
    circles,
  );
  let chosen = -1;
  const pick = (index) => {
    if (index < 0 || index === chosen) return;
    circles[chosen]?.classList.remove("chosen");
    chosen = index;
    circles[index].classList.add("chosen");
    svg.append(circles[index]);
    svg.setAttribute("aria-valuenow", order.indexOf(index) + 1);
    svg.setAttribute("aria-valuetext", points[index].name);
    choose(index);
  };
  const under = (event) => {
    const box = svg.getBoundingClientRect(),
      x = ((event.clientX - box.left) * width) / box.width,
      y = ((event.clientY - box.top) * height) / box.height;
    let best = -1,
      least = 30 ** 2;
    spots.forEach((one, i) => {
      const far = (one.x - x) ** 2 + (one.y - y) ** 2;
      if (far < least && circles[i].style.display !== "none") {
        best = i;
        least = far;
      }
    });
    return best;
  };
  svg.addEventListener("pointermove", (event) => pick(under(event)));
  svg.addEventListener("pointerdown", (event) => pick(under(event)));
  svg.addEventListener("keydown", (event) => {
    const move = {
      ArrowLeft: -1,
      ArrowUp: -1,
      ArrowRight: 1,
      ArrowDown: 1,
      PageUp: -20,
      PageDown: 20,
    }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    pick(
      order[
        Math.max(0, Math.min(order.length - 1, (chosen < 0 ? -1 : order.indexOf(chosen)) + move))
      ],
    );
  });
  return { node: el("div", { class: "plot" }, svg), pick, circles };
}

function classViews(run) {
  const found = run.classes,
    C = found.numClasses,
    order = found.order,
    rank = Object.fromEntries(order.map((label, i) => [label, i]));
  const name = (label) => (found.names[label] ? `${label} (${found.names[label]})` : String(label));
  const [depth, , across] = found.extent,
    [side, columns, each] = found.classTile;
  const axial = (label) =>
    tile(
      found.pictures,
      `Class ${name(label)}, axial`,
      side,
      columns,
      label * each,
      found.extent[1] / across,
    );
  const coronal = (label) =>
    tile(
      found.pictures,
      `Class ${name(label)}, coronal`,
      side,
      columns,
      label * each + 1,
      depth / across,
    );
  const pictures = (label) =>
    el(
      "figure",
      {},
      el("div", { class: "pictures" }, axial(label), coronal(label)),
      el("figcaption", {}, `Class ${name(label)}: its reference, axial and coronal`),
    );
  const colour = (label) => {
    const hue = Math.round((300 * rank[label]) / Math.max(1, C - 1));
    return `light-dark(hsl(${hue} 75% 36%), hsl(${hue} 70% 68%))`;
  };
  return [
    found.confusion && confusionView(),
    found.confusion && accuracyView(),
    featureView(),
  ].filter(Boolean);

  function confusionView() {
    const { cells, crops, patients, accuracy, pairs } = found.confusion;
    const totals = {},
      counts = {};
    for (const [i, j, n] of cells) {
      totals[i] = (totals[i] ?? 0) + n;
      counts[`${i} ${j}`] = n;
    }
    const shown = order.filter((label) => totals[label] || cells.some(([, j]) => j === label)),
      place = Object.fromEntries(shown.map((label, i) => [label, i]));
    const N = shown.length,
      labelled = N <= 40 && main.clientWidth > 700,
      left = labelled ? 110 : 4,
      size = 560,
      step = size / N,
      full = size + left;
    const brief = (label) => {
      const text = name(label);
      return text.length > 15 ? `${text.slice(0, 14)}…` : text;
    };
    const chosen = el("rect", { class: "chosen", width: step, height: step, visibility: "hidden" });
    const svg = el(
      "svg",
      {
        viewBox: `0 0 ${full} ${size + 4}`,
        role: "application",
        tabindex: 0,
        "aria-label":
          "Confusion of classes: rows are true classes, columns predicted ones; arrow keys move",
      },
      el("rect", { class: "back", x: left, y: 1, width: size, height: size }),
      labelled
        ? shown.map((label, i) =>
            el(
              "text",
              {
                x: left - 6,
                y: 1 + (i + 0.5) * step + 4,
                "text-anchor": "end",
                "font-size": Math.min(12, step),
              },
              brief(label),
            ),
          )
        : [],
      cells.map(([i, j, n]) =>
        el("rect", {
          class: i === j ? "right" : "wrong",
          x: left + place[j] * step,
          y: 1 + place[i] * step,
          width: step,
          height: step,
          "fill-opacity": (0.15 + 0.85 * Math.sqrt(n / totals[i])).toFixed(3),
        }),
      ),
      chosen,
    );
    const detail = el("div", { "aria-live": "polite" });
    let row = 0,
      column = 0;
    const pick = (i, j) => {
      row = Math.max(0, Math.min(N - 1, i));
      column = Math.max(0, Math.min(N - 1, j));
      const truth = shown[row],
        guess = shown[column],
        n = counts[`${truth} ${guess}`] ?? 0,
        total = totals[truth] ?? 0;
      chosen.setAttribute("x", left + column * step);
      chosen.setAttribute("y", 1 + row * step);
      chosen.setAttribute("visibility", "visible");
      detail.replaceChildren(
        el(
          "p",
          {},
          el(
            "strong",
            {},
            truth === guess
              ? `Class ${name(truth)} recognised`
              : `Class ${name(truth)} taken for class ${name(guess)}`,
          ),
          ` in ${n} of ${plural(total, "crop")}${total ? ` (${percent(n / total)})` : ""}.`,
        ),
        pictures(truth),
        truth !== guess && pictures(guess),
      );
    };
    const under = (event) => {
      const box = svg.getBoundingClientRect(),
        zoom = full / box.width;
      const x = (event.clientX - box.left) * zoom - left,
        y = (event.clientY - box.top) * zoom - 1;
      if (x >= 0 && y >= 0 && x < size && y < size)
        pick(Math.floor(y / step), Math.floor(x / step));
    };
    svg.addEventListener("pointermove", under);
    svg.addEventListener("pointerdown", under);
    svg.addEventListener("keydown", (event) => {
      const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[
        event.key
      ];
      if (!by) return;
      event.preventDefault();
      event.stopPropagation();
      pick(row + by[0], column + by[1]);
    });
    const larger = ({ classes: [a, b], counts: [ab, ba] }) =>
      ab >= ba ? [place[a], place[b]] : [place[b], place[a]];
    if (pairs.length) pick(...larger(pairs[0]));
    else if (N) pick(0, 0);
    const list = pairs.map((pair) => {
      const {
        classes: [a, b],
        counts: [ab, ba],
        share,
      } = pair;
      return el(
        "button",
        {
          type: "button",
          class: "pair",
          click: () => {
            pick(...larger(pair));
            svg.scrollIntoView({ block: "nearest" });
          },
        },
        axial(a),
        axial(b),
        el(
          "span",
          {},
          `${name(a)} and ${name(b)}: ${percent(share)} `,
          el(
            "span",
            { class: "soft small" },
            `(${a} as ${b}: ${plural(ab, "crop")}; ${b} as ${a}: ${ba})`,
          ),
        ),
      );
    });
    return el(
      "div",
      { class: "panel" },
      el("h3", {}, "Confusion of classes"),
      el(
        "p",
        {},
        `The classification head names the class of ${percent(accuracy)} of ${plural(crops, "validation crop")} of ${plural(patients, "patient")}. Rows are true classes, columns predicted ones; blue is right, red is wrong; stronger is a larger share of the row. Classes that are taken for each other are neighbours.`,
      ),
      el("div", { class: "split" }, el("div", { class: "heat" }, svg), detail),
      list.length
        ? [el("h3", {}, "Most confused pairs"), el("div", { class: "pairs bars" }, list)]
        : el("p", {}, "No class is taken for another one."),
    );
  }

  function accuracyView() {
    const totals = {},
      right = {},
      wrong = {};
    for (const [i, j, n] of found.confusion.cells) {
      totals[i] = (totals[i] ?? 0) + n;
      if (i === j) right[i] = n;
      else if (n > (wrong[i]?.[1] ?? 0)) wrong[i] = [j, n];
    }
    const labels = order
      .filter((label) => totals[label])
      .sort((a, b) => (right[a] ?? 0) / totals[a] - (right[b] ?? 0) / totals[b]);
    const points = labels.map((label) => ({
      x: found.consistency[label],
      y: (right[label] ?? 0) / totals[label],
      name: `Class ${name(label)}`,
      fill: colour(label),
    }));
    const detail = el(
      "div",
      { "aria-live": "polite" },
      el("p", { class: "soft" }, "Point at a class, or use the arrow keys."),
    );
    const low = Math.min(0.9, ...points.map((one) => one.x));
    const plot = pointPlot({
      title: "Accuracy against consistency",
      points,
      xName: "consistency of the class",
      yName: "accuracy",
      xRange: [Math.floor(low * 10) / 10, 1],
      yRange: [0, 1],
      order: points.map((_, i) => i),
      choose: (i) =>
        detail.replaceChildren(
          el(
            "p",
            {},
            el("strong", {}, points[i].name),
            `: accuracy ${percent(points[i].y)} of ${plural(totals[labels[i]], "crop")}, consistency ${number(points[i].x)}`,
          ),
          pictures(labels[i]),
        ),
    });
    return el(
      "div",
      { class: "panel" },
      el(
        "h3",
        {},
        "Accuracy of each class against its ",
        term(
          "consistency",
          "Probability that two members of the class are more alike than a member and a crop of another class: 1 is perfect, 0.5 is chance",
        ),
      ),
      el(
        "p",
        {},
        "Low and left: the class itself mixes anatomy; think about excluding it. Low and right: a clear class that the net does not tell from others yet.",
      ),
      el("div", { class: "split" }, plot.node, detail),
      el(
        "details",
        {},
        el("summary", {}, "As a table"),
        table(
          ["Class", "Validation crops", "Accuracy", "Consistency", "Most often taken for"],
          labels.map((label) => [
            name(label),
            totals[label],
            percent((right[label] ?? 0) / totals[label]),
            number(found.consistency[label]),
            wrong[label] ? `${name(wrong[label][0])} (${wrong[label][1]})` : "-",
          ]),
          [1, 2, 3],
        ),
      ),
    );
  }

  function featureView() {
    const { at, label: labels, split, predicted } = found.points,
      nearest = found.nearest;
    const pairs = [
      [0, 1],
      [0, 2],
      [1, 2],
      [2, 3],
    ].filter(([, b]) => b < found.explained.length);
    const state = { axes: 0, colour: "class", only: "" };
    const [crop, across] = found.cropTile,
      holder = el("div"),
      detail = el(
        "div",
        { "aria-live": "polite" },
        el("p", { class: "soft" }, "Point at a crop, or use the arrow keys."),
      );
    const fills = {
      class: (i) => colour(labels[i]),
      split: (i) => (split[i] ? "var(--validation)" : "var(--train)"),
      right: (i) => (predicted[i] === labels[i] ? "var(--good)" : "var(--bad)"),
    };
    const sorted = [...labels.keys()].sort((a, b) => rank[labels[a]] - rank[labels[b]] || a - b);
    const range = (axis) => [
      Math.min(...at.map((one) => one[axis])),
      Math.max(...at.map((one) => one[axis])),
    ];
    let plot = null;
    const dim = () =>
      plot.circles.forEach((circle, i) =>
        circle.classList.toggle("dim", state.only !== "" && labels[i] !== Number(state.only)),
      );
    const draw = () => {
      const [a, b] = pairs[state.axes] ?? [0, 0];
      plot = pointPlot({
        title: "Map of features",
        points: labels.map((label, i) => ({
          x: at[i][a],
          y: at[i][b],
          name: `Crop of class ${name(label)}`,
          fill: fills[state.colour](i),
          hollow: !split[i],
        })),
        xRange: range(a),
        yRange: range(b),
        height: 480,
        grid: false,
        order: sorted,
        choose,
      });
      holder.replaceChildren(
        plot.node,
        el(
          "p",
          { class: "soft small" },
          `Across: component ${a + 1} (${percent(found.explained[a])} of the variance); up: component ${b + 1} (${percent(found.explained[b])}). Filled: validation; ring: train.`,
        ),
      );
      dim();
    };
    const choose = (i) =>
      detail.replaceChildren(
        el(
          "p",
          {},
          el("strong", {}, `Class ${name(labels[i])}`),
          `, ${split[i] ? "validation" : "train"}`,
          predicted
            ? predicted[i] === labels[i]
              ? ", recognised"
              : `, taken for class ${name(predicted[i])}`
            : "",
        ),
        el(
          "div",
          { class: "pictures" },
          tile(found.crops, "The crop, axial", crop, across, i, found.extent[1] / found.extent[2]),
        ),
        pictures(labels[i]),
        predicted && predicted[i] !== labels[i] ? pictures(predicted[i]) : null,
      );
    draw();
    const colours = [
      ["class", "Class"],
      ["split", "Split"],
      ...(predicted ? [["right", "Right or wrong"]] : []),
    ];
    return el(
      "div",
      { class: "panel" },
      el("h3", {}, "Map of features"),
      nearest
        ? el(
            "p",
            {},
            el("strong", {}, percent(nearest.accuracy)),
            ` of ${plural(nearest.validation, "validation crop")} of ${plural(nearest.patients, "patient")} have the class of most of their ${nearest.neighbours} nearest training crops, which are of other patients (${nearest.train} crops of ${plural(nearest.classes, "class", "classes")}). Chance is about ${number(100 / nearest.classes, 1)} %; the crops themselves, compared without a net, reach ${percent(nearest.crops)}.`,
          )
        : el("p", {}, "Without validation crops there is no test across patients."),
      el(
        "p",
        { class: "soft" },
        "Each point is a crop: the means over space of the encoder's deepest features, in the directions of most variance. Points that are near here may be far apart in other directions.",
      ),
      el(
        "div",
        { class: "row" },
        "Colour ",
        choice("Colour", colours, "class", (value) => {
          state.colour = value;
          draw();
        }),
        pairs.length > 1 &&
          select(
            "Components",
            Object.fromEntries(pairs.map(([a, b], i) => [i, `${a + 1} and ${b + 1}`])),
            0,
            (value) => {
              state.axes = Number(value);
              draw();
            },
          ),
        select(
          "Class",
          {
            "": "all",
            ...Object.fromEntries(
              [...new Set(labels)].sort((a, b) => a - b).map((label) => [label, name(label)]),
            ),
          },
          "",
          (value) => {
            state.only = value;
            dim();
          },
        ),
      ),
      el("div", { class: "split" }, holder, detail),
    );
  }
}
