"use strict";
// A fine-tuned run: test scores and masks.

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
