// Verbs of a run that need more than a press: each has a form that shows its call as it is filled in. Enter makes the call,
// Escape leaves the form. The kernel's side is actions.py.

// A field: [name, type, title, default]. Of type "text", "number", "check" or a list of choices; a call leaves out what is
// empty or has its default.
const FORMS = [
  { verb: "decode", label: "decode …", title: "generate new tokens, after the end of prefill",
    fields: [["max_new_tokens", "number", "how many more; empty: as the run's parameters say"]] },
  { verb: "inject", label: "inject …", title: "break something on purpose, at the selected block if no other is named",
    fields: [["kind", "kinds", "what to break"], ["rank", "number", ""], ["layer", "number", ""], ["chunk", "number", ""],
      ["tensor", ["", "K", "V"], "K or V"], ["head", "number", ""], ["token", "number", "a position in the prompt"], ["dim", "number", ""],
      ["bit", "number", "0 is the lowest"], ["dtype", ["", "bfloat16", "float16", "float32"], "through which it is cast"],
      ["seed", "number", "of the permutation"], ["where", ["", "memory", "wire", "compute"], "where it strikes"]] },
  { verb: "compare", label: "reference …", title: "compare what the ranks hold with transformers' own forward", placed: ["reference"],
    fields: [["dtype", ["", "float32", "bfloat16", "float16"], "the reference's; empty: the run's own"]] },
  { verb: "save", label: "save …", title: "save the run to a folder, which dinfer.open opens",
    fields: [["folder", "text", "the folder", "saved"], ["kv", "check", "values of KV, not digests alone", true],
      ["hidden", "check", "hidden states, for replays", true], ["prompt", "check", "the prompt's text", false]] },
  { verb: "report", label: "report …", title: "write what is known of the run to one HTML file",
    fields: [["path", "text", "the file", "report.html"], ["prompt", "check", "with the prompt and the new text", false]] },
];
const PRESSES = [
  ["token ▶", { do: "verb", verb: "step", given: { unit: "token" } }, 'run.step("token"): one new token more, after prefill'],
  ["◀ token", { do: "verb", verb: "step_back", given: { unit: "token" } }, 'run.step_back("token"): forget the last new token'],
];
const PLACED = ["kind", "folder", "path", "unit"];

class ActionBar {
  // `panel`: { send(message), selected(), leave() }.
  constructor(parent, board, panel) {
    Object.assign(this, { board, panel, open: null });
    this.bar = make("div", "bar actions", parent);
    this.bar.setAttribute("role", "toolbar");
    this.bar.setAttribute("aria-label", "decode, inject, compare, save, report, recover");
    for (const [text, message, title] of PRESSES) {
      Object.assign(make("button", "", this.bar, text), { title, onclick: () => panel.send(message) });
    }
    for (const form of FORMS) {
      const button = make("button", "", this.bar, form.label);
      Object.assign(button, { title: form.title, onclick: () => this.toggle(form) });
      button.dataset.form = form.verb;
      button.setAttribute("aria-expanded", false);
    }
    const recover = make("button", "", this.bar, "recover");
    Object.assign(recover, { title: "session.recover(): free ranks that are stuck, start lost ones again", onclick: () => panel.send({ do: "recover" }) });
    this.form = make("form", "fields verb", parent);
    this.form.hidden = true;
    this.form.onsubmit = (event) => this.submit(event);
    this.form.onkeydown = (event) => this.key(event);
    this.form.oninput = () => this.preview();
  }

  toggle(form) {
    const isOpen = this.open !== form;
    this.open = isOpen ? form : null;
    for (const button of this.bar.querySelectorAll("[data-form]")) {
      button.classList.toggle("dinfer-on", button.dataset.form === this.open?.verb);
      button.setAttribute("aria-expanded", button.dataset.form === this.open?.verb);
    }
    this.form.hidden = !isOpen;
    if (isOpen) this.build(form);
    else this.panel.leave();
  }

  build({ verb, fields }) {
    this.form.replaceChildren();
    this.inputs = new Map(fields.map((field) => [field[0], this.input(...field)]));
    if (verb === "inject") {
      const [layer, chunk] = this.panel.selected() ?? ["", ""];
      this.inputs.get("layer").value = layer;
      this.inputs.get("chunk").value = chunk;
    }
    make("button", "", this.form, verb === "compare" ? "compare" : verb).type = "submit";
    const line = make("div", "call", this.form);
    this.call = copyable(line, "");
    this.preview();
    this.form.querySelector("input, select").focus();
  }

  input(name, type, title, value = "") {
    const label = make("label", "field", this.form);
    label.dataset.name = name;
    make("span", "faint", label, name.replaceAll("_", " "));
    const choices = type === "kinds" ? Object.keys(this.board.verbs.kinds) : Array.isArray(type) ? type : null;
    const input = make(choices ? "select" : "input", "", label);
    if (choices) fill(input, choices.map((choice) => [choice, choice || "any"]));
    else Object.assign(input, { type: type === "check" ? "checkbox" : type, min: 0 });
    if (type === "check") input.checked = value;
    else if (!choices) input.value = value;
    Object.assign(input, { name, title });
    label.prepend(...(type === "check" ? [input] : []));
    return input;
  }

  // What the call is given; fields that this kind of fault does not take are hidden, and left out.
  given() {
    const given = {};
    const kind = this.open.verb === "inject" ? this.board.verbs.kinds[this.inputs.get("kind").value] : null;
    for (const [name, type, , byDefault] of this.open.fields) {
      const input = this.inputs.get(name), label = input.parentElement;
      label.hidden = Boolean(kind) && DETAILS.includes(name) && !kind.details.includes(name);
      if (label.hidden) continue;
      if (type === "check") {
        if (input.checked !== byDefault) given[name] = input.checked;
      } else if (input.value !== "") {
        given[name] = type === "number" ? Number(input.value) : input.value;
      }
    }
    if (this.open.verb === "compare") given.what = "reference";
    return given;
  }

  preview() {
    const given = this.given(), first = given.what ?? given.kind ?? given.folder ?? given.path;
    const named = Object.entries(given).filter(([name]) => ![...PLACED, "what"].includes(name));
    const parts = [...(first === undefined ? [] : [JSON.stringify(first)]), ...named.map(([name, value]) => `${name}=${python(value)}`)];
    this.call(`run.${this.open.verb}(${parts.join(", ")})`);
  }

  submit(event) {
    event.preventDefault();
    this.panel.send({ do: "verb", verb: this.open.verb, given: this.given() });
  }

  key(event) {
    if (event.key === "Escape") this.toggle(this.open);
    else if (event.key === "Enter" && event.target.tagName !== "BUTTON") this.form.requestSubmit();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const DETAILS = ["tensor", "head", "token", "dim", "bit", "dtype", "seed"];

function python(value) {
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}
