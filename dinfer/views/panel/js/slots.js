// A cell's output is the still picture, in a slot that carries the name of the panel's model. A page that has this model
// draws the live panel in the slot. A notebook that is opened again has no such model and keeps the picture: an output of
// the widgets' own type would be an error there, although it holds the picture, too.

const LOST = "disconnected: the kernel was restarted, or has ended. This is a still picture; run the cell again for a live panel.";
const HTML_STYLE = "jp-RenderedHTMLCommon"; // Jupyter's style of tables, links and code in HTML outputs: not the panel's

class Slots {
  constructor(model) {
    Object.assign(this, { model, views: new Map(), slots: document.getElementsByClassName(model.get("slot")) });
    this.onChange = () => this.fill();
    this.changed = new MutationObserver(this.onChange);
    this.model.on("comm_live_update", this.onChange);
    hasKernel(model).then((isLive) => {
      this.isLive = isLive;
      this.changed.observe(document.body, { childList: true, subtree: true });
      this.fill();
    });
  }

  fill() {
    if (this.model.widget_manager.context?.isDisposed) this.close(); // the notebook was closed; its models are not
    else if (this.isLive()) for (const slot of this.slots) this.views.has(slot) || this.show(slot);
  }

  show(slot) {
    this.end((shown) => !shown.isConnected); // outputs that were removed; one that is only scrolled away comes back
    const still = slot.firstElementChild, output = slot.closest(`.${HTML_STYLE}`), el = make("div", "live", slot);
    still.hidden = true;
    output?.classList.remove(HTML_STYLE);
    const view = new View(this.model, el);
    this.views.set(slot, () => {
      view.close();
      el.remove();
      still.hidden = false;
      output?.classList.add(HTML_STYLE);
    });
  }

  end(which) {
    for (const [slot, close] of [...this.views]) {
      if (!which(slot)) continue;
      this.views.delete(slot);
      close();
    }
  }

  close() {
    this.changed.disconnect();
    this.model.off("comm_live_update", this.onChange);
    this.end(() => true);
  }
}

// A promise of a function that tells whether the kernel still has this panel. A model that was saved with the notebook
// never had it there; that of a restarted kernel has it no longer.
async function hasKernel(model) {
  const whole = await model.widget_manager?.get_model?.(model.get("slot"));
  return () => whole?.comm_live !== false;
}

// Keeps a panel's colours those of the page; `onChange` is called at first and with each change.
class Theme {
  constructor(root, onChange) {
    this.preference = window.matchMedia("(prefers-color-scheme: dark)");
    this.change = () => {
      const body = document.body, said = body.dataset.jpThemeLight;
      const dark = said !== undefined ? said === "false"
        : body.classList.contains("vscode-dark") || (!body.classList.contains("vscode-light") && this.preference.matches);
      root.classList.toggle("dinfer-dark", dark);
      onChange();
    };
    this.seen = new MutationObserver(this.change);
    this.seen.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "class"] });
    this.preference.addEventListener("change", this.change);
    this.change();
  }

  close() {
    this.seen.disconnect();
    this.preference.removeEventListener("change", this.change);
  }
}

function initialize({ model }) {
  const slots = new Slots(model);
  return () => slots.close();
}

// As an output of the widgets' own type, or among other widgets.
function render({ model, el }) {
  const view = new View(model, el);
  hasKernel(model).then((isLive) => isLive() || view.lose());
  return () => view.close();
}

export default { initialize, render };
