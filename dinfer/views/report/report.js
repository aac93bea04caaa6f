"use strict";
// Draws each figure when it comes near the window, all figures for printing, and all again when the theme changes. The
// body's data-drawn is the number of figures drawn, data-busy whether more are being drawn.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const { templates, config } = read("dinfer-settings");
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const figures = [...document.querySelectorAll(".drawn")];
const drawn = new Set();
const waiting = [];
let busy = false;

function draw(place) {
  const { data, layout } = read(`${place.id}-data`);
  const template = templates[dark.matches ? "dark" : "light"];
  drawn.add(place);
  document.body.dataset.drawn = drawn.size;
  return Plotly.react(place, data, { ...layout, template, autosize: true }, { ...config, responsive: true });
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
dark.addEventListener("change", () => ask([...drawn]));
window.addEventListener("beforeprint", () => figures.filter((place) => !drawn.has(place)).forEach(draw));
