// Why: the verdict as a picture, and a fold for each rank with the lines of code in which it is held up. The kernel makes
// both; what helps is a button of the banner above.

const CANNOT_GO_ON = ["hung", "failed", "lost"];

class WhySection {
  constructor(parent, name, send) {
    Object.assign(this, { name, send, have: null });
    this.box = make("details", "why", parent);
    make("summary", "", this.box, "who waits for whom");
    this.place = make("div", "picture", this.box);
    this.box.hidden = true;
    this.box.open = true;
  }

  // `shown`: the kernel's trait. Asks once for each verdict.
  show(shown) {
    const hangs = shown.verdict || CANNOT_GO_ON.includes(shown.state), key = hangs ? `${shown.state} ${shown.verdict || shown.message}` : "";
    if (!hangs) this.box.hidden = true;
    if (key === this.have) return;
    this.have = key;
    if (key) this.send({ do: "explain", view: this.name, have: key });
  }

  hear({ why }) {
    if (why?.view !== this.name || why.have !== this.have) return;
    this.box.hidden = !why.html;
    this.place.innerHTML = why.html; // escaped by the kernel
    this.linkToJupyter(why.home);
  }

  // Only the page knows the folder that Jupyter serves, and under which address. An address of Jupyter names a file, no
  // line of it; a command that goes to a line is refused to outputs, or asks first.
  linkToJupyter(home) {
    const config = JSON.parse(document.getElementById("jupyter-config-data")?.textContent ?? "{}"), { baseUrl, serverRoot } = config;
    if (!baseUrl || !serverRoot) return;
    const root = `${serverRoot.replace(/^~/, home).replace(/\/$/, "")}/`, opens = config.notebookPage ? "edit" : "lab/tree";
    for (const link of this.place.querySelectorAll("a[data-file]")) {
      const { file } = link.dataset;
      if (!file.startsWith(root)) continue;
      const path = file.slice(root.length).split("/").map(encodeURIComponent).join("/"), beside = link.cloneNode(false);
      Object.assign(link, { href: `${baseUrl}${opens}/${path}`, target: "_blank", title: `${file}: opens in Jupyter, at its first line` });
      beside.textContent = "VS Code";
      link.after(" (opens the file; at the line: ", beside, ")");
    }
  }
}
