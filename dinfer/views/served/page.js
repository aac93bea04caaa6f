// The other end of model.py, and what draws the widget with it. app.py puts the panel's scripts before it; together they
// are one module, which has `render`. A message is a JSON text, then as many binary ones as it says.

const SERVER_LOST = "disconnected: `dinfer desk` was ended, or cannot be reached. What is shown stays; reload the page, or begin it again.";

class SocketModel {
  constructor(address) {
    Object.assign(this, { values: {}, handlers: {}, waiting: null, lost: SERVER_LOST });
    this.ready = new Promise((resolve) => { this.begin = resolve; });
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.hear(data);
    this.socket.onclose = () => this.lose();
  }

  get(name) {
    return this.values[name];
  }

  set(name, value) {
    this.values[name] = value;
    this.fire(`change:${name}`);
  }

  save_changes() {} // nothing that a browser sets is kept

  on(name, handler) {
    (this.handlers[name] ??= []).push(handler);
  }

  off(name, handler) {
    this.handlers[name] = (this.handlers[name] ?? []).filter((one) => one !== handler);
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  fire(name, ...parts) {
    for (const handler of this.handlers[name] ?? []) handler(...parts);
  }

  hear(data) {
    if (typeof data === "string") this.waiting = { message: JSON.parse(data), buffers: [] };
    else this.waiting.buffers.push(new DataView(data));
    const { message, buffers } = this.waiting;
    if (buffers.length === message.buffers) this.take(message, buffers);
  }

  take({ method, state, buffer_paths: paths, content }, buffers) {
    if (method === "custom") this.fire("msg:custom", content, buffers);
    if (method !== "update") return;
    paths.forEach(([name], n) => { state[name] = buffers[n]; }); // of a trait that is bytes
    Object.assign(this.values, state);
    for (const name of Object.keys(state)) this.fire(`change:${name}`);
    this.begin();
  }

  lose() {
    this.fire("comm_live_update");
  }
}

const address = new URL("socket", location.href);
address.protocol = location.protocol.replace("http", "ws");
address.search = location.search;
const model = new SocketModel(address);
model.ready.then(() => render({ model, el: document.getElementById("desk") }));
