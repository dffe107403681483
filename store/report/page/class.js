"use strict";
// One class: what it is, and its members.

function classFacts(c) {
  const shares = Object.entries(c.tissue)
    .filter(([, v]) => v >= 0.01)
    .map(([k, v]) => `${k} ${percent(v)}`)
    .join(", ");
  return facts([
    [meaning("consistency", "Consistency"), gradeMark(c)],
    [
      meaning("member", "Members"),
      `${c.num_train} train, ${c.num_validation} validation; ${plural(c.patients, "patient")}`,
    ],
    data.match && [
      meaning("match", "Match score"),
      `median ${number(c.median_score)}; ${c.weak_members} of ${c.members.scan.length - 1} only just passed`,
    ],
    [
      meaning("outlier", "Outliers"),
      c.outliers.length ? `${c.outliers.length} of ${c.members.scan.length}` : "none",
    ],
    [
      meaning("overlap", "Overlap"),
      c.overlap_class < 0 || c.overlap < 0.01
        ? "none"
        : el(
            "span",
            {},
            `${percent(c.overlap)} with `,
            el(
              "a",
              { href: `#/compare/${c.label}/${c.overlap_class}` },
              titleOf(data.classes[c.overlap_class]),
            ),
          ),
    ],
    [meaning("tissue", "Tissue"), shares],
    c.body_share !== null && [meaning("body", "Body"), percent(c.body_share)],
    [
      meaning("distance", "Distance"),
      `median ${number(c.median_distance)}, interquartile range ${number(c.distance_spread)}`,
    ],
    [
      meaning("similarity", "Similarity"),
      `${number(c.similarity)} of two members, ${number(c.null_similarity)} to other classes`,
    ],
    ["Crop", `${c.extent.map((v) => number(v, 0)).join(" × ")} mm (z, y, x)`],
    [meaning("reference", "Reference"), scanName(c.reference)],
    [
      meaning("centre", "Centre"),
      `${c.centre.map((v) => number(v)).join(", ")} (z, y, x; ${data.config.frame ?? "frame"} units)`,
    ],
  ]);
}

function showClass(label) {
  const c = data.classes[label];
  if (!c) {
    show(el("p", {}, `There is no class ${label}. `, el("a", { href: "#/" }, "All classes")));
    keys.view = {};
    return;
  }
  current = label;
  const order = chosen().map((other) => other.label),
    at = order.indexOf(label);
  const near = (by) => (order.length ? order[(at + by + order.length) % order.length] : label);
  const go = (to) => {
    location.hash = `#/class/${to}`;
  };
  const count_ =
    c.shown && c.shown.length < c.members.scan.length
      ? `${c.shown.length} of ${c.members.scan.length} members (semgen browse shows all)`
      : plural(c.members.scan.length, "member");
  show(
    el(
      "div",
      { class: "class-view" },
      el(
        "aside",
        { class: "stack" },
        el(
          "div",
          {},
          el(
            "p",
            { class: "row" },
            el("a", { id: "previous", href: `#/class/${near(-1)}` }, "← Previous"),
            el("a", { id: "next", href: `#/class/${near(1)}` }, "Next →"),
            el("a", { href: "#/" }, "All classes"),
            at >= 0 && el("span", { class: "soft small" }, `${at + 1} of ${order.length}`),
            data.live &&
              el(
                "b",
                { id: "decided", class: "small" },
                `${decided()} of ${data.classes.length} decided`,
              ),
          ),
          el("h2", {}, titleOf(c), c.name && el("span", { class: "soft" }, ` (class ${label})`)),
          el("p", { class: "row" }, gradeMark(c), stateMark(c)),
        ),
        data.live ? editor(c) : noteOf(c),
        el("section", { class: "panel" }, classPictures(c, 150)),
        el("section", { class: "panel" }, classFacts(c)),
        !data.live &&
          el(
            "p",
            {},
            el(
              "a",
              { href: `#/compare/${c.label}/${c.overlap_class >= 0 ? c.overlap_class : near(1)}` },
              "Compare with another class",
            ),
          ),
      ),
      el(
        "section",
        { class: "members" },
        el("h3", {}, count_),
        ((sheetsShown = []), null),
        sheetBar(c),
        wheelTurns(contactSheet(c), true),
        memberTable(c),
      ),
    ),
  );
  document.getElementById("where").textContent = sliceWords();
  if (data.live) prefetch(nextUndecided(label) ?? near(1));
  keys.view = {
    ArrowLeft: ["Previous class", () => go(near(-1))],
    ArrowRight: ["Next class", () => go(near(1))],
    ArrowUp: ["Turn all slices", () => stepSlice(1)],
    ArrowDown: ["", () => stepSlice(-1)],
    PageUp: ["", () => stepSlice(1)],
    PageDown: ["", () => stepSlice(-1)],
    p: ["Next plane", nextPlane],
    f: [
      "Go to the members (then arrows; Enter enlarges)",
      () => main.querySelector(".tile button")?.focus(),
    ],
    Escape: [
      "All classes",
      () => {
        if (focusedMember()) main.focus();
        else location.hash = "#/";
      },
    ],
    ...(data.live
      ? curatingKeys(
          () => [label],
          () => {
            const next = nextUndecided(label);
            if (next !== null) go(next);
          },
        )
      : {}),
  };
}
// The volumes that the curator will look at next.
let fetching = 0;
function prefetch(label) {
  clearTimeout(fetching);
  fetching = setTimeout(() => {
    for (const part of ["mean", 0]) bytesOf(`volumes/${label}-${part}`).catch(() => {});
  }, 300);
}
const noteOf = (c) =>
  c.note || c.tags.length
    ? el(
        "section",
        { class: "panel" },
        c.tags.map((tag) => el("span", { class: "tag" }, tag)),
        el("p", {}, c.note),
      )
    : null;
function memberTable(c) {
  const body = el(
    "details",
    {
      toggle: () => {
        if (!body.open || body.children.length > 1) return;
        const head = [
          "scan",
          "patient",
          "split",
          "distance",
          ...(data.match ? ["match", "there and back, mm"] : []),
          "",
          ...(data.paths ? ["file"] : []),
        ];
        body.append(
          table(
            head,
            c.members.scan.map((row, i) => [
              data.scans[row].id,
              data.scans[row].patient,
              splitOf(c, i),
              number(c.members.distance[i], 3),
              ...(data.match ? [number(c.members.score[i]), number(c.members.cycle[i], 1)] : []),
              memberWords(c, i).join(", "),
              ...(data.paths ? [data.paths[row] ?? ""] : []),
            ]),
            data.match ? [3, 4, 5] : [3],
          ),
        );
      },
    },
    el("summary", {}, `Table of all ${c.members.scan.length} members`),
  );
  return body;
}
