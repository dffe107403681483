"use strict";
// Classes in words: titles, grades, and what the terms mean.

const titleOf = (c) => c.name || `Class ${c.label}`;
const mostly = (c) => Object.entries(c.tissue).sort((a, b) => b[1] - a[1])[0][0];
const isDecided = (c) => c.kept || c.excluded;
const scanName = (row) => `${data.scans[row].id.slice(0, 8)}, patient ${data.scans[row].patient}`;

// Consistency in words. Below `data.mixedBelow` the members may show different anatomy.
const GRADES = { good: ["▲", "good"], fair: ["●", "fair"], mixed: ["▼", "bad"] }; // sign, colour
const TERMS = {
  class:
    "A position that shows the same anatomy in many patients; its number is the pseudo-label of its crops.",
  member: "A scan in which the class was found; its crops are training examples of the class.",
  reference: "The scan in which the class's position was drawn; the others are compared with it.",
  consistency:
    "Probability that two members are more similar than a member and a crop of another class. 1 is perfect, 0.5 is chance; below 0.8 the members may show different anatomy.",
  match:
    "Median match score of the members: similarity of their surroundings to the reference's. 1 is perfect.",
  "only just passed":
    "The match score is close to its limit, or the way there and back ended far from where it began.",
  "there and back":
    "Distance in mm between the reference's position and where it is found again after going to the member and back.",
  outlier: "A member that is not similar to the other members.",
  overlap: "Share of the crop that another class also covers in the same scans.",
  body: "Share of the reference's crop that is body, not air or table.",
  distance:
    "Distance of the scan's embedding (what the autoencoder knows of its thumbnail) to the reference's.",
  tissue:
    "Share of the voxels by HU: air below -950, lung -950 to -500, fat -150 to -30, soft -30 to 130, bone above 200.",
  similarity:
    "Mean correlation of two crops, in small windows: 1 for equal anatomy, 0 for unrelated anatomy.",
  centre:
    "Where the centre of the crop lies in the reference, as shares of the body's box or of the scan, from 0 to 1, or as voxels: the setting frame says which.",
  validation:
    "Scans of patients that training never sees; they measure how well a model generalises.",
};
const hint = (...words) => words.map((word) => `${word}: ${TERMS[word]}`).join("\n");
const meaning = (word, text = word) => term(text, TERMS[word]);

function gradeMark(c) {
  const [sign, colour] = GRADES[c.grade];
  return el(
    "span",
    { class: `grade ${colour}`, title: TERMS.consistency },
    `${sign} ${c.grade} ${number(c.consistency)}`,
  );
}
function stateMark(c) {
  if (c.excluded) return el("span", { class: "state bad" }, "excluded");
  return c.kept ? el("span", { class: "state good" }, "kept") : null;
}
const figureOf = (image, caption) => el("figure", {}, image, el("figcaption", {}, caption));
