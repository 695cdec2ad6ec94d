/** Plays several videos as one: the same frame number at the same time, whatever the browser does with each. */

const SLACK = 0.02; // of a frame: media times are rounded

export class Transport extends EventTarget {
  /**
   * Dispatches `frame` (detail: number of the frame shown) and `state`.
   *
   * @param {{element: HTMLVideoElement, numFrames: number}[]} tracks
   * @param {number} fps Of all of them.
   */
  constructor(tracks, fps) {
    super();
    this.tracks = tracks;
    this.fps = fps;
    this.numFrames = Math.max(...tracks.map((track) => track.numFrames));
    this.leader = /** @type {any} */ (tracks.find((track) => track.numFrames === this.numFrames)).element;
    this.rate = 1;
    this.frame = -1;
    this.ended = new AbortController();
    this.wants = false;
    const options = { signal: this.ended.signal };
    this.leader.addEventListener("ended", () => this.wants && this.#startAt(0), options);
    for (const { element } of tracks) {
      element.loop = false;
      for (const kind of ["seeked", "loadeddata"]) element.addEventListener(kind, () => this.#look(), options);
    }
    this.#tick();
  }

  get isPlaying() {
    return this.wants;
  }

  /** Number of the frame that a media time belongs to. @param {number} seconds */
  frameAt(seconds) {
    return Math.min(this.numFrames - 1, Math.max(0, Math.floor(seconds * this.fps + SLACK)));
  }

  play() {
    this.wants = true;
    this.#startAt(this.leader.ended || this.frame >= this.numFrames - 1 ? 0 : this.leader.currentTime);
  }

  pause() {
    this.wants = false;
    for (const { element } of this.tracks) element.pause();
    this.show(this.frameAt(this.leader.currentTime));
  }

  toggle() {
    if (this.wants) this.pause();
    else this.play();
  }

  /** Pause and show a frame, in all of them. A shorter video stays at its last one. @param {number} frame */
  show(frame) {
    this.wants = false;
    const wanted = Math.min(this.numFrames - 1, Math.max(0, frame));
    for (const { element, numFrames } of this.tracks) {
      element.pause();
      element.currentTime = (Math.min(wanted, numFrames - 1) + 0.5) / this.fps;
    }
    this.#tellState();
  }

  /** @param {number} frames */
  step(frames) {
    const from = this.wants ? this.frameAt(this.leader.currentTime) : Math.max(0, this.#shown());
    this.show((from + frames + this.numFrames) % this.numFrames);
  }

  /** @param {number} rate 1 is the video's own speed. */
  setRate(rate) {
    this.rate = rate;
    for (const { element } of this.tracks) element.playbackRate = rate;
    this.#tellState();
  }

  /** Stop for good. */
  end() {
    this.ended.abort();
    for (const { element } of this.tracks) element.pause();
  }

  #shown() {
    return this.frameAt(this.leader.currentTime);
  }

  /** @param {number} seconds */
  #startAt(seconds) {
    for (const { element, numFrames } of this.tracks) {
      element.currentTime = Math.min(seconds, (numFrames - 0.5) / this.fps);
      element.playbackRate = this.rate;
      // rejected where the browser wants a gesture first, or a pause came in between
      element.play().catch(() => {});
    }
    this.#tellState();
  }

  #tick() {
    if (this.ended.signal.aborted) return;
    this.#look();
    if (this.wants) this.#align();
    requestAnimationFrame(() => this.#tick());
  }

  /** Bring those that have drifted by half a frame to where the leader is. */
  #align() {
    const now = this.leader.currentTime;
    for (const { element, numFrames } of this.tracks) {
      if (element === this.leader || element.seeking) continue;
      const wanted = Math.min(now, (numFrames - 0.5) / this.fps);
      if (Math.abs(element.currentTime - wanted) > 0.5 / this.fps) element.currentTime = wanted;
      else if (element.paused && now < (numFrames - 0.5) / this.fps) element.play().catch(() => {});
    }
  }

  #look() {
    const frame = this.#shown();
    if (frame === this.frame) return;
    this.frame = frame;
    this.dispatchEvent(new CustomEvent("frame", { detail: frame }));
  }

  #tellState() {
    this.dispatchEvent(new CustomEvent("state"));
  }
}
