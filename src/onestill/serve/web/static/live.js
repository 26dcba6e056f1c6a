// The live connection. The newest request replaces older ones, as in the server, and a broken connection is opened again.
export const server = new URL("..", import.meta.url); // above /web/, wherever a proxy puts that
const IN_FLIGHT = 2; // one being drawn and one that waits; a newer one stays here until either is answered
const encoder = new TextEncoder(), decoder = new TextDecoder();

export class Live {
  // on: {state(name, seconds), picture(header, blobs, request), refused(error, request)}
  constructor(on) {
    this.on = on;
    this.nextId = 1;
    this.asked = new Map();
    this.pending = null;
    this.tries = 0;
    this.key = "";
    this.timer = 0;
    addEventListener("online", () => this.open());
    addEventListener("offline", () => this.socket?.close());
  }

  open() {
    clearTimeout(this.timer);
    if (this.socket && this.socket.readyState <= 1) return;
    this.on.state("connecting");
    const protocols = ["onestill.v1"];
    if (this.key) protocols.push("onestill.key." + btoa(this.key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", ""));
    const address = new URL("v1/realtime", server);
    address.protocol = address.protocol.replace("http", "ws");
    const socket = new WebSocket(address, protocols);
    socket.binaryType = "arraybuffer";
    socket.onmessage = (event) => this.receive(event.data);
    socket.onclose = () => socket === this.socket && this.closed();
    this.socket = socket;
    this.ready = false;
    this.refusal = null;
  }

  reopen(key) {
    this.key = key;
    this.tries = 0;
    const old = this.socket;
    this.socket = null;
    old?.close();
    this.asked.clear();
    this.open();
  }

  closed() {
    // Of the requests without an answer only the newest is sent again.
    const last = [...this.asked.values()].pop();
    this.pending ??= last ?? null;
    this.asked.clear();
    this.ready = false;
    if (this.refusal) return this.on.state("refused");
    const seconds = Math.min(30, 2 ** this.tries++) * (0.75 + Math.random() / 2);
    this.on.state("offline", Math.max(1, Math.round(seconds)));
    this.timer = setTimeout(() => this.open(), seconds * 1000);
  }

  // fields: as in the protocol, without id; image: bytes of a picture to start from
  ask(fields, image = null) {
    this.pending = { fields, image, at: performance.now() };
    this.flush();
  }

  flush() {
    if (!this.ready || !this.pending || this.asked.size >= IN_FLIGHT) return;
    const request = this.pending;
    this.pending = null;
    const id = this.nextId++;
    this.asked.set(id, request);
    const header = JSON.stringify({ id, ...request.fields });
    if (!request.image) return this.socket.send(header);
    const text = encoder.encode(header);
    const message = new Uint8Array(4 + text.length + request.image.length);
    new DataView(message.buffer).setUint32(0, text.length);
    message.set(text, 4);
    message.set(request.image, 4 + text.length);
    this.socket.send(message);
  }

  receive(data) {
    if (typeof data !== "string") return this.receivePictures(data);
    const message = JSON.parse(data);
    if (message.type === "ready") {
      this.ready = true;
      this.tries = 0;
      this.on.state("live");
      return this.flush();
    }
    if (message.type === "error" && message.id === null && this.ready) return this.giveUp(message);
    const request = this.asked.get(message.id);
    this.asked.delete(message.id);
    if (message.type === "error") {
      if (message.error.type === "authentication_error") this.refusal = message.error;
      this.on.refused(message.error, request, message.retry_after_s);
    }
    this.flush();
  }

  // A refusal without an id: nothing is waited for any more. The newest request may be what was wrong, so it is sent again
  // only when this.on asks or the connection is opened again.
  giveUp(message) {
    const newest = [...this.asked.values()].pop();
    this.asked.clear();
    if (this.pending) this.flush();
    else this.pending = newest ?? null;
    this.on.refused(message.error, newest, message.retry_after_s);
  }

  receivePictures(data) {
    const size = new DataView(data).getUint32(0);
    const header = JSON.parse(decoder.decode(new Uint8Array(data, 4, size)));
    const request = this.asked.get(header.id);
    this.asked.delete(header.id);
    this.flush();
    if (!request) return;
    let start = 4 + size;
    const lengths = header.lengths ?? [data.byteLength - start];
    const blobs = lengths.map((length) => {
      const bytes = new Uint8Array(data, start, length);
      start += length;
      return new Blob([bytes], { type: `image/${header.format}` });
    });
    this.on.picture(header, blobs, request, performance.now() - request.at);
  }
}
