"use strict";
// Two classes side by side; their slices turn together.

function compare(first, second) {
  const pair = [first, second].map((label) => data.classes[label]);
  if (pair.some((c) => !c)) {
    show(el("p", {}, "There is no such class. ", el("a", { href: "#/" }, "All classes")));
    keys.view = {};
    return;
  }
  const options = Object.fromEntries(
    [...data.classes].sort(ORDERS.name[1]).map((c) => [c.label, titleOf(c)]),
  );
  const shared = pair[0].members.scan.filter((scan) => pair[1].members.scan.includes(scan)).length;
  sheetsShown = [];
  const side = (c, i) =>
    el(
      "section",
      { class: "stack" },
      el(
        "div",
        { class: "row" },
        select(i ? "with" : "Compare", options, c.label, (label) => {
          location.hash = i ? `#/compare/${first}/${label}` : `#/compare/${label}/${second}`;
        }),
        el("a", { href: `#/class/${c.label}` }, "Open"),
        gradeMark(c),
        stateMark(c),
      ),
      data.live && el("div", { class: "row" }, decisionButtons(c)),
      classPictures(c, 130, 220),
      wheelTurns(contactSheet(c), true),
      el("div", { class: "panel" }, classFacts(c)),
    );
  const sides = pair.map(side);
  show(
    el(
      "p",
      { class: "row" },
      el("a", { href: "#/" }, "All classes"),
      el("span", { class: "soft" }, `${plural(shared, "scan")} in both classes`),
    ),
    sheetBar(pair[0]),
    el("div", { class: "two" }, sides),
  );
  keys.view = {
    ArrowUp: ["Turn all slices", () => stepSlice(1)],
    ArrowDown: ["", () => stepSlice(-1)],
    PageUp: ["", () => stepSlice(1)],
    PageDown: ["", () => stepSlice(-1)],
    p: ["Next plane", nextPlane],
    Escape: [
      "All classes",
      () => {
        location.hash = "#/";
      },
    ],
    ...(data.live ? historyKeys() : {}),
  };
}
