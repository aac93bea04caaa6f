// The search box: it sends what was typed, and lists what the kernel has found. A click on a hit leads to it.

const FIND_MS = 200; // after the last key
const FIND_HINT = 'text of the prompt; layer 5, chunk 2, rank 1 (l5 c2 r1); a link 0→1 (or 0>1); recv kv, send hidden, layer, …; differs, nan, '
  + 'armed; slowest, slow, late, bubble, waiting. All words must hold: slowest recv kv 0>1 layer 5  [/]';

class FindBox {
  // `panel`: { send(message), lead(hit), found(blocks), leave() }.
  constructor(bar, parent, board, name, panel) {
    Object.assign(this, { board, name, panel, number: 0, hits: [] });
    const form = make("form", "find", bar);
    form.setAttribute("role", "search");
    this.input = make("input", "", form);
    Object.assign(this.input, { type: "search", placeholder: "find: lima, l5 c2, 0→1, slowest, nan …", title: FIND_HINT });
    this.input.setAttribute("aria-label", `find: ${FIND_HINT}`);
    this.input.oninput = () => this.later();
    form.onsubmit = (event) => {
      event.preventDefault();
      this.ask();
    };
    this.said = make("div", "found faint", parent);
    this.said.setAttribute("role", "status");
    this.list = make("div", "found hits", parent);
    this.list.setAttribute("role", "group");
    this.list.setAttribute("aria-label", "found");
    this.said.hidden = this.list.hidden = true;
    form.onkeydown = (event) => this.key(event);
    this.list.onkeydown = (event) => this.key(event);
  }

  focus() {
    this.input.focus();
    this.input.select();
  }

  later() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), FIND_MS);
  }

  close() {
    clearTimeout(this.timer);
  }

  ask() {
    clearTimeout(this.timer);
    const query = this.input.value.trim();
    if (query === this.query) return;
    this.query = query;
    this.number++;
    if (query) this.panel.send({ do: "find", view: this.name, number: this.number, query });
    else this.show([], 0, "");
  }

  hear({ found }) {
    if (found?.view === this.name && found.number === this.number) this.show(found.hits, found.count, found.said, found.more);
  }

  // `isMore`: there are more than `count`.
  show(hits, count, said, isMore = false) {
    this.hits = hits;
    const first = count > hits.length ? `, the first ${hits.length} are listed` : "";
    const text = said ?? (count ? `${isMore ? "more than " : ""}${number(count)} found${first}` : "nothing found");
    this.said.textContent = text;
    this.said.hidden = !text;
    this.list.hidden = !hits.length;
    this.list.replaceChildren();
    for (const hit of hits) {
      const button = make("button", "lead", this.list, hit.text);
      if (hit.severity !== "note") button.dataset.severity = hit.severity;
      button.onclick = () => this.lead(hit, button);
    }
    this.panel.found(hits.filter(({ layer, chunk }) => layer !== null && chunk !== null).map(({ layer, chunk }) => [layer, chunk]));
  }

  lead(hit, button) {
    this.list.querySelectorAll("button").forEach((one) => one.classList.toggle("dinfer-on", one === button));
    this.panel.lead(hit);
  }

  // Enter searches, or leads to the first hit once there are some; arrows go through hits; Escape leaves.
  key(event) {
    const buttons = [...this.list.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    if (event.key === "ArrowDown" && buttons.length) (buttons[at + 1] ?? buttons.at(-1)).focus();
    else if (event.key === "ArrowUp" && at >= 0) (at ? buttons[at - 1] : this.input).focus();
    else if (event.key === "Enter" && event.target === this.input && this.input.value.trim() === this.query && buttons.length) buttons[0].click();
    else if (event.key === "Enter" && event.target === this.input) this.ask();
    else if (event.key === "Escape") this.leave();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  leave() {
    this.input.value = "";
    this.ask();
    this.panel.leave();
  }
}
