/* The search runs in a worker, which browsers deny to pages that are opened from a folder. There, a hidden frame does. */
class IFrameWorker extends EventTarget {
  constructor(address) {
    super();
    const frame = document.createElement("iframe");
    frame.hidden = true;
    document.body.append(frame);
    this.inside = frame.contentWindow;
    this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    this.loaded = new Promise((resolve) => {
      const script = frame.contentDocument.createElement("script");
      script.src = address;
      script.onload = resolve;
      frame.contentDocument.body.append(script);
    });
  }

  async postMessage(data) {
    await this.loaded;
    this.inside.dispatchEvent(new MessageEvent("message", { data }));
  }
}

if (location.protocol === "file:") window.Worker = IFrameWorker;
window.IFrameWorker = IFrameWorker;
