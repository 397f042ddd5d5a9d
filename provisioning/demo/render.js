// Draw the subjects' vector pictures: node render.js NODE_MODULES LABELS.json OUT
//
// LABELS.json is a list of emojibase labels. Leaves OUT/index.json (label -> hexcode) and OUT/{flat,noto,twemoji}/HEX.png,
// 256 pixels wide. A picture that a set does not have is left out and counted; a label that nobody knows is an error.
"use strict";
const fs = require("node:fs");
const path = require("node:path");

const [modules, labelsFile, out] = process.argv.slice(2);
const load = (name) => require(path.resolve(modules, name));
const { Resvg } = load("@resvg/resvg-js");
const SETS = { flat: "fluent-emoji-flat", noto: "noto", twemoji: "twemoji" };
const WIDTH = 256;
// resvg ends the whole process on these.
const UNDRAWABLE = new Set(["noto/1f4e6"]);

// Iconify names its icons after the Unicode names, with its own way to spell an apostrophe.
function names(label) {
  const plain = label.toLowerCase().replace(/ñ/g, "n").replace(/&/g, "and").replace(/[.“”!()]/g, "");
  const slug = (text) => text.replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  const spellings = [plain.replace(/[’']/g, "-"), plain.replace(/[’']/g, "")].map(slug);
  return label === "enraged face" ? [...spellings, "pouting-face"] : spellings;
}

const emojis = new Map(load("emojibase-data/en/data.json").map((entry) => [entry.label, entry]));
const index = {};
for (const label of JSON.parse(fs.readFileSync(labelsFile, "utf8"))) {
  if (!emojis.has(label)) throw new Error(`no emoji is called "${label}"`);
  index[label] = emojis.get(label).hexcode.toLowerCase();
}
for (const [style, set] of Object.entries(SETS)) {
  const { icons, aliases = {}, width: usualWidth = 16, height: usualHeight = 16 } = load(`@iconify-json/${set}/icons.json`);
  fs.mkdirSync(path.join(out, style), { recursive: true });
  let missing = 0;
  for (const [label, hex] of Object.entries(index)) {
    const name = names(label).find((spelling) => icons[spelling] || aliases[spelling]);
    if (!name || UNDRAWABLE.has(`${style}/${hex}`)) {
      missing += 1;
      continue;
    }
    const icon = icons[name] || icons[aliases[name].parent];
    const box = [icon.left || 0, icon.top || 0, icon.width || usualWidth, icon.height || usualHeight].join(" ");
    const svg = `<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="${box}">${icon.body}</svg>`;
    fs.writeFileSync(path.join(out, style, `${hex}.png`), new Resvg(svg, { fitTo: { mode: "width", value: WIDTH } }).render().asPng());
  }
  console.log(`${style}: ${missing} missing`);
}
fs.writeFileSync(path.join(out, "index.json"), JSON.stringify(index));
