"use strict";
// Draws each figure when it comes near the window, and again when the theme changes; for printing all of them, light and as
// wide as the paper. The body's data-drawn is the number of figures drawn, data-busy whether more are being drawn.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { templates, config } = read("dinfer-settings");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const isCompared = document.body.classList.contains("compared");
const PAPER = isCompared ? { width: 500, height: 620 } : { width: 700, height: 940 }; // pixels, as in report.css, less a heading
const figures = [...document.querySelectorAll(".drawn")];
const drawn = new Set();
const waiting = [];
let busy = false, printing = false;

function draw(place) {
  const { data, layout } = read(`${place.id}-data`);
  const template = templates[dark.matches && !printing ? "dark" : "light"];
  const size = printing ? fit(data, layout) : { autosize: true };
  drawn.add(place);
  document.body.dataset.drawn = drawn.size;
  return Plotly.react(place, data, { ...layout, template, ...size }, { ...config, responsive: true });
}

// The size of a figure on paper. A taller one than a page is squeezed, its lines, which are as high as their rows, too.
function fit(data, layout) {
  const part = Math.min(1, PAPER.height / layout.height);
  for (const { line } of data) if (line?.width) line.width *= part;
  return { autosize: false, width: PAPER.width, height: part * layout.height };
}

async function work() {
  if (busy) return;
  document.body.dataset.busy = busy = true;
  while (waiting.length) {
    await draw(waiting.shift());
    await new Promise((done) => setTimeout(done)); // keeps the page responsive between figures
  }
  performance.mark("drawn");
  document.body.dataset.busy = busy = false;
}

function ask(places) {
  waiting.push(...places.filter((place) => !waiting.includes(place)));
  work();
}

const near = new IntersectionObserver((entries) => {
  const come = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
  come.forEach((place) => near.unobserve(place));
  ask(come);
}, { rootMargin: "300px" });

figures.forEach((place) => near.observe(place));
dark.addEventListener("change", () => printing || ask([...drawn]));
window.addEventListener("beforeprint", () => {
  printing = true;
  figures.forEach(draw);
});
window.addEventListener("afterprint", () => {
  printing = false;
  ask(figures);
});
