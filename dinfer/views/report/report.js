"use strict";
// Draws each figure when it comes near the window, and again when the theme changes; for printing all of them, light and as
// wide as the paper. The body's data-drawn is the number of figures drawn, data-busy whether more are being drawn.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { templates, config } = read("dinfer-settings");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const PAPER = document.body.classList.contains("compared") ? 500 : 700; // pixels between the margins of report.css
const figures = [...document.querySelectorAll(".drawn")];
const drawn = new Set();
const waiting = [];
let busy = false, printing = false;

function draw(place) {
  const { data, layout } = read(`${place.id}-data`);
  const template = templates[dark.matches && !printing ? "dark" : "light"];
  const size = printing ? { autosize: false, width: PAPER } : { autosize: true };
  drawn.add(place);
  document.body.dataset.drawn = drawn.size;
  return Plotly.react(place, data, { ...layout, template, ...size }, { ...config, responsive: true });
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
