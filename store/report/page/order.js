"use strict";
// Which classes are shown, in which order.

// What is shown, in which order; a reload keeps it.
const view = {
  sort: data.live ? "worst" : "best",
  text: "",
  tissue: "",
  show: "all",
  ...recall("view", {}),
  scans: null,
};
const byRank = (a, b) => a.rank[0] - b.rank[0] || a.rank[1] - b.rank[1] || a.label - b.label;
const ORDERS = {
  worst: ["worst first", (a, b) => byRank(b, a)],
  best: ["best first", byRank],
  consistency: ["consistency, highest first", (a, b) => b.consistency - a.consistency],
  number: ["number", (a, b) => a.label - b.label],
  name: ["name", (a, b) => titleOf(a).localeCompare(titleOf(b), undefined, { numeric: true })],
  members: ["members, most first", (a, b) => b.num_train - a.num_train],
  outliers: ["outliers, most first", (a, b) => b.outliers.length - a.outliers.length],
  overlap: ["overlap, largest first", (a, b) => b.overlap - a.overlap],
  ...(data.match
    ? {
        score: ["match score, highest first", (a, b) => b.median_score - a.median_score],
        weak: [
          "only just passed, most first",
          (a, b) => b.weak_members / b.num_train - a.weak_members / a.num_train,
        ],
      }
    : {}),
};
if (!ORDERS[view.sort]) view.sort = "best";
const SHOWN = {
  all: ["all", () => true],
  undecided: ["undecided", (c) => !isDecided(c)],
  kept: ["kept", (c) => c.kept],
  excluded: ["excluded", (c) => c.excluded],
  mixed: [`consistency below ${data.mixedBelow}`, (c) => c.consistency < data.mixedBelow],
  outliers: ["with outliers", (c) => c.outliers.length > 0],
};
if (!SHOWN[view.show]) view.show = "all";
const inScans = (c) => c.members.scan.filter((row) => view.scans.has(row)).length;
const matchesText = (c, text) =>
  [titleOf(c), `class ${c.label}`, c.note, ...c.tags].some((part) =>
    part.toLowerCase().includes(text),
  );
// Classes as they are shown, in order.
function chosen() {
  const text = view.text.trim().toLowerCase();
  return data.classes
    .filter(
      (c) =>
        matchesText(c, text) &&
        (!view.tissue || mostly(c) === view.tissue) &&
        SHOWN[view.show][1](c) &&
        (!view.scans || inScans(c) > 0),
    )
    .sort(ORDERS[view.sort][1]);
}
const keepView = () =>
  remember("view", { sort: view.sort, text: view.text, tissue: view.tissue, show: view.show });
